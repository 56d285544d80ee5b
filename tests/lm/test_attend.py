"""Attention in both shapes of loop against a softmax written out in float64, within 1e-5 of values of order 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.lm import attend as module
from qsae_jax.lm.attend import Scores, _batched, _by_group, attend


def slow(q, k, v, causal=True, shared=True, cut=lambda scores: scores):
    """One query at a time: query head h reads the keys of group h // (H / G), or h % G where `shared` is false."""
    b, s, heads, width = q.shape
    groups = k.shape[2]
    out = np.zeros_like(q, dtype=np.float64)
    for i in range(b):
        for h in range(heads):
            g = h // (heads // groups) if shared else h % groups
            for t in range(s):
                end = t + 1 if causal else s
                scores = cut(k[i, :end, g].astype(np.float64) @ q[i, t, h] / np.sqrt(width))
                weights = np.exp(scores - scores.max())
                out[i, t, h] = weights @ v[i, :end, g] / weights.sum()
    return out


def random_heads(s, heads=6, groups=2, width=4):
    random = np.random.default_rng(s)
    return [random.normal(size=(2, s, n, width)).astype(np.float32) * 2 for n in (heads, groups, groups)]


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    """At most four pieces of at least two queries, so that short windows are cut as long ones are."""
    monkeypatch.setattr(module, "PIECE", 2)
    monkeypatch.setattr(module, "PIECES", 4)


def loop(name, q, k, v):
    """One of the two shapes of loop, called as `attend` calls it."""
    b, s, heads, width = q.shape
    grouped = (q * np.float32(width**-0.5)).reshape(b, s, k.shape[2], heads // k.shape[2], width)
    whole = {"_batched": _batched, "_by_group": _by_group}[name]
    return np.asarray(jax.jit(whole, static_argnums=3)(grouped, k, v, Scores(1.0))).reshape(q.shape)


@pytest.mark.parametrize("s, heads, groups", [(1, 6, 2), (3, 6, 2), (8, 6, 2), (13, 6, 2), (5, 4, 4), (6, 3, 1)])
@pytest.mark.parametrize("name", ["_batched", "_by_group"])
def test_both_loops_equal_a_slow_softmax(name, s, heads, groups):
    """Lengths that the pieces divide and do not, fewer tokens than a piece among them. Controls: attention to the
    future, and another sharing of the groups, are far away."""
    q, k, v = random_heads(s, heads, groups)
    ours = loop(name, q, k, v)
    np.testing.assert_allclose(ours, slow(q, k, v), atol=1e-5)
    if s > 1:
        assert np.abs(ours - slow(q, k, v, causal=False)).max() > 1e-2
    if 1 < groups < heads:
        assert np.abs(ours - slow(q, k, v, shared=False)).max() > 1e-2


@pytest.mark.parametrize("devices, unused", [(1, "_batched"), (8, "_by_group")])
def test_attend_takes_the_loop_of_the_machine(monkeypatch, devices, unused):
    """Groups in a loop on a single CPU device, batched where a mesh may have cut them; the same values within 1e-5.
    Control: the scale of the scores left out is far away."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    if jax.default_backend() == "cpu":
        monkeypatch.setattr(module, unused, None)
    q, k, v = random_heads(7)
    ours = attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), Scores(q.shape[-1] ** -0.5))
    np.testing.assert_allclose(ours, slow(q, k, v), atol=1e-5)
    assert np.abs(ours - slow(q * 2, k, v)).max() > 1e-2


@pytest.mark.parametrize("name", ["_batched", "_by_group"])
def test_bfloat16_scores_are_summed_in_float32(name):
    """Within 2^-7 of the largest value, of float64 on the same 16-bit inputs, for scores beyond 100, whose last
    place in bfloat16 would be 1/2. Control: with the scores rounded to bfloat16 the softmax is further away."""
    q, k, v = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in random_heads(9, width=64))
    q = q * 8
    grouped = (q.reshape(2, 9, 2, 3, 64) / 8).astype(jnp.bfloat16)  # 64**-0.5, exact
    whole = {"_batched": _batched, "_by_group": _by_group}[name]
    ours = jax.jit(whole, static_argnums=3)(grouped, k.astype(jnp.bfloat16), v.astype(jnp.bfloat16), Scores(1.0))
    assert ours.dtype == jnp.bfloat16
    allowed = 2**-7 * np.abs(v).max()
    assert np.abs(np.asarray(ours, np.float32).reshape(q.shape) - slow(q, k, v)).max() < allowed
    assert np.abs(slow(q, k, v, cut=lambda x: x.astype(jnp.bfloat16).astype(float)) - slow(q, k, v)).max() > allowed
