"""What a page says of verdicts and prices, from made-up comparisons."""

import pytest

from qsae_jax.compare.budget import price
from qsae_jax.report import compared, plots

GAP = {"value": 0.05, "low": 0.04, "high": 0.06}
CURVE = [{"tokens": n, "value": v, "low": v - 0.01, "high": v + 0.01} for n, v in ((100, 0.4), (400, 0.3))]


def told(choice="retrain", how="", tokens=250.0, **more):
    """A comparison, as far as verdict and price go."""
    overtaken = {"tokens": {"value": tokens, "low": 200.0, "high": 300.0}, "beyond": False, "at_most": False} | more
    verdict = {"choice": choice, "how": how, "margin": {"fvu": 0.01, "loss": 0.02}}
    verdict |= {"gaps": {"transferred": {"fvu": GAP, "loss": GAP}}}
    seconds = None if tokens is None else price(tokens, 1e12)
    return {"scheme": "int4", "verdict": verdict | {"price": overtaken | {"seconds": seconds}}}


@pytest.mark.parametrize(
    "choice, how, by",
    [("keep", "", "–"), ("adapt", "gain", "gain"), ("retrain", "", "–"), ("unsure", "", "–"), ("unsure", "gain", "–")],
)
def test_the_table_names_the_choice_and_what_adapts(choice, how, by):
    """An adaptation that the tokens do not place is not named as the one that does it."""
    (row,) = compared.verdicts_table([told(choice, how)]).rows
    assert row[:3] == ["int4", choice, by] and row[-1].startswith("250")


def test_where_the_first_budget_is_enough_already_it_is_a_bound():
    met = told(at_most=True)
    assert compared.verdicts_table([met]).rows[0][-1].startswith("at most 250")
    assert compared.price_said(met)[0].startswith("Retraining overtakes the transferred dictionary after at most 250")
    assert "at most" not in compared.price_said(told())[0] + compared.verdicts_table([told()]).rows[0][-1]


def test_the_price_says_what_is_known_of_a_device():
    """Peaks with the share that is assumed, measured rates as such: 250e12 operations over 0.4 of 989e12 a second,
    and over 66e9."""
    said = compared.price_said(told())[1]
    peak, measured = said.split("; ")
    assert (
        "at 40% of its peak" in peak
        and "TPU v5e 3.2 s" in peak
        and "H100 SXM less than 1 s" in peak
        and "cores" not in peak
    )
    assert (
        measured.startswith("at rates that were reached on cores of this project")
        and "2 cores (AVX2) 63 min" in measured
    )


@pytest.mark.parametrize("law, why", [({"floor": 0.3}, "power law"), (None, "does not fall")])
def test_never_has_a_reason(law, why):
    met = told(tokens=None) | {"curves": {"overtaking": {"law": law}}}
    (said,) = compared.price_said(met)
    assert "never overtakes" in said and why in said


def test_budgets_are_drawn_without_intervals_too():
    """One judged window has none: null ends."""
    bare = [one | {"low": None, "high": None} for one in CURVE]
    with_ends = plots.budgets({"transferred": {"value": 0.35, "low": 0.3, "high": 0.4}, "retrained": CURVE}, "a")
    without = plots.budgets({"transferred": {"value": 0.35, "low": None, "high": None}, "retrained": bare}, "a")
    assert without.startswith("<svg") and len(without) < len(with_ends)
