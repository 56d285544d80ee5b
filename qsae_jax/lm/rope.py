"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and the ways its turns are slowed down.

Halves are rotated against each other as in Hugging Face's models: of the first `dims` coordinates of a head, i pairs
with i + dims/2 and turns by position * theta^(-2i/dims); the coordinates after them stay (GPT-NeoX).
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


@dataclass(frozen=True)
class Slowed:
    """Turns that are slowed down, so that a longer window holds as many. With `original` 0 all of them are, by
    `factor` (linear, arXiv 2306.15595); else Llama 3's rule: a turn of which fewer than `low` fit into the `original`
    window is slowed by `factor`, one of which more than `high` fit is left, between them it is blended."""

    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 0


@dataclass(frozen=True)
class Rope:
    """The turns of one layer's heads."""

    theta: float
    dims: int
    """How many coordinates of a head turn."""
    slowed: Slowed | None = None


def turns(rope: Rope) -> Float32[Array, " half"]:
    """How far each pair turns from one position to the next, in radians."""
    turn = 1.0 / rope.theta ** (jnp.arange(0, rope.dims, 2, dtype=jnp.float32) / rope.dims)
    slow = rope.slowed
    if slow is None:
        return turn
    if not slow.original:
        return turn / slow.factor
    fit = slow.original * turn / (2 * math.pi)
    share = jnp.clip((fit - slow.low) / (slow.high - slow.low), 0.0, 1.0)
    return (1 - share) * turn / slow.factor + share * turn


def rotary(x: Float[Array, "b s h k"], rope: Rope | None) -> Float[Array, "b s h k"]:
    """Heads turned by their position; without a Rope (learned positions) as they are."""
    if rope is None:
        return x
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * turns(rope)[None, :]
    cos, sin = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    a, b = jnp.split(x[..., : rope.dims].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return turned if rope.dims == x.shape[-1] else jnp.concatenate([turned, x[..., rope.dims :]], axis=-1)
