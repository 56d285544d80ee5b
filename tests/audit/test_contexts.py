"""Contexts beside a slow float64 NumPy search over stored codes, and the words that tokens write."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qsae_jax import capture, fake_quantize
from qsae_jax.audit.contexts import contexts, with_text
from qsae_jax.errors import Interrupted, UserError
from qsae_jax.lm.tokenizer import TextTokenizer
from qsae_jax.mesh import make_mesh, on_data

POINT, SKIP, TOP, AROUND = "blocks.1.resid_post", 2, 3, 4
FEATURES = list(range(32))


def slow_codes(sae, x):
    """float64 TopK codes `[..., m]`, by a sort."""
    W_enc, b_enc, b_dec = (np.asarray(getattr(sae, name)[...], np.float64) for name in ("W_enc", "b_enc", "b_dec"))
    pre = (np.asarray(x, np.float64) - b_dec) @ W_enc + b_enc
    lowest = np.sort(pre, axis=-1)[..., -sae.sparsity.k, None]
    return np.where(pre >= lowest, np.maximum(pre, 0), 0)


def slow_contexts(runs, ids, score, i):
    """Every token of every window in order of its score; the first of each window are kept."""
    z, q = (run[:, :, i] for run in runs)
    ranked = [(-score[w, p, i], w, p) for w in range(len(ids)) for p in range(SKIP, ids.shape[1]) if score[w, p, i] > 0]
    found, seen = [], set()
    for _, w, p in sorted(ranked):
        if w not in seen and len(found) < TOP:
            seen.add(w)
            part = range(max(0, p - AROUND), min(ids.shape[1], p + AROUND + 1))
            values = {"fp": [z[w, t] for t in part], "twin": [q[w, t] for t in part], "ids": [ids[w, t] for t in part]}
            found.append({"window": w, "position": p, "start": part[0]} | values)
    return found


@pytest.fixture(scope="module")
def made(tiny_lm, tiny_sae, tiny_windows):
    """(the twin, the dictionary, 8 windows, their contexts, found in one batch)."""
    twin, sae, windows = fake_quantize(tiny_lm, "int3"), tiny_sae(), tiny_windows(8)
    return twin, sae, windows, find(tiny_lm, twin, sae, windows, batch=8)


def find(lm, twin, sae, windows, features=FEATURES, point=POINT, **settings):
    settings = {"top": TOP, "around": AROUND, "skip_first": SKIP, "mesh": make_mesh(1, 1)} | settings
    return contexts(lm, twin, sae, windows, point, features, **settings)


def same(mine, other):
    assert len(mine) == len(other)
    for one, two in zip(mine, other, strict=True):
        assert all(list(np.atleast_1d(one[k])) == list(np.atleast_1d(two[k])) for k in ("window", "position", "ids"))
        assert one["start"] == two["start"]
        for run in ("fp", "twin"):
            np.testing.assert_allclose(one[run], two[run], rtol=1e-4, atol=1e-5)


def test_contexts_are_those_of_the_slow_search(made, tiny_lm):
    """Windows, positions, ids and values; positions that are skipped are shown and not ranked; plain JSON."""
    twin, sae, windows, found = made
    tokens = on_data(windows.ids, make_mesh(1, 1))  # as the code has them: one program for both
    z, q = (slow_codes(sae, capture(lm, POINT)(tokens)) for lm in (tiny_lm, twin))
    for name, score in (("peak", np.maximum(z, q)), ("gap", np.abs(z - q))):
        wanted = [slow_contexts((z, q), windows.ids, score, i) for i in FEATURES]
        for row, want in zip(found, wanted, strict=True):
            same(row[name], want)
        first = [(row[name][0]["window"], row[name][0]["position"]) for row in found if row[name]]
        moved = [(row[0]["window"], row[0]["position"]) for row in wanted[1:] + wanted[:1] if row]
        assert first != moved, "a shifted feature must show"
    assert [row["feature"] for row in found] == FEATURES and json.loads(json.dumps(found)) == found
    assert any(context["start"] < SKIP for row in found for context in row["peak"])
    assert any(row["peak"] != row["gap"] for row in found), "two rankings, not one twice"


def test_batches_and_chosen_features_change_nothing(made, tiny_lm):
    """Batches of 3, the last of which is filled up, give what one of all windows does; few features what all do."""
    twin, sae, windows, found = made
    for batch, features in ((3, FEATURES), (3, [7, 3])):
        for row in find(tiny_lm, twin, sae, windows, features, batch=batch):
            same(row["peak"], found[row["feature"]]["peak"])
            same(row["gap"], found[row["feature"]]["gap"])


def test_what_never_fires_or_never_differs_has_no_context(made, tiny_lm, tiny_sae):
    _, _, windows, _ = made
    sae = tiny_sae()
    sae.b_enc[...] = sae.b_enc[...].at[5].set(-1e6)
    silent, other = find(tiny_lm, tiny_lm, sae, windows, [5, 6], batch=3)
    assert silent == {"feature": 5, "peak": [], "gap": []}
    assert len(other["peak"]) == TOP and other["gap"] == []
    assert find(tiny_lm, tiny_lm, sae, windows, [], batch=3) == []


def test_what_cannot_be_is_refused_and_a_stop_is_heard(made, tiny_lm):
    twin, sae, windows, _ = made
    with pytest.raises(UserError, match="feature 32: the dictionary has 0 to 31"):
        find(tiny_lm, twin, sae, windows, [1, 32])
    with pytest.raises(UserError, match="width"):
        find(tiny_lm, twin, sae, windows, point="blocks.1.attn.z")
    told = []
    find(tiny_lm, twin, sae, windows, [1], batch=3, advance=told.append)
    assert sum(told) == windows.ids.size
    with pytest.raises(Interrupted):
        find(tiny_lm, twin, sae, windows, [1], batch=3, stopped=lambda: True)


def byte_level():
    inner = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    inner.decoder = decoders.ByteLevel()
    return inner, inner.token_to_id("Ċ"), inner.token_to_id("Ġ"), inner.token_to_id("a")


def sentence_piece():
    inner = Tokenizer(models.WordLevel({"<0x0A>": 0, "▁": 1, "▁the": 2, "re": 3}, unk_token="re"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    return inner, 0, 1, 2


@pytest.mark.parametrize("kind, last", [(byte_level, "a"), (sentence_piece, " the")])
def test_the_text_of_tokens_keeps_its_white_space(kind, last):
    """A new line, a space, and a word with its space, which SentencePiece's decoders take off the first of a text."""
    inner, *ids = kind()
    found = [{"feature": 1, "peak": [{"ids": ids, "fp": [0.0, 1.0, 2.0]}], "gap": []}]
    (row,) = with_text(found, TextTokenizer(inner, None, None, False))
    assert row["peak"][0] == found[0]["peak"][0] | {"text": ["\n", " ", last]}
    assert row["feature"] == 1 and row["gap"] == [] and "text" not in found[0]["peak"][0]
