"""Who survives: the figures beside scikit-learn's, and that no feature is judged by what knew it or its like."""

from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest
from sklearn.base import BaseEstimator
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from qsae_jax.audit import predict as module
from qsae_jax.audit.predict import (
    Table,
    auc,
    clusters,
    deciles,
    paper_protocol,
    predict,
    statistics,
    transfer,
    weighted_auc,
)
from qsae_jax.errors import UserError
from qsae_jax.stats import percentile, resamples

FEW = {"firing_rate": 0.0005, "mean_activation": 1e-5, "max_activation": 0.1, "r": 0.0}


def table(n=400, seed=0, copies=1, power=3.0, by="max_activation"):
    """n active features (in clusters of `copies` with equal statistics) of which the large ones survive, and some that
    are not active."""
    rng = np.random.default_rng(seed)
    rate, own = np.exp(rng.normal(-4, 0.7, n // copies)), np.exp(rng.normal(0, 0.6, n // copies))
    columns = {"firing_rate": rate, "mean_activation": rate * own}
    columns["max_activation"] = own * np.exp(np.abs(rng.normal(1, 0.5, n // copies)))
    size = np.log(columns[by])
    p = 1 / (1 + np.exp(-power * (size - np.median(size))))
    columns["r"] = np.where(rng.random(len(p)) < p, 0.95, 0.6)
    columns = {key: np.concatenate([np.repeat(value, copies), np.full(9, FEW[key])]) for key, value in columns.items()}
    columns["active"] = np.arange(n + 9) < n
    order = rng.permutation(n + 9)
    return {key: value[order] for key, value in columns.items()}


def labelled(columns):
    return statistics(columns)[1], columns["r"][columns["active"]] > 0.9


def alike(columns):
    """The clusters of features with equal statistics."""
    return np.unique(statistics(columns)[1][:, 0], return_inverse=True)[1]


def folds_of(x, y, groups, seed=0):
    return StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(x, y, groups)


def logistic():
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def test_the_four_statistics():
    """Of the active features only. Control: the mean while firing is another concentration."""
    columns = table()
    names, x = statistics(columns)
    rate, mean, peak = (columns[key][columns["active"]] for key in ("firing_rate", "mean_activation", "max_activation"))
    assert names == ("rarity", "log_mean", "log_max", "log_concentration") and x.shape == (400, 4)
    np.testing.assert_allclose(x, np.stack([-np.log(rate), np.log(mean), np.log(peak), np.log(peak / mean)], 1))
    np.testing.assert_allclose(x[:, 3], x[:, 2] - x[:, 1], atol=1e-12)
    assert np.abs(np.log(peak / (mean / rate)) - x[:, 3]).min() > 1
    columns["mean_activation"] = columns["mean_activation"] * 0 - 1e-9
    assert np.isfinite(statistics(columns)[1]).all()


def test_a_column_that_is_missing_is_named():
    columns = table()
    del columns["max_activation"]
    with pytest.raises(UserError, match="no column `max_activation`: audit the model again"):
        predict(columns, np.arange(400))


@pytest.mark.parametrize("block", [7, 2048])
def test_clusters_are_connected_components(block, monkeypatch):
    """A chain whose ends are at right angles is one cluster, opposite rows are not, in whatever blocks; beside a slow
    search. Control: at a higher cosine the chain falls apart."""
    monkeypatch.setattr(module, "BLOCK", block)
    rng = np.random.default_rng(0)
    angle = np.linspace(0, np.pi / 2, 5)
    chain = np.zeros((5, 8))
    chain[:, 0], chain[:, 1] = np.cos(angle), np.sin(angle)
    rows = np.concatenate([chain, -chain[:1], np.zeros((1, 8)), rng.normal(size=(40, 8))])[rng.permutation(47)]
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    slow = np.arange(47)
    for _ in range(47):
        slow = np.array([min(slow[j] for j in range(47) if unit[i] @ unit[j] >= 0.7 or i == j) for i in range(47)])
    found = clusters(rows * 3)
    assert ((found[:, None] == found) == (slow[:, None] == slow)).all()
    assert 5 < found.max() + 1 < 43
    assert clusters(rows, at=0.99).max() + 1 == 47
    opposite = ((unit @ unit.T) < -1 + 1e-9).nonzero()[0]
    assert len(opposite) == 2 and found[opposite[0]] != found[opposite[1]]


def test_auc_is_scikit_learn_s():
    """Weighted and with ties (1e-12). Control: ties counted as won or lost."""
    rng = np.random.default_rng(0)
    score, label = rng.integers(0, 9, 80) / 8, rng.random(80) < 0.4
    weight = rng.integers(0, 4, (6, 80)).astype(float)
    expected = [roc_auc_score(label, score, sample_weight=w) for w in weight]
    np.testing.assert_allclose(weighted_auc(score, label, weight), expected, atol=1e-12)
    for sign in (-1, 1):
        assert np.abs(weighted_auc(score + sign * 1e-9 * label, label, weight) - expected).min() > 0.02
    assert np.isnan(weighted_auc(score, label, np.stack([label, ~label]).astype(float))).all()


def test_the_interval_draws_whole_clusters(monkeypatch):
    """Beside plain resampling of the clusters' members. Control: drawn one by one they vary less."""
    monkeypatch.setattr(module, "DRAWS", 130)
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 8)[rng.permutation(320)] * 10
    label = np.random.default_rng(1).random(400)[groups] < 0.5
    score = label + rng.normal(size=400)[groups]
    drawn = []
    for count in resamples(40, 130):
        some = np.concatenate([np.flatnonzero(groups == 10 * g) for g in np.repeat(np.arange(40), count.astype(int))])
        drawn.append(roc_auc_score(label[some], score[some]))
    found = auc(score, label, groups)
    assert found.as_dict() == pytest.approx(percentile(roc_auc_score(label, score), drawn, 40).as_dict(), abs=1e-9)
    single = auc(score, label, np.arange(320))
    assert found.high - found.low > 2 * (single.high - single.low)


def test_figures_are_scikit_learn_s():
    """Both models, from folds made here (1e-9). Control: with one scaler for all folds they are others."""
    columns = table(copies=2)
    (x, y), groups = labelled(columns), alike(columns)
    found = predict(columns, groups)
    trees = HistGradientBoostingClassifier(random_state=0, early_stopping=False)
    scaled = StandardScaler().fit_transform(x)
    for name, model, rows in (
        ("logistic", logistic(), x),
        ("boosting", trees, x),
        ("outside", LogisticRegression(max_iter=1000), scaled),
    ):
        p, own = np.zeros(400), []
        for fitted, judged in folds_of(x, y, groups):
            with threadpool_limits(1):
                p[judged] = model.fit(rows[fitted], y[fitted]).predict_proba(rows[judged])[:, 1]
            own.append(roc_auc_score(y[judged], p[judged]))
        if name == "outside":
            assert abs(found["logistic"]["brier"] - brier_score_loss(y, p)) > 1e-7
            continue
        one, order = found[name], np.argsort(p, kind="stable")
        assert one["auc"]["value"] == pytest.approx(roc_auc_score(y, p), abs=1e-9)
        assert one["auc"]["low"] < one["auc"]["value"] < one["auc"]["high"]
        assert one["fold_sd"] == pytest.approx(np.std(own), abs=1e-9)
        assert one["brier"] == pytest.approx(brier_score_loss(y, p), abs=1e-9)
        bins = [order[i * 40 : i * 40 + 40] for i in range(10)]
        assert one["ece"] == pytest.approx(np.mean([abs(p[b].mean() - y[b].mean()) for b in bins]), abs=1e-9)
        assert [row["observed"] for row in one["calibration"]] == pytest.approx([y[b].mean() for b in bins])
        assert [row["predicted"] for row in one["calibration"]] == pytest.approx([p[b].mean() for b in bins])
    weights = LogisticRegression(max_iter=1000).fit(scaled, y).coef_[0]
    assert list(found["logistic"]["coefficients"].values()) == pytest.approx(weights, abs=1e-6)
    assert found["n"] == 400 and found["positive"] == y.mean() and found["clusters"] == 200
    assert found["largest"] == pytest.approx(2 / 400)


def test_a_planted_cause_is_found():
    """Size decides, or rarity alone, as both models and the statistics by themselves say. Leaving out size, which
    others make up for, takes nothing; leaving out rarity does. Control: labels shuffled."""
    large, rare = table(), table(power=-3.0, by="firing_rate", seed=1)
    rare["mean_activation"] = np.exp(np.random.default_rng(2).normal(-5, 0.7, 409))
    shuffled = large | {"r": np.random.default_rng(3).permutation(large["r"])}
    a, b, c = (predict(columns, np.arange(columns["active"].sum())) for columns in (large, rare, shuffled))
    assert a["logistic"]["auc"]["low"] > 0.75 and a["boosting"]["auc"]["value"] > 0.75
    assert max(a["marginal"], key=lambda name: a["marginal"][name]["auc"]) == "log_max"
    assert a["marginal"]["log_max"]["sign"] == 1 and abs(a["without"]["log_max"]) < 0.01
    assert max(b["marginal"], key=lambda name: b["marginal"][name]["auc"]) == "rarity"
    assert b["logistic"]["coefficients"]["rarity"] > 1 and b["without"]["rarity"] > 0.2
    x, y = labelled(rare)
    for i, one in enumerate(b["marginal"].values()):
        assert one["auc"] == pytest.approx(roc_auc_score(y, one["sign"] * x[:, i])) and one["auc"] >= 0.5
    for name in ("logistic", "boosting"):
        assert 0.35 < c[name]["auc"]["value"] < 0.65


def test_look_alikes_are_not_judged_by_what_knows_them():
    """Clusters of four with equal statistics and one random label: nothing can be told. Control: without the clusters,
    the trees know each feature by its twin."""
    columns = table(copies=4, power=0.0)
    grouped, apart = predict(columns, alike(columns)), predict(columns, np.arange(columns["active"].sum()))
    assert 0.35 < grouped["boosting"]["auc"]["value"] < 0.65
    assert apart["boosting"]["auc"]["value"] > 0.9


def of_one(tables, groups, dictionary="one"):
    """Tables of one dictionary, whose active latents are of these clusters."""
    found = {}
    for name, columns in tables.items():
        whole = np.full(len(columns["active"]), -1)
        whole[columns["active"]] = groups
        found[name] = Table(columns, whole, dictionary)
    return found


@pytest.mark.parametrize(
    "survive, groups, reason",
    [
        (4, np.arange(400), "4 features survived: 5 folds need at least 5"),
        (397, np.arange(400), "3 features were lost: 5 folds need at least 5"),
        (200, np.arange(400) % 4, "4 clusters: 5 folds need at least 5"),
        (200, np.where(np.arange(400) < 200, 0, np.arange(400)), "one cluster of look-alike features holds"),
        (0, np.arange(400), "0 features survived"),
    ],
)
def test_too_little_to_judge_is_a_reason(survive, groups, reason):
    """Control: one feature more of what was missing is enough."""
    columns = {key: value[np.argsort(~columns["active"])] for columns in [table()] for key, value in columns.items()}
    columns["r"] = np.where(np.arange(409) < survive, 0.95, 0.5)
    found = predict(columns, groups)
    assert set(found) == {"n", "positive", "reason"} and found["reason"].startswith(reason)
    assert found["n"] == 400 and found["positive"] == survive / 400
    assert [row["reason"] for row in transfer(of_one({"a": columns}, groups))] == [f"a: {found['reason']}"]
    assert ("reason" in paper_protocol(columns)) == (survive in (0, 4, 397))
    columns["r"] = np.where(np.arange(409) < 200, 0.95, 0.5)
    assert (
        "reason" not in paper_protocol(columns) and "reason" not in transfer(of_one({"a": columns}, np.arange(400)))[0]
    )


def test_nothing_active_is_a_reason():
    columns = table() | {"active": np.zeros(409, bool)}
    assert predict(columns, np.zeros(0, int))["reason"].startswith("0 features survived")


def test_the_papers_protocol():
    """Its figures, counted again fold by fold (1e-9). Control: folds that are not shuffled."""
    columns = table()
    x, y = labelled(columns)
    scaled = StandardScaler().fit_transform(x)

    def by_hand(**how):
        model, found = LogisticRegression(max_iter=1000, C=1.0), []
        for fitted, judged in StratifiedKFold(5, **how).split(scaled, y):
            p = model.fit(scaled[fitted], y[fitted]).decision_function(scaled[judged])
            found.append(roc_auc_score(y[judged], p))
        return found

    found = paper_protocol(columns)
    expected = by_hand(shuffle=True, random_state=0)
    assert found["auc"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert found["sd"] == pytest.approx(np.std(expected), abs=1e-9) and found["sd"] < np.std(expected, ddof=1)
    assert abs(found["auc"] - np.mean(by_hand())) > 1e-4
    assert found["n"] == 400 and list(found["coefficients"]) == list(statistics(columns)[0])


class Recorder(BaseEstimator):
    """Remembers what it was fitted to and what it judged."""

    seen: ClassVar[list] = []

    def fit(self, x, y):
        self.fitted_ = {round(float(value), 9) for value in x[:, 0]}
        return self

    def predict_proba(self, x):
        self.seen.append((self.fitted_, {round(float(value), 9) for value in x[:, 0]}))
        return np.stack([1 - x[:, 2], x[:, 2]], 1)


def test_transfer_judges_no_feature_it_was_fitted_to(monkeypatch):
    """Two schemes of one dictionary with duplicated features: no statistics of a fitted feature are judged, itself or
    its twin. Control: without the clusters, twins are on both sides."""
    columns = table(copies=4)
    tables = {"int6": columns, "int4": columns | {"r": columns["r"] - (np.arange(409) % 2) * 0.2}}
    monkeypatch.setattr(module, "logistic", Recorder)
    for groups, leaks in ((alike(columns), False), (np.arange(400), True)):
        monkeypatch.setattr(Recorder, "seen", [])
        found = transfer(of_one(tables, groups))
        assert [(row["trained_on"], row["judged_on"]) for row in found] == [
            (a, b) for a in ("int6", "int4") for b in ("int6", "int4")
        ]
        assert len(Recorder.seen) == 20 and any(fitted & judged for fitted, judged in Recorder.seen) == leaks
        assert all(judged for _, judged in Recorder.seen)


def test_transfer_between_audits_with_other_active_features(monkeypatch):
    """One dictionary on two texts: some features are active in one of them only, and still none is judged by what was
    fitted to it or to its twin. Control: taken for two dictionaries, they are."""
    columns = table(copies=4)
    groups = np.full(409, -1)
    groups[columns["active"]] = alike(columns)
    fewer = columns | {"active": columns["active"] & (np.arange(409) % 7 > 0)}
    monkeypatch.setattr(module, "logistic", Recorder)
    for other, leaks in (("one", False), ("other", True)):
        monkeypatch.setattr(Recorder, "seen", [])
        transfer({"a": Table(columns, groups, "one"), "b": Table(fewer, groups, other)})
        assert any(fitted & judged for fitted, judged in Recorder.seen) == leaks


def test_transfer_between_schemes_of_one_dictionary():
    """To itself it is `predict`'s figure; to another it is counted again here (1e-9). Control: fitted to all features
    it is another figure."""
    columns = table(n=120, copies=2)
    noise = np.random.default_rng(4).normal(size=129)
    other = columns | {"r": table(n=120, copies=2, power=1.0)["r"]}
    other["max_activation"] = columns["max_activation"] * np.exp(np.abs(noise))  # as if seen on other tokens
    groups = alike(columns)
    found = {(row["trained_on"], row["judged_on"]): row for row in transfer(
        of_one({"a": columns, "b": other}, groups), seed=3)}  # fmt: skip
    for name, one in (("a", columns), ("b", other)):
        assert found[name, name]["auc"] == predict(one, groups, seed=3)["logistic"]["auc"]
    (x, y), (_, truth), p = labelled(columns), labelled(other), np.zeros(120)
    seen = labelled(other)[0]
    for fitted, judged in folds_of(x, y, groups, seed=3):
        p[judged] = logistic().fit(x[fitted], y[fitted]).predict_proba(seen[judged])[:, 1]
    assert found["a", "b"]["auc"]["value"] == pytest.approx(roc_auc_score(truth, p), abs=1e-9)
    whole = logistic().fit(x, y).predict_proba(seen)[:, 1]
    assert abs(found["a", "b"]["auc"]["value"] - roc_auc_score(truth, whole)) > 1e-3
    assert found["a", "b"]["n"] == 120 and found["a", "b"]["auc"] != found["b", "a"]["auc"]


def test_transfer_between_dictionaries():
    """Fitted to all of one and judged on all of the other (1e-9). Control: their scales differ, and a scaler fitted to
    the judged table makes up for that."""
    one, other = table(n=200), table(n=160, seed=5, power=1.5)
    rows = transfer(of_one({"a": one}, np.arange(200), "one") | of_one({"b": other}, np.arange(160), "other"))
    (x, y), (judged, truth) = labelled(one), labelled(other)
    (row,) = (row for row in rows if (row["trained_on"], row["judged_on"]) == ("a", "b"))
    assert row["auc"]["value"] == pytest.approx(
        roc_auc_score(truth, logistic().fit(x, y).predict_proba(judged)[:, 1]), abs=1e-9
    )
    assert row["n"] == 160 and row["auc"]["low"] < row["auc"]["value"] < row["auc"]["high"]
    itself = roc_auc_score(truth, logistic().fit(judged, truth).predict_proba(judged)[:, 1])
    assert row["auc"]["value"] != pytest.approx(itself, abs=1e-9)


def test_deciles():
    """Tenths in order, beside sorting in Python. Control: unsorted tenths are not in order."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 40, 107) / 8
    survived = values + rng.normal(size=107) > 2.5
    found, order = deciles(values, survived), sorted(range(107), key=lambda i: values[i])
    assert [row["n"] for row in found] == [11] * 7 + [10] * 3
    start = 0
    for row in found:
        part = order[start : start + row["n"]]
        assert row["mean"] == pytest.approx(np.mean([values[i] for i in part]))
        assert row["survived"] == pytest.approx(np.mean([survived[i] for i in part]))
        start += row["n"]
    assert all(a["mean"] < b["mean"] for a, b in pairwise(found))
    assert any(a.mean() > b.mean() for a, b in pairwise(np.array_split(values, 10)))
    assert [row["n"] for row in deciles(values[:3], survived[:3])] == [1, 1, 1]
