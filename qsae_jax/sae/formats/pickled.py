"""Files of `torch.save`, read without torch and without running what is in them; and written.

Such a file is a zip: `data.pkl`, a pickle that describes the tensors, and one stored record `data/KEY` for the bytes of
each storage. A pickle is a program. It is never handed to pickle here: a small machine walks its instructions, knows
only those that a state dict needs, and gives each global name that it knows a meaning of its own. Any other name or
instruction is refused by name, before anything is done with it.
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qsae_jax.errors import UserError
from qsae_jax.files import SPOILT

STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
DESCRIPTION = 64 << 20
"""Bytes of data.pkl that are read at most: a state dict's is some kilobytes."""


class Unreadable(Exception):
    """What is wrong with the file, as the middle of a sentence."""


class Global(NamedTuple):
    """A name of the pickle that means something here."""

    name: str


class Storage(NamedTuple):
    dtype: np.dtype
    key: str
    numbers: int


MARK = object()
KNOWN = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
KNOWN |= {f"torch {name}" for name in STORAGES}
PLAIN = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"}
FIXED = {"NEWTRUE": True, "NEWFALSE": False, "NONE": None}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_tensors(path: Path) -> dict[str, Any]:
    """The dictionary in a file of torch: NumPy arrays by name, and whatever numbers and texts lie beside them."""
    try:
        with zipfile.ZipFile(path) as archive:
            value = _read(archive, path.stat().st_size)
    except zipfile.BadZipFile:
        raise UserError(
            f"`{path}` is no zip file of torch (one before 1.6 wrote others): load and save it with a new torch"
        ) from None
    except Unreadable as error:
        raise UserError(f"`{path}` {error}: save it again as a state dict of tensors") from None
    except SPOILT as error:
        raise UserError(f"`{path}` is not a readable file of torch ({error}): make it again") from error
    if not isinstance(value, dict):
        raise UserError(f"`{path}` holds {type(value).__name__}, not a dictionary of tensors: save the state dict")
    return value


