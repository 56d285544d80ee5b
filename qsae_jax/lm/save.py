"""An LM back to a Hugging Face folder, as transformers 5 reads it: the rows of its family read backwards."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from flax import nnx

from qsae_jax.errors import UserError
from qsae_jax.files import staged
from qsae_jax.lm.families import HUB
from qsae_jax.lm.model import LM
from qsae_jax.lm.tokenizer import TextTokenizer


def save_lm(
    lm: LM, folder: Path, extra: Mapping[str, Any] | None = None, tokenizer: TextTokenizer | None = None
) -> None:
    """Write the model (and its tokenizer) as a Hugging Face folder, whole or not at all. `extra` goes into the
    weights file's metadata, where transformers ignores it."""
    from safetensors.numpy import save_file

    if lm.config.processing != "none":
        raise UserError(f"a model with processing {lm.config.processing} has no Hugging Face form: load it unprocessed")
    family = HUB[lm.config.family]
    assert family.export
    config = family.export(lm.config) | {"dtype": lm.embed[...].dtype.name}
    # Written even when there are none: transformers would take Llama's 1 and 2.
    config |= {f"{name}_token_id": getattr(tokenizer, f"{name}_id", None) for name in ("bos", "eos")}
    notes = {key: str(value) for key, value in (extra or {}).items()}
    with staged(folder) as draft:
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(stored_tensors(lm), draft / "model.safetensors", metadata={"format": "pt"} | notes)
        if tokenizer:
            tokenizer.save(draft)


def stored_tensors(lm: LM) -> dict[str, np.ndarray]:
    """The weights under the names and in the layouts of Hugging Face's files."""
    ours = {".".join(map(str, key)): variable.get_value() for key, variable in nnx.to_flat_state(nnx.state(lm))}
    tensors = {}
    for place in HUB[lm.config.family].places(lm.config.n_layers):
        parts = [np.asarray(ours.pop(path)) for path in place.paths if path in ours]
        if not parts:
            continue  # what this model does not have: a bias, or a head under its second name
        forward, back = place.layout.split(" -> ")
        value = parts[0] if len(place.paths) == 1 else np.stack(parts)
        tensors[place.stored] = np.ascontiguousarray(rearrange(value, f"{back} -> {forward}"))
    assert not ours, f"no row writes {sorted(ours)}"
    return tensors
