"""What became of each latent beside loops over the definitions, planted fates, and shuffled dictionaries."""

import numpy as np
import pytest

from qsae_jax.compare import match as module
from qsae_jax.compare.fates import fates
from qsae_jax.sae.model import SAE
from qsae_jax.sae.sparsity import TopK

OF_ONE, OF_OTHER = ("lost", "split", "kept"), ("new", "merged", "carried")


def dictionary(W_dec):
    """A dictionary whose encoder has nothing to do with its decoder."""
    m, d = W_dec.shape
    W_enc = np.random.default_rng(99).normal(size=(d, m))
    zeros = np.zeros(m, np.float32), np.zeros(d, np.float32)
    return SAE(TopK(2), W_enc.astype(np.float32), zeros[0], np.asarray(W_dec, np.float32), zeros[1])


def found(one, other, alive_one=None, alive_other=None):
    alive = [np.ones(len(W), bool) if a is None else a for W, a in ((one, alive_one), (other, alive_other))]
    return fates(dictionary(one), dictionary(other), *alive)


def plain(got):
    """Fates as lists of numbers; parts and sources by the latent that they are of."""
    lists = {name: getattr(got, name).tolist() for name in OF_ONE + OF_OTHER}
    parts = {i: p.tolist() for i, p in zip(lists["split"], got.parts, strict=True)}
    return lists | {
        "parts": parts,
        "sources": {j: s.tolist() for j, s in zip(lists["merged"], got.sources, strict=True)},
    }


def slow(one, other, alive_one, alive_other):
    """The docstring's definitions, pair by pair in float64."""

    def cosine(a, b):
        return float(a @ b) / (float(a @ a) * float(b @ b)) ** 0.5

    def side(mine, theirs):
        """(alone, several, rest, parts) of latents `mine` among `theirs`, each number -> direction."""
        partners = {i: [j for j in theirs if cosine(mine[i], theirs[j]) >= 0.7] for i in mine}
        nearest = {j: max(mine, key=lambda i, j=j: cosine(mine[i], theirs[j])) for j in theirs} if mine else {}
        parts = {i: [j for j in partners[i] if nearest[j] == i] for i in mine}
        alone, several = [i for i in mine if not partners[i]], [i for i in mine if len(parts[i]) > 1]
        rest = [i for i in mine if i not in alone + several]
        return alone, several, rest, {i: parts[i] for i in several}

    mine, theirs = (
        {i: W[i].astype(np.float64) for i in np.flatnonzero(a).tolist()}
        for W, a in ((one, alive_one), (other, alive_other))
    )
    *there, parts = side(mine, theirs)
    *back, sources = side(theirs, mine)
    return dict(zip(OF_ONE + OF_OTHER, there + back, strict=True)) | {"parts": parts, "sources": sources}


def crowd(seed, m=60, n=45, d=4):
    """Directions in so little room that many are partners, and so many dead that numbers and places differ."""
    rng = np.random.default_rng(seed)
    one, other = (rng.normal(size=(k, d)).astype(np.float32) for k in (m, n))
    return one, other, rng.random(m) < 0.4, rng.random(n) < 0.5


@pytest.mark.parametrize("seed", range(6))
def test_fates_are_those_of_the_definitions(seed, monkeypatch):
    """In blocks of any size; every fate occurs. Control: the two dictionaries the other way round."""
    planted = crowd(seed)
    wanted = slow(*planted)
    assert plain(found(*planted)) == wanted
    monkeypatch.setattr(module, "BLOCK", 5)
    assert plain(found(*planted)) == wanted
    if seed == 0:
        assert all(wanted.values()), "a fate that does not occur is not tested"
    one, other, alive_one, alive_other = planted
    back = plain(found(other, one, alive_other, alive_one))
    assert [back[name] for name in ("lost", "split", "parts")] == [wanted[k] for k in ("new", "merged", "sources")]
    assert back != wanted


@pytest.mark.parametrize("seed", range(6))
def test_fates_part_the_latents_that_fire(seed):
    one, other, alive_one, alive_other = crowd(seed)
    got = found(one, other, alive_one, alive_other)
    shares = got.shares()
    for names, alive in ((OF_ONE, alive_one), (OF_OTHER, alive_other)):
        together = np.concatenate([getattr(got, name) for name in names])
        assert sorted(together) == np.flatnonzero(alive).tolist()
        assert sum(shares[name] for name in names) == pytest.approx(1)
        assert shares[names[1]] == len(getattr(got, names[1])) / alive.sum()
    for parts, theirs in ((got.parts, got.new), (got.sources, got.lost)):
        flat = np.concatenate(parts) if parts else np.zeros(0, int)
        assert len(set(flat)) == len(flat) and not set(flat) & set(theirs)


