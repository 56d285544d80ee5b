"""Sums that judge a dictionary on a batch of activations, computed on the devices and added up by the caller.

Sums over tokens are float32 in two levels (64 rows, then the rest), about a shift near the mean: the rounding
error of a batch stays near 1e-6 of the sum. `weight [n]` is 1 for a counted row and 0 for padding.
"""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32

from qsae_jax.sae.model import SAE

LEVEL = 64


def over_rows(x: Float[Array, "n *m"]) -> Float32[Array, "*m"]:
    """The sum over rows in two levels."""
    n = x.shape[0]
    if n % LEVEL:
        x = jnp.concatenate([x, jnp.zeros((-n % LEVEL, *x.shape[1:]), x.dtype)])
    return jnp.sum(jnp.sum(x.reshape(LEVEL, -1, *x.shape[1:]), axis=0), axis=0)


def reconstruction_sums(
    sae: SAE, x: Float[Array, "n d"], codes: Float[Array, "n m"], weight: Float[Array, "n"], shift: Float[Array, "d"]
) -> dict[str, Float32[Array, "..."]]:
    """What FVU and L0 are made of: `error` sum |x - xhat|^2, `x` sum (x - shift) `[d]`, `xx` sum |x - shift|^2,
    `active` the number of nonzero codes, `n` the number of counted rows."""
    away = x.astype(jnp.float32) - shift[None]
    error = x.astype(jnp.float32) - sae.decode(codes, x)
    return {
        "error": over_rows(weight * jnp.sum(error**2, axis=-1)),
        "x": over_rows(away * weight[:, None]),
        "xx": over_rows(weight * jnp.sum(away**2, axis=-1)),
        "active": over_rows(weight * jnp.sum(codes > 0, axis=-1)),
        "n": jnp.sum(weight),
    }


def fvu(error: ArrayLike, x: ArrayLike, xx: ArrayLike, n: ArrayLike) -> float:
    """Fraction of variance unexplained, `sum |x - xhat|^2 / sum |x - mean x|^2`, the mean over all counted tokens."""
    error, x, xx, n = (np.asarray(v, np.float64) for v in (error, x, xx, n))
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(error / (xx - (x**2).sum(-1) / n))
