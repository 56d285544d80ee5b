"""Survival of a frozen dictionary's features: what each is worth in a twin, beside the full-precision run.

For feature i, r_i is Pearson's correlation of its value in the two runs over all counted tokens, zeros included
(arXiv 2606.03002, section 3). It *survived* with r > 0.9, is *blurred* with 0.5 <= r <= 0.9, *damaged* with r < 0.5;
shares are over features that are *active*: firing rate above 0.001 on the full-precision run. A feature that is
active but never varies in the twin (silenced) has no r; it counts as damaged, and its r is reported as 0.

Beside r, which punishes small features that jump to and from zero:

    r_pre       Pearson's r of the pre-activations, before any threshold or choice of the k largest
    r_either    Pearson's r over the tokens on which either run fires
    jaccard     tokens on which both fire / tokens on which either does
    gain shift  the twin's value as gain x (full-precision value) + shift, least squares over all counted tokens

A feature that fires on fewer than FEW tokens is *flagged*: its r says little. `scored` repeats the shares without it.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from qsae_jax.audit.sums import Shifts, batch_sums, first_means
from qsae_jax.hosts import here
from qsae_jax.sae.measure import fvu
from qsae_jax.sae.model import SAE
from qsae_jax.stats import GROUPS, Grouped, Sums, Totals, group_of, pearson

ACTIVE, SURVIVED, DAMAGED = 1e-3, 0.9, 0.5
FEW = 30
GRID = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
"""Thresholds of r at which every row says which share of the active features lies above."""


@dataclass
class Survival:
    """Sums over the batches of an audit: the first run is the reference, the others its twins."""

    sae: SAE
    names: list[str]
    windows: int
    """How many there will be: they are grouped by their place."""
    totals: dict[str, Totals] = field(init=False)
    groups: dict[str, Grouped] = field(init=False)
    peaks: Sums = field(init=False)
    shifts: Shifts | None = None

    def __post_init__(self) -> None:
        self.totals = {name: Totals() for name in self.names}
        self.groups = {name: Grouped(min(GROUPS, self.windows)) for name in self.names}
        self.peaks = {name: np.zeros(()) for name in self.names}

    def add(self, acts: dict[str, Float[Array, "b p d"]], weight: Float[np.ndarray, "b"], first: int = 0) -> None:
        """A batch: the same windows' activations at counted positions in every run; `first` is the batch's first
        window. Windows of weight 0 fill the batch up."""
        runs, w = [acts[name] for name in self.names], jnp.asarray(weight)
        self.shifts = self.shifts or first_means(self.sae, runs[0], w)
        at = group_of(first + np.arange(len(weight)), self.windows)
        span = min(len(weight), (len(weight) - 1) * min(GROUPS, self.windows) // self.windows + 2)
        local = jnp.asarray(at - at[0], jnp.int32)
        whole, grouped = here(batch_sums(self.sae, runs, w, local, self.shifts, span))
        for name, sums, parts in zip(self.names, whole, grouped, strict=True):
            self.peaks[name] = np.maximum(self.peaks[name], sums.pop("peak"))
            self.totals[name].add(**sums, **{key: part.sum(0, dtype=np.float64) for key, part in parts.items()})
            place = at[0] + np.arange(span)
            inside = place < min(GROUPS, self.windows)
            self.groups[name].add(place[inside], **{key: part[inside] for key, part in parts.items()})
        self.groups[self.names[0]].add(at, n=weight.astype(np.float64) * runs[0].shape[1])

    @property
    def base(self) -> Totals:
        return self.totals[self.names[0]]

    def correlations(self, name: str) -> Float[np.ndarray, "m"]:
        """r of every feature; NaN for one that never fires in the reference run."""
        t, base = self.totals[name], self.base
        r = pearson(float(base["n"]), base["s"], t["s"], base["ss"], t["ss"], t["cross"])
        return np.where(base["fired"] > 0, np.where(t["fired"] > 0, np.nan_to_num(r), 0.0), np.nan)

    def follows(self, name: str) -> dict[str, Float[np.ndarray, "m"]]:
        """How every feature's value follows that of the reference run: what the module says beside r, and r."""
        t, base, n = self.totals[name], self.base, float(self.base["n"])
        pre = pearson(n, base["p"], t["p"], base["pp"], t["pp"], t["pcross"])
        either = base["fired"] + t["fired"] - t["both"]
        with np.errstate(invalid="ignore", divide="ignore"):
            gain = (t["cross"] - base["s"] * t["s"] / n) / (base["ss"] - base["s"] ** 2 / n)
            means = [s["s"] / n + self._shift for s in (base, t)]
            found = {"r": self.correlations(name), "r_pre": pre, "r_either": self._either(name, either)}
            found |= {"jaccard": t["both"] / either, "gain": gain, "shift": means[1] - gain * means[0]}
        return {key: np.where(base["fired"] > 0, value, np.nan) for key, value in found.items()}

    def _either(self, name: str, either: np.ndarray) -> np.ndarray:
        """r over the tokens on which either run fires: elsewhere both are zero and add nothing to sums about zero."""
        t, base, n, c = self.totals[name], self.base, float(self.base["n"]), self._shift
        x, y = (s["s"] + n * c for s in (base, t))
        xx, yy = (s["ss"] + 2 * c * s["s"] + n * c * c for s in (base, t))
        xy = t["cross"] + c * (base["s"] + t["s"]) + n * c * c
        return pearson(np.maximum(either, 1), x, y, xx, yy, xy)

    @property
    def _shift(self) -> np.ndarray:
        assert self.shifts
        return np.asarray(self.shifts.z, np.float64)

    def statistics(self, name: str) -> dict[str, Float[np.ndarray, "m"]]:
        """Firing rate, mean (over all counted tokens) and largest activation of every feature."""
        t = self.totals[name]
        rate = t["fired"] / self.base["n"]
        mean = t["s"] / self.base["n"] + self._shift
        peak = np.asarray(self.peaks[name], np.float64)
        return {"firing_rate": rate, "mean_activation": np.where(rate > 0, mean, 0.0), "max_activation": peak}

    def fidelity(self, name: str) -> dict[str, float]:
        t = self.totals[name]
        return {"fvu": fvu(t["error"], t["x"], t["xx"], t["n"]), "l0": float(t["active"] / t["n"])}

    @cached_property
    def active(self) -> Bool[np.ndarray, "m"]:
        """Asked for when all batches are in."""
        return self.statistics(self.names[0])["firing_rate"] > ACTIVE

    @cached_property
    def scored(self) -> Bool[np.ndarray, "m"]:
        """Active, and firing on enough tokens for r to mean something."""
        return self.active & (self.base["fired"] >= FEW)

    def row(self, name: str) -> dict[str, Any]:
        """The numbers of one twin."""
        t, found = self.totals[name], self.follows(name)
        r = found["r"][self.active]
        row: dict[str, Any] = {"activation_rel_mse": float(t["changed"] / t["power"])} | bands(r) | self.fidelity(name)
        others = ("r_pre", "r_either", "jaccard", "gain")
        row |= {f"median_{key}": _median(found[key][self.active]) for key in others}
        row |= {"above": {f"{at:g}": float((r > at).mean()) if len(r) else None for at in GRID}}
        scored = bands(found["r"][self.scored])
        row["scored"] = {"n": int(self.scored.sum())} | {key: scored[key] for key in ("survived", "blurred", "damaged")}
        return row


def _median(values: np.ndarray) -> float:
    return float(np.nanmedian(values)) if np.isfinite(values).any() else float("nan")


def bands(r: np.ndarray, survived_above: float = SURVIVED, damaged_below: float = DAMAGED) -> dict[str, float]:
    """Shares of the bands, mean and median over active features; NaN when there is none."""
    if not len(r):
        return dict.fromkeys(("survived", "blurred", "damaged", "mean_r", "median_r"), float("nan"))
    survived, damaged = float((r > survived_above).mean()), float((r < damaged_below).mean())
    blurred = float(((r >= damaged_below) & (r <= survived_above)).mean())
    facts = {"survived": survived, "blurred": blurred, "damaged": damaged}
    return facts | {"mean_r": float(r.mean()), "median_r": float(np.median(r))}
