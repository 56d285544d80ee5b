"""The comparison beside float64 NumPy and logits of the patched model, and its verdict on made-up numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax import audit, compare, fake_quantize, patch
from qsae_jax.compare.curves import fvu_drawn
from qsae_jax.compare.fidelity import about_mean, fvu_of
from qsae_jax.compare.verdict import difference, verdict
from qsae_jax.mesh import make_mesh, place
from qsae_jax.stats import Grouped, resamples

POINT, SKIP = "blocks.1.resid_post", 2


@pytest.fixture(scope="module")
def saes(tiny_sae):
    return {"sae": tiny_sae(0), "retrained": tiny_sae(1), "reseeded": tiny_sae(2)}


def run(lm, saes, windows, **named):
    return compare(lm, "int2", saes["sae"], saes["retrained"], windows, POINT, reseeded=saes["reseeded"],
                   skip_first=SKIP, **named).facts  # fmt: skip


@pytest.fixture(scope="module")
def facts(tiny_lm, saes, tiny_windows):
    return run(tiny_lm, saes, tiny_windows(9), batch=4)


def log_softmax(lm, tokens, edit):
    logits = np.asarray(patch(lm, {POINT: edit})(tokens), np.float64)[:, :-1]
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def slow(lm, sae, tokens, skip=SKIP):
    """FVU, L0, alive, CE and KL recovered, all from whole arrays; codes by the dictionary's own dense encode."""
    seen = {}

    def keep(x):
        seen["x"] = np.asarray(x, np.float64)
        return x

    clean = log_softmax(lm, tokens, keep)
    x = seen["x"]
    z = np.asarray(sae.encode(x.astype(np.float32)), np.float64)
    xhat = z @ np.asarray(sae.W_dec[...], np.float64) + np.asarray(sae.b_dec[...], np.float64)
    swapped = {name: x.copy() for name in ("zero", "mean", "spliced")}
    swapped["zero"][:, skip:], swapped["spliced"][:, skip:] = 0, xhat[:, skip:]
    swapped["mean"][:, skip:] = x[:, skip:].mean((0, 1))
    logp = {name: log_softmax(lm, tokens, lambda _, y=y: jnp.asarray(y, jnp.float32)) for name, y in swapped.items()}
    ce = {k: -np.take_along_axis(v, tokens[:, 1:, None], -1).sum() for k, v in (logp | {"clean": clean}).items()}
    kl = {k: (np.exp(clean) * (clean - v)).sum() for k, v in logp.items()}
    x, xhat, z = (y[:, skip:].reshape(-1, y.shape[-1]) for y in (x, xhat, z))
    return {
        "fvu": ((x - xhat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(),
        "l0": (z > 0).sum(-1).mean(),
        "alive": (z > 0).any(0).mean(),
        "dense": ((z > 0).mean(0) > 0.1).mean(),
        "ce_recovered": (ce["zero"] - ce["spliced"]) / (ce["zero"] - ce["clean"]),
        "kl_recovered": (kl["zero"] - kl["spliced"]) / kl["zero"],
        "ce_recovered_mean": (ce["mean"] - ce["spliced"]) / (ce["mean"] - ce["clean"]),
        "kl_recovered_mean": (kl["mean"] - kl["spliced"]) / kl["mean"],
        "loss": ce["spliced"] / tokens[:, 1:].size,
    }


def test_every_arm_equals_the_slow_computation(facts, tiny_lm, saes, tiny_windows):
    """All nine measures of the six arms within 2e-4; the control leaves out one position more."""
    tokens, models = tiny_windows(9).ids, {"fp": tiny_lm, "int2": fake_quantize(tiny_lm, "int2")}
    names = {"reference": "sae", "transferred": "sae"}
    assert [row["arm"] for row in facts["rows"]] == ["reference", "transferred"] + ["retrained"] * 2 + ["reseeded"] * 2
    for row in facts["rows"]:
        sae = saes[names.get(row["arm"], row["arm"])]
        wanted = slow(models[row["judged_on"]], sae, tokens)
        assert {k: row[k]["value"] for k in wanted} == pytest.approx(wanted, rel=2e-4, abs=2e-4), row["arm"]
        for name in wanted:
            low, value, high = (row[name][key] for key in ("low", "value", "high"))
            assert low <= value <= high, (row["arm"], name)
    other = slow(models["int2"], saes["reseeded"], tokens, skip=SKIP + 1)
    assert abs(other["fvu"] - facts["rows"][-1]["fvu"]["value"]) > 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 1), (8, 1), (2, 4), (1, 8)])
