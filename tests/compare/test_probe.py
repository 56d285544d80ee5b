"""Sparse probes beside float64 NumPy over stored codes, planted dictionaries, and the classes of made-up tokens."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer, decoders, models

from qsae_jax import capture
from qsae_jax.acts.tokens import Windows
from qsae_jax.compare.probe import CLASSES, MIN, accuracy, labels, probe, scores
from qsae_jax.errors import Interrupted
from qsae_jax.lm.tap import Point
from qsae_jax.lm.tokenizer import TextTokenizer
from qsae_jax.mesh import make_mesh, on_data, place
from qsae_jax.sae.model import SAE
from qsae_jax.sae.sparsity import ReLU
from qsae_jax.stats import bootstrap

POINT, SKIP, K = Point.parse("blocks.1.resid_post"), 2, 3
KEYS = ("hit_pos", "pos", "hit_neg", "neg")


def of_ids(windows):
    """Three classes by id, the second of them too rare to be used."""
    return np.stack([windows.ids % 3 == 0, windows.ids == 5, windows.ids < 60], axis=-1)


def find(lm, saes, windows, marks, mesh=None, point=POINT, **settings: Any):
    settings = {"k": K, "skip_first": SKIP} | settings
    return probe(lm, saes, windows, marks, point, mesh or make_mesh(1, 1), **settings)


def same(mine, other):
    return all(np.array_equal(mine.sums[key], other.sums[key]) for key in KEYS)


@pytest.fixture(scope="module")
def made(tiny_lm, tiny_sae, tiny_windows):
    """(two dictionaries, 70 windows in 64 groups, their labels, and what is found in one batch). The latents of the
    second are of scales from 0.001 to 10, so that it matters what is standardised."""
    even, scale = tiny_sae(1), np.random.default_rng(5).permutation(np.geomspace(1e-3, 10, 32)).astype(np.float32)
    uneven = SAE(ReLU(), even.W_enc * scale[None], even.b_enc[...] * scale, even.W_dec[...], even.b_dec[...])
    saes, windows = {"one": tiny_sae(0), "uneven": uneven}, tiny_windows(70)
    marks = of_ids(windows)
    return saes, windows, marks, find(tiny_lm, saes, windows, marks, batch=70)


def slow_codes(lm, sae, windows):
    """Codes of all latents at every position, by the dictionary's own dense encode of whole arrays."""
    return np.asarray(sae.encode(capture(lm, POINT)(on_data(windows.ids, make_mesh(1, 1)))), np.float64)


def slow_scores(z, y):
    """|mean+ - mean-| / pooled deviation of each latent, from a list of tokens."""
    yes, no = z[y], z[~y]
    within = ((yes - yes.mean(0)) ** 2).sum(0) + ((no - no.mean(0)) ** 2).sum(0)
    deviation = np.sqrt(within / (len(z) - 2) + 1e-6 * (z**2).mean(0))
    return [abs(yes[:, i].mean() - no[:, i].mean()) / d if d else 0 for i, d in enumerate(deviation)]


def test_scores_from_sums_are_those_from_tokens():
    """Latents far from 0, one that is constant, one that never fires, and one that is the class itself."""
    rng = np.random.default_rng(2)
    y = rng.random((500, 2)) < [0.1, 0.6]
    z = np.abs(rng.normal(rng.uniform(0, 9, 12), rng.uniform(0.1, 3, 12), (500, 12))) + 0.3 * y[:, :1]
    z[:, 3], z[:, 4], z[:, 5] = 7, 0, 2 * y[:, 1]
    weights = np.concatenate([np.ones((500, 1)), y], axis=1)
    got = scores(weights.T @ z, (z**2).sum(0), weights.sum(0))
    np.testing.assert_allclose(got, [slow_scores(z, y[:, c]) for c in range(2)], rtol=1e-6, atol=1e-9)
    assert got[1].argmax() == 5 and 900 < got[1, 5] < 2000 and (got[:, 4] == 0).all() and (got[:, 3] < 1e-6).all()


