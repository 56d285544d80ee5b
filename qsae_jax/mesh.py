"""The (data, model) mesh, and the one set of rules from a weight's logical axes to the mesh.

A weight says what its dimensions are (`axes=("embed", "mlp")`); RULES says which of these are cut over which mesh
axis. A dimension that the mesh axis does not divide is replicated, so nine heads run on a mesh of eight. The mesh
axes are `AxisType.Auto`: under explicit axes a top-k over sharded latents is refused (jax 0.10).
"""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from qsae_jax import hosts
from qsae_jax.errors import UserError

AXES = ("data", "model")
RULES = {"heads": "model", "kv_heads": "model", "mlp": "model", "vocab": "model", "latent": "model", "batch": "data",
         "spread": "data"}  # fmt: skip


def make_mesh(data: int = 0, model: int = 1) -> Mesh:
    """A mesh of `data` x `model` devices; `data=0` takes as many as are left."""
    have = jax.device_count()
    data = data or max(have // max(model, 1), 1)
    if data * model > have or model < 1 or data < 1:
        raise UserError(f"mesh {data}x{model} needs {data * model} devices, {have} are here: choose a smaller mesh")
    if hosts.many() and data * model < have:
        raise UserError(f"mesh {data}x{model} leaves out devices of some process: choose one of {have}, or auto")
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


MOST_SIMULATED = 256
"""Devices that are simulated at most: programs for more are compiled for a mesh with a shorter `data`."""


def simulate(devices: int) -> None:
    """Have so many CPU devices, as far as JAX has none yet: for plans, which run nothing on them."""
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", min(devices, MOST_SIMULATED))
    except RuntimeError:  # there are some already, as in tests
        return


def free_bytes() -> int:
    """Memory that is free for arrays: of the first device, or where it does not say (a CPU) of the machine."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = 8 << 30
    try:  # A container may be allowed less than its machine has.
        most, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        return min(free, most - used)
    except (OSError, ValueError):
        return free


def return_freed() -> None:
    """Give freed memory back to the system. glibc keeps what many threads have freed in as many arenas: fifteen twins
    of 0.4 GiB, five at a time, left 5 GiB behind, and 0.1 after this."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def parse_mesh(text: str) -> Mesh:
    """`4x2` is 4 over data and 2 over model; `auto` puts all devices on data."""
    return make_mesh() if text == "auto" else make_mesh(*mesh_shape(text))


def mesh_shape(text: str) -> tuple[int, int]:
    """`4x2` as numbers."""
    try:
        data, model = (int(part) for part in text.split("x"))
    except ValueError:
        raise UserError(f"mesh `{text}` is not of the form DATAxMODEL, for example 8x1 or 2x4") from None
    if data < 1 or model < 1:
        raise UserError(f"mesh `{text}`: give at least one device over data and one over model")
    return data, model


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of an array whose dimensions carry these logical axes; what does not divide is replicated.

    Without trailing Nones, as XLA gives shardings back: a step sees its own output as it saw the first state."""
    cut = [RULES.get(axis) if axis else None for axis in axes]
    cut = [c if c and n % mesh.shape[c] == 0 else None for c, n in zip(cut, shape, strict=True)]
    while cut and cut[-1] is None:
        cut.pop()
    return PartitionSpec(*cut)


def _axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    return variable.get_metadata().get("axes") or (None,) * len(variable.shape)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The tree with each Variable's value replaced by its NamedSharding, arrays outside Variables replicated."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, nnx.Variable):
            return leaf.replace(NamedSharding(mesh, spec(_axes(leaf), leaf.shape, mesh)))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def spread(tree: Any) -> Any:
    """The tree with the residual width of its matrices cut over `data`: each device keeps a part of every weight, and
    XLA gathers a weight where it is used and lets it go again (FSDP; Zhao et al. 2023, arXiv 2304.11277)."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable) or len(leaf.shape) < 2:
            return leaf
        new = leaf.replace(leaf.get_value())
        new.set_metadata(axes=tuple("spread" if axis == "embed" else axis for axis in _axes(leaf)))
        return new

    return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def place(tree: Any, mesh: Mesh) -> Any:
    """The tree with every leaf put on the mesh by its logical axes."""
    return jax.tree.map(put, tree, shardings(tree, mesh))


def put(leaf: Any, where: NamedSharding) -> Array:
    """An array on the devices of a sharding. Of what this process holds whole, each process gives its own part."""
    if where.is_fully_addressable:
        return jax.device_put(leaf, where)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=where)(leaf)
    return jax.make_array_from_callback(leaf.shape, where, lambda index: np.asarray(leaf[index]))


def born(make: Callable[[], Any], mesh: Mesh) -> Any:
    """What `make()` returns, created sharded: no leaf is ever whole on one device."""
    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make), mesh))()


def kept(tree: Any, mesh: Mesh) -> Any:
    """Inside jit: the tree, held to the shardings that it was born with."""
    return jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))


def on_data(array: Any, mesh: Mesh) -> Array:
    """An array cut over `data` along its first dimension (windows of tokens, rows of activations)."""
    return put(array, NamedSharding(mesh, spec(("batch",) + (None,) * (array.ndim - 1), array.shape, mesh)))


def in_chunks(rows: Array, size: int) -> Array:
    """Rows `[n, ...]` as `[n / size, size, ...]`, for a loop over chunks.

    Chunk c holds the rows c, c + n / size, ...: an equal share of what each device of `data` holds, so that the loop
    keeps all devices at work and moves nothing between them. `from_chunks` undoes it."""
    return jnp.moveaxis(rows.reshape(size, -1, *rows.shape[1:]), 1, 0)


def from_chunks(chunks: Array) -> Array:
    """Chunks `[c, size, ...]` of `in_chunks` back as rows `[c * size, ...]`."""
    return jnp.moveaxis(chunks, 0, 1).reshape(-1, *chunks.shape[2:])
