"""Perplexity and KL to full precision, over every predicted token of every window."""

from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from qsae_jax.lm.loss import token_losses
from qsae_jax.lm.model import LM
from qsae_jax.stats import Totals


@dataclass
class Losses:
    """Sums of loss and KL of several models on the same tokens; the first is the reference."""

    names: list[str]
    totals: dict[str, Totals] = field(init=False)

    def __post_init__(self) -> None:
        self.totals = {name: Totals() for name in self.names}

    def add(
        self, lms: list[LM], finals: list[Float[Array, "b s d"]], tokens: Int[Array, "b s"], weight: np.ndarray
    ) -> None:
        """A batch of windows, each counted with its weight."""
        nll, kl = jax.device_get(token_losses(lms, finals, tokens))
        w = weight.astype(np.float64)[:, None]
        for name, loss, apart in zip(self.names, nll, kl, strict=True):
            sums = {"nll": np.sum(loss.astype(np.float64) * w), "kl": np.sum(apart.astype(np.float64) * w)}
            self.totals[name].add(**sums, n=weight.sum() * loss.shape[1])

    def perplexity(self, name: str) -> float:
        """exp of the mean loss."""
        t = self.totals[name]
        return float(np.exp(t["nll"] / t["n"]))

    def row(self, name: str) -> dict[str, float]:
        ppl, t = self.perplexity(name), self.totals[name]
        return {"ppl": ppl, "delta_ppl": ppl / self.perplexity(self.names[0]) - 1, "kl": float(t["kl"] / t["n"])}
