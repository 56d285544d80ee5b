"""Do two distortions damage the same features? Sets of lost features side by side, and damage beside damage.

Over the features that are active at full precision, each distortion has its set of lost ones (arXiv 2606.03002: the
non-survivors are r <= 0.9, the damaged r < 0.5). With a and b lost features, both of them in common and n in all:

    jaccard       both / (a + b - both)
    chance        the same of two sets that know nothing of each other, which share e = a b / n: e / (a + b - e)
    ceiling       the largest that two sets of these sizes can have, one inside the other: min(a, b) / max(a, b)
    above chance  (jaccard - chance) / (ceiling - chance): 0 is chance, 1 is nested sets

A Jaccard index alone says little: two sets that each hold most features overlap whatever they are, and two sets of
unlike sizes cannot reach 1. A figure that is 0 / 0 is NaN: all of two empty sets, and the last where one set holds
every feature, so that chance is the ceiling.

    pearson, spearman   correlation over features of the damage 1 - r under one with that under the other

Intervals are percentiles over resamples of groups of tokens, the same groups for both distortions, so that they are
paired. They say what other tokens of the kind would give, the features being the same. In a resample r is noisier than
over all tokens, so that overlap and correlation come out smaller there: resamples are moved to lie about the value.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from qsae_jax.errors import UserError
from qsae_jax.stats import about, percentile

DAMAGED = 0.5
"""A threshold up to here names the damaged: r below it. Above it, those that do not survive: r not above it."""
BLOCK = 100
"""Resamples whose damage is centred or ranked at a time."""

Ends = dict[str, float | None]
Pair = tuple[np.ndarray, np.ndarray]
"""Of one distortion and of the other."""


def lost(r: Float[np.ndarray, "*draws n"], threshold: float) -> Bool[np.ndarray, "*draws n"]:
    """Which features are lost: r <= threshold, but r < threshold up to 0.5, as in the paper."""
    return r < threshold if threshold <= DAMAGED else r <= threshold


def of_counts(n: int, one: int, other: int, both: int) -> dict[str, float]:
    """Jaccard index of two sets of n features, the one of chance and the largest, from their sizes."""
    found = _figures(n, one, other, both)
    return {key: float(found[key]) for key in ("jaccard", "chance", "ceiling")}


def overlap(
    r_one: Float[np.ndarray, "n"],
    r_other: Float[np.ndarray, "n"],
    drawn_one: Float[np.ndarray, "draws n"] | None = None,
    drawn_other: Float[np.ndarray, "draws n"] | None = None,
    groups: int = 0,
    thresholds: Sequence[float] = (0.9, 0.8, 0.5),
) -> dict[str, Any]:
    """What two distortions have in common, from r of the same active features under each.

    `drawn_one` and `drawn_other` are the r in the same resamples of `groups` groups of tokens; without them the ends
    of the intervals are None. `lost` holds a row for each threshold: sizes (`one`, `other`, `both`, `union`) and the
    figures of this module's docstring."""
    if len(r_one) != len(r_other):
        raise UserError(
            f"the overlap is of {len(r_one)} features with {len(r_other)}: take two schemes of one audit, "
            "which have the same active features"
        )
    assert (drawn_one is None) == (drawn_other is None), "resamples of one distortion alone give no interval"
    r = np.asarray(r_one, np.float64), np.asarray(r_other, np.float64)
    drawn = None if drawn_one is None or drawn_other is None else (np.asarray(drawn_one), np.asarray(drawn_other))
    return {
        "n": len(r_one),
        "lost": [_at(threshold, r, drawn, groups) for threshold in thresholds],
        "pearson": _agreement(r, drawn, groups, ranked=False),
        "spearman": _agreement(r, drawn, groups, ranked=True),
    }


LEAST = {"jaccard": 0.0, "above_chance": -np.inf}


def _ends(value: float, drawn: np.ndarray | None, groups: int, least: float = -1) -> Ends:
    if drawn is None:
        return {"value": float(value), "low": None, "high": None}
    return {**percentile(value, about(value, drawn, least, 1), groups).as_dict()}


def _ratio(over: ArrayLike, under: ArrayLike) -> np.ndarray:
    over, under = np.broadcast_arrays(np.asarray(over, np.float64), np.asarray(under, np.float64))
    return np.divide(over, under, out=np.full(over.shape, np.nan), where=under != 0)


def _figures(n: int, one: ArrayLike, other: ArrayLike, both: ArrayLike) -> dict[str, np.ndarray]:
    """All figures of sets, of single counts or of those of every resample."""
    one, other, both = (np.asarray(count, np.float64) for count in (one, other, both))
    jaccard = _ratio(both, one + other - both)
    shared = _ratio(one * other, n)
    chance = _ratio(shared, one + other - shared)
    ceiling = _ratio(np.minimum(one, other), np.maximum(one, other))
    above = _ratio(jaccard - chance, ceiling - chance)
    return {"jaccard": jaccard, "chance": chance, "ceiling": ceiling, "above_chance": above}


def _counts(one: np.ndarray, other: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes of both sets and of what they share: r `[..., n]` -> three `[...]`."""
    a, b = lost(one, threshold), lost(other, threshold)
    return a.sum(-1), b.sum(-1), (a & b).sum(-1)


def _at(threshold: float, r: Pair, drawn: Pair | None, groups: int) -> dict[str, Any]:
    """The row of one threshold."""
    n, (one, other, both) = len(r[0]), (int(count) for count in _counts(*r, threshold))
    whole = {key: float(value) for key, value in _figures(n, one, other, both).items()}
    draws = _figures(n, *_counts(*drawn, threshold)) if drawn else {}
    ends = {key: _ends(whole[key], draws.get(key), groups, least) for key, least in LEAST.items()}
    return (
        {"threshold": threshold, "one": one, "other": other, "both": both, "union": one + other - both} | whole | ends
    )


def _correlation(one: np.ndarray, other: np.ndarray, ranked: bool) -> np.ndarray:
    """Pearson's r, or with `ranked` Spearman's, of each row of two `[rows, n]`; NaN where one does not vary."""
    if ranked:
        one, other = (rankdata(values, axis=-1) for values in (one, other))
    if not one.shape[-1]:
        return np.full(len(one), np.nan)
    # What differs by rounding alone does not vary.
    flat = np.minimum(np.ptp(one, axis=-1), np.ptp(other, axis=-1)) < 1e-12
    x, y = (values - values.mean(-1, keepdims=True) for values in (one, other))
    r = _ratio((x * y).sum(-1), np.sqrt((x * x).sum(-1) * (y * y).sum(-1)))
    return np.where(flat, np.nan, np.clip(r, -1, 1))


def _agreement(r: Pair, drawn: Pair | None, groups: int, ranked: bool) -> Ends:
    """The correlation of damage under two distortions, over features."""
    value = float(_correlation(1 - r[0][None], 1 - r[1][None], ranked)[0])
    if drawn is None:
        return _ends(value, None, groups)
    one, other = drawn
    starts = range(0, len(one), BLOCK)
    parts = [_correlation(1 - one[s : s + BLOCK], 1 - other[s : s + BLOCK], ranked) for s in starts]
    return _ends(value, np.concatenate([*parts, np.zeros(0)]), groups)
