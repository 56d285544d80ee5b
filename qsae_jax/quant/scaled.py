"""Weights in groups that share a scale, rounded to a grid: integers and small floats, every combination of
convention, granularity, scale rule, rounding mode and type of scale."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from qsae_jax.products import alone
from qsae_jax.quant import scale as scales
from qsae_jax.quant.grid import ASYMMETRIC, Bounds, Grid, IntGrid
from qsae_jax.quant.group import CHANNEL, Groups
from qsae_jax.quant.scale import Scales


@dataclass(frozen=True)
class Scaled:
    """W -> scale * code(W / scale), group by group."""

    grid: Grid
    groups: Groups = CHANNEL
    rule: str = ""
    """`mse`, `hqq`, `p{percent}`, or empty: the convention's own."""
    mode: str = "nearest"
    stored: str = "f32"
    """The type of the scale; codes are found with the scale as it is stored."""
    draw: int = 0
    """Which draw of stochastic rounding."""

    def __str__(self) -> str:
        parts = [str(self.grid)]
        parts += [str(self.groups)] if self.groups != CHANNEL else []
        convention = self.grid.convention if isinstance(self.grid, IntGrid) else "full_qmax"
        parts += [convention] if convention != "full_qmax" and self.rule != "hqq" else []
        parts += [self.rule] if self.rule else []
        parts += [self.mode] if self.mode != "nearest" else []
        parts += [f"scale_{self.stored}"] if self.stored != "f32" else []
        return "-".join(parts) + (f"#{self.draw}" if self.draw else "")

    def form(self) -> "Scaled":
        """What is compiled: bits and draws are numbers."""
        grid = replace(self.grid, bits=0) if isinstance(self.grid, IntGrid) else self.grid
        return replace(self, grid=grid, draw=0)

    def numbers(self) -> Bounds:
        return self.grid.bounds()

    def round(self, w: Float32[Array, "n o"], b: Bounds, key: Array) -> Float32[Array, "n o"]:
        """Weights `[inputs, outputs]` on the grid, back in their own units."""
        # No scale is larger than the matrix's largest weight allows, so that in these units none exceeds 448.
        top = 2 * jnp.abs(b.inverse_high) if self.grid.convention in ASYMMETRIC else jnp.abs(b.inverse_high)
        unit = jnp.max(jnp.abs(w)) * top * np.float32(1 / 448) if self.stored == "e4m3" else 1.0
        chance = (jax.random.uniform(jax.random.fold_in(key, 2), w.shape),) if self.mode == "stochastic" else ()
        return self.groups.each(partial(self._round, b, unit), w, *chance)

    def scales(self, x: Float32[Array, "*g n c"], b: Bounds, unit: Array | float = 1.0) -> Scales:
        """Scale and zero point of each group, as they are stored."""
        convention = self.grid.convention
        if self.rule == "hqq":
            found = scales.hqq(x, b)
        else:
            clipped = scales.clipped(x, float(self.rule[1:]), convention) if self.rule.startswith("p") else x
            found = scales.RULES[convention](clipped, b)
        if self.rule == "mse":
            sure = replace(self, mode="nearest") if self.mode == "stochastic" else self

            def values(shrunk: Scales) -> Array:
                kept = self._kept(shrunk, unit)
                return sure.values(sure.codes(x, kept, b), kept)

            found = scales.mse(x, found, convention == "affine", values)
        return self._kept(found, unit)

    def _kept(self, found: Scales, unit: Array | float) -> Scales:
        scale, zero = found
        keeps_zero = self.rule == "hqq" or self.grid.convention == "affine"
        return scales.stored(scale, self.stored, unit), scales.stored(zero, self.stored) if keeps_zero else zero

    def codes(self, x: Float32[Array, "*g n c"], found: Scales, b: Bounds, u: Array | None = None) -> Array:
        """`clip(round(x / scale) + zero)`, by the reciprocal of the scale."""
        (scale, zero), shift = found, 0.0
        by = scales.inverse(scale)
        if self.rule == "hqq":
            y = alone(x * by) + zero
        elif self.grid.convention == "affine":
            y = (x - zero) * by
        else:
            y, shift = x * by, zero
        return jnp.clip(self.grid.rounded(y, b, self.mode, u) + shift, b.low, b.high)

    def values(self, codes: Float32[Array, "*g n c"], found: Scales) -> Float32[Array, "*g n c"]:
        """What the codes stand for."""
        scale, zero = found
        if self.grid.convention == "affine" and self.rule != "hqq":
            return alone(codes * scale) + zero
        return (codes - zero) * scale

    def _round(self, b: Bounds, unit: Array | float, x: Array, u: Array | None = None) -> Array:
        found = self.scales(x, b, unit)
        return self.values(self.codes(x, found, b, u), found)
