"""Sparsities: from pre-activations to codes. One signature: `sparsity(pre: [*b, m]) -> codes [*b, m]`.

Those without parameters are plain values; JumpReLU and Gated hold theirs. `scaled(c)` is the sparsity for
pre-activations c times as large, c a number or one for each latent: what folding a scale into a dictionary needs.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from qsae_jax.products import along
from qsae_jax.sae.select import Chosen, largest, top_k
from qsae_jax.sae.sharded import divides, kept_of_batch, kept_of_rows


@dataclass(frozen=True)
class ReLU:
    """`max(pre, 0)` (Bricken et al. 2023; Cunningham et al. 2023, arXiv 2309.08600)."""

    name = "relu"

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        return jax.nn.relu(pre)

    def scaled(self, c: Array) -> "ReLU":
        return self


@dataclass(frozen=True)
class TopK:
    """The k largest pre-activations of a row, negative ones cut to zero (Gao et al. 2024, arXiv 2406.04093)."""

    k: int
    mesh: Mesh | None = None
    """Where latents are cut over `model`: the mesh."""
    name = "topk"

    def chosen(self, pre: Float[Array, "b m"]) -> Chosen:
        values, latents = top_k(pre, self.k)
        rows = jnp.broadcast_to(jnp.arange(len(pre), dtype=jnp.int32)[:, None], latents.shape)
        return Chosen(jax.nn.relu(values).reshape(-1), rows.reshape(-1), latents.reshape(-1))

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        rows = pre.reshape(-1, pre.shape[-1])
        if self.mesh is None:
            return self.chosen(rows).dense(*rows.shape).reshape(pre.shape)
        kept = kept_of_rows(jax.lax.stop_gradient(rows), self.k, self.mesh)
        return jnp.where(kept, jax.nn.relu(rows), 0).reshape(pre.shape)

    def scaled(self, c: Array) -> "TopK":
        return self


@dataclass(frozen=True)
class BatchTopK:
    """The k times as many largest pre-activations as the batch has rows, wherever they are (Bussmann et al. 2024,
    arXiv 2412.06410). A code depends on the whole batch: it is for training, and leaves as a JumpReLU."""

    k: float
    mesh: Mesh | None = None
    """Where latents are cut over `model`: the mesh."""
    name = "batchtopk"

    def _count(self, b: int) -> int:
        return max(int(self.k * b), 1)

    def chosen(self, pre: Float[Array, "b m"]) -> Chosen:
        b, m = pre.shape
        values, at = largest(pre, self._count(b))
        return Chosen(values, jnp.where(at >= 0, at // m, b - 1), jnp.where(at >= 0, at % m, m - 1))

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        rows = pre.reshape(-1, pre.shape[-1])
        if self.mesh is None or not divides(len(rows), rows.shape[1], self.mesh):
            return self.chosen(rows).dense(*rows.shape).reshape(pre.shape)
        kept = kept_of_batch(jax.lax.stop_gradient(rows), self._count(len(rows)), self.mesh)
        return jnp.where(kept, rows, 0).reshape(pre.shape)

    def scaled(self, c: Array) -> "BatchTopK":
        return self


@jax.custom_vjp
def jump(pre: Array, threshold: Array, bandwidth: float) -> Array:
    """`pre` where it is above the threshold and above 0, else 0.

    Backwards the pre-activation gets the hard mask, and the threshold `-(theta/eps) K((pre - theta)/eps)` with the
    rectangle K(u) = [|u| < 1/2] (Rajamanoharan et al. 2024, arXiv 2407.14435, equation 11). Codes are cut at zero in
    here: a ReLU on top would hide the lower half of the kernel, where codes are 0, from the threshold."""
    return jnp.where(pre > jnp.maximum(threshold, 0), pre, 0)


def _jump_forth(pre: Array, threshold: Array, bandwidth: float) -> tuple[Array, tuple]:
    return jump(pre, threshold, bandwidth), (pre, threshold, bandwidth)


def near(pre: Array, threshold: Array, bandwidth: float) -> Array:
    """The rectangle kernel: whether a pre-activation is within half a bandwidth of its threshold."""
    return jnp.abs(pre - threshold) < bandwidth / 2


def _jump_back(kept: tuple, g: Array) -> tuple[Array, Array, None]:
    pre, threshold, bandwidth = kept
    to_threshold = jnp.where(near(pre, threshold, bandwidth), -g * threshold / bandwidth, 0)
    return jnp.where(pre > jnp.maximum(threshold, 0), g, 0), jnp.sum(to_threshold, 0, keepdims=True), None


jump.defvjp(_jump_forth, _jump_back)


class JumpReLU(nnx.Module):
    """`pre` where it is above its latent's threshold (Rajamanoharan et al. 2024, arXiv 2407.14435).

    The parameter is the threshold itself, in float32: Adam moves the logarithm of a threshold by a share of it, and a
    small one stays where it began. It is kept at 0 or above by projection, see train.py. `bandwidth` is that of the
    straight-through gradient, in the scale of the activations that the dictionary is trained on."""

    name = "jumprelu"

    def __init__(self, threshold: Float[Array, "m"], bandwidth: float = 0.001):
        self.threshold = nnx.Param(jnp.asarray(threshold, jnp.float32), axes=("latent",))
        self.bandwidth = bandwidth

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        rows = pre.reshape(-1, pre.shape[-1])
        return jump(rows, self.threshold[...][None], self.bandwidth).reshape(pre.shape)

    def scaled(self, c: Array) -> "JumpReLU":
        return JumpReLU(self.threshold[...] * c, self.bandwidth)


class Gated(nnx.Module):
    """A latent is on where `pre + b_gate > 0`, and then has the size `relu(pre exp(r_mag) + b_mag)` (Rajamanoharan et
    al. 2024, arXiv 2404.16014). Its dictionary has no `b_enc`."""

    name = "gated"

    def __init__(self, b_gate: Float[Array, "m"], b_mag: Float[Array, "m"], r_mag: Float[Array, "m"]):
        self.b_gate = nnx.Param(jnp.asarray(b_gate, jnp.float32), axes=("latent",))
        self.b_mag = nnx.Param(jnp.asarray(b_mag, jnp.float32), axes=("latent",))
        self.r_mag = nnx.Param(jnp.asarray(r_mag, jnp.float32), axes=("latent",))

    def gate(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The gate's pre-activations, which the loss of training reads too."""
        return pre + along(self.b_gate[...], pre)

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        size = pre * along(jnp.exp(self.r_mag[...]), pre) + along(self.b_mag[...], pre)
        return jnp.where(self.gate(pre) > 0, jax.nn.relu(size), 0)

    def scaled(self, c: Array) -> "Gated":
        return Gated(self.b_gate[...] * c, self.b_mag[...] * c, self.r_mag[...])


Sparsity = ReLU | TopK | BatchTopK | JumpReLU | Gated


def across(sparsity: Sparsity, latents: int, mesh: Mesh) -> Sparsity:
    """The sparsity of a dictionary on a mesh: where its latents are cut, those that compare latents must know."""
    cut = mesh.shape["model"] > 1 and latents % mesh.shape["model"] == 0
    return replace(sparsity, mesh=mesh if cut else None) if isinstance(sparsity, TopK | BatchTopK) else sparsity
