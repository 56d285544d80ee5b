"""Named loss terms of a dictionary on a batch of normalised activations x `[b, d]`.

Reductions are stated in each term, because they change what a coefficient means: everything is a sum over d and a
mean over the batch, on activations whose mean square norm is 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qsae_jax.products import matmul
from qsae_jax.sae.model import SAE
from qsae_jax.sae.sparse import decode_rows, encode_rows
from qsae_jax.sae.sparsity import ReLU, TopK, top_k


class Passed(NamedTuple):
    """What a pass through the dictionary gives the loss."""

    error: Float[Array, "b d"]
    """x minus its reconstruction."""
    penalty: Float[Array, ""]
    """The sparsity term, before its coefficient."""
    fired: Float[Array, "m"]
    """How often each latent fired in the batch."""


def topk_pass(sae: SAE, x: Float[Array, "b d"]) -> Passed:
    """TopK by gathered rows: on one device along the latents."""
    assert isinstance(sae.sparsity, TopK)
    still, W_enc, b_dec = jax.lax.stop_gradient, sae.W_enc[...], sae.b_dec[...]
    # b_dec is taken off every row alike, so its gradient through the encoder is that of a bias moved by -b_dec W_enc:
    # one product for the batch, where the gradient of each row's input would gather k rows of W_enc for each.
    bias = sae.b_enc[...] - matmul(b_dec - still(b_dec), still(W_enc)) if sae.centred else sae.b_enc[...]
    read = still(x - b_dec[None]) if sae.centred else x
    values, rows = encode_rows(read, W_enc, bias, sae.sparsity.k)
    error = x - decode_rows(values, rows, sae.W_dec[...]) - b_dec[None]
    return Passed(error, jnp.zeros(()), jnp.zeros(sae.latents).at[rows].add((values > 0).astype(x.dtype)))


def dense_pass(sae: SAE, x: Float[Array, "b d"]) -> Passed:
    """Any sparsity by dense products, which a mesh cuts along the latents.

    The penalty of ReLU is `mean_b sum_i f_i |W_dec[i]|` (Anthropic, April 2024 update), which cannot be lowered by
    moving scale from the codes into the decoder."""
    codes = sae.encode(x)
    norms = jnp.linalg.norm(sae.W_dec[...], axis=-1)
    penalty = jnp.mean(matmul(codes, norms)) if isinstance(sae.sparsity, ReLU) else jnp.zeros(())
    return Passed(x - sae.decode(codes), penalty, jnp.sum(codes > 0, axis=0).astype(x.dtype))


def mse(error: Float[Array, "b d"]) -> Float[Array, ""]:
    """`mean_b sum_d error^2`."""
    return jnp.mean(jnp.sum(error**2, axis=-1))


def auxk(sae: SAE, x: Float[Array, "b d"], error: Float[Array, "b d"], dead: Bool[Array, "m"], k: int) -> Array:
    """AuxK (Gao et al. 2024, arXiv 2406.04093, section A.2): the k largest dead latents reconstruct the residual.

    `sum |e - e_hat|^2 / sum |e - mean e|^2` with the residual e detached, codes after ReLU, and no b_dec in e_hat.
    Where fewer than k latents are dead, only these take part."""
    residual = jax.lax.stop_gradient(error)
    pre = jnp.where(dead[None, :], sae.pre(x), -jnp.inf)
    lowest = top_k(pre, k)[0][:, -1:]
    codes = jnp.where((pre >= lowest) & dead[None, :], jax.nn.relu(pre), 0)
    spread = jnp.sum((residual - jnp.mean(residual, axis=0, keepdims=True)) ** 2)
    return jnp.sum((residual - matmul(codes, sae.W_dec[...])) ** 2) / jnp.maximum(spread, 1e-12)
