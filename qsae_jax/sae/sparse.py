"""The fast path of TopK on a device that holds all latents: only the k chosen rows are read and written.

Equal to the dense form; the dense products over m latents are replaced by k gathers. Each loop is written in the
shape that XLA fuses on a CPU (measured at d 512, m 8192, k 32, batch 2048): unrolled for sums over gathered rows,
so that gather and multiply-add become one loop, and `fori_loop` for the scatter-adds of gradients.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qsae_jax.products import matmul
from qsae_jax.sae.sparsity import top_k


def _scatter(rows: Int[Array, "b k"], weights: Float[Array, "b k"], x: Float[Array, "b d"], m: int) -> Array:
    """`out[r] = sum of weights[b, j] * x[b] over rows[b, j] == r`: float32 `[m, d]`."""

    def add(j: Array, out: Array) -> Array:
        row = jax.lax.dynamic_index_in_dim(rows, j, 1, keepdims=False)
        weight = jax.lax.dynamic_index_in_dim(weights, j, 1, keepdims=True)
        return out.at[row].add(weight * x)

    return jax.lax.fori_loop(0, rows.shape[1], add, jnp.zeros((m, x.shape[1]), x.dtype))


def _top_rows(x: Array, W_enc: Array, b_enc: Array, k: int) -> tuple[Array, Array]:
    values, rows = top_k(matmul(x, W_enc) + b_enc[None, :], k)
    return jax.nn.relu(values), rows


_encode_rows = jax.custom_vjp(_top_rows, nondiff_argnums=(3,))


def _encode_forth(x: Array, W_enc: Array, b_enc: Array, k: int) -> tuple:
    values, rows = _top_rows(x, W_enc, b_enc, k)
    return (values, rows), (x, W_enc, values, rows)


def _encode_back(k: int, kept: tuple, cotangents: tuple) -> tuple:
    x, W_enc, values, rows = kept
    back = jnp.where(values > 0, cotangents[0], 0)
    m = W_enc.shape[1]
    to_W = _scatter(rows, back, x, m).T
    to_b = jnp.zeros(m, x.dtype).at[rows].add(back)
    to_x = sum(back[:, j : j + 1] * W_enc.T[rows[:, j]] for j in range(k))
    return to_x, to_W, to_b


_encode_rows.defvjp(_encode_forth, _encode_back)


def encode_rows(
    x: Float[Array, "b d"], W_enc: Float[Array, "d m"], b_enc: Float[Array, "m"], k: int
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """The k largest of `x W_enc + b_enc`, cut at zero, and their latents."""
    values, rows = _encode_rows(x, W_enc, b_enc, k)
    return values, rows


@jax.custom_vjp
def decode_rows(
    values: Float[Array, "b k"], rows: Int[Array, "b k"], W_dec: Float[Array, "m d"]
) -> Float[Array, "b d"]:
    """`sum over j of values[b, j] * W_dec[rows[b, j]]`."""
    return sum(values[:, j : j + 1] * W_dec[rows[:, j]] for j in range(rows.shape[1]))  # pyright: ignore[reportReturnType]


def _decode_forth(values: Array, rows: Array, W_dec: Array) -> tuple:
    return decode_rows(values, rows, W_dec), (values, rows, W_dec)


def _decode_back(kept: tuple, g: Array) -> tuple:
    values, rows, W_dec = kept
    to_values = [jnp.sum(g * W_dec[rows[:, j]], axis=-1) for j in range(rows.shape[1])]
    return jnp.stack(to_values, axis=1), None, _scatter(rows, values, g, W_dec.shape[0])


decode_rows.defvjp(_decode_forth, _decode_back)
