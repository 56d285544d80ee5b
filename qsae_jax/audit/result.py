"""From the sums of an audit to what `audit.json` and `features.parquet` hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qsae_jax.audit.causes import causes, shares
from qsae_jax.audit.overlap import overlap
from qsae_jax.audit.perplexity import Losses
from qsae_jax.audit.shares import Drawn, differences, draw, families, reliability
from qsae_jax.audit.survival import Survival
from qsae_jax.files import staged_file, write_json
from qsae_jax.lm.tap import Point
from qsae_jax.stats import Interval, Totals


@dataclass(frozen=True)
class Audit:
    """The result: what `audit.json` holds, and the features' table."""

    facts: dict[str, Any]
    features: dict[str, np.ndarray]

    def write(self, folder: Path) -> None:
        with staged_file(folder / "features.parquet") as draft:
            pq.write_table(pa.table(self.features), draft)
        write_json(folder / "audit.json", self.facts)


@dataclass
class Told:
    """What one pass says of its twins at one point: no sums over tokens are kept."""

    reference: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    columns: dict[str, dict[str, np.ndarray]]
    drawn: dict[str, Drawn]


def tell(
    survival: Survival,
    losses: Losses,
    weight_errors: Mapping[str, float],
    errors: Mapping[str, Mapping[Point, Totals]],
) -> Told:
    """The rows and columns of a pass, with intervals."""
    reference = losses.row("fp") | survival.fidelity("fp")
    reference = {key: reference[key] for key in ("ppl", "fvu", "l0")}
    reference |= {"active": int(survival.active.sum()), "scored": int(survival.scored.sum())}
    reference |= {"latents": survival.sae.latents, "intervals": _ends({"ppl": losses.intervals("fp")["ppl"]})}
    told = Told(reference, {}, {}, {})
    for name in survival.names[1:]:
        drawn, (why, readers) = draw(survival, name), causes(survival, name)
        row = {"scheme": name} | losses.row(name) | {"weight_rel_error": weight_errors[name]} | survival.row(name)
        row |= {"intervals": _ends(losses.intervals(name) | drawn.intervals())}
        row |= {"causes": shares(why, int(survival.active.sum())), "reliability": reliability(survival, name)}
        if errors[name]:
            row["errors"] = {str(at): float(s["changed"] / s["power"]) for at, s in errors[name].items()}
        m = survival.sae.latents
        columns = {"scheme": np.full(m, name), "feature": np.arange(m, dtype=np.int32), "active": survival.active}
        columns |= {"few": survival.active & ~survival.scored} | survival.follows(name)
        columns |= {"r_low": drawn.low, "r_high": drawn.high, "cause": why}
        columns |= {"reader": readers.latent.astype(np.int32), "reader_r": readers.r} | survival.statistics("fp")
        columns |= {f"{key}_twin": value for key, value in survival.statistics(name).items()}
        told.rows[name], told.columns[name], told.drawn[name] = row, columns, drawn
    return told


def _ends(intervals: Mapping[str, Interval]) -> dict[str, list[float]]:
    return {key: [one.low, one.high] for key, one in intervals.items()}


ALL_PAIRS = 12
"""Schemes up to which every pair is compared; of more, only a control with the scheme that it is made for, and draws of
one control."""


def assemble(parts: Sequence[Told], marks: Mapping[str, Mapping[str, Any]], facts: dict[str, Any]) -> Audit:
    """All passes at one point as one result. `marks` says of each scheme whether it is a `control`, `of` which scheme,
    a draw of which `family`, and what was `matched`."""
    rows = [row | dict(marks[name]) for part in parts for name, row in part.rows.items()]
    drawn = {name: one for part in parts for name, one in part.drawn.items()}
    columns = {name: one for part in parts for name, one in part.columns.items()}
    family = {name: str(marks[name]["family"]) for name in drawn}
    near = {name: {name, family[name], str(marks[name]["of"])} - {""} for name in drawn}
    pairs = [
        (one, other) for one, other in combinations(drawn, 2) if len(drawn) <= ALL_PAIRS or near[one] & near[other]
    ]
    found = {"differences": differences(drawn, pairs), "draws": families(drawn, family)}
    found |= {"overlap": [_overlap(columns, drawn, *pair) for pair in pairs]}
    first = next(iter(columns.values()))
    table = {key: np.concatenate([one[key] for one in columns.values()]) for key in first}
    return Audit(facts | {"reference": parts[0].reference, "rows": rows} | found, table)


def _overlap(
    columns: Mapping[str, Mapping[str, np.ndarray]], drawn: Mapping[str, Drawn], *names: str
) -> dict[str, Any]:
    """Whether two schemes lose the same features."""
    active, groups = columns[names[0]]["active"], drawn[names[0]].groups
    r = [np.nan_to_num(columns[name]["r"][active]) for name in names]
    draws = [drawn[name].r if groups > 1 else None for name in names]
    return dict(zip(("scheme", "other"), names, strict=True)) | overlap(*r, *draws, groups=groups)
