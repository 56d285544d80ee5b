"""A dictionary that was carried over, adapted to the model that it came to: in closed form, from a few tokens that both
models have seen, cheapest first. Each includes the one before; the result is an ordinary dictionary.

With n the activations that the encoder reads (normalised where the dictionary normalises) at home and n' those in the
twin, on the same tokens:

    biases    the encoder reads n' + mean(n) - mean(n'); each threshold theta becomes mu' + (theta - mu) sigma' / sigma,
              mu and sigma being mean and deviation of its latent's pre-activation at home, primes there; b_dec is such
              that the mean error is 0
    gain      and each latent's decoder row is multiplied by a number, all of them by least squares of the error
    lowrank   and the encoder reads n' (I + B) + c, the decoder writes with rows D (I + C), B and C of rank r: n - n' on
              n', and n' - n on n, by reduced-rank regression (Izenman 1975, "Reduced-rank regression for the
              multivariate linear model")
    affine    and the same without a limit of rank (ridge regression)

The last two turn directions. `kept` says by how much: a dictionary whose directions are others is another dictionary,
to which labels and steering vectors of the first do not apply; the verdict does not call it adapted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.linalg import cho_factor, cho_solve, eigh

from qsae_jax.errors import UserError
from qsae_jax.hosts import here
from qsae_jax.products import einsum
from qsae_jax.sae.model import SAE, recentred, with_sparsity
from qsae_jax.sae.sparsity import Gated, JumpReLU, ReLU

CLOSED = ("biases", "gain", "lowrank", "affine")
"""The adaptations, cheapest first."""
RANK = 16
RIDGE = 1e-3
"""Of the map, in units of the median variance of a coordinate: directions that hardly vary are left alone."""
PRIOR = 32
"""Firings that a gain of 1 weighs as much as: a latent that fired twice says little of its gain."""
GAINABLE = 16_384
"""Latents up to which gains are solved for together: the system grows with their square."""
ROWS = 1024


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of what the encoder reads, and of nothing else: `[d]`, `[d, d]`, float64."""

    mean: Float[np.ndarray, "d"]
    cov: Float[np.ndarray, "d d"]

    @classmethod
    def of(cls, n: Float[np.ndarray, "n d"]) -> "Moments":
        return cls(n.mean(0), np.cov(n, rowvar=False, bias=True))

    def pre(self, sae: SAE) -> tuple[Float[np.ndarray, "m"], Float[np.ndarray, "m"]]:
        """Mean and deviation of the pre-activations of an uncentred dictionary that reads this."""
        rows = np.asarray(here(sae.encoder[...]), np.float64)
        bias = 0.0 if sae.b_enc is None else np.asarray(here(sae.b_enc[...]), np.float64)
        spread = np.sqrt(np.maximum(np.sum((rows @ self.cov) * rows, axis=1), 1e-12))
        return rows @ self.mean + bias, spread


def adapted(sae: SAE, home: Float[Array, "n d"], there: Float[Array, "n d"], rank: int = RANK) -> Mapping[str, SAE]:
    """The dictionary under each of CLOSED, from the activations of the same tokens at home and in the twin."""
    check_enough(len(home), sae.d)
    base = recentred(sae, False)
    x, y = (np.asarray(here(sae.normed(a)), np.float64) for a in (home, there))
    at_home, twin = Moments.of(x), Moments.of(y)
    reads, writes = _maps(y, x, twin, at_home, rank), _maps(x, y, at_home, twin, rank)
    goal, none = jnp.asarray(y, jnp.float32), np.zeros((sae.d, sae.d))
    shifted = _reading(base, at_home, twin, none, none)
    found = {"biases": _levelled(shifted, goal), "gain": _gained(shifted, goal)}
    for name, B, C in zip(("lowrank", "affine"), reads, writes, strict=True):
        found[name] = _gained(_reading(base, at_home, twin, B, C), goal)
    return found


def check_enough(tokens: int, d: int) -> None:
    """Refuse too few tokens for a map of d coordinates: covariances of as many have no inverse to speak of."""
    if tokens <= 2 * d:
        raise UserError(
            f"{tokens} tokens are too few to adapt a dictionary of width {d} (first positions do not count): "
            f"raise --adapt, or arms.adapt, above {2 * d}"
        )


