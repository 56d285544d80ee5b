"""The audit: one pass over the tokens for all twins, then `audit.json` and `features.parquet`."""

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
from qsae_jax.audit.perplexity import Losses
from qsae_jax.audit.survival import Survival
from qsae_jax.errors import Interrupted, UserError
from qsae_jax.files import staged_file, write_json
from qsae_jax.lm.model import LM
from qsae_jax.lm.tap import FINAL, Point, activations, check_point, width_at
from qsae_jax.mesh import make_mesh, on_data
from qsae_jax.progress import progress, stop_signal
from qsae_jax.quant.fake import fake_quantize, weight_errors
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

    All twins are held in memory and see each batch of windows in turn; statistics are sums, so memory does not grow
    with the number of tokens. `facts` (model and dictionary names, notes) go into the result as they are."""
    point, mesh = check_point(lm, point), mesh or make_mesh(1, 1)
    check_width(sae, width_at(lm, point), str(point))
    named = {str(s): s for s in map(parse_scheme, schemes) if s.bits}
    if not named:
        raise UserError("schemes: only `fp` is named, which is the reference; add one to audit, for example int4")
    check_windows(windows, skip_first, lm.config.context)
    twins, errors = {"fp": lm}, {}
    with progress("quantize", len(named)) as advance:
        for name, scheme in named.items():
            twins[name] = fake_quantize(lm, scheme)
            errors[name] = weight_errors(lm, twins[name])["all"]
            advance(1)
    survival, losses = Survival(sae, list(twins)), Losses(list(twins))
    with progress("audit", len(windows) * windows.seq) as advance, stop_signal() as stopped:
        for ids, weight in in_order(windows, windows_per_forward(batch, windows, mesh)):
            _batch(twins, point, on_data(ids, mesh), weight, survival, losses, skip_first, stopped)
            advance(int(weight.sum()) * windows.seq, ppl=losses.perplexity("fp"))
    facts = {"model": "", "sae": "", "processing": lm.config.processing} | dict(facts or {})
    return _result(survival, losses, errors, point, windows, skip_first, facts)


def _batch(
    twins: Mapping[str, LM],
    point: Point,
    tokens: Int[Array, "b s"],
    weight: np.ndarray,
    survival: Survival,
    losses: Losses,
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
    survival.add(acts, np.repeat(weight, tokens.shape[1] - skip_first))
    losses.add(list(twins.values()), finals, tokens, weight)


def _result(
    survival: Survival,
    losses: Losses,
    errors: Mapping[str, float],
    point: Point,
    windows: Windows,
    skip_first: int,
    facts: dict[str, Any],
) -> Audit:
    rows = []
    for name in survival.names[1:]:
        rows.append({"scheme": name} | losses.row(name) | {"weight_rel_error": errors[name]} | survival.row(name))
    reference = {"ppl": losses.perplexity("fp")} | survival.fidelity("fp")
    reference |= {"active": int(survival.active().sum()), "latents": survival.sae.latents}
    whole = (
        {"point": str(point), "notes": []}
        | facts
        | {"tokens": windows.described(skip_first), "reference": reference, "rows": rows}
    )
    return Audit(whole, _features(survival))


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
