"""Number grids: which codes there are, and how a value is rounded to one.

An integer grid of b bits has the codes -2^(b-1) .. 2^(b-1)-1 when symmetric and 0 .. 2^b-1 when asymmetric. Five
symmetric conventions are in use, and they differ in the scale and in whether the lowest code is used
(reference: AutoAWQ, GPTQ, GGUF, torchao; the relative errors at equal bits differ by up to a half):

    restricted   scale absmax/(Q-1)             codes -(Q-1)..Q-1    bitsandbytes int8, GGUF Q8_0
    full_qmax    scale absmax/(Q-1)             codes -Q..Q-1        AutoAWQ, QuaRot, the paper (arXiv 2606.03002)
    half         scale absmax/(Q-1/2)           codes -Q..Q-1        GPTQ, compressed-tensors, qwix
    signed_full  scale extremum/(-Q)            codes -Q..Q-1        GGUF Q4_0, auto-round; the scale carries a sign
    no_clip      scale max(-min/Q, max/(Q-1))   codes -Q..Q-1        torchao SYMMETRIC_NO_CLIPPING_ERR

with Q = 2^(b-1).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

SYMMETRIC = ("restricted", "full_qmax", "half", "signed_full", "no_clip")


class Bounds(NamedTuple):
    """The numbers of an integer grid, as float32: lowest and highest code, and reciprocals of the scale divisors.

    They are traced, not static, so that a sweep over bit-widths compiles once. A scale is `absmax * f32(1/qmax)`:
    XLA turns a division by a constant into this anyway, and written out it is bit-equal to NumPy.
    """

    low: np.float32
    high: np.float32
    inverse_low: np.float32
    inverse_high: np.float32


@dataclass(frozen=True)
class IntGrid:
    """Integers of `bits` bits under a convention: one of SYMMETRIC, or `asym`."""

    bits: int
    convention: str = "full_qmax"

    def bounds(self) -> Bounds:
        q = 2.0 ** (self.bits - 1)
        low, high, over = {
            "restricted": (-(q - 1), q - 1, q - 1),
            "full_qmax": (-q, q - 1, q - 1),
            "half": (-q, q - 1, q - 0.5),
            "signed_full": (-q, q - 1, -q),
            "no_clip": (-q, q - 1, q - 1),
            "asym": (0.0, 2 * q - 1, 2 * q - 1),
        }[self.convention]
        return Bounds(np.float32(low), np.float32(high), np.float32(1 / q), np.float32(1 / over))


def to_codes(
    x: Float32[Array, "*g n"], scale: Float32[Array, "*g 1"], zero: Float32[Array, "*g 1"], b: Bounds
) -> Array:
    """Codes `clip(round(x / scale) + zero)`, rounding half to even, by the reciprocal of the scale."""
    return jnp.clip(jnp.round(x * (1.0 / scale)) + zero, b.low, b.high)


def from_codes(codes: Float32[Array, "*g n"], scale: Float32[Array, "*g 1"], zero: Float32[Array, "*g 1"]) -> Array:
    """Values `(codes - zero) * scale`."""
    return (codes - zero) * scale
