"""Training: one donated, jitted step, and a state that can be kept and resumed.

Activations are divided by a scale that is found once and folded into the dictionary when it leaves (`finished`), which
is exact because the map is homogeneous. Dead latents are counted in tokens. BatchTopK leaves as a JumpReLU whose
threshold is a running mean of the smallest codes that the batches kept, in float32, begun at the first of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from qsae_jax.errors import UserError
from qsae_jax.mesh import born, kept, place
from qsae_jax.sae.levels import levels_for
from qsae_jax.sae.model import SAE, folded_norms, init_sae, recentred, unscaled, with_sparsity
from qsae_jax.sae.objective import Now, Seen, gradients
from qsae_jax.sae.optimize import averaged, exponent, moved, optimizer, sparsity_rise, unit_decoder
from qsae_jax.sae.resample import resampled
from qsae_jax.sae.scale import geometric_median, scale_of, scaled
from qsae_jax.sae.settings import SAEConfig
from qsae_jax.sae.sparsity import BatchTopK, Gated, JumpReLU, ReLU, Sparsity, TopK, across

LONG = 2**30
"""Tokens beyond which a silent latent is not counted on: an int32 would wrap."""
CUT_DECAY = 0.99
"""Of the running means of thresholds: a hundred steps, as long as the end of a short training."""


class TrainState(NamedTuple):
    """All that changes in training. Kept whole in a checkpoint."""

    sae: SAE
    opt: optax.OptState
    silent: Int[Array, "m"]
    """Tokens since each latent last fired."""
    step: Int[Array, ""]
    scale: Float[Array, "..."]
    """What activations that are read are divided by: a number, or one for each coordinate (crosscoder)."""
    scale_out: Float[Array, "..."]
    """And those that are reconstructed."""
    longest: Float[Array, ""]
    """The norm beyond which an activation is left out."""
    cut: Float[Array, ""]
    """The running threshold of BatchTopK; below 0 before the first batch."""
    cuts: Float[Array, "m"]
    """The same of each latent's own smallest kept code."""
    weight: Float[Array, ""]
    """What the penalty of p-annealing is multiplied by."""
    seed: Int[Array, ""]
    average: SAE | None
    """The running average of weights, if one is kept."""


class Metrics(NamedTuple):
    """Of one batch, in the scale of normalised activations."""

    loss: Array
    fvu: Array
    l0: Array
    dead: Array
    """Share of latents that are dead."""
    parts: dict[str, Array]
    """The terms of the loss, before their coefficients."""


Step = Callable[..., tuple[TrainState, Metrics]]


def make_sparsity(config: SAEConfig, latents: int, mesh: Mesh | None = None) -> Sparsity:
    """The sparsity of training, at its start."""
    zeros = jnp.zeros(latents)
    kinds: dict[str, Callable[[], Sparsity]] = {
        "topk": lambda: TopK(int(config.k_most)),
        "batchtopk": lambda: BatchTopK(config.k_most),
        "matryoshka": lambda: BatchTopK(config.k_most),
        "jumprelu": lambda: JumpReLU(zeros + config.threshold, config.bandwidth),
        "gated": lambda: Gated(zeros, zeros, zeros),
        "relu": ReLU,
        "p_anneal": ReLU,
    }
    sparsity = kinds[config.sparsity]()
    return across(sparsity, latents, mesh) if mesh else sparsity


