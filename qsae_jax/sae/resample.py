"""Dead latents that begin anew where the dictionary errs (Bricken et al. 2023, "Neuron resampling")."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from qsae_jax.sae.model import SAE
from qsae_jax.sae.sparsity import Gated, JumpReLU

ENCODER = 0.2
"""Length of a new encoder row, of the mean length of the rows that are alive."""


def resampled(
    sae: SAE, opt: optax.OptState, dead: Bool[Array, "m"], x: Array, y: Array, error: Float[Array, "b d"],
    threshold: float, key: Array,
) -> tuple[SAE, optax.OptState]:  # fmt: skip
    """The dictionary with each dead latent pointed at a token of the batch, drawn in proportion to the square of the
    loss on it; biases begin at 0 and Adam forgets these rows. A transcoder reads x there and writes y."""
    sae = jax.tree.map(lambda leaf: leaf, sae)  # what is given stays as it is
    odds = 2 * jnp.log(jnp.sum(error**2, axis=-1) + 1e-30)
    token = jax.random.categorical(key, odds, shape=(sae.latents,))
    lengths = jnp.linalg.norm(sae.encoder[...], axis=-1)
    alive = jnp.sum(jnp.where(dead, 0, lengths)) / jnp.maximum(jnp.sum(~dead), 1)
    read = x - sae.b_dec[...][None] if sae.centred else x
    written = y - sae.b_dec[...][None]
    sae.encoder.set_value(jnp.where(dead[:, None], ENCODER * alive * _unit(read)[token], sae.encoder[...]))
    sae.W_dec.set_value(jnp.where(dead[:, None], _unit(written)[token], sae.W_dec[...]))
    if sae.b_enc is not None:
        sae.b_enc.set_value(jnp.where(dead, 0, sae.b_enc[...]))
    if isinstance(sae.sparsity, JumpReLU):
        sae.sparsity.threshold.set_value(jnp.where(dead, threshold, sae.sparsity.threshold[...]))
    if isinstance(sae.sparsity, Gated):
        for own in (sae.sparsity.b_gate, sae.sparsity.b_mag, sae.sparsity.r_mag):
            own.set_value(jnp.where(dead, 0, own[...]))
    return sae, _forgotten(opt, dead)


def _unit(rows: Array) -> Array:
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _forgotten(opt: optax.OptState, dead: Bool[Array, "m"]) -> optax.OptState:
    """Adam's moments with zeros for dead latents: of all that lies along the latents."""

    def one(path: tuple, leaf: Array) -> Array:
        name = jax.tree_util.keystr(path)
        if not any(part in name for part in ("encoder", "W_dec", "b_enc", "sparsity")):
            return leaf
        return jnp.where(dead.reshape((-1,) + (1,) * (leaf.ndim - 1)), 0, leaf)

    return jax.tree_util.tree_map_with_path(one, opt)