def _read(archive: zipfile.ZipFile, size: int) -> Any:
    names = {info.filename: info for info in archive.infolist()}
    root = next(
        (name.removesuffix("data.pkl") for name in names if name.count("/") <= 1 and name.endswith("data.pkl")), ""
    )
    if f"{root}data.pkl" not in names:
        raise Unreadable("is a zip file without the data.pkl of torch")

    def record(name: str, limit: int) -> bytes:
        info = names.get(root + name)
        if info is None:
            raise Unreadable(f"lacks the record {name}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > min(limit, size):
            raise Unreadable(f"has a record {name} that is compressed or too large, as torch writes none")
        return archive.read(info)

    if sum(info.file_size for info in names.values()) > size:
        raise Unreadable(f"has records of more than its {size} bytes")
    big = f"{root}byteorder" in names and record("byteorder", 16).strip() == b"big"
    blobs: dict[str, bytes] = {}
    arrays: dict[Storage, np.ndarray] = {}

    def storage(of: Storage) -> np.ndarray:
        if of in arrays:
            return arrays[of]
        if of.key not in blobs:
            blobs[of.key] = record(f"data/{of.key}", size)
        dtype = of.dtype.newbyteorder(">") if big else of.dtype
        if of.numbers * dtype.itemsize > len(blobs[of.key]):
            raise Unreadable(
                f"has {len(blobs[of.key])} bytes in storage {of.key}, and {of.numbers} numbers are said to be"
            )
        arrays[of] = np.frombuffer(blobs[of.key], dtype, of.numbers).astype(of.dtype, copy=big)
        return arrays[of]

    return Machine(storage).run(record("data.pkl", DESCRIPTION))


def tensor(values: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
    """The part of a storage that a tensor is, not copied, and no larger than it: no file grows in memory."""
    if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise Unreadable(f"has a tensor of size {size} and stride {stride}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > values.size or (math.prod(size) and last >= values.size):
        raise Unreadable(f"has a tensor of size {size} that goes past its storage of {values.size} numbers")
    steps = [step * values.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(values[offset:], size, steps, writeable=False)


@dataclass
class Machine:
    """The stack, the memo and the instructions that a state dict needs."""

    storage: Callable[[Storage], np.ndarray]

    def run(self, program: bytes) -> Any:
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        for opcode, argument, _ in pickletools.genops(program):
            name = opcode.name
            if name == "STOP":
                return stack.pop()
            if name in ("PROTO", "FRAME"):
                continue
            if name in PLAIN:
                stack.append(argument)
            elif name in FIXED:
                stack.append(FIXED[name])
            elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if argument is None else int(argument)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[int(argument)])  # pyright: ignore[reportArgumentType]
            elif name == "GLOBAL":
                stack.append(known(str(argument)))
            elif name == "STACK_GLOBAL":
                member, module = stack.pop(), stack.pop()
                stack.append(known(f"{module} {member}"))
            else:
                self.build(name, stack)
        raise Unreadable("ends before its description does")

    def build(self, name: str, stack: list[Any]) -> None:
        """The instructions that put things together."""
        if name == "MARK":
            stack.append(MARK)
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name in TUPLES:
            stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
        elif name == "TUPLE":
            stack.append(tuple(above(stack)))
        elif name in ("APPEND", "APPENDS"):
            items = above(stack) if name == "APPENDS" else [stack.pop()]
            only(stack[-1], list, name).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = above(stack) if name == "SETITEMS" else [stack.pop() for _ in range(2)][::-1]
            only(stack[-1], dict, name).update(zip(items[::2], items[1::2], strict=True))
        elif name == "BINPERSID":
            stack.append(persistent(stack.pop()))
        elif name == "REDUCE":
            given = stack.pop()
            stack.append(self.called(stack.pop(), given))
        elif name == "BUILD":  # a state dict's `_metadata`, the versions of its modules
            stack.pop()
            only(stack[-1], dict, name)
        else:
            raise Unreadable(f"has the pickle instruction {name}, which a state dict does not need and is not run")

    def called(self, what: Any, given: Any) -> Any:
        name = what.name if isinstance(what, Global) else repr(type(what).__name__)
        if name == "collections OrderedDict" and given == ():
            return {}
        if name == "torch._utils _rebuild_tensor_v2" and isinstance(given, tuple) and len(given) >= 4:
            of, offset, size, stride = given[:4]
            if isinstance(of, Storage):
                return tensor(self.storage(of), offset, size, stride)
        if name == "torch._utils _rebuild_parameter" and isinstance(given, tuple) and given:
            return given[0]
        raise Unreadable(f"calls `{name}` in a way that a state dict does not, and is not run")


def known(name: str) -> Global:
    if name not in KNOWN:
        raise Unreadable(f"names `{name.replace(' ', '.')}`, which a state dict does not need and is not run")
    return Global(name)


def above(stack: list[Any]) -> list[Any]:
    """What lies above the last mark, taken off with it."""
    at = max(i for i, item in enumerate(stack) if item is MARK)
    items = stack[at + 1 :]
    del stack[at:]
    return items


def only(value: Any, kind: type, name: str) -> Any:
    if type(value) is not kind:
        raise Unreadable(f"applies the pickle instruction {name} to {type(value).__name__}, and is not run")
    return value


def persistent(given: Any) -> Storage:
    if isinstance(given, tuple) and len(given) == 5 and given[0] == "storage" and isinstance(given[1], Global):
        _, kind, key, _, count = given
        dtype = STORAGES.get(kind.name.removeprefix("torch "))
        if dtype is not None and isinstance(key, str) and type(count) is int and count >= 0:
            return Storage(np.dtype(dtype), key, count)
    raise Unreadable("refers to something that is no storage of numbers")


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A state dict as torch reads it, also with `weights_only`: C order, little-endian."""
    names = {np.dtype(dtype): name for name, dtype in STORAGES.items()}
    program = io.BytesIO(b"")
    program.write(b"\x80\x02ccollections\nOrderedDict\n)R(")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for i, (name, array) in enumerate(tensors.items()):
            array = np.asarray(array, order="C")
            steps = [step // array.itemsize for step in array.strides]
            program.write(_text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((" + _text("storage"))
            program.write(f"ctorch\n{names[array.dtype]}\n".encode() + _text(str(i)) + _text("cpu"))
            program.write(_number(array.size) + b"tQ" + _number(0) + _numbers(array.shape) + _numbers(steps))
            program.write(b"\x89ccollections\nOrderedDict\n)RtR")
            archive.writestr(f"archive/data/{i}", array.astype(array.dtype.newbyteorder("<")).tobytes())
        program.write(b"u.")
        archive.writestr("archive/data.pkl", program.getvalue())
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")


def _text(text: str) -> bytes:
    raw = text.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def _number(n: int) -> bytes:
    raw = n.to_bytes(8, "little", signed=True)
    return b"\x8a\x08" + raw


def _numbers(values: Any) -> bytes:
    return b"(" + b"".join(_number(int(n)) for n in values) + b"t"
