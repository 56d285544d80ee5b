"""SAELens: `cfg.json` and `sae_weights.safetensors`, of version 6 and of those before it.

orientation     `W_enc [d, m]`, `W_dec [m, d_out]` as ours; `W_skip [d_out, d]`, which is transposed
b_dec           taken off the input where `apply_b_dec_to_input` says so, never in a transcoder
threshold       linear, a code is above it; `log_threshold` of training up to 6.47 is its logarithm, and the float64
                scalar `topk_threshold` of a BatchTopK in training becomes the threshold of every latent
scale           `expected_average_only_in` trains on s x, and the s in activation_scaler.json (or pretrained_saes.yaml)
                is folded: W_enc s, W_dec / s, b_dec / s; codes keep the scaled size, as theirs do
norm            `layer_norm` and `constant_norm_rescale` stay in the dictionary, done to each token
decoder norms   with `rescale_acts_by_decoder_norm` codes are `pre * |W_dec|`: folded. A topk_threshold compares with
                these, so it stays, and is divided by s where a scale is folded before
hook            `metadata.hook_name`; activations of hook_z are read with heads side by side, and so are ours

Before 6 the facts lie flat beside dozens of training options, which are not checked; a topk was a standard with
`activation_fn` topk, a scale might be the boolean `normalize_activations`, and `scaling_factor [m]` multiplies codes
when they are decoded, which is folded into W_dec.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qsae_jax.errors import UserError, nearest
from qsae_jax.files import read_json, write_json
from qsae_jax.sae.formats import stored
from qsae_jax.sae.formats.stored import STANDARD, Arrays, Stored
from qsae_jax.sae.model import NORMS, SAE, recentred
from qsae_jax.sae.sparsity import ReLU, Sparsity, TopK

WEIGHTS = "sae_weights.safetensors"
FILES = ("cfg.json", WEIGHTS)
SCALER = "activation_scaler.json"
VERSION = "6.0.0"
"""Of the format that is written. Without it SAELens takes a cfg.json for an older one and drops the metadata."""

GATES = ("b_gate", "b_mag", "r_mag")
ARRAYS = {
    "standard": STANDARD,
    "topk": STANDARD,
    "gated": ("W_enc", "W_dec", "b_dec", *GATES),
    "jumprelu": (*STANDARD, "threshold"),
    "batchtopk": (*STANDARD, "topk_threshold"),
    "matryoshka_batchtopk": (*STANDARD, "topk_threshold"),
    "transcoder": STANDARD,
    "skip_transcoder": (*STANDARD, "W_skip"),
    "jumprelu_transcoder": (*STANDARD, "threshold"),
    "jumprelu_skip_transcoder": (*STANDARD, "threshold", "W_skip"),
}
"""What each architecture's file holds."""
COMMON = {"d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations", "reshape_activations",
          "metadata", "architecture", "d_out", "k", "rescale_acts_by_decoder_norm"}  # fmt: skip
TRAINING = {"decoder_init_norm", "l1_coefficient", "lp_norm", "l1_warm_up_steps", "use_sparse_activations",
            "aux_loss_coefficient", "jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode",
            "l0_coefficient", "l0_warm_up_steps", "pre_act_loss_coefficient", "jumprelu_tanh_scale",
            "jumprelu_ste_to_input", "target_l0", "topk_threshold_lr", "matryoshka_widths",
            "use_matryoshka_aux_loss"}  # fmt: skip
"""The keys of a training checkpoint, which change nothing once it is trained."""
FACTS = ("model_name", "hook_name", "hook_name_out", "model_class_name", "hook_head_index", "hook_head_index_out",
         "model_from_pretrained_kwargs", "prepend_bos", "exclude_special_tokens", "neuronpedia_id", "context_size",
         "seqpos_slice", "dataset_path", "sae_lens_version", "sae_lens_training_version")  # fmt: skip
"""What is kept of a flat cfg.json."""


