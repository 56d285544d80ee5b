"""OpenAI's sparse_autoencoder: one file of torch (read by pickled.py, nothing in it is run).

orientation     `encoder.weight [m, d]`, `decoder.weight [d, m]`, both transposed; `latent_bias`, `pre_bias`
b_dec           `pre_bias` is taken off the input and added to the output
threshold       none: ReLU, or the k largest with a ReLU
scale           none
norm            a TopK file expects each token's activations with mean 0 and deviation 1, and undoes it after
decoder norms   nothing to fold
hook            not in the file
"""

from pathlib import Path
from typing import Any

import numpy as np

from qsae_jax.errors import UserError
from qsae_jax.sae.formats import stored
from qsae_jax.sae.formats.stored import Stored
from qsae_jax.sae.model import layer_norm
from qsae_jax.sae.sparsity import ReLU

NAMES = {"pre_bias": "b_dec", "latent_bias": "b_enc", "encoder.weight": "W_enc", "decoder.weight": "W_dec"}


def read(path: Path, found: dict[str, Any]) -> Stored:
    act, state = found.pop("activation", "ReLU"), found.pop("activation_state_dict", {})
    found.pop("stats_last_nonzero", None)
    if act not in ("ReLU", "TopK"):
        raise UserError(f"`{path}`: activation `{act}` of OpenAI's code is not supported (ReLU, TopK)")
    stored.expect(path, found, NAMES)
    arrays, dtype = stored.floats(path, found)
    arrays = {NAMES[name]: value for name, value in arrays.items()}
    arrays |= {name: np.ascontiguousarray(arrays[name].T) for name in ("W_enc", "W_dec")}
    if act == "ReLU":
        sae = stored.dictionary(path, arrays, ReLU(), centred=True)
        return Stored(sae, {}, "openai", dtype)
    stored.expect_keys(path, state, ("k", "postact_fn"))
    if (after := state.get("postact_fn", "ReLU")) != "ReLU":
        raise UserError(f"`{path}`: TopK with `{after}` after it has negative codes, which are not supported (ReLU)")
    k = state.get("k")
    sparsity = stored.top_k(path, k.item() if isinstance(k, np.ndarray) and k.ndim == 0 else k, arrays["b_enc"].size)
    return Stored(stored.dictionary(path, arrays, sparsity, centred=True, norm=layer_norm), {}, "openai", dtype)
