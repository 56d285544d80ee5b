"""Llama Scope and Llamascopium (fnlp, OpenMOSS): `hyperparams.json` with `checkpoints/final.safetensors`, or
`config.json` with `sae_weights.safetensors`.

orientation     `encoder.weight [m, d]`, `decoder.weight [d, m]`, both transposed; Llamascopium's `W_E [d, m]` and
                `W_D [m, d]` are as ours
b_dec           not taken off the input, unless `apply_decoder_bias_to_pre_encoder`
threshold       a code is above it. `log_jumprelu_threshold [m]` is the logarithm, in the scale of training; the scalar
                `jump_relu_threshold` is linear and in the scale of the model's activations, so it is multiplied by f_in
scale           trained on f x with f = sqrt(d) / (average length), one for the input and one for the output: folded,
                W_enc f_in, W_dec / f_out, b_dec / f_out; codes keep the scaled size. R1-Distill's files do not hold the
                lengths, which SAELens's pretrained_saes.yaml has
decoder norms   with `sparsity_include_decoder_norm` the threshold is compared with `pre |W_dec|`: it is divided by that
hook            `hook_point_in`, `hook_point_out`; where these differ it is a transcoder
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qsae_jax.errors import UserError
from qsae_jax.files import read_json
from qsae_jax.sae.formats import stored
from qsae_jax.sae.formats.stored import STANDARD, Arrays, Stored

FIRST = ("hyperparams.json", "checkpoints/final.safetensors")
SECOND = ("config.json", "sae_weights.safetensors")
NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec",
         "W_E": "W_enc", "b_E": "b_enc", "W_D": "W_dec", "b_D": "b_dec"}  # fmt: skip
NORM = "dataset_average_activation_norm"
ON = ("use_glu_encoder", "use_batch_norm_mlp")
"""What would change the function, and is refused when on."""


def read(folder: Path, told: Mapping[str, Any]) -> Stored:
    cfg_name, weights = FIRST if (folder / FIRST[0]).is_file() else SECOND
    cfg = read_json(folder / cfg_name)
    found, dtype = stored.read_safetensors(folder / weights)
    _refuse(folder, cfg)
    lengths = _lengths(cfg, found)
    logarithm = found.pop("log_jumprelu_threshold", found.pop("activation_function.log_jumprelu_threshold", None))
    arrays = _renamed(folder / weights, found)
    hook, out = cfg.get("hook_point_in"), cfg.get("hook_point_out")
    d = arrays["W_enc"].shape[0]
    f_in, f_out = _factors(folder, cfg, lengths, told, d, arrays["W_dec"].shape[1])
    if logarithm is not None:
        threshold = np.exp(logarithm)
    elif isinstance(scalar := cfg.get("jump_relu_threshold"), int | float):
        threshold = np.float32(scalar * f_in)
    else:
        raise UserError(f"`{folder}`: no jump_relu_threshold in {cfg_name} and no logarithm of one in {weights}")
    threshold = np.broadcast_to(threshold, arrays["b_enc"].shape)
    if stored.flag(folder, cfg, "sparsity_include_decoder_norm", False):
        threshold = threshold / np.maximum(np.linalg.norm(arrays["W_dec"], axis=-1), 1e-12)
    arrays = stored.scale_folded(arrays, f_in, f_out)
    sparsity = stored.jump_relu(folder, np.asarray(threshold, np.float32), arrays["b_enc"].size)
    centred = stored.flag(folder, cfg, "apply_decoder_bias_to_pre_encoder", False)
    transcodes = hook != out and out is not None
    sae = stored.dictionary(folder, arrays, sparsity, centred=centred, transcodes=transcodes)
    metadata = {"hook_name": hook} | ({"hook_name_out": out} if transcodes else {})
    if model := cfg.get("model_name"):
        metadata["model_name"] = model
    return Stored(sae, {key: value for key, value in metadata.items() if value}, "llama_scope", dtype)


def _refuse(folder: Path, cfg: Mapping[str, Any]) -> None:
    if (act := cfg.get("act_fn", "jumprelu")) != "jumprelu":
        raise UserError(f"`{folder}`: act_fn `{act}` is not supported (jumprelu): take the dictionary for inference")
    if (kind := cfg.get("sae_type", "sae")) not in ("sae", "transcoder"):
        raise UserError(f"`{folder}`: sae_type `{kind}` is not supported (sae, transcoder)")
    if on := [key for key in ON if cfg.get(key)]:
        raise UserError(f"`{folder}`: {on[0]} is not supported")


def _lengths(cfg: Mapping[str, Any], found: Arrays) -> dict[str, float]:
    """Average lengths of activations, by `in` and `out` or by hook: in the configuration, or as scalars beside the
    weights, which are taken off them."""
    lengths = dict(cfg.get(NORM) or {})
    for name in [name for name in found if name.startswith(f"{NORM}.")]:
        lengths[name.removeprefix(f"{NORM}.")] = found.pop(name).item()
    return lengths


def _factors(
    folder: Path, cfg: Mapping[str, Any], lengths: dict[str, float], told: Mapping[str, Any], d: int, d_out: int
) -> tuple[float, float]:
    how = cfg.get("norm_activation", "dataset-wise")
    if how in ("inference", "none", None):  # folded already, or never there
        return 1.0, 1.0
    if how != "dataset-wise":
        raise UserError(f"`{folder}`: norm_activation `{how}` is not supported (dataset-wise, inference)")
    if given := told.get("norm_scaling_factor"):
        return given, given
    hook, out = cfg.get("hook_point_in"), cfg.get("hook_point_out")
    read, wrote = lengths.get("in", lengths.get(str(hook))), lengths.get("out", lengths.get(str(out)))
    if not read or not wrote:
        raise UserError(
            f"`{folder}`: no {NORM}, without which its scale is unknown: load it as a release of SAELens, "
            "llama_scope_r1_distill/ID, whose list has the scale"
        )
    return d**0.5 / read, d_out**0.5 / wrote


def _renamed(where: Path, found: Arrays) -> Arrays:
    arrays = {NAMES.get(name, name): value.T if name in ("encoder.weight", "decoder.weight") else value
              for name, value in found.items()}  # fmt: skip
    stored.expect(where, arrays, STANDARD)
    return arrays
