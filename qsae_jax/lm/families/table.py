"""The form of a family: the facts of its config, and name -> path + einops string.

A row is (stored name, path in our tree, stored layout -> our layout), `{}` standing for the layer. Read forwards it
loads, backwards it exports. `q|k|v` in a path says that the stored tensor is three of ours, side by side along the
first axis of our layout. Whatever the tables do not name is refused.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qsae_jax.lm.config import LMConfig
from qsae_jax.lm.families.facts import Facts

Row = tuple[str, str, str]


@dataclass(frozen=True)
class Place:
    """Where a stored tensor goes: one path in our tree, or several that it holds side by side."""

    stored: str
    paths: tuple[str, ...]
    layout: str


@dataclass(frozen=True)
class Family:
    """One family in one kind of file."""

    facts: Callable[[Facts], LMConfig]
    rows: tuple[Row, ...]
    export: Callable[[LMConfig], dict[str, Any]] | None = None
    """The `config.json` that transformers needs to build the same model, but for what every family says alike."""
    prefix: str = ""
    """What names begin with in a file of the whole model and not in one of its trunk alone."""
    ignored: str = r"$^"
    """Regex of stored tensors that carry no weight (buffers that are recomputed)."""
    shifted_norms: bool = False
    """RMSNorm scales are stored with the family's offset added (llama.cpp's Gemma)."""

    def config(self, raw: dict[str, Any]) -> LMConfig:
        """The facts, after making sure that none is left over."""
        facts = Facts(raw)
        config = self.facts(facts)
        facts.done()
        return config

    def place(self, name: str) -> Place | None:
        """Where a stored tensor goes; None when no row explains it."""
        for stored, path, layout in self.rows:
            pattern = re.escape(stored).replace(r"\{\}", r"(\d+)")
            if hit := re.fullmatch(pattern, name) or re.fullmatch(pattern, self.prefix + name):
                return Place(name, tuple(p.format(*hit.groups()) for p in split_path(path)), layout)
        return None

    def is_ignored(self, name: str) -> bool:
        return bool(re.fullmatch(self.ignored, name) or re.fullmatch(self.ignored, self.prefix + name))

    def places(self, layers: int) -> Iterator[Place]:
        """Every tensor that a model of so many layers could have, under the name that it is written with."""
        for stored, path, layout in self.rows:
            for layer in range(layers) if "{}" in stored else (0,):
                yield Place(stored.format(layer), tuple(p.format(layer) for p in split_path(path)), layout)


def split_path(path: str) -> tuple[str, ...]:
    """`blocks.{}.attn.q|k|v` as its three paths; `blocks.{}.attn.(q|k|v)_bias` likewise."""
    found = re.search(r"\(?(\w+(?:\|\w+)+)\)?", path)
    if not found:
        return (path,)
    return tuple(path[: found.start()] + part + path[found.end() :] for part in found[1].split("|"))
