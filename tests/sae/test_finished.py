"""What leaves a training and what is gone on from: the function of activations as the model gives them."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.errors import UserError
from qsae_jax.mesh import make_mesh
from qsae_jax.sae.model import unscaled
from qsae_jax.sae.optimize import unit_decoder
from qsae_jax.sae.settings import SAEConfig
from qsae_jax.sae.sparsity import BatchTopK, JumpReLU, ReLU, TopK
from qsae_jax.sae.train import finished, start
from tests.sae.oracle import arrays_of
from tests.sae.trainings import BATCHTOPK, CONFIGS, GATED, JUMP, LATENTS, STEPS, TOPK, X, Y, shape_of, started

CLOSE: Any = {"rtol": 2e-5, "atol": 5e-5}  # float32 against float64, activations of order 10


def stirred(config, seed=1):
    """The first state with no zero in its weights, decoder rows of length 1 where they are kept so."""
    state, rng = started(config), np.random.default_rng(seed)
    sae = jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape, np.float32), state.sae)
    cuts = np.where(np.arange(LATENTS) % 3, rng.uniform(0.1, 0.5, LATENTS), -1).astype(np.float32)
    sae = unit_decoder(sae) if config.unit else sae
    return state._replace(sae=sae, cut=jnp.asarray(0.31), cuts=jnp.asarray(cuts))


def by_formula(config, state, x, per_latent=True):
    """Codes and reconstruction of `x / scale` in float64, and the factor of the codes."""
    p = {name: a.astype(float) for name, a in arrays_of(state.sae).items()}
    given = x.astype(float) / np.asarray(state.scale, float)
    pre = (given - (0 if config is JUMP else p["b_dec"])) @ p["encoder"].T + p.get("b_enc", 0)
    cut, cuts = float(state.cut), np.asarray(state.cuts, float)
    each = np.where(cuts < 0, cut, np.sqrt(cut * np.abs(cuts))) if per_latent else cut
    on = {
        "topk": lambda: pre >= np.sort(pre, axis=-1)[:, -3, None],
        "batchtopk": lambda: pre > each,
        "p_anneal": lambda: pre > 0,
        "gated": lambda: pre + p["b_gate"] > 0,
        "jumprelu": lambda: pre > p["threshold"],
    }[config.sparsity]()
    size = pre * np.exp(p["r_mag"]) + p["b_mag"] if config is GATED else pre
    codes = on * np.maximum(size, 0)
    out = codes @ p["W_dec"] + p["b_dec"] + (given @ p["W_skip"] if "W_skip" in p else 0)
    return codes, out * np.asarray(state.scale_out, float), np.sqrt(np.mean(np.asarray(state.scale, float) ** 2))


@pytest.mark.parametrize("name", CONFIGS)
def test_finished_reads_activations_as_they_are(name):
    """`scale_out * reconstruction(x / scale)` and the codes times the (root mean square) scale, to 2e-5 in float32: a
    scale by norms or none, one for each twin, two of a transcoder. Controls: the dictionary not folded; one threshold
    for all latents (batchtopk)."""
    config = CONFIGS[name]
    state, x = stirred(config), X[1]
    state = state if config is not BATCHTOPK else state._replace(average=state.sae)
    sae = finished(state, config)
    codes, out, scale = by_formula(config, state, x)
    np.testing.assert_allclose(sae(x), out, **CLOSE)
    np.testing.assert_allclose(sae.encode(x), scale * codes, **CLOSE)
    assert name == "p_anneal" or not np.allclose(state.sae(x), out, rtol=1e-2, atol=1e-2)
    assert config is not JUMP or (sae.transcodes and not np.isclose(state.scale, state.scale_out, rtol=0.1))
    assert np.shape(state.scale) == ((X.shape[-1],) if config is GATED else ())
    if config is BATCHTOPK:
        assert not np.allclose(out, by_formula(config, state, x, per_latent=False)[1], **CLOSE)
        single = finished(state, replace(config, per_latent=False))
        np.testing.assert_allclose(single(x), by_formula(config, state, x, per_latent=False)[1], **CLOSE)


def test_a_threshold_at_the_cut_gives_the_codes_of_the_batch():
    """The JumpReLU that BatchTopK leaves as has its codes, on a batch whose smallest kept code is just above the cut.
    Control: a cut a little above it loses that code."""
    state = stirred(BATCHTOPK)
    codes = np.asarray(jax.jit(lambda x: BatchTopK(2.6)(state.sae.pre(x)))(X[2] / state.scale))
    least, config = codes[codes > 0].min(), replace(BATCHTOPK, per_latent=False)
    for factor, same in [(1 - 1e-5, True), (1 + 1e-5, False)]:
        left = finished(state._replace(cut=jnp.asarray(least * factor), average=None), config)
        got = np.asarray(left.encode(X[2]))
        assert isinstance(left.sparsity, JumpReLU)
        assert np.array_equal(got > 0, codes > 0) == same and (got > 0).sum() == (codes > 0).sum() - (not same)
        assert not same or np.allclose(got, codes * state.scale, **CLOSE)


def test_the_average_leaves_and_the_state_stays():
    """With an average of weights that is what leaves, with unit rows; the state keeps its own. Control: the rows of
    the average are no unit rows, and the last weights are others."""
    state = stirred(BATCHTOPK)
    average = jax.tree.map(lambda a: 0.8 * a, state.sae)
    state, rows = state._replace(average=average), np.array(average.W_dec[...])
    left: Any = None
    for _ in range(2):
        left = finished(state, BATCHTOPK)
        np.testing.assert_allclose(np.linalg.norm(left.W_dec[...], axis=-1), 1, rtol=1e-6)
        assert np.array_equal(average.W_dec[...], rows) and np.abs(np.linalg.norm(rows, axis=-1) - 1).min() > 0.1
    np.testing.assert_allclose(left.b_enc[...], 0.8 * state.scale * state.sae.b_enc[...], rtol=1e-6)
    assert not np.allclose(left.b_enc[...], state.scale * state.sae.b_enc[...], rtol=1e-2)


def going_on(config, sae):
    """The first state of another training on other activations that goes on from a dictionary."""
    first = [jnp.asarray(x) for x in np.split(3 * X[2] + 1, shape_of(config).twins, axis=-1)]
    target = [jnp.asarray(2 * Y[2] - 1)] if config is JUMP else None
    return start(config, first, LATENTS, STEPS, 5, make_mesh(1, 1), target, sae)


@pytest.mark.parametrize("config", [TOPK, GATED, JUMP], ids=["topk", "crosscoder", "transcoder"])
def test_what_is_gone_on_from_is_the_same_function(config):
    """Before the first step, in the scale of other activations, to 1e-4; decoder rows of length 1. Control: the scales
    of the two trainings differ."""
    before, x = stirred(config), X[1]
    left = finished(before, config)
    state = going_on(config, left)
    again = finished(state, config)
    np.testing.assert_allclose(again(x), left(x), rtol=1e-4, atol=1e-4)
    ours = np.asarray(state.scale_out) * np.asarray(state.sae(x / np.asarray(state.scale)))
    np.testing.assert_allclose(ours, left(x), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(state.sae.W_dec[...], axis=-1), 1, rtol=1e-5)
    assert not np.allclose(state.scale, before.scale, rtol=0.1) and not np.any(state.silent)


def test_what_cannot_be_gone_on_from_is_refused():
    """A gated dictionary as topk, a transcoder as an autoencoder. Control: as what they are, above."""
    with pytest.raises(UserError, match="gated codes is not gone on with as topk"):
        going_on(TOPK, finished(stirred(GATED)._replace(scale=jnp.ones(()), scale_out=jnp.ones(())), GATED))
    with pytest.raises(UserError, match="is a transcoder"):
        going_on(TOPK, finished(stirred(JUMP), JUMP))


def test_topk_rows_of_many_lengths_are_not_folded(make_sae, draw, mesh):
    """Going on from a TopK dictionary with free rows is refused, because folding changes which codes are the largest.
    Controls: with free rows in the training too it is taken, and a ReLU one is folded."""
    x, one = jnp.asarray(draw(7, 32, 8)), mesh(1, 1)
    sae = make_sae(TopK(3))
    with pytest.raises(UserError, match=r"rows of many lengths.*unit_decoder=no"):
        start(SAEConfig(k=3), [x], 24, 9, 0, one, initial=sae)
    for config, given in ((SAEConfig(k=3, unit_decoder="no"), sae), (SAEConfig(sparsity="p_anneal"), make_sae(ReLU()))):
        state = start(config, [x], 24, 9, 0, one, initial=given)
        np.testing.assert_allclose(state.scale * state.sae(x / state.scale), given(x), rtol=1e-4, atol=1e-4)


def test_a_centred_transcoder_is_gone_on_with(make_sae, draw, mesh):
    """dictionary_learning's take b_dec off an input of another scale than what they write: the same function before the
    first step. Control: b_dec left where it is would not be."""
    x, y, one = jnp.asarray(3 * draw(7, 32, 8) + 1), jnp.asarray(draw(8, 32, 8) / 5), mesh(1, 1)
    sae = make_sae(ReLU())
    sae.transcodes = True
    state = start(SAEConfig(sparsity="relu"), [x], 24, 9, 0, one, target=[y], initial=sae)
    assert not state.sae.centred and sae.centred
    np.testing.assert_allclose(state.scale_out * state.sae(x / state.scale), sae(x), rtol=1e-4, atol=1e-4)
    wrong = unscaled(sae, 1 / state.scale, 1 / state.scale_out)
    assert not np.allclose(state.scale_out * wrong(x / state.scale), sae(x), rtol=1e-2, atol=1e-2)
