"""Training: one donated, jitted step; schedules, dead latents in tokens, and a state that can be kept and resumed.

Activations are divided by the root of their mean square norm, found once; the factor is folded into the biases when
the dictionary leaves (`finished`), which is exact because the map is homogeneous. TopK keeps unit decoder rows: the
gradient along a row is removed and the row is renormalised (Gao et al. 2024, section A.1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from qsae_jax.config import check_at_least
from qsae_jax.errors import UserError, nearest
from qsae_jax.mesh import born, kept
from qsae_jax.products import matmul
from qsae_jax.sae.loss import auxk, dense_pass, mse, topk_pass
from qsae_jax.sae.model import SAE, init_sae
from qsae_jax.sae.sparsity import ReLU, Sparsity, TopK

LONG = 2**30
"""Tokens beyond which a silent latent is not counted on: an int32 would wrap."""
SPARSITIES = ("topk", "relu")


@dataclass(frozen=True)
class SAEConfig:
    """A dictionary and how it learns."""

    sparsity: str = "topk"
    """topk or relu."""
    k: int = 32
    """Latents that fire on a token (topk)."""
    expansion: int = 8
    """Latents per dimension of the activations."""
    l1: float = 0.05
    """Coefficient of the penalty (relu)."""
    lr: float = 2e-3
    """Peak learning rate of Adam."""
    warmup: float = 0.05
    """Share of the steps in which learning rate and penalty rise from 0."""
    decay: float = 0.3
    """Share of the steps, at the end, in which the learning rate falls to 0."""
    aux: float = 1 / 32
    """Coefficient of AuxK (topk)."""
    k_aux: int = 0
    """Dead latents that AuxK uses for a token; 0 is half the width of the activations."""
    dead_after: int = 32_768
    """A latent is dead when it has not fired for so many tokens."""

    def __post_init__(self) -> None:
        if self.sparsity not in SPARSITIES:
            known = ", ".join(SPARSITIES)
            raise UserError(
                f"sae.sparsity `{self.sparsity}` is unknown{nearest(self.sparsity, SPARSITIES)}; possible: {known}"
            )
        check_at_least(self, "sae.", k=1, expansion=1, l1=0, lr=0, warmup=0, decay=0, aux=0, k_aux=0, dead_after=1)
        if self.warmup + self.decay > 1:
            raise UserError(f"sae.warmup {self.warmup} and sae.decay {self.decay} are shares of the steps: at most 1")

    def make_sparsity(self) -> Sparsity:
        return TopK(self.k) if self.sparsity == "topk" else ReLU()


class TrainState(NamedTuple):
    """All that changes in training. Kept whole in a checkpoint."""

    sae: SAE
    opt: optax.OptState
    silent: Int[Array, "m"]
    """Tokens since each latent last fired."""
    step: Int[Array, ""]
    scale: Float[Array, ""]
    """What activations are divided by: the root of their mean square norm."""


class Metrics(NamedTuple):
    """Of one batch, in the scale of the activations given."""

    loss: Array
    fvu: Array
    l0: Array
    dead: Array
    """Share of latents that are dead."""


Step = Callable[[TrainState, Float[Array, "b d"]], tuple[TrainState, Metrics]]


def geometric_median(x: Float[Array, "n d"], rounds: int = 32) -> Float[Array, "d"]:
    """The point with the least sum of distances, by Weiszfeld's iteration: no outlier moves it far."""

    def closer(_: int, centre: Array) -> Array:
        weight = 1.0 / jnp.maximum(jnp.linalg.norm(x - centre[None], axis=-1), 1e-8)
        return matmul(weight / jnp.sum(weight), x)

    return jax.lax.fori_loop(0, rounds, closer, jnp.mean(x, axis=0))


def optimizer(config: SAEConfig, steps: int) -> Any:
    """Adam with linear warm-up and linear decay to zero."""
    rise, fall = max(int(steps * config.warmup), 1), max(int(steps * config.decay), 1)
    parts = [optax.linear_schedule(0, config.lr, rise), optax.linear_schedule(config.lr, 0, fall)]
    return optax.adam(optax.join_schedules(parts, [max(steps - fall, rise)]))


