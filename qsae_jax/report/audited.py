"""What an audit's own file answers: what was expected, why features are lost, controls, and overlap. Each section says
what its numbers say, and what they cannot say."""

from collections.abc import Mapping
from typing import Any

from qsae_jax.report import plots
from qsae_jax.report.part import Part
from qsae_jax.report.results import Results
from qsae_jax.report.tables import Table, ends, estimate, is_control, named, number, percent


def rows_of(results: Results) -> list[dict[str, Any]]:
    """The rows of an audit that say why features are lost; an older audit has none."""
    rows = results.audit["rows"] if results.audit else []
    return [row for row in rows if row.get("causes") and row["survived"] is not None]


def lost(results: Results) -> list[Part]:
    """How features follow, and why they are lost."""
    rows = rows_of(results)
    if not rows:
        return []
    heads = [("scheme", ""), ("survived", "r > 0.9, with 95 % interval over groups of windows")]
    heads += [("of the scored", "the same without features that fire on too few tokens")]
    heads += [("median r", "of values, zeros included"), ("r pre", "median r of pre-activations")]
    heads += [("r either", "median r over tokens on which either run fires")]
    heads += [("Jaccard", "median of tokens on which both fire / either does")]
    heads += [("gain", "median slope of the twin's value on full precision's")]
    heads += [("reliability", "of r, by split halves")]
    heads += [(name, "share of the active features that are lost so") for name, _ in plots.CAUSES]
    table = [
        [named(row), percent(row["survived"]) + ends(row, "survived", 100), percent(row["scored"]["survived"])]
        + [number(row[f"median_{key}"], 3) for key in ("r", "r_pre", "r_either", "jaccard", "gain")]
        + [number(row["reliability"]["whole"], 3)]
        + [percent(row["causes"][name]) for name, _ in plots.CAUSES]
        for row in rows
    ]
    worst = min((row for row in rows if not is_control(row)), key=lambda row: row["survived"], default=rows[0])
    causes = {name: worst["causes"][name] for name, _ in plots.CAUSES}
    most = max(causes, key=lambda name: causes[name])
    said = [
        f"Under {worst['scheme']}, {percent(1 - worst['survived'])} of the active features no longer survive; of all "
        f"active features {percent(causes[most])} are lost as {most}, which is the largest cause. Pre-activations have "
        f"a median r of {number(worst['median_r_pre'], 3)} where values have {number(worst['median_r'], 3)}: what lies "
        "between is the threshold, or the choice of the largest."
    ]
    base = results.audit["reference"] if results.audit else {}
    few = base["active"] - base["scored"]
    said += [
        "It cannot say that a lost feature is gone: its direction may be read by latents that this dictionary does not "
        f"have. {few:,} of {base['active']:,} active features fire on too few tokens for r to mean much."
    ]
    return [
        Part("causes", "Why features are lost.", plots.causes(rows)),
        Part("lost", "How features follow, in numbers.", table=Table(heads, table), said=said),
    ]


