"""Tokenizers, by the `tokenizers` library, from a Hugging Face folder or from a GGUF file.

BOS is a fact of the tokenizer: `adds_bos` says whether the model was trained with it before each window.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from qsae_jax.errors import UserError
from qsae_jax.files import read_json
from qsae_jax.lm.ggml_tokenizer import build_tokenizer
from qsae_jax.lm.gguf import GGUF
from qsae_jax.lm.sources import fetch


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
        raise UserError(f"`{folder}` {_without_tokenizer(folder)}, or give tokens as npy:FILE")
    try:
        inner = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises bare Exception
        if not isinstance(read_json(file).get("model"), dict):
            raise UserError(f"`{file}` describes no model: it is not a whole tokenizer, download it again") from error
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


def _without_tokenizer(folder: Path) -> str:
    if (folder / "tokenizer.model").is_file():
        return (
            "holds a SentencePiece tokenizer.model but no tokenizer.json: make one with transformers, "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return "holds no tokenizer.json: save the tokenizer there"


def _from_gguf(path: Path) -> TextTokenizer:
    file = GGUF(path)
    inner, by_default = build_tokenizer(file)
    bos = file.get("tokenizer.ggml.bos_token_id")
    adds = bool(file.get("tokenizer.ggml.add_bos_token", by_default)) and bos is not None
    return TextTokenizer(inner, bos, file.get("tokenizer.ggml.eos_token_id"), adds)
