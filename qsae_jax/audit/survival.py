"""Survival of a frozen dictionary's features: what each is worth in a twin, beside the full-precision run.

For feature i, r_i is Pearson's correlation of its value in the two runs over all counted tokens, zeros included
(arXiv 2606.03002, section 3). It *survived* with r > 0.9, is *blurred* with 0.5 <= r <= 0.9, *damaged* with r < 0.5;
shares are over features that are *active*: firing rate above 0.001 on the full-precision run. A feature that is
active but never varies in the twin (silenced) has no r; it counts as damaged, and its r is reported as 0.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qsae_jax.sae.measure import fvu, over_rows, reconstruction_sums
from qsae_jax.sae.model import SAE
from qsae_jax.stats import Totals, pearson

ACTIVE, SURVIVED, DAMAGED = 1e-3, 0.9, 0.5


@jax.jit
def encode(sae: SAE, x: Float[Array, "n d"]) -> Float[Array, "n m"]:
    return sae.encode(x)


@jax.jit
def batch_shift(x: Float[Array, "n k"], weight: Float[Array, "n"]) -> Float[Array, "k"]:
    """The mean of a first batch, about which later sums are taken."""
    return over_rows(x * weight[:, None]) / jnp.sum(weight)


@jax.jit
def feature_sums(z: Float[Array, "n m"], weight: Float[Array, "n"], shift: Float[Array, "m"]) -> dict[str, Array]:
    """Sums of one run alone, per feature `[m]`."""
    away = (z - shift[None]) * weight[:, None]
    return {"s": over_rows(away), "ss": over_rows(away**2), "fired": over_rows(weight[:, None] * (z > 0))}


@jax.jit
def cross_sums(z: Array, q: Array, weight: Array, shift: Array) -> Array:
    """Per feature, the sum of products of the two runs about the shift."""
    return over_rows((z - shift[None]) * (q - shift[None]) * weight[:, None])


@jax.jit
def change_sums(x: Float[Array, "n d"], y: Float[Array, "n d"], weight: Float[Array, "n"]) -> dict[str, Array]:
    """`activation_rel_mse` is `changed / power`: sum |y - x|^2 over sum |x|^2."""
    return {
        "changed": over_rows(weight * jnp.sum((y - x) ** 2, axis=-1)),
        "power": over_rows(weight * jnp.sum(x**2, axis=-1)),
    }


_reconstruction = jax.jit(reconstruction_sums)
_peak = jax.jit(lambda z, weight, top: jnp.maximum(top, jnp.max(z * weight[:, None], axis=0)))


@dataclass
class Run:
    """The sums of one model's run."""

    totals: Totals = field(default_factory=Totals)
    peak: Array | float = 0.0


@dataclass
class Survival:
    """Sums over the batches of an audit: the first run is the reference, the others its twins."""

    sae: SAE
    names: list[str]
    runs: dict[str, Run] = field(init=False)
    shift_z: Array | None = None
    shift_x: Array | None = None

    def __post_init__(self) -> None:
        self.runs = {name: Run(peak=jnp.zeros(self.sae.latents)) for name in self.names}

    def add(self, acts: dict[str, Float[Array, "n d"]], weight: Float[Array, "n"]) -> None:
        """A batch: the same tokens' activations in every run."""
        first = self.names[0]
        x = acts[first]
        z = encode(self.sae, x)
        if self.shift_x is None or self.shift_z is None:
            self.shift_x, self.shift_z = batch_shift(x, weight), batch_shift(z, weight)
        waiting = []
        for name in self.names:
            y = acts[name]
            q = z if name == first else encode(self.sae, y)
            sums = feature_sums(q, weight, self.shift_z) | _reconstruction(self.sae, y, q, weight, self.shift_x)
            if name != first:
                sums |= {"cross": cross_sums(z, q, weight, self.shift_z)} | change_sums(x, y, weight)
            self.runs[name].peak = _peak(q, weight, self.runs[name].peak)
            waiting.append((name, sums))
        for name, sums in waiting:
            self.runs[name].totals.add(**sums)

    def correlations(self, name: str) -> np.ndarray:
        """r of every feature `[m]`, NaN where it is undefined."""
        t, base = self.runs[name].totals, self.runs[self.names[0]].totals
        r = pearson(float(base["n"]), base["s"], t["s"], base["ss"], t["ss"], t["cross"])
        return np.where((base["fired"] > 0) & (t["fired"] > 0), r, np.nan)

    def statistics(self, name: str) -> dict[str, np.ndarray]:
        """Firing rate, mean (over all counted tokens) and largest activation of every feature `[m]`."""
        t = self.runs[name].totals
        mean = t["s"] / t["n"] + np.asarray(self.shift_z, np.float64)
        rate = t["fired"] / t["n"]
        peak = np.asarray(self.runs[name].peak, np.float64)
        return {"firing_rate": rate, "mean_activation": np.where(rate > 0, mean, 0.0), "max_activation": peak}

    def fidelity(self, name: str) -> dict[str, float]:
        t = self.runs[name].totals
        return {"fvu": fvu(t["error"], t["x"], t["xx"], t["n"]), "l0": float(t["active"] / t["n"])}

    def active(self) -> np.ndarray:
        return self.statistics(self.names[0])["firing_rate"] > ACTIVE

    def row(self, name: str) -> dict[str, float]:
        """The numbers of one twin."""
        t = self.runs[name].totals
        r = np.nan_to_num(self.correlations(name)[self.active()], nan=0.0)
        return {"activation_rel_mse": float(t["changed"] / t["power"])} | bands(r) | self.fidelity(name)


def bands(r: np.ndarray) -> dict[str, float]:
    """Shares of the bands, mean and median over active features; NaN when there is none."""
    if not len(r):
        return dict.fromkeys(("survived", "blurred", "damaged", "mean_r", "median_r"), float("nan"))
    survived, damaged = float((r > SURVIVED).mean()), float((r < DAMAGED).mean())
    blurred = float(((r >= DAMAGED) & (r <= SURVIVED)).mean())
    facts = {"survived": survived, "blurred": blurred, "damaged": damaged}
    return facts | {"mean_r": float(r.mean()), "median_r": float(np.median(r))}
