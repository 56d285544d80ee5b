"""Overlap of what two distortions damage, beside sets in plain Python, SciPy, and the paper's published counts."""

import numpy as np
import pytest
import scipy.stats

from qsae_jax.audit.overlap import lost, of_counts, overlap
from qsae_jax.errors import UserError
from qsae_jax.stats import about, percentile


def damaged_alike(n=400, noise=0.05, seed=0):
    """r of n features under two distortions that hit the same ones, some of it equal."""
    rng = np.random.default_rng(seed)
    base = rng.beta(4, 1, n)
    one, other = (np.clip(base + rng.normal(size=n) * noise, -1, 1).round(2) for _ in range(2))
    return one, other


@pytest.mark.parametrize(
    "n, one, other, both, jaccard, chance, ceiling",
    [
        (5688, 2139, 2220, 2016, 0.8604353393085787, 0.237, 0.964),  # Pythia-70M, INT6 and matched pruning, r <= 0.9
        (7144, 3479, 4388, 3478, 0.7924356345408977, 0.373, 0.793),  # Gemma-2-2B
        (5688, 58, 17, 13, 0.20967741935483872, 0.0023, 17 / 58),  # Pythia-70M, r < 0.5
        (7144, 0, 17, 0, 0.0, 0.0, 0.0),
    ],
)
def test_the_papers_figures(n, one, other, both, jaccard, chance, ceiling):
    """From the counts that arXiv 2606.03002 publishes. Control: dividing by the larger set is not the index."""
    found = of_counts(n, one, other, both)
    assert found["jaccard"] == pytest.approx(jaccard, abs=1e-12)
    assert found["chance"] == pytest.approx(chance, abs=6e-4) and found["ceiling"] == pytest.approx(ceiling, abs=6e-4)
    assert not both or abs(both / max(one, other) - jaccard) > 1e-4


def test_chance_is_what_independent_sets_give():
    """The mean Jaccard index of random sets of these sizes (0.005). Control: the product of shares is another."""
    rng, n, one, other = np.random.default_rng(0), 500, 200, 120
    drawn = []
    for _ in range(300):
        a, b = (set(rng.choice(n, size, replace=False)) for size in (one, other))
        drawn.append(len(a & b) / len(a | b))
    assert of_counts(n, one, other, 0)["chance"] == pytest.approx(np.mean(drawn), abs=0.005)
    assert abs(one * other / n**2 - np.mean(drawn)) > 0.05


@pytest.mark.parametrize("n", [0, 10])
def test_empty_sets_have_no_index(n):
    assert all(np.isnan(value) for value in of_counts(n, 0, 0, 0).values())
    found = overlap(np.ones(n), np.ones(n))
    assert [row["union"] for row in found["lost"]] == [0, 0, 0]
    assert np.isnan(found["lost"][0]["above_chance"]["value"]) and np.isnan(found["spearman"]["value"])


def test_a_value_at_a_bound_falls_as_in_the_paper():
    """r = 0.9 has not survived, r = 0.5 is not damaged. Control: either convention for both gives another count."""
    r = np.array([0.9, 0.5, 0.95, 0.2, 0.8])
    assert lost(r, 0.9).tolist() == [True, True, False, True, True]
    assert lost(r, 0.5).tolist() == [False, False, False, True, False]
    assert (r < 0.9).sum() != lost(r, 0.9).sum() and (r <= 0.5).sum() != lost(r, 0.5).sum()
    assert [row["one"] for row in overlap(r, r)["lost"]] == [4, 3, 1]
    assert lost(r.astype(np.float32), 0.9).tolist() == lost(r, 0.9).tolist()


def test_sets_and_correlations_are_python_s_and_scipy_s():
    """Every figure (1e-12). Control: the other's features shuffled."""
    one, other = damaged_alike()
    found, at_random = overlap(one, other), overlap(one, np.random.default_rng(1).permutation(other))
    for row, shuffled in zip(found["lost"], at_random["lost"], strict=True):
        a, b = (
            {i for i, value in enumerate(r) if (value < 0.5 if row["threshold"] == 0.5 else value <= row["threshold"])}
            for r in (one, other)
        )
        assert (row["one"], row["other"], row["both"], row["union"]) == (len(a), len(b), len(a & b), len(a | b))
        jaccard, e = len(a & b) / len(a | b), len(a) * len(b) / 400
        chance, ceiling = e / (len(a) + len(b) - e), min(len(a), len(b)) / max(len(a), len(b))
        assert row["jaccard"]["value"] == pytest.approx(jaccard, abs=1e-12)
        assert row["chance"] == pytest.approx(chance, abs=1e-12)
        assert row["ceiling"] == pytest.approx(ceiling, abs=1e-12)
        assert row["above_chance"]["value"] == pytest.approx((jaccard - chance) / (ceiling - chance), abs=1e-12)
        assert row["above_chance"]["value"] > 0.5 and abs(shuffled["above_chance"]["value"]) < 0.15
    assert found["spearman"]["value"] == pytest.approx(scipy.stats.spearmanr(1 - one, 1 - other)[0], abs=1e-12)
    assert found["pearson"]["value"] == pytest.approx(scipy.stats.pearsonr(1 - one, 1 - other)[0], abs=1e-12)
    assert abs(found["spearman"]["value"] - found["pearson"]["value"]) > 1e-3 > abs(at_random["n"] - 400)
    assert abs(at_random["spearman"]["value"]) < 0.15
    assert found["spearman"]["low"] is None and found["lost"][0]["jaccard"]["high"] is None


