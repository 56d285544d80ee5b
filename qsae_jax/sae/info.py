"""What a dictionary is and what state it is in, read from its files alone: no model, no tokens."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from qsae_jax.sae.formats import Stored, load_stored
from qsae_jax.sae.formats.sources import find
from qsae_jax.sae.formats.stored import arrays_of, read_safetensors
from qsae_jax.sae.sparsity import JumpReLU, TopK

ORIGIN = ("model_name", "hook_name", "hook_name_out", "quantization", "dataset_path", "context_size", "prepend_bos")
NEVER = 1e-9
"""SAELens writes log10(frequency + 1e-10): what is below never fired."""


def info(source: str | Path) -> dict[str, Any]:
    """The facts, in the order in which they are told."""
    stored, folder = load_stored(source), find(source).folder
    sae, arrays = stored.sae, arrays_of(stored.sae)
    facts: dict[str, Any] = {"source": str(source), "format": stored.format, "dtype": stored.dtype}
    facts |= {"architecture": architecture(stored), "d": sae.d, "latents": sae.latents, "d_out": sae.d_out}
    facts |= {"centred": sae.centred, "norm": getattr(sae.norm, "__name__", None)}
    facts |= {"origin": {name: stored.metadata[name] for name in ORIGIN if name in stored.metadata}}
    total = sum(a.size for a in arrays.values())
    facts |= {"parameters": total, "parameter_shares": {name: a.size / total for name, a in arrays.items()}}
    rows = np.linalg.norm(arrays["W_dec"], axis=-1)
    facts |= {"encoder_norms": spread(np.linalg.norm(arrays["W_enc"], axis=0)), "decoder_norms": spread(rows)}
    facts["zero_decoder_rows"] = float((rows == 0).mean())
    facts["bias_norms"] = {name: float(np.linalg.norm(a)) for name, a in arrays.items() if name.startswith("b_")}
    if isinstance(sae.sparsity, JumpReLU):
        finite = arrays["threshold"][np.isfinite(arrays["threshold"])]
        facts["threshold"] = (spread(finite) if finite.size else {}) | {"never": 1 - finite.size / sae.latents}
    if density := density_of(folder / "sparsity.safetensors", sae.latents):
        facts["density"] = density
    return facts


def architecture(stored: Stored) -> str:
    """As in `topk (k 32), transcoder with a skip connection`."""
    sae = stored.sae
    said = sae.sparsity.name
    if isinstance(sae.sparsity, TopK):
        said += f" (k {sae.sparsity.k})"
    said += ", transcoder" if sae.transcodes else ""
    return said + (" with a skip connection" if sae.W_skip is not None else "")


def spread(values: np.ndarray) -> dict[str, float]:
    return {"min": float(values.min()), "median": float(np.median(values)), "max": float(values.max())}


def density_of(file: Path, latents: int) -> dict[str, float]:
    """How often latents fire, where SAELens left the logarithms of it beside the weights."""
    if not file.is_file():
        return {}
    logarithms = read_safetensors(file)[0].get("sparsity")
    if logarithms is None or logarithms.shape != (latents,):
        return {}
    fires = 10 ** logarithms.astype(np.float64)
    shares = {"dead": fires < NEVER, "over_1_percent": fires > 0.01, "over_10_percent": fires > 0.1}
    return {name: float(there.mean()) for name, there in shares.items()} | {"median": float(np.median(fires))}


def lines(facts: dict[str, Any]) -> Iterable[str]:
    """The facts as text, one a line."""
    width = max(len(name) for name in facts) + 2
    for name, value in facts.items():
        if value is None or value == {}:
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {_short(item)}" for key, item in value.items())
        yield f"{name.replace('_', ' '):{width}}{_short(value)}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
