"""How a scale (and a zero point) is chosen for each group of weights, and in which type it is kept.

A convention's own rule is `rule(x, bounds) -> (scale, zero)` for groups along the next to last axis of x `[*g, n, c]`,
one scale each, `[*g, 1, c]`: the largest magnitude (absmax) of symmetric ones, least and largest (minmax) of
asymmetric ones. A group of zeros has scale 1, so that it stays zero. Three others build on it:

    p{percent}   the rule on weights that are clipped first: symmetric ones to the quantile of their magnitudes,
                 asymmetric ones to the quantiles 1 - p and p of the weights
    mse          of 80 scales, the rule's times 1, 0.99 .. 0.21, the first with the least sum of |W - Q(W)|^2.4
                 (the `mse` of GPTQ, GPTQModel and llm-compressor)
    hqq          minmax with a fractional zero point, moved in up to 20 proximal steps to lessen sum |W - Q(W)|^0.7
                 (Badri & Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models; hqq 0.2.8 on CPU)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from qsae_jax.products import alone
from qsae_jax.quant.grid import ASYMMETRIC, Bounds, FloatGrid, exponent, power

Scales = tuple[Float32[Array, "*g 1 c"], Float32[Array, "*g 1 c"]]
Rule = Callable[[Float32[Array, "*g n c"], Bounds], Scales]


def absmax(x: Array, b: Bounds) -> Scales:
    """`restricted`, `full_qmax`, `half`: the largest magnitude over the convention's divisor."""
    top = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
    return _nonzero(top * b.inverse_high), jnp.zeros_like(top)


def signed(x: Array, b: Bounds) -> Scales:
    """`signed_full`: the element of largest magnitude is given the code -Q exactly; the scale carries its sign.

    Of two elements of equal magnitude the first decides, as in ggml and auto-round."""
    extremum = first_largest(x)
    return _nonzero(extremum * b.inverse_high), jnp.zeros_like(extremum)


def no_clip(x: Array, b: Bounds) -> Scales:
    """`no_clip`: the smallest scale at which neither end is clipped."""
    low, high = _ends(x)
    return _nonzero(jnp.maximum(-low * b.inverse_low, high * b.inverse_high)), jnp.zeros_like(low)


def minmax(x: Array, b: Bounds) -> Scales:
    """`asym`: the range from min to max, zero included, so that zero is a code of its own."""
    low, high = _ends(x)
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    scale = _nonzero((high - low) * b.inverse_high)
    return scale, jnp.clip(jnp.round(-low * (1.0 / scale)), b.low, b.high)


def tight(x: Array, b: Bounds) -> Scales:
    """`asym_tight`: AutoAWQ's `max(max - min, 1e-5) / (2^b - 1)`, and the zero point clipped to the codes."""
    low, high = _ends(x)
    scale = jnp.maximum(high - low, 1e-5) * b.inverse_high
    return scale, jnp.clip(-jnp.round(low * (1.0 / scale)), b.low, b.high)


def affine(x: Array, b: Bounds) -> Scales:
    """`affine`: in place of a zero point the minimum itself."""
    low, high = _ends(x)
    return _nonzero((high - low) * b.inverse_high), low


RULES: dict[str, Rule] = {
    **dict.fromkeys(("restricted", "full_qmax", "half"), absmax),
    "signed_full": signed,
    "no_clip": no_clip,
    "asym": minmax,
    "asym_tight": tight,
    "affine": affine,
}


def clipped(x: Float32[Array, "*g n c"], percent: float, convention: str) -> Float32[Array, "*g n c"]:
    """Weights clipped to quantiles (linear between order statistics, as NumPy's), each group by itself."""
    q = percent / 100
    if convention in ASYMMETRIC:
        low, high = (_quantile(jnp.sort(x, axis=-2), at) for at in (1 - q, q))
    else:
        high = _quantile(jnp.sort(jnp.abs(x), axis=-2), q)
        low = -high
    # A group so full of zeros, or of one number, that nothing else is left keeps its range.
    return jnp.where(low < high, jnp.clip(x, low, high), x)


def _quantile(ordered: Array, q: float) -> Array:
    at = q * (ordered.shape[-2] - 1)
    i = int(at)
    low, high = (ordered[..., j : j + 1, :] for j in (i, min(i + 1, ordered.shape[-2] - 1)))
    return low + alone((high - low) * np.float32(at - i))


NORM, SHRINKS = 2.4, 80


