"""The programs that a study runs, compiled for a mesh of simulated devices without a weight or a token being there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from qsae_jax.audit.sums import Shifts, batch_sums
from qsae_jax.compare.fidelity import splice
from qsae_jax.devices import Device
from qsae_jax.lm.layers import Linear
from qsae_jax.lm.loss import token_losses
from qsae_jax.lm.model import LM
from qsae_jax.lm.tap import Point, activations, resume, width_at
from qsae_jax.mesh import shardings, spec
from qsae_jax.plan.counts import operations, traffic
from qsae_jax.sae.model import SAE
from qsae_jax.sae.settings import SAEConfig
from qsae_jax.sae.train import finished, make_step, start

FIRST = 8192
"""Activations from which scale and centre are found (sae/fit.py)."""
TWICE = {"all-reduce": 2.0}
"""How often what a collective results in goes over a link: a ring sums on its first round and shares on its second."""

LATENCY = 5e-6
"""Seconds of a collective, however small: an assumption, not measured here."""


@dataclass(frozen=True)
class Cost:
    """Of one call of a program, on one device."""

    operations: dict[str, float]
    """Floating-point operations of products, by the dtype of their operands."""
    read: float
    """Bytes of the device's memory that are read and written, after fusion, loop bodies once."""
    temporary: float
    """Bytes that are alive within it."""
    result: float
    """Bytes of what it gives, where these are not its arguments' own."""
    moved: float
    """Bytes over a link."""
    collectives: dict[str, tuple[int, float]]

    def seconds(self, device: Device) -> float:
        """By the roofline: products, memory, links."""
        rates = {"bfloat16": device.bf16, "float16": device.bf16}
        product = sum(n / (rates.get(kind, device.f32) * device.reached) for kind, n in self.operations.items())
        return max(product, self.read / device.bandwidth) + self.moved / device.link + self.calls * LATENCY

    @property
    def calls(self) -> int:
        """Collectives of a run."""
        return sum(count for count, _ in self.collectives.values())


def cost(function: Any, mesh: Mesh, *args: Any, **static: Any) -> Cost:
    """What a jitted function takes, its arguments being shapes with shardings."""
    compiled = function.lower(*args, **static).compile()
    memory, facts = compiled.memory_analysis(), compiled.cost_analysis() or {}
    assert memory is not None
    every = operations(*_without_names(function, args, static))
    # Shared evenly, or where a dimension does not divide as XLA has it, which knows no loops.
    total = max(sum(every.values()), 1.0)
    share = max(total / mesh.size, min(facts.get("flops", 0.0), total)) / total
    found = traffic(compiled.as_text())
    moved = sum(TWICE.get(kind, 1.0) * size for kind, (_, size) in found.items())
    result = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Cost({kind: n * share for kind, n in every.items()}, facts.get("bytes accessed", 0.0),
                memory.temp_size_in_bytes, max(result, 0), moved, found)  # fmt: skip


def _without_names(function: Callable[..., Any], args: Sequence[Any], static: dict[str, Any]) -> tuple[Any, ...]:
    """The function of its arrays alone, and their shapes; points and numbers are part of it."""
    arrays = [all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(arg)) for arg in args]

    def of_arrays(*given: Any) -> Any:
        rest = iter(given)
        return function(*(next(rest) if array else arg for arg, array in zip(args, arrays, strict=True)), **static)

    return of_arrays, *(arg for arg, array in zip(args, arrays, strict=True) if array)


def shaped(tree: Any, mesh: Mesh, dtype: Any = None) -> Any:
    """A tree of shapes with the shardings that its arrays would have, floats in `dtype` if one is given."""

    def one(leaf: Any, where: Any) -> Any:
        kind = dtype if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, kind, sharding=where)

    return jax.tree.map(one, tree, shardings(tree, mesh))


def rows(shape: Sequence[int], mesh: Mesh, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """An array cut over `data` along its first dimension."""
    where = spec(("batch",) + (None,) * (len(shape) - 1), tuple(shape), mesh)
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(mesh, where))


def bytes_of(tree: Any) -> float:
    """Of a tree of shapes, on one device."""
    return float(sum(_size(leaf) for leaf in jax.tree.leaves(tree)))


def _size(leaf: Any) -> int:
    here = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
    size = leaf.dtype.itemsize
    for n in here:
        size *= n
    return size


def bytes_of_twin(lm: LM) -> float:
    """What a quantized twin does not share with its original: the linear weights of the blocks."""
    leaves = jax.tree.leaves(lm.blocks, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return float(sum(_size(leaf.get_value()) for leaf in leaves if isinstance(leaf, Linear)))


@dataclass(frozen=True)
class Programs:
    """Of one model at one point, for batches of so many windows."""

    lm: LM
    point: Point
    mesh: Mesh
    windows: int
    seq: int
    skip_first: int

    @property
    def width(self) -> int:
        return width_at(self.lm, self.point)

    @property
    def tokens(self) -> jax.ShapeDtypeStruct:
        return rows((self.windows, self.seq), self.mesh, jnp.int32)

    def listening(self, *points: Point) -> Cost:
        """A forward pass, up to the last of the points."""
        return cost(activations, self.mesh, self.lm, points, self.tokens)

    def going_on(self) -> Cost:
        """From the point to the end."""
        x = rows((self.windows, self.seq, self.width), self.mesh)
        return cost(resume, self.mesh, self.lm, self.point, self.tokens, x)

    def losses(self, runs: int) -> Cost:
        hidden = rows((self.windows, self.seq, self.lm.config.d_model), self.mesh)
        return cost(token_losses, self.mesh, [self.lm] * runs, [hidden] * runs, self.tokens)

    def sums(self, sae: SAE, runs: int) -> Cost:
        """The audit's sums over the codes of all runs."""
        x = rows((self.windows, self.seq - self.skip_first, self.width), self.mesh)
        flat: Any = [jax.ShapeDtypeStruct((n,), jnp.float32) for n in (sae.d, sae.d, sae.latents, sae.latents)]
        weight, local = rows((self.windows,), self.mesh), rows((self.windows,), self.mesh, jnp.int32)
        return cost(batch_sums, self.mesh, sae, [x] * runs, weight, local, Shifts(*flat), span=2)

    def spliced(self, sae: SAE) -> Cost:
        x = rows((self.windows, self.seq, self.width), self.mesh)
        return cost(splice, self.mesh, sae, x, jax.ShapeDtypeStruct((self.seq,), jnp.float32))


def training(config: SAEConfig, width: int, batch: int, steps: int, mesh: Mesh, twins: int = 1) -> tuple[Any, Cost]:
    """The state of a training as shapes, and a step of it."""
    first = [jax.ShapeDtypeStruct((FIRST, width), jnp.float32)] * twins
    latents = max(round(width * config.expansion), 1)
    state = jax.eval_shape(lambda x: start(config, x, latents, steps, 0, mesh), first)
    state = shaped(state, mesh)
    x = rows((batch, width * twins), mesh)
    return state, cost(make_step(config, steps, mesh, twins), mesh, state, x)


def judged(config: SAEConfig, state: Any, mesh: Mesh) -> SAE:
    """The dictionary that a training leaves, as shapes."""
    return shaped(jax.eval_shape(lambda state: finished(state, config), state), mesh)
