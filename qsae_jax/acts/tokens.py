"""Tokens: text, a token file or Python's own documentation -> windows `[n, seq]`, and Grain over them.

A window is `seq` consecutive tokens of the concatenated documents; where the model was trained with BOS the first
of them is BOS. Documents are joined by a blank line. Masks are by position, never by token id.
"""

import ast
import hashlib
import platform
import sysconfig
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int32

from qsae_jax.acts import datasets
from qsae_jax.errors import UserError
from qsae_jax.files import SPOILT
from qsae_jax.lm.tokenizer import TextTokenizer

BOS = ("auto", "always", "never")


@dataclass(frozen=True)
class Windows:
    """Windows of token ids, and where they came from."""

    ids: Int32[np.ndarray, "n seq"]
    source: str
    bos: bool

    @property
    def seq(self) -> int:
        return self.ids.shape[1]

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, stop: int | None) -> "Windows":
        return Windows(self.ids[start:stop], self.source, self.bos)

    def described(self, skip_first: int) -> dict:
        """What a result says of its tokens: `n` all of them, `counted` those that feature statistics count."""
        n = len(self) * self.seq
        counted = len(self) * (self.seq - skip_first)
        facts = {"n": n, "seq": self.seq, "bos": self.bos, "skip_first": skip_first}
        return facts | {"counted": counted, "source": self.source}


def load_windows(source: str, tokenizer: TextTokenizer | None, seq: int, bos: str = "auto", vocab: int = 0) -> Windows:
    """The windows of a token source: `text:FILE`, `npy:FILE` (taken exactly as it is), `stdlib-docs`, or a dataset of
    the hub, `hf:DATASET[@REV][:CONFIG[:SPLIT]]`."""
    if bos not in BOS:
        raise UserError(f"--bos is `{bos}`: choose one of {', '.join(BOS)}")
    if source.startswith("npy:"):
        return Windows(_within(_from_npy(Path(source.removeprefix("npy:"))), vocab, source), source, bos=False)
    if source == "stdlib-docs":
        texts, name = stdlib_docs(), f"stdlib-docs of Python {platform.python_version()}"
    elif source.startswith("text:"):
        texts, name = [_read_text(Path(source.removeprefix("text:")))], source
    elif source.startswith("hf:"):
        texts, name = datasets.texts(source), source
    else:
        raise UserError(f"token source `{source}` is unknown: give text:FILE, npy:FILE, hf:DATASET or stdlib-docs")
    if tokenizer is None:
        raise UserError(f"token source `{source}` needs a tokenizer: give npy:FILE, or a model with one")
    first = tokenizer.bos_id if bos == "always" or (bos == "auto" and tokenizer.adds_bos) else None
    if bos == "always" and first is None:
        raise UserError("--bos always, but the tokenizer has no BOS token: use --bos never")
    ids = _cut(tokenizer.encode("\n\n".join(texts)), seq, first, source)
    return Windows(_within(ids, vocab, source), name, first is not None)


def _cut(ids: list[int], seq: int, bos: int | None, source: str) -> Int32[np.ndarray, "n seq"]:
    width = seq if bos is None else seq - 1
    n = len(ids) // width if width > 0 else 0
    if n < 1:
        raise UserError(
            f"token source `{source}` holds {len(ids)} tokens, fewer than one window of {seq}: give more text"
        )
    windows = np.asarray(ids[: n * width], np.int32).reshape(n, width)
    return windows if bos is None else np.concatenate([np.full((n, 1), bos, np.int32), windows], axis=1)


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text file `{path}` cannot be read ({error}): give a UTF-8 text file") from error
    if not text.strip():
        raise UserError(f"text file `{path}` is empty: give a file with text")
    return text


def _within(ids: Int32[np.ndarray, "n seq"], vocab: int, source: str) -> Int32[np.ndarray, "n seq"]:
    """The ids, when the model knows all of them; `vocab` 0 is a model that is not known."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocab and high >= vocab):
        raise UserError(f"`{source}` has ids from {low} to {high}, the model knows 0 to {vocab - 1}: re-tokenize")
    return ids


def _from_npy(path: Path) -> Int32[np.ndarray, "n seq"]:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except SPOILT as error:
        raise UserError(f"token file `{path}` is not a readable .npy file ({error}): save int32 [n, seq]") from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or ids.dtype != np.int32 or ids.shape[1] < 2 or not len(ids):
        shape = getattr(ids, "shape", None)
        raise UserError(f"token file `{path}` holds {getattr(ids, 'dtype', '?')} {shape}, expected int32 [n, seq]")
    return ids


def stdlib_docs() -> list[str]:
    """The reference topics and docstrings that every Python carries, in an order that mixes them.

    Sources are parsed, never imported. Documents are ordered by their hash, so that any part is a fair sample.
    """
    from pydoc_data.topics import topics

    found = {text.strip() for text in topics.values()}
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        parts = path.relative_to(sysconfig.get_path("stdlib")).parts
        if not {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"} & set(parts):
            found.update(_docstrings(path))
    return sorted(found, key=lambda text: hashlib.sha256(text.encode("utf-8", "replace")).digest())


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 40:
                yield text.strip()


def in_order(windows: Windows, batch: int) -> Iterator[tuple[Int32[np.ndarray, "batch seq"], np.ndarray]]:
    """Every window once, in order, in batches of one size: the last is filled up with windows of weight 0."""
    for start in range(0, len(windows), batch):
        ids = np.asarray(windows.ids[start : start + batch])
        real = len(ids)
        ids = np.concatenate([ids, np.repeat(ids[:1], batch - real, axis=0)]) if real < batch else ids
        yield ids, (np.arange(batch) < real).astype(np.float32)


def tokens_at_once(backend: str) -> int:
    """Of a forward pass on one device."""
    return 2048 if backend == "cpu" else 16_384


def windows_per_forward(asked: int, windows: Windows, mesh: Mesh) -> int:
    """How many windows a forward pass takes: as many as asked, or with 0 enough tokens to keep a device
    busy (on 2 cores 512 to 2,048 run SmolLM2 at the same speed). A multiple of the devices of `data`."""
    devices = mesh.shape["data"]
    wanted = min(asked or devices * max(tokens_at_once(jax.default_backend()) // windows.seq, 1), len(windows))
    return -(-wanted // devices) * devices


def check_windows(windows: Windows, skip_first: int, context: int) -> None:
    """Refuse windows longer than the model's context, and to leave out every position or a negative number of them."""
    if windows.seq > context:
        raise UserError(f"windows of {windows.seq} tokens, but the model was trained on {context}: lower --seq")
    if not 0 <= skip_first < windows.seq:
        raise UserError(f"--skip-first {skip_first} does not fit windows of {windows.seq}: give 0 to {windows.seq - 1}")


def counted_rows(x: Array, skip_first: int) -> Array:
    """Activations `[b, s, ...]` of the positions that statistics count, as rows `[b * (s - skip), d]`."""
    b, s = x.shape[:2]
    return x[:, skip_first:].reshape(b * (s - skip_first), -1)


def shuffled(windows: Windows, seed: int) -> grain.MapDataset:
    """The windows in an endless order by random access, shuffled anew in every epoch."""
    # An array is what Grain asks of a source: a length and items.
    return grain.MapDataset.source(typing.cast(Sequence, windows.ids)).shuffle(seed=seed).repeat()
