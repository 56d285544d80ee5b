"""Which weights share a scale.

    tensor      the whole matrix
    channel     the inputs of one output channel
    g{n}        n consecutive inputs of one output channel
    b{o}x{i}    a block of o outputs by i inputs
    duan2026    as the paper (arXiv 2606.03002) has it: channels, but in q, k and v the channels of all heads that
                have the same place in their head share one scale

A remainder is a group of its own, only shorter: nothing is padded, so nothing that is not a weight has a say.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True)
class Groups:
    """`inputs` by `outputs` weights share a scale; 0 is all of them."""

    inputs: int = 0
    outputs: int = 1
    heads: bool = False
    """The heads of q, k and v are laid end to end as inputs of one head's channels."""

    def __str__(self) -> str:
        if self.heads:
            return "duan2026"
        if self.outputs == 1:
            return f"g{self.inputs}" if self.inputs else "channel"
        return f"b{self.outputs}x{self.inputs}" if self.outputs else "tensor"

    def rest(self, shape: tuple[int, int]) -> tuple[int, int]:
        """What is left over of inputs and outputs `[n, o]`."""
        return shape[0] % (self.inputs or shape[0]), shape[1] % (self.outputs or shape[1])

    def each(self, f: Callable[..., Array], *arrays: Float[Array, "n o"]) -> Float[Array, "n o"]:
        """`f` on the groups of arrays of one shape, the result put back in place. It is given `[g.., m, c]`: each
        group lies along the next to last axis, so that where groups do not cross channels these stay contiguous."""
        n, o = arrays[0].shape
        rows, columns = self.rest((n, o))
        strips = []
        for i in _cuts(n, rows):
            parts = [self._piece(f, [x[i, j] for x in arrays]) for j in _cuts(o, columns)]
            strips.append(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1))
        return strips[0] if len(strips) == 1 else jnp.concatenate(strips)

    def _piece(self, f: Callable[..., Array], arrays: list[Array]) -> Array:
        n, o = arrays[0].shape
        i, j = min(self.inputs or n, n), min(self.outputs or o, o)
        if j == 1:
            return f(*(x.reshape(n // i, i, o) for x in arrays)).reshape(n, o)
        blocks = [
            x.reshape(n // i, i, o // j, j).transpose(0, 2, 1, 3).reshape(n // i, o // j, i * j, 1) for x in arrays
        ]
        return f(*blocks).reshape(n // i, o // j, i, j).transpose(0, 2, 1, 3).reshape(n, o)


def _cuts(n: int, rest: int) -> list[slice]:
    """The whole groups, and the rest."""
    return [cut for cut in (slice(0, n - rest), slice(n - rest, n)) if cut.stop > cut.start]


CHANNEL, TENSOR, DUAN2026 = Groups(), Groups(0, 0), Groups(heads=True)
