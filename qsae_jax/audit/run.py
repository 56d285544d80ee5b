"""The audit: twins in groups that fit in memory, one pass over the tokens for each group, then `audit.json` and
`features.parquet`. Dictionaries at several points are judged in the same passes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from qsae_jax.acts.tokens import Windows, check_windows, in_order, windows_per_forward
from qsae_jax.audit.contexts import waited
from qsae_jax.audit.kept import Kept, Pass, fingerprint, windows_mark
from qsae_jax.audit.match import Matching, sentences
from qsae_jax.audit.perplexity import Losses
from qsae_jax.audit.result import Audit, Told, assemble, tell
from qsae_jax.audit.survival import Survival
from qsae_jax.errors import Interrupted, UserError
from qsae_jax.hosts import here, least
from qsae_jax.lm.model import LM
from qsae_jax.lm.tap import FINAL, Point, activations, check_point, width_at
from qsae_jax.mesh import free_bytes, make_mesh, on_data, return_freed
from qsae_jax.progress import progress, stop_signal
from qsae_jax.quant.fake import departures, fake_quantize, weight_errors
from qsae_jax.quant.scheme import Scheme, parse_scheme
from qsae_jax.sae.model import SAE, check_width
from qsae_jax.stats import Totals


def audit(
    lm: LM, sae: SAE, windows: Windows, schemes: Sequence[str | Scheme], point: str | Point, **settings: Any
) -> Audit:
    """What happens to the features of a frozen dictionary when the model is quantized by each scheme. `settings` are
    those of `audits`."""
    (found,) = audits(lm, {point: sae}, windows, schemes, **settings).values()
    return found


def audits(
    lm: LM,
    saes: Mapping[str | Point, SAE],
    windows: Windows,
    schemes: Sequence[str | Scheme],
    *,
    skip_first: int = 1,
    batch: int = 0,
    mesh: Mesh | None = None,
    facts: Mapping[str, Any] | None = None,
    errors_at: Sequence[str | Point] = (),
    match: int = 0,
    keep: Path | None = None,
) -> dict[str, Audit]:
    """The same for dictionaries at several points of the model, in the same passes: an audit for each point.

    Twins see each batch of windows in turn; statistics are sums, so memory does not grow with the number of tokens,
    and no more twins are held than fit (`at_once`), so it does not grow with the number of schemes. `errors_at` names
    points where only the error of the activations is measured; `match` is how many tokens strengths of matched
    controls are found on (0: all). `facts` (model and dictionary names, notes) go into the result as they are. `keep`
    is a folder in which the sums are kept every minute and when the work is stopped: the same call goes on from there
    to the same bits. Who has written the result deletes it (`Kept(keep).forget`)."""
    mesh = mesh or make_mesh(1, 1)
    at = {check_point(lm, point): sae for point, sae in saes.items()}
    for point, sae in at.items():
        check_width(sae, width_at(lm, point), str(point))
    elsewhere = tuple(check_point(lm, point) for point in errors_at)
    named = {str(s): s for s in map(parse_scheme, schemes) if not s.full}
    if not named:
        raise UserError("schemes: only `fp` is named, which is the reference; add one to audit, for example int4")
    check_windows(windows, skip_first, lm.config.context)
    notes = [note for scheme in named.values() for note in departures(lm, scheme)]
    some = windows.part(0, max(match // windows.seq, 1)) if match else windows
    about = {"schemes": list(named), "skip_first": skip_first, "batch": batch, "match": match}
    kept = Kept(keep, about | _marks(lm, at, windows, elsewhere) if keep else {})
    applied, matches = Matching(lm, some, batch, mesh, kept).resolve(named)
    told: dict[Point, list[Told]] = {point: [] for point in at}
    groups = _groups(lm, applied, kept)
    with progress("audit", len(groups) * len(windows) * windows.seq) as advance, stop_signal() as stopped:
        for number, group in enumerate(groups):
            todo = _Work(lm, windows, elsewhere, skip_first, batch, mesh, kept, number)
            done = todo.done(_begun(at, group, elsewhere, len(windows)), group, advance, stopped)
            for point, survival in done.survivals.items():
                told[point].append(tell(survival, done.losses, done.weight_errors, done.errors))
            del done
            return_freed()
    facts = {"model": "", "sae": "", "processing": lm.config.processing, "notes": []} | dict(facts or {})
    facts |= {"notes": [*facts["notes"], *notes, *sentences(matches)], "tokens": windows.described(skip_first)}
    marks: dict[str, dict[str, Any]] = {
        name: {"control": scheme.control, "of": scheme.of, "family": scheme.family} for name, scheme in named.items()
    }
    marks |= {name: marks[name] | {"matched": match_found} for name, match_found in matches.items()}
    return {str(point): assemble(parts, marks, facts | {"point": str(point)}) for point, parts in told.items()}


def _marks(lm: LM, saes: Mapping[Point, SAE], windows: Windows, elsewhere: Sequence[Point]) -> dict[str, Any]:
    """What tells these audits from others."""
    facts = {"windows": windows_mark(windows.ids), "model": fingerprint(lm), "errors_at": [str(p) for p in elsewhere]}
    return facts | {"dictionaries": {str(point): fingerprint(sae) for point, sae in saes.items()}}


def _groups(lm: LM, applied: Mapping[str, Scheme], kept: Kept) -> list[dict[str, Scheme]]:
    """The twins of each pass. How many fit may differ when the work is taken up again: its passes stay as they were
    begun."""
    names = kept.begun["groups"] or [list(group) for group in in_groups(applied, at_once(lm))]
    kept.note(groups=names)
    return [{name: applied[name] for name in group} for group in names]


MOST = 8
"""Twins in a pass: more would save less than a tenth of the time, which is that of the full-precision run."""


def at_once(lm: LM) -> int:
    """How many twins a pass holds: what half of the free memory has room for, were every weight a copy."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(lm))
    return max(1, min(MOST, least(free_bytes()) // (2 * size)))


def in_groups(schemes: Mapping[str, Scheme], size: int) -> list[dict[str, Scheme]]:
    """As few groups as the size allows, as even as they can be."""
    names = list(schemes)
    count = -(-len(names) // size)
    return [{name: schemes[name] for name in map(str, part)} for part in np.array_split(np.array(names), count)]


def _begun(saes: Mapping[Point, SAE], group: Mapping[str, Scheme], elsewhere: tuple[Point, ...], windows: int) -> Pass:
    """A pass that has seen nothing."""
    names = ["fp", *group]
    survivals = {point: Survival(sae, names, windows) for point, sae in saes.items()}
    return Pass(survivals, Losses(names, windows), {}, {name: {at: Totals() for at in elsewhere} for name in group})


@dataclass(frozen=True)
class _Work:
    """What a pass needs."""

    lm: LM
    windows: Windows
    elsewhere: tuple[Point, ...]
    skip_first: int
    batch: int
    mesh: Mesh
    kept: Kept
    number: int

    def done(
        self, run: Pass, group: Mapping[str, Scheme], advance: Callable[..., None], stopped: Callable[[], bool]
    ) -> Pass:
        """The pass, from where it was kept to its end."""
        self.kept.load(self.number, run)
        advance(run.first * self.windows.seq)
        if run.first >= len(self.windows):
            return run
        twins = {"fp": self.lm}
        for name, scheme in group.items():
            twins[name] = fake_quantize(self.lm, scheme)
            run.weight_errors[name] = weight_errors(self.lm, twins[name])["all"]
        size, left = windows_per_forward(self.batch, self.windows, self.mesh), self.windows.part(run.first, None)
        for ids, weight in in_order(left, size):
            try:
                self._add(run, twins, ids, weight, stopped)
            except Interrupted:
                self.kept.save(self.number, run)
                raise
            advance(int(weight.sum()) * self.windows.seq, ppl=run.losses.perplexity("fp"))
            if self.kept.due:
                self.kept.save(self.number, run)
        self.kept.save(self.number, run)
        return run

    def _add(
        self, run: Pass, twins: Mapping[str, LM], ids: np.ndarray, weight: np.ndarray, stopped: Callable[[], bool]
    ) -> None:
        """A batch of windows: in all sums, or where it is stopped in none."""
        tokens, points = on_data(ids, self.mesh), (*run.survivals, *self.elsewhere, FINAL)
        seen = {name: waited(activations(twin, points, tokens), stopped) for name, twin in twins.items()}
        for i, survival in enumerate(run.survivals.values()):
            survival.add({name: _counted(x[i], self.skip_first) for name, x in seen.items()}, weight, run.first)
        for i, point in enumerate(self.elsewhere, start=len(run.survivals)):
            for name, totals in run.errors.items():
                change = _error(seen["fp"][i], seen[name][i], weight, self.skip_first)
                totals[point].add(**here(change))
        run.losses.add(list(twins.values()), [x[-1] for x in seen.values()], tokens, weight, run.first)
        run.first += int(weight.sum())


def _counted(x: Float[Array, "b s ..."], skip_first: int) -> Float[Array, "b p d"]:
    """The positions that statistics count, heads and their widths as one."""
    return x[:, skip_first:].reshape(len(x), x.shape[1] - skip_first, -1)


@jax.jit
def _squares(x: Array, y: Array, weight: Array) -> dict[str, Array]:
    x, y = (z.astype(jnp.float32).reshape(len(z), -1) for z in (x, y))
    return {"changed": jnp.sum(weight * jnp.sum((y - x) ** 2, axis=-1)), "power": jnp.sum(weight * jnp.sum(x**2, -1))}


def _error(x: Array, y: Array, weight: np.ndarray, skip_first: int) -> dict[str, Array]:
    return _squares(x[:, skip_first:], y[:, skip_first:], jnp.asarray(weight))
