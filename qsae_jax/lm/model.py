"""One transformer for every family: embed -> blocks -> unembed, with one `tap`.

LMConfig holds the facts in which families differ. Layers are unrolled: a tap that writes a dict leaks tracers
inside scan, remat or an inner jit, and early stopping needs the layers apart.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from qsae_jax.lm.layers import MLP, Attention, RMSNorm, Tap
from qsae_jax.products import einsum


@dataclass(frozen=True)
class LMConfig:
    """The shape of a model and its scalars, none of which has a default that could hide a missing fact."""

    family: str
    vocab: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float
    rope_theta: float
    tied: bool
    context: int
    """The longest window the model was trained for, in tokens."""


def identity(point: str, x: Array) -> Array:
    """The tap that listens to nothing."""
    return x


class Block(nnx.Module):
    """Attention and mlp, each reading a norm of the residual stream and adding to it."""

    def __init__(self, c: LMConfig, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(c.d_model, c.norm_eps)
        self.attn = Attention(c.d_model, c.n_heads, c.n_kv_heads, c.head_dim, c.rope_theta, rngs)
        self.mlp_norm = RMSNorm(c.d_model, c.norm_eps)
        self.mlp = MLP(c.d_model, c.d_ff, rngs)

    def __call__(self, x: Float[Array, "b s d"], tap: Tap) -> Float[Array, "b s d"]:
        x = tap("resid_pre", x)
        x = tap("resid_mid", x + tap("attn_out", self.attn(self.attn_norm(x), tap)))
        return tap("resid_post", x + tap("mlp_out", self.mlp(self.mlp_norm(x), tap)))


class LM(nnx.Module):
    """A decoder-only language model. `lm(tokens)` gives float32 logits `[b, s, vocab]`."""

    def __init__(self, config: LMConfig, rngs: nnx.Rngs):
        shape = (config.vocab, config.d_model)
        self.config = config
        self.embed = nnx.Param(rngs.params.normal(shape) * config.d_model**-0.5, axes=("vocab", "embed"))
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.n_layers)])
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        if not config.tied:
            head = rngs.params.normal(shape) * config.d_model**-0.5
            self.head = nnx.Param(head, axes=("vocab", "embed"))

    def hidden(self, tokens: Int[Array, "b s"], tap: Tap = identity) -> Float[Array, "b s d"]:
        """The residual stream after the last norm: what the unembedding reads."""
        x = tap("embed", jnp.take(self.embed[...], tokens, axis=0))
        for layer, block in enumerate(self.blocks):
            x = block(x, lambda site, y, at=f"blocks.{layer}.": tap(at + site, y))
        return tap("final", self.final_norm(x))

    def unembed(self, x: Float[Array, "*b d"]) -> Float32[Array, "*b vocab"]:
        """Logits. A tied head is the embedding itself, used and not shared, so the tree has no shared leaves."""
        head = self.embed if self.config.tied else self.head
        return einsum("...d,vd->...v", x, head[...], preferred_element_type=jnp.float32)

    def __call__(self, tokens: Int[Array, "b s"], tap: Tap = identity) -> Float32[Array, "b s vocab"]:
        return self.unembed(self.hidden(tokens, tap))


def count_parameters(lm: LM) -> int:
    """How many numbers the model holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(lm, nnx.Param)))
