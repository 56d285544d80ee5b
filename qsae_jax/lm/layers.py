"""The parts of a decoder block: small nnx Modules, shapes in the annotations.

Weights are stored contraction axes first, in the layout the einsum reads: `q: d h k`, `o: h k d`, `up: d f`.
Dimensions: b batch, s sequence, d residual width, h heads, g key-value heads, k head width, f hidden
width of the mlp. Norms are computed in float32 whatever the dtype of the weights.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qsae_jax.lm.attend import attend
from qsae_jax.products import einsum

Tap = Callable[[str, Array], Array]


class Linear(nnx.Param):
    """A linear map's weight `[in..., out...]`: what quantizers act on. Metadata: `axes`, and `n_in`, the number of
    leading dimensions that are contracted (flattened in order they are the input features of the stored matrix)."""


def linear(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], n_in: int = 1) -> Linear:
    fan_in = 1
    for n in shape[:n_in]:
        fan_in *= n
    return Linear(rngs.params.normal(shape) * fan_in**-0.5, axes=axes, n_in=n_in)


class RMSNorm(nnx.Module):
    """`scale * x / sqrt(mean(x^2) + eps)` over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, d: int, eps: float):
        self.scale = nnx.Param(jnp.ones(d), axes=("embed",))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def rotary(x: Float[Array, "b s h k"], theta: float) -> Float[Array, "b s h k"]:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves rotated against each other as in
    Hugging Face's Llama: coordinate i pairs with i + k/2 and turns by position * theta^(-2i/k)."""
    s, k = x.shape[1], x.shape[-1]
    turn = 1.0 / theta ** (jnp.arange(0, k, 2, dtype=jnp.float32) / k)
    angle = jnp.arange(s, dtype=jnp.float32)[:, None] * turn[None, :]
    cos, sin = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions, no biases."""

    def __init__(self, d: int, heads: int, kv_heads: int, width: int, theta: float, rngs: nnx.Rngs):
        self.q = linear(rngs, (d, heads, width), ("embed", "heads", "head_dim"))
        self.k = linear(rngs, (d, kv_heads, width), ("embed", "kv_heads", "head_dim"))
        self.v = linear(rngs, (d, kv_heads, width), ("embed", "kv_heads", "head_dim"))
        self.o = linear(rngs, (heads, width, d), ("heads", "head_dim", "embed"), n_in=2)
        self.theta = theta

    def __call__(self, x: Float[Array, "b s d"], tap: Tap) -> Float[Array, "b s d"]:
        q = tap("attn.q", einsum("bsd,dhk->bshk", x, self.q[...]))
        k = tap("attn.k", einsum("bsd,dgk->bsgk", x, self.k[...]))
        v = tap("attn.v", einsum("bsd,dgk->bsgk", x, self.v[...]))
        z = tap("attn.z", attend(rotary(q, self.theta), rotary(k, self.theta), v))
        return einsum("bshk,hkd->bsd", z, self.o[...])


class MLP(nnx.Module):
    """SwiGLU, `down(silu(gate x) * up x)` (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, d: int, f: int, rngs: nnx.Rngs):
        self.gate = linear(rngs, (d, f), ("embed", "mlp"))
        self.up = linear(rngs, (d, f), ("embed", "mlp"))
        self.down = linear(rngs, (f, d), ("mlp", "embed"))

    def __call__(self, x: Float[Array, "b s d"], tap: Tap) -> Float[Array, "b s d"]:
        pre = tap("mlp.pre", einsum("bsd,df->bsf", x, self.gate[...]))
        post = tap("mlp.post", jax.nn.silu(pre) * einsum("bsd,df->bsf", x, self.up[...]))
        return einsum("bsf,fd->bsd", post, self.down[...])