def test_a_mesh_gives_the_same_comparison(shape, facts, tiny_lm, saes, tiny_windows):
    mesh = make_mesh(*shape)
    got = run(place(tiny_lm, mesh), {k: place(v, mesh) for k, v in saes.items()}, tiny_windows(9), batch=8, mesh=mesh)
    for mine, other in zip(got["rows"], facts["rows"], strict=True):
        for name in ("fvu", "l0", "alive", "ce_recovered", "kl_recovered"):
            assert mine[name] == pytest.approx(other[name], rel=5e-4, abs=5e-4), (mine["arm"], name)
    assert got["verdict"]["choice"] == facts["verdict"]["choice"]


def judged(error, spliced, groups=32, seed=0):
    """Sums of a dictionary with a given FVU and loss, a little different in each group, which all share."""
    level = np.random.default_rng(seed).uniform(0.9, 1.1, groups)
    ones = np.ones(groups)
    s = {"error": error * level, "x": np.zeros((groups, 2)), "xx": ones, "n": ones, "active": ones}
    s |= {"fired": np.ones((groups, 4)), "zero": 10 * ones, "clean": 0.5 * ones, "spliced": spliced * level}
    return Grouped(groups, s | {"kl_zero": ones, "kl_spliced": 0.1 * ones, "predicted": ones})


def told(transferred, retrained, adapted=None, directions=1.0, reseeded=(0.35, 1.1), **named):
    home = {"sae": judged(0.30, 1.0, **named)} | ({"reseeded": judged(*reseeded, **named)} if reseeded else {})
    there = {"sae": judged(*transferred, **named), "retrained": judged(*retrained, **named)}
    there |= {"gain": judged(*adapted, **named)} if adapted else {}
    return verdict(home, there, "int2", {"gain": directions} if adapted else {})


@pytest.mark.parametrize(
    "transferred, retrained, adapted, directions, choice",
    [
        ((0.30, 1.0), (0.30, 1.0), None, 1.0, "keep"),
        ((0.33, 1.0), (0.30, 1.0), None, 1.0, "keep"),  # a gain, but less than a seed changes
        ((0.45, 1.0), (0.30, 1.0), (0.31, 1.0), 1.0, "adapt"),
        ((0.30, 1.6), (0.30, 1.0), (0.30, 1.0), 1.0, "adapt"),  # the loss alone speaks for it
        ((0.45, 1.0), (0.30, 1.0), (0.31, 1.0), 0.3, "retrain"),  # directions were lost
        ((0.45, 1.0), (0.30, 1.0), (0.44, 1.0), 1.0, "retrain"),  # the adaptation does not help
        ((0.45, 1.0), (0.30, 1.0), None, 1.0, "retrain"),
    ],
)
def test_the_verdict(transferred, retrained, adapted, directions, choice):
    """The floor is |0.35 - 0.30|: what a new seed changes at full precision."""
    got = told(transferred, retrained, adapted, directions)
    assert got["choice"] == choice and got["floor"] == pytest.approx(0.05, abs=0.005), got["reason"]
    low, high = got["interval"]
    gap = transferred[0] - retrained[0]
    assert low <= gap + 1e-9 <= high + 2e-9 and high - low < 0.02 + 0.1 * gap and "int2" in got["reason"]
    assert got["how"] == ("gain" if choice == "adapt" else "")


def test_without_a_second_seed_the_margin_is_the_tolerance():
    """5 % of FVU 0.30 and of the added loss of 0.5."""
    got = told((0.33, 1.0), (0.30, 1.0), reseeded=None)
    assert got["floor"] == 0 and got["choice"] == "retrain" and "No second seed" in got["reason"]
    assert got["margin"] == pytest.approx({"fvu": 0.015, "loss": 0.025}, abs=0.002)
    assert told((0.31, 1.0), (0.30, 1.0), reseeded=None)["choice"] == "keep"


def spread(sums, by, seed=1):
    """The same dictionary, whose error differs from group to group in a way of its own."""
    away = by * np.random.default_rng(seed).normal(size=sums.groups)
    return Grouped(sums.groups, dict(sums.sums) | {"error": sums.sums["error"] + away - away.mean()})


@pytest.mark.parametrize(
    "noisy, choice, how",
    [((), "adapt", "biases"), (("biases",), "adapt", "gain"), (("biases", "gain"), "unsure", "biases")],
)
def test_an_adaptation_that_the_tokens_do_not_place(noisy, choice, how):
    """Two adaptations of the same mean gap: the cheapest that is placed within is named, and where none is placed
    the answer is that these tokens do not tell. Control: without the spread the cheaper one is within."""
    home = {"sae": judged(0.30, 1.0), "reseeded": judged(0.35, 1.1)}
    there = {"sae": judged(0.45, 1.0), "retrained": judged(0.30, 1.0)}
    there |= {name: spread(judged(0.31, 1.0), 0.3 * (name in noisy)) for name in ("biases", "gain")}
    got = verdict(home, there, "int2", {"biases": 1.0, "gain": 1.0})
    assert (got["choice"], got["how"]) == (choice, how), got["reason"]
    assert [got["gaps"][name]["place"] for name in noisy] == ["unsure"] * len(noisy)