def kept(before: SAE, after: SAE) -> float:
    """The mean cosine of decoder rows with what they were."""
    rows = [np.asarray(here(sae.W_dec[...]), np.float64) for sae in (before, after)]
    lengths = np.prod([np.linalg.norm(x, axis=1) for x in rows], axis=0)
    return float(np.mean(np.sum(rows[0] * rows[1], axis=1)[lengths > 0] / lengths[lengths > 0]))


def _maps(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n d"], of_x: Moments, of_y: Moments, rank: int
) -> tuple[Float[np.ndarray, "d d"], Float[np.ndarray, "d d"]]:
    """From x to y: B of rank r and of any rank in y - x = x B, about means, by ridge regression towards 0."""
    away = (x - of_x.mean).T @ ((y - of_y.mean) - (x - of_x.mean)) / len(x)
    ridge = RIDGE * np.median(np.diag(of_x.cov)) * np.eye(len(of_x.cov))
    full = np.linalg.solve(of_x.cov + ridge, away)
    fitted = full.T @ of_x.cov @ full
    d = len(fitted)
    _, directions = eigh(fitted, subset_by_index=[max(d - rank, 0), d - 1])
    return full @ directions @ directions.T, full


def _reading(base: SAE, home: Moments, twin: Moments, B: Float[np.ndarray, "d d"], C: Float[np.ndarray, "d d"]) -> SAE:
    """The dictionary that reads n' (I + B) + c, whose mean is that at home, with thresholds moved alike; and writes
    with rows D (I + C)."""
    rows, D = (np.asarray(here(x[...]), np.float64) for x in (base.encoder, base.W_dec))
    c = home.mean - twin.mean - twin.mean @ B
    mapped = _with(base, W_enc=(rows + rows @ B.T).T, lift=rows @ c, rows=D + D @ C)
    (mu, sigma), (mu_twin, sigma_twin) = home.pre(base), twin.pre(mapped)
    return _thresholded(mapped, mu_twin + (_thresholds(base) - mu) * sigma_twin / sigma)


def _thresholds(sae: SAE) -> Float[np.ndarray, "m"]:
    """Above which pre-activation each latent fires. TopK has no such number: 0."""
    s = sae.sparsity
    if isinstance(s, JumpReLU):
        return np.asarray(here(s.threshold[...]), np.float64)
    return -np.asarray(here(s.b_gate[...]), np.float64) if isinstance(s, Gated) else np.zeros(sae.latents)


def _thresholded(sae: SAE, at: Float[np.ndarray, "m"]) -> SAE:
    """With other thresholds, which stay at 0 or above. Where there is none but 0 (ReLU, the gate of Gated) the bias
    moves instead; TopK stays as it is."""
    s = sae.sparsity
    if isinstance(s, JumpReLU):
        own = np.asarray(here(s.threshold[...]))
        moved = np.where(np.isfinite(own), np.maximum(at, 0), np.inf)  # infinity never fires, and stays
        return with_sparsity(sae, JumpReLU(jnp.asarray(moved, jnp.float32), s.bandwidth))
    if isinstance(s, Gated):
        return with_sparsity(sae, Gated(jnp.asarray(-at, jnp.float32), s.b_mag[...], s.r_mag[...]))
    return _with(sae, lift=-at) if isinstance(s, ReLU) else sae


def _with(
    sae: SAE,
    W_enc: Float[np.ndarray, "d m"] | None = None,
    lift: Float[np.ndarray, "m"] | float = 0.0,
    rows: Float[np.ndarray, "m d"] | None = None,
    b_dec: Float[np.ndarray, "d"] | None = None,
) -> SAE:
    """An uncentred dictionary with other weights, and with pre-activations lifted by a constant."""
    up = jnp.broadcast_to(jnp.asarray(lift, jnp.float32), (sae.latents,))
    sparsity, b_enc = sae.sparsity, None if sae.b_enc is None else sae.b_enc[...] + up
    if isinstance(sparsity, Gated):
        r_mag = sparsity.r_mag[...]
        sparsity = Gated(sparsity.b_gate[...] + up, sparsity.b_mag[...] + up * jnp.exp(r_mag), r_mag)
    taken = [old if new is None else jnp.asarray(new, jnp.float32)
             for old, new in ((sae.W_enc, W_enc), (sae.W_dec[...], rows), (sae.b_dec[...], b_dec))]  # fmt: skip
    return SAE(sparsity, taken[0], b_enc, taken[1], taken[2], centred=False, norm=sae.norm)


