"""Does a feature still act? Survival in writing beside survival in reading.

r of an audit says whether a feature is still *read*: whether its value follows that of full precision. Whether it still
*does* the same is another question, because the layers after the point are quantized too. So the feature is changed in
both models, and what that does to the next-token logits is compared. With d_i its decoder row in the units of the
activations and z_i(x) its value, at counted positions

    ablate    x' = x - z_i(x) d_i     where it fires, each model with its own x and z
              (Bricken et al. 2023, "Towards Monosemanticity", feature ablations)
    steer     x' = x + c d_i          everywhere, one vector for both models; c is the mean of z_i over the counted
              tokens on which it fires at full precision (Turner et al. 2023, arXiv 2308.10248; Templeton et al. 2024)

The other latents and what the dictionary does not explain stay as they are: d_i z_i is decode(codes) less decode(codes
without i). A dictionary that normalises writes each token at that token's scale; what is steered by has full
precision's in both models. The effect is the change of the logits, centred over the vocabulary because a constant added
to all logits does nothing:

    D = logits(x') - logits(x) - their mean over words      at every predicted position
    r        Pearson's r of D and the twin's D' over (token, word). Both are centred, so it is also the cosine of the
             two effects as wholes: tokens on which the feature does much count for much
    cosine   mean over tokens of the cosine of D and D': every token that full precision's change reaches counts alike
    size     |D'| / |D|, norms over all tokens and words
    kl_fp, kl_twin    mean KL(p || p') of the next-token distributions, in nats, in each model: how much it moves

measured on the few windows in which the feature fires most strongly at full precision, the same in both models.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int
from scipy.stats import rankdata

from qsae_jax.acts.tokens import Windows, windows_per_forward
from qsae_jax.audit.contexts import Best, checked, chunked, followed, values, waited
from qsae_jax.hosts import here
from qsae_jax.lm.model import LM
from qsae_jax.lm.tap import Point, activations, resume
from qsae_jax.mesh import from_chunks, on_data
from qsae_jax.progress import Advance
from qsae_jax.sae.model import SAE
from qsae_jax.stats import Totals, pearson

CHANGES = ("ablate", "steer")
MEASURES = ("r", "cosine", "size", "kl_fp", "kl_twin")


class Runs(NamedTuple):
    """One model's activations, at the point or at the end: as they are, without the feature, with more of it."""

    clean: Float[Array, "b s d"]
    ablate: Float[Array, "b s d"]
    steer: Float[Array, "b s d"]


class Effect(NamedTuple):
    """What a change does to the next-token logits, for each predicted position: |D|^2, |D'|^2, D . D', and how far
    the distribution moves in each model."""

    xx: Float32[Array, "b p"]
    yy: Float32[Array, "b p"]
    xy: Float32[Array, "b p"]
    kl_fp: Float32[Array, "b p"]
    kl_twin: Float32[Array, "b p"]


