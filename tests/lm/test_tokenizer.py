"""Tokenizers out of GGUF files and folders give the ids of transformers' tokenizer, exactly.

A small byte-level BPE is trained here. The oracle is transformers, from a `tokenizer.json` whose splitting rules are
those that GPT-2, SmolLM, Llama 3, Qwen 2 and Pythia publish on the hub.
"""

import json
import unicodedata

import gguf
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qsae_jax.errors import UserError
from qsae_jax.lm.tokenizer import load_tokenizer

SPECIAL = ["<|begin|>", "<|end|>", "<|im_start|>"]
CORPUS = """The weights of a model are rounded: 1, 22, 333, 4444 and 2026 of them, and I'll say it's done, we've seen.
    def round_to(grid, x):\n        return grid[int(x * 127)]  # it isn't exact\n\n\n
Überraschung: naïve café, Ωμέγα, Привет, 日本語 and 🙂🙂 in the same text; the same words again, again and again.
"""
TEXTS = [
    "",
    " ",
    "Hello, the weights are rounded again.",
    "  two  spaces,   three\tand a tab\t\t",
    "line\nline\r\n\n\n   indented\n \n",
    "0 12 345 6789 2026-10-07 3.14159 1e-6 ½ ² ٣٤٥",
    "it's WE'VE I'll don't 'S ''re",
    "naïve café Ωμέγα Привет 日本語 🙂🙃 a\u0301 \u200b\ufeff",
    "def f(x):\n    return x[1:]  # ok??!\n",
    "<|begin|>user<|im_start|> and <|end|>12<|end|>",
    "<|begin|", "a<|begin|>12 b", "\0\x7f\u00a0end", "rounded" * 40,
]  # fmt: skip

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
PUBLISHED = {
    "gpt-2": BYTES | {"use_regex": True},
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}],
    },
    "llama-bpe": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False},
            BYTES | {"use_regex": False},
        ],
    },
    "qwen2": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False},
            BYTES | {"use_regex": False},
        ],
    },
    "olmo": BYTES | {"use_regex": True},
}
COMPOSED = ("qwen2", "olmo")  # with the normalizer NFC; the second is GPT-NeoX's, as llama.cpp calls it


@pytest.fixture(scope="module")
def trained():
    """(vocabulary, merges) of a BPE of 420 tokens, one of them a word that no merge reaches, as Llama 3 has them."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([CORPUS], trainer)
    facts = json.loads(inner.to_str())["model"]
    vocabulary = facts["vocab"] | {"Hello": len(facts["vocab"])}
    return vocabulary, [tuple(merge) for merge in facts["merges"]]


@pytest.fixture
def published(trained, tmp_path):
    """Writes `tokenizer.json` as the family publishes it; gives its folder."""

    def write(split, adds_bos=False):
        vocabulary, merges = trained
        inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split == "llama-bpe"))
        inner.decoder = decoders.ByteLevel()
        facts = json.loads(inner.to_str())
        facts["pre_tokenizer"] = PUBLISHED[split]
        facts["normalizer"] = {"type": "NFC"} if split in COMPOSED else None
        flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
        facts["added_tokens"] = [{"id": i, "content": name, "special": True} | flags for i, name in enumerate(SPECIAL)]
        if adds_bos:
            pieces = [{"SpecialToken": {"id": SPECIAL[0], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
            token = {SPECIAL[0]: {"id": SPECIAL[0], "ids": [0], "tokens": SPECIAL[:1]}}
            facts["post_processor"] = {
                "type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": token
            }  # fmt: skip
        folder = tmp_path / f"published-{split}"
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(facts))
        named = {"bos_token": SPECIAL[0], "eos_token": {"content": SPECIAL[1], "__type": "AddedToken"}}
        (folder / "tokenizer_config.json").write_text(json.dumps(named))
        return folder

    return write


@pytest.fixture
def packed(trained, tmp_path):
    """Writes the tokenizer into a GGUF file without tensors, as llama.cpp's converter does."""

    def write(split, adds_bos=None, model="gpt2", bos=0, architecture="llama"):
        vocabulary, merges = trained
        writer = gguf.GGUFWriter(tmp_path / f"{split}.gguf", architecture)
        writer.add_tokenizer_model(model)
        if split is not None:
            writer.add_tokenizer_pre(split)
        writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
        control, user, normal = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.NORMAL
        writer.add_token_types([control, control, user, *[normal] * (len(vocabulary) - 3)])
        writer.add_token_merges([" ".join(merge) for merge in merges])
        if bos is not None:
            writer.add_bos_token_id(bos)
        writer.add_eos_token_id(1)
        if adds_bos is not None:
            writer.add_add_bos_token(adds_bos)
        for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
            getattr(writer, step)()
        return str(tmp_path / f"{split}.gguf")

    return write


def oracle(folder):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return [theirs.encode(text, add_special_tokens=False) for text in TEXTS]


