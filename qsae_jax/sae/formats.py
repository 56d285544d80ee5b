"""Dictionaries on disk, in the SAELens format: `cfg.json` and `sae_weights.safetensors`.

What is read, and what is assumed about it: orientation `W_enc [d, m]`, `W_dec [m, d]`; b_dec taken off the input
where `apply_b_dec_to_input` says so; thresholds none; `rescale_acts_by_decoder_norm` folded on load (the codes are
`pre * |W_dec|` and decoding divides by it). A run-time normalisation of activations is refused, not ignored.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qsae_jax.errors import UserError, nearest
from qsae_jax.files import read_json, staged, write_json
from qsae_jax.mesh import make_mesh, place
from qsae_jax.sae.model import SAE
from qsae_jax.sae.sparsity import ReLU, TopK

WEIGHTS = "sae_weights.safetensors"
FILES = ("cfg.json", WEIGHTS)
VERSION = "6.0.0"
"""Of the format that is written. Without it SAELens takes a cfg.json for an older one and drops the metadata."""
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True)
class Stored:
    """A dictionary and what its file says of it."""

    sae: SAE
    metadata: dict[str, Any] = field(default_factory=dict)


def load_sae(folder: str | Path, mesh: Mesh | None = None) -> SAE:
    """The dictionary in a folder in SAELens format."""
    return load_stored(folder, mesh).sae


def load_stored(folder: str | Path, mesh: Mesh | None = None) -> Stored:
    """The dictionary in a folder, with the metadata of its `cfg.json`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"dictionary `{folder}` is not there: give a folder with cfg.json and {WEIGHTS}")
    cfg = read_json(folder / "cfg.json")
    kind = cfg.get("architecture", "standard")
    if kind not in ("standard", "topk"):
        raise UserError(
            f"`{folder}`: architecture `{kind}` is not supported (standard, topk){nearest(str(kind), ['topk'])}"
        )
    act = cfg.get("activation_fn_str", cfg.get("activation_fn", "relu"))  # what SAELens before 6 said
    if act not in ("relu", None):
        raise UserError(f"`{folder}`: activation function `{act}` of an old SAELens: load and save it with SAELens 6")
    if (norm := cfg.get("normalize_activations", "none")) not in ("none", None, False):
        raise UserError(f"`{folder}`: normalize_activations is `{norm}`: fold it into the weights with SAELens first")
    if cfg.get("reshape_activations", "none") not in ("none", None):
        raise UserError(
            f"`{folder}`: reshape_activations `{cfg['reshape_activations']}` is not supported: fold the heads"
        )
    arrays = _read(folder / WEIGHTS)
    _check(folder, arrays, cfg)
    if cfg.get("rescale_acts_by_decoder_norm"):
        norms = np.linalg.norm(arrays["W_dec"], axis=-1)
        arrays["W_enc"], arrays["b_enc"] = arrays["W_enc"] * norms[None], arrays["b_enc"] * norms
        arrays["W_dec"] = arrays["W_dec"] / np.where(norms > 0, norms, 1)[:, None]  # a row of zeros stays one
    sparsity = TopK(int(cfg["k"])) if kind == "topk" else ReLU()
    sae = SAE(sparsity, *(jnp.asarray(arrays[name]) for name in NAMES), centred=cfg.get("apply_b_dec_to_input", True))
    told = cfg.get("metadata")
    return Stored(place(sae, mesh or make_mesh(1, 1)), told if isinstance(told, dict) else {})


def _read(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"`{path}` is not there: the dictionary's folder needs it")
    try:
        with safe_open(path, "numpy") as file:
            return {name: np.asarray(file.get_tensor(name), np.float32) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"`{path}` is not a readable safetensors file ({error}): make it again") from error


def _check(folder: Path, arrays: dict[str, np.ndarray], cfg: dict[str, Any]) -> None:
    if set(arrays) != set(NAMES):
        raise UserError(f"`{folder}/{WEIGHTS}` holds {', '.join(sorted(arrays))}; expected {', '.join(NAMES)}")
    d, m = cfg.get("d_in"), cfg.get("d_sae")
    for name, shape in {"W_enc": (d, m), "b_enc": (m,), "W_dec": (m, d), "b_dec": (d,)}.items():
        if arrays[name].shape != shape:
            raise UserError(
                f"`{folder}`: {name} has shape {arrays[name].shape}, cfg.json says {shape}: correct cfg.json"
            )
        if not np.isfinite(arrays[name]).all():
            raise UserError(f"`{folder}`: {name} holds NaN or infinite values: train the dictionary again")
    if not isinstance(cfg.get("apply_b_dec_to_input", True), bool):
        raise UserError(f"`{folder}`: apply_b_dec_to_input is {cfg['apply_b_dec_to_input']!r}: write true or false")
    if cfg.get("architecture") == "topk" and not (type(cfg.get("k")) is int and 0 < cfg["k"] <= arrays["b_enc"].size):
        raise UserError(f"`{folder}`: cfg.json has k {cfg.get('k')!r}, expected a whole number up to {m}: correct it")


def save_sae(sae: SAE, folder: str | Path, metadata: dict[str, Any] | None = None) -> None:
    """Write a dictionary as SAELens reads it, whole or not at all. `metadata` should name model, hook, quantization."""
    from safetensors.numpy import save_file

    topk = isinstance(sae.sparsity, TopK)
    cfg = {
        "architecture": "topk" if topk else "standard",
        "d_in": sae.d,
        "d_sae": sae.latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.centred,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": VERSION} | (metadata or {}),
    }
    if isinstance(sae.sparsity, TopK):
        cfg |= {"k": sae.sparsity.k, "rescale_acts_by_decoder_norm": False}
    with staged(Path(folder)) as draft:
        write_json(draft / "cfg.json", cfg)
        save_file({name: np.asarray(getattr(sae, name)[...]) for name in NAMES}, draft / WEIGHTS)
