"""dictionary_learning: `ae.pt`, a state dict of torch (read by pickled.py, nothing in it is run), and `config.json`.

class                   orientation                     b_dec                   sparsity
AutoEncoder             encoder.weight [m, d], decoder. `bias`, taken off       ReLU; its loader moves the norms of the
                        weight [d, m]: transposed       the input               decoder into the encoder, and so do we
AutoEncoderNew          the same                        `decoder.bias`, stays   ReLU; norms stay
GatedAutoEncoder        the same                        `decoder_bias`, taken   gated, `gate_bias`, `mag_bias`, `r_mag`
AutoEncoderTopK         the same                        `b_dec`, taken          the k largest; `threshold` is not used
BatchTopKSAE            the same                        `b_dec`, taken          above `threshold`, linear, one for all
MatryoshkaBatchTopKSAE  W_enc [d, m], W_dec [m, d]      `b_dec`, taken          above `threshold`, linear, one for all
JumpReluAutoEncoder     as ours, both                   `b_dec`, stays          above `threshold [m]`, linear

Activations are as the model has them: biases and thresholds were scaled back before the file was written. A threshold
of -1 was never set. Trainers with other names (GatedAnneal, PAnneal) write these classes. The hook is
`submodule_name`, such as `resid_post_layer_3`. An `ae.pt` of an interrupted run holds optimizer and all, in another
scale: refused.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qsae_jax.errors import UserError, nearest
from qsae_jax.files import read_json, write_json
from qsae_jax.sae.formats import stored
from qsae_jax.sae.formats.pickled import read_tensors, write_tensors
from qsae_jax.sae.formats.stored import Arrays, Stored
from qsae_jax.sae.model import SAE, folded_norms, recentred
from qsae_jax.sae.sparsity import ReLU, Sparsity

LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}
BATCH = {"b_enc": "encoder.bias", "b_dec": "b_dec", "k": "k", "threshold": "threshold"}
OURS = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
CLASSES: dict[str, dict[str, str]] = {
    "AutoEncoder": LINEAR | {"b_enc": "encoder.bias", "b_dec": "bias"},
    "AutoEncoderNew": LINEAR | {"b_enc": "encoder.bias", "b_dec": "decoder.bias"},
    "GatedAutoEncoder": LINEAR
    | {"b_dec": "decoder_bias", "b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"},
    "AutoEncoderTopK": LINEAR | BATCH,
    "BatchTopKSAE": LINEAR | BATCH,
    "MatryoshkaBatchTopKSAE": OURS | {"k": "k", "group_sizes": "group_sizes"},
    "JumpReluAutoEncoder": OURS,
}
"""Our names of what each class has, and its own."""
UNCENTRED = ("AutoEncoderNew", "JumpReluAutoEncoder")


def read(path: Path, found: dict[str, Any], told: Mapping[str, Any]) -> Stored:
    if {"optimizer", "ae"} <= found.keys():
        raise UserError(f"`{path}` is a copy for resuming an interrupted run, in another scale: take a finished ae.pt")
    cfg = _config(path)
    kind = _class(path, found, cfg)
    names = CLASSES[kind]
    if kind == "AutoEncoderTopK":
        found.setdefault("threshold", np.float32(-1))  # older ones have none
    found = {name: np.asarray(value) if isinstance(value, np.generic) else value for name, value in found.items()}
    stored.expect(path, found, names.values())
    arrays, dtype = stored.floats(path, {ours: found[theirs] for ours, theirs in names.items()})
    for name in LINEAR if "encoder.weight" in names.values() else ():
        arrays[name] = arrays[name].T
    trainer, buffer = cfg.get("trainer", {}), cfg.get("buffer", {})
    _check(path, arrays, trainer)
    sparsity = _sparsity(path, kind, arrays)
    transcodes = buffer.get("io") == "in_and_out"
    sae = stored.dictionary(path, arrays, sparsity, centred=kind not in UNCENTRED, transcodes=transcodes)
    sae = folded_norms(sae) if kind == "AutoEncoder" else sae
    return Stored(sae, _facts(kind, trainer, buffer), "dictionary_learning", dtype)


def _config(path: Path) -> dict[str, Any]:
    """Beside the file, or one folder up from `checkpoints/`."""
    for folder in (path.parent, path.parent.parent) if path.parent.name == "checkpoints" else (path.parent,):
        if (folder / "config.json").is_file():
            return read_json(folder / "config.json")
    return {}


def _class(path: Path, found: Mapping[str, Any], cfg: Mapping[str, Any]) -> str:
    kind = cfg.get("trainer", {}).get("dict_class")
    if kind is None:
        fits = [name for name, names in CLASSES.items() if set(names.values()) == set(found)]
        if len(fits) != 1:
            raise UserError(f"`{path}` may be {' or '.join(fits) or 'anything'}: put its config.json beside it")
        return fits[0]
    if kind not in CLASSES:
        raise UserError(
            f"`{path}`: dict_class `{kind}` is not supported ({', '.join(CLASSES)}){nearest(kind, CLASSES)}"
        )
    return kind


def _check(path: Path, arrays: Arrays, trainer: Mapping[str, Any]) -> None:
    said = {"activation_dim": arrays["W_enc"].shape[0], "dict_size": arrays["W_enc"].shape[-1]}
    if "k" in arrays:
        said["k"] = int(arrays["k"])
    for name, there in said.items():
        if trainer.get(name, there) != there:
            raise UserError(
                f"`{path}`: {name} is {there}, config.json says {trainer[name]}: take the right config.json"
            )


def _sparsity(path: Path, kind: str, arrays: Arrays) -> Sparsity:
    m = arrays["W_enc"].shape[-1]
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        return ReLU()
    if kind == "GatedAutoEncoder":
        return stored.gated(path, arrays["b_gate"], arrays["b_mag"], arrays["r_mag"], m)
    if kind == "AutoEncoderTopK":
        return stored.top_k(path, int(arrays["k"]), m)
    threshold = arrays["threshold"]
    if kind != "JumpReluAutoEncoder" and (threshold.shape or threshold < 0):
        raise UserError(f"`{path}`: the threshold is {threshold}, so it was never set: train the dictionary further")
    return stored.jump_relu(path, threshold, m)


def _facts(kind: str, trainer: Mapping[str, Any], buffer: Mapping[str, Any]) -> dict[str, Any]:
    metadata = {"dict_class": kind, "trainer_class": trainer.get("trainer_class"), "model_name": trainer.get("lm_name")}
    metadata |= {"submodule_name": trainer.get("submodule_name"), "context_size": buffer.get("ctx_len")}
    metadata["quantization"] = trainer.get("quantization")
    if found := re.fullmatch(r"resid_post_layer_(\d+)", str(metadata["submodule_name"])):
        metadata["hook_name"] = f"blocks.{found[1]}.hook_resid_post"
    return {name: value for name, value in metadata.items() if value is not None}


def write(sae: SAE, folder: Path, metadata: Mapping[str, Any]) -> None:
    """`ae.pt` and `config.json` that its `load_dictionary` reads."""
    stored.refuse_to_write(sae, "dictionary_learning")
    kind = {"relu": "AutoEncoder" if sae.centred else "AutoEncoderNew", "gated": "GatedAutoEncoder",
            "topk": "AutoEncoderTopK", "jumprelu": "JumpReluAutoEncoder"}[sae.sparsity.name]  # fmt: skip
    arrays = stored.arrays_of(recentred(sae, kind not in UNCENTRED))
    if k := getattr(sae.sparsity, "k", None):
        arrays |= {"k": np.asarray(k, np.int32), "threshold": np.asarray(-1, np.float32)}
    names = CLASSES[kind]
    if "encoder.weight" in names.values():
        arrays |= {name: np.ascontiguousarray(arrays[name].T) for name in LINEAR}
    hook = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", str(metadata.get("hook_name")))
    trainer = {"dict_class": kind, "activation_dim": sae.d, "dict_size": sae.latents}
    trainer |= {"lm_name": metadata.get("model_name"), "layer": int(hook[1]) if hook else None}
    trainer["submodule_name"] = f"resid_post_layer_{hook[1]}" if hook else metadata.get("hook_name")
    trainer |= {"k": k} if k else {}
    trainer |= {"quantization": metadata["quantization"]} if "quantization" in metadata else {}
    buffer = {"d_submodule": sae.d, "io": "out", "ctx_len": metadata.get("context_size")}
    write_tensors(folder / "ae.pt", {theirs: arrays[ours] for ours, theirs in names.items()})
    write_json(folder / "config.json", {"trainer": trainer, "buffer": buffer})


def read_file(path: Path, told: Mapping[str, Any]) -> Stored:
    return read(path, read_tensors(path), told)
