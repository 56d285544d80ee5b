"""How a number becomes a whole one. A mode is `mode(x, u)`: `u` is uniform on [0, 1) where chance decides.

nearest     to the nearest, halves to even (IEEE 754; NumPy, torch, most libraries)
away        to the nearest, halves away from zero (C's roundf; GGUF Q8_0)
floor       down
ceil        up
trunc       towards zero
stochastic  up with a probability equal to the fraction, so that the mean is the number itself (Gupta et al. 2015,
            arXiv 1502.02551)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

Mode = Callable[[Float32[Array, "*n"], Float32[Array, "*n"] | None], Float32[Array, "*n"]]


def _stochastic(x: Array, u: Array | None) -> Array:
    assert u is not None, "chance needs its numbers"
    # Not floor(x + u): the sum is itself rounded, and near 1 rounds up.
    low = jnp.floor(x)
    return low + (u < x - low)


MODES: dict[str, Mode] = {
    "nearest": lambda x, u: jnp.round(x),
    "away": lambda x, u: jax.lax.round(x, jax.lax.RoundingMethod.AWAY_FROM_ZERO),
    "floor": lambda x, u: jnp.floor(x),
    "ceil": lambda x, u: jnp.ceil(x),
    "trunc": lambda x, u: jnp.trunc(x),
    "stochastic": _stochastic,
}


@jax.custom_jvp
def straight_through(w: Float32[Array, "*n"], rounded: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """`rounded`, with the gradient of `w` (Bengio, Léonard & Courville 2013, arXiv 1308.3432): rounding itself has
    the gradient 0 almost everywhere. The gradient passes also where a value was clipped."""
    return rounded


@straight_through.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return primals[1], tangents[0].astype(primals[1].dtype)
