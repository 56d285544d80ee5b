"""Figures of the questions beyond the audit, in the style of figures.py."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import PercentFormatter

from qsae_jax.report.figures import BLUE, CYCLE, FAINT, GREEN, ORANGE, PINK, RED, SKY, STYLE, drawing, spread, svg

CAUSES = (("noisy", SKY), ("flicker", ORANGE), ("silenced", RED), ("rotated", PINK))


def causes(rows: Sequence[dict[str, Any]]) -> str:
    """Every lost feature by its cause, one bar a scheme."""
    with matplotlib.rc_context(STYLE):
        figure, (ax,) = drawing(8.6, 0.6 + 0.42 * len(rows))
        left = np.zeros(len(rows))
        for name, colour in CAUSES:
            share = np.array([row["causes"][name] or 0.0 for row in rows])
            ax.barh(range(len(rows)), share, left=left, color=colour, label=name, height=0.72)
            for i, (x, start) in enumerate(zip(share, left, strict=True)):
                if x > 0.05:
                    ax.text(start + x / 2, i, f"{100 * x:.0f} %", ha="center", va="center", color="black", fontsize=10)
            left += share
        ax.set_yticks(range(len(rows)), [row["scheme"] for row in rows])
        ax.set(xlim=(0, 1), xlabel="share of active features that no longer survive")
        ax.xaxis.set_major_formatter(PercentFormatter(1))
        ax.invert_yaxis()
        ax.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
        return svg(figure, "causes")


def depth(rows: Sequence[dict[str, Any]]) -> str:
    """The error of the activations at each point that was measured, one line a scheme."""
    names = spread([row["scheme"] for row in rows])
    with matplotlib.rc_context(STYLE):
        figure, (ax,) = drawing(8.6, 3.2)
        for i, row in enumerate(row for row in rows if row["scheme"] in names):
            values = [np.nan if v is None else v for v in row["errors"].values()]
            dash = "--" if row.get("control") else "-"
            ax.plot(
                range(len(values)), values, dash, marker="o", ms=3, color=CYCLE[i % len(CYCLE)], label=row["scheme"]
            )
        points = list(rows[0]["errors"])
        step = max(len(points) // 8, 1)
        ax.set_xticks(range(0, len(points), step), [name.removeprefix("blocks.") for name in points[::step]])
        ax.set(yscale="log", ylabel="activation error", xlabel="point")
        ax.grid(axis="y", lw=0.7)
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(figure, "depth")


def attribution(rows: Sequence[dict[str, Any]]) -> str:
    """What each part of the model costs when it alone is distorted: features, and KL."""
    with matplotlib.rc_context(STYLE):
        figure, axes = drawing(8.6, 0.9 + 0.26 * len(rows), 2, sharey=True)
        lost = [1 - row["survived"] for row in rows]
        for ax, values, title, colour in (
            (axes[0], lost, "features that no longer survive", RED),
            (axes[1], [row["kl"] or 0.0 for row in rows], "KL, nats", BLUE),
        ):
            ax.barh(range(len(rows)), values, color=colour, height=0.7)
            ax.set_title(title)
            ax.grid(axis="x", lw=0.7)
        for ax in axes[:1]:
            ax.xaxis.set_major_formatter(PercentFormatter(1))
        axes[0].set_yticks(range(len(rows)), [row["scheme"] for row in rows], fontsize=9)
        axes[0].invert_yaxis()
        return svg(figure, "attribution")


def protocols(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """The change of perplexity with its interval, one panel a protocol."""
    with matplotlib.rc_context(STYLE):
        schemes = list(dict.fromkeys(row["scheme"] for row in rows if row["scheme"] != "fp"))
        figure, axes = drawing(9.4, 0.9 + 0.36 * len(schemes), len(names), sharey=True)
        for ax, name, colour in zip(axes, names, (CYCLE * len(names))[: len(names)], strict=True):
            of = {row["scheme"]: row for row in rows if row["protocol"] == name}
            for i, scheme in enumerate(schemes):
                value, (low, high) = of[scheme]["delta_ppl"], of[scheme]["intervals"]["delta_ppl"]
                if value is not None:
                    ax.plot(
                        [value if low is None else low, value if high is None else high],
                        [i, i],
                        color=colour,
                        lw=2.4,
                        solid_capstyle="round",
                    )
                    ax.plot(value, i, "o", color=colour, ms=5)
            ax.axvline(0, color=FAINT, lw=1, ls=":")
            ax.set_title(name)
            ax.set_xscale("symlog", linthresh=0.1)
            ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            ax.tick_params(axis="x", labelrotation=45)
        axes[0].set_yticks(range(len(schemes)), schemes)
        axes[0].invert_yaxis()
        return svg(figure, "protocols")


def survivors(schemes: Mapping[str, dict[str, Any]]) -> str:
    """How well the predictor is calibrated, and survival by tenths of what full precision knows."""
    shown = {name: one for name in spread(list(schemes)) if "reason" not in (one := schemes[name])}
    with matplotlib.rc_context(STYLE):
        figure, axes = drawing(9.4, 3.1, 3)
        for i, (name, one) in enumerate(shown.items()):
            colour = CYCLE[i % len(CYCLE)]
            bins = one["boosting"]["calibration"]
            axes[0].plot([b["predicted"] for b in bins], [b["observed"] for b in bins], "o-", ms=3, color=colour)
            for ax, key in ((axes[1], "firing_rate"), (axes[2], "max_activation")):
                tenths = one["deciles"][key]
                ax.plot(
                    range(1, len(tenths) + 1), [t["survived"] for t in tenths], "o-", ms=3, color=colour, label=name
                )
        axes[0].plot([0, 1], [0, 1], color=FAINT, lw=1, ls=":")
        axes[0].set(xlabel="predicted share", ylabel="share that survives", title="calibration (boosting)")
        axes[1].set(xlabel="tenths by firing rate", title="by firing rate")
        axes[2].set(xlabel="tenths by peak activation", title="by peak activation")
        for ax in axes:
            ax.set_ylim(-0.03, 1.03)
            ax.yaxis.set_major_formatter(PercentFormatter(1))
        axes[2].legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(figure, "survivors")


def acting(features: Sequence[dict[str, Any]]) -> str:
    """Survival in reading beside survival in writing, one dot a feature."""
    with matplotlib.rc_context(STYLE):
        figure, axes = drawing(8.6, 3.6, 2, sharey=True)
        for ax, what, title, colour in ((axes[0], "ablate", "ablated", BLUE), (axes[1], "steer", "steered", GREEN)):
            some = [one for one in features if one[what]["r"] is not None and one["r"] is not None]
            ax.plot([one["r"] for one in some], [one[what]["r"] for one in some], "o", color=colour, ms=5, alpha=0.8)
            ax.plot([0, 1], [0, 1], color=FAINT, lw=1, ls=":")
            ax.set(title=title, xlabel="reading: r of the feature's value")
            ax.grid(lw=0.7)
        axes[0].set_ylabel("writing: r of its effect on logits")
        return svg(figure, "acting")


def budgets(curves: Mapping[str, Any], name: str) -> str:
    """FVU by tokens: what was retrained and what was fine-tuned, beside the dictionary that was carried over."""
    with matplotlib.rc_context(STYLE):
        figure, (ax,) = drawing(8.6, 3.4)
        level, met = curves["transferred"], curves.get("overtaking")
        ax.axhline(level["value"], color=RED, label="transferred")
        if level["low"] is not None:  # one window has no interval
            ax.axhspan(level["low"], level["high"], color=RED, alpha=0.15, lw=0)
        for arm, colour in (("retrained", GREEN), ("finetuned", PINK)):
            points = curves.get(arm, [])
            at = [p["tokens"] for p in points]
            values, low, high = (np.array([p[key] for p in points], float) for key in ("value", "low", "high"))
            ends = np.stack([values - low, high - values]).clip(0)
            ax.errorbar(at, values, yerr=ends, fmt="o-", ms=5, color=colour, label=arm)
        if met and met["law"] and met["tokens"]["value"] is not None:
            law, first, last = met["law"], curves["retrained"][0]["tokens"], curves["retrained"][-1]["tokens"]
            at = np.geomspace(first, max(last, min(met["tokens"]["value"], 100 * last)), 60)
            ax.plot(at, law["floor"] + law["scale"] * at ** -law["power"], color=GREEN, ls=":", lw=1.4)
        ax.set(xscale="log", xlabel="tokens", ylabel="FVU on the quantized model")
        seen = sorted({p["tokens"] for arm in ("retrained", "finetuned") for p in curves.get(arm, [])})
        ax.set_xticks(seen, [f"{x:,}" for x in seen])
        ax.minorticks_off()
        ax.grid(lw=0.7)
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(figure, name)
