"""Do two dictionaries hold the same features? Matching of their directions, which means nothing without the same
figure for two dictionaries that differ only in their seed.

mmcs       mean over latents of the largest cosine with any latent of the other (Sharkey et al. 2022)
mnn        share of latents whose nearest neighbour has them as nearest neighbour, at cosine >= 0.7
assigned   share of latents whose partner under the best one-to-one assignment of decoders has cosine >= 0.7 and is
           also their partner under the best assignment of encoders (Paulo & Belrose, arXiv 2501.16615)
"""

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment

from qsae_jax.sae.model import SAE

SAME = 0.7
ASSIGNABLE = 16_384
"""Latents up to which an assignment is sought: its time grows with their cube (4,608: seconds). Beyond, NaN."""


def unit(rows: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m d"]:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def match(
    one: SAE, other: SAE, alive_one: Bool[np.ndarray, "m"], alive_other: Bool[np.ndarray, "m"]
) -> dict[str, float]:
    """The three figures over the latents of `one` that fire, against those of `other` that fire."""
    if not alive_one.any() or not alive_other.any():
        return dict.fromkeys(("mmcs", "mnn", "assigned"), 0.0)
    decoders = [unit(np.asarray(s.W_dec[...])[a]) for s, a in ((one, alive_one), (other, alive_other))]
    encoders = [unit(np.asarray(s.encoder[...])[a]) for s, a in ((one, alive_one), (other, alive_other))]
    return matched(decoders[0] @ decoders[1].T, encoders[0] @ encoders[1].T)


def matched(decoder: Float[np.ndarray, "m n"], encoder: Float[np.ndarray, "m n"]) -> dict[str, float]:
    """The three figures from cosines of decoder rows and of encoder columns."""
    there, back = decoder.argmax(1), decoder.argmax(0)
    best = decoder.max(1)
    mutual = (back[there] == np.arange(len(decoder))) & (best >= SAME)
    return {"mmcs": float(best.mean()), "mnn": float(mutual.mean()), "assigned": assigned(decoder, encoder)}


def assigned(decoder: Float[np.ndarray, "m n"], encoder: Float[np.ndarray, "m n"]) -> float:
    """Where one dictionary is larger, its latents that an assignment leaves over have no partner (-1)."""
    if max(decoder.shape) > ASSIGNABLE:
        return float("nan")
    partner = {}
    for name, cosines in (("decoder", decoder), ("encoder", encoder)):
        rows, columns = linear_sum_assignment(cosines, maximize=True)
        partner[name] = np.full(len(cosines), -1)
        partner[name][rows] = columns
    same = (partner["decoder"] == partner["encoder"]) & (partner["decoder"] >= 0)
    return float((same & (decoder[np.arange(len(decoder)), partner["decoder"]] >= SAME)).mean())
