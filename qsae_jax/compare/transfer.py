"""Transferred, adapted, retrained: the arms, each judged on both models and spliced back into both.

reference     the full-precision dictionary, on the full-precision model
transferred   the same dictionary, on the quantized model
adapted       carried over and adapted, cheapest first (adapt.py), and fine-tuned there on few tokens
retrained     trained on the quantized model's activations, from the same seed and tokens
reseeded      the full-precision dictionary trained again from another seed: the floor for every difference
random        directions drawn at random, and
shuffled      trained on activations whose coordinates do not belong together: what nonsense reaches
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from qsae_jax.acts.tokens import Windows, check_windows
from qsae_jax.compare.adapt import kept
from qsae_jax.compare.curves import budget_curves, priced
from qsae_jax.compare.fidelity import intervals, judge
from qsae_jax.compare.likeness import beside_floor, figures, named, together
from qsae_jax.compare.probe import accuracy, probe
from qsae_jax.compare.verdict import verdict
from qsae_jax.errors import UserError
from qsae_jax.files import write_json
from qsae_jax.lm.model import LM
from qsae_jax.lm.tap import Point, check_point, width_at
from qsae_jax.mesh import make_mesh, return_freed
from qsae_jax.progress import Advance, progress, stop_signal
from qsae_jax.quant.fake import fake_quantize
from qsae_jax.quant.scheme import Scheme, parse_scheme
from qsae_jax.sae.model import SAE, check_width
from qsae_jax.stats import Grouped, bootstrap

NONSENSE = ("random", "shuffled")


@dataclass(frozen=True)
class Arms:
    """What was trained or adapted for one scheme."""

    retrained: SAE
    adapted: Mapping[str, SAE] = field(default_factory=dict)
    """By what was done, cheapest first."""
    again: SAE | None = None
    """Retrained from the second seed."""
    curves: Mapping[str, Mapping[int, SAE]] = field(default_factory=dict)
    """`retrained` and `finetuned` dictionaries by the tokens that they learnt from."""

    @property
    def own(self) -> dict[str, SAE]:
        return {"retrained": self.retrained, **({"again": self.again} if self.again else {}), **self.adapted}

    @property
    def all(self) -> list[SAE]:
        return [*self.own.values(), *(sae for by in self.curves.values() for sae in by.values())]


@dataclass(frozen=True)
class Comparison:
    """The result: what `compare.json` holds."""

    facts: dict[str, Any]

    def write(self, file: Path) -> None:
        write_json(file, self.facts)


@dataclass(frozen=True)
class Judged:
    """Sums of every dictionary on one model, and those of its probes, which have groups of their own."""

    saes: Mapping[str, Grouped]
    probes: Mapping[str, Grouped]

    def fired(self, name: str) -> np.ndarray:
        """On how many tokens each latent fired."""
        return self.saes[name].sums["fired"].sum(0)

    def of(self, scheme: str) -> "Judged":
        """What every scheme shares, and what is this one's own, without its name."""
        parts = [
            {name.removeprefix(f"{scheme}/"): got for name, got in one.items()
             if "/" not in name or name.startswith(f"{scheme}/")} for one in (self.saes, self.probes)
        ]  # fmt: skip
        return Judged(*parts)


@dataclass
class Comparing:
    """Dictionaries of one point, on held-out windows."""

    lm: LM
    shared: Mapping[str, SAE]
    """`sae`, and where there are any `reseeded`, `random`, `shuffled` and `fp-finetuned`: the same for every scheme."""
    windows: Windows
    point: Point
    skip_first: int = 1
    batch: int = 0
    mesh: Mesh = field(default_factory=lambda: make_mesh(1, 1))
    labels: np.ndarray | None = None
    """The classes of tokens `[n, s, c]` that probes are to tell; none leaves them out."""
    prices: Callable[[float], dict[str, float]] | None = None
    """What so many tokens of training cost, by device."""
    _stopped: Callable[[], bool] = field(default=lambda: False, repr=False)

    def all(self, arms: Mapping[str, Arms], facts: Mapping[str, Any]) -> dict[str, Comparison]:
        """A comparison for every scheme; the full-precision model judges all dictionaries in one pass."""
        at_home = dict(self.shared)
        for scheme, one in arms.items():
            at_home |= {f"{scheme}/{name}": sae for name, sae in one.own.items()}
        total, found = (1 + len(arms)) * len(self.windows) * self.windows.seq, {}
        with progress(f"compare at {', '.join(arms)}", total) as advance, stop_signal() as stopped:
            self._stopped = stopped
            home = self._judged(self.lm, at_home, advance)
            floor = self._alike(self.lm, "reseeded", self.shared.get("reseeded"), home, home)
            for scheme, one in arms.items():
                twin = fake_quantize(self.lm, scheme)
                there = self._judged(twin, {**self.shared, **one.own}, advance)
                found[scheme] = self._comparison(scheme, twin, one, home.of(scheme), there, floor, facts)
                del twin
                return_freed()
        return found

    def _judged(self, lm: LM, saes: Mapping[str, SAE], advance: Advance) -> Judged:
        """Every dictionary on one model."""
        where = (lm, saes, self.windows)
        judged = judge(*where, self.point, self.mesh, **self._how, advance=advance)
        labels = self.labels
        return Judged(judged, {} if labels is None else probe(*where, labels, self.point, self.mesh, **self._how))

    @property
    def _how(self) -> dict[str, Any]:
        return {"skip_first": self.skip_first, "batch": self.batch, "stopped": self._stopped}

    def _alike(self, lm: LM, name: str, other: SAE | None, home: Judged, there: Judged) -> dict[str, float] | None:
        """Likeness of the dictionary at home and another where it is."""
        if other is None:
            return None
        pair = self.shared["sae"], other
        r = together((self.lm, lm), pair, self.windows, self.point, self.mesh, **self._how)
        return figures(*pair, (home.fired("sae"), there.fired(name)), r)

    def _comparison(
        self,
        scheme: str,
        twin: LM,
        arms: Arms,
        home: Judged,
        there: Judged,
        floor: dict[str, float] | None,
        facts: Mapping[str, Any],
    ) -> Comparison:
        sae, fired = self.shared["sae"], (home.fired("sae"), there.fired("retrained"))
        where = (self.windows, self.point, self.mesh)
        curves = budget_curves(twin, arms.curves, there.saes["sae"], *where, **self._how)
        directions = {name: kept(sae, one) for name, one in arms.adapted.items()}
        head = {"model": "", "processing": self.lm.config.processing, "point": str(self.point), "scheme": scheme}
        head |= {"notes": []} | dict(facts) | {"tokens": self.windows.described(self.skip_first)}
        head["rows"] = _rows({"fp": home, scheme: there}, scheme)
        alike = self._alike(twin, "retrained", arms.retrained, home, there)
        head["matching"] = beside_floor(alike or {}, floor)
        head["fates"] = named(sae, arms.retrained, fired)
        head["curves"] = curves
        price = priced(curves, self.prices)
        return Comparison(head | {"verdict": verdict(home.saes, there.saes, scheme, directions, price)})


