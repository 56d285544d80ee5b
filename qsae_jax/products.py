"""Products of float32 numbers in float32, on every device.

JAX's default lets a TPU round float32 operands to bfloat16 and a GPU to TF32: 8 and 10 bits of mantissa, where
logits are to agree to 1e-4 and int8's damage is a few parts in a thousand. bfloat16 models lose nothing by it.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

Product = Callable[[Array, Array], Array]
"""A matrix product of float32 numbers, in one precision or another."""


@jax.custom_vjp
def in_bfloat16(x: Float[Array, "b n"], w: Float[Array, "n m"]) -> Float[Array, "b m"]:
    """A product of operands rounded to bfloat16, summed in float32; the products of its gradient likewise."""
    return jnp.matmul(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def _bfloat16_forth(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return in_bfloat16(x, w), (x, w)


def _bfloat16_back(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = kept
    return in_bfloat16(g, w.T), in_bfloat16(x.T, g)


in_bfloat16.defvjp(_bfloat16_forth, _bfloat16_back)


_HIGHEST = float(jnp.finfo(jnp.float32).max)


def alone(product: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """A product that is rounded to float32 before anything is added to it, as NumPy and torch round it.

    A compiler may fuse `x * y + z` into one operation with one rounding, under jit and not outside: of normal numbers
    a quarter of the sums then differ in the last bit, and a code that sits on a tie with them. No barrier of XLA's
    keeps it from that; a minimum between the two does, and changes no finite number. (A maximum does not always: of
    a square it is known that it is not negative.)"""
    return jnp.minimum(product, _HIGHEST)


def along(bias: Float32[Array, "n"], x: Float32[Array, "*b n"]) -> Float32[Array, "*b n"]:
    """A bias as a row under x: rank promotion stays an error elsewhere."""
    return bias.reshape((1,) * (x.ndim - 1) + (-1,))
