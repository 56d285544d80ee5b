"""Weights cut over `data` too: each device keeps its share, the numbers stay, and only weights travel for it."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from qsae_jax import capture, fake_quantize, load_lm
from qsae_jax.mesh import make_mesh, on_data
from qsae_jax.plan.counts import traffic

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TOKENS = np.random.default_rng(0).integers(0, 97, (16, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def load(tiny_folder):
    return partial(load_lm, str(tiny_folder))


def matrices(lm):
    return [leaf.get_value() for leaf in jax.tree.leaves(nnx.state(lm), is_leaf=lambda x: isinstance(x, nnx.Variable))
            if leaf.get_value().ndim > 1]  # fmt: skip


@pytest.mark.parametrize("processing", ["none", "transformer_lens"])
@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_each_device_keeps_its_share_and_the_numbers_stay(load, shape, processing):
    """Every matrix is cut over data, twins too, whose codes stay the same bits. Control: without, none is."""
    mesh = make_mesh(*shape)
    whole, cut = (load(mesh=mesh, processing=processing, fsdp=fsdp) for fsdp in (False, True))
    for w, of in zip(matrices(cut), matrices(whole), strict=True):
        held, before = (one.addressable_shards[0].data.size for one in (w, of))
        assert held * shape[0] == before
        # The processing sums over the width: in other orders where it is cut.
        assert np.array_equal(w, of) if processing == "none" else np.allclose(w, of, **CLOSE)
    tokens = on_data(TOKENS, mesh)
    np.testing.assert_allclose(cut(tokens), load(processing=processing)(TOKENS), **CLOSE)
    four, of_four = (fake_quantize(lm, "int4") for lm in (cut, whole))
    for w, of in zip(matrices(four), matrices(of_four), strict=True):
        assert w.addressable_shards[0].data.size * shape[0] == of.addressable_shards[0].data.size
        assert processing != "none" or np.array_equal(w, of)
    assert not np.allclose(four(tokens), cut(tokens), **CLOSE)
    point = "blocks.1.resid_post"
    np.testing.assert_allclose(capture(cut, point)(tokens), capture(whole, point)(tokens), **CLOSE)


def test_only_weights_travel_for_it(load):
    """Over data the compiled pass gathers each weight about once, and no activations. Control: without, nothing."""
    mesh = make_mesh(8, 1)
    tokens = on_data(np.tile(TOKENS, (64, 1)), mesh)
    moved = {}
    for fsdp in (False, True):
        lm = load(mesh=mesh, fsdp=fsdp)
        found = traffic(jax.jit(lambda lm, tokens: lm(tokens)).lower(lm, tokens).compile().as_text() or "")
        moved[fsdp] = sum(size for _, size in found.values())
    weights = sum(w.nbytes for w in matrices(load()))
    assert moved[False] == 0 and 0.5 * weights < moved[True] < 1.5 * weights
    activations = tokens.size // 8 * 16 * 4
    assert moved[True] < 20 * activations
