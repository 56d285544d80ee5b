"""The dictionary: a sparse autoencoder, sharded on its latents.

    pre = (x - b_dec) W_enc + b_enc      codes = sparsity(pre)      reconstruction = codes W_dec + b_dec

Orientation as in SAELens: `W_enc [d, m]`, `W_dec [m, d]`. Parameters are float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qsae_jax.errors import UserError
from qsae_jax.products import einsum
from qsae_jax.sae.sparsity import Sparsity


class SAE(nnx.Module):
    """A sparse autoencoder of `m` latents over activations of width `d`."""

    def __init__(
        self,
        sparsity: Sparsity,
        W_enc: Float[Array, "d m"],
        b_enc: Float[Array, "m"],
        W_dec: Float[Array, "m d"],
        b_dec: Float[Array, "d"],
        centred: bool = True,
    ):
        self.sparsity = sparsity
        self.centred = centred
        """Whether b_dec is taken off the input (`apply_b_dec_to_input` of SAELens)."""
        self.W_enc = nnx.Param(W_enc, axes=("embed", "latent"))
        self.b_enc = nnx.Param(b_enc, axes=("latent",))
        self.W_dec = nnx.Param(W_dec, axes=("latent", "embed"))
        self.b_dec = nnx.Param(b_dec, axes=("embed",))

    @property
    def d(self) -> int:
        return self.W_enc.shape[0]

    @property
    def latents(self) -> int:
        return self.W_enc.shape[1]

    def pre(self, x: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
        """Pre-activations."""
        x = x.astype(jnp.float32)
        centred = x - _along(self.b_dec[...], x) if self.centred else x
        z = einsum("...d,dm->...m", centred, self.W_enc[...])
        return z + _along(self.b_enc[...], z)

    def encode(self, x: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
        """Codes: the features' activations."""
        return self.sparsity(self.pre(x))

    def decode(self, codes: Float[Array, "*b m"]) -> Float[Array, "*b d"]:
        """The reconstruction."""
        x = einsum("...m,md->...d", codes, self.W_dec[...])
        return x + _along(self.b_dec[...], x)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return self.decode(self.encode(x))


def _along(bias: Array, x: Array) -> Array:
    """A bias as a row under x: rank promotion stays an error elsewhere."""
    return bias.reshape((1,) * (x.ndim - 1) + (-1,))


def init_sae(sparsity: Sparsity, d: int, latents: int, centre: Float[Array, "d"], key: Array) -> SAE:
    """Random unit decoder rows, the encoder their transpose, zero encoder bias, `b_dec` at the data's centre
    (Gao et al. 2024, appendix A)."""
    rows = jax.random.normal(key, (latents, d))
    rows = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
    return SAE(sparsity, rows.T, jnp.zeros(latents), rows, centre)


def check_width(sae: SAE, width: int, point: str) -> None:
    """Refuse a dictionary that does not fit the activations it is to read."""
    if sae.d != width:
        raise UserError(f"the dictionary is of width {sae.d}, but `{point}` has width {width}: take another point")
