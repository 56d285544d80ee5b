"""Planted twins and the verdicts that they call for, with dictionaries that are really trained, adapted and judged:
the same model (keep), a stream that is shifted and larger (adapt), a rotated stream (retrain), too few tokens (unsure).

The twins compute what the model computes, in another basis: norms of the stream with scale 1 see neither a rotation of
everything that is written to it and read from it, nor its size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qsae_jax.acts.stream import ActivationStream
from qsae_jax.acts.tokens import Windows
from qsae_jax.arms import rows_at
from qsae_jax.compare import transfer
from qsae_jax.compare.adapt import adapted
from qsae_jax.lm.model import LM, LMConfig
from qsae_jax.lm.rope import Rope
from qsae_jax.lm.tap import Point
from qsae_jax.mesh import make_mesh
from qsae_jax.sae.fit import Job, fit
from qsae_jax.sae.settings import SAEConfig

POINT, D, SEQ = Point(1, "resid_post"), 24, 16
CONFIG = SAEConfig(sparsity="topk", k=4, expansion=2, lr=4e-3, dead_after=4000)


@pytest.fixture(scope="module")
def lm():
    shape = {"vocab": 48, "d_model": D, "n_layers": 3, "n_heads": 2, "n_kv_heads": 2, "head_dim": 8, "d_ff": 32}
    scalars = {"norm_eps": 1e-12, "rope": Rope(1e4, 8), "tied": False, "context": 64, "act": "silu", "mlp_bias": True}
    return LM(LMConfig(family="llama", **shape, **scalars, score_scale=8**-0.5), nnx.Rngs(3))


def in_basis(lm: LM, basis, shift=None) -> LM:
    """The model with its stream times a basis `[d, d]` (a rotation times a size), and shifted from the point on."""
    twin = jax.tree.map(lambda x: x, lm)
    size = np.linalg.norm(basis[0])
    back = jnp.asarray(basis / size**2, jnp.float32)  # its inverse, transposed
    basis = jnp.asarray(basis, jnp.float32)
    twin.embed.set_value(lm.embed[...] @ basis)
    twin.head.set_value(lm.head[...] @ back * size)
    for old, new in zip(lm.blocks, twin.blocks, strict=True):
        for part in ("q", "k", "v"):
            weight = getattr(old.attn, part)[...]
            getattr(new.attn, part).set_value(jnp.einsum("de,dhk->ehk", back * size, weight))
        for part in ("gate", "up"):
            getattr(new.mlp, part).set_value((back * size).T @ getattr(old.mlp, part)[...])
        new.attn.o.set_value(old.attn.o[...] @ basis)
        new.mlp.down.set_value(old.mlp.down[...] @ basis)
    if shift is not None:
        twin.blocks[POINT.layer].mlp.down_bias.set_value(jnp.asarray(shift, jnp.float32))
    return twin


def twin_of(lm: LM, what: str) -> LM:
    rng = np.random.default_rng(2)
    rotation = np.linalg.qr(rng.normal(size=(D, D)))[0]
    shift = 2.5 * rng.normal(size=D) / D**0.5
    return {
        "same": lambda: lm,
        "shift and gain": lambda: in_basis(lm, 2.5 * np.eye(D), shift),
        "rotation": lambda: in_basis(lm, rotation),
    }[what]()


@pytest.fixture(scope="module")
def windows():
    return Windows(np.random.default_rng(1).integers(0, 48, (640, SEQ), dtype=np.int32), "random", bos=False)


@pytest.fixture(scope="module")
def verdict_of(lm, windows, tmp_path_factory):
    """Trains on 512 windows, adapts on some of them, and judges on so many of the others."""
    made = {}

    def arms(what):
        if what not in made:
            twin, mesh = twin_of(lm, what), make_mesh(1, 1)
            train = windows.part(128, 640)
            stream = ActivationStream({"fp": lm, "int4": twin}, POINT, train, mesh, batch=64)
            jobs = {"sae": Job("fp"), "reseeded": Job("fp", 1), "retrained": Job("int4"), "again": Job("int4", 1)}
            saes = fit(stream, jobs, CONFIG, 24_000, tmp_path_factory.mktemp("planted"))
            home, there = (rows_at(one, train, POINT, mesh, 1, 0) for one in (lm, twin))
            made[what] = twin, saes, adapted(saes["sae"], home, there, rank=4)
        return made[what]

    def judged(what, held, monkeypatch):
        twin, saes, ways = arms(what)
        monkeypatch.setattr(transfer, "fake_quantize", lambda lm, scheme: twin)
        found = transfer.compare(lm, "int4", saes["sae"], saes["retrained"], windows.part(0, held), POINT,
                                 reseeded=saes["reseeded"], again=saes["again"], adapted=ways)  # fmt: skip
        return found.facts

    return judged


def test_the_twins_compute_the_same(lm, windows):
    """But for the shift: the control."""
    ids = windows.ids[:4]
    scale = float(np.abs(lm(ids)).max())
    for basis in (1.7 * np.eye(D), np.linalg.qr(np.random.default_rng(2).normal(size=(D, D)))[0]):
        assert np.abs(in_basis(lm, basis)(ids) - lm(ids)).max() < 1e-4 * scale
    assert np.abs(twin_of(lm, "shift and gain")(ids) - lm(ids)).max() > 1e-2 * scale


@pytest.mark.slow
@pytest.mark.parametrize("what, choice", [("same", "keep"), ("shift and gain", "adapt"), ("rotation", "retrain")])
def test_each_twin_gets_its_verdict(what, choice, verdict_of, monkeypatch):
    facts = verdict_of(what, 128, monkeypatch)
    told = facts["verdict"]
    assert told["choice"] == choice, told["reason"]
    assert told["seeds"] == 2 and set(told["gaps"]) == {"transferred", "biases", "gain", "lowrank", "affine"}
    if what == "same":  # trained alike on the same activations
        assert told["gaps"]["transferred"]["fvu"]["value"] == pytest.approx(0, abs=1e-6)
    if what == "rotation":  # a map would undo it, and leave another dictionary
        assert told["gaps"]["affine"]["directions"] < 0.7
        assert told["gaps"]["affine"]["fvu"]["value"] < told["gaps"]["gain"]["fvu"]["value"] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("what", ["same", "shift and gain"])
def test_one_window_cannot_say(what, verdict_of, monkeypatch):
    told = verdict_of(what, 1, monkeypatch)["verdict"]
    assert told["choice"] == "unsure" and "not enough data" in told["reason"]
