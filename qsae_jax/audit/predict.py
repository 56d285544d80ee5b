"""Who survives: can statistics of the full-precision run alone tell which features a distortion leaves intact?

One row for each active feature of one scheme; the label is r > 0.9. Four statistics, as in arXiv 2606.03002: rarity
-log(firing rate), log(mean activation), where the mean is over all counted tokens, log(largest activation), and log
concentration log(largest / mean). The last is the third less the second, so coefficients of the three are told apart
by the L2 penalty alone, and leaving out any one of the three takes nothing away.

Two models: logistic regression (L2, C = 1, on standardised statistics) and boosted trees. Each is judged on features
that it was not fitted to. Features that look alike, decoder rows joined by cosines >= 0.7, are of one cluster, and a
cluster is on one side of every fold: otherwise a model that knows one feature by heart is judged on its twin.

    auc          chance that a survivor is given a higher probability than one that is lost, ties counted half
    brier        mean of (probability - label)^2
    ece          mean of |probability - share that survived| over ten bins of equal count, weighted by count
    fold_sd      spread (population) of the folds' own AUCs
    marginal     AUC of one statistic alone, of its negative where `sign` is -1: nothing is fitted but the sign
    without      what the logistic model's AUC loses when a statistic is left out

Intervals draw clusters with replacement and judge the same held-out probabilities again: they say what other features
of the kind would give, the fitted models being the same.
"""

from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from qsae_jax.errors import UserError
from qsae_jax.stats import Interval, percentile, resamples

Columns = Mapping[str, np.ndarray]
"""Of one scheme, a value for every latent: `active`, `r`, `firing_rate`, `mean_activation`, `max_activation`."""

NAMES = ("rarity", "log_mean", "log_max", "log_concentration")
BLOCK = 2048
"""Decoder rows whose cosines with as many others are held at a time."""
DRAWS, AT_ONCE, BINS = 1000, 50, 10
TINY = 1e-8
"""The least that a logarithm is taken of, as in the paper's code: an active feature lies far above."""


def column(columns: Columns, name: str) -> np.ndarray:
    """A column, of the active features only."""
    for key in ("active", name):
        if key not in columns:
            raise UserError(f"the table of features has no column `{key}`: audit the model again with this version")
    return np.asarray(columns[name])[np.asarray(columns["active"], bool)]


def survived(columns: Columns, threshold: float = 0.9) -> Bool[np.ndarray, "n"]:
    return column(columns, "r").astype(np.float64) > threshold


def statistics(columns: Columns) -> tuple[tuple[str, ...], Float[np.ndarray, "n k"]]:
    """The four statistics of the active features, not standardised, and their names."""
    rate, mean, peak = (
        np.log(np.maximum(column(columns, name).astype(np.float64), TINY))
        for name in ("firing_rate", "mean_activation", "max_activation")
    )
    return NAMES, np.stack([-rate, mean, peak, peak - mean], axis=1)


def clusters(rows: Float[np.ndarray, "m d"], at: float = 0.7) -> Int[np.ndarray, "m"]:
    """The cluster of each decoder row: rows with cosine >= at are of one, and so is what they are joined to."""
    rows = np.asarray(rows, np.float32)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
    m, starts = len(rows), range(0, len(rows), BLOCK)
    label = np.arange(m)
    for one, other in product(starts, starts):
        if other < one:
            continue
        i, j = np.nonzero(rows[one : one + BLOCK] @ rows[other : other + BLOCK].T >= at)
        # Joined block by block, so that never more than one block's pairs are held, however many look alike.
        i, j = label[i + one], label[j + other]
        if (i != j).any():
            joined = coo_array((np.ones(len(i), np.int8), (i, j)), shape=(m, m))
            label = connected_components(joined, directed=False)[1][label]
    return np.unique(label, return_inverse=True)[1]


