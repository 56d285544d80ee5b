"""Keep, adapt or retrain: the rule, which is never one number.

Two measures, on the quantized model: FVU, and the loss of the model with the reconstruction spliced in (nats per
token). For each, a dictionary's `gap` is how much worse it is than the dictionary retrained there, with a bootstrap
interval over groups of windows, paired: all see the same windows. With a second seed there is a gap for each, and the
interval reaches over both. The `margin`, within which a difference does not matter, is the larger of

    the seed floor   the farther end of the interval of |reseeded - reference| at full precision: what a new seed
                     changes;
    a tolerance      TOLERANCE of what the reference itself leaves unexplained, or costs the model in loss, at home.

A dictionary is *within* when in both measures the whole interval of its gap lies at or below the margin; *beyond* when
in one of them it lies above; else the tokens do not tell.

    keep      the transferred dictionary is within
    adapt     it is beyond, but an adaptation is within: the cheapest of those that keep the directions of the
              dictionary (mean cosine of decoder rows at least SAME), or labels and steering vectors would be lost
    retrain   it is beyond, and so is every adaptation
    unsure    there is not enough data to say: judge on more tokens

The price of retraining stands beside it: the tokens after which it overtakes the transferred one, and their cost.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qsae_jax.compare.fidelity import added_loss, fvu_of, loss
from qsae_jax.compare.match import SAME
from qsae_jax.stats import Grouped, Interval, Sums, bootstrap

TOLERANCE = 0.05
MEASURED = {"fvu": fvu_of, "loss": loss}
OWN = {"fvu": fvu_of, "loss": added_loss}
"""What the reference itself leaves or costs."""
UNITS = {"fvu": "FVU", "loss": "loss (nats)"}
Judged = Mapping[str, Grouped]


def difference(one: Grouped, other: Grouped) -> dict[str, Interval]:
    """Each measure of one dictionary minus that of another, with groups drawn together."""
    both = {f"a.{k}": v for k, v in one.sums.items()} | {f"b.{k}": v for k, v in other.sums.items()}
    # A measure reads few of the sums: the firing counts of every latent are not drawn for it.
    both = {key: v for key, v in both.items() if not key.endswith("fired")}

    def gap(name: str, s: Sums) -> float:
        a, b = ({k[2:]: v for k, v in s.items() if k.startswith(side)} for side in ("a.", "b."))
        return MEASURED[name](a) - MEASURED[name](b)

    return bootstrap({name: lambda s, name=name: gap(name, s) for name in MEASURED}, both)


def over_seeds(gaps: list[dict[str, Interval]]) -> dict[str, Interval]:
    """Their mean, with an interval that reaches over those of all seeds."""
    return {
        name: Interval(
            float(np.mean([gap[name].value for gap in gaps])),
            float(np.min([gap[name].low for gap in gaps])),
            float(np.max([gap[name].high for gap in gaps])),
        )
        for name in MEASURED
    }


@dataclass(frozen=True)
class Margin:
    """Within which a difference does not matter, for each measure: the seed floor, and the tolerance."""

    floor: dict[str, float]
    tolerance: dict[str, float]

    @classmethod
    def of(cls, home: Judged) -> "Margin":
        whole = {name: value.sum(0) for name, value in home["sae"].sums.items()}
        tolerance = {name: TOLERANCE * abs(own(whole)) for name, own in OWN.items()}
        if "reseeded" not in home:
            return cls(dict.fromkeys(MEASURED, 0.0), tolerance)
        change = difference(home["reseeded"], home["sae"])
        return cls({name: max(abs(got.low), abs(got.high)) for name, got in change.items()}, tolerance)

    def __getitem__(self, name: str) -> float:
        return max(self.floor[name], self.tolerance[name])

    def place(self, gap: Mapping[str, Interval]) -> str:
        """within, beyond or unsure; unknown without an interval."""
        if any(gap[name].low != gap[name].low for name in MEASURED):
            return "unknown"
        if all(gap[name].high <= self[name] for name in MEASURED):
            return "within"
        return "beyond" if any(gap[name].low > self[name] for name in MEASURED) else "unsure"


def verdict(
    home: Judged, there: Judged, scheme: str, directions: Mapping[str, float], price: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The choice for one scheme by the rule in this module's docstring. `directions` is for each adaptation the mean
    cosine of its decoder rows with what they were, in order of their price."""
    margin = Margin.of(home)
    gaps = [difference(there["sae"], there["retrained"])]
    if "again" in there and "reseeded" in there:
        gaps.append(difference(there["reseeded"], there["again"]))
    gap = over_seeds(gaps)
    tried = {name: difference(there[name], there["retrained"]) for name in directions}
    places = {name: margin.place(one) for name, one in tried.items() if directions[name] >= SAME}
    choice, how, because = _chosen(margin.place(gap), places)
    reason = f"On {scheme}, {_told(gap, margin)} {_floors(margin, home)} {because}"
    answer = {"choice": choice, "how": how, "reason": reason, "interval": [gap["fvu"].low, gap["fvu"].high]}
    answer |= {"floor": margin.floor["fvu"], "seeds": len(gaps), "price": dict(price) if price else None}
    answer["margin"] = {name: margin[name] for name in MEASURED}
    placed: list[tuple[str, dict[str, Interval], float]] = [("transferred", gap, 1.0)]
    placed += [(name, one, directions[name]) for name, one in tried.items()]
    answer["gaps"] = {
        name: {"place": margin.place(one), "directions": cosine} | {key: got.as_dict() for key, got in one.items()}
        for name, one, cosine in placed
    }
    return answer


def _chosen(transferred: str, adapted: Mapping[str, str]) -> tuple[str, str, str]:
    if transferred == "within":
        return "keep", "", "Retraining gains nothing that matters."
    if transferred == "unknown":
        return "unsure", "", "One window has no interval: not enough data to say, judge on more tokens."
    if transferred == "unsure":
        return "unsure", "", "The interval holds the margin: not enough data to say, judge on more tokens."
    for name, place in adapted.items():
        if place == "within":
            return "adapt", name, f"That matters, and the adaptation `{name}` makes up for it."
    if not adapted:
        return "retrain", "", "That matters, and no adaptation was tried."
    if some := [name for name, place in adapted.items() if place == "unsure"]:
        because = f"That matters; whether the adaptation `{some[0]}` makes up for it, these tokens do not tell."
        return "unsure", some[0], because
    return "retrain", "", f"That matters, and no adaptation makes up for it ({', '.join(adapted)} were tried)."


def _told(gap: Mapping[str, Interval], margin: Margin) -> str:
    said = [
        f"{g.value:.4f} [{g.low:.4f}, {g.high:.4f}] of {UNITS[name]} against a margin of {margin[name]:.4f}"
        if g.low == g.low else f"{g.value:.4f} of {UNITS[name]}"
        for name, g in gap.items()
    ]  # fmt: skip
    return f"the gap to a retrained dictionary is {' and '.join(said)}."


def _floors(margin: Margin, home: Judged) -> str:
    if "reseeded" not in home:
        return f"No second seed was given: the margin is {TOLERANCE:.0%} of what the reference leaves or costs."
    if any(margin.floor[name] != margin.floor[name] for name in MEASURED):
        return "What a new seed changes has no interval."
    floors = " and ".join(f"{UNITS[name]} by at most {margin.floor[name]:.4f}" for name in MEASURED)
    return f"A new seed alone changes {floors}."
