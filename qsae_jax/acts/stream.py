"""Twins + a point -> shuffled `[row, d]` batches of activations, the same tokens in the same order for every twin.

The order is a pure function of the seed: windows come from Grain's shuffle, `windows_per_block` of them make a
block, the rows of block j are permuted by the generator (seed, j), and batches are cut from the endless row of
blocks. The whole state is therefore one integer, the number of rows given out, and a stream that goes on from it
gives the same bits. Every counted token is given out once an epoch; a batch may span two blocks.

Two blocks are held: while one is given out, the forward passes of the next are asked for, a few with every batch. JAX
runs them in the order asked, so that neither the model nor what trains on its activations waits for the other.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32

from qsae_jax.acts.tokens import Windows, check_windows, counted_rows, shuffled, windows_per_forward
from qsae_jax.lm.model import LM
from qsae_jax.lm.tap import Point, activations
from qsae_jax.mesh import on_data

Block = dict[str, Float32[Array, "rows d"]]


@jax.jit
def _gather(old: Array, new: Array, rows: Array, from_new: Array) -> Array:
    return jnp.where(from_new[:, None], jnp.take(new, rows, axis=0), jnp.take(old, rows, axis=0))


@dataclass
class ActivationStream:
    """An endless iterator of `{twin: float32[batch, d]}`. `taken` is its state: set it to go on from there."""

    twins: Mapping[str, LM]
    point: Point
    windows: Windows
    mesh: Mesh
    batch: int
    seed: int = 0
    skip_first: int = 1
    windows_per_block: int = 64
    forward: int = 0
    """Windows in a forward pass; 0 chooses by the device. The order of the rows does not depend on it."""
    target: Point | None = None
    """A second point, whose activations are given out beside those of the first under `NAME target`."""
    taken: int = 0
    until: int = 0
    """Rows after which nobody asks for more, and nothing is made ahead; 0 is never."""
    _parts: dict[int, list[Block]] = field(default_factory=dict, repr=False)
    _blocks: dict[int, Block] = field(default_factory=dict, repr=False)
    _orders: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        counted = self.windows.seq - self.skip_first
        context = min(lm.config.context for lm in self.twins.values())
        check_windows(self.windows, self.skip_first, context)
        self.windows_per_block *= -(-self.batch // (self.windows_per_block * counted))
        most = min(windows_per_forward(self.forward, self.windows, self.mesh), self.windows_per_block)
        self.forward = next(n for n in range(most, 0, -1) if self.windows_per_block % n == 0)
        self.rows_per_block = self.windows_per_block * counted
        self._order = shuffled(self.windows, self.seed)

    def __iter__(self) -> "ActivationStream":
        return self

    def __next__(self) -> Block:
        """The next batch of each twin; row i of all twins is the same token."""
        at = self.taken + np.arange(self.batch)
        first = int(at[0]) // self.rows_per_block
        permuted = [self._permutation(first), self._permutation(first + 1)]
        rows = np.concatenate(permuted)[at - first * self.rows_per_block]
        from_new = at // self.rows_per_block > first
        for held in (self._blocks, self._parts):
            for gone in [number for number in held if number < first]:
                del held[gone]
        old = self._block(first)
        new = self._block(first + 1) if from_new.any() else old
        self.taken += self.batch
        if not self.until or (first + 1) * self.rows_per_block < self.until:
            self._ask_for(first + 1, (self.taken - first * self.rows_per_block) / self.rows_per_block)
        return {name: on_data(_gather(old[name], new[name], rows, from_new), self.mesh) for name in old}

    def first(self, rows: int) -> Block:
        """Up to so many rows of the first block, to look at before anything is given out."""
        return {name: block[:rows] for name, block in self._block(0).items()}

    def described(self) -> dict[str, Any]:
        """What decides the rows and their order, the models' weights aside."""
        facts = {name: getattr(self, name) for name in ("batch", "seed", "skip_first", "windows_per_block")}
        windows = (
            f"{self.windows.source} {self.windows.ids.shape} {zlib.crc32(np.ascontiguousarray(self.windows.ids).data)}"
        )
        facts |= {"twins": list(self.twins), "point": str(self.point), "windows": windows}
        return facts | ({"target": str(self.target)} if self.target else {})

    def _permutation(self, number: int) -> np.ndarray:
        if number not in self._orders:
            rows = np.random.default_rng((self.seed, number)).permutation(self.rows_per_block)
            self._orders = {k: v for k, v in self._orders.items() if k >= number - 1} | {number: rows.astype(np.int32)}
        return self._orders[number]

    def _block(self, number: int) -> Block:
        if number not in self._blocks:
            self._ask_for(number, 1.0)
            parts = self._parts.pop(number)
            self._blocks[number] = {name: jnp.concatenate([part[name] for part in parts]) for name in parts[0]}
        return self._blocks[number]

    def _ask_for(self, number: int, share: float) -> None:
        """Have this share of a block's forward passes on their way."""
        if number in self._blocks:
            return
        passes = self.windows_per_block // self.forward
        parts = self._parts.setdefault(number, [])
        while len(parts) < min(math.ceil(share * passes), passes):
            start = number * self.windows_per_block + len(parts) * self.forward
            ids = np.stack([np.asarray(self._order[i]) for i in range(start, start + self.forward)])
            parts.append(self._rows(on_data(ids, self.mesh)))

    def _rows(self, tokens: Array) -> Block:
        points = (self.point,) if self.target is None else (self.point, self.target)
        rows = {}
        for name, lm in self.twins.items():
            for key, acts in zip((name, f"{name} target"), activations(lm, points, tokens), strict=False):
                rows[key] = counted_rows(acts, self.skip_first).astype(jnp.float32)
        return rows
