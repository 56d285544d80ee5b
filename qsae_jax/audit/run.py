"""The audit: twins in groups that fit in memory, one pass over the tokens for each group, then `audit.json` and
`features.parquet`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh
from jaxtyping import Array, Int

from qsae_jax.acts.tokens import Windows, check_windows, counted_rows, in_order, windows_per_forward
from qsae_jax.audit.match import Matching, sentences
from qsae_jax.audit.perplexity import Losses
from qsae_jax.audit.survival import Survival
from qsae_jax.errors import Interrupted, UserError
from qsae_jax.files import staged_file, write_json
from qsae_jax.lm.model import LM
from qsae_jax.lm.tap import FINAL, Point, activations, check_point, width_at
from qsae_jax.mesh import free_bytes, make_mesh, on_data, return_freed
from qsae_jax.progress import progress, stop_signal
from qsae_jax.quant.fake import departures, fake_quantize, weight_errors
from qsae_jax.quant.scheme import Scheme, parse_scheme
from qsae_jax.sae.model import SAE, check_width


@dataclass(frozen=True)
class Audit:
    """The result: what `audit.json` holds, and the features' table."""

    facts: dict[str, Any]
    features: dict[str, np.ndarray]

    def write(self, folder: Path) -> None:
        with staged_file(folder / "features.parquet") as draft:
            pq.write_table(pa.table(self.features), draft)
        write_json(folder / "audit.json", self.facts)


def audit(
    lm: LM,
    sae: SAE,
    windows: Windows,
    schemes: Sequence[str | Scheme],
    point: str | Point,
    *,
    skip_first: int = 1,
    batch: int = 0,
    mesh: Mesh | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Audit:
    """What happens to the features of a frozen dictionary when the model is quantized by each scheme.

    Twins see each batch of windows in turn; statistics are sums, so memory does not grow with the number of tokens,
    and no more twins are held than fit (`at_once`), so it does not grow with the number of schemes. `facts` (model and
    dictionary names, notes) go into the result as they are."""
    point, mesh = check_point(lm, point), mesh or make_mesh(1, 1)
    check_width(sae, width_at(lm, point), str(point))
    named = {str(s): s for s in map(parse_scheme, schemes) if not s.full}
    if not named:
        raise UserError("schemes: only `fp` is named, which is the reference; add one to audit, for example int4")
    check_windows(windows, skip_first, lm.config.context)
    notes = [note for scheme in named.values() for note in departures(lm, scheme)]
    applied, matches = Matching(lm, windows, batch, mesh).resolve(named)
    groups = in_groups(applied, at_once(lm))
    passes = []
    with progress("audit", len(groups) * len(windows) * windows.seq) as advance, stop_signal() as stopped:
        for group in groups:
            twins, errors = {"fp": lm}, {}
            for name, scheme in group.items():
                twins[name] = fake_quantize(lm, scheme)
                errors[name] = weight_errors(lm, twins[name])["all"]
            done = Pass(Survival(sae, list(twins)), Losses(list(twins)), errors)
            for ids, weight in in_order(windows, windows_per_forward(batch, windows, mesh)):
                _batch(twins, point, on_data(ids, mesh), weight, done, skip_first, stopped)
                advance(int(weight.sum()) * windows.seq, ppl=done.losses.perplexity("fp"))
            passes.append(done)
            del twins
            return_freed()
    facts = {"model": "", "sae": "", "processing": lm.config.processing, "point": str(point)} | dict(facts or {})
    facts["notes"] = [*facts.get("notes", ()), *notes, *sentences(matches)]
    facts["tokens"] = windows.described(skip_first)
    marks: dict[str, dict[str, Any]] = {name: {"control": scheme.control} for name, scheme in named.items()}
    for name, match in matches.items():
        marks[name]["matched"] = match
    return _result(passes, marks, facts)


MOST = 8
"""Twins in a pass: more would save less than a tenth of the time, which is that of the full-precision run."""


def at_once(lm: LM) -> int:
    """How many twins a pass holds: what half of the free memory has room for, were every weight a copy."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(lm))
    return max(1, min(MOST, free_bytes() // (2 * size)))


def in_groups(schemes: Mapping[str, Scheme], size: int) -> list[dict[str, Scheme]]:
    """As few groups as the size allows, as even as they can be."""
    names = list(schemes)
    count = -(-len(names) // size)
    return [{name: schemes[name] for name in map(str, part)} for part in np.array_split(np.array(names), count)]


@dataclass
class Pass:
    """One pass over the tokens: full precision and some twins."""

    survival: Survival
    losses: Losses
    errors: Mapping[str, float]


def _batch(
    twins: Mapping[str, LM],
    point: Point,
    tokens: Int[Array, "b s"],
    weight: np.ndarray,
    done: Pass,
    skip_first: int,
    stopped: Callable[[], bool],
) -> None:
    acts, finals = {}, []
    for name, twin in twins.items():
        # Waited for: an interpreter that leaves while the device still works ends in a crash.
        x, final = jax.block_until_ready(activations(twin, (point, FINAL), tokens))
        if stopped():
            raise Interrupted("audit stopped; nothing is written, the same command begins it again")
        acts[name] = counted_rows(x, skip_first)
        finals.append(final)
    done.survival.add(acts, np.repeat(weight, tokens.shape[1] - skip_first))
    done.losses.add(list(twins.values()), finals, tokens, weight)


def _result(passes: Sequence[Pass], marks: Mapping[str, dict[str, Any]], facts: dict[str, Any]) -> Audit:
    rows = []
    for done in passes:
        for name in done.survival.names[1:]:
            own = {"weight_rel_error": done.errors[name]} | marks[name]
            rows.append({"scheme": name} | done.losses.row(name) | own | done.survival.row(name))
    first = passes[0]
    reference = {"ppl": first.losses.perplexity("fp")} | first.survival.fidelity("fp")
    reference |= {"active": int(first.survival.active().sum()), "latents": first.survival.sae.latents}
    tables = [_features(done.survival) for done in passes]
    features = {key: np.concatenate([table[key] for table in tables]) for key in tables[0]}
    return Audit(facts | {"reference": reference, "rows": rows}, features)


def _features(survival: Survival) -> dict[str, np.ndarray]:
    """One row for each scheme and latent: statistics of the full-precision run, and of the twin."""
    base, active, m = survival.statistics("fp"), survival.active(), survival.sae.latents
    columns: dict[str, list[np.ndarray]] = {}
    for name in survival.names[1:]:
        part = {"scheme": np.full(m, name), "feature": np.arange(m, dtype=np.int32), "active": active}
        part |= {"r": survival.correlations(name)} | base
        part |= {f"{key}_twin": value for key, value in survival.statistics(name).items()}
        for key, value in part.items():
            columns.setdefault(key, []).append(value)
    return {key: np.concatenate(parts) for key, parts in columns.items()}
