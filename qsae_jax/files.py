"""Run directories and their files: a file or a folder appears whole or not at all, because it is written beside its
place and moved there."""

import contextlib
import errno
import json
import os
import shutil
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from qsae_jax import hosts
from qsae_jax.errors import UserError

SPOILT = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, RuntimeError,
          SyntaxError, MemoryError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error)  # fmt: skip
"""What a spoilt file makes NumPy, zipfile and pickletools raise: heads of arrays are parsed as Python, an unknown
compression is a NotImplementedError, a password is asked for with a RuntimeError, a size may be beyond 64 bits."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"`{path}` is not there: check the folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"`{path}` is not readable JSON ({error}): correct it or make it again") from error
    if not isinstance(value, dict):
        raise UserError(f"`{path}` holds {type(value).__name__}, not a JSON object: correct it or make it again")
    return value


def read_features(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """The columns of a table of features, by scheme."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        columns = {name: np.asarray(table.column(name)) for name in table.column_names}
        schemes = columns.pop("scheme")
    except KeyError:
        raise UserError(f"`{path}` has no column `scheme`: give the table of an audit") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"`{path}` is not a readable parquet file ({error}): run the audit again") from error
    return {str(name): {k: v[schemes == name] for k, v in columns.items()} for name in dict.fromkeys(schemes)}


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinities become null, which every reader understands."""
    write_text(path, json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value  # a NumPy scalar
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with staged_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block ends well."""
    make_folder(path.parent)
    try:
        where = path.parent if hosts.first() else None  # what the others write is thrown away
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=where)
        os.close(descriptor)
    except OSError as error:
        raise UserError(f"cannot write `{path}` ({error.strerror}): choose a writable folder") from error
    draft = Path(name)
    try:
        yield draft
        hosts.wait()
        if hosts.first():
            os.chmod(draft, 0o644)
            os.replace(draft, path)
        hosts.wait()
    except OSError as error:
        raise UserError(f"cannot write `{path}` ({error.strerror or error}): {_remedy(error)}") from error
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` when the block ends well."""
    make_folder(folder.parent)
    try:
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent if hosts.first() else None))
    except OSError as error:
        raise UserError(f"cannot write `{folder}` ({error.strerror}): choose a writable folder") from error
    try:
        yield draft
        hosts.wait()
        if hosts.first():
            _into_place(draft, folder)
        hosts.wait()
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write `{folder}` ({said}): {_remedy(error)}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _into_place(draft: Path, folder: Path) -> None:
    for path in [draft, *draft.rglob("*")]:  # mkdtemp and safetensors make them for their owner alone
        path.chmod(0o755 if path.is_dir() else 0o644)
    old = draft.with_name(f"{draft.name}.old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(draft, folder)
    shutil.rmtree(old, ignore_errors=True)


def drop(*paths: Path) -> None:
    """Delete files and folders, where they are there."""
    hosts.wait()
    for path in paths if hosts.first() else ():
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    hosts.wait()


def _remedy(error: Exception) -> str:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    return "make room on the disk" if full else "choose another --out"


def to_fill(name: str) -> Path:
    """The path of a folder that results will be written to: it could be made, or is there and writable."""
    folder = Path(name)
    if not name.strip():
        raise UserError("--out is empty: name a folder")
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"cannot make the folder `{folder}`, for `{there}` is no writable folder: choose another --out")
    return folder


def make_folder(folder: Path) -> Path:
    """The folder, made if need be and found writable before any work is spent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder `{folder}` ({error.strerror}): choose a writable one") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"the folder `{folder}` is not writable: choose another with --out")
    return folder


def new_folder(folder: Path) -> Path:
    """The folder's path, when nothing lies there that would be replaced."""
    if folder.resolve() == Path.cwd() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise UserError(f"`{folder}` is there already and not a new or empty folder: choose another --out")
    return folder
