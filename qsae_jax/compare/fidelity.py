"""How well a dictionary stands in for the activations it reads: FVU, L0, and the model's loss with the
reconstruction spliced in, each as sums over groups of windows, from which intervals are drawn.

CE recovered = (CE_zero - CE_sae) / (CE_zero - CE_clean), KL recovered = (KL_zero - KL_sae) / KL_zero with
KL(clean || spliced) (SAEBench's core evaluation, zero ablation); `_mean` is the same with each position's activation
replaced by the mean of the counted ones, a milder ablation and so a lower score. Reconstruction, zeros and mean replace
the counted positions; positions that statistics leave out keep their own activations. `loss` is what the model is left
with: nats per predicted token with the reconstruction in place.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from qsae_jax.acts.tokens import Windows, counted_rows, in_order, windows_per_forward
from qsae_jax.errors import Interrupted
from qsae_jax.hosts import here
from qsae_jax.lm.loss import token_losses
from qsae_jax.lm.model import LM
from qsae_jax.lm.tap import FINAL, Point, activations, resume
from qsae_jax.mesh import on_data
from qsae_jax.progress import Advance
from qsae_jax.sae.model import SAE
from qsae_jax.stats import GROUPS, Grouped, Interval, Sums, bootstrap, group_of, jackknife

AT_ONCE = 8
"""Reconstructions whose logits exist together."""


@jax.jit
def splice(sae: SAE, x: Float[Array, "b s d"], skip: Float[Array, "s"]) -> tuple[Array, dict[str, Array]]:
    """The activations with the reconstruction at counted positions (`skip` 0), and each window's sums."""
    kept = skip.reshape((1, -1) + (1,) * (x.ndim - 2))
    flat = x.reshape(*x.shape[:2], -1).astype(jnp.float32)
    codes = sae.encode(flat)
    xhat = sae.decode(codes, flat)
    w = 1 - skip[None, :]
    sums = {
        "error": jnp.sum(w * jnp.sum((flat - xhat) ** 2, axis=-1), axis=1),
        "active": jnp.sum(w * jnp.sum(codes > 0, axis=-1), axis=1),
        "fired": jnp.sum(w[..., None] * (codes > 0), axis=1),
    }
    return jnp.where(kept > 0, x, xhat.reshape(x.shape).astype(x.dtype)), sums


@jax.jit
def spread(x: Float[Array, "b s d"], skip: Float[Array, "s"], shift: Float[Array, "d"]) -> dict[str, Array]:
    """Each window's sums that the variance is made of, about a shift near the mean."""
    w = (1 - skip)[None, :]
    away = x.reshape(*x.shape[:2], -1).astype(jnp.float32) - shift[None, None]
    return {
        "x": jnp.sum(away * w[..., None], axis=1),
        "xx": jnp.sum(w * jnp.sum(away**2, axis=-1), axis=1),
        "n": jnp.broadcast_to(jnp.sum(w), (x.shape[0],)),
    }


def mean_of(
    lm: LM, windows: Windows, point: Point, mesh: Mesh, skip_first: int = 1, batch: int = 0
) -> Float[Array, "*d"]:
    """The mean activation of the counted positions, of the shape that a token has."""
    total, n = 0.0, 0
    for ids, weight in in_order(windows, windows_per_forward(batch, windows, mesh)):
        (x,) = activations(lm, (point,), on_data(ids, mesh))
        total += np.asarray(here(_summed(x, jnp.asarray(weight, jnp.float32), skip_first)), np.float64)
        n += int(weight.sum()) * (windows.seq - skip_first)
    return jnp.asarray(total / n, jnp.float32)


@partial(jax.jit, static_argnames="skip_first")
def _summed(x: Float[Array, "b s *d"], weight: Float[Array, "b"], skip_first: int) -> Float[Array, "*d"]:
    w = weight.reshape((-1,) + (1,) * (x.ndim - 1))
    return jnp.sum(jnp.sum(w * x[:, skip_first:].astype(jnp.float32), axis=1), axis=0)


def judge(
    lm: LM,
    dictionaries: Mapping[str, SAE],
    windows: Windows,
    point: Point,
    mesh: Mesh,
    *,
    skip_first: int = 1,
    batch: int = 0,
    advance: Advance | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Grouped]:
    """Every dictionary on one model's activations, and spliced back into it, in one pass over the windows."""
    judged = {name: Grouped(min(GROUPS, len(windows))) for name in dictionaries}
    skip = jnp.asarray(np.arange(windows.seq) < skip_first, jnp.float32)
    mean = mean_of(lm, windows, point, mesh, skip_first, batch)
    seen = 0
    for ids, weight in in_order(windows, windows_per_forward(batch, windows, mesh)):
        tokens = on_data(ids, mesh)
        x, clean = activations(lm, (point, FINAL), tokens)
        kept = skip.reshape((1, -1) + (1,) * (x.ndim - 2)) > 0
        own: dict[str, dict[str, Array]] = {"zero": {}, "mean": {}}
        finals: dict[str, Array] = {}
        for name in [*own, *dictionaries]:
            if name in dictionaries:
                y, own[name] = splice(dictionaries[name], x, skip)
            else:
                y = jnp.where(kept, x, 0.0 if name == "zero" else mean[None, None].astype(x.dtype))
            finals[name] = jax.block_until_ready(resume(lm, point, tokens, y))
            if stopped():
                raise Interrupted("comparison stopped; nothing is written, the same command begins it again")
        losses = _losses(lm, clean, finals, tokens)
        shared = here(spread(x, skip, mean.reshape(-1))) | {"clean": losses["clean"][0]}
        shared |= {"predicted": np.full(len(ids), windows.seq - 1.0)}
        for name in ("zero", "mean"):
            shared |= {name: losses[name][0], f"kl_{name}": losses[name][1]}
        real = int(weight.sum())
        groups = group_of(seen + np.arange(real), len(windows))
        for name in dictionaries:
            sums = shared | here(own[name])
            sums |= {"spliced": losses[name][0], "kl_spliced": losses[name][1]}
            judged[name].add(groups, **{key: value[:real] for key, value in sums.items()})
        seen += real
        if advance:
            advance(real * windows.seq)
    return {name: about_mean(got) for name, got in judged.items()}


