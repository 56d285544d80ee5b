"""What a reader gives: a dictionary in our orientation, and what its files say of it. And the checks of every reader.

Every owner's module says how its files differ from `qsae_jax.sae.model`: orientation, whether b_dec is taken off the
input, what a threshold means, which scales are to be folded, and where the activations are from. None guesses: a file
that says something else is refused.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qsae_jax.errors import UserError, nearest
from qsae_jax.hosts import here
from qsae_jax.sae.model import SAE, Norm
from qsae_jax.sae.sparsity import Gated, JumpReLU, Sparsity, TopK

Arrays = dict[str, np.ndarray]
STANDARD = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True)
class Stored:
    """A dictionary and what its files say of it, under SAELens's names."""

    sae: SAE
    metadata: dict[str, Any] = field(default_factory=dict)
    format: str = "saelens"
    dtype: str = "float32"
    """Of the encoder's weights on disk."""


def read_safetensors(path: Path) -> tuple[Arrays, str]:
    """The arrays of a safetensors file in float32, and the type that the largest has there."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"`{path}` is not there: the dictionary's folder needs it")
    try:
        with safe_open(path, "numpy") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return floats(path, found)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"`{path}` is not a readable safetensors file ({error}): make it again") from error


def floats(path: Path, found: Mapping[str, Any]) -> tuple[Arrays, str]:
    """The same arrays in float32, and the type that the largest had."""
    for name, value in found.items():
        if not isinstance(value, np.ndarray):
            raise UserError(f"`{path}`: `{name}` is {type(value).__name__}, expected an array: take the finished file")
    kept = max(found.values(), key=lambda a: a.size).dtype.name if found else "float32"
    return {name: np.asarray(value, np.float32) for name, value in found.items()}, kept


def expect(where: Path, arrays: Mapping[str, Any], names: Iterable[str], maybe: Iterable[str] = ()) -> None:
    """Exactly these arrays, and perhaps those."""
    names = tuple(names)
    if set(arrays) - set(maybe) != set(names):
        held = ", ".join(sorted(arrays)) or "nothing"
        raise UserError(f"`{where}` holds {held}; expected {', '.join(names)}: take the finished dictionary")


def expect_keys(where: Path, cfg: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse facts that we do not know: one of them may change what the arrays mean."""
    for key in sorted(set(cfg) - set(known)):
        raise UserError(f"`{where}`: unknown key `{key}`{nearest(key, known)}: remove it if it does not matter")


def whole(where: Path, value: Any, name: str, most: int) -> int:
    if type(value) is not int or not 0 < value <= most:
        raise UserError(f"`{where}`: {name} {value!r}, expected a whole number up to {most}: correct it")
    return value


def flag(where: Path, cfg: Mapping[str, Any], name: str, default: bool) -> bool:
    if not isinstance(value := cfg.get(name, default), bool):
        raise UserError(f"`{where}`: {name} is {value!r}: write true or false")
    return value


def top_k(where: Path, k: Any, latents: int) -> TopK:
    return TopK(whole(where, k, "k", latents))


def jump_relu(where: Path, threshold: np.ndarray, latents: int) -> JumpReLU:
    """One threshold for all, or one a latent; linear, and a code has to be above it. Infinity: it never fires."""
    if threshold.shape not in ((), (latents,)):
        raise UserError(f"`{where}`: threshold has shape {threshold.shape}, expected {(latents,)}: correct it")
    if np.isnan(threshold).any():
        raise UserError(f"`{where}`: threshold holds NaN: train the dictionary again")
    return JumpReLU(jnp.asarray(np.broadcast_to(threshold, (latents,)), jnp.float32))


def gated(where: Path, b_gate: np.ndarray, b_mag: np.ndarray, r_mag: np.ndarray, latents: int) -> Gated:
    for name, array in {"b_gate": b_gate, "b_mag": b_mag, "r_mag": r_mag}.items():
        _check(where, name, array, (latents,))
    return Gated(*map(jnp.asarray, (b_gate, b_mag, r_mag)))


