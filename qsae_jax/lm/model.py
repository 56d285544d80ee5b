"""One transformer for every family: embed -> blocks -> unembed, with one `tap`.

LMConfig holds the facts in which families differ. Layers are unrolled: a tap that writes a dict leaks tracers
inside scan, remat or an inner jit, and early stopping needs the layers apart.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from qsae_jax.errors import UserError
from qsae_jax.lm.attend import softcap
from qsae_jax.lm.config import LMConfig
from qsae_jax.lm.layers import Attention, GatedMLP, PlainMLP, RMSNorm, Tap, bias, plus, stream_norm, unchanged
from qsae_jax.products import einsum


def identity(point: str, x: Array) -> Array:
    """The tap that listens to nothing."""
    return x


class Block(nnx.Module):
    """Attention and mlp, each reading a norm of the residual stream and adding to it."""

    def __init__(self, c: LMConfig, layer: int, rngs: nnx.Rngs):
        def post_norm() -> nnx.Module:
            return RMSNorm(c.d_model, c.norm_eps, c.norm_offset)

        self.attn_norm = stream_norm(c)
        self.attn = Attention(c, layer, rngs)
        self.attn_post = post_norm() if c.post_norms else unchanged
        self.mlp_norm = stream_norm(c)
        self.mlp = GatedMLP(c, rngs) if c.gated else PlainMLP(c, rngs)
        self.mlp_post = post_norm() if c.post_norms else unchanged

    def _attn(self, x: Float[Array, "b s d"], tap: Tap) -> Float[Array, "b s d"]:
        return tap("attn_out", self.attn_post(self.attn(self.attn_norm(x), tap)))

    def _mlp(self, x: Float[Array, "b s d"], tap: Tap) -> Float[Array, "b s d"]:
        return tap("mlp_out", self.mlp_post(self.mlp(self.mlp_norm(x), tap)))

    def __call__(self, x: Float[Array, "b s d"], tap: Tap) -> Float[Array, "b s d"]:
        x = tap("resid_pre", x)
        x = tap("resid_mid", x + self._attn(x, tap))
        return tap("resid_post", x + self._mlp(x, tap))


class ParallelBlock(Block):
    """Attention and mlp read the same stream (GPT-J, GPT-NeoX): there is no residual stream between them."""

    def __call__(self, x: Float[Array, "b s d"], tap: Tap) -> Float[Array, "b s d"]:
        x = tap("resid_pre", x)
        return tap("resid_post", x + self._attn(x, tap) + self._mlp(x, tap))


def _positions(c: LMConfig, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(rngs.params.normal((c.context, c.d_model)) * c.d_model**-0.5, axes=(None, "embed"))


class LM(nnx.Module):
    """A decoder-only language model. `lm(tokens)` gives float32 logits `[b, s, vocab]`."""

    def __init__(self, config: LMConfig, rngs: nnx.Rngs):
        c, shape = config, (config.vocab, config.d_model)
        self.config = c
        self.embed = nnx.Param(rngs.params.normal(shape) * c.d_model**-0.5, axes=("vocab", "embed"))
        self.positions = None if c.rope else _positions(c, rngs)
        block = ParallelBlock if c.parallel else Block
        self.blocks = nnx.List([block(c, layer, rngs) for layer in range(c.n_layers)])
        self.final_norm = stream_norm(c)
        if not c.tied:
            self.head = nnx.Param(rngs.params.normal(shape) * c.d_model**-0.5, axes=("vocab", "embed"))
        self.head_bias = bias(c.head_bias, (c.vocab,), ("vocab",))

    def embedded(self, tokens: Int[Array, "b s"], tap: Tap) -> Float[Array, "b s d"]:
        """What the first block reads: the point `embed`, and learned positions added after it."""
        x = jnp.take(self.embed[...], tokens, axis=0)
        x = tap("embed", x * jnp.asarray(self.config.embed_scale, x.dtype))
        if self.positions is None:
            return x
        if (s := tokens.shape[1]) > self.config.context:
            raise UserError(f"windows of {s} tokens, but the model has {self.config.context} positions: lower --seq")
        return x + self.positions[:s][None]

    def hidden(self, tokens: Int[Array, "b s"], tap: Tap = identity) -> Float[Array, "b s d"]:
        """The residual stream after the last norm: what the unembedding reads."""
        x = self.embedded(tokens, tap)
        for layer, block in enumerate(self.blocks):
            x = block(x, lambda site, y, at=f"blocks.{layer}.": tap(at + site, y))
        return tap("final", self.final_norm(x))

    def unembed(self, x: Float[Array, "*b d"]) -> Float32[Array, "*b vocab"]:
        """Logits. A tied head is the embedding itself, used and not shared, so the tree has no shared leaves."""
        head = self.embed if self.config.tied else self.head
        logits = einsum("...d,vd->...v", x, head[...], preferred_element_type=jnp.float32)
        return softcap(plus(logits, self.head_bias), self.config.logit_cap)

    def __call__(self, tokens: Int[Array, "b s"], tap: Tap = identity) -> Float32[Array, "b s vocab"]:
        return self.unembed(self.hidden(tokens, tap))


def count_parameters(lm: LM) -> int:
    """How many numbers the model holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(lm, nnx.Param)))
