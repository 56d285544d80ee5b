"""Matching of dictionaries beside loops, all permutations, and planted permutations of one dictionary; correlations of
codes beside those of whole arrays."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.compare import match as module
from qsae_jax.compare.match import Together, assigned, correlated, cosine_blocks, match, matched, nearest
from qsae_jax.mesh import make_mesh, on_data, place
from qsae_jax.sae.model import SAE
from qsae_jax.sae.sparsity import ReLU, TopK

FIGURES = ("mmcs", "mnn_0.5", "mnn", "mnn_0.9", "assigned")


def slow(decoder, encoder):
    m = len(decoder)
    best = {name: max(itertools.permutations(range(m)), key=lambda p, c=c: sum(c[i][p[i]] for i in range(m)))
            for name, c in (("dec", decoder), ("enc", encoder))}  # fmt: skip
    agreed = [best["dec"][i] == best["enc"][i] and decoder[i][best["dec"][i]] >= 0.7 for i in range(m)]
    nearest = [max(range(m), key=lambda j, i=i: decoder[i][j]) for i in range(m)]
    back = [max(range(m), key=lambda i, j=j: decoder[i][j]) for j in range(m)]
    mutual = {cut: sum(back[nearest[i]] == i and decoder[i][nearest[i]] >= cut for i in range(m)) / m
              for cut in (0.5, 0.7, 0.9)}  # fmt: skip
    mean = sum(max(row) for row in decoder) / m
    return {
        "mmcs": mean,
        "mnn_0.5": mutual[0.5],
        "mnn": mutual[0.7],
        "mnn_0.9": mutual[0.9],
        "assigned": sum(agreed) / m,
    }


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
    assert same == pytest.approx(dict.fromkeys(FIGURES, 1), abs=1e-5)
    other = match(dictionary(W), dictionary(rng.normal(size=(40, 64)).astype(np.float32)), all_alive, all_alive)
    assert other["mnn"] == other["assigned"] == 0 and other["mmcs"] < 0.5


def test_only_latents_that_fire_are_matched():
    W = np.random.default_rng(1).normal(size=(40, 64)).astype(np.float32)
    alive, none = np.arange(40) < 10, np.zeros(40, bool)
    assert match(dictionary(W), dictionary(W), alive, ~alive)["mnn"] == 0
    assert match(dictionary(W), dictionary(W), alive, alive)["mnn"] == 1
    assert match(dictionary(W), dictionary(W), alive, none) == dict.fromkeys(FIGURES, 0)


def test_neighbours_are_counted_at_three_cosines():
    """Ten directions turned by a random one to cosines of 0.6, 0.8 and 0.95, in a space wide enough that no two of
    them are alike otherwise."""
    rng = np.random.default_rng(2)
    W, turn = (np.linalg.qr(rng.normal(size=(256, 10)))[0].T for _ in range(2))
    cosine = np.repeat([0.6, 0.8, 0.95], [5, 3, 2])[:, None]
    away = turn - (turn * W).sum(1, keepdims=True) * W
    turned = cosine * W + np.sqrt(1 - cosine**2) * away / np.linalg.norm(away, axis=1, keepdims=True)
    got = match(*(dictionary(w.astype(np.float32)) for w in (W, turned)), *(np.ones(10, bool),) * 2)
    assert (got["mnn_0.5"], got["mnn"], got["mnn_0.9"]) == (1, 0.5, 0.2)


def test_neighbours_found_in_blocks_are_those_of_the_whole(monkeypatch):
    """Rounded cosines, so that there are ties within blocks and across them; and large dictionaries have figures but
    no assignment."""
    cosines = np.random.default_rng(3).normal(size=(50, 30)).round(1)
    whole = nearest([cosines])
    assert (whole.there == cosines.argmax(1)).all() and (whole.back == cosines.argmax(0)).all()
    for size in (1, 7, 49, 50):
        blocks = nearest(cosines[start : start + size] for start in range(0, 50, size))
        assert all((one == other).all() for one, other in zip(whole, blocks, strict=True))
    W, V = (np.random.default_rng(seed).normal(size=(40, 4)).astype(np.float32) for seed in (4, 5))
    alive = np.arange(40) < 33
    small = match(dictionary(W), dictionary(V), alive, alive)
    monkeypatch.setattr(module, "ASSIGNABLE", 32)
    monkeypatch.setattr(module, "BLOCK", 8)
    assert [len(block) for block in cosine_blocks(W, V)] == [8] * 5
    large = match(dictionary(W), dictionary(V), alive, alive)
    assert np.isnan(large.pop("assigned")) and not np.isnan(small.pop("assigned"))
    assert large == pytest.approx(small, abs=1e-6) and 0 < large["mnn_0.9"] < large["mnn_0.5"] < 1


def acts(seed, windows=24, positions=50, d=16):
    """Activations with a mean far from 0, as a language model's."""
    return np.random.default_rng(seed).normal(2, 1, (windows, positions, d)).astype(np.float32)


