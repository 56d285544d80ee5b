"""The parts of a decoder block: small nnx Modules, shapes in the annotations.

Weights are stored contraction axes first, in the layout the einsum reads: `q: d h k`, `o: h k d`, `up: d f`. What a
family lacks is None (a bias) or the function that changes nothing (a norm), decided when the module is made.
Dimensions: b batch, s sequence, d residual width, h heads, g key-value heads, k head width, f hidden
width of the mlp. Norms are computed in float32 whatever the dtype of the weights.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qsae_jax.lm.attend import attend
from qsae_jax.lm.config import LMConfig
from qsae_jax.lm.rope import rotary
from qsae_jax.products import einsum

Tap = Callable[[str, Array], Array]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class Linear(nnx.Param):
    """A linear map's weight `[in..., out...]`: what quantizers act on. Metadata: `axes`, and `n_in`, the number of
    leading dimensions that are contracted (flattened in order they are the input features of the stored matrix)."""


def linear(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], n_in: int = 1) -> Linear:
    fan_in = 1
    for n in shape[:n_in]:
        fan_in *= n
    return Linear(rngs.params.normal(shape) * fan_in**-0.5, axes=axes, n_in=n_in)


def bias(present: bool, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param | None:
    return nnx.Param(jnp.zeros(shape), axes=axes) if present else None


def plus(y: Float[Array, "*b n"], b: nnx.Param | None) -> Float[Array, "*b n"]:
    """y + b over the trailing dimensions; y where there is no bias."""
    return y if b is None else y + b[...].astype(y.dtype).reshape((1,) * (y.ndim - b.ndim) + b.shape)


def unchanged(x: Array) -> Array:
    return x


def _across(v: nnx.Param, ndim: int) -> Float[Array, "..."]:
    return v[...].astype(jnp.float32).reshape((1,) * (ndim - 1) + (-1,))


class RMSNorm(nnx.Module):
    """`(offset + scale) * x / sqrt(mean(x^2) + eps)` over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467);
    the offset is 1 in Gemma, whose files hold the scale less one."""

    def __init__(self, d: int, eps: float, offset: float = 0.0, axis: str = "embed"):
        self.scale = nnx.Param(jnp.full(d, 1.0 - offset), axes=(axis,))
        self.eps, self.offset = eps, offset

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * (self.offset + _across(self.scale, x.ndim))).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`scale * (x - mean(x)) / sqrt(var(x) + eps) + bias` over the last axis (Ba et al. 2016, arXiv 1607.06450)."""

    def __init__(self, d: int, eps: float):
        self.scale = nnx.Param(jnp.ones(d), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros(d), axes=("embed",))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * _across(self.scale, x.ndim) + _across(self.bias, x.ndim)).astype(x.dtype)


def stream_norm(c: LMConfig) -> RMSNorm | LayerNorm:
    """A norm of the residual stream, of the family's kind."""
    return LayerNorm(c.d_model, c.norm_eps) if c.layer_norm else RMSNorm(c.d_model, c.norm_eps, c.norm_offset)


class Attention(nnx.Module):
    """Grouped-query attention. q, k and v are tapped as they come from their matrices, before norms and rotary."""

    def __init__(self, c: LMConfig, layer: int, rngs: nnx.Rngs):
        d, h, g, k = c.d_model, c.n_heads, c.n_kv_heads, c.head_dim
        heads, groups = ("heads", "head_dim"), ("kv_heads", "head_dim")
        self.q = linear(rngs, (d, h, k), ("embed", *heads))
        self.k = linear(rngs, (d, g, k), ("embed", *groups))
        self.v = linear(rngs, (d, g, k), ("embed", *groups))
        self.o = linear(rngs, (h, k, d), (*heads, "embed"), n_in=2)
        self.q_bias = bias(c.qkv_bias, (h, k), heads)
        self.k_bias = bias(c.qkv_bias, (g, k), groups)
        self.v_bias = bias(c.qkv_bias, (g, k), groups)
        self.o_bias = bias(c.o_bias, (d,), ("embed",))
        self.q_norm, self.k_norm = (
            RMSNorm(k, c.norm_eps, c.norm_offset, "head_dim") if c.qk_norm else unchanged for _ in range(2)
        )
        self.rope, self.how = c.rope_of(layer), c.scores_of(layer)

    def __call__(self, x: Float[Array, "b s d"], tap: Tap) -> Float[Array, "b s d"]:
        q = tap("attn.q", plus(einsum("bsd,dhk->bshk", x, self.q[...]), self.q_bias))
        k = tap("attn.k", plus(einsum("bsd,dgk->bsgk", x, self.k[...]), self.k_bias))
        v = tap("attn.v", plus(einsum("bsd,dgk->bsgk", x, self.v[...]), self.v_bias))
        q, k = rotary(self.q_norm(q), self.rope), rotary(self.k_norm(k), self.rope)
        z = tap("attn.z", attend(q, k, v, self.how))
        return plus(einsum("bshk,hkd->bsd", z, self.o[...]), self.o_bias)


class GatedMLP(nnx.Module):
    """`down(act(gate x) * up x)` (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, c: LMConfig, rngs: nnx.Rngs):
        self.gate = linear(rngs, (c.d_model, c.d_ff), ("embed", "mlp"))
        self.up = linear(rngs, (c.d_model, c.d_ff), ("embed", "mlp"))
        self.down = linear(rngs, (c.d_ff, c.d_model), ("mlp", "embed"))
        self.gate_bias = bias(c.mlp_bias, (c.d_ff,), ("mlp",))
        self.up_bias = bias(c.mlp_bias, (c.d_ff,), ("mlp",))
        self.down_bias = bias(c.mlp_bias, (c.d_model,), ("embed",))
        self.act = ACTIVATIONS[c.act]

    def __call__(self, x: Float[Array, "b s d"], tap: Tap) -> Float[Array, "b s d"]:
        pre = tap("mlp.pre", plus(einsum("bsd,df->bsf", x, self.gate[...]), self.gate_bias))
        up = plus(einsum("bsd,df->bsf", x, self.up[...]), self.up_bias)
        post = tap("mlp.post", self.act(pre) * up)
        return plus(einsum("bsf,fd->bsd", post, self.down[...]), self.down_bias)


class PlainMLP(nnx.Module):
    """`down(act(up x))`."""

    def __init__(self, c: LMConfig, rngs: nnx.Rngs):
        self.up = linear(rngs, (c.d_model, c.d_ff), ("embed", "mlp"))
        self.down = linear(rngs, (c.d_ff, c.d_model), ("mlp", "embed"))
        self.up_bias = bias(c.mlp_bias, (c.d_ff,), ("mlp",))
        self.down_bias = bias(c.mlp_bias, (c.d_model,), ("embed",))
        self.act = ACTIVATIONS[c.act]

    def __call__(self, x: Float[Array, "b s d"], tap: Tap) -> Float[Array, "b s d"]:
        pre = tap("mlp.pre", plus(einsum("bsd,df->bsf", x, self.up[...]), self.up_bias))
        post = tap("mlp.post", self.act(pre))
        return plus(einsum("bsf,fd->bsd", post, self.down[...]), self.down_bias)
