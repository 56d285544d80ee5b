"""How a scale (and a zero point) is chosen for each group of weights.

A rule is `rule(x, bounds) -> (scale, zero)` for x `[*g, n]`, one scale per group `[*g, 1]`. A group of zeros has
scale 1, so that it stays zero.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float32

from qsae_jax.quant.grid import Bounds

Rule = Callable[[Float32[Array, "*g n"], Bounds], tuple[Float32[Array, "*g 1"], Float32[Array, "*g 1"]]]


def absmax(x: Array, b: Bounds) -> tuple[Array, Array]:
    """`restricted`, `full_qmax`, `half`: the largest magnitude over the convention's divisor."""
    top = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    return _nonzero(top * b.inverse_high), jnp.zeros_like(top)


def signed(x: Array, b: Bounds) -> tuple[Array, Array]:
    """`signed_full`: the element of largest magnitude is given the code -Q exactly; the scale carries its sign.

    Of two elements of equal magnitude the first decides, as in ggml and auto-round."""
    where = jnp.argmax(jnp.abs(x), axis=-1, keepdims=True)
    extremum = jnp.take_along_axis(x, where, axis=-1)
    return _nonzero(extremum * b.inverse_high), jnp.zeros_like(extremum)


def no_clip(x: Array, b: Bounds) -> tuple[Array, Array]:
    """`no_clip`: the smallest scale at which neither end is clipped."""
    low, high = jnp.min(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True)
    return _nonzero(jnp.maximum(-low * b.inverse_low, high * b.inverse_high)), jnp.zeros_like(low)


def minmax(x: Array, b: Bounds) -> tuple[Array, Array]:
    """`asym`: the range from min to max, zero included, so that zero is a code of its own."""
    low = jnp.minimum(jnp.min(x, axis=-1, keepdims=True), 0.0)
    high = jnp.maximum(jnp.max(x, axis=-1, keepdims=True), 0.0)
    scale = _nonzero((high - low) * b.inverse_high)
    return scale, jnp.clip(jnp.round(-low * (1.0 / scale)), b.low, b.high)


def _nonzero(scale: Array) -> Array:
    return jnp.where(scale == 0, 1.0, scale)


RULES: dict[str, Rule] = {
    "restricted": absmax,
    "full_qmax": absmax,
    "half": absmax,
    "signed_full": signed,
    "no_clip": no_clip,
    "asym": minmax,
}
