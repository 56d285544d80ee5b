"""The questions that have a file of their own, each as a section: perplexity by protocol, who survives, damage by
depth, texts, and whether features still act."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qsae_jax.report import plots
from qsae_jax.report.audited import rows_of
from qsae_jax.report.part import Part
from qsae_jax.report.results import Results
from qsae_jax.report.tables import Table, change, ends, estimate, number, percent


def protocols(results: Results) -> list[Part]:
    """Perplexity by protocol."""
    found = results.answers.get("perplexity")
    if not found:
        return []
    names = list(found["protocols"])
    heads = [("scheme", ""), *((name, found["protocols"][name]) for name in names)]
    of = {(row["protocol"], row["scheme"]): row for row in found["rows"]}
    schemes = list(dict.fromkeys(row["scheme"] for row in found["rows"]))
    rows = []
    for scheme in schemes:
        cells = [of[name, scheme] for name in names]
        told = [number(c["ppl"], 5) if scheme == "fp" else change(c["delta_ppl"]) for c in cells]
        rows.append(
            [scheme] + [t + ends(c, "delta_ppl", 100) * (scheme != "fp") for t, c in zip(told, cells, strict=True)]
        )
    agree = [[scheme] + [percent(of[name, scheme]["top1"]) for name in names] for scheme in schemes if scheme != "fp"]
    base = {name: of[name, "fp"]["ppl"] for name in names}
    finite = [name for name in names if base[name] is not None] or names
    low, high = (best(finite, key=lambda n: base[n] or 0) for best in (min, max))
    tops = [(row, row["intervals"]["delta_ppl"][1]) for row in found["rows"] if row["scheme"] != "fp"]
    better = [f"{row['scheme']} in {row['protocol']}" for row, top in tops if top is not None and top < 0]
    said = [f"Full precision has perplexity {number(base[low])} in {low} ({found['protocols'][low]}) and "
            f"{number(base[high])} in {high} ({found['protocols'][high]})."]  # fmt: skip
    said += [
        f"Perplexity falls, with an interval below zero, under {', '.join(better)}."
        if better
        else "No scheme lowers perplexity with an interval that lies below zero."
    ]
    said += ["A perplexity that quantization improves says that the protocol puts the model where it was not trained, "
             "or that the text is unlike its data; it does not say that the model became better."]  # fmt: skip
    return [
        Part(
            "protocols", "Change of perplexity with 95 % interval, by protocol.", plots.protocols(found["rows"], names)
        ),
        Part("protocol-table", "Perplexity of full precision, and its change.", table=Table(heads, rows), said=said),
        Part("agreement", "Tokens whose most likely prediction is full precision's.", table=Table(heads, agree)),
    ]


def survivors(results: Results) -> list[Part]:
    """Who survives, and whether the predictor carries over."""
    found = results.answers.get("predict")
    if not found:
        return []
    schemes = {name: one for name, one in found["schemes"].items() if "reason" not in one}
    if not schemes:
        reasons = [f"{name}: {one['reason']}" for name, one in found["schemes"].items()]
        return [Part("survivors", "Who survives.", table=Table([("scheme", "")], []), said=reasons)]
    names = list(next(iter(schemes.values()))["marginal"])
    heads = [("scheme", ""), ("features", "active, and the share that survives"), ("logistic", "AUC out of fold")]
    heads += [("boosting", "AUC out of fold"), ("as published", "AUC with the scaler fitted on all, folds ungrouped")]
    heads += [("Brier", "of boosting"), *((f"{name} alone", "AUC of this statistic by itself") for name in names)]
    rows = [
        [name, f"{one['n']:,}, {percent(one['positive'])}", estimate(one["logistic"]["auc"])]
        + [estimate(one["boosting"]["auc"]), number(one["paper_protocol"].get("auc"), 4)]
        + [number(one["boosting"]["brier"], 3)]
        + [number(_auc(one["marginal"][key]), 3) for key in names]
        for name, one in schemes.items()
    ]
    carried = [
        [row["trained_on"], row["judged_on"], f"{row['n']:,}", estimate(row.get("auc"))] for row in found["transfer"]
    ]
    first, one = next(iter(schemes.items()))
    best = max(names, key=lambda key: _auc(one["marginal"][key]))
    said = [
        f"Under {first}, what full precision knows of a feature tells a survivor from one that is lost in "
        f"{percent(one['boosting']['auc']['value'])} of pairs; the strongest statistic by itself is {best} "
        f"({number(_auc(one['marginal'][best]), 3)}).",
        "The statistics depend on each other (concentration is the difference of two others), so that coefficients "
        "rank nothing; and what predicts survival need not cause it.",
    ]
    heads_carried = [("trained on", ""), ("judged on", ""), ("features", ""), ("AUC", "logistic, features not seen")]
    return [
        Part("survivors", "Calibration, and survival by tenths.", plots.survivors(schemes)),
        Part("survivor-table", "Who survives?", table=Table(heads, rows), said=said),
        Part("carried", "Does the predictor carry over?", table=Table(heads_carried, carried)),
    ]


def _auc(got: float | Mapping[str, float]) -> float:
    return float(got["auc"]) if isinstance(got, Mapping) else float(got)


def parts_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in which one distortion takes one part of the model: of the distortion that takes most parts."""
    heads: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if found := re.fullmatch(r"([^+\[]+)\[[^\]]+\]", row["scheme"]):
            heads.setdefault(found[1], []).append(row)
    return max(heads.values(), key=len, default=[])


