"""Figures as SVG that take the page's colours, so that one page serves a light and a dark screen.

Two colours stand for others while Matplotlib draws: INK becomes `currentColor`, FAINT the page's `--line`. The rest
is the palette of Okabe and Ito, which colour-blind readers tell apart; bars also carry their numbers.
"""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from qsae_jax.report.results import Columns

INK, FAINT = "#010203", "#040506"
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
RED, PINK, SKY, YELLOW = "#D55E00", "#CC79A7", "#56B4E9", "#BFA900"
CYCLE = (BLUE, RED, GREEN, PINK, ORANGE, SKY, YELLOW)
STYLE: Any = {
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor"], INK),
    **dict.fromkeys(["axes.edgecolor", "xtick.color", "ytick.color", "grid.color"], FAINT),
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element, the same text for the same numbers."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(FAINT, "var(--line)")
    return text.replace("<svg", f'<svg role="img" aria-labelledby="caption-{name}"', 1)


def drawing(width: float, height: float, columns: int = 1, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches with its panels side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, sharey=sharey, squeeze=False)[0]
    for ax in axes:
        ax.set_axisbelow(True)
    return figure, list(axes)


def bands(rows: Sequence[dict[str, Any]]) -> str:
    """Shares of survived, blurred and damaged features, one bar a scheme."""
    with matplotlib.rc_context(STYLE):
        figure, (ax,) = drawing(8.6, 0.6 + 0.42 * len(rows))
        left = np.zeros(len(rows))
        for name, colour in (("survived", BLUE), ("blurred", SKY), ("damaged", RED)):
            share = np.array([row[name] or 0.0 for row in rows])
            ax.barh(range(len(rows)), share, left=left, color=colour, label=name, height=0.72)
            for i, (x, start) in enumerate(zip(share, left, strict=True)):
                if x > 0.045:
                    dark = "white" if name != "blurred" else "black"
                    ax.text(start + x / 2, i, f"{100 * x:.0f} %", ha="center", va="center", color=dark, fontsize=10)
            left += share
        for i in np.flatnonzero(left == 0):
            ax.text(0.01, float(i), "no active feature", va="center", fontsize=10)
        ax.set_yticks(range(len(rows)), [row["scheme"] for row in rows])
        ax.set(xlim=(0, 1), xlabel="share of active features")
        ax.xaxis.set_major_formatter(PercentFormatter(1))
        ax.invert_yaxis()
        ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
        return svg(figure, "bands")


def perplexity(rows: Sequence[dict[str, Any]]) -> str:
    """What perplexity sees beside what features see, scheme by scheme."""
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = drawing(8.6, 0.9 + 0.36 * len(rows), 2, sharey=True)
        panels = (
            (left, "delta_ppl", "perplexity, change", BLUE, lambda x: f"{100 * x:+,.{0 if x >= 0.1 else 2}f} %"),
            (right, "survived", "features that no longer survive", RED, lambda x: f"{100 * x:.1f} %"),
        )
        for ax, key, label, colour, text in panels:
            given = [np.nan if row[key] is None else row[key] for row in rows]
            values = [x if key == "delta_ppl" else 1 - x for x in given]
            ax.barh(range(len(rows)), np.nan_to_num(values), color=colour, height=0.6)
            for i, x in enumerate(values):
                ax.annotate(
                    "–" if np.isnan(x) else text(x),
                    (max(np.nan_to_num(x), 0), i),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=10,
                )
            ax.set_title(label)
            ax.xaxis.set_major_formatter(PercentFormatter(1))
            ax.margins(x=0.18)
        right.set_xlim(0, 1.15)
        right.set_xticks([0, 0.25, 0.5, 0.75, 1])
        left.set_yticks(range(len(rows)), [row["scheme"] for row in rows])
        left.invert_yaxis()
        return svg(figure, "perplexity")


def deciles(values: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Median of r in each tenth of the features, ordered by `values`; NaN for an empty tenth."""
    parts = np.array_split(r[np.argsort(values, kind="stable")], 10)
    return np.array([np.median(part) if len(part) else np.nan for part in parts])


def spread(names: list[str]) -> list[str]:
    """As many names as there are colours, evenly from the list."""
    if len(names) <= len(CYCLE):
        return names
    return [names[i] for i in np.linspace(0, len(names) - 1, len(CYCLE)).round().astype(int)]


def by_decile(features: dict[str, Columns]) -> str:
    """Median r by how often a feature fires, and by how strongly it does at most."""
    with matplotlib.rc_context(STYLE):
        figure, axes = drawing(8.6, 3.1, 2, sharey=True)
        panels = (("firing_rate", "firing rate"), ("max_activation", "peak activation"))
        for ax, (key, label) in zip(axes, panels, strict=True):
            for i, (scheme, columns) in enumerate(features.items()):
                active = columns["active"].astype(bool)
                median = deciles(columns[key][active], np.nan_to_num(columns["r"][active]))
                dash = "--" if scheme.startswith("noise@") else "-"
                ax.plot(range(1, 11), median, dash, marker="o", ms=3.5, color=CYCLE[i % len(CYCLE)], label=scheme)
            ax.set(xticks=range(1, 11), xlabel=f"tenths by {label}, lowest first")
            ax.axhline(0.9, color=FAINT, lw=1, ls=":")
            ax.axhline(0.5, color=FAINT, lw=1, ls=":")
        axes[0].set_ylabel("median r")
        axes[0].set_ylim(top=1.03)
        axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(figure, "deciles")


ARM_PANELS = (
    *(("fvu", "FVU (lower is better)"), ("ce_recovered", "CE recovered"), ("kl_recovered", "KL recovered")),
    ("alive", "alive"),
)
ARM_COLOURS = {"reference": BLUE, "transferred": RED, "retrained": GREEN, "reseeded": ORANGE, "adapted": PINK}


def arms(rows: Sequence[dict[str, Any]], name: str = "arms") -> str:
    """Every dictionary on every model: value and 95 % interval, four measures side by side."""
    with matplotlib.rc_context(STYLE):
        figure, axes = drawing(9.4, 0.9 + 0.4 * len(rows), len(ARM_PANELS), sharey=True)
        for ax, (key, label) in zip(axes, ARM_PANELS, strict=True):
            for i, row in enumerate(rows):
                got = {name: np.nan if value is None else value for name, value in row[key].items()}
                colour = ARM_COLOURS.get(row["arm"], BLUE)
                ax.plot([got["low"], got["high"]], [i, i], color=colour, lw=2.4, solid_capstyle="round")
                ax.plot(got["value"], i, "o", color=colour, ms=6)
            ax.set_title(label)
            ax.grid(axis="x", lw=0.7)
            ax.margins(x=0.12, y=0.12)
            ax.locator_params(axis="x", nbins=3)
        axes[0].set_yticks(range(len(rows)), [f"{row.get('how') or row['arm']} on {row['judged_on']}" for row in rows])
        axes[0].invert_yaxis()
        return svg(figure, name)


def training(curves: dict[str, list[dict[str, float]]]) -> str:
    """FVU and share of dead latents over the tokens seen."""
    with matplotlib.rc_context(STYLE):
        figure, axes = drawing(8.6, 2.9, 2)
        for ax, (key, label) in zip(axes, (("fvu", "FVU of a batch"), ("dead", "dead latents")), strict=True):
            for i, (name, lines) in enumerate(curves.items()):
                tokens, values = ([line[k] for line in lines] for k in ("tokens", key))
                ax.plot(tokens, values, color=CYCLE[i % len(CYCLE)], lw=1.5, label=name)
            ax.set_title(label)
            ax.set_xlabel("tokens")
            ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
            ax.locator_params(axis="x", nbins=4)
            ax.grid(axis="y", lw=0.7)
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes[0].yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if str(f"{x:e}")[0] in "235" else "")
        axes[1].yaxis.set_major_formatter(PercentFormatter(1))
        axes[1].set_ylim(bottom=0)
        axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(figure, "training")