@pytest.mark.parametrize("split", PUBLISHED)
def test_ids_of_a_gguf_file_equal_transformers(packed, published, split):
    """On every text, and text -> ids -> text loses nothing. Control: each of the other rules of splitting gives
    other ids somewhere."""
    ours = load_tokenizer(packed(split))
    expected = oracle(published(split))
    assert [ours.encode(text) for text in TEXTS] == expected
    composed = [unicodedata.normalize("NFC", text) for text in TEXTS]
    assert composed != TEXTS and [ours.decode(ids) for ids in expected] == (composed if split in COMPOSED else TEXTS)
    assert (ours.bos_id, ours.eos_id) == (0, 1)
    for other in PUBLISHED.keys() - {split}:
        assert oracle(published(other)) != expected


@pytest.mark.parametrize("split", PUBLISHED)
def test_ids_of_a_folder_equal_transformers_and_survive_saving(packed, published, split, tmp_path):
    """`save` from either source gives a folder that transformers and we read alike, special tokens included."""
    from transformers import AutoTokenizer

    expected = oracle(published(split))
    for source in (str(published(split)), packed(split)):
        ours = load_tokenizer(source)
        assert [ours.encode(text) for text in TEXTS] == expected
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        ours.save(out)
        again = load_tokenizer(str(out))
        assert [again.encode(text) for text in TEXTS] == expected == oracle(out)
        assert (again.bos_id, again.eos_id, again.adds_bos) == (0, 1, ours.adds_bos)
        theirs = AutoTokenizer.from_pretrained(out)
        assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)


def test_pythia_is_known_by_its_architecture(packed, published):
    """llama.cpp writes `olmo` or `mpt` for its tokenizer, older converters `default`, `gpt-2` or nothing. Controls:
    another architecture with `gpt-2` is GPT-2's, and with `default` is refused."""
    expected = oracle(published("olmo"))
    for split in ("olmo", "mpt", "default", "gpt-2", None):
        ours = load_tokenizer(packed(split, architecture="gptneox"))
        assert [ours.encode(text) for text in TEXTS] == expected and not ours.adds_bos
    assert [load_tokenizer(packed("gpt-2")).encode(text) for text in TEXTS] == oracle(published("gpt-2")) != expected
    with pytest.raises(UserError, match="gpt2/default"):
        load_tokenizer(packed("default"))


def test_special_tokens_are_told_from_their_text(packed):
    """Matched whole, in the vocabulary's own ids; a part of one is text. Control: a token of normal type is not."""
    ours = load_tokenizer(packed("smollm"))
    assert ours.encode("<|begin|>") == [0] and ours.encode("<|im_start|>") == [2]
    assert len(ours.encode("<|begin|")) > 1 and 0 not in ours.encode("<|begin|")
    assert len(ours.encode("Hello")) > 1  # of normal type, and no merge reaches it


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("split", ["gpt-2", "llama-bpe"])
def test_adds_bos_of_a_gguf_file(packed, split, adds):
    """The key decides, and needs a token. `encode` adds none either way."""
    ours = load_tokenizer(packed(split, adds))
    assert ours.adds_bos is adds
    assert ours.encode("the")[:1] != [0]
    assert load_tokenizer(packed(split, adds, bos=None)).adds_bos is False


@pytest.mark.parametrize("split, adds", [("gpt-2", False), ("smollm", False), ("llama-bpe", True), ("qwen2", False)])
def test_adds_bos_without_the_key(packed, split, adds):
    """llama.cpp's own rule for files that do not say (llama-vocab.cpp): Llama 3 adds it, the others do not."""
    assert load_tokenizer(packed(split)).adds_bos is adds


@pytest.mark.parametrize("adds", [True, False])
def test_adds_bos_of_a_folder(published, adds):
    """Read off the post-processor, kept by `save`; `encode` adds none either way."""
    folder = published("llama-bpe", adds)
    ours = load_tokenizer(str(folder))
    assert ours.adds_bos is adds
    assert ours.encode("the")[:1] != [0]
    out = folder.parent / "saved"
    out.mkdir()
    ours.save(out)
    assert load_tokenizer(str(out)).adds_bos is adds


def test_padding_and_truncation_of_a_folder_are_left_out(published):
    """Many published files truncate at 512. Control: the library alone, from the same file, does cut."""
    folder = published("gpt-2")
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.enable_truncation(5)
    inner.enable_padding(length=9)
    inner.save(str(folder / "tokenizer.json"))
    text = TEXTS[2]
    assert len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids) == 9
    assert load_tokenizer(str(folder)).decode(load_tokenizer(str(folder)).encode(text)) == text


@pytest.mark.parametrize("how", [{"model": "t5"}, {"split": "deepseek-llm"}])
def test_another_kind_in_a_gguf_file_is_refused(packed, how):
    with pytest.raises(UserError, match=next(iter(how.values()))):
        load_tokenizer(packed(**{"split": "gpt-2"} | how))


@pytest.mark.parametrize("content", [None, "{", '{"model": {}}', "\ufeff[]"])
def test_a_folder_without_a_readable_one_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_folder_that_lacks_something_is_told_the_remedy(tmp_path):
    """A SentencePiece model alone, and a tokenizer.json without its model. Control: whole, it is read."""
    empty, reasons = '{"added_tokens": []}', (r"tokenizer\.model .*save_pretrained", "describes no model")
    for name, text, why in zip(("tokenizer.model", "tokenizer.json"), ("", empty), reasons, strict=True):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=why):
            load_tokenizer(str(tmp_path))
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).encode("a") == [0]
