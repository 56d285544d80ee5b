"""The dictionary: a sparse autoencoder or a transcoder, sharded on its latents.

    pre = (x - b_dec) W_enc + b_enc      codes = sparsity(pre)      reconstruction = codes W_dec + b_dec (+ x W_skip)

Orientation as in SAELens: `W_enc [d, m]`, `W_dec [m, d_out]`; parameters are float32. A transcoder reconstructs other
activations than those it reads, of width d_out; a crosscoder is an autoencoder over the activations of several twins
side by side (crosscoder.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from qsae_jax.errors import UserError
from qsae_jax.mesh import place
from qsae_jax.products import along, einsum
from qsae_jax.sae.sparsity import Gated, Sparsity, across


class Normed(NamedTuple):
    """Activations normalised token by token, and what brings them back: `x = x' * scale + shift`."""

    x: Float[Array, "*b d"]
    scale: Float[Array, "*b 1"]
    shift: Float[Array, "*b 1"]


def layer_norm(x: Float[Array, "*b d"]) -> Normed:
    """Mean 0 and deviation 1, as SAELens and OpenAI do it: the deviation unbiased, 1e-5 added to it, and only to
    divide by."""
    shift = jnp.mean(x, axis=-1, keepdims=True)
    scale = jnp.std(x, axis=-1, ddof=1, keepdims=True)
    return Normed((x - shift) / (scale + 1e-5), scale, shift)


def constant_norm(x: Float[Array, "*b d"]) -> Normed:
    """Length sqrt(d): `constant_norm_rescale` of SAELens."""
    scale = jnp.linalg.norm(x, axis=-1, keepdims=True) / x.shape[-1] ** 0.5
    return Normed(x / jnp.where(scale > 0, scale, 1), scale, jnp.zeros_like(scale))


Norm = Callable[[Array], Normed]
NORMS: dict[str, Norm] = {"layer_norm": layer_norm, "constant_norm_rescale": constant_norm}
"""What a token's activations may go through on their way in, under SAELens's names; the way out undoes it."""


class SAE(nnx.Module):
    """A dictionary of `m` latents over activations of width `d`."""

    def __init__(
        self,
        sparsity: Sparsity,
        W_enc: Float[Array, "d m"],
        b_enc: Float[Array, "m"] | None,
        W_dec: Float[Array, "m d_out"],
        b_dec: Float[Array, "d_out"],
        centred: bool = True,
        W_skip: Float[Array, "d d_out"] | None = None,
        norm: Norm | None = None,
        transcodes: bool = False,
    ):
        self.sparsity = sparsity
        self.centred = centred
        """Whether b_dec is taken off the input (`apply_b_dec_to_input` of SAELens)."""
        self.norm = norm
        """What is done to each token's activations before they are read, and undone after."""
        self.transcodes = transcodes
        """Whether it reconstructs other activations than those it reads."""
        # The encoder is kept as rows, one for each latent: what training reads and writes of it is rows.
        self.encoder = nnx.Param(jnp.asarray(W_enc).T, axes=("latent", "embed"))
        self.b_enc = None if b_enc is None else nnx.Param(b_enc, axes=("latent",))
        """None where the sparsity has biases of its own (Gated)."""
        self.W_dec = nnx.Param(W_dec, axes=("latent", "embed"))
        self.b_dec = nnx.Param(b_dec, axes=("embed",))
        self.W_skip = None if W_skip is None else nnx.Param(W_skip, axes=("embed", "embed"))

    @property
    def W_enc(self) -> Float[Array, "d m"]:
        return self.encoder[...].T

    @property
    def d(self) -> int:
        return self.encoder.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def latents(self) -> int:
        return self.encoder.shape[0]

    def normed(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """What the encoder reads of x, before b_dec is taken off."""
        x = x.astype(jnp.float32)
        return self.norm(x).x if self.norm else x

    def pre(self, x: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
        """Pre-activations."""
        read = self.normed(x)
        centred = read - along(self.b_dec[...], read) if self.centred else read
        z = einsum("...d,md->...m", centred, self.encoder[...])
        return z if self.b_enc is None else z + along(self.b_enc[...], z)

    def encode(self, x: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
        """Codes: the features' activations."""
        return self.sparsity(self.pre(x))

    def decode(self, codes: Float[Array, "*b m"], x: Float[Array, "*b d"] | None = None) -> Float[Array, "*b d_out"]:
        """The reconstruction. `x`, what was encoded, is needed where something of it goes past the codes: a norm that
        is to be undone, or a skip connection."""
        out = einsum("...m,md->...d", codes, self.W_dec[...])
        out = out + along(self.b_dec[...], out)
        if self.norm is None and self.W_skip is None:
            return out
        if x is None:
            raise ValueError("this dictionary decodes with its input at hand: decode(codes, x)")
        x = x.astype(jnp.float32)
        if self.W_skip is not None:
            out = out + einsum("...d,de->...e", self.normed(x), self.W_skip[...])
        if self.norm is not None:
            _, scale, shift = self.norm(x)
            out = out * scale + shift
        return out

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d_out"]:
        return self.decode(self.encode(x), x)


def init_sae(
    sparsity: Sparsity,
    latents: int,
    d: int,
    centre: Float[Array, "d_out"],
    key: Array,
    *,
    centred: bool = True,
    skip: bool = False,
    reads: float = 1.0,
) -> SAE:
    """Random unit decoder rows, the encoder their transpose times `reads`, zero encoder bias, `b_dec` at the centre of
    what is to be reconstructed (Gao et al. 2024, appendix A). A transcoder, which is not centred and whose two sides
    have other directions, begins with encoder rows of its own; a skip connection begins at zero."""
    d_out = len(centre)
    rows = _directions(key, latents, d_out)
    encoder = rows if centred else _directions(jax.random.fold_in(key, 1), latents, d)
    bias = None if sparsity.name == "gated" else jnp.zeros(latents)
    W_skip = jnp.zeros((d, d_out)) if skip else None
    return SAE(sparsity, reads * encoder.T, bias, rows, centre, centred, W_skip, transcodes=not centred)


def _directions(key: Array, n: int, d: int) -> Float[Array, "n d"]:
    rows = jax.random.normal(key, (n, d))
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


def unscaled(sae: SAE, of_input: Array, of_output: Array) -> SAE:
    """The dictionary for activations as the model gives them, from one for `x / of_input` and `y / of_output`:
    numbers, or vectors along d and d_out. Exact, because the map is homogeneous: codes grow by the input's mean scale.
    With one number for both, weights stay as they are and biases and thresholds are multiplied. A dictionary that takes
    b_dec off its input needs the same scale on both sides."""
    c = jnp.sqrt(jnp.mean(of_input**2))
    column = jnp.broadcast_to(of_input, (sae.d,))[:, None]
    row = jnp.broadcast_to(of_output, (sae.d_out,))[None]
    b_enc = None if sae.b_enc is None else sae.b_enc[...] * c
    W_skip = None if sae.W_skip is None else sae.W_skip[...] * (row / column)
    W_enc, W_dec, b_dec = sae.W_enc * (c / column), sae.W_dec[...] * (row / c), sae.b_dec[...] * row[0]
    return SAE(sae.sparsity.scaled(c), W_enc, b_enc, W_dec, b_dec, sae.centred, W_skip, sae.norm, sae.transcodes)


def folded_norms(sae: SAE) -> SAE:
    """The same dictionary with decoder rows of length 1: each row's length goes into its code, by the encoder."""
    rows = sae.W_dec[...]
    norms = jnp.linalg.norm(rows, axis=-1)
    norms = jnp.where(norms > 0, norms, 1)  # a row of zeros stays one
    b_enc = None if sae.b_enc is None else sae.b_enc[...] * norms
    W_skip = None if sae.W_skip is None else sae.W_skip[...]
    W_enc, W_dec = sae.W_enc * norms[None], rows / norms[:, None]
    return SAE(
        sae.sparsity.scaled(norms), W_enc, b_enc, W_dec, sae.b_dec[...], sae.centred, W_skip, sae.norm, sae.transcodes
    )


def with_sparsity(sae: SAE, sparsity: Sparsity) -> SAE:
    """The same weights with other codes."""
    new = jax.tree.map(lambda x: x, sae)
    # An attribute stays what it first was, data or static, unless it is told: a JumpReLU's place holds arrays.
    new.sparsity = nnx.data(sparsity) if isinstance(sparsity, nnx.Module) else nnx.static(sparsity)
    return new


def on_mesh(sae: SAE, mesh: Mesh) -> SAE:
    """The dictionary placed on a mesh, its latents cut over `model`."""
    return place(with_sparsity(sae, across(sae.sparsity, sae.latents, mesh)), mesh)


def recentred(sae: SAE, centred: bool) -> SAE:
    """The same function with b_dec taken off the input, or not: the other biases make up for it, exactly."""
    if sae.centred == centred:
        return sae
    moved = einsum("md,d->m", sae.encoder[...], sae.b_dec[...]) * (1 if centred else -1)
    b_enc, sparsity = sae.b_enc, sae.sparsity
    if isinstance(sparsity, Gated):
        r_mag = sparsity.r_mag[...]
        sparsity = Gated(sparsity.b_gate[...] + moved, sparsity.b_mag[...] + moved * jnp.exp(r_mag), r_mag)
    b_enc = None if b_enc is None else b_enc[...] + moved
    skip = None if sae.W_skip is None else sae.W_skip[...]
    return SAE(sparsity, sae.W_enc, b_enc, sae.W_dec[...], sae.b_dec[...], centred, skip, sae.norm, sae.transcodes)


def check_width(sae: SAE, width: int, point: str) -> None:
    """Refuse a dictionary that does not fit the activations it is to read."""
    if sae.transcodes:
        raise UserError(
            "the dictionary is a transcoder, which reconstructs other activations than it reads: give an SAE"
        )
    if sae.d != width:
        raise UserError(f"the dictionary is of width {sae.d}, but `{point}` has width {width}: take another point")
