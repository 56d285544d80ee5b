"""Which weights a rule takes, by their path.

    [4]  [4-8]             blocks, counted from 0
    [mlp.down]  [attn]     matrices by their name in the block, or all of a part
    [*.q]  [blocks.3.*]    any path, with * and ?
    [4-8,mlp.down]         both: the mlp.down of blocks 4 to 8
    [embed]  [head]        embedding and unembedding, which nothing else takes

Without brackets a rule takes every matrix of the blocks.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from qsae_jax.errors import UserError, nearest

OUTSIDE = ("embed", "head")
"""What lies outside the blocks."""


@dataclass(frozen=True)
class Where:
    """Layers as ranges, both ends included, and patterns of names; empty is all."""

    layers: tuple[tuple[int, int], ...] = ()
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        spans = [f"{a}" if a == b else f"{a}-{b}" for a, b in self.layers]
        return f"[{','.join((*spans, *self.names))}]" if spans or self.names else ""

    def takes(self, path: str) -> bool:
        """Whether the weight at a path is meant, for example `blocks.4.mlp.down`."""
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", path)
        if not found:
            return path in self.names
        layer, name = int(found[1]), found[2]
        here = not self.layers or any(a <= layer <= b for a, b in self.layers)
        inside = [pattern for pattern in self.names if pattern not in OUTSIDE]
        every = not inside and (bool(self.layers) or not self.names)
        return here and (every or any(_meant(pattern, name, path) for pattern in inside))


EVERYWHERE = Where()


def _meant(pattern: str, name: str, path: str) -> bool:
    return name.startswith(f"{pattern}.") or fnmatchcase(name, pattern) or fnmatchcase(path, pattern)


def parse_where(text: str, scheme: str) -> Where:
    """What stands between the brackets; ranges are merged and sorted, so that one meaning has one form."""
    spans, names = [], set()
    for item in text.split(","):
        item = item.strip()
        if found := re.fullmatch(r"(\d+)(?:-(\d+))?", item):
            span = int(found[1]), int(found[2] or found[1])
            if span[1] < span[0]:
                raise UserError(f"scheme `{scheme}`: `{item}` runs backwards: write {span[1]}-{span[0]}")
            spans.append(span)
        elif re.fullmatch(r"[a-z0-9_.*?]+", item):
            names.add(item)
        else:
            raise UserError(
                f"scheme `{scheme}`: `{item}` in brackets is no layer and no weight: for example [4-8,mlp.down]"
            )
    return Where(_merged(spans), tuple(sorted(names)))


def _merged(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        else:
            merged.append((low, high))
    return tuple(merged)


def check_used(scheme: object, where: Where, taken: int, paths: list[str]) -> None:
    """Refuse a rule that no weight falls to, and one that names a weight or a block that is not there."""
    last = max(int(path.split(".")[1]) for path in paths if path.startswith("blocks."))
    names = sorted({path.split(".", 2)[-1] for path in paths})
    for name in where.names:
        if not any(_meant(name, path.split(".", 2)[-1], path) for path in paths):
            if name == "head":
                raise UserError(f"scheme `{scheme}`: the head of this model is its embedding: write [embed] for both")
            raise UserError(f"scheme `{scheme}`: no weight is named `{name}`{nearest(name, names)}; {', '.join(names)}")
    if where.layers and where.layers[-1][1] > last:
        raise UserError(f"scheme `{scheme}`: there is no block {where.layers[-1][1]}: the model has blocks 0 to {last}")
    if not any(where.takes(path) for path in paths):
        raise UserError(f"scheme `{scheme}`: {where} takes no weight: a name and a block are both to fit")
    if not taken:
        who = str(where) or "a rule without brackets"
        raise UserError(f"scheme `{scheme}`: every weight of {who} is taken by a rule before it")
