"""Transferred against retrained: the arms, their numbers, and a first verdict.

    reference     the full-precision dictionary, on the full-precision model
    transferred   the same dictionary, on the quantized model
    retrained     a dictionary trained on the quantized model's activations, from the same seed and tokens
    reseeded      the full-precision dictionary trained again from another seed: the floor for every difference

Every dictionary is judged on both models. The rule of the verdict: let `gap` be FVU(transferred) - FVU(retrained) on
the quantized model, with a bootstrap interval over groups of windows (paired: both see the same groups), and `floor`
how far FVU(reseeded) may be from FVU(reference) on the full-precision model: the farther end of that difference's
interval. **keep** when the interval's lower end does not clear the floor: retraining gains no more than a new seed
changes; and when there is no interval, because there is no second group of windows. **retrain** when it does, and
the retrained dictionary also recovers more of the model's loss (the interval of the difference in CE recovered lies
above 0). **adapt** when the gap is real but the model's loss does not notice it: a cheap correction is enough to try
first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from qsae_jax.acts.tokens import Windows, check_windows
from qsae_jax.compare.fidelity import MEASURES, intervals, judge
from qsae_jax.compare.match import match
from qsae_jax.errors import UserError
from qsae_jax.files import write_json
from qsae_jax.lm.model import LM
from qsae_jax.lm.tap import Point, check_point, width_at
from qsae_jax.mesh import make_mesh
from qsae_jax.progress import progress, stop_signal
from qsae_jax.quant.fake import fake_quantize
from qsae_jax.quant.scheme import Scheme, parse_scheme
from qsae_jax.sae.model import SAE, check_width
from qsae_jax.stats import Grouped, Interval, Sums, bootstrap


@dataclass(frozen=True)
class Comparison:
    """The result: what `compare.json` holds."""

    facts: dict[str, Any]

    def write(self, folder: Path) -> None:
        write_json(folder / "compare.json", self.facts)


def compare(
    lm: LM,
    scheme: str | Scheme,
    sae: SAE,
    retrained: SAE,
    windows: Windows,
    point: str | Point,
    *,
    reseeded: SAE | None = None,
    skip_first: int = 1,
    batch: int = 0,
    mesh: Mesh | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Comparison:
    """Judge a full-precision dictionary against one retrained on the quantized model, on held-out windows."""
    point, scheme, mesh = check_point(lm, point), parse_scheme(scheme), mesh or make_mesh(1, 1)
    if scheme.full:
        raise UserError("compare at `fp`: name the scheme to compare full precision with, for example int4")
    check_windows(windows, skip_first, lm.config.context)
    saes = {"sae": sae, "retrained": retrained} | ({"reseeded": reseeded} if reseeded else {})
    for one in saes.values():
        check_width(one, width_at(lm, point), str(point))
    models = {"fp": lm, str(scheme): fake_quantize(lm, scheme)}
    with progress(f"compare at {scheme}", 2 * len(windows) * windows.seq) as advance, stop_signal() as stopped:
        told = {"skip_first": skip_first, "batch": batch, "advance": advance, "stopped": stopped}
        judged = {name: judge(model, saes, windows, point, mesh, **told) for name, model in models.items()}
    rows = _rows(judged, str(scheme))
    alive = {name: _alive(judged[_home(name, str(scheme))][name]) for name in saes}
    matching = _matching(saes, alive)
    head = {
        "model": "",
        "processing": lm.config.processing,
        "point": str(point),
        "scheme": str(scheme),
        "notes": [],
    } | dict(facts or {})
    tokens = {"tokens": windows.described(skip_first)}
    return Comparison(head | tokens | {"rows": rows, "matching": matching, "verdict": verdict(judged, str(scheme))})


def _home(name: str, scheme: str) -> str:
    return scheme if name == "retrained" else "fp"


def _alive(judged: Grouped) -> np.ndarray:
    return judged.sums["fired"].sum(0) > 0


def _rows(judged: Mapping[str, Mapping[str, Grouped]], scheme: str) -> list[dict[str, Any]]:
    rows = []
    for judged_on, dictionaries in judged.items():
        for name, one in dictionaries.items():
            arm = {"sae": "reference" if judged_on == "fp" else "transferred"}.get(name, name)
            numbers = {key: got.as_dict() for key, got in intervals(one.sums).items()}
            rows.append({"arm": arm, "trained_on": _home(name, scheme), "judged_on": judged_on} | numbers)
    order = ("reference", "transferred", "retrained", "reseeded")
    return sorted(rows, key=lambda row: order.index(row["arm"]))


def _matching(saes: Mapping[str, SAE], alive: Mapping[str, np.ndarray]) -> dict[str, dict[str, float | None]]:
    """Each figure for (full precision, retrained), beside the same for (full precision, reseeded)."""
    value = match(saes["sae"], saes["retrained"], alive["sae"], alive["retrained"])
    floor: dict[str, Any] = dict.fromkeys(value)
    if "reseeded" in saes:
        floor = match(saes["sae"], saes["reseeded"], alive["sae"], alive["reseeded"])
    return {name: {"value": value[name], "floor": floor[name]} for name in value}


def _difference(one: Grouped, other: Grouped, name: str) -> Interval:
    """A measure of one dictionary minus that of another, with groups drawn together."""
    both = {f"a.{k}": v for k, v in one.sums.items()} | {f"b.{k}": v for k, v in other.sums.items()}

    def gap(s: Sums) -> float:
        a, b = ({k[2:]: v for k, v in s.items() if k.startswith(side)} for side in ("a.", "b."))
        return MEASURES[name](a) - MEASURES[name](b)

    return bootstrap({name: gap}, both)[name]


def verdict(judged: Mapping[str, Mapping[str, Grouped]], scheme: str) -> dict[str, Any]:
    """keep, adapt or retrain, by the rule in this module's docstring."""
    there, home = judged[scheme], judged["fp"]
    gap = _difference(there["sae"], there["retrained"], "fvu")
    gain = _difference(there["retrained"], there["sae"], "ce_recovered")
    floor, seed = 0.0, "no second seed was given, so that the floor is taken as 0"
    if "reseeded" in home:
        change = _difference(home["reseeded"], home["sae"], "fvu")
        floor = max(abs(change.low), abs(change.high))
        seed = f"a new seed alone changes it by {change.value:+.4f}, at most {floor:.4f}"
    said = f"On {scheme}, retraining lowers FVU by {gap.value:.4f} [{gap.low:.4f}, {gap.high:.4f}]; {seed}"
    loss = f"CE recovered changes by {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
    if gap.low != gap.low:
        choice, because = (
            "keep",
            "one window gives no interval, so nothing speaks for a change: judge on more tokens",
        )
    elif not gap.low > floor:
        choice, because = "keep", "the gain does not clear what a new seed changes"
    elif gain.low > 0:
        choice, because = "retrain", "the gain clears the floor and the model's loss notices it"
    else:
        choice, because = "adapt", "the gain clears the floor but the model's loss does not notice it"
    return {"choice": choice, "reason": f"{said}; {loss}: {because}.", "interval": [gap.low, gap.high], "floor": floor}
