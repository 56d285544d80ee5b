"""Matching of dictionaries beside loops, all permutations, and planted permutations of one dictionary."""

import itertools

import numpy as np
import pytest

from qsae_jax.compare.match import assigned, match, matched
from qsae_jax.sae.model import SAE
from qsae_jax.sae.sparsity import TopK


def slow(decoder, encoder):
    m = len(decoder)
    best = {name: max(itertools.permutations(range(m)), key=lambda p, c=c: sum(c[i][p[i]] for i in range(m)))
            for name, c in (("dec", decoder), ("enc", encoder))}  # fmt: skip
    agreed = [best["dec"][i] == best["enc"][i] and decoder[i][best["dec"][i]] >= 0.7 for i in range(m)]
    nearest = [max(range(m), key=lambda j, i=i: decoder[i][j]) for i in range(m)]
    back = [max(range(m), key=lambda i, j=j: decoder[i][j]) for j in range(m)]
    mutual = [back[nearest[i]] == i and decoder[i][nearest[i]] >= 0.7 for i in range(m)]
    mean = sum(max(row) for row in decoder) / m
    return {"mmcs": mean, "mnn": sum(mutual) / m, "assigned": sum(agreed) / m}


@pytest.mark.parametrize("seed", range(4))
def test_the_figures_are_those_of_all_permutations(seed):
    rng = np.random.default_rng(seed)
    base = np.eye(6)[rng.permutation(6)]
    decoder, encoder = (np.clip(base + rng.normal(0, 0.35, (6, 6)), -1, 1) for _ in range(2))
    assert matched(decoder, encoder) == pytest.approx(slow(decoder, encoder))


@pytest.mark.parametrize("shape", [(6, 5), (5, 6)])
def test_dictionaries_of_two_sizes(shape):
    """Latents left over have no partner: against all injections of the smaller into the larger; the cosines of
    encoder and decoder drop different rows."""
    rng = np.random.default_rng(3)
    shared = np.eye(*shape)
    decoder, encoder = (np.clip(shared + rng.normal(0, 0.3, shape), -1, 1) for _ in range(2))

    def best(c):
        c = c if shape[0] <= shape[1] else c.T
        rows = max(
            itertools.permutations(range(c.shape[1]), len(c)), key=lambda p: sum(c[i][j] for i, j in enumerate(p))
        )
        return {(i, j) if shape[0] <= shape[1] else (j, i) for i, j in enumerate(rows)}

    same = [pair for pair in best(decoder) & best(encoder) if decoder[pair] >= 0.7]
    assert assigned(decoder, encoder) == pytest.approx(len(same) / shape[0])
    assert len(best(decoder) & best(encoder)) > 2


def dictionary(W_dec):
    m, d = W_dec.shape
    return SAE(TopK(2), W_dec.T, np.zeros(m, np.float32), W_dec, np.zeros(d, np.float32))


def test_a_shuffled_dictionary_is_the_same_and_another_is_not():
    rng = np.random.default_rng(0)
    W = rng.normal(size=(40, 64)).astype(np.float32)
    all_alive = np.ones(40, bool)
    same = match(dictionary(W), dictionary(3 * W[rng.permutation(40)]), all_alive, all_alive)
    assert same == pytest.approx({"mmcs": 1, "mnn": 1, "assigned": 1}, abs=1e-5)
    other = match(dictionary(W), dictionary(rng.normal(size=(40, 64)).astype(np.float32)), all_alive, all_alive)
    assert other["mnn"] == other["assigned"] == 0 and other["mmcs"] < 0.5


def test_only_latents_that_fire_are_matched():
    W = np.random.default_rng(1).normal(size=(40, 64)).astype(np.float32)
    alive, none = np.arange(40) < 10, np.zeros(40, bool)
    assert match(dictionary(W), dictionary(W), alive, ~alive)["mnn"] == 0
    assert match(dictionary(W), dictionary(W), alive, alive)["mnn"] == 1
    assert match(dictionary(W), dictionary(W), alive, none) == {"mmcs": 0, "mnn": 0, "assigned": 0}