def slow(codes, marks, used):
    """The four sums of every judging group, group by group."""
    n = len(codes)
    groups = [[w for w in range(n) if w * 64 // n == g] for g in range(64)]
    fit = [w for group in groups[::2] for w in group]
    sums = {key: np.zeros((32, marks.shape[-1])) for key in KEYS}
    for c in used:
        z, y = codes[fit, SKIP:].reshape(-1, codes.shape[-1]), marks[fit, SKIP:, c].reshape(-1)
        found = slow_scores(z, y)
        best = sorted(range(len(found)), key=lambda i, found=found: -found[i])[:K]
        mean, scale = z[:, best].mean(0), z[:, best].std(0)
        assert (scale > 0).all()
        model = LogisticRegression(class_weight="balanced", max_iter=1000).fit((z[:, best] - mean) / scale, y)
        for g, group in enumerate(groups[1::2]):
            for x, true in zip(codes[group, SKIP:][..., best].reshape(-1, K), marks[group, SKIP:, c].flat, strict=True):
                told = model.decision_function([(x - mean) / scale])[0] > 0
                side = "pos" if true else "neg"
                sums[side][g, c] += 1
                sums[f"hit_{side}"][g, c] += told == true
    return sums


def test_counts_are_those_of_the_slow_computation(made, tiny_lm):
    """Exactly, in every group; and not those of codes that are one position late."""
    saes, windows, marks, found = made
    assert list(found) == list(saes)
    for name, sae in saes.items():
        codes = slow_codes(tiny_lm, sae, windows)
        wanted, late = (slow(z, marks, used=(0, 2)) for z in (codes, np.roll(codes, 1, axis=1)))
        assert found[name].groups == 32
        for key in KEYS:
            np.testing.assert_array_equal(found[name].sums[key], wanted[key], err_msg=f"{name} {key}")
        assert not np.array_equal(late["hit_pos"], wanted["hit_pos"])
        rates = [wanted[f"hit_{side}"].sum(0)[c] / wanted[side].sum(0)[c] for side in ("pos", "neg") for c in (0, 2)]
        assert accuracy({key: value.sum(0) for key, value in wanted.items()}) == pytest.approx(
            np.mean(rates), abs=1e-12
        )
    assert not same(found["one"], found["uneven"])


def test_a_class_is_left_out_where_one_part_has_too_few(tiny_lm, tiny_sae, tiny_windows):
    """MIN tokens in each part are enough, one fewer in either is not, nor are too few others; then nothing is left."""
    saes, windows = {"one": tiny_sae(0)}, tiny_windows(8)
    fitting = np.arange(8) % 2 == 0

    def marked(fit, judge):
        marks = np.zeros((8, 14), bool)
        for part, count in ((fitting, fit), (~fitting, judge)):
            marks[part] = (np.arange(part.sum() * 14) < count).reshape(-1, 14)
        return np.concatenate([np.ones((8, SKIP), bool), marks], axis=1)[..., None]  # what is skipped counts nowhere

    enough = marked(MIN, MIN)
    (one,) = find(tiny_lm, saes, windows, enough).values()
    assert one.groups == 4 and one.sums["pos"].sum() == MIN and one.sums["neg"].sum() == 4 * 14 - MIN
    for few in (marked(MIN - 1, MIN), marked(MIN, MIN - 1)):
        assert find(tiny_lm, saes, windows, few) == {} == find(tiny_lm, saes, windows, ~few)
        one = find(tiny_lm, saes, windows, np.concatenate([few, enough], axis=-1))["one"]
        assert all((one.sums[key][:, 0] == 0).all() for key in KEYS) and one.sums["pos"][:, 1].sum() == MIN
    assert find(tiny_lm, saes, windows.part(0, 1), enough[:1]) == {}


@pytest.fixture(scope="module")
def planted(tiny_lm):
    """(a dictionary at `embed` whose latent 5 is 1/2 on tokens 0 and 3 of twelve and 0 elsewhere, and so latent 9 on
    2, 3, 4 and 7; windows; the two classes)."""
    classes = np.stack([np.isin(np.arange(12), some) for some in ([0, 3], [2, 3, 4, 7])], axis=-1)
    rows = np.asarray(capture(tiny_lm, "embed")(jnp.arange(12)[None]), np.float64)[0]
    W_enc = np.random.default_rng(0).normal(size=(16, 20)) / 10
    W_enc[:, [5, 9]] = np.linalg.pinv(rows) @ classes
    b_enc = np.where(np.isin(np.arange(20), [5, 9]), -0.5, 0)
    W, b = (jnp.asarray(x, jnp.float32) for x in (W_enc, b_enc))
    ids = np.random.default_rng(1).integers(0, 12, (40, 16), dtype=np.int32)
    return SAE(ReLU(), W, b, W.T, jnp.zeros(16)), Windows(ids, "random", bos=False), classes[ids]


@pytest.mark.parametrize("k", [1, 5, 30])
def test_a_latent_of_the_class_tells_it_and_shuffled_labels_are_chance(planted, tiny_lm, k):
    """More latents than there are is all of them. Labels of the token before are told no better than shuffled ones."""
    sae, windows, marks = planted
    rng = np.random.default_rng(3)
    shuffled = rng.permutation(marks.reshape(-1, 2)).reshape(marks.shape)
    got = {
        name: find(tiny_lm, {"sae": sae}, windows, y, point=Point.parse("embed"), k=k)["sae"]
        for name, y in (("own", marks), ("shuffled", shuffled), ("late", np.roll(marks, 1, axis=1)))
    }
    value = {name: bootstrap({"accuracy": accuracy}, one.sums)["accuracy"] for name, one in got.items()}
    assert (value["own"].low, value["own"].value, value["own"].high) == (1, 1, 1)
    for name in ("shuffled", "late"):
        assert value[name].value == pytest.approx(0.5, abs=0.08) and value[name].low < 0.5 < value[name].high


def test_batches_change_nothing_and_a_stop_is_heard(made, tiny_lm):
    """Batches of 16, of both passes the last filled up with windows that count nowhere."""
    saes, windows, marks, found = made
    told = []
    got = find(tiny_lm, saes, windows, marks, batch=16, advance=told.append)
    assert all(same(got[name], found[name]) for name in saes)
    fitting = sum(w * 64 // 70 % 2 == 0 for w in range(70))
    assert fitting % 16 and 70 % 16 and sum(told) == (fitting + 70) * 16
    with pytest.raises(Interrupted):
        find(tiny_lm, saes, windows, marks, batch=16, stopped=lambda: True)


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_a_mesh_gives_the_same_counts(shape, made, tiny_lm):
    saes, windows, marks, found = made
    mesh = make_mesh(*shape)
    got = find(place(tiny_lm, mesh), {k: place(v, mesh) for k, v in saes.items()}, windows, marks, mesh, batch=16)
    assert all(same(got[name], found[name]) for name in saes)


def test_accuracy_leaves_out_a_class_without_tokens():
    s = {"hit_pos": [3, 0, 5, 0], "pos": [4, 0, 5, 0], "hit_neg": [1, 9, 0, 0], "neg": [2, 9, 0, 0]}
    s = {key: np.array(value, float) for key, value in s.items()}
    assert accuracy(s) == (3 / 4 + 1 / 2) / 2
    assert np.isnan(accuracy({key: value[1:] for key, value in s.items()}))


def byte_level():
    words = (
        *(("Ġthe", "word"), ("the", ""), ("The", "capital"), ("ĠHTTP", "word capital"), ("'S", "capital"), ("Ġ", "")),
        *(("Ġ7", "digit"), ("x2", "digit"), ("3.5", "digit"), ("),", "punctuation"), ("_", "punctuation name")),
        *(("Ċ", "newline"), ("ĊĊĠ", "newline"), (":Ċ", "punctuation newline"), ("Ã", ""), ("Ã©t", "")),
        *(("os.path", "name"), ("e.", ""), ("ĠValueError", "word capital name")),
    )
    return words, decoders.ByteLevel()


def sentence_piece():
    words = (
        ("<0x0A>", "newline"),
        ("▁the", "word"),
        ("re", ""),
        ("▁", ""),
        ("▁-", "punctuation"),
        ("▁É", "word capital"),
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return words, decoders.Sequence(steps)


@pytest.mark.parametrize("kind", [byte_level, sentence_piece])
def test_the_classes_of_tokens(kind):
    """Each token's classes by hand, wherever it stands; a part of a character is of none."""
    told, decoder = kind()
    inner = Tokenizer(models.WordLevel({word: i for i, (word, _) in enumerate(told)}, unk_token=told[0][0]))
    inner.decoder = decoder
    ids = np.random.default_rng(0).permutation(np.repeat(np.arange(len(told), dtype=np.int32), 4)).reshape(4, -1)
    got = labels(Windows(ids, "made up", bos=False), TextTokenizer(inner, None, None, False))
    assert got.shape == (*ids.shape, len(CLASSES)) and got.dtype == bool
    for token, mine in zip(ids.flat, got.reshape(-1, len(CLASSES)), strict=True):
        word, wanted = told[token]
        assert {name for name, yes in zip(CLASSES, mine, strict=True) if yes} == set(wanted.split()), word
