"""The controls: noise of exactly the size of a scheme's rounding error, its errors permuted, pruning, a dtype."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.quant.control import matched_noise
from qsae_jax.quant.fake import fake_quantize, linear_weights, round_weight
from qsae_jax.quant.names import parse_how


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


def matrices(lm, name):
    return {path: np.asarray(w[...]) for path, w in linear_weights(fake_quantize(lm, name))}


def test_a_factor_of_the_noise(lm):
    """noise0.5@ is the same noise, half as large (1e-4)."""
    whole, half = errors(lm, "noise@int4"), errors(lm, "noise0.5@int4")
    for path, e in whole.items():
        np.testing.assert_allclose(half[path], e / 2, atol=1e-4 * np.abs(e).max())


@pytest.mark.parametrize("scheme", ["int4", "int3-g7-asym"])
def test_permuted_errors_are_the_schemes_own(lm, scheme):
    """The same multiset of errors in each matrix (1e-6 for the sums' rounding), uncorrelated with it in place; draws
    differ, and a draw comes again. Control: noise has other values."""
    permuted, own, other = (errors(lm, f"{kind}{scheme}") for kind in ("permuted@", "", "noise@"))
    again, second = errors(lm, f"permuted@{scheme}"), errors(lm, f"permuted@{scheme}#1")
    for path, e in permuted.items():
        np.testing.assert_allclose(np.sort(e, axis=None), np.sort(own[path], axis=None), atol=2e-6)
        assert np.abs(np.sort(other[path], axis=None) - np.sort(e, axis=None)).max() > 1e-3
        assert abs(correlation(e, own[path])) < 5 / e.size**0.5
        assert abs(correlation(e, second[path])) < 5 / e.size**0.5
        np.testing.assert_array_equal(e, again[path])


@pytest.mark.parametrize("fraction", [0.1, 0.37, 0.9])
def test_pruning(lm, fraction):
    """Exactly round(fraction * size) zeros in each matrix, the smallest; the others as they were. Control: a global
    threshold would leave other counts."""
    kept, pruned = matrices(lm, "fp"), matrices(lm, f"prune{fraction}")
    for path, w in kept.items():
        gone = pruned[path] == 0
        assert gone.sum() == round(fraction * w.size)
        assert np.abs(w[gone]).max() <= np.abs(w[~gone]).min()
        np.testing.assert_array_equal(pruned[path][~gone], w[~gone])
    every = np.concatenate([np.abs(w).ravel() for w in kept.values()])
    threshold = np.quantile(every, fraction)
    assert any((np.abs(w) <= threshold).sum() != (pruned[path] == 0).sum() for path, w in kept.items())


def test_pruning_of_equal_weights():
    """Of equal magnitudes the first go, in the order of the matrix; zeros go first of all."""
    w = jnp.asarray([[1.0, -1, 0, 2], [1, 1, -1, 3]])
    pruned = np.asarray(round_weight(w, parse_how("prune0.5", "")))
    np.testing.assert_array_equal(pruned, [[0, 0, 0, 2], [0, 1, -1, 3]])
    np.testing.assert_array_equal(round_weight(jnp.zeros((2, 3)), parse_how("prune0.5", "")), np.zeros((2, 3)))


def test_pruning_equals_torch(torch, lm):
    """torch.nn.utils.prune.l1_unstructured on the same matrices, which hold no equal magnitudes."""
    from torch.nn.utils import prune

    for path, w in list(matrices(lm, "fp").items())[:3]:
        module = torch.nn.Linear(1, 1)
        module.weight = torch.nn.Parameter(torch.from_numpy(w.reshape(len(w), -1).copy()))
        prune.l1_unstructured(module, "weight", amount=0.37)
        np.testing.assert_array_equal(
            matrices(lm, "prune0.37")[path].reshape(len(w), -1), module.weight.detach().numpy()
        )


@pytest.mark.parametrize("name, dtype", [("bf16", "bfloat16"), ("f16", "float16")])
def test_a_dtype(lm, name, dtype):
    """As NumPy casts, and back to float32."""
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    kept, cast = matrices(lm, "fp"), matrices(lm, name)
    for path, w in kept.items():
        np.testing.assert_array_equal(cast[path], w.astype(kind).astype(np.float32))
        assert cast[path].dtype == np.float32 and (cast[path] != w).any()