def dictionary(
    where: Path,
    arrays: Arrays,
    sparsity: Sparsity,
    *,
    centred: bool,
    norm: Norm | None = None,
    transcodes: bool = False,
    says: str = "W_enc",
) -> SAE:
    """The dictionary of checked arrays: `W_enc`, `W_dec`, `b_dec`, and where there are any `b_enc` and `W_skip`."""
    if arrays["W_enc"].ndim != 2 or arrays["W_dec"].ndim != 2:
        raise UserError(f"`{where}`: W_enc and W_dec have shapes {arrays['W_enc'].shape} and {arrays['W_dec'].shape}")
    d, m = arrays["W_enc"].shape
    d_out = arrays["W_dec"].shape[1] if transcodes else d
    shapes = {"W_enc": (d, m), "b_enc": (m,), "W_dec": (m, d_out), "b_dec": (d_out,), "W_skip": (d, d_out)}
    for name in shapes:
        if name in arrays:
            _check(where, name, arrays[name], shapes[name], says)
    b_enc, skip = (jnp.asarray(arrays[n]) if n in arrays else None for n in ("b_enc", "W_skip"))
    W_enc, W_dec, b_dec = (jnp.asarray(arrays[n]) for n in ("W_enc", "W_dec", "b_dec"))
    return SAE(sparsity, W_enc, b_enc, W_dec, b_dec, centred, skip, norm, transcodes)


def _check(where: Path, name: str, array: np.ndarray, shape: tuple[int, ...], says: str = "W_enc") -> None:
    if array.shape != shape:
        raise UserError(f"`{where}`: {name} has shape {array.shape}, {says} says {shape}: correct it")
    if not np.isfinite(array).all():
        raise UserError(f"`{where}`: {name} holds NaN or infinite values: train the dictionary again")


def scale_folded(arrays: Arrays, of_input: float, of_output: float | None = None) -> Arrays:
    """For activations as they are, from arrays for `of_input * x`, `of_output * y`. Codes keep the scaled size."""
    out = of_input if of_output is None else of_output
    changed = {"W_enc": arrays["W_enc"] * of_input, "W_dec": arrays["W_dec"] / out, "b_dec": arrays["b_dec"] / out}
    if "W_skip" in arrays:
        changed["W_skip"] = arrays["W_skip"] * (of_input / out)
    return {name: np.asarray(value, np.float32) for name, value in (arrays | changed).items()}


def norms_folded(arrays: Arrays) -> Arrays:
    """Decoder rows of length 1, each length in its code; a row of zeros stays one and its latent is dead."""
    norms = np.linalg.norm(arrays["W_dec"], axis=-1)
    rows = arrays["W_dec"] / np.where(norms > 0, norms, 1)[:, None]
    return arrays | {"W_enc": arrays["W_enc"] * norms[None], "b_enc": arrays["b_enc"] * norms, "W_dec": rows}


def arrays_of(sae: SAE) -> Arrays:
    """The parameters in float32, under SAELens's names, in our orientation."""
    found = {"W_enc": sae.W_enc, "W_dec": sae.W_dec[...], "b_dec": sae.b_dec[...]}
    if sae.b_enc is not None:
        found["b_enc"] = sae.b_enc[...]
    if sae.W_skip is not None:
        found["W_skip"] = sae.W_skip[...]
    if isinstance(sae.sparsity, JumpReLU):
        found["threshold"] = sae.sparsity.threshold[...]
    if isinstance(sae.sparsity, Gated):
        found |= {name: getattr(sae.sparsity, name)[...] for name in ("b_gate", "b_mag", "r_mag")}
    return {name: np.ascontiguousarray(np.asarray(value, np.float32)) for name, value in here(found).items()}


def refuse_to_write(sae: SAE, owner: str, *, skip: bool = False, norm: bool = False, transcodes: bool = False) -> None:
    """What the owner's format has no place for; the options say what it has one for."""
    if sae.sparsity.name == "batchtopk":
        raise UserError(
            "a BatchTopK dictionary without a threshold depends on the batch: finish it as a JumpReLU first"
        )
    lacks = {
        "a skip connection": sae.W_skip is not None and not skip,
        "a norm of the input": bool(sae.norm) and not norm,
    }
    lacks |= {"a transcoder": sae.transcodes and not transcodes}
    for what, there in lacks.items():
        if there:
            raise UserError(f"the format {owner} has no place for {what}: write it as saelens")
