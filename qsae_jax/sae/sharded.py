"""Which codes are kept on a mesh: every device finds the largest of its rows and latents, and what each has found is
merged, so that no device sees the pre-activations of another.

The merge is exact. Of a row the k largest of all are among the k largest of each part: k numbers of each device travel.
Of a whole batch the n-th largest is found by counting: 31 numbers travel. Of equal codes those on earlier devices are
kept, and on one device those that come first, which is what `lax.top_k` does to a row.

All functions but the last two are for the inside of a `shard_map`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from qsae_jax.mesh import AXES
from qsae_jax.sae.select import Chosen, largest, nth_largest, top_k

SPREAD = 4
"""How many times its even share of a batch's codes a device has room for. Who has more is told (`BatchPart.full`)."""


def _largest_of_rows(
    own: Float[Array, "b_part m_part"], k: int
) -> tuple[Float[Array, "b_part n"], Int[Array, "b_part n"], Bool[Array, "b_part n"]]:
    """The largest of each row's part, where they are, and whether they are among the k largest of the row."""
    most = min(k, own.shape[1])
    values, at = top_k(own, most)
    every = jax.lax.all_gather(values, "model", axis=1, tiled=True)
    _, chosen = jax.lax.top_k(every, min(k, every.shape[1]))
    kept = jnp.zeros(every.shape, bool).at[jnp.arange(len(own))[:, None], chosen].set(True)
    here = jax.lax.axis_index("model") * most
    return values, at, jax.lax.dynamic_slice_in_dim(kept, here, most, axis=1)


def _first_of_equal(value: Float[Array, "..."], cut: Array, n: int | Array) -> Bool[Array, "..."]:
    """Whether a value is positive and among the n largest of all devices, whose n-th largest is `cut`."""
    above, equal = value > cut, (value == cut) & (value > 0)
    left = n - jax.lax.psum(jnp.sum(above), AXES)
    counts = jax.lax.all_gather(jnp.sum(equal), AXES)
    left = left - jnp.sum(jnp.where(jnp.arange(len(counts)) < jax.lax.axis_index(AXES), counts, 0))
    return above | (equal & (jnp.cumsum(equal.reshape(-1)).reshape(equal.shape) <= left))


@dataclass(frozen=True)
class RowsPart:
    """A device's part of TopK: a list of codes of which those that are not kept have value 0."""

    k: int

    def chosen(self, pre: Float[Array, "b_part m_part"]) -> Chosen:
        values, latents, kept = _largest_of_rows(pre, self.k)
        rows = jnp.broadcast_to(jnp.arange(len(pre), dtype=jnp.int32)[:, None], latents.shape)
        return Chosen(jnp.where(kept, jax.nn.relu(values), 0).reshape(-1), rows.reshape(-1), latents.reshape(-1))


@dataclass(frozen=True)
class BatchPart:
    """A device's part of BatchTopK, which keeps n codes of all devices."""

    n: int
    room: int

    def chosen(self, pre: Float[Array, "b_part m_part"]) -> Chosen:
        m = pre.shape[1]
        values, at = largest(pre, self.room)
        kept = _first_of_equal(values, nth_largest(values, self.n, axis=None, over=AXES), self.n)
        values, at = jnp.where(kept, values, 0), jnp.where(at >= 0, at, pre.size - 1)
        return Chosen(values, at // m, at % m)

    def full(self, value: Float[Array, "room"]) -> Bool[Array, ""]:
        """Whether some device has kept all that it has room for, so that it might have had more to keep."""
        most = jax.lax.pmax(jnp.sum(value > 0), AXES)
        return (most >= self.room) & (self.room < self.n)


def part(k: float, each: bool, batch: int, latents: int, mesh: Mesh) -> RowsPart | BatchPart:
    """The part of TopK (`each` row) or of BatchTopK on every device."""
    if each:
        return RowsPart(int(k))
    n = max(int(k * batch), 1)
    return BatchPart(n, min(n, batch * latents // mesh.size, -(-SPREAD * n // mesh.size)))


def divides(batch: int, latents: int, mesh: Mesh) -> bool:
    """Whether rows and latents can be cut evenly over a mesh."""
    return batch % mesh.shape["data"] == 0 and latents % mesh.shape["model"] == 0


def _masked(
    mask: Callable[[Array], Array], pre: Float[Array, "b m"], mesh: Mesh, cut: PartitionSpec
) -> Bool[Array, "b m"]:
    return jax.shard_map(mask, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False)(pre)


def kept_of_rows(pre: Float[Array, "b m"], k: int, mesh: Mesh) -> Bool[Array, "b m"]:
    """Whether a pre-activation is one of the k largest of its row; m is divided by the devices of `model`."""

    def mask(own: Float[Array, "b_part m_part"]) -> Bool[Array, "b_part m_part"]:
        _, at, kept = _largest_of_rows(own, k)
        return jnp.zeros(own.shape, bool).at[jnp.arange(len(own))[:, None], at].set(kept)

    # By hand over `data` too: a compiler that cuts rows as it likes gathers them before it sorts.
    rows = "data" if len(pre) % mesh.shape["data"] == 0 else None
    return _masked(mask, pre, mesh, PartitionSpec(rows, "model"))


def kept_of_batch(pre: Float[Array, "b m"], n: int, mesh: Mesh) -> Bool[Array, "b m"]:
    """Whether a pre-activation is positive and one of the n largest of all; the mesh divides both dimensions."""

    def mask(own: Float[Array, "b_part m_part"]) -> Bool[Array, "b_part m_part"]:
        return _first_of_equal(own, nth_largest(own, n, axis=None, over=AXES), n)

    return _masked(mask, pre, mesh, PartitionSpec(*AXES))