def read(folder: Path, told: Mapping[str, Any]) -> Stored:
    """`told` may hold the `norm_scaling_factor` that pretrained_saes.yaml has."""
    cfg = read_json(folder / "cfg.json")
    version, cfg = _of_six(folder, cfg)
    kind = cfg.get("architecture") or "standard"
    if kind not in ARRAYS:
        raise UserError(
            f"`{folder}`: architecture `{kind}` is not supported ({', '.join(ARRAYS)}){nearest(str(kind), ARRAYS)}"
        )
    arrays, dtype = stored.read_safetensors(folder / WEIGHTS)
    arrays = _one_threshold(_without_scaling_factor(folder, arrays, cfg))
    stored.expect(folder / WEIGHTS, arrays, ARRAYS[kind])
    _check(folder, arrays, cfg)
    transcodes = "transcoder" in kind
    if "W_skip" in arrays:
        arrays["W_skip"] = arrays["W_skip"].T
    norm = cfg.get("normalize_activations") or "none"
    if norm != "none" and (transcodes or norm not in ("expected_average_only_in", *NORMS)):
        of = "transcoder's" if transcodes else "dictionary's"
        raise UserError(f"`{folder}`: a {of} normalize_activations is `{norm}`: fold it into the weights with SAELens")
    if norm == "expected_average_only_in":
        arrays = _scaled(folder, arrays, cfg, told)
    if cfg.get("rescale_acts_by_decoder_norm"):
        arrays = stored.norms_folded(arrays)
    centred = stored.flag(folder, cfg, "apply_b_dec_to_input", not transcodes)
    if transcodes and centred:
        raise UserError(f"`{folder}`: a transcoder with apply_b_dec_to_input, which has no meaning: write false")
    sae = stored.dictionary(folder, arrays, _sparsity(folder, kind, arrays, cfg), centred=centred,
                            norm=NORMS.get(norm), transcodes=transcodes, says="cfg.json")  # fmt: skip
    return Stored(sae, _metadata(folder, cfg, kind), f"saelens {version}", dtype)


def _metadata(folder: Path, cfg: Mapping[str, Any], kind: str) -> dict[str, Any]:
    metadata = cfg.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    if (shape := cfg.get("reshape_activations") or "none") not in ("none", "hook_z"):
        raise UserError(f"`{folder}`: reshape_activations `{shape}` is not supported (none, hook_z)")
    if shape == "hook_z":
        metadata["reshape_activations"] = shape
    return metadata | ({"trained_as": kind} if "batchtopk" in kind else {})