@partial(jax.jit, static_argnames="gram")
def _code_sums(sae: SAE, n: Float[Array, "r d"], gram: bool) -> dict[str, Array]:
    """Over rows of what the encoder reads: sums of codes, of errors (b_dec aside), and of their products."""
    bare = with_sparsity(sae, sae.sparsity)
    bare.norm = None  # n is normalised already
    z = bare.encode(n)
    error = n - einsum("rm,md->rd", z, sae.W_dec[...])
    sums = {"z": jnp.sum(z, axis=0), "error": jnp.sum(error, axis=0), "fired": jnp.sum(z > 0, axis=0)}
    if gram:
        sums |= {"ze": einsum("rm,rd->md", z, error), "zz": einsum("rm,rn->mn", z, z)}
    return sums


def _all(sae: SAE, n: Float[Array, "n d"], gram: bool) -> dict[str, np.ndarray]:
    parts = [_code_sums(sae, n[i : i + ROWS], gram) for i in range(0, len(n), ROWS)]
    total = parts[0]
    for part in parts[1:]:
        total = jax.tree.map(jnp.add, total, part)
    return {key: np.asarray(value, np.float64) for key, value in here(total).items()}


def _levelled(sae: SAE, n: Float[Array, "n d"]) -> SAE:
    """b_dec such that the mean error is 0."""
    return _with(sae, b_dec=_all(sae, n, gram=False)["error"] / len(n))


def _gained(sae: SAE, n: Float[Array, "n d"]) -> SAE:
    """Decoder rows times gains, and b_dec, by least squares of the error with a prior at 1: the normal equations over
    latents that fire are (Zc^T Zc * D D^T + P) (gain - 1) = rows of (Zc^T E . D), Zc the codes about their means."""
    if sae.latents > GAINABLE:
        return _levelled(sae, n)
    sums = _all(sae, n, gram=True)
    fired = np.flatnonzero(sums["fired"] > 0)
    rows = np.asarray(here(sae.W_dec[...]), np.float64)
    D, z, count = rows[fired], sums["z"][fired] / len(n), sums["fired"][fired]
    error = sums["error"] / len(n)
    power = np.diag(sums["zz"])[fired] * np.sum(D**2, axis=1)
    system = (sums["zz"][np.ix_(fired, fired)] - len(n) * np.outer(z, z)) * (D @ D.T)
    system[np.diag_indices(len(fired))] += PRIOR * power / count + 1e-12
    right = np.sum((sums["ze"][fired] - len(n) * np.outer(z, error)) * D, axis=1)
    more = cho_solve(cho_factor(system, overwrite_a=True, check_finite=False), right)
    gains = np.ones(sae.latents)
    gains[fired] += more
    return _with(sae, rows=rows * gains[:, None], b_dec=error - (more * z) @ D)


def rows_like(sae: SAE, key: Array) -> SAE:
    """A random dictionary: directions drawn anew, encoder and decoder alike; lengths, biases and codes as they were."""
    rows = jax.random.normal(key, sae.W_dec.shape)
    rows = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
    lengths = [jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (sae.encoder[...], sae.W_dec[...])]
    return SAE(sae.sparsity, (rows * lengths[0]).T, None if sae.b_enc is None else sae.b_enc[...],
               rows * lengths[1], sae.b_dec[...], sae.centred, norm=sae.norm)  # fmt: skip


def nonsense(sae: SAE, home: Float[Array, "n d"], seed: int = 0) -> SAE:
    """A random dictionary of the same kind whose latents fire as often on these activations: each threshold is the
    quantile of its pre-activations that leaves the dictionary's own rate above it."""
    drawn = recentred(rows_like(sae, jax.random.key(seed)), False)
    rates = np.mean([np.asarray(here(sae.encode(home[i : i + ROWS])) > 0).mean(0) for i in _whole(home)], axis=0)
    pre = np.concatenate([np.asarray(here(drawn.pre(home[i : i + ROWS]))) for i in _whole(home)])
    at = np.array([np.quantile(column, 1 - rate) for column, rate in zip(pre.T, rates, strict=True)])
    return _thresholded(drawn, at)


def _whole(rows: Array) -> range:
    """Where whole chunks begin; all rows are one where there are fewer."""
    return range(0, max(len(rows) - ROWS, 0) + 1, ROWS)
