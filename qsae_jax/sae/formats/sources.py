"""What names a dictionary, and whose format it is in.

    FOLDER or FILE                     on this disk
    hf:ORG/NAME[@REV][/PATH/IN/REPO]   of the hub: only the files of a dictionary, into the hub's cache
    RELEASE/ID                         of SAELens's list, in the sae_lens that is installed (it is not imported)

The owner is known by the files that are there. More than one owner, or none, is refused with what was found.
"""

import glob
import importlib.util
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from qsae_jax.errors import UserError, nearest
from qsae_jax.hub import from_hub

MARKS = {
    "sae_weights.safetensors": "saelens",
    "sae.safetensors": "sparsify",
    "params.npz": "gemma_scope",
    "params.safetensors": "gemma_scope",
    "ae.pt": "pickled",
    "cc_weights.pt": "pickled",
    "checkpoints/final.safetensors": "llama_scope",
}
"""The file that holds the weights, and its owner. Which of torch's files it is, is told by what is in it."""
BESIDE = ("cfg.json", "config.json", "hyperparams.json", "activation_scaler.json", "sparsity.safetensors")
LOADERS = {"sae_lens", "gemma_2", "gemma_2_transcoder", "gemma_3", "dictionary_learning_1", "sparsify", "llama_scope",
           "llama_scope_r1_distill"}  # fmt: skip
"""Those of SAELens whose files are read here."""


@dataclass(frozen=True)
class Found:
    """Where the files are, whose they are, and what is known of them besides."""

    path: Path
    owner: str
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


def find(source: str | Path) -> Found:
    """The files that a source names."""
    spelled = str(source)
    if spelled.startswith("hf:"):
        return _from_hub(spelled)
    path = Path(source).expanduser()
    if path.exists():
        return Found(path, owner_of(path))
    release, _, name = spelled.partition("/")
    if name and not spelled.startswith((".", "/", "~")) and (listed := _releases(release)) is not None:
        return _listed(spelled, release, name, listed)
    known = "" if importlib.util.find_spec("sae_lens") else "; for RELEASE/ID of SAELens's list, install sae-lens"
    raise UserError(f"dictionary `{source}` is not there: give a folder with cfg.json and sae_weights.safetensors, "
                    f"another that `qsae sae info` knows, or hf:ORG/NAME/PATH{known}")  # fmt: skip


def owner_of(path: Path, said: str = "") -> str:
    """The owner of a folder's format, or of a file's; `said` is what the user calls it."""
    said = said or str(path)
    if path.is_file():
        owner = "pickled" if path.suffix == ".pt" else MARKS.get(path.name)
        if owner is None:
            raise UserError(f"`{said}` is no file of a dictionary: give one of {', '.join(MARKS)}, or its folder")
        return owner
    marks = [name for name in MARKS if (path / name).is_file()]
    owners = {MARKS[name] for name in marks}
    if owners == {"saelens"} and (path / "config.json").is_file() and not (path / "cfg.json").is_file():
        return "llama_scope"
    if len(marks) > 1:
        raise UserError(f"`{said}` holds {' and '.join(marks)}, of different dictionaries: give one of these files")
    if not marks and (path / "cfg.json").is_file():
        return "saelens"  # whose reader says what is missing
    if not marks:
        there = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        raise UserError(f"`{said}` holds {there}; a dictionary's folder has one of {', '.join(MARKS)}: check the path")
    return owners.pop()


def _from_hub(source: str) -> Found:
    spelled = re.fullmatch(r"hf:([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?", source)
    if not spelled:
        raise UserError(f"`{source}` is not of the form hf:ORG/NAME[@REVISION][/PATH]: correct it")
    name, revision, inside = spelled[1], spelled[2] or "", (spelled[3] or "").strip("/")
    return _downloaded(source, name, revision, inside, {})


def _downloaded(source: str, name: str, revision: str, inside: str, told: dict[str, Any]) -> Found:
    """Only the files of one dictionary; sparsify's run says its model one folder up."""
    from huggingface_hub import snapshot_download

    lone = inside.endswith((".pt", ".npz", ".safetensors"))
    folder = inside.rpartition("/")[0] if lone else inside
    above = folder.rpartition("/")[0]
    files = [inside] if lone else [f"{folder}/{file}" for file in MARKS]
    files += [f"{folder}/{file}" for file in BESIDE] + [f"{above}/config.json"]
    wanted = [glob.escape(file.strip("/")) for file in files]

    def ask() -> Path:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))

    path = from_hub(source, name, revision, ask) / inside
    if not path.exists():
        raise UserError(f"`{source}`: the repository has no dictionary at `{inside}`: check the path at "
                        f"https://huggingface.co/{name}")  # fmt: skip
    return Found(path, owner_of(path, source), told | {"path": f"{name}/{folder}".rstrip("/")})


@cache
def _list() -> dict[str, Any] | None:
    """SAELens's list of pretrained dictionaries; None where it is not installed. Its file is read, nothing is run."""
    import yaml

    spec = importlib.util.find_spec("sae_lens")
    if spec is None or not spec.origin:
        return None
    file = Path(spec.origin).with_name("pretrained_saes.yaml")
    if not file.is_file():
        return None
    return yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _releases(release: str) -> dict[str, Any] | None:
    listed = _list()
    if listed is None:
        return None
    if release not in listed:
        raise UserError(f"dictionary `{release}/...` is not there, and SAELens has no such release"
                        f"{nearest(release, listed)}: check the path or the name")  # fmt: skip
    return listed[release]


def _listed(source: str, release: str, name: str, listed: dict[str, Any]) -> Found:
    loader = listed.get("conversion_func") or "sae_lens"
    if loader not in LOADERS:
        raise UserError(f"`{source}`: files of SAELens's loader `{loader}` are not supported ({', '.join(LOADERS)})")
    paths = {str(each["id"]): each for each in listed["saes"]}
    if name not in paths:
        raise UserError(f"`{source}`: release `{release}` has no id `{name}`{nearest(name, paths)}")
    each = paths[name]
    told = {"metadata": {"model_name": listed.get("model"), "saelens": source}}
    told["metadata"] |= (listed.get("config_overrides") or {}).get("metadata", {})
    if arguments := (listed.get("config_overrides") or {}).get("model_from_pretrained_kwargs"):
        told["metadata"]["model_from_pretrained_kwargs"] = arguments
    if "norm_scaling_factor" in each:
        told["norm_scaling_factor"] = each["norm_scaling_factor"]
    return _downloaded(source, listed["repo_id"], "", str(each["path"]), told)
