"""The audit: twins in groups that fit in memory, one pass over the tokens for each group, then `audit.json` and
`features.parquet`. Dictionaries at several points are judged in the same passes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from qsae_jax.acts.tokens import Windows, check_windows, in_order, windows_per_forward
from qsae_jax.audit.contexts import waited
from qsae_jax.audit.match import Matching, sentences
from qsae_jax.audit.perplexity import Losses
from qsae_jax.audit.result import Audit, Told, assemble, tell
from qsae_jax.audit.survival import Survival
from qsae_jax.errors import UserError
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
) -> dict[str, Audit]:
    """The same for dictionaries at several points of the model, in the same passes: an audit for each point.

    Twins see each batch of windows in turn; statistics are sums, so memory does not grow with the number of tokens,
    and no more twins are held than fit (`at_once`), so it does not grow with the number of schemes. `errors_at` names
    points where only the error of the activations is measured; `match` is how many tokens strengths of matched
    controls are found on (0: all). `facts` (model and dictionary names, notes) go into the result as they are."""
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
    applied, matches = Matching(lm, some, batch, mesh).resolve(named)
    told: dict[Point, list[Told]] = {point: [] for point in at}
    groups = in_groups(applied, at_once(lm))
    with progress("audit", len(groups) * len(windows) * windows.seq) as advance, stop_signal() as stopped:
        for group in groups:
            done = _pass(lm, at, group, windows, elsewhere, skip_first, batch, mesh, advance, stopped)
            for point, survival in done.survivals.items():
                told[point].append(tell(survival, done.losses, done.weight_errors, done.errors))
            del done
            return_freed()
    facts = {"model": "", "sae": "", "processing": lm.config.processing} | dict(facts or {})
    facts["notes"] = [*facts.get("notes", ()), *notes, *sentences(matches)]
    facts["tokens"] = windows.described(skip_first)
    marks: dict[str, dict[str, Any]] = {
        name: {"control": scheme.control, "of": scheme.of, "family": scheme.family} for name, scheme in named.items()
    }
    for name, match_found in matches.items():
        marks[name]["matched"] = match_found
    return {str(point): assemble(parts, marks, facts | {"point": str(point)}) for point, parts in told.items()}


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

    survivals: dict[Point, Survival]
    losses: Losses
    weight_errors: dict[str, float]
    errors: dict[str, dict[Point, Totals]]
    """Scheme -> point without a dictionary -> sums of the activations' error."""


def _pass(
    lm: LM,
    saes: Mapping[Point, SAE],
    group: Mapping[str, Scheme],
    windows: Windows,
    elsewhere: tuple[Point, ...],
    skip_first: int,
    batch: int,
    mesh: Mesh,
    advance: Callable[..., None],
    stopped: Callable[[], bool],
) -> Pass:
    twins, sizes = {"fp": lm}, {}
    for name, scheme in group.items():
        twins[name] = fake_quantize(lm, scheme)
        sizes[name] = weight_errors(lm, twins[name])["all"]
    survivals = {point: Survival(sae, list(twins), len(windows)) for point, sae in saes.items()}
    errors = {name: {point: Totals() for point in elsewhere} for name in group}
    done, first = Pass(survivals, Losses(list(twins), len(windows)), sizes, errors), 0
    for ids, weight in in_order(windows, windows_per_forward(batch, windows, mesh)):
        tokens = on_data(ids, mesh)
        seen = _seen(twins, (*saes, *elsewhere, FINAL), tokens, stopped)
        for i, point in enumerate(saes):
            acts = {name: _counted(x[i], skip_first) for name, x in seen.items()}
            done.survivals[point].add(acts, weight, first)
        for i, point in enumerate(elsewhere, start=len(saes)):
            for name in group:
                done.errors[name][point].add(**jax.device_get(_error(seen["fp"][i], seen[name][i], weight, skip_first)))
        done.losses.add(list(twins.values()), [x[-1] for x in seen.values()], tokens, weight, first)
        first += int(weight.sum())
        advance(int(weight.sum()) * windows.seq, ppl=done.losses.perplexity("fp"))
    return done


def _seen(
    twins: Mapping[str, LM], wanted: tuple[Point, ...], tokens: Int[Array, "b s"], stopped: Callable[[], bool]
) -> dict[str, tuple[Array, ...]]:
    return {name: waited(activations(twin, wanted, tokens), stopped) for name, twin in twins.items()}


def _counted(x: Float[Array, "b s ..."], skip_first: int) -> Float[Array, "b p d"]:
    """The positions that statistics count, heads and their widths as one."""
    return x[:, skip_first:].reshape(len(x), x.shape[1] - skip_first, -1)


@jax.jit
def _squares(x: Array, y: Array, weight: Array) -> dict[str, Array]:
    x, y = (z.astype(jnp.float32).reshape(len(z), -1) for z in (x, y))
    return {"changed": jnp.sum(weight * jnp.sum((y - x) ** 2, axis=-1)), "power": jnp.sum(weight * jnp.sum(x**2, -1))}


def _error(x: Array, y: Array, weight: np.ndarray, skip_first: int) -> dict[str, Array]:
    return _squares(x[:, skip_first:], y[:, skip_first:], jnp.asarray(weight))
