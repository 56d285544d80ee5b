"""The tables of a comparison: every arm, the gaps that the verdict rests on, likeness, and the price of retraining."""

from collections.abc import Sequence
from typing import Any

from qsae_jax.devices import ASSUMED, MEASURED
from qsae_jax.report.tables import Table, interval, number, whole


def arm_name(row: dict[str, Any]) -> str:
    """The arm, and what was done to it."""
    return f"{row['arm']} ({row['how']})" if row.get("how") else row["arm"]


def verdicts_table(found: Sequence[dict[str, Any]]) -> Table:
    """One row for each scheme: the verdict, the gap of the dictionary carried over, and what makes up for it."""
    heads = [("scheme", ""), ("verdict", ""), ("by", "the cheapest adaptation that is within the margin")]
    heads += [("FVU gap", "of the dictionary carried over to the retrained one, paired"), ("its margin", "")]
    heads += [("loss gap", "nats per token, paired"), ("its margin", "")]
    heads += [("overtaken after", "tokens after which retraining overtakes the dictionary carried over")]
    rows = []
    for one in found:
        told = one["verdict"]
        gap, price = told["gaps"]["transferred"], told.get("price")
        cells = [cell for name in ("fvu", "loss") for cell in (interval(gap[name]), number(told["margin"][name], 3))]
        after = interval(price["tokens"], show=whole) if price else "–"
        at_most = "at most " if price and price.get("at_most") else ""
        by = told["how"] if told["choice"] == "adapt" else "–"
        rows.append([one["scheme"], told["choice"], by, *cells, at_most + after])
    return Table(heads, rows)


def gaps_table(verdict: dict[str, Any]) -> Table:
    """How much worse than the retrained dictionary each other is on the quantized model, and whether that matters."""
    heads = [("dictionary", ""), ("FVU gap", "to the retrained one, paired"), ("loss gap", "nats per token, paired")]
    heads += [("place", "within the margin in both, beyond it in one, or not told by these tokens")]
    heads += [("directions", "mean cosine of decoder rows with those of the full-precision dictionary")]
    rows = [
        [name, interval(one["fvu"]), interval(one["loss"]), one["place"], number(one["directions"], 3)]
        for name, one in verdict["gaps"].items()
    ]
    return Table(heads, rows)


def price_said(compare: dict[str, Any]) -> list[str]:
    """After how many tokens retraining overtakes the dictionary that was carried over, and what they cost."""
    price = compare["verdict"].get("price")
    if not price:
        return []
    tokens = price["tokens"]
    if tokens["value"] is None:
        law = (compare.get("curves") or {}).get("overtaking", {}).get("law")
        why = "by the power law of its budgets" if law else "its error does not fall over its budgets"
        return [f"Retraining never overtakes the transferred dictionary: {why}."]
    how = "extrapolated by a power law" if price["beyond"] else "within the budgets that were run"
    how = "the fewest that were run" if price.get("at_most") else how
    after = f"{'at most ' if price.get('at_most') else ''}{interval(tokens, show=whole)}"
    said = [f"Retraining overtakes the transferred dictionary after {after} tokens, {how}."]
    return [*said, _cost(price["seconds"])] if price["seconds"] else said


def _cost(seconds: dict[str, float]) -> str:
    """What they take, on devices whose rate is known and on those of which only the peak is."""
    peak = ", ".join(f"{name} {_long(s)}" for name, s in seconds.items() if name not in MEASURED)
    reached = ", ".join(f"{name} {_long(s)}" for name, s in seconds.items() if name in MEASURED)
    said = f"On one chip of each, at {ASSUMED:.0%} of its peak: {peak}"
    return f"{said}; at rates that were reached on cores of this project: {reached}." if reached else f"{said}."


