"""The largest of many, exactly and without a full sort.

Maxima of groups come first: the groups with the n largest maxima hold the n largest values. Float32 numbers that are
not negative are ordered as their bits are, so the n-th largest is found by bisection on the bits, a count for each.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

GROUP = 32
"""How many neighbours compete first: at 8,192 values this halves the time of lax.top_k (2 cores)."""
PART = 4


class Chosen(NamedTuple):
    """Codes of a batch of b rows as a list: the few that are not zero. A place in the list that is not used has value
    0. `value` is cut at zero, and the only part with a gradient."""

    value: Float[Array, "n"]
    row: Int[Array, "n"]
    latent: Int[Array, "n"]

    def dense(self, b: int, m: int) -> Float[Array, "b m"]:
        return jnp.zeros((b, m), self.value.dtype).at[self.row, self.latent].add(self.value)


def top_k(x: Float[Array, "*b m"], k: int) -> tuple[Float[Array, "*b k"], Int[Array, "*b k"]]:
    """The k largest values of each row and where they are."""
    *b, m = x.shape
    if m % GROUP or m // GROUP < 2 * k:
        return jax.lax.top_k(x, k)
    groups = x.reshape(*b, m // GROUP, GROUP)
    _, chosen = jax.lax.top_k(jnp.max(groups, axis=-1), k)
    members = jnp.take_along_axis(groups, chosen[..., None], axis=-2).reshape(*b, k * GROUP)
    values, inside = jax.lax.top_k(members, k)
    group = jnp.take_along_axis(chosen, inside // GROUP, axis=-1)
    return values, group * GROUP + inside % GROUP


def _bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)


def nth_largest(
    x: Float[Array, "*b m"], n: int | Array, axis: int | None = -1, over: tuple[str, ...] = ()
) -> Float[Array, "*b 1"]:
    """The n-th largest along an axis (None is all of them), negative numbers counted as 0; the axis is kept. Within a
    `shard_map`, `over` names mesh axes whose devices hold parts of it."""
    bits = _bits(jnp.maximum(x, 0))

    def halve(_: Array, span: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = span
        middle = low + (high - low) // 2
        count = jnp.sum(bits >= middle, axis=axis, keepdims=True)
        enough = (jax.lax.psum(count, over) if over else count) >= n
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    high = jnp.max(bits, axis=axis, keepdims=True) + 1
    high = jax.lax.pmax(high, over) if over else high
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(high), high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def places(mask: Bool[Array, "*b"], size: int) -> Int[Array, "size"]:
    """Where a flattened mask is true, in order, the first `size` of them; what is left over is -1."""
    flat = mask.reshape(-1)
    at = jnp.where(flat, jnp.cumsum(flat.astype(jnp.int32)) - 1, size)
    return jnp.full(size, -1, jnp.int32).at[at].set(jnp.arange(flat.size, dtype=jnp.int32), mode="drop")


def _taken(x: Array, at: Int[Array, "n"]) -> Array:
    """x at places, zeros where the place is -1."""
    found = x[jnp.maximum(at, 0)]
    return jnp.where((at >= 0).reshape((-1,) + (1,) * (found.ndim - 1)), found, 0)


def _places_of_largest(x: Float[Array, "c"], n: int) -> Int[Array, "n"]:
    """The places of the n largest positive values, in order; of those equal to the last one, the first."""
    cut = nth_largest(x, n, axis=None)
    above, equal = x > cut, (x == cut) & (x > 0)
    left = n - jnp.sum(above)
    # Counting those that are equal is as much work as finding places, and there is seldom more than one.
    some = jax.lax.cond(jnp.sum(equal) > left, lambda: equal & (jnp.cumsum(equal) <= left), lambda: equal)
    return places(above | some, n)


def largest(x: Float[Array, "..."], n: int) -> tuple[Float[Array, "n"], Int[Array, "n"]]:
    """The n largest positive values of an array and their flat places, in the array's order. Where fewer than n are
    positive the rest has value 0 and place -1.

    The field is narrowed twice, to n groups and to n parts of these: what is left out has n values above it."""
    flat = x.reshape(-1)
    if flat.size % GROUP or flat.size // GROUP <= 4 * n:
        at = _places_of_largest(flat, n)
        return _taken(flat, at), at
    groups, parts = flat.reshape(-1, GROUP), GROUP // PART
    chosen = _places_of_largest(jnp.max(groups, axis=-1), n)
    within = _taken(groups, chosen).reshape(-1, PART)
    part = _places_of_largest(jnp.max(within, axis=-1), n)
    members = _taken(within, part)
    last = _places_of_largest(members.reshape(-1), n)
    one = part[last // PART]
    at = chosen[one // parts] * GROUP + one % parts * PART + last % PART
    return _taken(members.reshape(-1), last), jnp.where(last >= 0, at, -1)
