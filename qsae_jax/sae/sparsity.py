"""Sparsities: from pre-activations to codes. One signature: `sparsity(pre: [*b, m]) -> codes [*b, m]`."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

GROUP = 32
"""How many neighbours compete first in `top_k`: at 8,192 values this halves the time of lax.top_k (2 cores)."""


def top_k(x: Float[Array, "*b m"], k: int) -> tuple[Float[Array, "*b k"], Int[Array, "*b k"]]:
    """The k largest values and where they are, exactly.

    The k groups with the largest maxima hold the k largest values, so a full sort is not needed."""
    *b, m = x.shape
    if m % GROUP or m // GROUP < 2 * k:
        return jax.lax.top_k(x, k)
    groups = x.reshape(*b, m // GROUP, GROUP)
    _, chosen = jax.lax.top_k(jnp.max(groups, axis=-1), k)
    members = jnp.take_along_axis(groups, chosen[..., None], axis=-2).reshape(*b, k * GROUP)
    values, inside = jax.lax.top_k(members, k)
    group = jnp.take_along_axis(chosen, inside // GROUP, axis=-1)
    return values, group * GROUP + inside % GROUP


@dataclass(frozen=True)
class ReLU:
    """`max(pre, 0)` (Bricken et al. 2023; Cunningham et al. 2023, arXiv 2309.08600)."""

    name = "relu"

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        return jax.nn.relu(pre)


@dataclass(frozen=True)
class TopK:
    """The k largest pre-activations of a row, negative ones cut to zero (Gao et al. 2024, arXiv 2406.04093)."""

    k: int
    name = "topk"

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        values, where = top_k(pre, self.k)
        flat = jnp.zeros((pre[..., 0].size, pre.shape[-1]), pre.dtype)
        rows = jnp.arange(len(flat))[:, None]
        codes = flat.at[rows, where.reshape(-1, self.k)].set(jax.nn.relu(values).reshape(-1, self.k))
        return codes.reshape(pre.shape)


Sparsity = ReLU | TopK
