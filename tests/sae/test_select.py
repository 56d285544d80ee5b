"""The largest of many against NumPy's sorts: with ties, negative numbers, too few positives, on every path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsae_jax.sae.select import GROUP, largest, nth_largest, places, top_k

GROUPED = [((2, 3, 256), 3), ((4, 64), 1)]
PLAIN = [((5, 96), 3), ((2, 3, 40), 40), ((4, 64), 2)]
WHOLE, NARROWED = [(7, 24)], [(5, 4, 64)]
N = 5
TOP, LARGEST = jax.jit(top_k, static_argnums=1), jax.jit(largest, static_argnums=1)


def descending(x):
    return np.sort(x, axis=-1)[..., ::-1]


def is_grouped(shape, k):
    return shape[-1] % GROUP == 0 and shape[-1] // GROUP >= 2 * k


def is_narrowed(shape, n):
    return np.prod(shape) % GROUP == 0 and np.prod(shape) // GROUP > 4 * n


def test_the_sizes_here_take_both_paths():
    assert all(is_grouped(*case) for case in GROUPED) and not any(is_grouped(*case) for case in PLAIN)
    assert all(is_narrowed(shape, N) for shape in NARROWED) and not any(is_narrowed(shape, N) for shape in WHOLE)


@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "tied"])
@pytest.mark.parametrize(("shape", "k"), GROUPED + PLAIN)
def test_top_k_is_the_head_of_a_sort(draw, shape, k, tied):
    """Bit for bit against np.sort; the places are distinct and hold the values. Rounded numbers have ties. Control:
    the head of the sort in ascending order."""
    x = draw(1, *shape)
    x = np.round(x) if tied else x
    values, where = TOP(x, k)
    assert np.array_equal(values, descending(x)[..., :k])
    assert np.array_equal(np.take_along_axis(x, np.asarray(where), -1), values)
    assert np.diff(np.sort(where, axis=-1), axis=-1).min(initial=1) >= 1
    assert not np.array_equal(values, np.sort(x, axis=-1)[..., :k][..., ::-1]) or k == shape[-1]


def test_neighbours_in_one_group_are_all_found():
    """The largest values side by side, for each way to take them. Control: the best of each group misses one."""
    x = np.full((1, 512), -1, np.float32)
    x[0, 3:5] = 2, 3
    x[0, 400] = 1
    assert np.array_equal(TOP(x, 2)[0], [[3, 2]])
    values, at = LARGEST(x, 2)
    assert np.array_equal(values, [2, 3]) and np.array_equal(at, [3, 4])
    assert np.array_equal(descending(x.reshape(-1, GROUP).max(-1))[:2], [3, 1])


def all_largest(x, n):
    """Slowly: the n largest positive values in the array's order, of ties the first, filled up with 0 at -1."""
    flat = x.reshape(-1)
    order = np.argsort(-flat, kind="stable")[:n]
    at = np.sort(order[flat[order] > 0])
    at = np.concatenate([at, np.full(n - len(at), -1, at.dtype)])
    return np.where(at >= 0, flat[at], 0), at


@pytest.mark.parametrize("shape", WHOLE + NARROWED, ids=str)
def test_largest_of_an_array(draw, shape):
    """Values and flat places, bit for bit against a stable argsort: distinct, with ties (values and that the places
    hold them: narrowing may take another of equals), with fewer positives than n, with none. Control: the places in
    the order of a sort."""
    x = draw(3, *shape)
    few = np.full(shape, -1, np.float32)
    few.reshape(-1)[[5, 70, 90]] = 3.5, 2, 2.25
    kinds = {"distinct": x, "tied": np.round(x), "few": few, "none": -x * x}
    for kind, these in kinds.items():
        values, at = (np.asarray(a) for a in LARGEST(these, N))
        right, where = all_largest(these, N)
        found = at[at >= 0]
        assert np.array_equal(np.sort(values), np.sort(right)) and len(found) == (right > 0).sum(), kind
        assert np.array_equal(values, np.where(at >= 0, these.reshape(-1)[at], 0)) and np.all(np.diff(found) > 0)
        assert kind == "tied" or np.array_equal(at, where)
    assert not np.array_equal(LARGEST(x, N)[1], np.argsort(-x.reshape(-1), kind="stable")[:N])


def test_largest_passes_the_gradient_to_what_it_took(draw):
    """Of the sum of values times 1, 2, ...: these weights at the places, 0 elsewhere. Control: weights rolled."""
    x, weights = draw(5, 5, 4, 64), jnp.arange(1.0, N + 1)
    grad = np.asarray(jax.jit(jax.grad(lambda x: jnp.sum(weights * largest(x, N)[0])))(x)).reshape(-1)
    expected = np.zeros(x.size)
    expected[all_largest(x, N)[1]] = weights
    assert np.array_equal(grad, expected) and not np.array_equal(grad, np.roll(expected, 1))


_ROWS = jax.jit(nth_largest)
_ALL = jax.jit(lambda x, n: nth_largest(x, n, axis=None))
FLOATS = st.floats(-8, 8, width=32, allow_subnormal=False)


@given(st.lists(FLOATS, min_size=12, max_size=12), st.integers(1, 12))
def test_nth_largest_is_in_the_sort(numbers, n):
    """Bit for bit, of each row and of the whole array, negative numbers counted as 0. Any float32, n traced."""
    x = np.array(numbers, np.float32).reshape(2, 6)
    cut = np.maximum(x, 0)
    assert np.asarray(_ALL(x, n)) == descending(cut.reshape(-1))[n - 1]
    if n <= 6:
        assert np.array_equal(_ROWS(x, n)[:, 0], descending(cut)[:, n - 1])


def test_nth_largest_tells_neighbours_apart():
    """Numbers one bit apart, huge and subnormal-near ones. Control: the next n gives another."""
    x = np.array([[1, np.nextafter(np.float32(1), np.float32(2)), 3e38, 1e-37, -5, -0.0]], np.float32)
    got = [float(_ROWS(x, n)[0, 0]) for n in range(1, 7)]
    assert got == [*descending(x)[0, :4].tolist(), 0, 0]
    assert got[1] != got[2] and got[1] > got[2]


@pytest.mark.parametrize("size", [1, 4, 9])
def test_places_of_a_mask(size):
    """The first `size` places in order, -1 after the last. Control: of the mask turned over."""
    mask = np.array([0, 1, 1, 0, 0, 1, 0, 1, 1, 0], bool).reshape(2, 5)
    at = np.flatnonzero(mask)[:size]
    expected = np.concatenate([at, np.full(size - len(at), -1)])
    assert np.array_equal(places(jnp.asarray(mask), size), expected)
    assert not np.array_equal(places(jnp.asarray(~mask), size), expected)