def test_a_gap_that_the_tokens_do_not_place_is_unsure_whatever_helps():
    home = {"sae": judged(0.30, 1.0), "reseeded": judged(0.35, 1.1)}
    there = {"sae": spread(judged(0.36, 1.0), 0.3), "retrained": judged(0.30, 1.0), "gain": judged(0.30, 1.0)}
    got = verdict(home, there, "int2", {"gain": 1.0})
    assert got["choice"] == "unsure" and got["how"] == "" and got["gaps"]["gain"]["place"] == "within"


def test_two_seeds_give_one_gap():
    """The mean of both gaps, and an interval from the lowest to the highest end; one of the seeds alone has neither."""
    home = {"sae": judged(0.30, 1.0), "reseeded": judged(0.35, 1.1)}
    there = {"sae": judged(0.40, 1.0), "retrained": judged(0.30, 1.0)}
    there |= {"reseeded": judged(0.54, 1.3, seed=3), "again": judged(0.34, 1.1, seed=3)}
    both = verdict(home, there, "int2", {})
    one, other = difference(there["sae"], there["retrained"]), difference(there["reseeded"], there["again"])
    assert both["seeds"] == 2 and verdict(home, dict(list(there.items())[:2]), "int2", {})["seeds"] == 1
    for name in ("fvu", "loss"):
        got = list(both["gaps"]["transferred"][name].values())
        assert got[0] == pytest.approx((one[name].value + other[name].value) / 2)
        assert got[1:] == pytest.approx([one[name].low, other[name].high])
    assert one["fvu"].high < other["fvu"].low


def test_the_interval_of_fvu_lies_about_its_value():
    """Eight groups whose means lie far apart: about the mean of all, the middle of the resamples is the value, and
    the whole is what NumPy makes of it. Control: about each resample's own mean it lies above by a tenth."""
    random = np.random.default_rng(0)
    x = random.normal(size=(8, 40, 5)) + 3 * random.normal(size=(8, 1, 5))
    shift = random.normal(size=5)
    error = 0.3 * ((x - x.mean((0, 1))) ** 2).sum(-1)
    away = x - shift
    sums = {"x": away.sum(1), "xx": (away**2).sum((1, 2)), "n": np.full(8, 40.0), "error": error.sum(1)}
    about = about_mean(Grouped(8, sums)).sums
    assert fvu_of({k: v.sum(0) for k, v in about.items()}) == pytest.approx(0.3, rel=1e-12)
    assert about["x"].sum(0) == pytest.approx(np.zeros(5), abs=1e-9)
    drawn = fvu_drawn(about)[1:]
    own = [
        (c @ sums["error"]) / (c @ sums["xx"] - ((c @ sums["x"]) ** 2).sum() / (c @ sums["n"]))
        for c in resamples(8, 1000)
    ]
    assert np.median(drawn) == pytest.approx(0.3, rel=0.02) and np.median(own) > 0.3 * 1.08


def test_one_window_gives_no_interval_and_so_no_answer():
    """A gap of 0.15 from a single group of windows: nothing tells it from chance."""
    got = told((0.45, 1.0), (0.30, 0.5), groups=1)
    assert got["choice"] == "unsure" and "not enough data" in got["reason"] and np.isnan(got["interval"][0])
    assert "nan" not in got["reason"] and "One window has no interval" in got["reason"]


def test_the_transferred_arm_is_that_of_the_audit(facts, tiny_lm, saes, tiny_windows):
    """FVU and L0 of the same dictionary over the same tokens; the control is another dictionary's."""
    row = audit(tiny_lm, saes["sae"], tiny_windows(9), ["int2"], POINT, skip_first=SKIP).facts["rows"][0]
    arms = {(one["arm"], one["judged_on"]): one for one in facts["rows"]}
    mine = arms["transferred", "int2"]
    assert mine["fvu"]["value"] == pytest.approx(row["fvu"], rel=1e-5)
    assert mine["l0"]["value"] == pytest.approx(row["l0"], rel=1e-6)
    assert abs(arms["reseeded", "int2"]["fvu"]["value"] - row["fvu"]) > 1e-3