def start(config: SAEConfig, first: Float[Array, "n d"], latents: int, steps: int, seed: int, mesh: Mesh) -> TrainState:
    """The state before the first step; scale and centre come from a first batch of activations."""
    first = first.astype(jnp.float32)
    scale = jnp.sqrt(jnp.mean(jnp.sum(first**2, axis=-1)))
    centre = geometric_median(first / scale)

    def make() -> TrainState:
        sae = init_sae(config.make_sparsity(), first.shape[1], latents, centre, jax.random.key(seed))
        opt = optimizer(config, steps).init(sae)
        return TrainState(sae, opt, jnp.zeros(latents, jnp.int32), jnp.zeros((), jnp.int32), scale)

    return born(make, mesh)


def make_step(config: SAEConfig, steps: int, mesh: Mesh) -> Step:
    """The jitted step `(state, activations [b, d]) -> (state, metrics)`; the state given is consumed."""
    fast = config.sparsity == "topk" and mesh.shape["model"] == 1
    tx = optimizer(config, steps)

    def loss(sae: SAE, x: Array, dead: Array, step: Array) -> tuple[Array, tuple]:
        out = (topk_pass if fast else dense_pass)(sae, x)
        rise = jnp.minimum((step + 1) / max(int(steps * config.warmup), 1), 1.0)
        total = mse(out.error) + config.l1 * rise * out.penalty
        if config.sparsity == "topk" and config.aux:
            k = min(config.k_aux or sae.d // 2, sae.latents)
            aux = jax.lax.cond(jnp.any(dead), lambda: auxk(sae, x, out.error, dead, k), lambda: jnp.zeros(()))
            total += config.aux * aux
        return total, (out.error, out.fired)

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, x: Float[Array, "b d"]) -> tuple[TrainState, Metrics]:
        x = x.astype(jnp.float32) / state.scale
        dead = state.silent >= config.dead_after
        (total, (error, fired)), grads = jax.value_and_grad(loss, has_aux=True)(state.sae, x, dead, state.step)
        if config.sparsity == "topk":
            grads = without_radial(state.sae, grads)
        updates, opt = tx.update(grads, state.opt, state.sae)
        sae: SAE = optax.apply_updates(cast(Any, state.sae), updates)  # pyright: ignore[reportAssignmentType]
        sae = unit_decoder(sae) if config.sparsity == "topk" else sae
        silent = jnp.where(fired > 0, 0, jnp.minimum(state.silent + len(x), LONG))
        fvu = jnp.sum(error**2) / jnp.sum((x - jnp.mean(x, axis=0, keepdims=True)) ** 2)
        metrics = Metrics(total, fvu, jnp.sum(fired) / len(x), jnp.mean(silent >= config.dead_after))
        # Held to the shardings of the first state, or the second step would find others and compile again.
        return kept(TrainState(sae, opt, silent, state.step + 1, state.scale), mesh), metrics

    return step


def _with_decoder(sae: SAE, W_dec: Array) -> SAE:
    graph, params = nnx.split(sae)
    params["W_dec"] = cast(nnx.Variable, params["W_dec"]).replace(W_dec)
    return nnx.merge(graph, params)


def without_radial(sae: SAE, grads: SAE) -> SAE:
    """The gradient of the decoder without its part along each unit row: that part could only change the norm."""
    rows, g = sae.W_dec[...], grads.W_dec[...]
    return _with_decoder(grads, g - jnp.sum(g * rows, axis=-1, keepdims=True) * rows)


def unit_decoder(sae: SAE) -> SAE:
    rows = sae.W_dec[...]
    return _with_decoder(sae, rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-12))


def finished(state: TrainState) -> SAE:
    """The dictionary for activations as the model gives them: biases times the scale, weights unchanged."""
    sae = state.sae
    return SAE(sae.sparsity, sae.W_enc[...], sae.b_enc[...] * state.scale, sae.W_dec[...], sae.b_dec[...] * state.scale)
