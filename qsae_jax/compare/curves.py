"""Held-out FVU on the quantized model by the tokens that a dictionary learnt from, and what overtaking costs."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from qsae_jax.acts.tokens import Windows
from qsae_jax.compare.budget import overtaking
from qsae_jax.compare.fidelity import reconstruct
from qsae_jax.lm.model import LM
from qsae_jax.lm.tap import Point
from qsae_jax.sae.model import SAE
from qsae_jax.stats import Grouped, Sums, percentile, resamples


def budget_curves(
    twin: LM,
    curves: Mapping[str, Mapping[int, SAE]],
    transferred: Grouped,
    windows: Windows,
    point: Point,
    mesh: Mesh,
    **told: Any,
) -> dict[str, Any] | None:
    """For each arm of `curves` a list of FVU by tokens with intervals, beside that of the transferred dictionary; and
    from those of `retrained` the tokens after which it overtakes. None where there are no curves. `told` is
    `skip_first`, `batch` and `stopped` of `reconstruct`."""
    saes = {f"{arm} {n}": sae for arm, by in curves.items() for n, sae in by.items()}
    if not saes:
        return None
    judged = reconstruct(twin, saes, windows, point, mesh, **told) | {"sae": transferred}
    drawn = {name: fvu_drawn(got.sums) for name, got in judged.items()}
    found: dict[str, Any] = {"transferred": _ends(drawn["sae"], transferred.groups)}
    for arm, by in curves.items():
        found[arm] = [{"tokens": n} | _ends(drawn[f"{arm} {n}"], transferred.groups) for n in sorted(by)]
    budgets = sorted(curves.get("retrained", ()))
    if len(budgets) > 1:
        table = np.stack([drawn[f"retrained {n}"] for n in budgets], axis=1)
        found["overtaking"] = overtaking(np.array(budgets, float), table, drawn["sae"])
    return found


def priced(curves: Mapping[str, Any] | None, prices: Callable[[float], Mapping[str, float]] | None) -> Any:
    """The tokens after which retraining overtakes the transferred dictionary, and the seconds that they cost."""
    if not curves or "overtaking" not in curves:
        return None
    met = curves["overtaking"]
    value = met["tokens"]["value"]
    seconds = dict(prices(value)) if prices and value is not None else None
    return {key: met[key] for key in ("tokens", "beyond", "at_most")} | {"seconds": seconds}


def fvu_drawn(groups: Sums) -> Float[np.ndarray, "draws"]:
    """FVU on all windows, then in each resample of their groups: the same resamples for every dictionary."""
    n = len(groups["error"])
    counts = np.concatenate([np.ones((1, n)), resamples(n, 1000 if n > 1 else 0)])
    error, xx = (np.tensordot(counts, groups[key], axes=1) for key in ("error", "xx"))
    return error / xx


def _ends(drawn: Float[np.ndarray, "draws"], groups: int) -> dict[str, float]:
    return percentile(float(drawn[0]), drawn[1:], groups).as_dict()
