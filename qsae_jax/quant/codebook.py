"""Sixteen values that a weight may take, times the largest magnitude of its block: bitsandbytes' NF4 and FP4.

A block is 64 consecutive weights of the matrix as torch stores it, `[out, in]` row by row; only where a row is no
multiple of that do blocks cross rows. (Dettmers et al. 2023, QLoRA, arXiv 2305.14314; bitsandbytes.functional.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from qsae_jax.products import alone
from qsae_jax.quant.group import Groups

# fmt: off
TABLES = {
    # Quantiles of a standard normal, zero among them.
    "nf4": (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    # A float of 2 exponent bits and 1 mantissa bit, with a subnormal of its own; of 16 codes two are zero.
    "fp4": tuple(sign * x / 12 for sign, xs in ((-1, (12, 8, 6, 4, 3, 2, 0.0625)), (1, (0, 0.0625, 2, 3, 4, 6, 8, 12)))
                 for x in xs),
}
# fmt: on
NESTED = 256
"""Largest magnitudes that share a scale when these are quantized in turn."""


@cache
def dynamic_map() -> Float32[np.ndarray, "256"]:
    """The signed 8-bit numbers of Dettmers 2015 (arXiv 1511.04561): seven decades, ever finer fractions in the upper
    ones, zero and one."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = _edges(2**i)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        values += [float(sign * np.float32(10.0 ** (i - 6)) * x) for x in means for sign in (1, -1)]
    return np.sort(np.asarray(values, np.float32))


def _edges(n: int) -> Float32[np.ndarray, "n1"]:
    """torch.linspace(0.1, 1, n + 1) in float32: from both ends to the middle, products and sums fused."""
    low, i = np.float64(np.float32(0.1)), np.arange(n + 1)
    step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(n))
    return np.where(i < (n + 1) // 2, low + step * i, 1 - step * (n - i)).astype(np.float32)


@dataclass(frozen=True)
class Lookup:
    """`nf4` or `fp4` in blocks; `double`: the blocks' largest magnitudes are kept in 8 bits, less their mean."""

    table: str
    block: int = 64
    double: bool = False

    draw = 0

    def __str__(self) -> str:
        return self.table + (f"-g{self.block}" if self.block != 64 else "") + ("-double" if self.double else "")

    def form(self) -> "Lookup":
        return self

    def numbers(self) -> tuple[()]:
        return ()

    def round(self, w: Float32[Array, "n o"], numbers: tuple[()], key: Array) -> Float32[Array, "n o"]:
        """Weights `[inputs, outputs]` at the table's values."""
        n, o = w.shape
        if n % self.block == 0 and not self.double:
            return Groups(self.block).each(self._block, w)
        flat = w.T.reshape(-1)
        x = jnp.pad(flat, (0, -flat.size % self.block)).reshape(-1, self.block)
        top = jnp.max(jnp.abs(x), axis=-1)
        values = self._codes(x, top[:, None]) * (nested(top) if self.double else top)[:, None]
        return values.reshape(-1)[: flat.size].reshape(o, n).T

    def _block(self, x: Array) -> Array:
        top = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
        return self._codes(x, top) * top

    def _codes(self, x: Array, top: Array) -> Array:
        # By the block's magnitude itself, also where it is then kept in 8 bits, as bitsandbytes finds them.
        return nearest_of(x * (1.0 / jnp.where(top == 0, 1.0, top)), TABLES[self.table])


def nearest_of(x: Float32[Array, "*n"], table: Sequence[float], upper: bool = False) -> Float32[Array, "*n"]:
    """The nearest value of an ascending table; of two equally near the lower one, or the upper."""
    values = np.asarray(table, np.float32)
    found = jnp.full(x.shape, values[0])
    for middle, value in zip((values[:-1] + values[1:]) / np.float32(2), values[1:], strict=True):
        found = jnp.where(x >= middle if upper else x > middle, value, found)
    return found


def nested(top: Float32[Array, "g"]) -> Float32[Array, "g"]:
    """Largest magnitudes as they come back from 8 bits: less their mean, in blocks of 256, by the dynamic map."""
    mean = jnp.mean(top)
    away = top - mean
    x = jnp.pad(away, (0, -away.size % NESTED)).reshape(-1, NESTED)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    y = x * (1.0 / jnp.where(scale == 0, 1.0, scale))
    table = dynamic_map()
    at = jnp.searchsorted((table[:-1] + table[1:]) / np.float32(2), y.reshape(-1), side="left")
    values = jnp.asarray(table)[at].reshape(x.shape) * scale
    return alone(values.reshape(-1)[: top.size]) + mean
