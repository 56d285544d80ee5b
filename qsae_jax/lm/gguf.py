"""GGUF files (llama.cpp): metadata and tensors, dequantized block by block in NumPy by the `gguf` package.

The header is walked here: the package's own reader makes a NumPy array of every token, which takes 2 to 4 seconds for
SmolLM2 and 10 to 25 for Gemma's 262,144 pieces (2 cores); this takes 0.1 and 0.5. Nothing is trusted: every length is
checked against the file before it is used.
"""

import struct
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from qsae_jax.errors import UserError

NUMBERS: dict[int, str] = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""Kind of a value in the file -> its struct code."""
STRING, ARRAY = 8, 9
PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
BAD = (ValueError, IndexError, KeyError, OSError, OverflowError, struct.error, UnicodeDecodeError)


class Tensor(NamedTuple):
    """Where a tensor lies."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    """Output features first; the file has it the other way round."""
    start: int
    stop: int


class GGUF:
    """An open GGUF file: `shapes` (tensor -> shape, output features first), `get` and `read`."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._bytes = np.memmap(path, np.uint8, "r")
            self._view = memoryview(typing.cast(bytes, self._bytes))
            self._fields, self._tensors = self._walk()
        except BAD as error:
            raise UserError(
                f"`{path}` is not a readable GGUF file ({error}): is it truncated? Download it again"
            ) from error
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def _walk(self) -> tuple[dict[str, int], dict[str, Tensor]]:
        magic, version, tensors, fields = self._unpack("4sIQQ", 0)
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}, version {version}, expected GGUF of version 2 or 3")
        at, found = 24, dict[str, int]()
        for _ in range(fields):
            key, at = self._string(at)
            if key in found:
                raise ValueError(f"metadata `{key}` stands there twice")
            found[key] = at
            at = self._after(at + 4, *self._unpack("I", at))
        infos = dict[str, tuple]()
        for _ in range(tensors):
            name, at = self._string(at)
            (n,) = self._unpack("I", at)
            *shape, kind, offset = self._unpack(f"{n}QIQ", at + 4)
            at += 4 + 8 * n + 12
            if name in infos:
                raise ValueError(f"tensor `{name}` stands there twice")
            infos[name] = (GGMLQuantizationType(kind), tuple(shape[::-1]), offset)
        if at > self._bytes.size:
            raise ValueError("it ends within its header")
        self._fields = found
        align = self.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1:
            raise ValueError(f"its alignment is {align!r}")
        data = -(-at // align) * align
        return found, {name: self._placed(data, *info) for name, info in infos.items()}

    def _placed(self, data: int, kind: GGMLQuantizationType, shape: tuple[int, ...], offset: int) -> Tensor:
        block, size = GGML_QUANT_SIZES[kind]
        n = 1
        for length in shape:
            n *= length
        if not shape or n < 1 or shape[-1] % block:
            raise ValueError(f"a tensor of type {kind.name} has shape {shape}")
        start = data + offset
        stop = start + n // block * size
        if stop > self._bytes.size:
            raise ValueError(f"a tensor ends at byte {stop}, the file at {self._bytes.size}")
        return Tensor(kind, shape, start, stop)

    def _unpack(self, code: str, at: int) -> tuple:
        return struct.unpack_from("<" + code, self._view, at)

    def _string(self, at: int) -> tuple[str, int]:
        (length,) = self._unpack("Q", at)
        end = at + 8 + length
        if end > self._bytes.size:
            raise ValueError(f"a text of {length} bytes goes beyond the end")
        return self._bytes[at + 8 : end].tobytes().decode(), end

    def _after(self, at: int, kind: int) -> int:
        """Where the value that begins here ends."""
        if kind == STRING:
            return at + 8 + self._unpack("Q", at)[0]
        if kind != ARRAY:
            return at + struct.calcsize(NUMBERS[kind])
        inner, count = self._unpack("IQ", at)
        if inner != STRING:
            if inner == ARRAY:
                raise ValueError("an array of arrays is not supported")
            return at + 12 + count * struct.calcsize(NUMBERS[inner])
        *_, end = [at + 12, *(end for _, end in self._texts(at + 12, count))]
        return end

    def _texts(self, at: int, count: int) -> Iterator[tuple[int, int]]:
        """(start, end) of each of so many texts, one after the other."""
        length, raw = struct.Struct("<Q").unpack_from, self._view
        for _ in range(count):
            start = at + 8
            at = start + length(raw, at)[0]
            yield start, at

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata under a key, decoded only now."""
        at = self._fields.get(key)
        if at is None:
            return default
        try:
            return self._value(at + 4, *self._unpack("I", at))
        except BAD as error:
            raise UserError(f"`{self.path}`: metadata `{key}` cannot be read ({error}): download it again") from error

    def _value(self, at: int, kind: int) -> Any:
        if kind == STRING:
            return self._string(at)[0]
        if kind != ARRAY:
            return self._unpack(NUMBERS[kind], at)[0]
        inner, count = self._unpack("IQ", at)
        if inner == STRING:
            return [str(self._view[start:end], "utf-8") for start, end in self._texts(at + 12, count)]
        return np.frombuffer(self._bytes, "<" + NUMBERS[inner], count, at + 12).tolist()

    def keys(self, prefix: str) -> set[str]:
        return {key for key in self._fields if key.startswith(prefix)}

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32, in the layout of `shapes`."""
        from gguf.quants import dequantize

        kind, shape, start, stop = self._tensors[name]
        raw = self._bytes[start:stop]
        raw = raw.view(PLAIN[kind.name]) if kind.name in PLAIN else raw
        try:
            return dequantize(raw.reshape(*shape[:-1], -1), kind).astype(np.float32, copy=False).reshape(shape)
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"`{self.path}`: tensor `{name}` of type {kind.name} cannot be read ({error})") from error

    def _kinds(self) -> list[str]:
        return [tensor.kind.name for tensor in self._tensors.values() if len(tensor.shape) > 1]

    def is_plain(self) -> bool:
        """Whether every matrix is stored as plain floating point."""
        return set(self._kinds()) <= {"F64", "F32", "F16", "BF16"}

    def stored_as(self) -> str:
        """The block types of the matrices, most frequent first: `Q4_1 (210), Q8_0 (1)`."""
        kinds = self._kinds()
        return ", ".join(f"{kind} ({kinds.count(kind)})" for kind in sorted(set(kinds), key=kinds.count, reverse=True))