def weighted_auc(
    score: Float[np.ndarray, "n"], label: Bool[np.ndarray, "n"], weight: Float[np.ndarray, "draws n"]
) -> Float[np.ndarray, "draws"]:
    """AUC of one scoring under many weightings of the features; NaN where a weighting leaves only one class."""
    order = np.argsort(score, kind="stable")
    ranked, label, weight = score[order], np.asarray(label, bool)[order], weight[:, order]
    ties = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    yes, no = (np.add.reduceat(np.where(side, weight, 0.0), ties, axis=1) for side in (label, ~label))
    wins = (yes * (np.cumsum(no, axis=1) - no / 2)).sum(1)
    pairs = yes.sum(1) * no.sum(1)
    return np.divide(wins, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def auc(
    score: Float[np.ndarray, "n"], label: Bool[np.ndarray, "n"], groups: Int[np.ndarray, "n"] | None = None
) -> Interval:
    """The AUC, and with groups its interval over resamples of them."""
    value = float(weighted_auc(score, label, np.ones((1, len(score))))[0])
    if groups is None:
        return Interval(value, np.nan, np.nan)
    names, at = np.unique(groups, return_inverse=True)
    counts = resamples(len(names), DRAWS).astype(np.uint8)
    drawn = [weighted_auc(score, label, counts[s : s + AT_ONCE][:, at]) for s in range(0, DRAWS, AT_ONCE)]
    every = np.concatenate(drawn)
    some = every[np.isfinite(every)]  # a resample of one class alone has no AUC
    return percentile(value, some if 2 * len(some) > len(every) else [np.nan], len(names))


def logistic() -> Any:
    """The scaler is in the pipeline, so that every fold has its own."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=1000))


def boosting(seed: int) -> Any:
    """No early stopping: it would hold features out without regard to their clusters."""
    return HistGradientBoostingClassifier(random_state=seed).set_params(early_stopping=False)


def _fold_of(label: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> Int[np.ndarray, "n"] | str:
    """The fold in which each feature is judged, or why there are no folds."""
    positive, negative, several = int(label.sum()), int((~label).sum()), len(np.unique(groups))
    for count, what in ((positive, "features survived"), (negative, "features were lost"), (several, "clusters")):
        if count < folds:
            return f"{count} {what}: {folds} folds need at least {folds}"
    splits = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(label, label, groups)
    fold = np.zeros(len(label), int)
    for k, (_, judged) in enumerate(splits):
        fold[judged] = k
    if any(len(np.unique(label[fold != k])) < 2 for k in range(folds)):
        return "one cluster of look-alike features holds almost all that survived, or almost all that were lost"
    return fold


def _held_out(
    model: Any, x: np.ndarray, label: np.ndarray, fold: np.ndarray, judged: Any = None, theirs: Any = None
) -> np.ndarray:
    """The probability of survival that each feature is given by a model fitted to the other folds. `judged` are
    statistics of another table, of the folds `theirs`, which are judged in place of those fitted to."""
    judged, theirs = (x, fold) if judged is None else (judged, theirs)
    found = np.zeros(len(judged))
    # Trees of so few rows are done sooner than threads meet, and beside other work threads wait for minutes.
    with threadpool_limits(1):
        for k in np.unique(fold):
            if np.any(theirs == k):
                fresh: Any = clone(model)
                fresh.fit(x[fold != k], label[fold != k])
                found[theirs == k] = fresh.predict_proba(judged[theirs == k])[:, 1]
    return found


def _judge(p: np.ndarray, label: np.ndarray, fold: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """All figures of one model's held-out probabilities."""
    own = [auc(p[fold == k], label[fold == k]).value for k in np.unique(fold)]
    bins = [part for part in np.array_split(np.argsort(p, kind="stable"), BINS) if len(part)]
    calibration = [{"predicted": float(p[b].mean()), "observed": float(label[b].mean()), "n": len(b)} for b in bins]
    return {
        "auc": auc(p, label, groups).as_dict(),
        "fold_sd": float(np.std([value for value in own if np.isfinite(value)] or [np.nan])),
        "brier": float(np.mean((p - label) ** 2)),
        "ece": sum(row["n"] * abs(row["predicted"] - row["observed"]) for row in calibration) / len(p),
        "calibration": calibration,
    }


def _size(label: np.ndarray) -> dict[str, Any]:
    return {"n": len(label), "positive": float(label.mean()) if len(label) else float("nan")}


def predict(
    columns: Columns, groups: Int[np.ndarray, "n"], *, folds: int = 5, seed: int = 0, threshold: float = 0.9
) -> dict[str, Any]:
    """How well survival of the n active features is told, `groups` being their clusters: `logistic` and `boosting`
    with their figures, `marginal`, `without`. `largest` is the share of features in the largest cluster, which no fold
    can divide. Where there is too little to judge, a `reason` stands in place of the figures."""
    (names, x), label = statistics(columns), survived(columns, threshold)
    fold, facts = _fold_of(label, groups, folds, seed), _size(label)
    if isinstance(fold, str):
        return facts | {"reason": fold}
    _, counts = np.unique(groups, return_counts=True)
    facts |= {"clusters": len(counts), "largest": float(counts.max() / len(label))}
    models = {"logistic": logistic(), "boosting": boosting(seed)}
    facts |= {name: _judge(_held_out(model, x, label, fold), label, fold, groups) for name, model in models.items()}
    weights = logistic().fit(x, label)[-1].coef_[0]
    facts["logistic"]["coefficients"] = dict(zip(names, map(float, weights), strict=True))
    alone = {name: auc(x[:, i], label).value for i, name in enumerate(names)}
    facts["marginal"] = {k: {"auc": max(a, 1 - a), "sign": 1 if a >= 0.5 else -1} for k, a in alone.items()}
    rest = {name: _held_out(logistic(), np.delete(x, i, axis=1), label, fold) for i, name in enumerate(names)}
    whole = facts["logistic"]["auc"]["value"]
    facts["without"] = {name: whole - auc(p, label).value for name, p in rest.items()}
    return facts


def paper_protocol(columns: Columns, *, folds: int = 5, seed: int = 0, threshold: float = 0.9) -> dict[str, Any]:
    """The paper's own figure, to be compared with what it prints: stratified folds that know no clusters, statistics
    standardised over all features before they are folded, `auc` and `sd` over folds, coefficients on all."""
    (names, x), label = statistics(columns), survived(columns, threshold)
    if min(label.sum(), (~label).sum()) < folds:
        return _size(label) | {"reason": f"{folds} folds need {folds} features that survived and {folds} that did not"}
    x, model = StandardScaler().fit_transform(x), LogisticRegression(C=1.0, max_iter=1000)
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    found = cross_val_score(model, x, label, cv=split, scoring="roc_auc")
    weights = dict(zip(names, map(float, model.fit(x, label).coef_[0]), strict=True))
    return _size(label) | {"auc": float(np.mean(found)), "sd": float(np.std(found)), "coefficients": weights}


class Table(NamedTuple):
    """The features of one audit under one scheme, the clusters `[m]` of its dictionary's latents, and a name that two
    tables share when they are of one dictionary."""

    columns: Columns
    clusters: Int[np.ndarray, "m"]
    dictionary: str


def transfer(
    tables: Mapping[str, Table], *, folds: int = 5, seed: int = 0, threshold: float = 0.9
) -> list[dict[str, Any]]:
    """The logistic model of each table judged on each, itself included. Two tables of one dictionary hold the same
    features, if not all of them are active in both: what is judged was then fitted to features of other folds, so that
    no cluster is on both sides. Tables of different dictionaries are fitted to and judged as a whole."""
    given = {name: (statistics(t.columns)[1], survived(t.columns, threshold)) for name, t in tables.items()}
    groups = {name: t.clusters[np.asarray(t.columns["active"], bool)] for name, t in tables.items()}
    folded = {name: _fold_of(label, groups[name], folds, seed) for name, (_, label) in given.items()}
    found = []
    for one, other in product(tables, tables):
        (x, label), (judged, truth), fold = given[one], given[other], folded[one]
        row = {"trained_on": one, "judged_on": other, "n": len(truth)}
        missing = [f"{name}: {why}" for name in dict.fromkeys((one, other)) if isinstance(why := folded[name], str)]
        if missing or isinstance(fold, str):
            found.append(row | {"reason": "; ".join(missing)})
            continue
        if tables[one].dictionary == tables[other].dictionary:
            of = dict(zip(groups[one].tolist(), fold.tolist(), strict=True))
            theirs = np.array([of.get(cluster, 0) for cluster in groups[other].tolist()])  # unseen: any model may judge
            p = _held_out(logistic(), x, label, fold, judged, theirs)
        else:
            p = logistic().fit(x, label).predict_proba(judged)[:, 1]
        found.append(row | {"auc": auc(p, truth, groups[other]).as_dict()})
    return found


def deciles(values: Float[np.ndarray, "n"], survived: Bool[np.ndarray, "n"]) -> list[dict[str, float]]:
    """The share that survived in each tenth of the features, from the lowest values to the highest. The tenths are of
    equal count, where the paper's (pandas.qcut) keep equal values together."""
    tenths = [part for part in np.array_split(np.argsort(values, kind="stable"), 10) if len(part)]
    return [{"mean": float(np.mean(values[t])), "survived": float(np.mean(survived[t])), "n": len(t)} for t in tenths]
