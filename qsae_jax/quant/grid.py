"""Number grids: which values there are, and how a value is brought to one.

Integers of b bits, Q = 2^(b-1). Five symmetric conventions are in use, and they differ in the scale and in whether
the lowest code is used (the relative errors at equal bits differ by up to a half):

    restricted   scale absmax/(Q-1)             codes -(Q-1)..Q-1    bitsandbytes int8, GGUF Q8_0
    full_qmax    scale absmax/(Q-1)             codes -Q..Q-1        AutoAWQ, QuaRot, the paper (arXiv 2606.03002)
    half         scale absmax/(Q-1/2)           codes -Q..Q-1        GPTQ, compressed-tensors, qwix
    signed_full  scale extremum/(-Q)            codes -Q..Q-1        GGUF Q4_0, auto-round; the scale carries a sign
    no_clip      scale max(-min/Q, max/(Q-1))   codes -Q..Q-1        torchao SYMMETRIC_NO_CLIPPING_ERR

and three asymmetric ones, with scale (max - min)/(2^b-1) and codes 0..2^b-1:

    asym         zero is put into the range and has a code of its own      GPTQ, compressed-tensors, torchao
    asym_tight   the range as it is; the zero point is whole and clipped to the codes      AutoAWQ
    affine       the range as it is; the minimum is kept as a number       GGUF Q4_1, Q5_1

Small floats of e exponent and m mantissa bits: fp8_e4m3 (to 448), fp8_e5m2 (to 57344), fp6_e2m3 (to 7.5), fp6_e3m2
(to 28), fp4_e2m1 (to 6), the OCP formats; larger values are clipped to the largest.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from qsae_jax.quant.rounding import MODES

SYMMETRIC = ("restricted", "full_qmax", "half", "signed_full", "no_clip")
ASYMMETRIC = ("asym", "asym_tight", "affine")


class Bounds(NamedTuple):
    """The numbers of a grid: lowest and highest code, reciprocals of the scale divisors, and of floats the exponent
    of the smallest normal number and the mantissa bits.

    They are traced, not static, so that a sweep over bit-widths compiles once. A scale is `absmax * f32(1/qmax)`:
    XLA turns a division by a constant into this anyway, and written out it is bit-equal to NumPy.
    """

    low: np.float32
    high: np.float32
    inverse_low: np.float32
    inverse_high: np.float32
    least: np.int32 = np.int32(0)
    mantissa: np.int32 = np.int32(0)


@dataclass(frozen=True)
class IntGrid:
    """Integers of `bits` bits under a convention: one of SYMMETRIC or ASYMMETRIC."""

    bits: int
    convention: str = "full_qmax"

    def __str__(self) -> str:
        return f"int{self.bits}"

    def bounds(self) -> Bounds:
        q = 2.0 ** (self.bits - 1)
        low, high, over = {
            "restricted": (-(q - 1), q - 1, q - 1),
            "full_qmax": (-q, q - 1, q - 1),
            "half": (-q, q - 1, q - 0.5),
            "signed_full": (-q, q - 1, -q),
            "no_clip": (-q, q - 1, q - 1),
        }.get(self.convention, (0.0, 2 * q - 1, 2 * q - 1))
        return Bounds(np.float32(low), np.float32(high), np.float32(1 / q), np.float32(1 / over))

    @staticmethod
    def rounded(x: Float32[Array, "*n"], b: Bounds, mode: str, u: Array | None) -> Float32[Array, "*n"]:
        """The codes of x, which is already in units of the scale."""
        return MODES[mode](x, u)


FLOATS = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0, "fp6_e2m3": 7.5, "fp6_e3m2": 28.0, "fp4_e2m1": 6.0}
"""Each small float and its largest value (OCP Microscaling Formats v1.0, table 1; OCP 8-bit Floating Point v1.0)."""


@dataclass(frozen=True)
class FloatGrid:
    """A small float: a name of FLOATS."""

    name: str
    convention: str = "restricted"
    """Of the scale: floats are symmetric, with scale absmax/largest."""

    def __str__(self) -> str:
        return self.name

    @property
    def exponent(self) -> int:
        return int(self.name[-3])

    @property
    def mantissa(self) -> int:
        return int(self.name[-1])

    def bounds(self) -> Bounds:
        top, least = FLOATS[self.name], 2 - 2 ** (self.exponent - 1)
        inverse = np.float32(1 / top)
        return Bounds(
            np.float32(-top), np.float32(top), inverse, inverse, np.int32(least), np.int32(self.mantissa)
        )  # fmt: skip

    @staticmethod
    def rounded(x: Float32[Array, "*n"], b: Bounds, mode: str, u: Array | None) -> Float32[Array, "*n"]:
        """x at the float's precision: a whole number of units in the last place, which is `2^(e - m)` for a number of
        exponent e, and below the smallest normal number no smaller than there."""
        step = jnp.maximum(exponent(x), b.least) - b.mantissa
        return MODES[mode](x * power(-step), u) * power(step)


Grid = IntGrid | FloatGrid


def exponent(x: Float32[Array, "*n"]) -> Array:
    """floor(log2 |x|) of a normal number, from its bits: exact, where a logarithm is not; -127 of zero."""
    return ((jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) & 255) - 127


def power(e: Array) -> Float32[Array, "*n"]:
    """2^e, exact, for e of a normal number."""
    return jax.lax.bitcast_convert_type((e + 127) << 23, jnp.float32)