def test_nested_sets_are_at_the_ceiling():
    r = np.linspace(0, 1, 101)
    row = overlap(r, r - 0.05)["lost"][0]
    assert row["above_chance"]["value"] == pytest.approx(1) and row["jaccard"]["value"] < 0.95
    assert overlap(r, r[::-1])["lost"][2]["above_chance"]["value"] < -0.3


def test_all_features_lost_leave_no_room_above_chance():
    """For any sizes, rounding included. Control: one feature kept leaves some."""
    for n in range(2, 50, 3):
        for few in range(1, n):
            r = np.where(np.arange(n) < few, 0.0, 1.0)
            assert np.isnan(overlap(r, np.zeros(n), thresholds=[0.9])["lost"][0]["above_chance"]["value"])
            kept = overlap(r, 1.0 * (np.arange(n) == n - 1), thresholds=[0.9])
            assert kept["lost"][0]["above_chance"]["value"] == pytest.approx(1)


def test_intervals_are_of_the_paired_resamples():
    """Beside a plain loop over 250 resamples, more than are looked at together. Control: the other's resamples in
    another order are no longer of the same tokens, which widens the interval."""
    one, other = damaged_alike(noise=0.02)
    rng = np.random.default_rng(3)
    shared = rng.normal(size=(250, 1)) * 0.05  # what a resample of tokens does to both
    drawn = [(r + shared + rng.normal(size=(250, 400)) * 0.002).astype(np.float32) for r in (one, other)]
    found = overlap(one, other, *drawn, groups=16)
    jaccard, spearman = [], []
    for a, b in zip(*drawn, strict=True):
        jaccard.append(((a <= 0.9) & (b <= 0.9)).sum() / ((a <= 0.9) | (b <= 0.9)).sum())
        spearman.append(scipy.stats.spearmanr(1 - a, 1 - b)[0])
    row = found["lost"][0]["jaccard"]
    assert row == pytest.approx(percentile(row["value"], about(row["value"], jaccard), 16).as_dict(), abs=1e-12)
    value = found["spearman"]["value"]
    wanted = percentile(value, about(value, spearman), 16).as_dict()
    assert found["spearman"] == pytest.approx(wanted, abs=1e-6)
    unpaired = overlap(one, other, drawn[0], drawn[1][::-1], groups=16)["lost"][0]["jaccard"]
    assert unpaired["high"] - unpaired["low"] > 2 * (row["high"] - row["low"])


def test_resamples_without_the_statistic_are_left_out():
    """A set that is empty in a few resamples has an interval from the others; in most of them, none. Nor has one group
    of tokens."""
    value = np.linspace(0, 1, 40)
    few, most = (np.r_[value, np.full(count, np.nan)] for count in (10, 60))
    np.testing.assert_allclose(about(0.7, few), value + 0.2)
    np.testing.assert_allclose(about(0.7, few, 0.3, 1), np.clip(value + 0.2, 0.3, 1))
    assert np.isnan(about(0.5, most)).all()
    r = np.linspace(0, 1, 10)
    none = overlap(r, r, np.zeros((0, 10)), np.zeros((0, 10)), groups=1)
    assert none["pearson"]["value"] == pytest.approx(1) and np.isnan(none["pearson"]["low"])
    assert np.isnan(none["lost"][0]["jaccard"]["high"])


def test_other_features_cannot_be_compared():
    with pytest.raises(UserError, match="5 features with 6: take two schemes of one audit"):
        overlap(np.ones(5), np.ones(6))
    with pytest.raises(AssertionError, match="one distortion alone"):
        overlap(np.ones(5), np.ones(5), np.ones((3, 5)), None, groups=3)
