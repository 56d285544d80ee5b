"""Where activations lie and how large they are: what a training finds once, before its first step."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qsae_jax.products import matmul
from qsae_jax.sae.settings import SAEConfig


def geometric_median(x: Float[Array, "n d"], rounds: int = 32) -> Float[Array, "d"]:
    """The point with the least sum of distances, by Weiszfeld's iteration: no outlier moves it far."""

    def closer(_: int, centre: Array) -> Array:
        weight = 1.0 / jnp.maximum(jnp.linalg.norm(x - centre[None], axis=-1), 1e-8)
        return matmul(weight / jnp.sum(weight), x)

    return jax.lax.fori_loop(0, rounds, closer, jnp.mean(x, axis=0))


def scale_of(config: SAEConfig, parts: Sequence[Float[Array, "n d"]]) -> Float[Array, "..."]:
    """What activations are divided by: one number; of several twins side by side, one along each."""

    def one(x: Array) -> Array:
        norms = jnp.linalg.norm(x, axis=-1)
        if config.normalize == "unit":
            return jnp.sqrt(jnp.mean(norms**2))
        return jnp.mean(norms) / x.shape[-1] ** 0.5 if config.normalize == "sqrt_d" else jnp.ones(())

    if len(parts) == 1:
        return one(parts[0])
    return jnp.concatenate([jnp.broadcast_to(one(x), x.shape[-1:]) for x in parts])


def scaled(x: Float[Array, "b d"], scale: Float[Array, "..."]) -> Float[Array, "b d"]:
    """Activations in the scale of training: divided by a number, or by one for each coordinate."""
    return x.astype(jnp.float32) / (scale if scale.ndim == 0 else scale[None])
