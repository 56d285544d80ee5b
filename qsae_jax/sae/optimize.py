"""How weights move: schedules, Adam, unit decoder rows, and what is projected after a step."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from qsae_jax.sae.model import SAE
from qsae_jax.sae.settings import SAEConfig
from qsae_jax.sae.sparsity import JumpReLU


def share_of(share: float, steps: int) -> int:
    return max(int(steps * share), 1)


def learning_rate(config: SAEConfig, steps: int) -> optax.Schedule:
    """Linear from 0 to the peak, level, then linear or as a cosine to 0."""
    rise, fall = share_of(config.warmup, steps), share_of(config.decay, steps)
    down = optax.linear_schedule if config.schedule == "linear" else _cosine
    up = optax.linear_schedule(0, config.lr, rise) if config.warmup else optax.constant_schedule(config.lr)
    parts = [up, down(config.lr, 0, fall)]
    return optax.join_schedules(parts, [max(steps - fall, rise)]) if config.decay else parts[0]


def _cosine(peak: float, end: float, steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(peak, steps, end)


def optimizer(config: SAEConfig, steps: int) -> Any:
    """Adam, after the norm of all gradients was clipped if it is to be."""
    adam = optax.adam(learning_rate(config, steps), b1=config.beta1, b2=config.beta2)
    return optax.chain(optax.clip_by_global_norm(config.clip), adam) if config.clip else adam


def sparsity_rise(config: SAEConfig, steps: int, step: Array) -> Float[Array, ""]:
    """From 0 to 1 while sparsity warms up; the first step is not at 0."""
    return jnp.minimum((step + 1) / share_of(config.sparsity_warmup, steps), 1.0)


def exponent(config: SAEConfig, steps: int, step: Array) -> tuple[Float[Array, ""], Array]:
    """p at a step, falling from 1 in `p_steps` equal steps after `p_from` of the training; and how many were made."""
    gone = (step / steps - config.p_from) / (1 - config.p_from)
    made = jnp.clip(jnp.floor(gone * (config.p_steps + 1)), 0, config.p_steps)
    return 1 - made * (1 - config.p_end) / config.p_steps, made


def without_radial(sae: SAE, grads: SAE) -> SAE:
    """The gradient of the decoder without its part along each unit row: that part could only change the norm (Gao et
    al. 2024, section A.1)."""
    rows, g = sae.W_dec[...], grads.W_dec[...]
    grads.W_dec.set_value(g - jnp.sum(g * rows, axis=-1, keepdims=True) * rows)
    return grads


def unit_decoder(sae: SAE) -> SAE:
    """Rows of length 1. A maximum in the place of the choice would make XLA compute the weights of the step twice, once
    for the lengths (49 ms in place of 20 at m 8192)."""
    rows = sae.W_dec[...]
    lengths = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    sae.W_dec.set_value(rows / jnp.where(lengths > 0, lengths, 1))
    return sae


def moved(config: SAEConfig, tx: Any, sae: SAE, grads: SAE, opt: optax.OptState) -> tuple[SAE, optax.OptState]:
    """The weights after one step. Thresholds are kept from below 0 by projection: a clamp in the forward pass would
    have no gradient there, and hold them."""
    if config.unit:
        grads = without_radial(sae, grads)
    updates, opt = tx.update(grads, opt, sae)
    if isinstance(updates.sparsity, JumpReLU) and config.threshold_lr and config.lr:
        # Adam's step is proportional to its learning rate, so this is Adam with another.
        updates.sparsity.threshold.set_value(updates.sparsity.threshold[...] * (config.threshold_lr / config.lr))
    sae = cast(SAE, optax.apply_updates(cast(Any, sae), updates))
    if isinstance(sae.sparsity, JumpReLU):
        sae.sparsity.threshold.set_value(jnp.maximum(sae.sparsity.threshold[...], 0))
    return unit_decoder(sae) if config.unit else sae, opt


def averaged(average: SAE, sae: SAE, decay: float, made: Array) -> SAE:
    """The running average of weights (Gao et al. 2024, appendix A). It forgets faster in the first steps, or those from
    before them would stay in it. `made` counts the steps, this one too."""
    decay_now = jnp.minimum(decay, (1 + made) / (10 + made))
    return jax.tree.map(lambda a, w: decay_now * a + (1 - decay_now) * w, average, sae)