def related(pair: Mapping[str, Any], marks: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether one of two schemes is a control made for the other."""
    one, other = pair["scheme"], pair["other"]
    return marks[other].get("of") == one or marks[one].get("of") == other


def controls(results: Results) -> list[Part]:
    """Whether a quantizer does more than a perturbation of the same size, paired over tokens."""
    pairs = (results.audit or {}).get("differences", [])
    marks = {row["scheme"]: row for row in rows_of(results)}
    some = [p for p in pairs if p["scheme"] in marks and p["other"] in marks]
    some = [p for p in some if len(pairs) <= 15 or related(p, marks)]
    if not some:
        return []
    heads = [("scheme", ""), ("less", "the scheme that is subtracted")]
    heads += [(key, "difference of the shares, points, with 95 % interval") for key in ("survived", "damaged")]
    heads += [("mean r", "difference, with 95 % interval")]

    def cell(gap: Mapping[str, float | None], scale: float) -> str:
        if gap["low"] is None or gap["value"] is None or gap["high"] is None:
            return number(gap["value"] * scale if gap["value"] is not None else None, 3)
        return f"{scale * gap['value']:+.3g} [{scale * gap['low']:+.3g}, {scale * gap['high']:+.3g}]"

    rows = [
        [p["scheme"], p["other"]] + [cell(p[key], 100) for key in ("survived", "damaged")] + [cell(p["mean_r"], 1)]
        for p in some
    ]
    draws = (results.audit or {}).get("draws", [])
    said = [
        f"{one['draws']} draws of {one['family']}: {percent(one['survived']['value'])} of the features survive on "
        f"average, and one more draw is to be expected between {percent(one['survived']['low'])} and "
        f"{percent(one['survived']['high'])}."
        for one in draws
    ]
    said += [
        "An interval that holds 0 is no finding. It covers the choice of tokens, not that of weights: a single draw of "
        "noise says little of noise, and one model, dictionary and text say nothing of others."
    ]
    return [Part("differences", "Schemes beside each other, on the same tokens.", table=Table(heads, rows), said=said)]


def overlap(results: Results) -> list[Part]:
    """Whether two schemes lose the same features."""
    pairs = (results.audit or {}).get("overlap", [])
    marks = {row["scheme"]: row for row in rows_of(results)}
    some = [p for p in pairs if p["scheme"] in marks and p["other"] in marks]
    some = [p for p in some if len(pairs) <= 15 or related(p, marks)]
    if not some:
        return []
    heads = [("scheme", ""), ("other", ""), ("lost at", "r at or below"), ("sets", "features lost by each, by both")]
    heads += [("Jaccard", "both / either, with 95 % interval"), ("chance", "were the sets independent")]
    heads += [("ceiling", "the largest that sets of these sizes can have")]
    heads += [("Spearman", "of damage 1 - r over all active features")]
    rows = []
    for p in some:
        for at in p["lost"]:
            rows.append(
                [
                    *(p["scheme"], p["other"], f"{at['threshold']:g}"),
                    f"{at['one']:,} / {at['other']:,} / {at['both']:,}",
                    *(estimate(at["jaccard"]), number(at["chance"], 3), number(at["ceiling"], 3)),
                    estimate(p["spearman"]),
                ]
            )
    said = [
        "A Jaccard index is to be read between its chance level and its ceiling, which the sizes of the sets fix "
        "before anything is known of who is in them. High overlap says that the same features are weak under both; it "
        "does not say that both act in the same way."
    ]
    return [Part("overlap", "Do they lose the same features?", table=Table(heads, rows), said=said)]


def expected(results: Results) -> list[Part]:
    """What was published, beside what is found here."""
    asked = ((results.run or {}).get("settings") or {}).get("expected") or {}
    if not asked.get("rows") or not results.audit:
        return []
    ours = {row["scheme"]: row for row in results.audit["rows"]} | {"fp": results.audit["reference"]}
    heads = [
        ("scheme", ""),
        ("number", ""),
        ("published", ""),
        ("here", ""),
        ("off by", "relative for perplexity, else the difference"),
        ("within tolerance", ""),
    ]
    rows, held = [], []
    for scheme, numbers in asked["rows"].items():
        for key, value in numbers.items():
            got = ours.get(scheme, {}).get(key)
            within = asked["within"].get(key)
            off = None if got is None else got / value - 1 if key == "ppl" else got - value
            verdict = "–" if off is None or within is None else "yes" if abs(off) <= within else "no"
            held += [verdict] * (verdict != "–")
            rows.append(
                [
                    scheme,
                    key,
                    number(value, 5),
                    number(got, 5),
                    "–" if off is None else f"{off:+.1%}" if key == "ppl" else f"{off:+.3g}",
                    verdict,
                ]
            )
    said = [
        f"{held.count('yes')} of {len(held)} published numbers are within their tolerance. Source: {asked['source']}."
    ]
    return [Part("expected", "Published and found.", table=Table(heads, rows), said=said)]
