"""Dictionaries on disk, in the formats of their owners: in and out.

A module an owner, which states what its files hold and how that differs from `qsae_jax.sae.model`."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from qsae_jax.errors import UserError, nearest
from qsae_jax.files import staged
from qsae_jax.mesh import make_mesh
from qsae_jax.sae.formats import crosscoder, dictionary_learning, gemma_scope, llama_scope, openai, saelens, sparsify
from qsae_jax.sae.formats.pickled import read_tensors
from qsae_jax.sae.formats.saelens import FILES as FILES
from qsae_jax.sae.formats.sources import Found, find
from qsae_jax.sae.formats.stored import Stored as Stored
from qsae_jax.sae.model import SAE, on_mesh

READERS = {"saelens": saelens, "sparsify": sparsify, "gemma_scope": gemma_scope, "llama_scope": llama_scope}
WRITERS = {
    "saelens": saelens.write,
    "dictionary_learning": dictionary_learning.write,
    "sparsify": sparsify.write,
    "gemma_scope": gemma_scope.write,
}


def load_sae(source: str | Path, mesh: Mesh | None = None) -> SAE:
    """The dictionary that a source names: a folder, a file, `hf:ORG/NAME/PATH`, `RELEASE/ID` of SAELens's list."""
    return load_stored(source, mesh).sae


def load_stored(source: str | Path, mesh: Mesh | None = None) -> Stored:
    """The dictionary that a source names, with what its files say of it."""
    found = find(source)
    try:
        stored = _pickled(found) if found.owner == "pickled" else READERS[found.owner].read(found.folder, found.told)
    except (TypeError, AttributeError, KeyError, ValueError, OverflowError) as error:
        # A fact of another type than any writer's: a list where a number belongs.
        raise UserError(f"`{source}`: its configuration is not of the form that its owner writes ({error})") from error
    named = {key: value for key, value in found.told.get("metadata", {}).items() if value is not None}
    return Stored(on_mesh(stored.sae, mesh or make_mesh(1, 1)), named | stored.metadata, stored.format, stored.dtype)


def _pickled(found: Found) -> Stored:
    """One of torch's files: whose it is, is told by what is in it."""
    path = found.path
    if path.is_dir():
        path = next(path / name for name in ("ae.pt", "cc_weights.pt") if (path / name).is_file())
    tensors = read_tensors(path)
    if "pre_bias" in tensors:
        return openai.read(path, tensors)
    if path.name == "cc_weights.pt" or getattr(tensors.get("W_enc"), "ndim", 2) == 3:
        return crosscoder.read(path, tensors, found.told)
    return dictionary_learning.read(path, tensors, found.told)


def save_sae(sae: SAE, folder: str | Path, metadata: dict[str, Any] | None = None, format: str = "saelens") -> None:
    """Write a dictionary in an owner's format, whole or not at all. `metadata` should name model, hook, quantization,
    under SAELens's names; what the format has no place for is left out of it."""
    if format not in WRITERS:
        raise UserError(f"no format `{format}` to write{nearest(format, WRITERS)}; possible: {', '.join(WRITERS)}")
    with staged(Path(folder)) as draft:
        WRITERS[format](sae, draft, metadata or {})
