"""Effects of a feature beside a slow computation: patched models with whole logits, compared in float64."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import spearmanr

from qsae_jax import capture, fake_quantize, patch
from qsae_jax.audit.act import CHANGES, MEASURES, act, divergence, summary, written
from qsae_jax.errors import Interrupted, UserError
from qsae_jax.mesh import make_mesh, on_data
from qsae_jax.sae.model import SAE, layer_norm
from qsae_jax.sae.sparsity import ReLU

STREAM, NEXT, HEADS = "blocks.1.resid_post", "blocks.2.resid_post", "blocks.1.attn.z"
SKIP, PER = 2, 2
FEATURES = [3, 17, 8, 21]  # four features in two windows each are as many as there are windows: one shape

encoded = jax.jit(lambda sae, x: sae.encode(x))


def normed_sae():
    """A dictionary for the four heads of width 6 that normalises each token, with few latents on."""
    keys = jax.random.split(jax.random.key(3), 2)
    W_enc, W_dec = jax.random.normal(keys[0], (24, 32)), jax.random.normal(keys[1], (32, 24)) / 4
    return SAE(ReLU(), W_enc, jnp.full(32, -5.0), W_dec, jnp.full(24, 0.1), norm=layer_norm)


@jax.jit
def decoded(sae, codes, x):
    return sae.decode(codes, x) - sae.decode(jnp.zeros_like(codes), x)


def parts(sae, x, i, z):
    """What feature i writes with values z `[b, s]`, by the whole decoder."""
    codes = np.zeros((*z.shape, sae.latents), np.float32)
    codes[..., i] = z
    return np.asarray(decoded(sae, codes, x))


@jax.jit
def logits_with(lm, ids, changes):
    """Whole logits when something is added at the points. One program for all changes, so that where one does not
    reach it does nothing at all."""
    return patch(lm, {point: lambda y, z=z: y + z.reshape(y.shape) for point, z in changes.items()})(ids)


def slow_effect(lm, ids, point, change):
    """(the centred change of the logits, KL of the distributions) at predicted positions, in float64."""
    none = {name: np.zeros((*ids.shape, d), np.float32) for name, d in ((STREAM, 16), (NEXT, 16), (HEADS, 24))}
    new, old = (np.asarray(logits_with(lm, ids, c), np.float64)[:, :-1] for c in (none | {point: change}, none))
    logp, logq = log_softmax(old, axis=-1), log_softmax(new, axis=-1)
    moved = new - old
    return moved - moved.mean(-1, keepdims=True), (np.exp(logp) * (logp - logq)).sum(-1)


def slow_row(lms, sae, windows, point, i, changed_at=None, direction=None):
    """The row of feature i; `changed_at` and `direction` are where and along which feature it is wrongly changed."""
    tokens = on_data(windows.ids, make_mesh(1, 1))  # as the code has them: one program for both
    xs = [np.asarray(capture(lm, point)(tokens)).reshape(*windows.ids.shape, -1) for lm in lms]
    counted = (np.arange(windows.seq) >= SKIP).astype(np.float32)[None]
    zs = [np.asarray(encoded(sae, x))[..., i] * counted for x in xs]
    c = zs[0][zs[0] > 0].mean(dtype=np.float64)
    at = np.argsort(-zs[0].max(1), kind="stable")[:PER]
    ids, xs, zs = windows.ids[at], [x[at] for x in xs], [z[at] for z in zs]
    j = i if direction is None else direction
    everywhere = parts(sae, xs[0], j, np.float32(c) * np.repeat(counted, PER, axis=0))
    changes = {"ablate": [-parts(sae, x, j, z) for x, z in zip(xs, zs, strict=True)], "steer": [everywhere] * 2}
    row = {"feature": i, "tokens": PER * (windows.seq - 1)}
    for name, change in changes.items():
        (d, kl), (e, q) = (slow_effect(lm, ids, changed_at or point, y) for lm, y in zip(lms, change, strict=True))
        reached = np.linalg.norm(d, axis=-1) > 0
        norms = np.linalg.norm(d, axis=-1) * np.linalg.norm(e, axis=-1)
        cosines = (d * e).sum(-1) / np.where(norms > 0, norms, 1)
        row[name] = {"r": np.corrcoef(d.ravel(), e.ravel())[0, 1], "cosine": cosines[reached].mean()}
        row[name] |= {"size": np.linalg.norm(e) / np.linalg.norm(d), "kl_fp": kl.mean(), "kl_twin": q.mean()}
    row["steer"]["by"] = c
    return row


def run(lm, twin, sae, windows, point=STREAM, features=FEATURES, **settings):
    settings = {"per_feature": PER, "skip_first": SKIP, "batch": 8, "mesh": make_mesh(1, 1)} | settings
    return act(lm, twin, sae, windows, point, features, **settings)


def same(mine, other, rel=1e-4):
    assert (mine["feature"], mine["tokens"]) == (other["feature"], other["tokens"])
    for name in CHANGES:
        assert mine[name] == pytest.approx(other[name], rel=rel, abs=1e-6), name


def far(mine, other):
    """By how much the most different number differs."""
    return max(abs(mine[name][key] / other[name][key] - 1) for name in CHANGES for key in MEASURES)


@pytest.fixture(scope="module")
def twin(tiny_lm):
    return fake_quantize(tiny_lm, "int3")


@pytest.fixture(scope="module")
def rows(tiny_lm, twin, tiny_sae, tiny_windows):
    return run(tiny_lm, twin, tiny_sae(), tiny_windows(8))


def test_every_number_equals_the_slow_computation(rows, tiny_lm, twin, tiny_sae, tiny_windows):
    """And another feature, another feature's direction or the next layer in its place shows."""
    lms, sae, windows = (tiny_lm, twin), tiny_sae(), tiny_windows(8)
    for row, i in zip(rows, FEATURES, strict=True):
        same(row, slow_row(lms, sae, windows, STREAM, i))
        assert row["ablate"]["r"] < 0.999 and row["ablate"]["r"] != pytest.approx(row["ablate"]["cosine"], abs=1e-4)
    assert min(far(one, two) for one, two in pairwise(rows)) > 0.05
    assert far(rows[0], slow_row(lms, sae, windows, STREAM, FEATURES[0], direction=FEATURES[1])) > 0.05
    assert far(rows[0], slow_row(lms, sae, windows, STREAM, FEATURES[0], changed_at=NEXT)) > 0.05