def compare(
    lm: LM,
    scheme: str | Scheme,
    sae: SAE,
    retrained: SAE,
    windows: Windows,
    point: str | Point,
    *,
    reseeded: SAE | None = None,
    adapted: Mapping[str, SAE] | None = None,
    again: SAE | None = None,
    nonsense: Mapping[str, SAE] | None = None,
    budgets: Mapping[int, SAE] | None = None,
    labels: np.ndarray | None = None,
    prices: Callable[[float], dict[str, float]] | None = None,
    skip_first: int = 1,
    batch: int = 0,
    mesh: Mesh | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Comparison:
    """Judge a full-precision dictionary against one retrained on the quantized model, on held-out windows, and where
    given: adapted ones (adapt.adapted), both from another seed (`reseeded`, `again`), and nonsense. `budgets` are
    retrained ones by the tokens that they learnt from, the last of them `retrained` itself. `labels` are the classes
    of tokens that sparse probes are to tell (probe.labels)."""
    name = str(parse_scheme(scheme))
    arms = Arms(retrained, adapted or {}, again, {"retrained": budgets} if budgets else {})
    shared = {"sae": sae} | ({"reseeded": reseeded} if reseeded else {}) | dict(nonsense or {})
    found = compares(lm, {name: arms}, shared, windows, point, labels=labels, prices=prices, skip_first=skip_first,
                     batch=batch, mesh=mesh, facts=facts)  # fmt: skip
    return found[name]


def compares(
    lm: LM,
    arms: Mapping[str, Arms],
    shared: Mapping[str, SAE],
    windows: Windows,
    point: str | Point,
    *,
    labels: np.ndarray | None = None,
    prices: Callable[[float], dict[str, float]] | None = None,
    skip_first: int = 1,
    batch: int = 0,
    mesh: Mesh | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Comparison]:
    """The same for several schemes, which share what was trained at full precision."""
    point, mesh = check_point(lm, point), mesh or make_mesh(1, 1)
    for scheme in arms:
        if parse_scheme(scheme).full:
            raise UserError("compare at `fp`: name the scheme to compare full precision with, for example int4")
    check_windows(windows, skip_first, lm.config.context)
    for one in [*shared.values(), *(sae for each in arms.values() for sae in each.all)]:
        check_width(one, width_at(lm, point), str(point))
    comparing = Comparing(lm, shared, windows, point, skip_first, batch, mesh, labels, prices)
    return comparing.all(arms, facts or {})


ORDER = ("reference", "transferred", "adapted", "retrained", "reseeded", *NONSENSE)


def _rows(judged: Mapping[str, Judged], scheme: str) -> list[dict[str, Any]]:
    rows = []
    for judged_on, one in judged.items():
        for name, got in one.saes.items():
            arm, how, trained_on = _arm(name, judged_on, scheme)
            numbers = {key: value.as_dict() for key, value in intervals(got.sums).items()}
            if name in one.probes:
                numbers["probe"] = bootstrap({"probe": accuracy}, one.probes[name].sums)["probe"].as_dict()
            rows.append({"arm": arm, "how": how, "trained_on": trained_on, "judged_on": judged_on} | numbers)
    return sorted(rows, key=lambda row: ORDER.index(row["arm"]))


def _arm(name: str, judged_on: str, scheme: str) -> tuple[str, str, str]:
    """How a dictionary is called, what was done to it, and whose activations it learnt."""
    if name == "sae":
        return ("reference" if judged_on == "fp" else "transferred"), "", "fp"
    if name == "fp-finetuned":
        return "adapted", "finetuned at home", "fp"
    if name == "again":
        return "retrained", "another seed", scheme
    if name == "retrained":
        return name, "", scheme
    if name == "reseeded":
        return name, "", "fp"
    return (name, "", "") if name in NONSENSE else ("adapted", name, "fp")
