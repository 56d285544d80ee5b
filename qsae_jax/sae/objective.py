"""What each architecture minimises. One signature: `objective(sae, x, y, now) -> Seen`, x read, y reconstructed.

Sums in float32 on normalised activations; the terms and their sources are in loss.py.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qsae_jax.mesh import from_chunks, in_chunks
from qsae_jax.products import Product, in_bfloat16, matmul
from qsae_jax.sae import loss
from qsae_jax.sae.levels import MakesLevels, levels_of_list
from qsae_jax.sae.model import SAE
from qsae_jax.sae.settings import SAEConfig
from qsae_jax.sae.sparsity import Gated, JumpReLU


class Now(NamedTuple):
    """What differs from step to step."""

    dead: Bool[Array, "m"]
    rise: Float[Array, ""]
    """From 0 to 1 while sparsity warms up."""
    p: Float[Array, ""]
    """The exponent of p-annealing."""
    weight: Float[Array, ""]
    """What its coefficient is multiplied by."""


class Seen(NamedTuple):
    """What a pass through the dictionary gives."""

    loss: Float[Array, ""]
    error: Float[Array, "b d"]
    """y minus its reconstruction."""
    fired: Float[Array, "m"]
    """How often each latent fired in the batch."""
    least: Float[Array, "m"]
    """The smallest code of each latent that fired; infinite for the others (TopK family)."""
    parts: dict[str, Float[Array, ""]]
    """The terms of the loss by name, before their coefficients."""


Objective = Callable[[SAE, Array, Array, Now], Seen]


def make_objective(config: SAEConfig, levels: MakesLevels = levels_of_list, twins: int = 1) -> Objective:
    """The objective of a configuration; `levels` are made as the mesh asks (`levels_for`). Of a crosscoder over so many
    twins a decoder row's norm is the sum of the norms of its parts (Lindsey et al. 2024)."""
    product = in_bfloat16 if config.bf16 else matmul
    dense = {"relu": _relu, "p_anneal": _p_anneal, "gated": _gated, "jumprelu": _jumprelu}
    if config.selects:
        return partial(_selecting, config, product, levels)
    return partial(dense[config.sparsity], config, product, twins)


def gradients(
    config: SAEConfig, levels: MakesLevels = levels_of_list, twins: int = 1
) -> Callable[[SAE, Array, Array, Now], tuple[Seen, SAE]]:
    """What the objective of a batch sees, and its gradients. Where they are accumulated, the batch goes through in
    parts: means over tokens stay what they were; a choice among all codes of a batch (BatchTopK), AuxK's normalisation
    and `penalty="target"` are then each part's own."""
    objective = make_objective(replace(config, aux=0.0), levels, twins)

    def loss_of(sae: SAE, x: Array, y: Array, now: Now) -> tuple[Array, Seen]:
        seen = objective(sae, x, y, now)
        return seen.loss, seen

    def of_part(sae: SAE, x: Array, y: Array, now: Now) -> tuple[Seen, SAE]:
        (_, seen), grads = jax.value_and_grad(loss_of, has_aux=True)(sae, x, y, now)
        return with_auxk(config, sae, x, now, seen, grads) if config.selects and config.aux else (seen, grads)

    def of_batch(sae: SAE, x: Array, y: Array, now: Now) -> tuple[Seen, SAE]:
        n = config.accumulate

        def add(total: SAE, rows: tuple[Array, Array]) -> tuple[SAE, Seen]:
            seen, grads = of_part(sae, *rows, now)
            return jax.tree.map(lambda one, other: one + other / n, total, grads), seen

        parts = in_chunks(x, len(x) // n), in_chunks(y, len(y) // n)
        grads, seen = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, sae), parts)
        loss, terms = jax.tree.map(jnp.mean, (seen.loss, seen.parts))
        return Seen(loss, from_chunks(seen.error), seen.fired.sum(0), seen.least.min(0), terms), grads

    return of_part if config.accumulate == 1 else of_batch


def with_auxk(config: SAEConfig, sae: SAE, x: Array, now: Now, seen: Seen, grads: SAE) -> tuple[Seen, SAE]:
    """What an objective without AuxK saw, and its gradients, with AuxK added where a latent is dead. Beside the main
    loss rather than in it: where none is dead, a branch of the loss would still hand on and add gradients of zeros as
    large as the weights."""
    product, k = in_bfloat16 if config.bf16 else matmul, min(config.k_aux or sae.d // 2, sae.latents)

    def added(grads: SAE) -> tuple[Array, SAE]:
        aux = jax.value_and_grad(lambda sae: loss.auxk(sae, x, seen.error, now.dead, k, product))
        value, more = aux(sae)
        return value, jax.tree.map(lambda one, other: one + config.aux * other, grads, more)

    value, grads = jax.lax.cond(jnp.any(now.dead), added, lambda grads: (jnp.zeros(()), grads), grads)
    return seen._replace(loss=seen.loss + config.aux * value, parts=seen.parts | {"aux": value}), grads


def _outside(sae: SAE, x: Array) -> Array:
    """What is reconstructed without codes: `b_dec`, and the skip connection's part."""
    rest = sae.b_dec[...][None]
    return rest if sae.W_skip is None else rest + matmul(x, sae.W_skip[...])


def _selecting(
    config: SAEConfig, product: Product, levels: MakesLevels, sae: SAE, x: Array, y: Array, now: Now
) -> Seen:
    """TopK and BatchTopK: `mse + aux AuxK`. Matryoshka: the mean over the levels of the mse of all latents up to there
    (Bussmann et al. 2025, arXiv 2503.17547), and AuxK on the last residual. SAELens has their sum, and
    dictionary_learning their mean divided once more by their number."""
    added, fired, least = levels(config, sae, x, now.rise, product)
    errors = (y - _outside(sae, x))[:, None] - jnp.cumsum(added, axis=1)
    parts = {"mse": jnp.mean(jnp.sum(errors**2, axis=-1)), "aux": jnp.zeros(())}
    error, k = errors[:, -1], min(config.k_aux or sae.d // 2, sae.latents)
    if config.aux:
        parts["aux"] = loss.auxk(sae, x, error, now.dead, k, product)
    return Seen(parts["mse"] + config.aux * parts["aux"], error, fired, least, parts)


def _seen(total: Array, error: Array, codes: Array, parts: dict[str, Array]) -> Seen:
    fired = jnp.sum(codes > 0, axis=0).astype(codes.dtype)
    return Seen(total, error, fired, jnp.full_like(fired, jnp.inf), parts)


def _norms(sae: SAE, twins: int) -> Float[Array, "m"]:
    """The length of each decoder row; the sum of its parts' lengths in a crosscoder. That of zeros has gradient 0."""
    squares = jnp.sum(sae.W_dec[...].reshape(sae.latents, twins, -1) ** 2, axis=-1)
    some = squares > 0
    return jnp.sum(jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1)), 0), axis=-1)


