"""Sparsities and the exact top-k against NumPy's sort."""

import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.sae import sparsity
from qsae_jax.sae.sparsity import ReLU, TopK, top_k

GROUPED = [((5, 128), 2), ((2, 3, 256), 3), ((4, 64), 1)]
PLAIN = [((5, 24), 7), ((5, 96), 3), ((2, 3, 40), 40), ((4, 64), 2)]


def is_grouped(shape, k):
    return shape[-1] % sparsity.GROUP == 0 and shape[-1] // sparsity.GROUP >= 2 * k


def wrong_top_k(x, best_of_group, k):
    """The fault that grouping invites: one winner of each group, as if no group held two."""
    return np.sort(best_of_group(x), axis=-1)[..., ::-1][..., :k]


def test_the_sizes_below_take_both_paths():
    assert all(is_grouped(*case) for case in GROUPED) and not any(is_grouped(*case) for case in PLAIN)


@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "tied"])
@pytest.mark.parametrize(("shape", "k"), GROUPED + PLAIN)
def test_top_k_is_the_head_of_a_sort(draw, shape, k, tied):
    """Bit for bit against np.sort; the places are distinct and hold the values. Rounded numbers have ties."""
    x = draw(1, *shape)
    x = np.round(x) if tied else x
    values, where = top_k(jnp.asarray(x), k)
    assert np.array_equal(values, np.sort(x, axis=-1)[..., ::-1][..., :k])
    assert np.array_equal(np.take_along_axis(x, np.asarray(where), -1), values)
    assert np.all(np.diff(np.sort(where, axis=-1), axis=-1) > 0)


def test_neighbours_in_one_group_are_all_found():
    """The largest values side by side. Control: the best of each group alone misses them."""
    x = np.full((1, 128), -1, np.float32)
    x[0, 3:5] = 2, 3
    x[0, 40] = 1
    assert np.array_equal(top_k(jnp.asarray(x), 2)[0], [[3, 2]])
    assert not np.array_equal(wrong_top_k(x, lambda x: x.reshape(1, 4, 32).max(-1), 2), [[3, 2]])


@pytest.mark.parametrize(("shape", "k"), [*GROUPED[:2], *PLAIN[:3]])
def test_topk_codes_are_the_k_largest_cut_at_zero(draw, shape, k):
    """Bit for bit against a threshold at the k-th of np.sort. Control: k + 1 codes differ."""

    def expected(k):
        return np.where(pre >= np.sort(pre, axis=-1)[..., -k, None], np.maximum(pre, 0), 0)

    pre = draw(2, *shape) + 0.8
    codes = TopK(k)(jnp.asarray(pre))
    assert np.array_equal(codes, expected(k))
    assert k == shape[-1] or not np.array_equal(codes, expected(k + 1))


def test_negative_values_among_the_k_give_no_code():
    """Two positives for k = 3: two codes. Control: without the cut the third would be negative."""
    pre = jnp.array([[1.0, -2.0, 3.0, -4.0]])
    assert np.array_equal(TopK(3)(pre), [[1, 0, 3, 0]])
    assert float(top_k(pre, 3)[0][0, 2]) == -2.0


def test_relu_codes_are_the_positive_part(draw):
    pre = draw(3, 2, 3, 10)
    codes = np.asarray(ReLU()(jnp.asarray(pre)))
    assert np.array_equal(codes, np.where(pre > 0, pre, 0))
    assert not np.array_equal(codes, np.abs(pre))
