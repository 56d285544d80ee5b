"""The comparisons that tell damage by rounding from damage by any perturbation of the same size."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.jit
def matched_noise(key: Array, w: Float[Array, "..."], rounded: Float[Array, "..."]) -> Float[Array, "..."]:
    """`w` plus Gaussian noise scaled to the exact Frobenius norm of `rounded - w`."""
    error = jnp.linalg.norm((rounded.astype(jnp.float32) - w.astype(jnp.float32)).ravel())
    noise = jax.random.normal(key, w.shape, jnp.float32)
    return (w.astype(jnp.float32) + noise * (error / jnp.linalg.norm(noise.ravel()))).astype(w.dtype)
