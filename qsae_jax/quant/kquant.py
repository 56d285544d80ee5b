"""GGUF's K-quants: 256 inputs in sub-blocks of 16 or 32, whose scales are themselves quantized against one float16.

    q2_k q4_k q5_k     W ~ (d s) q - (dmin m)    s, m of 4 or 6 bits; scale and minimum by a weighted search
    q3_k q6_k          W ~ (d s) q               s of 6 or 8 bits, signed

Every sum runs in the order of the elements, and every product is rounded before it is added, as ggml-quants.c has it
when it is compiled without fused operations: the codes are the same. Blocks are `[g, 256, o]`, elements along the
next to last axis; within, `[g, sub-blocks, elements, o]`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from qsae_jax.products import alone
from qsae_jax.quant.scale import first_largest, stored

TINY = 1e-15
"""A group of smaller magnitudes is a group of zeros (ggml's GROUP_MAX_EPS)."""


class Parts(NamedTuple):
    """What a K-quant keeps: of each block d and dmin, of each sub-block a scale and a minimum, of each weight a code.
    Zero-offset: q3_k's and q6_k's codes and scales are signed here, and their minima zero."""

    d: Float32[Array, "g 1 1 o"]
    dmin: Float32[Array, "g 1 1 o"]
    scales: Float32[Array, "g s 1 o"]
    mins: Float32[Array, "g s 1 o"]
    codes: Float32[Array, "g s e o"]


def summed(x: Float32[Array, "*g e o"]) -> Float32[Array, "*g 1 o"]:
    """The sum over the elements, one after the other."""
    total = x[..., :1, :]
    for i in range(1, x.shape[-2]):
        total = total + x[..., i : i + 1, :]
    return total


def divided(x: Float32[Array, "*g e o"], by: Array | float) -> Float32[Array, "*g e o"]:
    """A real division, by 1 where `by` is 0. XLA would multiply by the reciprocal of what is broadcast or constant,
    which is off in the last bit now and then."""
    by = jnp.broadcast_to(jnp.asarray(by, jnp.float32), x.shape)
    return x / jax.lax.optimization_barrier(jnp.where(by == 0, 1.0, by))


def _sub_blocks(x: Array, count: int) -> Array:
    return x.reshape(x.shape[0], count, x.shape[1] // count, x.shape[2])


def values(p: Parts) -> Float32[Array, "g 256 o"]:
    """What the parts stand for, as a file's reader gets it."""
    out = alone((p.d * p.scales) * p.codes) - p.dmin * p.mins
    return out.reshape(out.shape[0], -1, out.shape[-1])


@dataclass(frozen=True)
class WithMinimum:
    """q2_k, q4_k, q5_k. Scale and minimum of each sub-block: for a row of scales around (max - min)/top the codes, and
    to these the least-squares fit, whose weighted error is compared."""

    count: int
    top: int
    levels: int
    """The largest code of a scale."""
    start: float
    tries: int
    absolute: bool
    """Errors by magnitude, weighted by |x|; else by square, weighted by |x| + its root mean square."""

    def __call__(self, x: Float32[Array, "g 256 o"]) -> Parts:
        x = _sub_blocks(x, self.count)
        weight = jnp.abs(x)
        if not self.absolute:
            weight = weight + jnp.sqrt(summed(alone(x * x)) * np.float32(1 / x.shape[-2]))
        scale, low = self._search(x, weight)
        d, scales = self._levels(scale)
        dmin, mins = self._levels(-low)
        step, shift = d * scales, dmin * mins
        codes = jnp.clip(jnp.round(divided(x + shift, step)), 0, self.top)
        return Parts(d, dmin, scales, mins, jnp.where(step == 0, 0.0, codes))

    def _levels(self, found: Array) -> tuple[Array, Array]:
        """The float16 unit of a block's scales, and each scale in it."""
        most = jnp.maximum(jnp.max(found, axis=1, keepdims=True), 0.0)
        by = jnp.where(most > 0, self.levels / jnp.where(most > 0, most, 1.0), 0.0)
        unit = stored(divided(most, self.levels), "f16")
        return unit, jnp.minimum(jnp.round(by * found), self.levels)

    def _search(self, x: Array, weight: Array) -> tuple[Array, Array]:
        low, high = jnp.min(x, axis=-2, keepdims=True), jnp.max(x, axis=-2, keepdims=True)
        low = jnp.minimum(low, 0.0)
        flat = high == low
        total, total_x = summed(weight), summed(alone(weight * x))

        def codes(by: Array, low: Array) -> Array:
            return jnp.clip(jnp.round(by * (x - low)), 0, self.top)

        def error(scale: Array, low: Array, q: Array) -> Array:
            apart = alone(scale * q) + low - x
            return summed(alone(weight * (jnp.abs(apart) if self.absolute else alone(apart * apart))))

        def step(i: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            _, low, least = best
            width = jnp.where(flat, 1.0, high - low)
            q = codes((alone(np.float32(0.1) * i) + np.float32(self.start) + np.float32(self.top)) / width, low)
            wq = alone(weight * q)
            l1, l2, xl = summed(wq), summed(alone(wq * q)), summed(alone(wq * x))
            D = alone(total * l2) - alone(l1 * l1)
            by = jnp.where(D > 0, D, 1.0)
            new = (alone(total * xl) - alone(total_x * l1)) / by
            least_x = (alone(l2 * total_x) - alone(l1 * xl)) / by
            new = jnp.where(least_x > 0, xl / jnp.where(l2 > 0, l2, 1.0), new)
            least_x = jnp.minimum(least_x, 0.0)
            now = error(new, least_x, q)
            better = (D > 0) & (now < least)
            return tuple(jnp.where(better, a, b) for a, b in zip((new, least_x, now), best, strict=True))  # pyright: ignore

        by = self.top / jnp.where(flat, 1.0, high - low)
        scale = divided(jnp.ones_like(by), by)  # 1 / (a / b) would be made b / a
        best = scale, low, error(scale, low, codes(by, low))
        scale, found, _ = jax.lax.fori_loop(0, self.tries + 1, lambda i, b: step(jnp.asarray(i, jnp.float32), b), best)
        return jnp.where(flat, 0.0, scale), jnp.where(flat, low, found)


def _fit(x: Array, q: Array, w: Array) -> tuple[Array, Array]:
    """Σ w x q and Σ w q q."""
    return summed(alone(w * x * q)), summed(alone(w * q * q))


def _final(x: Array, scale: Array, low: int, high: int, top: int) -> Parts:
    """The block's signed scales against that of largest magnitude, which gets the code `-top`, and codes to these."""
    extremum = first_largest(scale.reshape(scale.shape[0], -1, scale.shape[-1]))[:, :, None]
    some = jnp.abs(extremum) >= TINY
    by = jnp.where(some, -top / jnp.where(some, extremum, 1.0), 0.0)
    d = jnp.where(some, stored(1.0 / jnp.where(some, by, 1.0), "f16"), 0.0)
    scales = jnp.clip(jnp.round(by * scale), -top, top - 1)
    step = d * scales
    codes = jnp.clip(jnp.round(divided(x, step)), low, high)
    zero = jnp.zeros_like(d)
    return Parts(d, zero, scales, jnp.zeros_like(scales), jnp.where(step == 0, 0.0, codes))


def _around(x: Array) -> tuple[Array, Array]:
    """Of each sub-block the element of largest magnitude, 1 where it counts as zero; and where it does not."""
    extremum = first_largest(x)
    some = jnp.abs(extremum) >= TINY
    return jnp.where(some, extremum, 1.0), some


def q6_k(x: Float32[Array, "g 256 o"]) -> Parts:
    """For 19 scales around -32/extremum the codes and the least-squares scale to them, errors weighted by x²."""
    x = _sub_blocks(x, 16)
    (around, some), w = _around(x), x * x

    def fit(i: Array) -> tuple[Array, Array]:
        q = jnp.clip(jnp.round(-(32 + alone(np.float32(0.1) * i)) / around * x), -32, 31)
        return _fit(x, q, w)

    def step(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        scale, gain = best
        lx, ll = fit(i)
        better = (i != 0) & (ll > 0) & (lx * lx > gain * ll)
        found = lx / jnp.where(ll > 0, ll, 1.0)
        return jnp.where(better, found, scale), jnp.where(better, found * lx, gain)

    lx, ll = fit(jnp.float32(0))
    scale = jnp.where(ll > 0, lx / jnp.where(ll > 0, ll, 1.0), 0.0)
    scale, _ = jax.lax.fori_loop(0, 19, lambda i, b: step(jnp.asarray(i, jnp.float32) - 9, b), (scale, scale * lx))
    return _final(x, jnp.where(some, scale, 0.0), -32, 31, 128)


def q3_k(x: Float32[Array, "g 256 o"]) -> Parts:
    """Codes from -4/extremum; five times over each is moved to where the least-squares scale explains more."""
    x = _sub_blocks(x, 16)
    (around, some), w = _around(x), x * x
    q = jnp.clip(jnp.round(-4 / around * x), -4, 3)

    def move(k: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        q, lx, ll = state
        i = k % x.shape[2]
        xi, wi, qi = (jax.lax.dynamic_slice_in_dim(y, i, 1, axis=2) for y in (x, w, q))
        rest_x, rest = lx - alone(wi * xi * qi), ll - alone(wi * qi * qi)
        ok = rest_x > 0
        new = jnp.clip(jnp.round(xi * rest / jnp.where(ok, rest_x, 1.0)), -4, 3)
        new_x, new_l = rest_x + alone(wi * xi * new), rest + alone(wi * new * new)
        better = ok & (new != qi) & (new_l > 0) & (new_x * new_x * ll > lx * lx * new_l)
        q = jax.lax.dynamic_update_slice_in_dim(q, jnp.where(better, new, qi), i, axis=2)
        return q, jnp.where(better, new_x, lx), jnp.where(better, new_l, ll)

    _, lx, ll = jax.lax.fori_loop(0, 5 * x.shape[2], move, (q, *_fit(x, q, w)))
    return _final(x, jnp.where(some & (ll > 0), lx / jnp.where(ll > 0, ll, 1.0), 0.0), -4, 3, 32)


K_TYPES: dict[str, Callable[[Array], Parts]] = {
    "q2_k": WithMinimum(16, 3, 15, -0.5, 15, absolute=True),
    "q3_k": q3_k,
    "q4_k": WithMinimum(8, 15, 63, -1.0, 20, absolute=False),
    "q5_k": WithMinimum(8, 31, 63, -0.5, 15, absolute=False),
    "q6_k": q6_k,
}
