"""How well a dictionary stands in for the activations it reads: FVU, L0, and the model's loss with the
reconstruction spliced in, each as sums over groups of windows, from which intervals are drawn.

CE recovered = (CE_zero - CE_sae) / (CE_zero - CE_clean), KL recovered = (KL_zero - KL_sae) / KL_zero with
KL(clean || spliced) (SAEBench's core evaluation, zero ablation). Reconstruction and zeros replace the counted
positions; positions that statistics leave out keep their own activations.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from qsae_jax.acts.tokens import Windows, counted_rows, in_order, windows_per_forward
from qsae_jax.errors import Interrupted
from qsae_jax.lm.loss import token_losses
from qsae_jax.lm.model import LM
from qsae_jax.lm.tap import FINAL, Point, activations, resume
from qsae_jax.mesh import on_data
from qsae_jax.progress import Advance
from qsae_jax.sae.measure import fvu
from qsae_jax.sae.model import SAE
from qsae_jax.stats import GROUPS, Grouped, Interval, Sums, bootstrap, group_of, jackknife


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
    shift, seen = None, 0
    for ids, weight in in_order(windows, windows_per_forward(batch, windows, mesh)):
        tokens = on_data(ids, mesh)
        x, clean = activations(lm, (point, FINAL), tokens)
        shift = jnp.mean(counted_rows(x, skip_first).astype(jnp.float32), axis=0) if shift is None else shift
        zeros = jnp.where(skip.reshape((1, -1) + (1,) * (x.ndim - 2)) > 0, x, 0)
        spliced = {name: splice(sae, x, skip) for name, sae in dictionaries.items()}
        finals = [clean]
        for y in [zeros, *(y for y, _ in spliced.values())]:
            finals.append(jax.block_until_ready(resume(lm, point, tokens, y)))
            if stopped():
                raise Interrupted("comparison stopped; nothing is written, the same command begins it again")
        nll, kl, _ = jax.device_get(token_losses([lm] * len(finals), finals, tokens))
        shared = jax.device_get(spread(x, skip, shift)) | {"clean": nll[0].sum(1, dtype=np.float64)}
        shared |= {"zero": nll[1].sum(1, dtype=np.float64), "kl_zero": kl[1].sum(1, dtype=np.float64)}
        real = int(weight.sum())
        groups = group_of(seen + np.arange(real), len(windows))
        for i, (name, (_, own)) in enumerate(spliced.items(), start=2):
            sums = shared | jax.device_get(own) | {"spliced": nll[i].sum(1), "kl_spliced": kl[i].sum(1)}
            judged[name].add(groups, **{key: value[:real] for key, value in sums.items()})
        seen += real
        if advance:
            advance(real * windows.seq)
    return judged


def fvu_of(s: Sums) -> float:
    return fvu(s["error"], s["x"], s["xx"], s["n"])


def ce_recovered(s: Sums) -> float:
    return float((s["zero"] - s["spliced"]) / (s["zero"] - s["clean"]))


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
    "ce_recovered": ce_recovered,
    "kl_recovered": lambda s: float((s["kl_zero"] - s["kl_spliced"]) / s["kl_zero"]),
}
"""`alive` is the share of latents that fire at all on the held-out tokens, `dense` of those that fire on more than
a tenth of them."""
