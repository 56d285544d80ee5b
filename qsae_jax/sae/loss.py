"""Named loss terms of a dictionary on a batch of normalised activations x `[b, d]`.

Reductions are stated in each term, because they change what a coefficient means. Unless it says otherwise a term is a
sum over d or over latents and a mean over the batch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qsae_jax.products import Product, along, matmul
from qsae_jax.sae.model import SAE
from qsae_jax.sae.select import nth_largest, places
from qsae_jax.sae.sparsity import near


def reading(sae: SAE, x: Float[Array, "b d"]) -> tuple[Float[Array, "b d"], Float[Array, "m"]]:
    """What the encoder's rows are multiplied with, and the bias that goes on top.

    b_dec is taken off every row of x alike, so its gradient through the encoder is that of a bias moved by
    `-b_dec W_enc`: one small product, where the gradient of the input would be one as large as the encoder's."""
    still, b_dec = jax.lax.stop_gradient, sae.b_dec[...]
    bias = jnp.zeros(sae.latents) if sae.b_enc is None else sae.b_enc[...]
    if not sae.centred:
        return x, bias
    return still(x - b_dec[None]), bias - matmul(still(sae.encoder[...]), b_dec - still(b_dec))


def pre_activations(sae: SAE, x: Float[Array, "b d"], product: Product = matmul) -> Float[Array, "b m"]:
    read, bias = reading(sae, x)
    return product(read, sae.encoder[...].T) + bias[None]


def mse(error: Float[Array, "b d"]) -> Float[Array, ""]:
    """`mean_b sum_d error^2`, as SAELens and dictionary_learning have it."""
    return jnp.mean(jnp.sum(error**2, axis=-1))


def l1(codes: Float[Array, "b m"], norms: Float[Array, "m"]) -> Float[Array, ""]:
    """`mean_b sum_i f_i |W_dec[i]|` (Anthropic, April 2024 update; SAELens's standard). It cannot be lowered by moving
    scale from the codes into the decoder; with unit rows it is dictionary_learning's `|f|_1`."""
    return jnp.mean(matmul(codes, norms))


def lp(codes: Float[Array, "b m"], p: Array | float) -> Float[Array, ""]:
    """`mean_b sum_i f_i^p`: the penalty of p-annealing (Karvonen et al. 2024, arXiv 2408.00113). Codes of 0 give 0,
    also to the gradient, which would be infinite there."""
    on = codes > 0
    return jnp.mean(jnp.sum(jnp.where(on, jnp.where(on, codes, 1.0) ** p, 0), axis=-1))


@jax.custom_vjp
def step(pre: Array, threshold: Array, bandwidth: float) -> Array:
    """`[pre > threshold]`, with the straight-through gradient `-(1/eps) K((pre - theta)/eps)` of the threshold and none
    of the pre-activation (Rajamanoharan et al. 2024, arXiv 2407.14435, equation 12)."""
    return (pre > threshold).astype(pre.dtype)


def _step_back(kept: tuple, g: Array) -> tuple[Array, Array, None]:
    pre, threshold, bandwidth = kept
    to_threshold = jnp.where(near(pre, threshold, bandwidth), -g / bandwidth, 0)
    return jnp.zeros_like(pre), jnp.sum(to_threshold, 0, keepdims=True), None


step.defvjp(lambda *given: (step(*given), given), _step_back)


def l0(pre: Float[Array, "b m"], threshold: Float[Array, "m"], bandwidth: float) -> Float[Array, "b"]:
    """How many latents fire on each token; of the pre-activations, never of the codes (a code is 0 below its threshold,
    and half of the kernel would see nothing)."""
    return jnp.sum(step(pre, along(threshold, pre), bandwidth), axis=-1)


def quadratic(count: Float[Array, "b"], target: float) -> Float[Array, ""]:
    """`mean_b 2 (L0 - target)^2 / target`, token by token: SAELens's `quadratic`, after Gemma Scope 2."""
    return jnp.mean(2 / target * (count - target) ** 2)


def on_target(count: Float[Array, "b"], target: float) -> Float[Array, ""]:
    """`(mean_b L0 / target - 1)^2` (Rajamanoharan et al. 2024, appendix G; dictionary_learning's)."""
    return (jnp.mean(count) / target - 1) ** 2


def tanh(codes: Float[Array, "b m"], norms: Float[Array, "m"], scale: float) -> Float[Array, ""]:
    """`mean_b sum_i tanh(scale f_i |W_dec[i]|)` (Anthropic, January 2025 update)."""
    return jnp.mean(jnp.sum(jnp.tanh(scale * codes * along(norms, codes)), axis=-1))


def pre_act(pre: Array, threshold: Float[Array, "m"], norms: Float[Array, "m"], dead: Bool[Array, "m"]) -> Array:
    """`mean_b sum over dead i of relu(theta_i - pre_i) |W_dec[i]|` (Anthropic, January 2025; SAELens's, for latents
    that are dead): lifts what does not reach its threshold."""
    # A threshold of infinity is that of a latent that never fires: nothing lifts it.
    reachable = jnp.where(jnp.isfinite(threshold), threshold, -jnp.inf)
    return jnp.mean(matmul(jax.nn.relu(along(reachable, pre) - pre), jnp.where(dead, norms, 0)))


def auxk(
    sae: SAE, x: Array, error: Float[Array, "b d"], dead: Bool[Array, "m"], k: int, product: Product = matmul
) -> Array:
    """AuxK (Gao et al. 2024, arXiv 2406.04093, section A.2): the k largest dead latents reconstruct the residual.

    `sum |e - e_hat|^2 / sum |e - mean e|^2` with the residual e detached, codes after ReLU, and no b_dec in e_hat.
    Where fewer than k latents are dead, only these take part. The dead latents' rows are gathered first: where few are
    dead that is most of the work saved, and up to k of them need no choice."""
    residual, (read, bias), m = jax.lax.stop_gradient(error), reading(sae, x), sae.latents
    spread = jnp.sum((residual - jnp.mean(residual, axis=0, keepdims=True)) ** 2)

    def with_room(size: int) -> Callable[[], Array]:
        def loss() -> Array:
            at = places(dead, size) if size < m else jnp.where(dead, jnp.arange(m), -1)
            pre = product(read, sae.encoder[...][at].T) + bias[at][None]
            codes = jnp.where(at[None] >= 0, jax.nn.relu(pre), 0)
            if size > k:
                codes = jnp.where(codes >= nth_largest(jax.lax.stop_gradient(codes), k), codes, 0)
            return jnp.sum((residual - product(codes, sae.W_dec[...][at])) ** 2) / jnp.maximum(spread, 1e-12)

        return loss

    room = sorted({min(k, m), min(max(m // 8, k), m), m})
    which = jnp.where(jnp.any(dead), 1 + jnp.searchsorted(jnp.asarray(room), jnp.sum(dead)), 0)
    # Without a checkpoint every branch would hand its codes on to the backward pass, as zeros where it is not taken.
    return jax.lax.switch(which, [lambda: jnp.zeros(()), *(jax.checkpoint(with_room(size)) for size in room)])
