"""Training against the same loop in PyTorch (trainer.py), of every sparsity, and on meshes."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.mesh import on_data
from qsae_jax.sae.settings import SAEConfig
from qsae_jax.sae.train import make_step, short_rows, start
from tests.sae.oracle import arrays_of
from tests.sae.trainer import train, with_short_rows
from tests.sae.trainings import (
    ANNEAL,
    BATCHTOPK,
    CONFIGS,
    GATED,
    JUMP,
    LATENTS,
    STEPS,
    TOPK,
    D,
    X,
    batches,
    begin,
    shape_of,
    started,
    step_of,
    trained,
)  # fmt: skip

pytestmark = pytest.mark.slow
CLOSE: Any = {"rtol": 2e-4, "atol": 3e-5}
"""Float32 against float64 over nine steps that each move a weight by up to 0.013."""
FAULTS: dict[str, Any] = {
    "topk": {"project": False, "unit": 1}, "batchtopk": {"c": replace(BATCHTOPK, clip=0)},
    "p_anneal": {"c": replace(ANNEAL, p_steps=2)}, "gated": {"c": replace(GATED, schedule="linear")},
    "jumprelu": {"c": replace(JUMP, threshold_lr=0)},
}  # fmt: skip


def theirs(torch, config, **fault):
    first, shape = started(config), shape_of(config)
    given = {"c": config, "steps": STEPS, "arrays": arrays_of(first.sae), "batches": batches(config)}
    given |= {"scales": [np.asarray(s, float) for s in (first.scale, first.scale_out)], "longest": float(first.longest)}
    return train(torch, **given | {"centred": not shape.transcodes, "twins": shape.twins} | fault)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_is_that_of_pytorch(torch, name):
    """After nine steps losses, all parameters, silent tokens and dead shares, the running cuts, the weight of
    p-annealing and the average of weights. Controls: no projection of the decoder's gradient and silence counted in
    steps; no clipping; p in other steps; a linear fall; one learning rate for all."""
    config = CONFIGS[name]
    state, metrics = trained(config)
    right, ours = theirs(torch, config), arrays_of(state.sae)
    np.testing.assert_allclose([m.loss for m in metrics], right.losses, rtol=2e-4)
    for key in right.arrays:
        np.testing.assert_allclose(ours[key], right.arrays[key], err_msg=key, **CLOSE)
    np.testing.assert_allclose([m.dead for m in metrics], right.dead, rtol=1e-6)
    assert np.array_equal(state.silent, right.silent) and int(state.step) == STEPS
    assert config is not TOPK or max(right.dead) > 0
    if config is BATCHTOPK:
        np.testing.assert_allclose(state.cut, right.cut, rtol=1e-4)
        np.testing.assert_allclose(state.cuts, right.cuts, rtol=1e-4)
        assert state.cut.dtype == np.float32 and state.average is not None
        for key, average in arrays_of(state.average).items():
            np.testing.assert_allclose(average, right.average[key], err_msg=key, **CLOSE)
            assert not np.allclose(average, ours[key], **CLOSE)
    if config is ANNEAL:
        np.testing.assert_allclose(state.weight, right.weight, rtol=1e-4)
        assert not np.isclose(state.weight, 1, rtol=0.05)
    wrong = theirs(torch, config, **FAULTS[name])
    key = "threshold" if config is JUMP else "W_dec"
    assert not np.allclose(ours[key], wrong.arrays[key], **CLOSE)
    assert config is not TOPK or not np.array_equal(state.silent, wrong.silent)


def test_start_scale_and_metrics():
    """The scale is the root of the mean square norm; fvu and l0 of the first step against NumPy, before it moves.
    Control: fvu about zero instead of about the mean."""
    state = started(TOPK)
    x, sae = X[0].astype(np.float64), state.sae
    scale = np.sqrt((x**2).sum(-1).mean())
    np.testing.assert_allclose(state.scale, scale, rtol=1e-6)
    codes = np.asarray(sae.encode(X[0] / state.scale))
    error = ((X[0] / scale - np.asarray(sae.decode(jnp.asarray(codes)))) ** 2).sum()
    got = trained(TOPK)[1][0]
    np.testing.assert_allclose(got.fvu, error / (((x - x.mean(0)) / scale) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(got.l0, (codes > 0).sum(-1).mean(), rtol=1e-6)
    assert not np.isclose(got.fvu, error / ((x / scale) ** 2).sum(), rtol=1e-3)


def test_what_is_too_long_is_left_out():
    """The rows that stand in each place, against a loop: a long one first, two in a row, none that fits. Control: with
    no limit each row stands for itself."""
    x = np.ones((6, 3), np.float32) * np.array([[9], [1], [2], [9], [8], [3]])
    for longest in 6.0, 100.0:
        assert short_rows(jnp.asarray(x), jnp.asarray(longest)).tolist() == with_short_rows(x, longest)
    assert with_short_rows(x, 6.0) == [1, 1, 2, 2, 2, 5] and with_short_rows(x, 100.0) == list(range(6))
    assert np.any(np.linalg.norm(X / float(started(ANNEAL).scale), axis=-1) > started(ANNEAL).longest)


@pytest.mark.parametrize(("config", "data", "model"), [(ANNEAL, 8, 1), (TOPK, 2, 4), (JUMP, 1, 8)])
def test_every_mesh_trains_the_same(mesh, config, data, model):
    """Losses and parameters as on one device, to float32; each device holds its share of the latents, Adam's moments
    too. Control: two batches exchanged."""
    mesh(data, model)
    (state, metrics), (right, losses) = trained(config, data, model), trained(config)
    np.testing.assert_allclose([m.loss for m in metrics], [m.loss for m in losses], rtol=1e-4)
    ours, single = arrays_of(state.sae), arrays_of(right.sae)
    for name in single:
        np.testing.assert_allclose(ours[name], single[name], err_msg=name, **CLOSE)
    cut = [leaf for leaf in jax.tree.leaves((state.sae, state.opt)) if leaf.shape == (LATENTS, D)]
    assert len(cut) == 3 * (1 if config is JUMP else 2)
    assert all(len(leaf.sharding.device_set) == data * model for leaf in cut)
    assert {s.data.shape for leaf in cut for s in leaf.addressable_shards} == {(LATENTS // model, D)}
    other = trained(config, order=(0, 2, 1, *range(3, STEPS)))[0]
    assert not np.allclose(ours["W_dec"], arrays_of(other.sae)["W_dec"], **CLOSE)


def test_the_old_state_is_consumed(mesh):
    """Donation: the large arrays of the state given are gone, those of the state returned are not."""
    old = begin(TOPK)
    new, _ = step_of(TOPK)(old, on_data(X[0], mesh(1, 1)))
    large = [[leaf for leaf in jax.tree.leaves(s) if leaf.size >= D * LATENTS] for s in (old, new)]
    assert all(leaf.is_deleted() for leaf in large[0]) and not any(leaf.is_deleted() for leaf in large[1])


def mean_best_cosine(rows, truth):
    """Of each true feature with the decoder row most like it."""
    rows = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return (truth @ rows.T).max(-1).mean()


PLANTED = [SAEConfig(sparsity=name, k=3, lr=0.02, aux=0) for name in ("topk", "batchtopk", "relu")]


@pytest.mark.parametrize("config", PLANTED, ids=[config.sparsity for config in PLANTED])
def test_a_planted_dictionary_is_found(mesh, config):
    """32 true directions in 16 dimensions, 3 at a time: the mean best cosine rises from below 0.65 to above 0.8 and
    fvu falls to a fifth of the first. Control: the cosine before training."""
    rng, one, steps, batch = np.random.default_rng(0), mesh(1, 1), 250, 128
    truth = rng.standard_normal((32, 16))
    truth /= np.linalg.norm(truth, axis=-1, keepdims=True)
    chosen = np.argsort(rng.random((steps * batch, 32)), axis=-1)[:, :3]
    codes = np.zeros((steps * batch, 32))
    np.put_along_axis(codes, chosen, rng.uniform(1, 2, chosen.shape), axis=-1)
    x = jnp.asarray((codes @ truth).reshape(steps, batch, 16), jnp.float32)
    state, step = start(config, [x[0]], 64, steps, 0, one), make_step(config, steps, one)
    before, fvu = mean_best_cosine(np.asarray(state.sae.W_dec[...]), truth), []
    for i in range(steps):
        state, metrics = step(state, x[i])
        fvu.append(metrics.fvu)
    after = mean_best_cosine(np.asarray(state.sae.W_dec[...]), truth)
    assert before < 0.65 and after > 0.8 and fvu[-1] < fvu[0] / 5, (before, after, fvu[0], fvu[-1])
