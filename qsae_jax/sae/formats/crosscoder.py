"""Crosscoders of two models (ckkissane): `cc_weights.pt` and `cfg.json`.

orientation     `W_enc [models, d, m]`, `W_dec [m, models, d]`, `b_dec [models, d]`: the models side by side, as ours
b_dec           not taken off the input
threshold       none: ReLU
scale           trained on activations with a factor a model, which is not in the file: the reader does not fold one
decoder norms   rows of any length; they tell which model a latent belongs to
hook            `hook_point` of cfg.json, of every model
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsae_jax.errors import UserError
from qsae_jax.files import read_json
from qsae_jax.sae.formats import stored
from qsae_jax.sae.formats.stored import STANDARD, Stored
from qsae_jax.sae.sparsity import ReLU


def read(path: Path, found: dict[str, Any], told: Mapping[str, Any]) -> Stored:
    stored.expect(path, found, STANDARD)
    arrays, dtype = stored.floats(path, found)
    if arrays["W_enc"].ndim != 3 or arrays["W_dec"].ndim != 3:
        raise UserError(
            f"`{path}`: W_enc has shape {arrays['W_enc'].shape}, expected (models, d, m): it is no crosscoder"
        )
    m = arrays["W_enc"].shape[-1]
    arrays["W_enc"] = arrays["W_enc"].reshape(-1, m)
    arrays |= {"W_dec": arrays["W_dec"].reshape(m, -1), "b_dec": arrays["b_dec"].reshape(-1)}
    cfg = read_json(path.with_name("cfg.json")) if path.with_name("cfg.json").is_file() else {}
    metadata = {"hook_name": cfg.get("hook_point"), "model_name": cfg.get("model_name"), "models": len(found["W_enc"])}
    sae = stored.dictionary(path, arrays, ReLU(), centred=False)
    return Stored(sae, {key: value for key, value in metadata.items() if value is not None}, "crosscoder", dtype)