def mse(x: Float32[Array, "*g n c"], found: Scales, offset: bool, values: Callable[[Scales], Array]) -> Scales:
    """The scales (and, where they are an offset, zeros) shrunk by the factor with the least error of `values`."""

    def shrunk(p: Array) -> Scales:
        return found[0] * p, found[1] * p if offset else found[1]

    def step(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        p = 1 - alone(jnp.asarray(i, jnp.float32) * np.float32(0.01))
        apart = jnp.abs(alone(values(shrunk(p))) - x)
        # A third of the time of a power.
        error = jnp.sum(jnp.exp(jnp.log(apart) * np.float32(NORM)), axis=-2, keepdims=True)
        return jnp.where(error < best[0], error, best[0]), jnp.where(error < best[0], p, best[1])

    start = jnp.full_like(found[0], jnp.inf), jnp.ones_like(found[0])
    return shrunk(jax.lax.fori_loop(0, SHRINKS, step, start)[1])


STEPS, BETA, POWER = 20, np.float32(10.0), 0.7


def hqq(x: Float32[Array, "*g n c"], b: Bounds) -> Scales:
    """HQQ's scale and fractional zero point. With its limits: the inverse of the scale is at most 2e4, and 1 where
    max - min is at most 1e-4; the zero point starts whole at 4 bits only; all groups stop when the mean error rises."""
    low, high = _ends(x)
    inverse = jnp.where(high - low <= 1e-4, 1.0, jnp.minimum(b.high / jnp.maximum(high - low, 1e-9), 2e4))
    start = alone(-low * inverse)
    start = jnp.where(b.high == 15, jnp.round(start), start)

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        i, zero, before, _ = state
        codes = jnp.clip(jnp.round(alone(x * inverse) + zero), b.low, b.high)
        apart = x - (codes - zero) / inverse
        size = jnp.abs(apart)
        shrunk = jnp.sign(apart) * jnp.maximum(size - alone(size ** (POWER - 1) * (1 / BETA)), 0.0)
        zero = jnp.mean(codes - alone((x - shrunk) * inverse), axis=-2, keepdims=True)
        error = jnp.mean(size)
        return i + 1, zero, error, error < before

    state = (jnp.int32(0), start, jnp.float32(jnp.inf), jnp.bool_(True))
    _, zero, _, _ = jax.lax.while_loop(lambda state: state[3] & (state[0] < STEPS), step, state)
    return 1.0 / inverse, zero


STORED = ("f32", "f16", "bf16", "e4m3", "e8m0")
"""The types in which a scale may be kept."""


def stored(scale: Float32[Array, "*n"], kind: str, unit: Array | float = 1.0) -> Float32[Array, "*n"]:
    """A scale as it comes back from its type: rounded to the nearest, at most the largest number there. e8m0 holds
    powers of two: the next one up, so that nothing is clipped that was not. e4m3 has little range (2^-9 to 448), so its
    scales are kept in units of a float32 number, as NVFP4 keeps them. What is too small for a type becomes 0."""
    if kind in ("f16", "bf16"):
        dtype = jnp.float16 if kind == "f16" else jnp.bfloat16
        top = float(jnp.finfo(dtype).max)
        return jnp.clip(scale, -top, top).astype(dtype).astype(jnp.float32)
    if kind == "e4m3":
        b = FloatGrid("fp8_e4m3").bounds()
        return FloatGrid.rounded(jnp.clip(scale * inverse(unit), b.low, b.high), b, "nearest", None) * unit
    if kind == "e8m0":
        e = exponent(scale)
        return power(jnp.clip(e + (power(jnp.clip(e, -126, 127)) < scale), -126, 127))
    return scale


def inverse(scale: Array | float) -> Array:
    """1 / scale, and 0 of 0: where a scale has come to nothing, so do its weights."""
    scale = jnp.asarray(scale, jnp.float32)
    return jnp.where(scale == 0, 0.0, 1.0 / jnp.where(scale == 0, 1.0, scale))


def first_largest(x: Float32[Array, "*g n c"]) -> Float32[Array, "*g 1 c"]:
    """Of each group the element of largest magnitude, the first of equals."""
    where = jnp.argmax(jnp.abs(x), axis=-2, keepdims=True)
    return jnp.take_along_axis(x, where, axis=-2)


def _ends(x: Array) -> Scales:
    return jnp.min(x, axis=-2, keepdims=True), jnp.max(x, axis=-2, keepdims=True)


def _nonzero(scale: Array) -> Array:
    return jnp.where(scale == 0, 1.0, scale)