@pytest.mark.slow
def test_heads_and_a_dictionary_that_normalises(tiny_lm, twin, tiny_windows):
    """Activations `[b, s, heads, width]`; a feature is written at each token's scale."""
    windows, sae = tiny_windows(8), normed_sae()
    for row in run(tiny_lm, twin, sae, windows, HEADS):
        same(row, slow_row((tiny_lm, twin), sae, windows, HEADS, row["feature"]))
    x = np.random.default_rng(0).normal(size=(PER, 16, 24)).astype(np.float32)
    z = np.abs(x[..., 0])
    mine = written(sae, jnp.asarray(x), jnp.asarray(z), jnp.asarray([4, 9]))
    for w, i in enumerate((4, 9)):
        np.testing.assert_allclose(mine[w], parts(sae, x, i, z)[w], atol=1e-5)


def test_batches_and_the_order_of_features_change_nothing(rows, tiny_lm, twin, tiny_sae, tiny_windows):
    """Batches of 3, the last of each pass filled up, and the features backwards: the same rows."""
    found = run(tiny_lm, twin, tiny_sae(), tiny_windows(8), STREAM, FEATURES[::-1], batch=3)
    for mine, row in zip(found, rows[::-1], strict=True):
        same(mine, row)


def test_a_model_acts_like_itself_and_a_silent_feature_does_not_act(tiny_lm, tiny_sae, tiny_windows):
    sae = tiny_sae()
    sae.b_enc[...] = sae.b_enc[...].at[17].set(-1e6)
    told = []
    found = run(tiny_lm, tiny_lm, sae, tiny_windows(8), batch=3, advance=told.append)
    assert sum(told) == 8 * 16 + 3 * PER * 16
    none = dict.fromkeys(MEASURES)
    assert found[1] == {"feature": 17, "tokens": 0, "ablate": none, "steer": none | {"by": None}}
    for row in (found[0], found[2], found[3]):
        for name in CHANGES:
            assert [row[name][key] for key in ("r", "cosine", "size")] == pytest.approx([1, 1, 1], abs=1e-6)
            assert row[name]["kl_fp"] == row[name]["kl_twin"] > 1e-4
    assert run(tiny_lm, tiny_lm, sae, tiny_windows(8), STREAM, [17], batch=3)[0]["tokens"] == 0


