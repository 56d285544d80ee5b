"""Numbers -> tables and the sentences that open a page. A missing number is a dash, never a zero."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qsae_jax.report.results import Columns, Results

WORST = 20
Cell = Callable[[dict[str, Any]], str]


@dataclass(frozen=True)
class Table:
    """Heads with what they mean (shown on hovering), and rows of text."""

    heads: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[str]]


def number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None or value != value else f"{value:,.{digits}g}"


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or value != value else f"{100 * value:.{digits}f} %"


def change(value: float | None) -> str:
    return "–" if value is None or value != value else f"{100 * value:+.2f} %"


AUDIT: tuple[tuple[str, str, Cell], ...] = (
    ("scheme", "how the weights were distorted; in brackets the control that was matched", lambda r: named(r)),
    ("perplexity", "over every predicted token", lambda r: number(r["ppl"], 5)),
    ("change", "relative to full precision", lambda r: change(r["delta_ppl"])),
    ("KL", "mean KL(full precision, twin) per token, nats", lambda r: number(r["kl"], 3)),
    (
        "weight error",
        "relative Frobenius norm over all block matrices, and embedding and head where touched",
        lambda r: number(r["weight_rel_error"], 3),
    ),
    ("activation error", "sum |a_q - a|^2 / sum |a|^2", lambda r: number(r["activation_rel_mse"], 3)),
    ("survived", "r > 0.9", lambda r: percent(r["survived"])),
    ("blurred", "0.5 <= r <= 0.9", lambda r: percent(r["blurred"])),
    ("damaged", "r < 0.5", lambda r: percent(r["damaged"])),
    ("mean r", "over active features", lambda r: number(r["mean_r"], 3)),
    ("median r", "over active features", lambda r: number(r["median_r"], 3)),
    ("FVU", "of the frozen dictionary on the twin", lambda r: number(r["fvu"], 3)),
    ("L0", "features that fire on a token", lambda r: number(r["l0"], 3)),
)


def named(row: dict[str, Any]) -> str:
    """The scheme, and what was found for one that is matched by perplexity."""
    return row["scheme"] + (f" ({row['matched']['scheme']})" if row.get("matched") else "")


def audit_table(audit: dict[str, Any]) -> Table:
    """One row a scheme, full precision first."""
    base = audit["reference"]
    first = {"scheme": "fp", "ppl": base["ppl"], "fvu": base["fvu"], "l0": base["l0"]}
    rows = [dict.fromkeys(audit["rows"][0]) | first] if audit["rows"] else []
    made = [[cell(row) for _, _, cell in AUDIT] for row in [*rows, *audit["rows"]]]
    return Table([(name, why) for name, why, _ in AUDIT], made)


def whole(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:,.0f}"


def interval(
    got: dict[str, float | None], share: bool = False, show: Callable[[float | None], str] | None = None
) -> str:
    show = show or (percent if share else lambda x: number(x, 3))
    if got["low"] == got["high"] == got["value"]:
        return show(got["value"])
    ends = [show(got[name]).removesuffix(" %") for name in ("low", "high")]
    return f"{show(got['value'])} [{', '.join(ends)}]"


def ends(row: dict[str, Any], key: str, scale: float = 1.0) -> str:
    """The interval that a row has of one of its numbers, where it has one."""
    low, high = (row.get("intervals") or {}).get(key) or (None, None)
    return "" if low is None or high is None else f" [{scale * low:.3g}, {scale * high:.3g}]"


def estimate(got: Mapping[str, float | None] | float | None) -> str:
    """A number, with its interval where it has one."""
    if not isinstance(got, Mapping):
        return number(got, 3)
    if got["low"] is None:
        return number(got["value"], 3)
    return f"{number(got['value'], 3)} [{number(got['low'], 3)}, {number(got['high'], 3)}]"


def worst_table(columns: Columns, counted: int) -> Table:
    """The active features with the lowest r; on how many of the counted tokens they fire."""
    active = np.flatnonzero(columns["active"])
    r = np.nan_to_num(columns["r"], nan=0.0)
    order = active[np.argsort(r[active], kind="stable")][:WORST]
    columns = columns | {f"tokens{t}": np.round(columns[f"firing_rate{t}"] * counted) for t in ("", "_twin")}
    names = (
        "tokens",
        "tokens_twin",
        "mean_activation",
        "mean_activation_twin",
        "max_activation",
        "max_activation_twin",
    )
    heads = [("feature", "index of the latent"), ("r", "correlation of its value in the two runs")]
    heads += [("tokens", "on which it fires at full precision"), ("tokens twin", "on which it fires in the twin")]
    heads += [(name.replace("_", " "), "") for name in names[2:]]
    rows = [
        [str(columns["feature"][i]), number(float(r[i]), 3)] + [number(float(columns[n][i]), 3) for n in names]
        for i in order
    ]
    return Table(heads, rows)


def worst_scheme(results: Results) -> str | None:
    """The scheme of the comparison where it was audited, else the one with most damage; never a control."""
    if not results.audit or not results.features:
        return None
    wanted = (results.compare or {}).get("scheme")
    rows = [row for row in results.audit["rows"] if not is_control(row)] or results.audit["rows"]
    names = [row["scheme"] for row in rows]
    if wanted in names:
        return wanted
    return max(rows, key=lambda row: (row["damaged"] or 0, -(row["survived"] or 0)))["scheme"] if rows else None


def sentences(results: Results) -> list[str]:
    """What a reader in a hurry should take away, each from the numbers."""
    said = []
    if results.audit:
        rows = {row["scheme"]: row for row in results.audit["rows"] if row["survived"] is not None}
        said += [_missed(list(rows.values()))] + [_worst(row, results.audit) for row in _most_bitten(rows)]
        said += [_control(row, rows) for row in rows.values()] + _draws(list(rows.values()))
    return [sentence for sentence in said if sentence]


def _missed(rows: list[dict[str, Any]]) -> str:
    real = [row for row in rows if not is_control(row) and row["delta_ppl"] is not None]
    quiet = [row for row in real if abs(row["delta_ppl"]) < 0.02 and row["survived"] < 0.95]
    if not quiet:
        return ""
    row = min(quiet, key=lambda row: row["survived"])
    return (
        f"{row['scheme']} changes perplexity by only {change(row['delta_ppl'])}, "
        f"yet {percent(1 - row['survived'])} of the active features no longer survive."
    )


def is_control(row: dict[str, Any]) -> bool:
    """Whether a row is no quantizer, but what one is compared with."""
    return row.get("control", "@" in row["scheme"])


def _draws(rows: list[dict[str, Any]]) -> list[str]:
    """How far apart the draws of one random distortion are."""
    families: dict[str, list[float]] = {}
    for row in rows:
        families.setdefault(re.sub(r"#\d+", "", row["scheme"]), []).append(row["survived"])
    return [
        f"{len(shares)} draws of {name}: {percent(min(shares))} to {percent(max(shares))} of the features survive."
        for name, shares in families.items()
        if len(shares) > 1
    ]


def _most_bitten(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    real = [row for row in rows.values() if not is_control(row)]
    return [min(real, key=lambda row: row["survived"])] if real else []


def _worst(row: dict[str, Any], audit: dict[str, Any]) -> str:
    return (
        f"{row['scheme']}: of {audit['reference']['active']:,} active features {percent(row['survived'])} survive, "
        f"{percent(row['blurred'])} are blurred and {percent(row['damaged'])} damaged; perplexity "
        f"{number(audit['reference']['ppl'])} becomes {number(row['ppl'])}."
    )


def _control(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    base = rows.get(row["scheme"].removeprefix("noise@"))
    if not row["scheme"].startswith("noise@") or not base:
        return ""
    return (
        f"Gaussian weight noise of the same size as {base['scheme']}'s error damages {percent(row['damaged'])} "
        f"where rounding damages {percent(base['damaged'])}: the control for damage by any perturbation of that size."
    )
