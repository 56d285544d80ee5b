"""The fast path of the TopK family, on one device or on each of a mesh: only the chosen rows are read and written.

Equal to the dense form, whose products over m latents (one forwards, two backwards, the encoder's aside) become
gathers and scatters of as many rows as there are codes. Each loop has the shape that XLA runs fast on a CPU, measured
at d 512, m 8192, k 32, batch 2048 on 2 cores: sums into rows go in chunks that stay in the cache, sorted by the row
they go to (15 ms; unsorted 46), and the sort, of packed keys, is shared by both weights (4 ms; with a payload 22).
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qsae_jax.products import Product, matmul
from qsae_jax.sae.select import Chosen

CHUNK, WIDE_CHUNK = 512, 65_536
"""Rows gathered at a time: on a CPU as many as its cache holds (of 512 numbers each they fill a megabyte), elsewhere as
many as keep the device busy."""


def by_latent(latent: Int[Array, "n"], m: int) -> Int[Array, "n"]:
    """The order that sorts a list of codes by latent."""
    n = latent.size
    if m * n > 2**32:
        return jnp.argsort(latent)
    packed = latent.astype(jnp.uint32) * jnp.uint32(n) + jnp.arange(n, dtype=jnp.uint32)
    return (jnp.sort(packed) % jnp.uint32(n)).astype(jnp.int32)


def _in_chunks(n: int, *arrays: Array) -> tuple[Array, ...]:
    """Lists `[n]` as `[chunks, size]`; what fills up the last has weight 0 (arrays end with zeros)."""
    size = min(CHUNK if jax.default_backend() == "cpu" else WIDE_CHUNK, n)
    return tuple(jnp.pad(x, (0, -n % size)).reshape(-1, size) for x in arrays)


def summed(
    weight: Float[Array, "n"], x: Float[Array, "r d"], of: Int[Array, "n"], to: Int[Array, "n"], rows: int
) -> Float[Array, "rows d"]:
    """`out[to[i]] += weight[i] * x[of[i]]`: fast where `to` is sorted, right in any order."""
    weights, sources, targets = _in_chunks(len(weight), weight, of, to)

    def add(c: Array, out: Array) -> Array:
        return out.at[targets[c]].add(weights[c][:, None] * x[sources[c]])

    return jax.lax.fori_loop(0, len(weights), add, jnp.zeros((rows, x.shape[1]), x.dtype))


def dotted(
    x: Float[Array, "r d"], of: Int[Array, "n"], y: Float[Array, "s d"], at: Int[Array, "n"]
) -> Float[Array, "n"]:
    """`out[i] = x[of[i]] . y[at[i]]`."""
    n = of.size
    pairs = _in_chunks(n, of, at)
    return jax.lax.map(lambda pair: jnp.sum(x[pair[0]] * y[pair[1]], axis=-1), pairs).reshape(-1)[:n]


class Chooses(Protocol):
    """TopK, BatchTopK, or the part of one that a device has."""

    def chosen(self, pre: Float[Array, "b m"], /) -> Chosen: ...


class Codes(NamedTuple):
    """The codes of a batch as a list, and the order that sorts it by latent."""

    value: Float[Array, "n"]
    row: Int[Array, "n"]
    latent: Int[Array, "n"]
    order: Int[Array, "n"]


def _encode(x: Array, rows: Array, bias: Array, sparsity: Chooses, product: Product) -> Codes:
    chosen: Chosen = sparsity.chosen(product(x, rows.T) + bias[None, :])
    return Codes(*chosen, by_latent(chosen.latent, len(rows)))


_encode_chosen = jax.custom_vjp(_encode, nondiff_argnums=(3, 4))


def _encode_forth(x: Array, rows: Array, bias: Array, sparsity: Chooses, product: Product) -> tuple[Codes, tuple]:
    codes = _encode(x, rows, bias, sparsity, product)
    return codes, (x, rows, codes)


def _encode_back(sparsity: Chooses, product: Product, kept: tuple, cotangent: Codes) -> tuple[Array, Array, Array]:
    x, rows, codes = kept
    back = jnp.where(codes.value > 0, cotangent.value, 0)
    order = codes.order
    to_rows = summed(back[order], x, codes.row[order], codes.latent[order], len(rows))
    to_bias = jnp.zeros(len(rows), x.dtype).at[codes.latent].add(back)
    return summed(back, rows, codes.latent, codes.row, len(x)), to_rows, to_bias


_encode_chosen.defvjp(_encode_forth, _encode_back)


def encode_chosen(
    x: Float[Array, "b d"],
    rows: Float[Array, "m d"],
    bias: Float[Array, "m"],
    sparsity: Chooses,
    product: Product = matmul,
) -> Codes:
    """The codes that a sparsity chooses of `x rows^T + bias`. Only the values have gradients.
    `product` is the encoder's."""
    return _encode_chosen(x, rows, bias, sparsity, product)


def _decode(value: Array, latent: Array, order: Array, to: Array, W_dec: Array, size: int) -> Array:
    return summed(value, W_dec, latent, to, size)


_decode_chosen = jax.custom_vjp(_decode, nondiff_argnums=(5,))


def _decode_forth(value: Array, latent: Array, order: Array, to: Array, W_dec: Array, size: int) -> tuple:
    return _decode(value, latent, order, to, W_dec, size), (value, latent, order, to, W_dec)


def _decode_back(size: int, kept: tuple, g: Array) -> tuple:
    value, latent, order, to, W_dec = kept
    to_value = dotted(g, to, W_dec, latent)
    to_W_dec = summed(value[order], g, to[order], latent[order], len(W_dec))
    return to_value, None, None, None, to_W_dec


_decode_chosen.defvjp(_decode_forth, _decode_back)


def decode_chosen(
    codes: Codes, W_dec: Float[Array, "m d"], size: int, to: Int[Array, "n"] | None = None
) -> Float[Array, "size d"]:
    """`sum of value[i] * W_dec[latent[i]]` over the codes of a row; or of what else `to` says they go to."""
    return _decode_chosen(codes.value, codes.latent, codes.order, codes.row if to is None else to, W_dec, size)
