"""Every figure of match.py and fates.py for two dictionaries, each reading its own model, and the same for the seed
floor beside it."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from qsae_jax.acts.tokens import Windows, in_order, windows_per_forward
from qsae_jax.compare.fates import fates
from qsae_jax.compare.match import Together, correlated, match
from qsae_jax.errors import Interrupted
from qsae_jax.lm.model import LM
from qsae_jax.lm.tap import Point, activations
from qsae_jax.mesh import on_data
from qsae_jax.sae.model import SAE

TOKENS = 4096
"""Tokens, at most, over which codes are correlated: every pair of latents costs a product a token."""
SHOWN = 50
"""Latents of each fate that a result names, those that fire most first."""


def together(
    lms: tuple[LM, LM],
    saes: tuple[SAE, SAE],
    windows: Windows,
    point: Point,
    mesh: Mesh,
    skip_first: int,
    batch: int,
    stopped: Callable[[], bool],
) -> np.ndarray:
    """r of every latent of the first dictionary on the first model with every one of the second on the second."""
    some, sums = windows.part(0, max(TOKENS // windows.seq, 1)), Together()
    for ids, weight in in_order(some, windows_per_forward(batch, some, mesh)):
        tokens = on_data(ids, mesh)
        rows = []
        for lm in lms:
            (x,) = activations(lm, (point,), tokens)
            rows.append(x[:, skip_first:].reshape(len(ids), windows.seq - skip_first, -1))
        sums.add(saes[0], rows[0], saes[1], rows[1], weight)
        if stopped():
            raise Interrupted("comparison stopped; nothing is written, the same command begins it again")
    return sums.r()


def figures(one: SAE, other: SAE, fired: tuple[np.ndarray, np.ndarray], r: np.ndarray) -> dict[str, float]:
    """All figures by name, from how often latents fired and how their codes correlate."""
    alive = fired[0] > 0, fired[1] > 0
    shares = fates(one, other, *alive).shares()
    told = {name: shares[name] for name in ("lost", "split", "new", "merged")}
    return match(one, other, *alive) | correlated(r, alive[0]) | told


def beside_floor(value: Mapping[str, float], floor: Mapping[str, float] | None) -> dict[str, dict[str, float | None]]:
    return {name: {"value": got, "floor": floor[name] if floor else None} for name, got in value.items()}


def named(one: SAE, other: SAE, fired: tuple[np.ndarray, np.ndarray]) -> dict[str, list[dict[str, Any]]]:
    """The latents of each fate that fire most, with what became of them."""
    found = fates(one, other, fired[0] > 0, fired[1] > 0)
    return {
        "lost": _most(found.lost, fired[0]),
        "new": _most(found.new, fired[1]),
        "split": _with("parts", found.split, found.parts, fired[0]),
        "merged": _with("sources", found.merged, found.sources, fired[1]),
    }


def _most(latents: np.ndarray, fired: np.ndarray) -> list[dict[str, Any]]:
    order = latents[np.argsort(-fired[latents], kind="stable")][:SHOWN]
    return [{"feature": int(i), "tokens": int(fired[i])} for i in order]


def _with(what: str, latents: np.ndarray, partners: tuple[np.ndarray, ...], fired: np.ndarray) -> list[dict[str, Any]]:
    of = dict(zip(latents.tolist(), partners, strict=True))
    return [one | {what: of[one["feature"]].tolist()} for one in _most(latents, fired)]