def test_what_cannot_be_is_refused_and_a_stop_is_heard(tiny_lm, tiny_sae, tiny_windows):
    with pytest.raises(UserError, match="feature -1"):
        run(tiny_lm, tiny_lm, tiny_sae(), tiny_windows(8), STREAM, [-1])
    calls = iter([False] * 5)  # the first pass over three batches, then one pass of the changes
    with pytest.raises(Interrupted):
        run(tiny_lm, tiny_lm, tiny_sae(), tiny_windows(8), batch=3, stopped=lambda: next(calls, True))


def logsumexp(x):
    return np.asarray(jax.nn.logsumexp(jnp.asarray(x, jnp.float32), axis=-1))


@pytest.mark.parametrize("size", [1e-3, 0.1, 3.0, 120.0])
def test_the_divergence_of_small_and_large_changes(size):
    """Within 1e-4 of float64; a difference of two normalisers of size 20 loses a change of a thousandth."""
    rng = np.random.default_rng(0)
    logits, change = (rng.normal(size=(5, 300)).astype(np.float32) * k for k in (np.float32(5), np.float32(size)))
    logits += 20
    p, q = (log_softmax(x.astype(np.float64), axis=-1) for x in (logits, logits.astype(np.float64) + change))
    wanted = (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(
        jax.jit(divergence)(jnp.asarray(logits), jnp.asarray(change)), wanted, rtol=1e-4, atol=1e-9
    )
    lost = np.abs((np.exp(p) * -change).sum(-1) + logsumexp(logits + change) - logsumexp(logits) - wanted)
    assert size > 1e-3 or lost.max() > 1e-7, "the plain formula, with its normalisers in float32"


def test_the_summary_of_features():
    """Ranks as SciPy has them, over features with an effect and an r; None where there are too few."""
    rng = np.random.default_rng(1)
    r = rng.uniform(size=12)
    r[4] = np.nan

    def told(i):
        return {"r": float(rng.uniform() + r[i]), "size": float(i)} if i != 7 else dict.fromkeys(MEASURES)

    rows = [{"feature": i, "ablate": told(i), "steer": told(i)} for i in (11, 2, 4, 7, 9, 5, 3)]
    some = [row for row in rows if row["feature"] not in (4, 7)]
    found = summary(rows, r)
    for name in CHANGES:
        wanted = spearmanr([r[row["feature"]] for row in some], [row[name]["r"] for row in some]).statistic
        assert found[name]["spearman"] == pytest.approx(wanted) and found[name]["n"] == 5
        assert found[name]["median_size"] == 5
        assert found[name]["median_r"] == pytest.approx(np.median([row[name]["r"] for row in some]))
    assert summary(rows[2:4], r)["steer"] == {"n": 0, "spearman": None, "median_r": None, "median_size": None}
    same_r = [row | {"ablate": {"r": 0.5, "size": 1.0}} for row in some]
    assert summary(same_r, r)["ablate"]["spearman"] is None