def start(
    config: SAEConfig,
    first: Sequence[Float[Array, "n d"]],
    latents: int,
    steps: int,
    seed: int,
    mesh: Mesh,
    target: Sequence[Float[Array, "n d"]] | None = None,
    initial: SAE | None = None,
) -> TrainState:
    """The state before the first step. Scale and centre come from first activations, of each twin that the dictionary
    reads side by side; `target`, of a transcoder, from those that it reconstructs. `initial` is gone on from."""
    x = jnp.concatenate(first, axis=-1).astype(jnp.float32)
    y = x if target is None else jnp.concatenate(target, axis=-1).astype(jnp.float32)
    scale = scale_of(config, first)
    scale_out = scale if target is None else scale_of(config, target)
    longest = config.max_norm * jnp.median(jnp.linalg.norm(scaled(x, scale), axis=-1))
    centres = {"geometric_median": geometric_median, "mean": partial(jnp.mean, axis=0)}
    centre = centres[config.centre](scaled(y, scale_out)) if config.centre != "zero" else jnp.zeros(y.shape[-1])
    begun = None if initial is None else _from_before(initial, config, scale, scale_out, mesh, target is not None)

    def make() -> TrainState:
        sae = begun if begun is not None else init_sae(
            make_sparsity(config, latents, mesh), latents, x.shape[-1], centre, jax.random.key(seed),
            centred=target is None, skip=config.skip, reads=1.0 if config.selects else 2 * x.shape[-1] / latents,
        )  # fmt: skip
        m, count = sae.latents, jnp.zeros((), jnp.int32)
        average = jax.tree.map(jnp.copy, sae) if config.ema else None
        return TrainState(
            sae, optimizer(config, steps).init(sae), jnp.zeros(m, jnp.int32), count, scale, scale_out, longest,
            -jnp.ones(()), -jnp.ones(m), jnp.ones(()), jnp.full((), seed, jnp.int32), average,
        )  # fmt: skip

    # What is there already is placed: under jit it would be a constant of the program. Copied, for a step consumes
    # each array once.
    return born(make, mesh) if begun is None else place(jax.tree.map(jnp.copy, make()), mesh)


def _from_before(sae: SAE, config: SAEConfig, scale: Array, scale_out: Array, mesh: Mesh, transcodes: bool) -> SAE:
    """A finished dictionary in the scale and with the sparsity of this training."""
    if sae.norm is not None or sae.transcodes != transcodes:
        what = "normalises each token" if sae.norm is not None else "is a transcoder or else should be one"
        raise UserError(f"the dictionary to go on from {what}: start a new one, or give another")
    sae = unscaled(recentred(sae, sae.centred and not transcodes), 1 / scale, 1 / scale_out)
    if config.unit:
        lengths = jnp.linalg.norm(sae.W_dec[...], axis=-1)
        if isinstance(sae.sparsity, TopK) and jnp.max(lengths) > 1.001 * jnp.min(lengths):
            # Folded into the codes they would change which of them are the largest.
            raise UserError("the dictionary to go on from has TopK codes and decoder rows of many lengths: "
                            "keep them with --set sae.unit_decoder=no")  # fmt: skip
        sae = folded_norms(sae)
    wanted = make_sparsity(config, sae.latents, mesh)
    if (sae.b_enc is None) != isinstance(wanted, Gated):
        raise UserError(f"a dictionary with {sae.sparsity.name} codes is not gone on with as {config.sparsity}")
    if not isinstance(sae.sparsity, type(wanted)) or isinstance(wanted, TopK | BatchTopK):
        return with_sparsity(sae, wanted)
    if isinstance(sae.sparsity, JumpReLU):
        return with_sparsity(sae, JumpReLU(sae.sparsity.threshold[...], config.bandwidth))
    return sae


def make_step(config: SAEConfig, steps: int, mesh: Mesh, twins: int = 1) -> Step:
    """The jitted step `(state, activations [b, d], targets) -> (state, metrics)`; the state given is consumed. Targets
    are left out where the dictionary reconstructs what it reads."""
    seen_and_gradients = gradients(config, levels_for(mesh), twins)
    tx = optimizer(config, steps)

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, x: Array, y: Array | None = None) -> tuple[TrainState, Metrics]:
        alone = y is None
        x, y = scaled(x, state.scale), scaled(x if y is None else y, state.scale_out)
        if config.max_norm:
            rows = short_rows(x, state.longest)
            x, y = x[rows], y[rows]
        y = x if alone else y
        dead = state.silent >= config.dead_after
        p, made = exponent(config, steps, state.step)
        now = Now(dead, sparsity_rise(config, steps, state.step), p, state.weight)
        seen, grads = seen_and_gradients(state.sae, x, y, now)
        sae, opt = moved(config, tx, state.sae, grads, state.opt)
        silent = jnp.where(seen.fired > 0, 0, jnp.minimum(state.silent + len(x), LONG))
        if config.resample:
            sae, opt, silent = _begun_anew(config, state, sae, opt, silent, x, y, seen)
        state = state._replace(sae=sae, opt=opt, silent=silent, step=state.step + 1)
        state = _with_running(config, steps, state, seen, made)
        # Held to the shardings of the first state, or the second step would find others and compile again.
        return kept(state, mesh), _metrics(config, silent, y, seen)

    return step


