"""Perplexity, KL and top-1 agreement with full precision, over every predicted token of every window."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Array, Float, Int

from qsae_jax.hosts import here
from qsae_jax.lm.loss import token_losses
from qsae_jax.lm.model import LM
from qsae_jax.stats import GROUPS, Grouped, Interval, Sums, bootstrap, group_of


@dataclass
class Losses:
    """Sums of several models on the same tokens by groups of windows; the first is the reference."""

    names: list[str]
    windows: int
    """How many there will be: they are grouped by their place."""
    sums: dict[str, Grouped] = field(init=False)

    def __post_init__(self) -> None:
        self.sums = {name: Grouped(min(GROUPS, self.windows)) for name in self.names}

    def add(
        self,
        lms: list[LM],
        finals: list[Float[Array, "b s d"]],
        tokens: Int[Array, "b s"],
        weight: Float[np.ndarray, "b"],
        first: int = 0,
        scored: Float[np.ndarray, "b p"] | None = None,
    ) -> None:
        """A batch of windows, the first of which is `first`, each counted with its weight; of their s - 1 predicted
        tokens those that `scored` (1 or 0) names, without it all."""
        found = here(token_losses(lms, finals, tokens))
        at = group_of(first + np.arange(len(weight)), self.windows)
        w = weight.astype(np.float64)[:, None] * np.ones((1, tokens.shape[1] - 1))
        w = w if scored is None else w * scored
        for i, name in enumerate(self.names):
            sums = {key: (values[i].astype(np.float64) * w).sum(1) for key, values in found._asdict().items()}
            self.sums[name].add(at, n=w.sum(1), **sums)

    def perplexity(self, name: str) -> float:
        """exp of the mean loss."""
        s = self.sums[name].sums
        return float(np.exp(s["nll"].sum() / s["n"].sum()))

    def row(self, name: str) -> dict[str, float]:
        return {key: statistic(self._whole(name)) for key, statistic in MEASURES.items()}

    def intervals(self, name: str) -> dict[str, Interval]:
        """Of what the row says; the change of perplexity is paired over tokens."""
        return bootstrap(MEASURES, self._both(name))

    def _both(self, name: str) -> Sums:
        return self.sums[name].sums | {"base": self.sums[self.names[0]].sums["nll"]}

    def _whole(self, name: str) -> Sums:
        return {key: value.sum(0) for key, value in self._both(name).items()}


MEASURES: dict[str, Callable[[Sums], float]] = {
    "ppl": lambda s: float(np.exp(s["nll"] / s["n"])),
    "delta_ppl": lambda s: float(np.exp((s["nll"] - s["base"]) / s["n"]) - 1),
    "kl": lambda s: float(s["kl"] / s["n"]),
    "top1": lambda s: float(s["agree"] / s["n"]),
}
"""Perplexity, its relative change, mean KL(full precision, twin) per token (nats), and the share of tokens whose most
likely prediction is full precision's."""