def act(
    lm: LM,
    twin: LM,
    sae: SAE,
    windows: Windows,
    point: str | Point,
    features: Sequence[int],
    *,
    mesh: Mesh,
    per_feature: int = 2,
    skip_first: int = 1,
    batch: int = 0,
    stopped: Callable[[], bool] = lambda: False,
    advance: Advance | None = None,
) -> list[dict[str, Any]]:
    """A row for each feature: `feature`, `tokens` (predicted positions that were looked at), and for `ablate` and
    `steer` what the module says, all None where full precision shows no effect; `steer` also says the `by` it added.

    `advance` is told of the tokens of `windows`, then of `windows.seq` for each feature and window."""
    point = checked(lm, sae, windows, point, features, skip_first)
    best: Best[int] = Best(per_feature, len(features))
    firing = Totals({"s": np.zeros(len(features)), "n": np.zeros(len(features))})
    for first, _, (z,) in followed([lm], sae, windows, point, features, batch, mesh, stopped, advance):
        counted = z[:, skip_first:]
        best.add(counted.max(axis=1), lambda w, _, first=first: first + w)
        firing.add(s=counted.sum((0, 1), dtype=np.float64), n=(counted > 0).sum((0, 1)))
    by = firing["s"] / np.maximum(firing["n"], 1)
    pairs = [(i, window) for i, kept in enumerate(best.kept) for _, window in kept]
    size, devices = windows_per_forward(batch, windows, mesh), mesh.shape["data"]
    size = min(size, -(-len(pairs) // devices) * devices)
    found = [{name: Totals() for name in CHANGES} for _ in features]
    for start in range(0, len(pairs), max(size, 1)):
        some = pairs[start : start + size]
        i, at = np.array(some + some[:1] * (size - len(some))).T
        chosen = np.asarray(features, np.int32)[i], by[i].astype(np.float32)
        sums = _changed(lm, twin, sae, windows.ids[at], point, *chosen, mesh, skip_first, stopped)
        for j, (place, _) in enumerate(some):
            for name in CHANGES:
                found[place][name].add(**{key: value[j] for key, value in sums[name].items()})
        if advance:
            advance(len(some) * windows.seq)
    return [_row(int(feature), totals, float(c)) for feature, totals, c in zip(features, found, by, strict=True)]


def _changed(
    lm: LM,
    twin: LM,
    sae: SAE,
    ids: Int[np.ndarray, "b s"],
    point: Point,
    features: Int[np.ndarray, "b"],
    by: Float[np.ndarray, "b"],
    mesh: Mesh,
    skip_first: int,
    stopped: Callable[[], bool],
) -> dict[str, dict[str, Float[np.ndarray, "b"]]]:
    """For each change the sums of each window, in which one feature is changed."""
    tokens, lms = on_data(ids, mesh), (lm, twin)
    counted = (np.arange(ids.shape[1]) >= skip_first).astype(np.float32)
    xs = [waited(activations(one, (point,), tokens), stopped)[0] for one in lms]
    edited, z = edits(sae, xs, features, by, counted)
    # The unchanged activations go on through the same program as the others: where a change does not reach, it must
    # do nothing, and two programs need not round alike.
    finals = [
        Runs(*(waited(resume(one, point, tokens, x), stopped) for x in run))
        for one, run in zip(lms, edited, strict=True)
    ]
    effects, z = here((compared(lms, finals), z))
    reached = {"ablate": np.cumsum(z > 0, axis=1) > 0, "steer": np.broadcast_to(counted > 0, z.shape)}
    return {name: _sums(effects[name], reached[name][:, :-1]) for name in CHANGES}


def _sums(effect: Effect, reached: np.ndarray) -> dict[str, Float[np.ndarray, "b"]]:
    each = {name: np.asarray(value, np.float64) for name, value in effect._asdict().items()}
    reached = reached & (each["xx"] > 0)
    norms = np.sqrt(each["xx"] * each["yy"])
    each["cosine"] = np.where(reached & (norms > 0), each["xy"] / np.where(norms > 0, norms, 1), 0)
    each |= {"reached": reached, "n": np.ones_like(norms)}
    return {name: value.sum(axis=1, dtype=np.float64) for name, value in each.items()}


@jax.jit
def edits(
    sae: SAE,
    xs: Sequence[Float[Array, "b s ..."]],
    features: Int[Array, "b"],
    by: Float[Array, "b"],
    counted: Float[Array, "s"],
) -> tuple[list[Runs], Float32[Array, "b s"]]:
    """Both models' activations with one feature of each window changed, and what it is worth at counted positions in
    the first of them."""
    flat = [x.reshape(*x.shape[:2], -1).astype(jnp.float32) for x in xs]
    zs = [values(sae, x, features[:, None])[..., 0] * counted[None] for x in flat]
    more = written(sae, flat[0], by[:, None] * counted[None], features)
    return [Runs(x, x - written(sae, x, z, features), x + more) for x, z in zip(flat, zs, strict=True)], zs[0]


def written(
    sae: SAE, x: Float[Array, "b s d"], z: Float[Array, "b s"], features: Int[Array, "b"]
) -> Float[Array, "b s d"]:
    """What a feature of each window with values z adds to the reconstruction of x: decode(z e_i, x) - decode(0, x)."""
    rows = z[..., None] * sae.W_dec[...][features][:, None]
    return rows * sae.norm(x).scale if sae.norm else rows


@jax.jit
def compared(lms: Sequence[LM], finals: Sequence[Runs]) -> dict[str, Effect]:
    """The effects in two models of each change, from their activations at `final`."""
    b, s, d = finals[0].clean.shape
    n = b * (s - 1)

    def one(runs: Sequence[Runs]) -> dict[str, Effect]:
        logits = [Runs(*map(lm.unembed, run)) for lm, run in zip(lms, runs, strict=True)]
        return {name: _effect([(run.clean, getattr(run, name)) for run in logits]) for name in CHANGES}

    rows = jax.tree.map(lambda x: x[:, :-1].reshape(n, d), list(finals))
    found = jax.lax.map(one, chunked(rows))
    return jax.tree.map(lambda x: from_chunks(x)[:n].reshape(b, s - 1), found)


def _effect(logits: Sequence[tuple[Array, Array]]) -> Effect:
    changes = [new - old for old, new in logits]
    changes = [change - jnp.mean(change, axis=-1, keepdims=True) for change in changes]
    x, y = changes
    kl = [divergence(old, change) for (old, _), change in zip(logits, changes, strict=True)]
    return Effect(*(jnp.sum(product, axis=-1) for product in (x * x, y * y, x * y)), *kl)


def divergence(logits: Float32[Array, "n vocab"], change: Float32[Array, "n vocab"]) -> Float32[Array, "n"]:
    """KL(p || p') of distributions whose logits differ by `change`: log sum p exp(u), u = change - sum p change.

    A small one is the sum of p (e^u - 1) to first order, which keeps the digits that a difference of two normalisers
    of size 10 would lose: 1e-6 of them, where a feature may move the distribution by 1e-5."""
    p = jax.nn.softmax(logits, axis=-1)
    u = change - jnp.sum(p * change, axis=-1, keepdims=True)
    small = jnp.log1p(jnp.sum(p * jnp.expm1(jnp.clip(u, -1, 1)), axis=-1))
    large = jax.nn.logsumexp(jax.nn.log_softmax(logits, axis=-1) + u, axis=-1)
    return jnp.where(jnp.max(jnp.abs(u), axis=-1) < 1, small, large)


def _row(feature: int, totals: dict[str, Totals], by: float) -> dict[str, Any]:
    told = {name: _measures(t.sums) for name, t in totals.items()}
    told["steer"]["by"] = by if by > 0 else None
    return {"feature": feature, "tokens": int(totals["steer"].sums.get("n", 0)), **told}


def _measures(s: dict[str, np.ndarray]) -> dict[str, float | None]:
    """All None where full precision shows no effect; a twin that shows none beside it has r 0."""
    if not s or not s["xx"] > 0:
        return dict.fromkeys(MEASURES)
    zero = np.zeros(())
    r = float(np.nan_to_num(pearson(float(s["n"]), zero, zero, s["xx"], s["yy"], s["xy"])))
    cosine, size = float(s["cosine"] / max(s["reached"], 1)), float(np.sqrt(s["yy"] / s["xx"]))
    kl_fp, kl_twin = (float(s[name] / s["n"]) for name in ("kl_fp", "kl_twin"))
    return {"r": r, "cosine": cosine, "size": size, "kl_fp": kl_fp, "kl_twin": kl_twin}


def summary(rows: Sequence[dict[str, Any]], r: Float[np.ndarray, "m"]) -> dict[str, dict[str, float | None]]:
    """For each change, over the features with an effect: how many (`n`), the rank correlation (`spearman`) of r in
    reading (`r`, of every latent as an audit has it) with r in writing, and the medians of r in writing and of size."""
    told = {}
    for name in CHANGES:
        some = [row for row in rows if row[name]["r"] is not None and np.isfinite(r[row["feature"]])]
        wrote = np.array([row[name]["r"] for row in some])
        told[name] = {"n": len(some), "spearman": _spearman(np.array([r[row["feature"]] for row in some]), wrote)}
        told[name] |= {"median_r": float(np.median(wrote)) if some else None}
        told[name] |= {"median_size": float(np.median([row[name]["size"] for row in some])) if some else None}
    return told


def _spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's r of the ranks; None for fewer than three features, or where all are equal."""
    if len(x) < 3:
        return None
    a, b = (rankdata(v) - (len(v) + 1) / 2 for v in (x, y))
    r = float(pearson(len(a), a.sum(), b.sum(), (a * a).sum(), (b * b).sum(), (a * b).sum()))
    return r if np.isfinite(r) else None
