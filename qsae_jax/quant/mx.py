"""Blocks of small floats under a scale of their own type: the OCP microscaling formats and NVIDIA's NVFP4.

MX (OCP Microscaling Formats v1.0): 32 inputs share a power of two, 2^e. Four rules for e are in use; with `largest`
the element's largest value and `emax` its exponent (torchao's ScaleCalculationMode):

    floor    floor(log2 absmax) - emax                 OCP, torchao's default, GGUF; clips what is above `largest`
    ceil     the same, one more where absmax is no power of two
    rceil    ceil(log2(absmax / largest))              nothing is clipped
    even     floor after absmax is rounded to the element's mantissa      compressed-tensors (mxfp4, mxfp6)

NVFP4: 16 inputs share an e4m3 scale, and the matrix a float32 scale absmax/2688, so that the largest block's scale
is 448. (compressed-tensors, torchao; both levels.)
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from qsae_jax.quant.grid import FLOATS, Bounds, FloatGrid, exponent, power
from qsae_jax.quant.group import Groups
from qsae_jax.quant.scale import inverse, stored

ELEMENTS = {
    "mxfp4": "fp4_e2m1",
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp8": "fp8_e4m3",
    "mxfp8_e5m2": "fp8_e5m2",
}
RULES = ("floor", "ceil", "rceil", "even")


@dataclass(frozen=True)
class Blocks:
    """An MX format by its name in ELEMENTS, or `nvfp4`."""

    name: str
    rule: str = "floor"
    """Of the shared exponent; NVFP4 has none."""
    mode: str = "nearest"
    draw: int = 0

    def __str__(self) -> str:
        parts = [self.name]
        parts += [f"scale_{self.rule}"] if self.rule != "floor" else []
        parts += [self.mode] if self.mode != "nearest" else []
        return "-".join(parts) + (f"#{self.draw}" if self.draw else "")

    @property
    def grid(self) -> FloatGrid:
        return FloatGrid(ELEMENTS.get(self.name, "fp4_e2m1"))

    @property
    def size(self) -> int:
        return 16 if self.name == "nvfp4" else 32

    def form(self) -> "Blocks":
        return replace(self, draw=0)

    def numbers(self) -> Bounds:
        return self.grid.bounds()

    def round(self, w: Float32[Array, "n o"], b: Bounds, key: Array) -> Float32[Array, "n o"]:
        """Weights `[inputs, outputs]` in blocks along the inputs."""
        whole = jnp.max(jnp.abs(w)) * np.float32(1 / (FLOATS["fp8_e4m3"] * FLOATS["fp4_e2m1"]))

        def block(x: Array, u: Array | None = None) -> Array:
            top = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
            if self.name == "nvfp4":
                scale = stored(top * b.inverse_high, "e4m3", whole)
                by = inverse(scale)
            else:
                e = jnp.clip(shared_exponent(top, self.grid, self.rule), -126, 126)
                scale, by = power(e), power(-e)
            return jnp.clip(self.grid.rounded(x * by, b, self.mode, u), b.low, b.high) * scale

        chance = (jax.random.uniform(jax.random.fold_in(key, 2), w.shape),) if self.mode == "stochastic" else ()
        return Groups(self.size).each(block, w, *chance)


def shared_exponent(top: Float32[Array, "*g"], grid: FloatGrid, rule: str) -> Array:
    """The exponent of a block's scale from its largest magnitude. Exact: by the bits of `top`, never by a logarithm."""
    largest = FLOATS[grid.name]
    emax = int(np.floor(np.log2(largest)))
    if rule == "even":
        half = jax.lax.bitcast_convert_type(top, jnp.int32) + (1 << (23 - grid.mantissa - 1))
        top = jax.lax.bitcast_convert_type(half, jnp.float32)
    e = exponent(top) - emax
    if rule == "ceil":
        return e + (top > power(jnp.clip(e + emax, -126, 127)))
    if rule == "rceil":
        return e + (top > np.float32(largest) * power(jnp.clip(e, -126, 127 - emax)))
    return e
