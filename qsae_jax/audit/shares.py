"""Intervals of an audit: shares of features and correlations, by drawing groups of windows with replacement.

A resample draws groups of consecutive windows (stats.py), the same for every scheme: a difference between two schemes
is taken inside each resample, so it is paired over tokens. The set of active features is that of all tokens; their r
is that of the resample, and shares are moved to lie about their value (stats.about). The reliability of r is that of
split halves: r over the even groups beside r over the odd ones, correlated over active features and stepped up to the
whole length (Spearman 1910, Brown 1910: 2 rho / (1 + rho)).

Several draws of one random control differ by more than tokens can tell. Their interval is that of one more draw,
mean +- t sd sqrt(1 + 1/k): a quantizer is told from such noise when it lies outside.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import t as student

from qsae_jax.audit.survival import DAMAGED, SURVIVED, Survival, bands
from qsae_jax.stats import Interval, about, pearson, percentile, resamples, tails

BANDS = ("survived", "blurred", "damaged", "mean_r")
LEAST = {"survived": 0.0, "blurred": 0.0, "damaged": 0.0, "mean_r": -1.0}
DRAWS, KEPT, BLOCK = 1000, 200, 256
"""Resamples; those of which every feature's r is kept; and features whose r is alive in all of them at a time."""


def drawn_r(
    survival: Survival, name: str, features: Int[np.ndarray, "f"], counts: Float[np.ndarray, "draws g"]
) -> Float[np.ndarray, "draws f"]:
    """r of some features in every resample: 0 where the twin does not vary, NaN where the reference does not."""
    base, twin = (survival.groups[run].sums for run in (survival.names[0], name))
    n = (counts @ base["n"])[:, None]
    x, xx, y, yy, xy = (
        counts @ sums[key][:, features]
        for sums, key in ((base, "s"), (base, "ss"), (twin, "s"), (twin, "ss"), (twin, "cross"))
    )
    varies = xx - x * x / n > 1e-6 * xx
    return np.where(varies, np.nan_to_num(pearson(n, x, y, xx, yy, xy)), np.nan)


@dataclass
class Drawn:
    """What every resample says of one twin."""

    value: dict[str, float]
    draws: dict[str, Float[np.ndarray, "draws"]]
    groups: int
    low: Float[np.ndarray, "m"] = field(repr=False)
    high: Float[np.ndarray, "m"] = field(repr=False)
    """The ends of every active feature's interval of r; NaN for the others."""
    r: Float[np.ndarray, "kept active"] = field(repr=False)
    """r of the active features in the first KEPT resamples."""

    def intervals(self) -> dict[str, Interval]:
        return {
            key: percentile(v := self.value[key], about(v, self.draws[key], LEAST[key], 1), self.groups)
            for key in BANDS
        }


def draw(survival: Survival, name: str, draws: int = DRAWS) -> Drawn:
    """All resamples of one twin, features a block at a time."""
    groups = survival.groups[survival.names[0]].groups
    counts = resamples(groups, draws if groups > 1 else 0)
    some, whole = np.flatnonzero(survival.active), survival.correlations(name)
    sums = {key: np.zeros(len(counts)) for key in BANDS}
    low, high = (np.full(survival.sae.latents, np.nan) for _ in range(2))
    kept = np.zeros((min(KEPT, len(counts)), len(some)), np.float32)
    for start in range(0, len(some), BLOCK):
        part = some[start : start + BLOCK]
        # Where a feature does not fire in a resample, its r of all tokens stands: it is not known to be damaged there.
        r = drawn_r(survival, name, part, counts)
        r = np.where(np.isnan(r), np.nan_to_num(whole[part])[None], r)
        kept[:, start : start + len(part)] = r[:KEPT]
        above, below = r > SURVIVED, r < DAMAGED
        for key, value in zip(BANDS, (above, ~above & ~below, below, r), strict=True):
            sums[key] += value.sum(1)
        if groups > 1:
            low[part], high[part] = np.quantile(r, tails(groups), axis=0)
    value = bands(whole[survival.active])
    return Drawn(value, {key: s / max(len(some), 1) for key, s in sums.items()}, groups, low, high, kept)


def reliability(survival: Survival, name: str) -> dict[str, float]:
    """How well r over half of the tokens gives r over the other half, and what that means for all of them."""
    groups = survival.groups[survival.names[0]].groups
    some = np.flatnonzero(survival.scored)
    if groups < 2 or len(some) < 3:
        return {"halves": float("nan"), "whole": float("nan")}
    odd = np.arange(groups) % 2
    r = drawn_r(survival, name, some, np.stack([1.0 - odd, 1.0 * odd]))
    r = r[:, np.isfinite(r).all(0)]
    if r.shape[1] < 3 or np.ptp(r[0]) == 0 or np.ptp(r[1]) == 0:
        return {"halves": float("nan"), "whole": float("nan")}
    rho = float(np.corrcoef(r)[0, 1])
    return {"halves": rho, "whole": 2 * rho / (1 + rho) if rho > 0 else float("nan")}


def differences(drawn: Mapping[str, Drawn], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Of each pair of schemes the first minus the second, paired over tokens."""
    found = []
    for one, other in pairs:
        a, b = drawn[one], drawn[other]
        values = {key: (a.value[key] - b.value[key], a.draws[key] - b.draws[key]) for key in BANDS}
        gaps = {key: percentile(value, about(value, draws), a.groups) for key, (value, draws) in values.items()}
        found.append({"scheme": one, "other": other} | {key: gap.as_dict() for key, gap in gaps.items()})
    return found


def of_draws(values: Sequence[float], least: float = -np.inf, most: float = np.inf, level: float = 0.95) -> Interval:
    """Where one more draw of a random control is to be expected, from k of them, within what the statistic can be;
    NaN ends for a single one."""
    k, mean = len(values), float(np.mean(values))
    if k < 2:
        return Interval(mean, float("nan"), float("nan"))
    width = float(student.ppf((1 + level) / 2, k - 1) * np.std(values, ddof=1) * np.sqrt(1 + 1 / k))
    return Interval(mean, max(mean - width, least), min(mean + width, most))


def families(drawn: Mapping[str, Drawn], family: Mapping[str, str]) -> list[dict[str, Any]]:
    """Draws of one random distortion, its `family` by scheme: mean and interval of one more draw."""
    members: dict[str, list[str]] = {}
    for name in drawn:
        members.setdefault(family[name], []).append(name)
    return [
        {"family": base, "draws": len(names)}
        | {key: of_draws([drawn[name].value[key] for name in names], LEAST[key], 1).as_dict() for key in BANDS}
        for base, names in members.items()
        if len(names) > 1
    ]
