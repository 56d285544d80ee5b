"""The sums that an audit of features is made of: one pass over a batch of windows, on the devices.

For each run (the first is full precision) with activations x, pre-activations p and codes z of every latent:

    s, ss, fired, peak    sum z, sum z^2, tokens on which it fires, largest value
    p, pp                 sum p, sum p^2
    cross, pcross, both   sum z0 z, sum p0 p, tokens on which it fires in both runs       (twins only)
    reads, read           sum n `[d]`, sum z0 n `[m, d]`: how what the encoder reads, n, moves with a feature's
                          full-precision value (n is x, normalised if the dictionary normalises)
    changed, power        sum |x - x0|^2, sum |x0|^2                                      (twins only)
    error, x, xx, active, n    what FVU and L0 are made of (sae/measure.py)

z, p and x are taken about shifts near their means, so that nothing cancels in float32. Sums over 16 positions, then
over a window; the caller adds windows up in float64. `s`, `ss` and `cross` are kept by group of windows, for intervals.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from qsae_jax.products import einsum
from qsae_jax.sae.measure import reconstruction_sums
from qsae_jax.sae.model import SAE

ROWS = 128
"""Rows whose codes `[rows, m]` are alive at a time: they stay in a CPU's cache and bound the memory of a device."""
POSITIONS = 16
"""But at least so many positions of each window, over which a sum is taken before it is carried on."""
BY_GROUP = ("s", "ss", "cross")
Sums = dict[str, Array]


class Shifts(NamedTuple):
    """Near the means of the full-precision run: activations and what the encoder reads of them `[d]`, codes and
    pre-activations `[m]`."""

    x: Float[Array, "d"]
    n: Float[Array, "d"]
    z: Float[Array, "m"]
    p: Float[Array, "m"]


@jax.jit
def first_means(sae: SAE, x: Float[Array, "b p d"], weight: Float[Array, "b"]) -> Shifts:
    """The means of the first positions of a batch, about which later sums are taken."""
    x = x[:, : max(ROWS // len(x), 1)].astype(jnp.float32)
    w = jnp.broadcast_to(weight[:, None, None], (*x.shape[:2], 1))
    return Shifts(*(jnp.sum(y * w, axis=(0, 1)) / jnp.sum(w) for y in (x, sae.normed(x), sae.encode(x), sae.pre(x))))


@partial(jax.jit, static_argnames="span")
def batch_sums(
    sae: SAE,
    acts: Sequence[Float[Array, "b p d"]],
    weight: Float[Array, "b"],
    local: Int[Array, "b"],
    shifts: Shifts,
    span: int,
) -> tuple[list[dict[str, Float32[Array, "..."]]], list[dict[str, Float32[Array, "span m"]]]]:
    """The sums of a batch for each run, and those by group: window i belongs to group `local[i]` of `span`.

    A window of weight 0 counts for nothing. Every window goes through the loop beside the others, so that all devices
    of a mesh have the same work."""
    b, p = acts[0].shape[:2]
    size = min(max(POSITIONS, ROWS // b), p)
    w = jnp.broadcast_to(weight[:, None], (b, p)).astype(jnp.float32)
    steps = [_steps(x.astype(jnp.float32), size) for x in (w, *acts)]

    def step(carry: list[Sums], now: list[Array]) -> tuple[list[Sums], None]:
        found = _step_sums(sae, now[1:], now[0], shifts)
        return [
            {k: jnp.maximum(one[k], v) if k == "peak" else one[k] + v for k, v in new.items()}
            for one, new in zip(carry, found, strict=True)
        ], None

    shape = jax.eval_shape(lambda steps: _step_sums(sae, [x[0] for x in steps[1:]], steps[0][0], shifts), steps)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
    whole, _ = jax.lax.scan(step, zeros, steps)
    grouped = [
        {k: jax.ops.segment_sum(run[k], local, num_segments=span) for k in BY_GROUP if k in run} for run in whole
    ]
    return [{k: v for k, v in run.items() if k not in BY_GROUP} for run in whole], grouped


def _steps(x: Float[Array, "b p *d"], size: int) -> Float[Array, "steps b size *d"]:
    """Positions in equal parts, the last filled up with zeros (of weight 0)."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(len(x), -1, size, *x.shape[2:]), 1, 0)


def _step_sums(sae: SAE, runs: Sequence[Array], weight: Array, shifts: Shifts) -> list[Sums]:
    found: list[Sums] = []
    w = weight[..., None]
    pres = [sae.pre(x) for x in runs]
    codes = [sae.sparsity(p) for p in pres]
    away = [z - shifts.z[None, None] for z in codes]
    moved = [p - shifts.p[None, None] for p in pres]
    for i, (x, z) in enumerate(zip(runs, codes, strict=True)):
        sums = {"fired": w * (z > 0), "p": w * moved[i], "pp": w * moved[i] ** 2}
        own = {"s": jnp.sum(w * away[i], axis=1), "ss": jnp.sum(w * away[i] ** 2, axis=1)}
        if i:
            own["cross"] = jnp.sum(w * away[0] * away[i], axis=1)
            sums |= {"pcross": w * moved[0] * moved[i], "both": w * ((z > 0) & (codes[0] > 0))}
            own |= {"changed": jnp.sum(w * (x - runs[0]) ** 2), "power": jnp.sum(w * runs[0] ** 2)}
        own |= {name: jnp.sum(y, axis=(0, 1)) for name, y in sums.items()}
        read = w * (sae.normed(x) - shifts.n[None, None])
        own |= {"reads": jnp.sum(read, axis=(0, 1)), "read": einsum("bpm,bpd->md", codes[0], read)}
        rows, flat = x.reshape(-1, x.shape[-1]), z.reshape(-1, z.shape[-1])
        own |= reconstruction_sums(sae, rows, flat, weight.reshape(-1), shifts.x)
        found.append(own | {"peak": jnp.max(w * z, axis=(0, 1))})
    return found
