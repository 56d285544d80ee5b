"""Do two dictionaries hold the same features? Matching of their directions and of their codes, which means nothing
without the same figure for two dictionaries that differ only in their seed.

mmcs       mean over latents of the largest cosine with any latent of the other (Sharkey et al. 2022)
mnn        share of latents whose nearest neighbour has them as nearest neighbour, at cosine >= 0.7 (Borobia et al.
           2026, arXiv 2603.25325); mnn_0.5 and mnn_0.9 at those cosines, because the share depends on where it is cut
assigned   share of latents whose partner under the best one-to-one assignment of decoders has cosine >= 0.7 and is
           also their partner under the best assignment of encoders (Paulo & Belrose, arXiv 2501.16615)
act_r      mean over latents of the largest correlation of their code with any latent's of the other on the same
           tokens (Bricken et al. 2023, "Towards Monosemanticity": activation similarity of features of two runs)
act_same   share of latents with that correlation >= 0.7

Two directions can be alike and fire on other tokens, and a model that turned its basis can fire alike along others.
The largest of many correlations is above 0 by chance, more so over few tokens and for latents that fire on few of them:
only figures over the same tokens are compared.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.optimize import linear_sum_assignment

from qsae_jax.hosts import here
from qsae_jax.mesh import in_chunks
from qsae_jax.products import einsum
from qsae_jax.sae.model import SAE
from qsae_jax.stats import Totals, pearson

SAME = 0.7
CUTS = {"mnn_0.5": 0.5, "mnn": SAME, "mnn_0.9": 0.9}
ASSIGNABLE = 16_384
"""Latents up to which an assignment is sought: its time grows with their cube (4,608: seconds). Beyond, NaN. Also up to
which the sums of every pair are held: at that number 2 GiB on the host, 1 GiB for r, and 2 GiB on the device."""
BLOCK = 1024
"""Rows of a table of every pair that are worked on at a time: 0.25 GiB of cosines with 65,536 latents."""
ROWS = 512
"""Tokens whose codes `[rows, m]` are alive at a time."""


def unit(rows: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m d"]:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


class Nearest(NamedTuple):
    """For each row of one its nearest of the other and that cosine, and the same the other way; of ties the first."""

    there: Int[np.ndarray, "m"]
    best: Float[np.ndarray, "m"]
    back: Int[np.ndarray, "n"]
    best_back: Float[np.ndarray, "n"]


def nearest(blocks: Iterable[Float[np.ndarray, "rows n"]]) -> Nearest:
    """From cosines in blocks of rows, none of which is kept."""
    there, best, columns, heights, start = [], [], [], [], 0
    for cosines in blocks:
        there.append(cosines.argmax(1))
        best.append(cosines.max(1))
        columns.append(start + cosines.argmax(0))
        heights.append(cosines.max(0))
        start += len(cosines)
    block = np.argmax(heights, 0)[None]
    back, best_back = (np.take_along_axis(np.stack(x), block, 0)[0] for x in (columns, heights))
    return Nearest(np.concatenate(there), np.concatenate(best), back, best_back)


def cosine_blocks(one: Float[np.ndarray, "m d"], other: Float[np.ndarray, "n d"]) -> Iterator[np.ndarray]:
    """Cosines of unit rows, BLOCK rows of `one` at a time."""
    yield from (one[start : start + BLOCK] @ other.T for start in range(0, len(one), BLOCK))


def match(
    one: SAE, other: SAE, alive_one: Bool[np.ndarray, "m"], alive_other: Bool[np.ndarray, "m"]
) -> dict[str, float]:
    """The figures of directions over the latents of `one` that fire, against those of `other` that fire."""
    if not alive_one.any() or not alive_other.any():
        return dict.fromkeys(("mmcs", *CUTS, "assigned"), 0.0)
    decoders = [unit(np.asarray(here(s.W_dec[...]))[a]) for s, a in ((one, alive_one), (other, alive_other))]
    if max(map(len, decoders)) > ASSIGNABLE:
        return _neighbours(nearest(cosine_blocks(*decoders))) | {"assigned": float("nan")}
    encoders = [unit(np.asarray(here(s.encoder[...]))[a]) for s, a in ((one, alive_one), (other, alive_other))]
    return matched(decoders[0] @ decoders[1].T, encoders[0] @ encoders[1].T)


def matched(decoder: Float[np.ndarray, "m n"], encoder: Float[np.ndarray, "m n"]) -> dict[str, float]:
    """The figures of directions from cosines of decoder rows and of encoder columns."""
    return _neighbours(nearest([decoder])) | {"assigned": assigned(decoder, encoder)}


def _neighbours(near: Nearest) -> dict[str, float]:
    mutual = near.back[near.there] == np.arange(len(near.there))
    shares = {name: float((mutual & (near.best >= cut)).mean()) for name, cut in CUTS.items()}
    return {"mmcs": float(near.best.mean())} | shares


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


class About(NamedTuple):
    """What sums of codes are taken about: their means over the first tokens, and the codes of one token, from which a
    latent that varies differs somewhere."""

    mean: Float[Array, "m"]
    token: Float[Array, "m"]


@dataclass
class Together:
    """Correlations of every latent of one dictionary with every latent of another over the same tokens.

    The tokens' activations may be those of two models, each read by its own dictionary. Sums over a batch are float32
    about shifts near the means, so that nothing cancels, and are added up in float64 on the host: memory is that of
    all pairs, whatever the number of tokens, and so is the time of a token (two of 4,608 latents on two CPU cores:
    2 ms). With more than ASSIGNABLE latents nothing is summed and r is NaN."""

    totals: Totals = field(default_factory=Totals)
    cross: Float[np.ndarray, "m n"] = field(default_factory=lambda: np.zeros((0, 0)))
    about: tuple[About, ...] = ()

    def add(
        self,
        one: SAE,
        x_one: Float[Array, "b p d"],
        other: SAE,
        x_other: Float[Array, "b p e"],
        weight: Float[np.ndarray, "b"],
    ) -> None:
        """A batch of windows, of which those of weight 0 count for nothing."""
        if x_one.shape[:2] != x_other.shape[:2]:
            raise ValueError(f"the activations are of other tokens: {x_one.shape[:2]} and {x_other.shape[:2]}")
        shape = (one.latents, other.latents)
        if max(shape) > ASSIGNABLE:
            self.cross = np.broadcast_to(np.nan, shape)
            return
        saes, xs, weight = (one, other), (x_one, x_other), np.asarray(weight, np.float32)
        if not self.about:
            self.about = tuple(_about(sae, x, weight) for sae, x in zip(saes, xs, strict=True))
            self.cross = np.zeros(shape)
        sums = here(_sums(saes, xs, weight, self.about))
        self.cross += sums.pop("cross")
        self.totals.add(n=weight.sum(dtype=np.float64) * x_one.shape[1], **sums)

    def r(self) -> Float[np.ndarray, "m n"]:
        """Pearson r in float32, zeros of the codes included; NaN where one of the two latents does not vary."""
        if not self.about or self.totals["n"] <= 0:
            return np.broadcast_to(np.float32(np.nan), self.cross.shape)
        t, found = self.totals, np.empty(self.cross.shape, np.float32)
        # pearson sees the product of two variances: one that is rounding error would hide behind the other.
        xx, yy = (np.where(t[f"moved{i}"] > 0, t[f"ss{i}"], np.nan) for i in (0, 1))
        for start in range(0, len(found), BLOCK):
            at = slice(start, start + BLOCK)
            x, y = t["s0"][at, None], t["s1"][None]
            found[at] = pearson(t["n"], x, y, xx[at, None], yy[None], self.cross[at])
        return found


def correlated(r: Float[np.ndarray, "m n"], alive_one: Bool[np.ndarray, "m"]) -> dict[str, float]:
    """The figures of codes over the latents of `one` that fire. One that does not vary on these tokens, although it
    fires on others, has no r and is left out; NaN where none is left."""
    best = np.array([np.nan]) if max(r.shape) > ASSIGNABLE else np.fmax.reduce(r, axis=1)[alive_one]
    best = best[np.isfinite(best)].astype(np.float64)
    if not len(best):
        return {"act_r": float("nan"), "act_same": float("nan")}
    return {"act_r": float(best.mean()), "act_same": float((best >= SAME).mean())}


@jax.jit
def _about(sae: SAE, x: Float[Array, "b p d"], weight: Float[Array, "b"]) -> About:
    rows = x.reshape(-1, x.shape[-1])[:ROWS]
    w = jnp.repeat(weight, x.shape[1])[:ROWS]
    codes = sae.encode(rows)
    return About(einsum("t,tm->m", w, codes) / jnp.maximum(jnp.sum(w), 1e-30), codes[jnp.argmax(w)])


@jax.jit
def _sums(
    saes: tuple[SAE, SAE], xs: tuple[Array, Array], weight: Float[Array, "b"], about: tuple[About, ...]
) -> dict[str, Array]:
    """cross `[m, n]`; of each dictionary s, ss, and moved: on how many tokens a code is not that of the one token."""
    flat = [x.reshape(-1, x.shape[-1]) for x in xs]
    size = min(ROWS, len(flat[0]))
    rows = [jnp.repeat(weight, xs[0].shape[1])[:, None], *flat]
    steps = [in_chunks(jnp.pad(x, ((0, -len(x) % size), (0, 0))), size) for x in rows]

    def sums(now: list[Array]) -> dict[str, Array]:
        w, codes = now[0], [sae.encode(x) for sae, x in zip(saes, now[1:], strict=True)]
        away = [z - a.mean[None] for z, a in zip(codes, about, strict=True)]
        found = {"cross": einsum("ti,tj->ij", w * away[0], away[1])}
        for i, (z, far, a) in enumerate(zip(codes, away, about, strict=True)):
            parts = {f"s{i}": far, f"ss{i}": far**2, f"moved{i}": z != a.token[None]}
            found |= {name: jnp.sum(w * part, axis=0) for name, part in parts.items()}
        return found

    zeros = {k: jnp.zeros(v.shape, v.dtype) for k, v in jax.eval_shape(sums, [x[0] for x in steps]).items()}
    whole, _ = jax.lax.scan(lambda carry, now: ({k: carry[k] + v for k, v in sums(now).items()}, None), zeros, steps)
    return whole