def about_mean(judged: Grouped) -> Grouped:
    """The sums `x` and `xx` of groups, about the mean of all tokens: a resample's variance is then taken about that
    mean too. About its own it is smaller by what groups differ in their means (a seventh of that, of 8 groups), and
    the interval of FVU would lie above its value."""
    s = judged.sums
    away = s["x"].sum(0) / s["n"].sum()
    moved = {"x": s["x"] - s["n"][:, None] * away, "xx": s["xx"] - 2 * s["x"] @ away + s["n"] * (away @ away)}
    return Grouped(judged.groups, s | moved)


def _losses(
    lm: LM, clean: Array, finals: Mapping[str, Array], tokens: Array
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Loss and KL(clean, it) of each window, summed over tokens; AT_ONCE at a time, whose logits exist together."""
    names, found = list(finals), {}
    for start in range(0, len(names), AT_ONCE):
        some = names[start : start + AT_ONCE]
        nll, kl, _ = here(token_losses([lm] * (1 + len(some)), [clean, *(finals[name] for name in some)], tokens))
        for name, *both in zip(["clean", *some], nll, kl, strict=True):
            found[name] = tuple(one.sum(1, dtype=np.float64) for one in both)
    return found


def reconstruct(
    lm: LM,
    dictionaries: Mapping[str, SAE],
    windows: Windows,
    point: Point,
    mesh: Mesh,
    *,
    skip_first: int = 1,
    batch: int = 0,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Grouped]:
    """What FVU and L0 are made of alone: the model runs up to the point only."""
    judged = {name: Grouped(min(GROUPS, len(windows))) for name in dictionaries}
    skip = jnp.asarray(np.arange(windows.seq) < skip_first, jnp.float32)
    shift, seen = None, 0
    for ids, weight in in_order(windows, windows_per_forward(batch, windows, mesh)):
        (x,) = activations(lm, (point,), on_data(ids, mesh))
        shift = jnp.mean(counted_rows(x, skip_first).astype(jnp.float32), axis=0) if shift is None else shift
        shared = here(spread(x, skip, shift))
        real = int(weight.sum())
        groups = group_of(seen + np.arange(real), len(windows))
        for name, sae in dictionaries.items():
            sums = shared | here(splice(sae, x, skip)[1])
            judged[name].add(groups, **{key: value[:real] for key, value in sums.items()})
            if stopped():
                raise Interrupted("comparison stopped; nothing is written, the same command begins it again")
        seen += real
    return {name: about_mean(got) for name, got in judged.items()}


def fvu_of(s: Sums) -> float:
    """Of sums about the mean (`about_mean`)."""
    return float(s["error"] / s["xx"])


def ce_recovered(s: Sums, ablation: str = "zero") -> float:
    return float((s[ablation] - s["spliced"]) / (s[ablation] - s["clean"]))


def kl_recovered(s: Sums, ablation: str = "zero") -> float:
    return float((s[f"kl_{ablation}"] - s["kl_spliced"]) / s[f"kl_{ablation}"])


def loss(s: Sums) -> float:
    return float(s["spliced"] / s["predicted"])


def added_loss(s: Sums) -> float:
    """What the reconstruction costs the model, nats per token."""
    return float((s["spliced"] - s["clean"]) / s["predicted"])


def intervals(s: Sums) -> dict[str, Interval]:
    """Every measure with its interval, from sums by groups of windows."""
    counted = {"alive": MEASURES["alive"]}
    others = {name: measure for name, measure in MEASURES.items() if name not in counted}
    found = bootstrap(others, s) | jackknife(counted, s)
    share = found["alive"]
    found["alive"] = Interval(share.value, max(share.low, 0.0), min(share.high, 1.0))
    return {name: found[name] for name in MEASURES}


MEASURES = {
    "fvu": fvu_of,
    "l0": lambda s: float(s["active"] / s["n"]),
    "alive": lambda s: float((s["fired"] > 0).mean()),
    "dense": lambda s: float((s["fired"] > 0.1 * s["n"]).mean()),
    "loss": loss,
    "ce_recovered": ce_recovered,
    "kl_recovered": kl_recovered,
    "ce_recovered_mean": lambda s: ce_recovered(s, "mean"),
    "kl_recovered_mean": lambda s: kl_recovered(s, "mean"),
}
"""`alive` is the share of latents that fire at all on the held-out tokens, `dense` of those that fire on more than
a tenth of them."""
