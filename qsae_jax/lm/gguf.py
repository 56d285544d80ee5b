"""GGUF files (llama.cpp): metadata and tensors, dequantized block by block in NumPy by the `gguf` package."""

from pathlib import Path
from typing import Any

import numpy as np

from qsae_jax.errors import UserError


class GGUF:
    """An open GGUF file: `meta` (key -> value), `shapes` (tensor -> shape, output features first), `read`."""

    def __init__(self, path: Path):
        from gguf import GGUFReader

        try:
            reader = GGUFReader(path)
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
            self._fields = reader.fields
        except (ValueError, IndexError, KeyError, OSError, OverflowError, UnicodeDecodeError) as error:
            raise UserError(
                f"`{path}` is not a readable GGUF file ({error}): is it truncated? Download it again"
            ) from error
        self.path = path
        self.shapes = {name: tuple(int(n) for n in tensor.shape[::-1]) for name, tensor in self._tensors.items()}

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata under a key, decoded only now: the token list alone takes seconds."""
        field = self._fields.get(key)
        if field is None:
            return default
        try:
            return field.contents()
        except (ValueError, IndexError, UnicodeDecodeError) as error:
            raise UserError(f"`{self.path}`: metadata `{key}` cannot be read ({error}): download it again") from error

    def keys(self, prefix: str) -> set[str]:
        return {key for key in self._fields if key.startswith(prefix)}

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32, in the layout of `shapes`."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            return dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False).reshape(self.shapes[name])
        except (NotImplementedError, ValueError) as error:
            kind = tensor.tensor_type.name
            raise UserError(f"`{self.path}`: tensor `{name}` of type {kind} cannot be read ({error})") from error

    def is_plain(self) -> bool:
        """Whether every matrix is stored as plain floating point."""
        return {t.tensor_type.name for t in self._tensors.values() if len(t.shape) > 1} <= {"F32", "F16", "BF16"}

    def stored_as(self) -> str:
        """The block types of the matrices, most frequent first: `Q4_1 (210), Q8_0 (1)`."""
        kinds = [t.tensor_type.name for t in self._tensors.values() if len(t.shape) > 1]
        return ", ".join(f"{kind} ({kinds.count(kind)})" for kind in sorted(set(kinds), key=kinds.count, reverse=True))
