"""Gemma Scope, 1 (`params.npz`) and 2 (`config.json`, `params.safetensors`).

orientation     `W_enc [d, m]`, `W_dec [m, d_out]`, `affine_skip_connection [d, d_out]`, all as ours; in lower case in 2
                and in some repositories of 1
b_dec           not taken off the input
threshold       linear, one a latent, a code is above it
scale           none left to fold, but dictionaries of embeddings were trained on x / sqrt(d): W_enc / sqrt(d),
                W_dec sqrt(d)
decoder norms   rows have length 1
hook            res: resid_post; mlp: hook_mlp_out after its norm; att: hook_z with heads side by side; transcoders read
                ln2.hook_normalized in 1. The files of 1 say nothing of themselves: layer, width and average L0 are in
                the folders' names, model and site in the repository's
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qsae_jax.errors import UserError
from qsae_jax.files import SPOILT, read_json
from qsae_jax.sae.formats import stored
from qsae_jax.sae.formats.stored import STANDARD, Arrays, Stored
from qsae_jax.sae.model import SAE, recentred
from qsae_jax.sae.sparsity import JumpReLU, ReLU

NPZ, SAFETENSORS = "params.npz", "params.safetensors"
SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "attn.hook_z"}
PACKED = 20
"""Weights hardly compress: a file that grows by more is no dictionary, and is not unpacked."""
TRAINED = {"context_size": 1024, "dataset_path": "monology/pile-uncopyrighted"}


def read(folder: Path, told: Mapping[str, Any]) -> Stored:
    if (folder / NPZ).is_file():
        return _first(folder, told)
    return _second(folder, told)


def _named(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """`w_enc` as `W_enc`."""
    return {re.sub("^w_", "W_", name): value for name, value in arrays.items()}


def _first(folder: Path, told: Mapping[str, Any]) -> Stored:
    arrays, dtype = read_npz(folder / NPZ)
    arrays = _named(arrays)
    stored.expect(folder / NPZ, arrays, (*STANDARD, "threshold"))
    path = str(told.get("path") or folder.resolve())
    metadata = facts_of(path)
    if "embedding" in path.split("/"):
        root = np.float32(arrays["W_enc"].shape[0] ** 0.5)
        arrays |= {"W_enc": arrays["W_enc"] / root, "W_dec": arrays["W_dec"] * root}
    return Stored(_made(folder / NPZ, arrays, "hook_name_out" in metadata), metadata, "gemma_scope 1", dtype)


def _made(where: Path, arrays: Arrays, transcodes: bool) -> SAE:
    sparsity = stored.jump_relu(where, arrays["threshold"], arrays["b_enc"].size)
    return stored.dictionary(where, arrays, sparsity, centred=False, transcodes=transcodes)


def read_npz(path: Path) -> tuple[Arrays, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            if (unpacked := sum(info.file_size for info in archive.infolist())) > PACKED * path.stat().st_size:
                raise ValueError(f"it would unpack to {unpacked} bytes")
        with np.load(path, allow_pickle=False) as file:
            return stored.floats(path, {name: file[name] for name in file.files})
    except SPOILT as error:
        raise UserError(f"`{path}` is not a readable .npz file of numbers ({error}): make it again") from error


def facts_of(path: str) -> dict[str, Any]:
    """What a path such as `google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71` says."""
    metadata: dict[str, Any] = {}
    for key, pattern in {"layer": r"layer_(\d+)", "average_l0": r"average_l0_(\d+)"}.items():
        if found := re.search(pattern, path):
            metadata[key] = int(found[1])
    if found := re.search(r"width_(\d+[km])", path):
        metadata["width"] = found[1]
    repository = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)", path)
    if not repository:
        return metadata
    size, tuned, site = repository.groups()
    metadata |= {"model_name": f"google/gemma-2-{size}{'-it' if tuned == 'it' else ''}"} | TRAINED
    block = f"blocks.{metadata.get('layer')}"
    if "embedding" in path.split("/"):
        return metadata | {"hook_name": "hook_embed"}
    if "layer" not in metadata:
        return metadata
    if site == "transcoders":
        return metadata | {"hook_name": f"{block}.ln2.hook_normalized", "hook_name_out": f"{block}.hook_mlp_out"}
    name = SITES[site] if site == "att" else f"hook_{SITES[site]}"
    return metadata | {"hook_name": f"{block}.{name}"}


def _second(folder: Path, told: Mapping[str, Any]) -> Stored:
    found, dtype = stored.read_safetensors(folder / SAFETENSORS)
    skip = found.pop("affine_skip_connection", None)
    arrays = _named(found)
    stored.expect(folder / SAFETENSORS, arrays, (*STANDARD, "threshold"))
    path = str(told.get("path") or folder.resolve())
    cfg = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if cfg.get("architecture", "jump_relu") != "jump_relu":
        raise UserError(
            f"`{folder}`: architecture `{cfg['architecture']}`, expected jump_relu: it is not Gemma Scope 2"
        )
    if (said := cfg.get("affine_connection")) is not None and bool(said) != (skip is not None):
        raise UserError(f"`{folder}`: affine_connection is {said}, and the weights say otherwise: download it again")
    if skip is not None:
        arrays["W_skip"] = skip
    metadata = _facts_of_two(path, cfg)
    return Stored(_made(folder / SAFETENSORS, arrays, "hook_name_out" in metadata or skip is not None), metadata,
                  "gemma_scope 2", dtype)  # fmt: skip


def _facts_of_two(path: str, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The whole config.json is kept under `gemma_scope`; hooks come from the folder that says which site it is."""
    metadata: dict[str, Any] = facts_of(path) | TRAINED | ({"gemma_scope": dict(cfg)} if cfg else {})
    named_by_folder = re.search(r"gemma-scope-2-(\w+-(?:pt|it))", path)
    if model := cfg.get("model_name") or (named_by_folder and f"gemma-3-{named_by_folder[1]}"):
        model = str(model).replace("-v3", "-3")
        model = model.replace("-270m-pt", "-270m")  # the hub's name of it
        metadata["model_name"] = model if "/" in model else f"google/{model}"
    for key, name in {"hf_hook_point_in": "hf_hook_name", "hf_hook_point_out": "hf_hook_name_out"}.items():
        if cfg.get(key):
            metadata[name] = cfg[key]
    block = f"blocks.{metadata.get('layer')}"
    sites = {"resid_post": "hook_resid_post", "attn_out": "attn.hook_z", "mlp_out": "hook_mlp_out"}
    named = [hook for site, hook in sites.items() if re.search(rf"(^|/){site}", path)]
    if "transcoder" in path or metadata.get("hf_hook_name_out"):
        metadata |= {"hook_name": f"{block}.hook_mlp_in", "hook_name_out": f"{block}.hook_mlp_out"}
    elif named and "layer" in metadata:
        metadata["hook_name"] = f"{block}.{named[0]}"
    return metadata


def write(sae: SAE, folder: Path, metadata: Mapping[str, Any]) -> None:
    """`params.npz`. A ReLU is a threshold of 0. The file has no place for metadata."""
    stored.refuse_to_write(sae, "gemma_scope", transcodes=True)
    if not isinstance(sae.sparsity, JumpReLU | ReLU):
        raise UserError(f"Gemma Scope holds JumpReLU dictionaries, this is `{sae.sparsity.name}`: write it as saelens")
    arrays = stored.arrays_of(recentred(sae, False))
    arrays.setdefault("threshold", np.zeros(sae.latents, np.float32))
    with (folder / NPZ).open("wb") as file:
        np.savez(file, **{name: arrays[name] for name in (*STANDARD, "threshold")})  # pyright: ignore[reportArgumentType]