def short_rows(x: Float[Array, "b d"], longest: Array) -> Int[Array, "b"]:
    """Which row stands in each place: itself, or where it is too long the last one before that is not."""
    fits = jnp.linalg.norm(x, axis=-1) <= longest
    before = jax.lax.cummax(jnp.where(fits, jnp.arange(len(x)), -1))
    return jnp.where(before < 0, jnp.argmax(fits), before)


def _metrics(config: SAEConfig, silent: Array, y: Array, seen: Seen) -> Metrics:
    fvu = jnp.sum(seen.error**2) / jnp.sum((y - jnp.mean(y, axis=0, keepdims=True)) ** 2)
    dead = jnp.mean(silent >= config.dead_after)
    return Metrics(seen.loss, fvu, jnp.sum(seen.fired) / len(y), dead, seen.parts)


def _begun_anew(
    config: SAEConfig, state: TrainState, sae: SAE, opt: optax.OptState, silent: Array, x: Array, y: Array, seen: Seen
) -> tuple[SAE, optax.OptState, Array]:
    """Resampling, when its time has come."""
    dead = silent >= config.dead_after
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    due = (state.step + 1) % max(config.resample // len(x), 1) == 0
    args = (sae, opt, dead, x, y, seen.error, config.threshold, key)
    sae, opt = jax.lax.cond(due, lambda: resampled(*args), lambda: (sae, opt))
    return sae, opt, jnp.where(due & dead, 0, silent)


def _running(mean: Array, new: Array, made: Array) -> Array:
    """A running mean that begins at its first value; what is infinite is left out. It forgets faster in the first
    steps, as the average of weights does: of 200 steps the first, whose codes are largest, would be 14 %."""
    decay = jnp.minimum(CUT_DECAY, (1 + made) / (10 + made))
    known = jnp.where(mean < 0, new, decay * mean + (1 - decay) * new)
    return jnp.where(jnp.isfinite(new), known, mean)


def _with_running(config: SAEConfig, steps: int, state: TrainState, seen: Seen, made: Array) -> TrainState:
    """What is kept along: thresholds, the coefficient of p-annealing, the average of weights."""
    if isinstance(state.sae.sparsity, BatchTopK):
        cut, cuts = (_running(*pair, state.step) for pair in ((state.cut, seen.least.min()), (state.cuts, seen.least)))
        state = state._replace(cut=cut, cuts=cuts)
    if config.sparsity == "p_anneal":
        falls = exponent(config, steps, state.step)[1] > made
        ratio = seen.parts["lp"] / jnp.maximum(seen.parts["next"], 1e-12)
        state = state._replace(weight=jnp.where(falls, state.weight * ratio, state.weight))
    if state.average is not None:
        state = state._replace(average=averaged(state.average, state.sae, config.ema, state.step))
    return state


def finished(state: TrainState, config: SAEConfig) -> SAE:
    """The dictionary for activations as the model gives them. Thresholds for each latent are the geometric mean of the
    batches' and the latent's own smallest codes, after Gemma Scope 2 (which takes the median of the latter)."""
    sae = state.sae
    if state.average is not None:
        sae = jax.tree.map(lambda leaf: leaf, state.average)  # the state stays as it is
        sae = unit_decoder(sae) if config.unit else sae
    if isinstance(sae.sparsity, BatchTopK):
        cut = jnp.maximum(state.cut, 0)
        each = jnp.where(state.cuts < 0, cut, jnp.sqrt(cut * state.cuts)) if config.per_latent else cut
        thresholds = jnp.broadcast_to(each, (sae.latents,))
        sae = with_sparsity(sae, JumpReLU(thresholds))
    elif isinstance(sae.sparsity, TopK):
        sae = with_sparsity(sae, replace(sae.sparsity, k=int(config.k)))
    return unscaled(sae, state.scale, state.scale_out)
