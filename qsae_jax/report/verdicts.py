"""Keep, adapt or retrain: for every scheme of a comparison its verdict, arms, likeness, budgets and texts."""

from typing import Any

from qsae_jax.report import compared, figures, plots
from qsae_jax.report.part import Part
from qsae_jax.report.results import Results

ARMS = (
    "Each dictionary on each model, with 95 % intervals. The verdict rests on differences over the same windows, "
    "whose intervals are far narrower."
)
MATCHING = (
    "Same directions? The retrained dictionary began at the same random start as the full-precision one, the seed "
    "floor did not: after a short training, likeness is partly that start."
)
BUDGETS = (
    "FVU on the quantized model by the tokens that a dictionary learnt from there, with 95 % intervals; the band is "
    "the dictionary that was carried over, the dotted line the power law of retraining."
)
TEXTS = (
    "Latents that are lost, split, new or merged, those that fire most: where each is strongest and where the two "
    "models differ most, shaded by the value at full precision, underlined by the quantized model's."
)
VERDICTS = {
    "keep": "Keep the dictionary",
    "adapt": "Adapt the dictionary",
    "retrain": "Retrain the dictionary",
    "unsure": "Not enough data to say",
}


def heads(results: Results) -> list[tuple[str, str]]:
    """The verdicts at the top of the page: of one scheme with its reason, of several one for each."""
    found = list(results.compared.values())
    if results.compare is not None:
        found.insert(0, results.compare)
    choices = [str(one["verdict"]["choice"]) for one in found]
    titles = [VERDICTS.get(choice, choice) for choice in choices]
    if len(found) == 1:
        return [(titles[0], found[0]["verdict"]["reason"])]
    return [(f"{one['scheme']}: {title[0].lower()}{title[1:]}", "") for one, title in zip(found, titles, strict=True)]


def parts(results: Results) -> list[Part]:
    """A table of all schemes where there are several, then each scheme's own parts."""
    if not results.compare:
        return []
    found = [results.compare, *results.compared.values()]
    made = []
    if len(found) > 1 and all("gaps" in one["verdict"] for one in found):
        made.append(Part("verdicts", "Every scheme's verdict.", table=compared.verdicts_table(found)))
    return made + [part for i, one in enumerate(found) for part in _of_scheme(one, i)]


def _of_scheme(one: dict[str, Any], i: int) -> list[Part]:
    told, at, made = one["verdict"], one["scheme"], []
    if "gaps" in told:
        caption = f"At {at}: {VERDICTS[told['choice']].lower()}. {told['reason']}"
        made.append(Part(f"gaps{i}", caption, table=compared.gaps_table(told), said=compared.price_said(one)))
    made += [
        Part(f"arms{i}", f"At {at}. {ARMS}", figures.arms(one["rows"], f"arms{i}")),
        Part(f"arm-table{i}", f"The comparison at {at} in numbers.", table=compared.arms_table(one)),
    ]
    if one.get("curves"):
        made.append(Part(f"budgets{i}", f"At {at}. {BUDGETS}", plots.budgets(one["curves"], f"budgets{i}")))
    said = compared.crosscoder_said(one)
    made.append(Part(f"matching{i}", f"At {at}. {MATCHING}", table=compared.matching_table(one), said=said))
    if one.get("texts"):
        made.append(Part(f"fates{i}", f"At {at}. {TEXTS}", texts=compared.fate_texts(one)))
    return made
