"""The gathered form of TopK against the dense one: values, and the gradient of every argument."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from qsae_jax.sae.sparse import decode_rows, encode_rows
from qsae_jax.sae.sparsity import TopK

CASES = [(11, 8, 24, 3), (6, 8, 128, 2)]  # b, d, m, k: a plain top-k, one by groups
CLOSE = {"rtol": 2e-5, "atol": 2e-5}  # float32 sums of at most 24 products of order 1


@pytest.fixture(params=CASES, ids=str)
def case(request, draw):
    """x, W_enc, b_enc, W_dec, a cotangent for the reconstruction, k."""
    b, d, m, k = request.param
    shapes = (b, d), (d, m), (m,), (m, d), (b, d)
    return *(jnp.asarray(draw(seed, *shape)) for seed, shape in enumerate(shapes)), k


def sparse_form(x, W_enc, b_enc, W_dec, g, k):
    return jnp.sum(g * decode_rows(*encode_rows(x, W_enc, b_enc, k), W_dec))


def dense_form(x, W_enc, b_enc, W_dec, g, k):
    return jnp.sum(g * (TopK(k)(x @ W_enc + b_enc[None]) @ W_dec))


def test_codes_and_reconstruction_are_the_dense_ones(case):
    """The codes scattered to m latents, and their decoding. Control: rows rolled by one token."""
    x, W_enc, b_enc, W_dec, _, k = case
    values, rows = encode_rows(x, W_enc, b_enc, k)
    codes = TopK(k)(x @ W_enc + b_enc[None])
    scattered = jnp.zeros_like(codes).at[jnp.arange(len(x))[:, None], rows].set(values)
    np.testing.assert_allclose(scattered, codes, **CLOSE)
    np.testing.assert_allclose(decode_rows(values, rows, W_dec), codes @ W_dec, **CLOSE)
    assert not np.allclose(decode_rows(values, jnp.roll(rows, 1, axis=1), W_dec), codes @ W_dec, **CLOSE)


def test_gradients_are_the_dense_ones(case):
    """jax.grad of both forms in x, W_enc, b_enc and W_dec, float32. Control: the dense ones of a rolled cotangent."""
    x, W_enc, b_enc, W_dec, g, k = case
    gradients = [jax.jit(jax.grad(form, range(4)), static_argnums=5) for form in (sparse_form, dense_form)]
    ours, dense = (f(*case) for f in gradients)
    wrong = gradients[1](x, W_enc, b_enc, W_dec, jnp.roll(g, 1, axis=0), k)
    for one, right, rolled in zip(ours, dense, wrong, strict=True):
        np.testing.assert_allclose(one, right, **CLOSE)
        assert not np.allclose(one, rolled, **CLOSE)


def test_gradient_of_the_values(case):
    """Of decode_rows in its values, against the dense decoding of scattered values. Control: rows rolled by one."""
    x, W_enc, b_enc, W_dec, g, k = case
    values, rows = encode_rows(x, W_enc, b_enc, k)

    def dense(values, rows):
        at = jnp.arange(len(x))[:, None]
        return jnp.sum(g * (jnp.zeros((len(x), len(W_dec))).at[at, rows].add(values) @ W_dec))

    ours = jax.grad(lambda v: jnp.sum(g * decode_rows(v, rows, W_dec)))(values)
    np.testing.assert_allclose(ours, jax.grad(dense)(values, rows), **CLOSE)
    assert not np.allclose(ours, jax.grad(dense)(values, jnp.roll(rows, 1, axis=1)), **CLOSE)


def test_a_row_chosen_by_several_tokens_gets_all_their_gradients():
    """One latent chosen by three tokens: its decoder gradient is the sum. Control: the last one alone is not."""
    rows, values = jnp.zeros((3, 1), jnp.int32), jnp.array([[1.0], [2.0], [4.0]])
    grad = jax.grad(lambda W: jnp.sum(decode_rows(values, rows, W)))(jnp.ones((2, 2)))
    assert np.array_equal(grad, [[7, 7], [0, 0]])
    assert not np.array_equal(grad, [[4, 4], [0, 0]])


def test_gradients_are_numerical_derivatives(draw):
    """jax.test_util.check_grads against differences of 1e-2 in float32, to 1e-2, where a small step changes no chosen
    row: biases of 100 pick the same latents. Control: twice the gradient is refused."""
    x, W_enc, b_enc, W_dec = (jnp.asarray(draw(i, *shape)) for i, shape in enumerate([(5, 4), (4, 6), (6,), (6, 4)]))
    b_enc = b_enc.at[:2].add(100)
    rows = encode_rows(x, W_enc, b_enc, 2)[1]
    check = {"order": 1, "modes": ["rev"], "eps": 1e-2, "atol": 1e-2, "rtol": 1e-2}
    check_grads(jax.jit(lambda v, W: decode_rows(v, rows, W)), (x[:, :2], W_dec), **check)
    check_grads(jax.jit(lambda *args: encode_rows(*args, 2)[0]), (x, W_enc, b_enc), **check | {"atol": 5e-2})

    def doubled(v):
        return 2 * decode_rows(v, rows, W_dec) - jax.lax.stop_gradient(decode_rows(v, rows, W_dec))

    with pytest.raises(AssertionError):
        check_grads(jax.jit(doubled), (x[:, :2],), **check)