def streamed(one, x, other, y, batch):
    """In batches of one size, the last of which is filled up with windows of weight 0 and loud activations."""
    together = Together()
    for start in range(0, len(x), batch):
        filled = [np.full((batch, *a.shape[1:]), 100, np.float32) for a in (x, y)]
        real = len(x[start : start + batch])
        for whole, a in zip(filled, (x, y), strict=True):
            whole[:real] = a[start : start + batch]
        together.add(one, jnp.asarray(filled[0]), other, jnp.asarray(filled[1]), np.arange(batch) < real)
    return together.r()


def slow_r(one, x, other, y):
    """np.corrcoef of whole arrays in float64; NaN where a code is one number."""
    codes = [np.asarray(s.encode(jnp.asarray(a)), np.float64).reshape(-1, s.latents) for s, a in ((one, x), (other, y))]
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.corrcoef(*codes, rowvar=False)[: one.latents, one.latents :]
    still = [np.ptp(z, axis=0) == 0 for z in codes]
    return np.where(still[0][:, None] | still[1][None], np.nan, r)


@pytest.fixture(scope="module")
def pair(tiny_sae):
    """A dictionary on activations, and a smaller one of other codes on the same tokens' activations in another model,
    of another width. The first has a latent that never fires and one that is the same on every token."""
    one, rng = tiny_sae(0), np.random.default_rng(1)
    W_enc, b_enc = np.array(one.W_enc), np.array(one.b_enc[...])
    W_enc[:, :2], b_enc[:2] = 0, (-1, 0.7)
    one = SAE(ReLU(), W_enc, b_enc, one.W_dec[...], one.b_dec[...])
    W = rng.normal(size=(20, 24)).astype(np.float32)
    other = SAE(TopK(4), W.T, np.zeros(20, np.float32), W, np.zeros(24, np.float32))
    x = acts(0)
    return one, x, other, (x @ rng.normal(size=(16, 24)) / 4).astype(np.float32)


@pytest.mark.parametrize("batch", [24, 7, 1])
def test_correlations_are_those_of_whole_arrays(pair, batch):
    """24 windows of 50 tokens, at 512 tokens a step: batches of several steps and of less than one, filled up or not.
    Control: the same tokens one position later."""
    got, wanted = streamed(*pair, batch), slow_r(*pair)
    assert np.isnan(got[:2]).all() and not np.isnan(got[2:]).all()
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    one, x, other, y = pair
    later = streamed(one, x[:, :-1], other, y[:, 1:], batch)
    right = slow_r(one, x[:, :-1], other, y[:, :-1])
    assert np.nanmax(np.abs(later - right)) > 0.3


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_a_mesh_gives_the_same_correlations(pair, shape):
    one, x, other, y = pair
    mesh, together = make_mesh(*shape), Together()
    for at in (slice(0, 8), slice(8, 16), slice(16, 24)):
        xs = [on_data(a[at], mesh) for a in (x, y)]
        together.add(place(one, mesh), xs[0], place(other, mesh), xs[1], np.ones(8))
    np.testing.assert_allclose(together.r(), slow_r(*pair), atol=1e-5)