def where(results: Results) -> list[Part]:
    """Damage by depth, by block and by kind of matrix."""
    rows, parts = [row for row in rows_of(results) if row.get("errors")], []
    if rows and len(rows[0]["errors"]) > 1:
        parts.append(Part("depth", "Error of the activations at each point.", plots.depth(rows)))
    some = parts_of([row for row in rows_of(results) if not row.get("control")])
    if len(some) > 2:
        worst = min(some, key=lambda row: row["survived"])
        said = [
            f"Of these parts {worst['scheme']} costs most: it alone leaves {percent(worst['survived'])} of the "
            "features. Parts do not add up: errors of one block pass through the others, and two may cancel.",
        ]
        caption = "One part of the model distorted at a time."
        parts.append(Part("attribution", caption, plots.attribution(some), said=said))
    if results.at and results.audit:
        audits = {results.audit["point"]: results.audit} | results.at
        schemes = [row["scheme"] for row in results.audit["rows"]]
        of = {point: {row["scheme"]: row for row in one["rows"]} for point, one in audits.items()}
        heads = [("point", ""), ("active", "features"), *((name, "share that survives") for name in schemes)]
        table = [
            [point, f"{one['reference']['active']:,}"]
            + [percent(row["survived"]) + ends(row, "survived", 100) for row in map(of[point].__getitem__, schemes)]
            for point, one in audits.items()
        ]
        said = ["Each point has a dictionary of its own: a difference between points is one of dictionaries too."]
        parts.append(Part("points", "Survival at each point.", table=Table(heads, table), said=said))
    return parts


def worst(results: Results) -> list[Part]:
    """The texts of the most damaged features."""
    found = results.answers.get("contexts")
    if not found:
        return []
    caption = (
        f"The {len(found['features'])} features that {found['scheme']} damages most, on the tokens where the runs "
        "differ most and where each is strongest: shaded by the value at full precision, underlined by the twin's."
    )
    said = ["These texts are the extremes of few tokens: they illustrate, and prove nothing of what a feature means."]
    texts = [one | {"head": _headed(one)} for one in found["features"]]
    return [Part("contexts", caption, texts=texts, said=said)]


def _headed(one: dict[str, Any]) -> str:
    rates = f"{100 * one['firing_rate']:.2f} % of the tokens, {100 * one['firing_rate_twin']:.2f} % in the twin"
    return f"r {one['r'] or 0:.3f}, {one['cause'] or 'survives'}; fires on {rates}"


def acting(results: Results) -> list[Part]:
    """Whether features still act."""
    found = results.answers.get("act")
    if not found:
        return []
    features = [one for one in found["features"] if one["ablate"]["r"] is not None]
    heads = [("feature", ""), ("r", "in reading"), ("cause", "of its loss")]
    for what in ("ablate", "steer"):
        heads += [(f"{what}: r", "of its effect on logits in the two models"), ("size", "of the effect, twin / full")]
    rows = [
        [str(one["feature"]), number(one["r"], 3), one["cause"] or "–"]
        + [number(one[what][key], 3) for what in ("ablate", "steer") for key in ("r", "size")]
        for one in features
    ]
    s = found["summary"]
    said = [
        f"Over {len(features)} features under {found['scheme']}, Spearman's correlation of survival in reading with "
        f"survival in writing is {number(s['ablate']['spearman'], 3)} when they are ablated and "
        f"{number(s['steer']['spearman'], 3)} when both models are steered by the same vector; the effect's median "
        f"size in the twin is {number(s['ablate']['median_size'], 3)} and {number(s['steer']['median_size'], 3)} of "
        "full precision's.",
        "Effects are those on next-token logits in the few windows where a feature is strongest; steering by a vector "
        "that the model never meets says what the later layers do with it, not what the feature does in text.",
    ]
    return [
        Part("acting", "Survival in reading and in writing.", plots.acting(features)),
        Part("act-table", "Does the feature still act?", table=Table(heads, rows), said=said),
    ]
