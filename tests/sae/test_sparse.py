"""Codes as lists against the dense form: values, and the gradient of every argument."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from qsae_jax.sae.sparse import CHUNK, by_latent, decode_chosen, dotted, encode_chosen, summed
from qsae_jax.sae.sparsity import BatchTopK, TopK

B, D = 11, 8
CASES = [(TopK(2), 128), (BatchTopK(0.3), 128)]  # d 8; the plain paths are in test_objective.py
CLOSE: Any = {"rtol": 2e-5, "atol": 2e-5}  # float32 sums of at most 24 products of order 1
CHECK: Any = {"order": 1, "modes": ["rev"], "eps": 1e-2, "atol": 1e-2, "rtol": 1e-2}


def dense_form(x, rows, bias, W_dec, g, sparsity):
    codes = sparsity(x @ rows.T + bias[None])
    return jnp.sum(g * (codes @ W_dec)), (codes, codes @ W_dec)


def list_form(x, rows, bias, W_dec, g, sparsity):
    codes = encode_chosen(x, rows, bias, sparsity)
    out = decode_chosen(codes, W_dec, len(x))
    return jnp.sum(g * out), (codes, out)


@partial(jax.jit, static_argnums=5)
def both(*args):
    """((value, (codes, reconstruction)), gradients) of the list and of the dense form, in one compilation."""
    return [jax.value_and_grad(form, range(4), has_aux=True)(*args) for form in (list_form, dense_form)]


@pytest.fixture(params=CASES, ids=str)
def case(request, draw):
    """x, encoder rows, bias, W_dec, a cotangent for the reconstruction, the sparsity."""
    sparsity, m = request.param
    shapes = (B, D), (m, D), (m,), (m, D), (B, D)
    return *(jnp.asarray(draw(seed, *shape)) for seed, shape in enumerate(shapes)), sparsity


def test_codes_and_gradients_are_the_dense_ones(case):
    """The list scattered, its order, its decoding, and the gradients of x, rows, bias and W_dec, float32. Controls:
    latents rolled by one; the gradients of a rolled cotangent."""
    *args, g, sparsity = case
    ((_, (codes, out)), ours), ((_, (right, dense_out)), dense) = both(*case)
    scattered = np.zeros(right.shape, np.float32)
    np.add.at(scattered, (codes.row, codes.latent), codes.value)
    np.testing.assert_allclose(scattered, right, **CLOSE)
    np.testing.assert_allclose(out, dense_out, **CLOSE)
    assert np.all(np.diff(codes.latent[codes.order]) >= 0)
    assert np.array_equal(np.sort(codes.order), np.arange(len(codes.value)))
    rolled = np.zeros_like(scattered)
    np.add.at(rolled, (codes.row, np.roll(codes.latent, 1)), codes.value)
    assert not np.allclose(rolled, right, **CLOSE)
    wrong = both(*args, jnp.roll(g, 1, axis=0), sparsity)[1][1]
    for one, two, three in zip(ours, dense, wrong, strict=True):
        np.testing.assert_allclose(one, two, **CLOSE)
        assert not np.allclose(one, three, **CLOSE)


def test_gradients_are_numerical_derivatives(draw):
    """check_grads against differences of 1e-2 in float32, to 1e-2, where no small step changes a choice: biases of 100
    pick the same two of six latents. The others have no gradient. Control: twice the gradient is refused."""
    x, rows, bias, W_dec, value = (
        jnp.asarray(draw(i, *shape)) for i, shape in enumerate([(5, 4), (6, 4), (6,), (6, 4), (10,)])
    )
    bias = bias.at[:2].add(100)
    encode = jax.jit(lambda x, rows, bias: encode_chosen(x, rows, bias, TopK(2)))
    codes = encode(x, rows, bias)
    check_grads(lambda *given: encode(*given).value, (x, rows, bias), **CHECK | {"atol": 5e-2})
    decode = jax.jit(lambda value, W: decode_chosen(codes._replace(value=value), W, 5))
    check_grads(decode, (value, W_dec), **CHECK)

    def doubled(value, W):
        return 2 * decode(value, W) - jax.lax.stop_gradient(decode(value, W))

    with pytest.raises(AssertionError):
        check_grads(doubled, (value, W_dec), **CHECK)


def test_a_negative_choice_has_no_gradient(draw):
    """Of k = 3 latents two are negative everywhere: no gradient reaches them. Control: without the mask of the ReLU
    it would, as far as their decoder rows."""
    x, rows, W_dec = (jnp.asarray(draw(i, *shape)) for i, shape in enumerate([(5, 4), (3, 4), (3, 4)]))
    grads = both(x, rows, jnp.array([50.0, -50.0, -50.0]), W_dec, x, TopK(3))[0][1]
    assert all(not np.any(grad[1:]) and np.all(grad[0]) for grad in grads[1:])
    assert np.all((x @ W_dec.T).sum(0)[1:])


def test_codes_decode_to_where_they_are_told(draw):
    """`to` sends codes to other rows than their own: value and both gradients as of a dense sum. Control: to rolled."""
    shapes = (B, D), (24, D), (24,), (24, D), (4, D)
    *given, W_dec, g = (jnp.asarray(draw(i, *shape)) for i, shape in enumerate(shapes))
    codes = jax.jit(encode_chosen, static_argnums=3)(*given, TopK(3))
    to = codes.latent % 4

    def dense(value, W, to):
        return jnp.sum(g * jnp.zeros((4, D)).at[to].add(value[:, None] * W[codes.latent]))

    ours = jax.jit(jax.grad(lambda v, W: jnp.sum(g * decode_chosen(codes._replace(value=v), W, 4, to)), (0, 1)))
    theirs = jax.jit(jax.grad(dense, (0, 1)))
    got, right = ours(codes.value, W_dec), theirs(codes.value, W_dec, to)
    wrong = theirs(codes.value, W_dec, jnp.roll(to, 1))
    for one, two, three in zip(got, right, wrong, strict=True):
        np.testing.assert_allclose(one, two, **CLOSE)
        assert not np.allclose(one, three, **CLOSE)


@pytest.mark.parametrize("n", [7, CHUNK + 3])
def test_sums_and_products_of_rows(draw, n):
    """`summed` and `dotted` against np.add.at and a loop, in float64 to 1e-4, in one chunk and two.
    Control: what fills the last chunk up would add row 0 to row 0."""
    rng = np.random.default_rng(n)
    x, y, weight = draw(1, 9, 5), draw(2, 6, 5), draw(3, n) + 2
    of, to = rng.integers(9, size=n), rng.integers(6, size=n)
    right = np.zeros((6, 5))
    np.add.at(right, to, weight[:, None].astype(float) * x[of])
    total = jax.jit(summed, static_argnums=4)
    np.testing.assert_allclose(total(*map(jnp.asarray, (weight, x, of, to)), 6), right, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dotted(*map(jnp.asarray, (x, of, y, to))), (x[of] * y[to]).sum(-1), **CLOSE)
    right[0] += x[0]
    assert not np.allclose(total(*map(jnp.asarray, (weight, x, of, to)), 6), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("m", [50, 2**31 - 1], ids=["packed", "argsort"])
def test_the_order_by_latent_is_a_stable_sort(m):
    """Both ways, with ties and the largest latent. Control: the other direction."""
    latent = np.random.default_rng(3).integers(0, 12, 40, dtype=np.int32) * (m // 12)
    latent[7] = m - 1
    assert np.array_equal(by_latent(jnp.asarray(latent), m), np.argsort(latent, kind="stable"))
    assert not np.array_equal(by_latent(jnp.asarray(latent), m), np.argsort(-latent, kind="stable"))
