"""Losses computed in chunks against the dense formula in float64, and the memory that they do not take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.lm import loss
from qsae_jax.lm.load import abstract_lm
from qsae_jax.lm.loss import token_losses
from qsae_jax.lm.model import LMConfig
from qsae_jax.lm.rope import Rope


def dense(lms, finals, tokens):
    """Loss and KL(first, model), `[b, s - 1]` for each model, from whole logits in float64."""
    logs = []
    for lm, x in zip(lms, finals, strict=True):
        head = np.asarray((lm.embed if lm.config.tied else lm.head)[...], np.float64)
        logits = np.asarray(x, np.float64)[:, :-1] @ head.T
        top = logits.max(-1, keepdims=True)
        logs.append(logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True)))
    nll = [-np.take_along_axis(log, tokens[:, 1:, None], -1)[..., 0] for log in logs]
    return nll, [(np.exp(logs[0]) * (logs[0] - log)).sum(-1) for log in logs]


@pytest.fixture(scope="module")
def models(make_lm):
    """The reference, a near twin, and a stranger with a tied head of another width."""
    near = jax.tree.map(lambda x: x * np.float32(1.003), make_lm())
    return [make_lm(), near, make_lm(seed=5, tied=True, d_model=8)]


# (batch, sequence): less than a chunk, exactly one, and several with a remainder.
SHAPES = [(1, 2), (1, 129), (5, 70)]


@pytest.mark.parametrize("b, s", SHAPES)
def test_equal_to_the_dense_formula(models, b, s):
    """Loss within 1e-5, KL within 5e-6: float32 sums over 97 logits of order 1. Controls: targets shifted by one,
    and KL in the other direction, are far away."""
    assert loss.CHUNK == 128
    random = np.random.default_rng(b * s)
    tokens = random.integers(0, 97, (b, s)).astype(np.int32)
    x, y = (random.normal(size=(b, s, d)).astype(np.float32) for d in (16, 8))
    finals = [x, x * (1 + 0.01 * random.normal(size=x.shape).astype(np.float32)), y]
    nll, kl, agree = token_losses(models, finals, tokens)
    slow_nll, slow_kl = dense(models, finals, tokens)
    assert {(one.shape, one.dtype.name) for one in [*nll, *kl]} == {((b, s - 1), "float32")}
    np.testing.assert_allclose(nll, slow_nll, atol=1e-5)
    np.testing.assert_allclose(kl, slow_kl, atol=5e-6)
    best = [np.asarray(lm.unembed(x))[:, :-1].argmax(-1) for lm, x in zip(models, finals, strict=True)]
    for mine, other in zip(agree, best, strict=True):
        assert np.array_equal(mine, other == best[0])
    assert s < 3 or float(jnp.mean(agree[2])) < 0.5 < float(jnp.mean(agree[1])) <= 1
    assert float(jnp.abs(kl[0]).max()) == 0 and 1e-5 < slow_kl[1].mean() < 1e-2 < slow_kl[2].mean()
    assert np.abs(np.asarray(nll) - dense(models, finals, np.roll(tokens, 1, axis=1))[0]).max() > 0.1
    other = dense([models[2], models[0]], [finals[2], finals[0]], tokens)[1][1]
    assert np.abs(np.asarray(kl[2]) - other).max() > 1e-2


def test_kl_of_close_models_with_large_logits(make_lm):
    """Where logits reach 100 and the models differ by 1e-4, the two normalisers cancel to about 100 * 2^-23; the
    mean stays within 2 % of float64. Control: the twin's KL to itself is 0, not that noise."""
    base = jax.tree.map(lambda x: x * 8 if x.shape == (97, 16) else x, make_lm())
    random = np.random.default_rng(0)
    tokens = random.integers(0, 97, (4, 40)).astype(np.int32)
    x, noise = random.normal(size=(2, 4, 40, 16)).astype(np.float32)
    finals = [4 * x, 4 * x + np.float32(3e-3) * noise]
    kl = token_losses([base, base], finals, tokens)[1]
    slow = dense([base, base], finals, tokens)[1]
    assert 1e-5 < slow[1].mean() < 1e-3
    assert np.abs(finals[0] @ np.asarray(base.head[...]).T).max() > 100
    np.testing.assert_allclose(kl[1].mean(), slow[1].mean(), rtol=0.02)
    assert float(jnp.abs(kl[0]).max()) == 0


def test_the_logits_never_exist_whole():
    """2,048 tokens of a 5,000-word vocabulary are 41 MB of logits a model; the compiled program of two models holds
    less than half of one beside its arguments. Control: the plain formula, compiled for the same, holds more."""
    lm = abstract_lm(LMConfig("llama", 5000, 16, 1, 4, 2, 6, 40, 3e-3, Rope(777.0, 6), False, 64, "silu", 6**-0.5))
    tokens = jax.ShapeDtypeStruct((8, 257), jnp.int32)
    x = jax.ShapeDtypeStruct((8, 257, 16), jnp.float32)
    whole = 8 * 256 * 5000 * 4

    def held(function):
        return jax.jit(function).lower([lm, lm], [x, x], tokens).compile().memory_analysis().temp_size_in_bytes

    def plain(lms, finals, tokens):
        logs = [jax.nn.log_softmax(lm.unembed(x[:, :-1])) for lm, x in zip(lms, finals, strict=True)]
        nll = [-jnp.take_along_axis(log, tokens[:, 1:, None], -1)[..., 0] for log in logs]
        return nll, [jnp.sum(jnp.exp(logs[0]) * (logs[0] - log), -1) for log in logs]

    assert held(token_losses) < 0.5 * whole
    assert held(plain) > whole
