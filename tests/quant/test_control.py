"""noise@SCHEME: Gaussian noise of exactly the size of a scheme's rounding error, matrix by matrix."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.quant.control import matched_noise
from qsae_jax.quant.fake import fake_quantize, linear_weights


def errors(lm, name):
    """What a scheme adds to each matrix, in float64."""
    pairs = zip(linear_weights(lm), linear_weights(fake_quantize(lm, name)), strict=True)
    return {path: np.asarray(b[...], np.float64) - np.asarray(a[...], np.float64) for (path, a), (_, b) in pairs}


def correlation(a, b):
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("scheme, near", [("int4", "int5"), ("int3-tensor", "int3"), ("int8-half", "int8")])
def test_the_norm_of_each_matrix_is_the_rounding_errors(lm, scheme, near):
    """1e-5 relative: the sums of weight and noise are themselves rounded to 2^-24. Control: the norms of another
    scheme, and of the neighbouring matrix, do not fit."""
    noise, rounding, other = (errors(lm, name) for name in (f"noise@{scheme}", scheme, near))

    def fits(path, given):
        return abs(np.linalg.norm(noise[path]) / np.linalg.norm(given) - 1) < 1e-5

    assert len(noise) == 14 and all(fits(path, rounding[path]) for path in noise)
    assert not any(fits(path, other[path]) for path in noise)
    assert not any(fits(a, rounding[b]) for a, b in pairwise(noise))


def test_draws(lm):
    """A draw gives the same bits each time; draws and matrices of one shape differ, and are uncorrelated."""
    first, again, second = (errors(lm, name) for name in ("noise@int4", "noise@int4#0", "noise@int4#1"))
    for path in first:
        np.testing.assert_array_equal(first[path], again[path])
        assert abs(correlation(first[path], second[path])) < 4 / first[path].size ** 0.5, path
    pairs = [(a, b) for a in first for b in first if a < b and first[a].shape == first[b].shape]
    assert len(pairs) > 10
    assert all(abs(correlation(first[a], first[b])) < 4 / first[a].size ** 0.5 for a, b in pairs)
    assert correlation(first[path], again[path]) > 0.999


def test_noise_knows_nothing_of_the_rounding_error(lm):
    """Correlated neither with it nor with the weight, beyond four standard errors of chance. Control: noise with as
    much rounding error, or weight, mixed in would be."""
    noise, rounding = errors(lm, "noise@int4"), errors(lm, "int4")
    weights = {path: np.asarray(w[...], np.float64) for path, w in linear_weights(lm)}
    for path, e in noise.items():
        for other in (rounding[path], weights[path]):
            chance = 4 / e.size**0.5
            assert abs(correlation(e, other)) < chance, path
            assert correlation(e / np.linalg.norm(e) + other / np.linalg.norm(other), other) > chance


def test_it_is_gaussian():
    """The kurtosis of 160,000 values is 3 within 0.1, each within 5 standard errors; that of a rounding error,
    which is uniform, is 1.8: the control."""
    w = jax.random.normal(jax.random.key(0), (400, 400))
    rounded = jnp.round(w * 4) / 4

    def kurtosis(x):
        x = np.asarray(x, np.float64)
        return ((x - x.mean()) ** 4).mean() / x.var() ** 2

    noise = matched_noise(jax.random.key(1), w, rounded) - w
    assert abs(kurtosis(noise) - 3) < 0.1
    assert abs(float(jnp.mean(noise))) < 5 * float(jnp.std(noise)) / 400
    assert abs(kurtosis(rounded - w) - 1.8) < 0.1


def test_no_error_is_no_noise():
    """A matrix that is already on the grid stays bit for bit."""
    w = jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(matched_noise(jax.random.key(0), w, w), w)
    assert bool((matched_noise(jax.random.key(0), w, w + 1) != w).all())
