"""Survival of a frozen dictionary's features: what each is worth in a twin, beside the full-precision run.

For feature i, r_i is Pearson's correlation of its value in the two runs over all counted tokens, zeros included
(arXiv 2606.03002, section 3). It *survived* with r > 0.9, is *blurred* with 0.5 <= r <= 0.9, *damaged* with r < 0.5;
shares are over features that are *active*: firing rate above 0.001 on the full-precision run. A feature that is
active but never varies in the twin (silenced) has no r; it counts as damaged, and its r is reported as 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from qsae_jax.mesh import in_chunks
from qsae_jax.sae.measure import fvu, reconstruction_sums
from qsae_jax.sae.model import SAE
from qsae_jax.stats import Totals, pearson

ACTIVE, SURVIVED, DAMAGED = 1e-3, 0.9, 0.5


CHUNK = 128
"""Rows whose codes `[rows, m]` are alive at a time: they stay in a CPU's cache and bound the memory of a device."""


@jax.jit
def first_means(sae: SAE, x: Float[Array, "n d"], weight: Float[Array, "n"]) -> tuple[Array, Array]:
    """Mean activations `[d]` and codes `[m]` of the first chunk, about which later sums are taken: near enough."""
    x, weight = x[:CHUNK].astype(jnp.float32), weight[:CHUNK, None]
    return tuple(jnp.sum(y * weight, axis=0) / jnp.sum(weight) for y in (x, sae.encode(x)))  # pyright: ignore


@jax.jit
def batch_sums(
    sae: SAE, acts: Sequence[Float[Array, "n d"]], weight: Float[Array, "n"], shift_x: Array, shift_z: Array
) -> list[dict[str, Float32[Array, "..."]]]:
    """The sums of a batch for each run, the first of which is the reference; `peak` is each feature's largest value.

    float32 in two levels: over the rows of a chunk, then over chunks. A row of weight 0 counts for nothing."""
    size = min(CHUNK, len(weight))
    arrays = [x.astype(jnp.float32) for x in (weight, *acts)]
    chunks = [in_chunks(jnp.pad(x, [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1)), size) for x in arrays]
    sums = jax.lax.map(lambda chunk: _chunk_sums(sae, chunk[1:], chunk[0], shift_x, shift_z), chunks)
    return [{name: x.max(0) if name == "peak" else x.sum(0) for name, x in run.items()} for run in sums]


def _chunk_sums(
    sae: SAE, runs: Sequence[Array], weight: Array, shift_x: Array, shift_z: Array
) -> list[dict[str, Array]]:
    found: list[dict[str, Array]] = []
    w, codes = weight[:, None], [sae.encode(x) for x in runs]
    away = [z - shift_z[None] for z in codes]
    for i, (x, z) in enumerate(zip(runs, codes, strict=True)):
        sums = {"s": w * away[i], "ss": w * away[i] ** 2, "fired": w * (z > 0)}
        if i:
            sums |= {"cross": w * away[0] * away[i], "changed": w * (x - runs[0]) ** 2, "power": w * runs[0] ** 2}
        own = {name: jnp.sum(y, axis=0) for name, y in sums.items()}
        own |= {name: jnp.sum(own[name]) for name in ("changed", "power") if name in own}
        found.append(own | reconstruction_sums(sae, x, z, weight, shift_x) | {"peak": jnp.max(w * z, axis=0)})
    return found


@dataclass
class Survival:
    """Sums over the batches of an audit: the first run is the reference, the others its twins."""

    sae: SAE
    names: list[str]
    totals: dict[str, Totals] = field(init=False)
    peaks: dict[str, np.ndarray | float] = field(init=False)
    shift: tuple[Array, Array] | None = None

    def __post_init__(self) -> None:
        self.totals = {name: Totals() for name in self.names}
        self.peaks = dict.fromkeys(self.names, 0.0)

    def add(self, acts: dict[str, Float[Array, "n d"]], weight: Float[np.ndarray, "n"]) -> None:
        """A batch: the same tokens' activations in every run."""
        runs, w = [acts[name] for name in self.names], jnp.asarray(weight)
        self.shift = self.shift or first_means(self.sae, runs[0], w)
        got = jax.device_get(batch_sums(self.sae, runs, w, *self.shift))
        for name, sums in zip(self.names, got, strict=True):
            self.peaks[name] = np.maximum(self.peaks[name], sums.pop("peak"))
            self.totals[name].add(**sums)

    def correlations(self, name: str) -> np.ndarray:
        """r of every feature `[m]`; NaN for one that never fires in the reference run."""
        t, base = self.totals[name], self.totals[self.names[0]]
        r = pearson(float(base["n"]), base["s"], t["s"], base["ss"], t["ss"], t["cross"])
        return np.where(base["fired"] > 0, np.where(t["fired"] > 0, np.nan_to_num(r), 0.0), np.nan)

    def statistics(self, name: str) -> dict[str, np.ndarray]:
        """Firing rate, mean (over all counted tokens) and largest activation of every feature `[m]`."""
        t = self.totals[name]
        mean = t["s"] / t["n"] + np.asarray((self.shift or (0.0, 0.0))[1], np.float64)
        rate = t["fired"] / t["n"]
        peak = np.asarray(self.peaks[name], np.float64)
        return {"firing_rate": rate, "mean_activation": np.where(rate > 0, mean, 0.0), "max_activation": peak}

    def fidelity(self, name: str) -> dict[str, float]:
        t = self.totals[name]
        return {"fvu": fvu(t["error"], t["x"], t["xx"], t["n"]), "l0": float(t["active"] / t["n"])}

    def active(self) -> np.ndarray:
        return self.statistics(self.names[0])["firing_rate"] > ACTIVE

    def row(self, name: str) -> dict[str, float]:
        """The numbers of one twin."""
        t = self.totals[name]
        r = self.correlations(name)[self.active()]
        return {"activation_rel_mse": float(t["changed"] / t["power"])} | bands(r) | self.fidelity(name)


def bands(r: np.ndarray) -> dict[str, float]:
    """Shares of the bands, mean and median over active features; NaN when there is none."""
    if not len(r):
        return dict.fromkeys(("survived", "blurred", "damaged", "mean_r", "median_r"), float("nan"))
    survived, damaged = float((r > SURVIVED).mean()), float((r < DAMAGED).mean())
    blurred = float(((r >= DAMAGED) & (r <= SURVIVED)).mean())
    facts = {"survived": survived, "blurred": blurred, "damaged": damaged}
    return facts | {"mean_r": float(r.mean()), "median_r": float(np.median(r))}
