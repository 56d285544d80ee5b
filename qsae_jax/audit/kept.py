"""An audit on its way, on disk: the sums of each pass, so that an audit that was stopped or killed goes on to the same
bits.

    audit/begun.json    what the audit is of, its groups of twins, and perplexities found for matched controls
    audit/passN.npz     the sums of pass N over the windows before `first`, in float64 as they are in memory
"""

import json
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qsae_jax.audit.perplexity import Losses
from qsae_jax.audit.sums import Shifts
from qsae_jax.audit.survival import Survival
from qsae_jax.errors import UserError
from qsae_jax.files import SPOILT, drop, read_json, staged_file, write_json
from qsae_jax.hosts import Agreement, here
from qsae_jax.lm.tap import Point
from qsae_jax.stats import Sums, Totals

KEEP_EVERY_S = 60.0


@dataclass
class Pass:
    """One pass over the tokens: full precision and some twins."""

    survivals: dict[Point, Survival]
    losses: Losses
    weight_errors: dict[str, float]
    errors: dict[str, dict[Point, Totals]]
    """Scheme -> point without a dictionary -> sums of the activations' error."""
    first: int = 0
    """Windows that are in the sums."""

    def sums(self) -> dict[str, Sums]:
        """All sums by what they are of: the very dicts, not copies."""
        found: dict[str, Sums] = {f"losses of {name}": one.sums for name, one in self.losses.sums.items()}
        for point, survival in self.survivals.items():
            found[f"peaks at {point}"] = survival.peaks
            for name in survival.names:
                found[f"totals of {name} at {point}"] = survival.totals[name].sums
                found[f"groups of {name} at {point}"] = survival.groups[name].sums
        for name, at in self.errors.items():
            found |= {f"errors of {name} at {point}": totals.sums for point, totals in at.items()}
        return found


@dataclass
class Kept:
    """The folder of an audit on its way; None keeps nothing."""

    folder: Path | None
    about: dict[str, Any] = field(default_factory=dict)
    """What the audit is of. What lies there of another one is forgotten."""

    def __post_init__(self) -> None:
        self.begun: dict[str, Any] = {"about": json.loads(json.dumps(self.about)), "matches": {}, "groups": None}
        self._saved, self._took, self._agreed = time.monotonic(), 0.0, Agreement(every=1)
        if self.folder and (self.folder / "begun.json").is_file():
            found = read_json(self.folder / "begun.json")
            if found.get("about") == self.begun["about"]:
                self.begun = found
            else:
                self.forget()

    def note(self, **facts: Any) -> None:
        """Facts that are found before the passes."""
        self.begun |= facts
        if self.folder:
            write_json(self.folder / "begun.json", self.begun)

    @property
    def due(self) -> bool:
        """A twentieth of the time is spent on keeping at most."""
        late = time.monotonic() - self._saved > max(KEEP_EVERY_S, 20 * self._took)
        return bool(self.folder) and self._agreed.any(late)

    def save(self, number: int, done: Pass) -> None:
        if not self.folder:
            return
        began, names, arrays = time.monotonic(), [], []
        for what, sums in done.sums().items():
            names += [(what, key) for key in sums]
            arrays += list(sums.values())
        for point, survival in done.survivals.items():
            if survival.shifts:
                names += [(f"shifts at {point}", key) for key in Shifts._fields]
                arrays += here(list(survival.shifts))
        about = json.dumps({"first": done.first, "names": names, "weight_errors": done.weight_errors})
        with staged_file(self.folder / f"pass{number}.npz") as draft, draft.open("wb") as file:
            np.savez(file, np.array(about), *arrays)
        self._saved, self._took = time.monotonic(), time.monotonic() - began

    def load(self, number: int, into: Pass) -> None:
        """What is kept of a pass, if anything is."""
        path = self.folder / f"pass{number}.npz" if self.folder else None
        if path is None or not path.is_file():
            return
        sums, shifts = into.sums(), {f"shifts at {point}": {} for point in into.survivals}
        try:
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                about = json.loads(str(file["arr_0"]))
                for i, (what, key) in enumerate(about["names"], start=1):
                    (shifts if what in shifts else sums)[what][key] = file[f"arr_{i}"]
            for point, survival in into.survivals.items():
                if found := shifts[f"shifts at {point}"]:
                    survival.shifts = Shifts(**{key: jnp.asarray(value) for key, value in found.items()})
            into.first, into.weight_errors = int(about["first"]), dict(about["weight_errors"])
        except SPOILT as error:
            raise UserError(f"`{path}` is spoilt ({error}): delete `{path.parent}` to begin the audit anew") from error

    def forget(self) -> None:
        """Drop what is kept: the audit is done, or another."""
        if self.folder:
            drop(self.folder)


def fingerprint(tree: Any) -> str:
    """Tells one model or dictionary from another: the norms of its arrays, added up."""
    leaves = jax.tree.leaves(tree)
    return f"{len(leaves)} arrays, norms {float(_norms(leaves)):.5g}"


@jax.jit
def _norms(leaves: list[Array]) -> Array:
    return sum((jnp.linalg.norm(leaf.astype(jnp.float32)) for leaf in leaves), jnp.zeros(()))


def windows_mark(ids: np.ndarray) -> str:
    """Tells one set of windows from another."""
    return f"{ids.shape} {zlib.crc32(np.ascontiguousarray(ids).data)}"
