"""Moments, correlations and intervals beside NumPy and SciPy."""

import numpy as np
import pytest
import scipy.stats

from qsae_jax.stats import Totals, bootstrap, jackknife, pearson


def sums(x, y):
    return len(x), x.sum(0), y.sum(0), (x * x).sum(0), (y * y).sum(0), (x * y).sum(0)


def test_pearson_is_scipys():
    """Within 1e-9, about a shift of zero; the control leaves out the mean."""
    rng = np.random.default_rng(0)
    x = rng.gamma(0.3, size=(500, 6))
    y = x + rng.normal(size=x.shape) + 2
    expected = np.array([scipy.stats.pearsonr(x[:, i], y[:, i])[0] for i in range(6)])
    n, a, b, aa, bb, ab = sums(x, y)
    np.testing.assert_allclose(pearson(n, a, b, aa, bb, ab), expected, atol=1e-9)
    assert np.abs(pearson(n, 0 * a, 0 * b, aa, bb, ab) - expected).max() > 0.05


def test_pearson_of_a_constant_is_none():
    x = np.array([[1.0, 2.0], [1.0, 3.0], [1.0, 5.0]])
    got = pearson(*sums(x, x[:, ::-1]))
    assert np.isnan(got).all()


def test_totals_add_up_in_float64():
    """Ten million and ten thousand ones: float32 would lose them."""
    totals = Totals()
    totals.add(s=np.float32(2**25))
    for _ in range(1000):
        totals.add(s=np.float32(1))
    assert totals["s"] == 2**25 + 1000 != np.float32(2**25) + np.float32(1)


def test_the_bootstrap_is_scipys():
    """The interval of a ratio of sums within 5 % of the width that SciPy finds by resampling the same groups."""
    rng = np.random.default_rng(1)
    a = rng.gamma(2, size=60)
    b = 2 * a + rng.gamma(2, size=60)
    got = bootstrap({"ratio": lambda s: float(s["a"] / s["b"])}, {"a": a, "b": b}, draws=4000)["ratio"]

    def ratio(p, q, axis=-1):
        return p.sum(axis) / q.sum(axis)

    level = 1 - 2 * scipy.stats.norm.cdf(-np.sqrt(60 / 59) * scipy.stats.t.ppf(0.975, 59))  # expanded for 60 groups
    how = {"n_resamples": 4000, "method": "percentile", "rng": 2, "confidence_level": level}
    want = scipy.stats.bootstrap((a, b), ratio, paired=True, **how)
    low, high = want.confidence_interval
    assert got.value == pytest.approx(a.sum() / b.sum())
    assert got.low == pytest.approx(low, abs=0.05 * (high - low)) and got.high == pytest.approx(
        high, abs=0.05 * (high - low)
    )
    unpaired = scipy.stats.bootstrap((a, b), ratio, **how).confidence_interval
    assert abs(unpaired.low - low) + abs(unpaired.high - high) > 0.1 * (high - low)


def test_the_interval_holds_what_it_says_with_eight_groups():
    """The mean of 8 normal numbers lies in 92 to 97 % of 400 intervals; plain percentiles in fewer."""
    rng, held, plain = np.random.default_rng(5), 0, 0
    for i in range(400):
        x = rng.normal(size=8)
        got = bootstrap({"mean": lambda s: float(s["x"]) / 8}, {"x": x}, draws=400, seed=i)["mean"]
        held += got.low <= 0 <= got.high
        low, high = np.quantile(rng.choice(x, (400, 8)).mean(1), [0.025, 0.975])
        plain += low <= 0 <= high
    assert 0.92 < held / 400 < 0.97 and plain < held - 10


def test_one_group_has_no_interval():
    got = bootstrap({"mean": lambda s: float(s["x"])}, {"x": np.ones(1)})["mean"]
    assert got.value == 1 and np.isnan(got.low) and np.isnan(got.high)


def test_a_difference_inside_one_statistic_is_paired():
    """Two arms that share the groups' ups and downs: the paired interval is far narrower than either arm's own."""
    rng = np.random.default_rng(2)
    level = rng.normal(10, 3, size=64)
    s = {"a": level + rng.normal(0, 0.1, 64), "b": level}
    got = bootstrap({"gap": lambda s: float(s["a"] - s["b"]) / 64, "a": lambda s: float(s["a"]) / 64}, s)
    assert got["gap"].high - got["gap"].low < 0.2 * (got["a"].high - got["a"].low)


def test_the_jackknife_of_a_mean_is_the_textbooks():
    """For a mean it is s / sqrt(n); the control forgets the factor n - 1."""
    x = np.random.default_rng(3).normal(size=40)
    got = jackknife({"mean": lambda s: float(s["x"] / s["n"])}, {"x": x, "n": np.ones(40)})["mean"]
    half = 1.959964 * x.std(ddof=1) / np.sqrt(40)
    assert got.high - got.value == pytest.approx(half, rel=1e-6)
    assert half / np.sqrt(39) < 0.5 * half


def test_the_jackknife_holds_a_count_of_what_was_seen():
    """The share of latents that fire at all: the bootstrap's interval lies below its own value, the jackknife's not."""
    rng = np.random.default_rng(4)
    fired = (rng.random((32, 500)) < 0.02).astype(float)
    alive = {"alive": lambda s: float((s["fired"] > 0).mean())}
    drawn, left_out = (f(alive, {"fired": fired})["alive"] for f in (bootstrap, jackknife))
    assert drawn.high < drawn.value
    assert left_out.low < left_out.value < left_out.high
