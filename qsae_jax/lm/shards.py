"""The weights of a Hugging Face folder: one safetensors file or several with an index, memory-mapped.

`read` gives a view of the file, of which only the parts that are used are ever read: each process of a mesh touches
its own bytes. The `safetensors` library checks the files; NumPy maps them, because the library's own reader copies a
tensor whole.
"""

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np

from qsae_jax.errors import UserError
from qsae_jax.files import read_json

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Shards:
    """An open folder: `names`, `read`, and the notes that its first file carries."""

    def __init__(self, folder: Path):
        self.notes: dict[str, str] = {}
        self._where: dict[str, tuple[np.ndarray, dict]] = {}
        home: dict[str, Path] = {}
        files, promised = _files(folder)
        for file in files:
            header, body = _open(file)
            self.notes = self.notes or header.get("__metadata__") or {}
            header.pop("__metadata__", None)
            if twice := sorted(set(header) & set(home)):
                raise UserError(
                    f"tensor `{twice[0]}` is in `{home[twice[0]].name}` and in `{file}`: remove one of them"
                )
            home |= dict.fromkeys(header, file)
            self._where |= {name: (body, entry) for name, entry in header.items()}
        if lost := sorted(name for name in promised if name not in home):
            raise UserError(
                f"`{folder / INDEX}` names the tensor `{lost[0]}`, which no shard holds: download them again"
            )
        if not home:
            raise UserError(f"`{files[0]}` holds no tensors: download the weights")
        self._home = home

    @property
    def names(self) -> list[str]:
        return list(self._where)

    def read(self, name: str) -> np.ndarray:
        """A view of one tensor in the file."""
        body, entry = self._where[name]
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"`{self._home[name]}`: tensor `{name}` is {entry['dtype']}, not floating point of 16 bits or more: "
                "use an unpacked checkpoint"
            )
        start, stop = entry["data_offsets"]
        try:
            return body[start:stop].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        except ValueError as error:  # more dimensions, or longer ones, than NumPy has
            raise UserError(f"`{self._home[name]}`: tensor `{name}` cannot be read ({error})") from error


def _open(file: Path) -> tuple[dict[str, dict], np.ndarray]:
    """The header of a file, after the library has checked it against the file's length; and the bytes behind it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy"):
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        if not all(isinstance(entry, dict) for name, entry in header.items() if name != "__metadata__"):
            raise ValueError("an entry of its header is no table")  # the library takes lists too
        size = file.stat().st_size - 8 - length
        body = np.memmap(file, np.uint8, "r", offset=8 + length) if size else np.zeros(0, np.uint8)
        return header, body.view(np.ndarray)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"`{file}` is not a readable safetensors file ({error}): download it again") from error


def _files(folder: Path) -> tuple[list[Path], list[str]]:
    """The files to open, and the names of tensors that an index promises."""
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).is_file():
            raise UserError(_nothing(folder))
        return [folder / SINGLE], []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"`{index}` has no `weight_map`: download it again")
    files = sorted({folder / str(name) for name in weight_map.values()})
    for file in files:
        if file.parent != folder or not os.path.isfile(file):  # False for a name that is too long, too
            raise UserError(f"`{index}` names the shard `{file.name}`, which is not in the folder: download it")
    return files, list(weight_map)


def _nothing(folder: Path) -> str:
    pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    if pickles:
        return (
            f"`{folder}` holds `{pickles[0].name}` and no {SINGLE}: pickles are never read, since they can run code; "
            "save the model as safetensors"
        )
    return f"`{folder}` holds no {SINGLE} and no index of shards: download the weights"