def _relu(config: SAEConfig, product: Product, twins: int, sae: SAE, x: Array, y: Array, now: Now) -> Seen:
    """`mse + l1 L1`."""
    codes = jax.nn.relu(loss.pre_activations(sae, x, product))
    error = y - _outside(sae, x) - product(codes, sae.W_dec[...])
    parts = {"mse": loss.mse(error), "l1": loss.l1(codes, _norms(sae, twins))}
    return _seen(parts["mse"] + config.l1 * now.rise * parts["l1"], error, codes, parts)


def _p_anneal(config: SAEConfig, product: Product, twins: int, sae: SAE, x: Array, y: Array, now: Now) -> Seen:
    """`mse + l1 w L_p^p` of codes times decoder norms, w keeping the penalty as large as it was when p falls. `next` is
    the penalty at the p that comes next."""
    codes = jax.nn.relu(loss.pre_activations(sae, x, product))
    error = y - _outside(sae, x) - product(codes, sae.W_dec[...])
    sizes = codes * _norms(sae, twins)[None]
    lower = now.p - (1 - config.p_end) / config.p_steps
    parts = {"mse": loss.mse(error), "lp": loss.lp(sizes, now.p)}
    total = parts["mse"] + config.l1 * now.rise * now.weight * parts["lp"]
    parts["next"] = jax.lax.stop_gradient(loss.lp(sizes, jnp.maximum(lower, config.p_end)))
    return _seen(total, error, codes, parts)


def _gated(config: SAEConfig, product: Product, twins: int, sae: SAE, x: Array, y: Array, now: Now) -> Seen:
    """`mse + l1 sum relu(gate) |W_dec| + |y - (relu(gate) W_dec + b_dec)|^2`, the decoder of the last term frozen
    (Rajamanoharan et al. 2024, arXiv 2404.16014, equation 8). The norms in the second term are SAELens's; with unit
    rows they are 1. SAELens does not freeze the decoder."""
    assert isinstance(sae.sparsity, Gated)
    still, pre = jax.lax.stop_gradient, loss.pre_activations(sae, x, product)
    codes, gate = sae.sparsity(pre), jax.nn.relu(sae.sparsity.gate(pre))
    error = y - _outside(sae, x) - product(codes, sae.W_dec[...])
    by_gate = y - still(_outside(sae, x)) - product(gate, still(sae.W_dec[...]))
    parts = {"mse": loss.mse(error), "l1": loss.l1(gate, _norms(sae, twins)), "gate": loss.mse(by_gate)}
    return _seen(parts["mse"] + config.l1 * now.rise * parts["l1"] + parts["gate"], error, codes, parts)


def _jumprelu(config: SAEConfig, product: Product, twins: int, sae: SAE, x: Array, y: Array, now: Now) -> Seen:
    """`mse + l0 penalty (+ pre_act lifting of dead latents)`: loss.py has the four penalties."""
    assert isinstance(sae.sparsity, JumpReLU)
    pre, threshold, norms = loss.pre_activations(sae, x, product), sae.sparsity.threshold[...], _norms(sae, twins)
    codes = sae.sparsity(pre)
    error = y - _outside(sae, x) - product(codes, sae.W_dec[...])
    if config.penalty == "tanh":
        penalty = loss.tanh(codes, norms, config.tanh_scale)
    else:
        count = loss.l0(pre, threshold, config.bandwidth)
        whole = {"step": lambda: jnp.mean(count), "quadratic": lambda: loss.quadratic(count, config.target_l0),
                 "target": lambda: loss.on_target(count, config.target_l0)}  # fmt: skip
        penalty = whole[config.penalty]()
    parts = {"mse": loss.mse(error), "penalty": penalty, "pre_act": jnp.zeros(())}
    if config.pre_act:
        parts["pre_act"] = loss.pre_act(pre, threshold, norms, now.dead)
    total = parts["mse"] + config.l0 * now.rise * penalty + config.pre_act * parts["pre_act"]
    return _seen(total, error, codes, parts)
