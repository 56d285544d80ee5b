"""Why a feature is lost: each active feature that did not survive (r <= 0.9) gets the first cause that holds.

    rotated    Another latent has taken over its direction: that latent's pre-activation in the twin follows the
               feature's full-precision value (correlation at least READ), better than the feature's own pre-activation
               does, and by at least GAINED more than it did at full precision.
    silenced   Of the tokens that it fires on at full precision it fires in the twin on fewer than SILENT.
    flicker    Its pre-activations still follow, r_pre > 0.9, but it fires on other tokens, Jaccard < 0.9: the direction
               is read as before, and what decides whether it fires (a threshold, or the other latents) jumps.
    noisy      None of these: its value follows with noise.

The correlation of feature i's value with any latent's pre-activation needs no sums over pairs of latents: what an
encoder reads is linear, so cov(z_i, pre_j) = e_j . cov(z_i, n) with the encoder's row e_j and the sums `read`.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from qsae_jax.audit.survival import SURVIVED, Survival
from qsae_jax.hosts import here

CAUSES = ("rotated", "silenced", "flicker", "noisy")
READ, GAINED, SILENT, FOLLOWED = 0.5, 0.2, 0.1, 0.9
BLOCK = 512
"""Features whose correlations with all latents are looked at together."""


class Readers(NamedTuple):
    """For some features: the latent of the twin that has taken each over, or -1, and its correlation."""

    latent: Int[np.ndarray, "n"]
    r: Float[np.ndarray, "n"]


def reading(
    survival: Survival, name: str, features: Int[np.ndarray, "n"], encoder: Float[np.ndarray, "m d"]
) -> Float[np.ndarray, "n m"]:
    """Correlation of some features' full-precision values with every latent's pre-activation in a run; `encoder` are
    the dictionary's rows in float64."""
    t, base, n = survival.totals[name], survival.base, float(survival.base["n"])
    assert survival.shifts
    total = base["s"][features] + n * np.asarray(survival.shifts.z, np.float64)[features]
    moves = t["read"][features] - total[:, None] * t["reads"][None] / n
    spread = np.sqrt(np.maximum(base["ss"] - base["s"] ** 2 / n, 0))[features]
    other = np.sqrt(np.maximum(t["pp"] - t["p"] ** 2 / n, 0))
    cov = moves @ encoder.T
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num(cov / (spread[:, None] * other[None]))


def readers(survival: Survival, name: str, features: Int[np.ndarray, "n"]) -> Readers:
    """Which latent of a twin, if any, has taken over each of the features."""
    latents, correlations = np.full(len(features), -1), np.zeros(len(features))
    encoder = np.asarray(here(survival.sae.encoder[...]), np.float64)
    for start in range(0, len(features), BLOCK):
        some = features[start : start + BLOCK]
        there, home = (reading(survival, run, some, encoder) for run in (name, survival.names[0]))
        own = np.take_along_axis(there, some[:, None], axis=1)
        took = (there >= READ) & (there > own) & (there - home >= GAINED)
        np.put_along_axis(took, some[:, None], False, axis=1)
        best = np.where(took, there, -np.inf).argmax(1)
        found = took[np.arange(len(some)), best]
        latents[start : start + len(some)] = np.where(found, best, -1)
        correlations[start : start + len(some)] = np.where(found, there[np.arange(len(some)), best], 0)
    return Readers(latents, correlations)


def causes(survival: Survival, name: str) -> tuple[np.ndarray, Readers]:
    """The cause `[m]` of every lost feature, empty for the others; and who reads the lost ones, `[m]` too."""
    found, base = survival.follows(name), survival.base["fired"]
    lost = survival.active & ~(found["r"] > SURVIVED)
    some = np.flatnonzero(lost)
    taken = readers(survival, name, some)
    latent, r = np.full(len(lost), -1), np.full(len(lost), np.nan)
    latent[some], r[some] = taken.latent, np.where(taken.latent >= 0, taken.r, np.nan)
    silent = survival.totals[name]["both"] < SILENT * base
    flickers = (found["r_pre"] > FOLLOWED) & (found["jaccard"] < FOLLOWED)
    why = np.select([latent >= 0, silent, flickers], CAUSES[:3], CAUSES[3])
    return np.where(lost, why, ""), Readers(latent, r)


def shares(why: np.ndarray, active: int) -> dict[str, float]:
    """Each cause's share of the active features."""
    return {cause: float((why == cause).sum() / active) if active else float("nan") for cause in CAUSES}
