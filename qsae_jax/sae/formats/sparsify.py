"""sparsify: `cfg.json` and `sae.safetensors`.

orientation     `encoder.weight [m, d]`; `W_dec [m, d]` as ours; `W_skip [d, d]` as rows of the output, transposed
b_dec           taken off the input unless `transcode`
threshold       none: ReLU, then the k largest (`multi_topk` only adds to the loss of training)
scale           none
decoder norms   nothing to fold; `normalize_decoder` is a matter of training
hook            the folder is named after a module, whose output it is (a transcoder reads its input): `layers.10`,
                `h.5.mlp`

SAELens's own reader of these files transposes W_dec and reads `normalize_decoder` as the absence of b_dec; both
contradict sparsify's code, which is followed here.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qsae_jax.errors import UserError
from qsae_jax.files import read_json, write_json
from qsae_jax.sae.formats import stored
from qsae_jax.sae.formats.stored import Stored
from qsae_jax.sae.model import SAE, recentred
from qsae_jax.sae.sparsity import TopK

WEIGHTS = "sae.safetensors"
NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec", "W_skip": "W_skip"}
KEYS = {"activation", "expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk", "skip_connection",
        "transcode", "d_in"}  # fmt: skip


def read(folder: Path, told: Mapping[str, Any]) -> Stored:
    cfg = read_json(folder / "cfg.json")
    stored.expect_keys(folder / "cfg.json", {key: 0 for key, value in cfg.items() if value}, KEYS)  # older ones are off
    if (act := cfg.get("activation", "topk")) != "topk":
        raise UserError(f"`{folder}`: activation `{act}` of sparsify is not supported (topk)")
    found, dtype = stored.read_safetensors(folder / WEIGHTS)
    skip = ("W_skip",) if stored.flag(folder, cfg, "skip_connection", False) else ()
    stored.expect(folder / WEIGHTS, found, (*list(NAMES)[:4], *skip))
    arrays = {NAMES[name]: value for name, value in found.items()}
    arrays["W_enc"] = arrays["W_enc"].T
    if skip:
        arrays["W_skip"] = arrays["W_skip"].T
    d, m = cfg.get("d_in"), arrays["b_enc"].size
    said = cfg.get("num_latents") or (d or 0) * cfg.get("expansion_factor", 32)
    if arrays["W_enc"].shape != (d, said):
        raise UserError(f"`{folder}`: the encoder is of {arrays['W_enc'].shape}, cfg.json says {(d, said)}: correct it")
    transcodes = stored.flag(folder, cfg, "transcode", False)
    sae = stored.dictionary(folder, arrays, stored.top_k(folder, cfg.get("k"), m), centred=not transcodes,
                            transcodes=transcodes)  # fmt: skip
    module = str(told.get("path") or folder.resolve()).rsplit("/", 1)[-1]
    return Stored(sae, _facts(folder, module, transcodes), "sparsify", dtype)


def _facts(folder: Path, module: str, transcodes: bool) -> dict[str, Any]:
    metadata: dict[str, Any] = {"hf_hook_name": module}
    hook = "hook_embed" if re.search(r"(embed_tokens|wte|embed_in)$", module) else None
    if found := re.search(r"(?:layers|h)\.(\d+)(?:\.(mlp|attn|self_attn|attention))?$", module):
        site = {None: "resid_post", "mlp": "mlp_out"}.get(found[2], "attn_out")
        hook = f"blocks.{found[1]}.hook_{site}"
    if hook:
        metadata["hook_name_out" if transcodes else "hook_name"] = hook
    run = folder.parent / "config.json"
    for key, name in {"model": "model_name", "dataset": "dataset_path", "ctx_len": "context_size"}.items():
        if run.is_file() and (value := read_json(run).get(key)):
            metadata[name] = value
    return metadata


def write(sae: SAE, folder: Path, metadata: Mapping[str, Any]) -> None:
    from safetensors.numpy import save_file

    stored.refuse_to_write(sae, "sparsify", skip=True, transcodes=True)
    if not isinstance(sae.sparsity, TopK) or sae.d != sae.d_out:
        raise UserError(f"sparsify holds TopK dictionaries of one width, this is `{sae.sparsity.name}`: use saelens")
    arrays = stored.arrays_of(recentred(sae, not sae.transcodes))
    arrays["W_enc"] = arrays["W_enc"].T
    if sae.W_skip is not None:
        arrays["W_skip"] = arrays["W_skip"].T
    cfg = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": False, "num_latents": sae.latents}
    cfg |= {"k": sae.sparsity.k, "multi_topk": False, "skip_connection": sae.W_skip is not None}
    write_json(folder / "cfg.json", cfg | {"transcode": sae.transcodes, "d_in": sae.d})
    ours = {name: np.ascontiguousarray(arrays[of]) for name, of in NAMES.items() if of in arrays}
    save_file(ours, folder / WEIGHTS)