def _long(seconds: float) -> str:
    """A time in the unit that leaves two or three digits."""
    if seconds < 1:
        return "less than 1 s"
    for unit, length, below in (("s", 1, 100), ("min", 60, 6000), ("h", 3600, 360_000)):
        if seconds < below:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds / 86400:,.0f} days"


def arms_table(compare: dict[str, Any]) -> Table:
    """One row for each dictionary on each model, values with 95 % intervals."""
    shares = ("alive", "dense", "ce_recovered", "kl_recovered")
    heads = [("arm", "which dictionary"), ("trained on", ""), ("judged on", "")]
    heads += [("FVU", "fraction of variance unexplained"), ("L0", "features that fire on a token")]
    heads += [("alive", "latents that fire on the held-out tokens"), ("dense", "fire on more than a tenth of them")]
    heads += [("CE recovered", "1 is the clean model, 0 the activations zeroed"), ("KL recovered", "the same for KL")]
    heads += [
        ("loss", "nats per token, the reconstruction in place"),
        ("probe", "balanced accuracy of 5-sparse probes"),
    ]
    rows = [
        [arm_name(row), row["trained_on"], row["judged_on"], interval(row["fvu"]), interval(row["l0"])]
        + [interval(row[name], share=True) for name in shares]
        + [interval(row[name]) if row.get(name) else "–" for name in ("loss", "probe")]
        for row in compare["rows"]
    ]
    return Table(heads, rows)


def crosscoder_said(compare: dict[str, Any]) -> list[str]:
    """Whose the latents of a crosscoder of the pair are."""
    found = dict(compare.get("crosscoder") or {})
    if not found:
        return []
    shared = found.pop("shared")
    lone = " and ".join(f"{n:,} to {name} alone" for name, n in found.items())
    total = shared + sum(found.values())
    return [f"A crosscoder of both models sees the same pair so: of {total:,} latents that fire {shared:,} are shared, "
            f"{lone}, by how much each twin's activations need them."]  # fmt: skip


def fate_texts(compare: dict[str, Any]) -> list[dict[str, Any]]:
    """The contexts of latents by fate, each with a line that says what became of it."""
    made = []
    for fate, texts in compare["texts"].items():
        of = {one["feature"]: one for one in compare["fates"][fate]}
        for one in texts:
            told = of[one["feature"]]
            others = told.get("parts") or told.get("sources") or []
            ends = f" ({'into' if fate == 'split' else 'from'} {', '.join(map(str, others))})" if others else ""
            made.append(one | {"head": f"{fate}{ends}; fires on {told['tokens']:,} of the held-out tokens"})
    return made


MATCHING = {
    "mmcs": ("mean max cosine", "over latents of the full-precision dictionary"),
    "mnn_0.5": ("mutual nearest neighbours, 0.5", "share that choose each other at that cosine"),
    "mnn": ("mutual nearest neighbours, 0.7", "the same"),
    "mnn_0.9": ("mutual nearest neighbours, 0.9", "the same"),
    "assigned": ("assigned alike", "share whose best one-to-one partner agrees by decoder and by encoder"),
    "act_r": ("mean max correlation", "of codes on the same tokens; the largest of many is above 0 by chance"),
    "act_same": ("correlated", "share with a correlation of at least 0.7"),
    "lost": ("lost", "share without a partner at cosine 0.7"),
    "split": ("split", "share that several latents of the other have for a nearest"),
    "new": ("new", "share of the other's without a partner"),
    "merged": ("merged", "share of the other's that are nearest to several"),
}


def matching_table(compare: dict[str, Any]) -> Table:
    """Do the two dictionaries hold the same directions, beside two seeds of one."""
    rows = [
        [*MATCHING[k], *(number(v[side], 3) for side in ("value", "floor"))]
        for k, v in compare["matching"].items()
        if k in MATCHING
    ]
    heads = [
        ("measure", ""),
        ("of", ""),
        ("retrained", "full precision against retrained"),
        ("seed floor", "two seeds"),
    ]
    return Table(heads, rows)
