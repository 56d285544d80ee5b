"""Streaming sums against float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.compare.fidelity import splice
from qsae_jax.sae.measure import fvu, over_rows, reconstruction_sums
from qsae_jax.sae.model import layer_norm
from qsae_jax.sae.sparsity import TopK


@pytest.mark.parametrize("shape", [(1,), (63, 2), (64, 2, 3), (1000, 4)], ids=str)
def test_over_rows_is_a_sum(draw, shape):
    """float32 against float64, to 1e-6 of the sum of magnitudes. Control: the first row left out."""
    x = draw(1, *shape)
    np.testing.assert_allclose(over_rows(jnp.asarray(x)), x.sum(0, dtype=float), atol=1e-6 * np.abs(x).sum(0).max())
    assert not np.allclose(over_rows(jnp.asarray(x)), x[1:].sum(0, dtype=float), atol=1e-6)


def test_over_rows_loses_little():
    """200,000 numbers near 1: within 1e-6 of the sum. Control: adding them one by one in float32 is not."""
    x = (1 + 0.1 * np.random.default_rng(0).random(200_000)).astype(np.float32)
    right = x.sum(dtype=float)
    assert abs(float(over_rows(jnp.asarray(x))) / right - 1) < 1e-6
    assert abs(float(np.cumsum(x)[-1]) / right - 1) > 1e-6


@pytest.fixture
def judged(make_sae, draw):
    """300 rows of which the last 37 are padding, their mean 1,000 times their spread."""
    sae, mean = make_sae(TopK(3), seed=5), 1000 * draw(8, 8)
    sae.b_dec[...] = jnp.asarray(mean)
    x = draw(9, 300, 8) + mean
    x[263:] = x[0]
    return sae, x, (np.arange(300) < 263).astype(np.float32), mean


def exactly(sae, x):
    """error, spread about the mean and active codes in float64, codes taken as they are."""
    codes, x = np.asarray(sae.encode(x), np.float64), x.astype(np.float64)
    xhat = codes @ np.asarray(sae.W_dec[...], np.float64) + np.asarray(sae.b_dec[...], np.float64)
    return ((x - xhat) ** 2).sum(), ((x - x.mean(0)) ** 2).sum(), (codes > 0).sum()


def test_sums_and_fvu_of_counted_rows(judged):
    """Each sum and the fvu against float64 over the counted rows alone, to 1e-4. Control: all rows counted."""
    sae, x, weight, mean = judged
    error, spread, active = exactly(sae, x[:263])
    got = reconstruction_sums(sae, jnp.asarray(x), sae.encode(x), jnp.asarray(weight), jnp.asarray(mean))
    assert float(got["n"]) == 263 and float(got["active"]) == active
    np.testing.assert_allclose(got["error"], error, rtol=1e-4)
    np.testing.assert_allclose(got["x"], (x[:263].astype(float) - mean).sum(0), rtol=1e-4, atol=1e-2)
    ours = fvu(*(np.asarray(got[name], np.float64) for name in ("error", "x", "xx", "n")))
    np.testing.assert_allclose(ours, error / spread, rtol=1e-4)
    every = reconstruction_sums(sae, jnp.asarray(x), sae.encode(x), jnp.ones(300), jnp.asarray(mean))
    assert float(every["active"]) != active and not np.isclose(every["error"], error, rtol=1e-4)


def test_the_shift_changes_precision_and_not_the_value(judged):
    """A shift a little off the mean gives the same fvu to 1e-4. Control: no shift at all loses it to cancellation;
    fvu about zero instead of about the mean would be a millionth."""
    sae, x, weight, mean = judged
    error, spread, _ = exactly(sae, x[:263])

    def ours(shift):
        shift = jnp.asarray(shift, jnp.float32)
        got = reconstruction_sums(sae, jnp.asarray(x), sae.encode(x), jnp.asarray(weight), shift)
        return fvu(*(np.asarray(got[name], np.float64) for name in ("error", "x", "xx", "n"))), got

    near, got = ours(mean + 0.5)
    np.testing.assert_allclose(near, error / spread, rtol=1e-4)
    assert abs(ours(np.zeros(8))[0] / (error / spread) - 1) > 1e-2
    assert not np.isclose(float(got["error"] / got["xx"]), error / spread, rtol=1e-2)


@pytest.mark.parametrize("where", ["measure", "splice"])
def test_a_norm_is_undone_with_what_was_read(make_sae, draw, where):
    """A dictionary that normalises each token reconstructs activations at their own scale, in the sums of an audit and
    spliced into a model. Control: the same dictionary without its norm has another error."""
    x, errors = jnp.asarray(5 + 3 * draw(1, 64, 8)), {}
    sae = make_sae(TopK(3))
    for norm in layer_norm, None:
        sae.norm = norm
        right = float(np.sum((np.asarray(x) - np.asarray(sae(x))) ** 2, dtype=float))
        if where == "measure":
            codes, ones = sae.encode(x), jnp.ones(64)
            found = reconstruction_sums(sae, x, codes, ones, jnp.zeros(8))["error"]
        else:
            y, sums = splice(sae, x.reshape(4, 16, 8), jnp.zeros(16))
            np.testing.assert_allclose(y.reshape(64, 8), sae(x), rtol=1e-5, atol=1e-5)
            found = sums["error"].sum()
        assert float(found) == pytest.approx(right, rel=1e-4)
        errors[norm] = right
    assert errors[layer_norm] != pytest.approx(errors[None], rel=1e-3)