def test_a_dictionary_correlates_with_itself_wherever_it_varies(pair):
    one, x = pair[:2]
    r = streamed(one, x, one, x, 8)
    varies = ~np.isnan(np.diagonal(r))
    assert varies.sum() > 25 and not varies[:2].any()
    np.testing.assert_allclose(np.diagonal(r)[varies], 1, atol=1e-6)
    assert correlated(r, np.ones(32, bool)) == pytest.approx({"act_r": 1, "act_same": 1}, abs=1e-6)
    later = correlated(streamed(one, x[:, :-1], one, x[:, 1:], 8), np.ones(32, bool))
    assert later["act_r"] < 0.3 and later["act_same"] == 0


def test_a_code_of_one_number_has_no_r_however_its_mean_is_rounded(monkeypatch):
    """The float32 mean of 512 equal numbers is not always that number; here it is far off. Control: without what says
    that a code never moves, some of 64 get an r from the rounding error of their sums."""
    right = module._about
    monkeypatch.setattr(module, "_about", lambda *a: right(*a)._replace(mean=right(*a).mean + 0.123))
    rng, W = np.random.default_rng(0), np.eye(4, dtype=np.float32)
    levels = rng.uniform(0.1, 9, 64).astype(np.float32)
    still = SAE(ReLU(), np.zeros((4, 64)), levels, np.ones((64, 4), np.float32), np.zeros(4, np.float32))
    other, together = SAE(ReLU(), W, np.zeros(4, np.float32), W, np.zeros(4, np.float32)), Together()
    for seed in range(3):
        x = acts(seed, 7, 333, 4) - 2
        together.add(still, x, other, x, np.ones(7))
    assert np.isnan(together.r()).all()
    together.totals.sums["moved0"] += 1
    assert np.isfinite(together.r()).any(1).sum() > 10


def test_a_latent_may_differ_only_after_the_first_batch():
    """A code that is constant in the first batch and not in the second varies; one that is constant in each, but at
    two levels, too."""
    W = np.eye(2, dtype=np.float32)
    sae = SAE(ReLU(), W, np.zeros(2, np.float32), W, np.zeros(2, np.float32))
    x = np.ones((2, 100, 2), np.float32)
    x[1, :, 0], x[1, :, 1] = 3, np.arange(100) % 2
    together = Together()
    for i in (0, 1):
        together.add(sae, jnp.asarray(x[i : i + 1]), sae, jnp.asarray(x[i : i + 1]), np.ones(1))
    np.testing.assert_allclose(together.r(), np.corrcoef(x.reshape(-1, 2), rowvar=False), atol=1e-5)


def test_figures_of_correlations_beside_a_loop():
    r = np.random.default_rng(0).uniform(-1, 1, (50, 5))
    r[np.random.default_rng(1).random((50, 5)) < 0.3] = np.nan
    r[7], r[8], r[9, 1:] = np.nan, -0.2, np.nan
    alive = np.arange(50) % 3 > 0
    best = [max(v for v in row if v == v) for row, a in zip(r, alive, strict=True) if a and any(v == v for v in row)]
    wanted = {"act_r": sum(best) / len(best), "act_same": sum(v >= 0.7 for v in best) / len(best)}
    assert correlated(r, alive) == pytest.approx(wanted) and 0 < wanted["act_same"] < 1 and alive[7]
    assert all(np.isnan(v) for v in (correlated(r, np.arange(50) == 7) | correlated(r, np.zeros(50, bool))).values())


def test_without_tokens_or_with_too_many_latents_nothing_is_known(pair, monkeypatch):
    one, x, other, y = pair
    together = Together()
    together.add(one, x, other, y, np.zeros(24))
    assert together.r().shape == (32, 20) and np.isnan(together.r()).all()
    with pytest.raises(ValueError, match="other tokens"):
        together.add(one, x, other, y[:, 1:], np.ones(24))
    monkeypatch.setattr(module, "ASSIGNABLE", 31)
    large = Together()
    large.add(one, x, other, y, np.ones(24))
    r = large.r()
    assert r.shape == (32, 20) and np.isnan(r).all() and r.base is not None and not r.flags.writeable
    assert all(np.isnan(v) for v in correlated(r, np.ones(32, bool)).values())