@pytest.fixture(scope="module")
def planted():
    """`one`: 12 random directions of 256, of which the last two lean on each other. `other`: latents 2 to 9 as they
    are; latent 0 twice, with small noise; nothing of latent 1; the mean of the last two; a random one."""
    rng = np.random.default_rng(0)
    one = rng.normal(size=(12, 256))
    one[11] += 0.5 * one[10]
    noise = 0.2 * rng.normal(size=(2, 256))
    other = np.concatenate([one[2:10], one[:1] + noise, one[10:].mean(0, keepdims=True), rng.normal(size=(1, 256))])
    return one.astype(np.float32), other.astype(np.float32)


def test_planted_fates_are_found(planted):
    got = found(*planted)
    wanted = {"lost": [1], "split": [0], "kept": list(range(2, 12)), "parts": {0: [8, 9]}}
    wanted |= {"new": [11], "merged": [10], "carried": list(range(10)), "sources": {10: [10, 11]}}
    assert plain(got) == wanted
    shares = {"lost": 1 / 12, "split": 1 / 12, "kept": 10 / 12, "new": 1 / 12, "merged": 1 / 12, "carried": 10 / 12}
    assert got.shares() == pytest.approx(shares)


def test_noise_that_hides_the_copies_is_no_split(planted):
    """Control: two copies at cosine 0.45 are new latents, and theirs is lost."""
    one, other = planted
    other = other.copy()
    other[8:10] = one[0] + 2 * np.random.default_rng(1).normal(size=(2, 256))
    got = plain(found(one, other))
    assert got["split"] == [] and got["lost"] == [0, 1] and got["new"] == [8, 9, 11] and got["merged"] == [10]


def test_latents_that_do_not_fire_are_not_there(planted):
    one, other = planted
    alive_one, alive_other = np.arange(12) != 11, np.arange(12) != 9
    got = plain(found(one, other, alive_one, alive_other))
    assert got["split"] == got["merged"] == [] and got["lost"] == [1] and got["new"] == [11]
    assert got["kept"] == [0, *range(2, 11)] and got["carried"] == [*range(9), 10]


def test_a_dictionary_keeps_itself():
    W = np.random.default_rng(3).normal(size=(30, 64))
    order = np.random.default_rng(4).permutation(30)
    got = found(W, 3 * W[order])
    assert got.shares() == {"lost": 0, "split": 0, "kept": 1, "new": 0, "merged": 0, "carried": 1}
    assert got.parts == got.sources == ()


@pytest.mark.parametrize("seed", range(4))
def test_shuffling_the_other_changes_its_numbers_only(seed):
    one, other, alive_one, alive_other = crowd(seed)
    order = np.random.default_rng(seed).permutation(len(other))
    place = np.argsort(order)  # where latent j has gone
    before = plain(found(one, other, alive_one, alive_other))
    after = plain(found(one, other[order], alive_one, alive_other[order]))
    assert [after[name] for name in OF_ONE] == [before[name] for name in OF_ONE]
    for name in OF_OTHER:
        assert after[name] == sorted(place[before[name]].tolist())
    assert after["parts"] == {i: sorted(place[p].tolist()) for i, p in before["parts"].items()}
    assert after["sources"] == {int(place[j]): s for j, s in before["sources"].items()}
    assert after["carried"] != before["carried"], "the control: numbers do change"


def test_a_dictionary_of_which_nothing_fires():
    one, other, alive_one, alive_other = crowd(0)
    got = found(one, other, alive_one, np.zeros(45, bool))
    assert got.lost.tolist() == np.flatnonzero(alive_one).tolist() and len(got.kept) == len(got.new) == 0
    assert got.shares()["lost"] == 1 and np.isnan(got.shares()["new"])
    got = found(one, other, np.zeros(60, bool), alive_other)
    assert got.new.tolist() == np.flatnonzero(alive_other).tolist()
    assert got.shares()["new"] == 1 and np.isnan(got.shares()["lost"])