def _of_six(folder: Path, cfg: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The facts as SAELens 6 names them, and the version that wrote them."""
    metadata: dict[str, Any] = cfg["metadata"] if isinstance(cfg.get("metadata"), dict) else {}
    version = str(cfg.get("sae_lens_version") or metadata.get("sae_lens_version") or "before 6")
    if _is_six(version):
        stored.expect_keys(folder / "cfg.json", cfg, COMMON | TRAINING)
        return version, cfg
    short = {
        "hook_point": "hook_name",
        "hook_point_head_index": "hook_head_index",
        "activation_fn_str": "activation_fn",
    }
    flat = {short.get(key, key): value for key, value in cfg.items()}
    act, kwargs = flat.get("activation_fn") or "relu", flat.get("activation_fn_kwargs") or {}
    if act not in ("relu", "topk") or kwargs.get("signed"):
        raise UserError(f"`{folder}`: activation function `{act}` {kwargs or ''} of an old SAELens is not supported")
    if act == "topk":
        flat |= {"architecture": "topk", "k": kwargs.get("k", flat.get("k"))}
    hook = str(flat.get("hook_name") or "")
    if "{layer}" in hook:
        flat["hook_name"] = hook = hook.format(layer=flat.get("hook_layer", flat.get("hook_point_layer")))
    flat.setdefault("reshape_activations", "hook_z" if "hook_z" in hook else "none")
    if isinstance(norm := flat.get("normalize_activations"), bool):
        flat["normalize_activations"] = "expected_average_only_in" if norm else "none"
    flat["metadata"] = metadata | {key: flat[key] for key in FACTS if flat.get(key) is not None}
    return version, flat


def _is_six(version: str) -> bool:
    first = version.partition(".")[0]
    return first.isdigit() and int(first) >= 6


def _without_scaling_factor(folder: Path, arrays: Arrays, cfg: Mapping[str, Any]) -> Arrays:
    """`scaling_factor`, fitted after training, multiplies codes when they are decoded; one of ones is no such thing."""
    factor = arrays.pop("scaling_factor", None)
    if factor is None or np.allclose(factor, 1):
        return arrays
    if not cfg.get("finetuning_scaling_factor"):
        raise UserError(f"`{folder}`: a scaling_factor, and finetuning_scaling_factor is false: correct cfg.json")
    if factor.shape != arrays.get("W_dec", factor).shape[:1]:
        raise UserError(
            f"`{folder}`: scaling_factor has shape {factor.shape}, expected one number a latent: correct it"
        )
    return arrays | {"W_dec": arrays["W_dec"] * factor[:, None]}


def _one_threshold(arrays: Arrays) -> Arrays:
    logarithm = arrays.pop("log_threshold", None)
    return arrays if logarithm is None else {"threshold": np.exp(logarithm)} | arrays


def _check(folder: Path, arrays: Arrays, cfg: Mapping[str, Any]) -> None:
    d, m = cfg.get("d_in"), cfg.get("d_sae")
    out = cfg.get("d_out", d) if "transcoder" in (cfg.get("architecture") or "") else d
    shapes = {"W_enc": (d, m), "W_dec": (m, out), "W_skip": (out, d), "topk_threshold": ()}
    for name in [name for name in shapes if name in arrays]:
        if arrays[name].shape != shapes[name]:
            raise UserError(
                f"`{folder}`: {name} has shape {arrays[name].shape}, cfg.json says {shapes[name]}: correct cfg.json"
            )


def _scaled(folder: Path, arrays: Arrays, cfg: Mapping[str, Any], told: Mapping[str, Any]) -> Arrays:
    factor = told.get("norm_scaling_factor")
    if factor is None and (folder / SCALER).is_file():
        factor = read_json(folder / SCALER).get("scaling_factor")
    if not isinstance(factor, int | float) or not 0 < factor < float("inf"):
        raise UserError(
            f"`{folder}`: normalize_activations is `expected_average_only_in`, and no {SCALER} beside it says the "
            "scale: put it there, or fold the scale with SAELens"
        )
    if "topk_threshold" in arrays and cfg.get("rescale_acts_by_decoder_norm"):
        arrays = arrays | {"topk_threshold": arrays["topk_threshold"] / factor}
    return stored.scale_folded(arrays, factor)


def _sparsity(folder: Path, kind: str, arrays: Arrays, cfg: Mapping[str, Any]) -> Sparsity:
    m = arrays["W_enc"].shape[1]
    if kind == "topk":
        return stored.top_k(folder, cfg.get("k"), m)
    if kind == "gated":
        return stored.gated(folder, arrays["b_gate"], arrays["b_mag"], arrays["r_mag"], m)
    threshold = arrays.get("threshold", arrays.get("topk_threshold"))
    return ReLU() if threshold is None else stored.jump_relu(folder, threshold, m)


def write(sae: SAE, folder: Path, metadata: Mapping[str, Any]) -> None:
    """As SAELens 6 writes for inference."""
    from safetensors.numpy import save_file

    stored.refuse_to_write(sae, "saelens", skip=sae.transcodes, norm=not sae.transcodes, transcodes=True)
    kind = {"relu": "standard"}.get(sae.sparsity.name, sae.sparsity.name)
    if sae.transcodes:
        kind = {"standard": "", "jumprelu": "jumprelu_"}.get(kind, f"{kind}_")
        kind += "transcoder" if sae.W_skip is None else "skip_transcoder"
        if kind not in ARRAYS:
            raise UserError(f"SAELens has no architecture `{kind}`: write a transcoder of ReLU or JumpReLU")
        sae = recentred(sae, False) if sae.d == sae.d_out else sae
    norm = next((name for name, norm in NORMS.items() if norm is sae.norm), "none")
    reshape = metadata.get("reshape_activations", "none")
    cfg = {
        "architecture": kind,
        "d_in": sae.d,
        "d_sae": sae.latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.centred,
        "normalize_activations": norm,
        "reshape_activations": reshape,
        "metadata": {key: value for key, value in metadata.items() if key != "reshape_activations"}
        | {"sae_lens_version": said if _is_six(said := str(metadata.get("sae_lens_version"))) else VERSION},
    }
    if isinstance(sae.sparsity, TopK):
        cfg |= {"k": sae.sparsity.k, "rescale_acts_by_decoder_norm": False}
    if sae.transcodes:
        cfg["d_out"] = sae.d_out
    arrays = stored.arrays_of(sae)
    if "W_skip" in arrays:
        arrays["W_skip"] = np.ascontiguousarray(arrays["W_skip"].T)
    write_json(folder / "cfg.json", cfg)
    save_file({name: arrays[name] for name in ARRAYS[kind]}, folder / WEIGHTS)
