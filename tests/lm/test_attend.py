"""Attention in both shapes of loop against a softmax written out in float64, within 1e-5 of values of order 1.

The other tests run on eight simulated devices and see `_batched` alone, so `_by_group` is tried here in earnest: its
pieces, the keys that it skips, and a whole model.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.lm import attend as module
from qsae_jax.lm.attend import Scores, _batched, _by_group, attend
from qsae_jax.lm.families import HUB
from qsae_jax.lm.load import abstract_lm
from tests.lm.families import CONFIGS


def slow(q, k, v, how=None, causal=True, shared=True, cut=lambda scores: scores):
    """One query at a time: query head h reads the keys of group h // (H / G), or h % G where `shared` is false. A
    query at position t sees the keys s with t - window < s <= t."""
    b, s, heads, width = q.shape
    groups, how = k.shape[2], how or Scores(width**-0.5)
    out = np.zeros_like(q, dtype=np.float64)
    for i in range(b):
        for h in range(heads):
            g = h // (heads // groups) if shared else h % groups
            for t in range(s):
                seen = [j for j in range(s) if (j <= t or not causal) and (not how.window or t - how.window < j)]
                scores = cut(k[i, seen, g].astype(np.float64) @ q[i, t, h] * how.scale)
                scores = how.cap * np.tanh(scores / how.cap) if how.cap else scores
                weights = np.exp(scores - scores.max())
                out[i, t, h] = weights @ v[i, seen, g] / weights.sum()
    return out


def random_heads(s, heads=6, groups=2, width=4):
    random = np.random.default_rng(s)
    return [random.normal(size=(2, s, n, width)).astype(np.float32) * 2 for n in (heads, groups, groups)]


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    """At most four pieces of at least two queries, so that short windows are cut as long ones are."""
    monkeypatch.setattr(module, "PIECE", 2)
    monkeypatch.setattr(module, "PIECES", 4)


FAST = {"xla_backend_optimization_level": 0}
"""Compiled in a third of the time. The loops that `attend` takes are tried with XLA's own options below."""


def loops(name, q, k, v, *hows):
    """One of the two shapes of loop, called as `attend` calls it, for each `how`; compiled anew in each call, as a
    fault may be planted in it."""
    b, s, heads, width = q.shape
    whole = {"_batched": _batched, "_by_group": _by_group}[name]

    def run(q, k, v):
        grouped = q.reshape(b, s, k.shape[2], heads // k.shape[2], width)
        return [whole(grouped * how.scale, k, v, how).reshape(q.shape) for how in hows]

    return [np.asarray(out) for out in jax.jit(run, compiler_options=FAST)(q, k, v)]


def loop(name, q, k, v, how=None):
    return loops(name, q, k, v, how or Scores(q.shape[-1] ** -0.5))[0]


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


HOWS = [Scores(0.9, window, 2.0) for window in (0, 1, 2, 3, 5, 100)]
HOWS += [Scores(0.3, window) for window in (2, 3)]


@pytest.mark.parametrize("s, heads, groups", [(1, 6, 2), (3, 6, 2), (8, 4, 4), (13, 6, 3), (17, 4, 2), (20, 3, 1)])
@pytest.mark.parametrize("name", ["_batched", "_by_group"])
def test_windows_caps_and_scales(name, s, heads, groups):
    """Windows of one key, shorter and longer than a piece (of 2, 2, 2, 4, 5 and 5 queries) and longer than all, with
    and without a cap. Controls: a window longer or shorter by one, a cap left out or put in and another scale are far
    away wherever a query sees more than one key."""
    q, k, v = random_heads(s, heads, groups)
    for how, ours in zip(HOWS, loops(name, q, k, v, *HOWS), strict=True):
        np.testing.assert_allclose(ours, slow(q, k, v, how), atol=1e-5, err_msg=str(how))
        faults = [replace(how, cap=2.0 - how.cap), replace(how, scale=0.5)] if s > 1 and how.window != 1 else []
        faults += [replace(how, window=how.window + 1)] if 0 < how.window < s else []
        faults += [replace(how, window=how.window - 1)] if 1 < how.window <= s else []
        for fault in faults:
            assert np.abs(ours - slow(q, k, v, fault)).max() > 1e-2, (how, fault)


FAULTS = {
    "keys taken for later ones": lambda start, first, how: (start, first + 1, how),
    "keys taken for the first": lambda start, first, how: (start, 0, how),
    "queries taken for the first": lambda start, first, how: (0, first, how),
    "no window but the skipped keys": lambda start, first, how: (start, first, replace(how, window=0)),
    "a window too long by one": lambda start, first, how: (start, first, replace(how, window=how.window + 1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_pieces_is_seen(monkeypatch, fault):
    """Each way to mistake where a piece's queries or keys lie. Its own control: with nothing planted, 1e-5."""
    (q, k, v), how, right = random_heads(13), Scores(0.9, 3, 2.0), module._weights
    expected = slow(q, k, v, how)
    np.testing.assert_allclose(loop("_by_group", q, k, v, how), expected, atol=1e-5)
    monkeypatch.setattr(module, "_weights", lambda scores, *where: right(scores, *FAULTS[fault](*where)))
    assert not np.abs(loop("_by_group", q, k, v, how) - expected).max() < 1e-2  # or NaN, where nothing is seen


def on(monkeypatch, devices):
    """As on so many devices; the loop that this machine does not take is taken out."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    if jax.default_backend() == "cpu":
        monkeypatch.setattr(module, "_batched" if devices == 1 else "_by_group", None)


def logits(config, tokens):
    """Of a model of which every weight is random, the same for configs of one shape."""
    random = np.random.default_rng(5)
    lm = jax.tree.map(lambda x: jnp.asarray(random.normal(0.1, 0.3, x.shape), x.dtype), abstract_lm(config))
    return np.asarray(jax.jit(lambda lm, tokens: lm(tokens), compiler_options=FAST)(lm, tokens))


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_a_model_with_windows_is_the_same_in_both_loops(monkeypatch, tokens, name):
    """Logits as on one device and as on eight within 1e-4 of values of order 1: windows of 4 or 5 on 11 tokens, which
    are cut into pieces of 3. Control: the same model with windows longer by one gives others."""
    config = HUB[name].config(dict(CONFIGS[name][0]))
    longer = replace(config, windows=tuple(window and window + 1 for window in config.windows))
    with monkeypatch.context() as patched:
        on(patched, 8)
        batched = logits(config, tokens)
    on(monkeypatch, 1)
    assert np.abs(batched).mean() > 0.3
    np.testing.assert_allclose(logits(config, tokens), batched, atol=1e-4)
    assert np.abs(logits(longer, tokens) - batched).max() > 1e-2


@pytest.mark.parametrize("how", [Scores(0.5), Scores(0.9, 3, 2.0)])
@pytest.mark.parametrize("devices", [1, 8])
def test_attend_takes_the_loop_of_the_machine(monkeypatch, devices, how):
    """Groups in a loop on a single CPU device, batched where a mesh may have cut them; the same values within 1e-5.
    Control: another scale of the scores is far away."""
    on(monkeypatch, devices)
    q, k, v = random_heads(7)
    ours = attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), how)
    np.testing.assert_allclose(ours, slow(q, k, v, how), atol=1e-5)
    assert np.abs(ours - slow(q, k, v, replace(how, scale=1.3))).max() > 1e-2


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
