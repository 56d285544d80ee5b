"""The comparisons that tell damage by rounding from damage by any perturbation.

same                 the weights as they are: a twin that must lose nothing, of a pipeline that is right
bf16 f16             the weights in a shorter float: what a dtype change alone does
prune{fraction}      the smallest of each matrix set to zero (Han et al. 2015, arXiv 1506.02626)
noise@SCHEME         Gaussian noise of exactly SCHEME's error norm, matrix by matrix (noise2@SCHEME twice as large)
permuted@SCHEME      SCHEME's own errors, in a random order within their matrix
prune~SCHEME         pruning by as much as gives SCHEME's perplexity; found on the tokens of an audit
noise~SCHEME         the same with noise in the proportions of SCHEME's errors
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from qsae_jax.products import alone
from qsae_jax.quant.how import How


@dataclass(frozen=True)
class Cast:
    """`bf16` or `f16`."""

    dtype: str

    draw = 0

    def __str__(self) -> str:
        return self.dtype

    def form(self) -> "Cast":
        return self

    def numbers(self) -> tuple[()]:
        return ()

    def round(self, w: Float32[Array, "n o"], numbers: tuple[()], key: Array) -> Float32[Array, "n o"]:
        return w.astype({"bf16": jnp.bfloat16, "f16": jnp.float16}[self.dtype]).astype(jnp.float32)


@dataclass(frozen=True)
class Same:
    """`same`: nothing is done."""

    draw = 0

    def __str__(self) -> str:
        return "same"

    def form(self) -> "Same":
        return self

    def numbers(self) -> tuple[()]:
        return ()

    def round(self, w: Float32[Array, "n o"], numbers: tuple[()], key: Array) -> Float32[Array, "n o"]:
        return w


@dataclass(frozen=True)
class Prune:
    """A fraction of each matrix set to zero."""

    fraction: float

    draw = 0

    def __str__(self) -> str:
        return f"prune{self.fraction:.6g}"

    def form(self) -> "Prune":
        return Prune(0.0)

    def numbers(self) -> np.float32:
        return np.float32(self.fraction)

    def round(self, w: Float32[Array, "n o"], fraction: np.float32, key: Array) -> Float32[Array, "n o"]:
        """The `round(fraction * size)` smallest magnitudes set to zero, of equal ones the first in the matrix. The
        threshold is found by bisection over the bits of the magnitudes, which order as the numbers do: no sorting."""
        bits = jax.lax.bitcast_convert_type(jnp.abs(w), jnp.int32)
        count = jnp.round(fraction * w.size).astype(jnp.int32)

        def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = low + (high - low) // 2
            enough = jnp.sum(bits <= middle) >= count
            return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

        threshold, _ = jax.lax.fori_loop(0, 31, halve, (jnp.int32(0), jnp.int32(2**31 - 1)))
        equal = bits == threshold
        first = jnp.cumsum(equal.reshape(-1)).reshape(w.shape) <= count - jnp.sum(bits < threshold)
        return jnp.where((bits < threshold) | (equal & first), 0.0, w)


@dataclass(frozen=True)
class Noise:
    """Gaussian noise of `factor` times the error norm of a quantizer."""

    of: How
    factor: float = 1.0
    draw: int = 0

    def __str__(self) -> str:
        factor = "" if self.factor == 1 else f"{self.factor:.6g}"
        return f"noise{factor}@{self.of}" + (f"#{self.draw}" if self.draw else "")

    def form(self) -> "Noise":
        return Noise(self.of.form(), 0.0)

    def numbers(self) -> tuple[np.float32, Any]:
        return np.float32(self.factor), self.of.numbers()

    def round(self, w: Float32[Array, "n o"], numbers: tuple[Array, Any], key: Array) -> Float32[Array, "n o"]:
        factor, inner = numbers
        return matched_noise(key, w, self.of.round(w, inner, key), factor)


@dataclass(frozen=True)
class Permuted:
    """The errors of a quantizer in a random order within their matrix."""

    of: How
    draw: int = 0

    def __str__(self) -> str:
        return f"permuted@{self.of}" + (f"#{self.draw}" if self.draw else "")

    def form(self) -> "Permuted":
        return Permuted(self.of.form())

    def numbers(self) -> Any:
        return self.of.numbers()

    def round(self, w: Float32[Array, "n o"], numbers: Any, key: Array) -> Float32[Array, "n o"]:
        error = self.of.round(w, numbers, key) - w
        # One sort by 32 random bits each: of a million a hundred are equal, and these keep their order.
        _, mixed = jax.lax.sort_key_val(jax.random.bits(jax.random.fold_in(key, 3), (w.size,)), error.reshape(-1))
        return w + mixed.reshape(w.shape)


@dataclass(frozen=True)
class Matched:
    """A control as strong as a quantizer's perplexity asks for: `by` is `prune` or `noise`. It cannot be applied
    itself: audit/match.py finds the one that can."""

    by: str
    of: How
    draw: int = 0

    def __str__(self) -> str:
        return f"{self.by}~{self.of}" + (f"#{self.draw}" if self.draw else "")

    def at(self, strength: float) -> Prune | Noise:
        """The control itself: a fraction of the weights, or a factor of the noise."""
        return Prune(strength) if self.by == "prune" else Noise(self.of, strength, self.draw)


CONTROLS = (Same, Cast, Prune, Noise, Permuted, Matched)


@jax.jit
def matched_noise(
    key: Array, w: Float[Array, "..."], rounded: Float[Array, "..."], factor: float | Array = 1.0
) -> Float[Array, "..."]:
    """`w` plus Gaussian noise scaled to the Frobenius norm of `rounded - w`, times a factor."""
    error = jnp.linalg.norm((rounded.astype(jnp.float32) - w.astype(jnp.float32)).ravel()) * factor
    noise = jax.random.normal(key, w.shape, jnp.float32)
    added = alone(noise * (error / jnp.linalg.norm(noise.ravel())))
    return (w.astype(jnp.float32) + added).astype(w.dtype)


def is_control(how: How | Matched | None) -> bool:
    return isinstance(how, CONTROLS)
