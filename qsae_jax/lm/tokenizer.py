"""Tokenizers, by the `tokenizers` library, from a Hugging Face folder or from a GGUF file.

BOS is a fact of the tokenizer: `adds_bos` says whether the model was trained with it before each window.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from qsae_jax.errors import UserError
from qsae_jax.files import read_json
from qsae_jax.lm.gguf import GGUF
from qsae_jax.lm.sources import fetch


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


# How each `tokenizer.ggml.pre` of llama.cpp splits text before the merges.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _byte_level,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    "llama-bpe": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
CONTROL, USER_DEFINED = 3, 4
"""Values of `tokenizer.ggml.token_type` whose tokens are matched whole before anything is split."""


@dataclass(frozen=True)
class TextTokenizer:
    """Text to token ids and back. Special tokens are never added by `encode`; windows get their BOS elsewhere."""

    inner: Tokenizer
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` as transformers reads them."""
        self.inner.save(str(folder / "tokenizer.json"))
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        facts = {key: self.inner.id_to_token(value) for key, value in names.items() if value is not None}
        facts |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": self.adds_bos}
        (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=2) + "\n")


def load_tokenizer(source: str) -> TextTokenizer:
    """The tokenizer that belongs to a model source."""
    path = fetch(source)
    return _from_folder(path) if path.is_dir() else _from_gguf(path)


def _from_folder(folder: Path) -> TextTokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"`{folder}` holds no tokenizer.json: save the tokenizer there, or give tokens as npy:FILE")
    try:
        inner = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(f"`{file}` is not a readable tokenizer ({error}): download it again") from error
    inner.no_truncation()
    inner.no_padding()
    facts = folder / "tokenizer_config.json"
    named = read_json(facts) if facts.is_file() else {}

    def token_id(key: str) -> int | None:
        name = named.get(key)
        name = name.get("content") if isinstance(name, dict) else name
        return inner.token_to_id(name) if isinstance(name, str) else None

    bos = token_id("bos_token")
    first = inner.encode("a", add_special_tokens=True).ids[:1]
    adds = bos is not None and (first == [bos] or named.get("add_bos_token") is True)
    return TextTokenizer(inner, bos, token_id("eos_token"), adds)


def _from_gguf(path: Path) -> TextTokenizer:
    file = GGUF(path)
    kind, split = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in SPLITS:
        known = ", ".join(SPLITS)
        raise UserError(
            f"`{path}`: tokenizer `{kind}/{split}` is not supported (gpt2 with {known}): give npy:FILE tokens"
        )
    names, types = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type", [])
    merges = [tuple(merge.split(" ", 1)) for merge in file.get("tokenizer.ggml.merges", [])]
    llama3 = split == "llama-bpe"  # as llama.cpp: a word of the vocabulary needs no merges, and BOS unless told not to
    inner = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges, ignore_merges=llama3))
    inner.pre_tokenizer = SPLITS[split]()
    inner.decoder = decoders.ByteLevel()
    whole = [name for name, type_ in zip(names, types, strict=False) if type_ in (CONTROL, USER_DEFINED)]
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in whole])
    bos = file.get("tokenizer.ggml.bos_token_id")
    adds = bool(file.get("tokenizer.ggml.add_bos_token", llama3)) and bos is not None
    return TextTokenizer(inner, bos, file.get("tokenizer.ggml.eos_token_id"), adds)
