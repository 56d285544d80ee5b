"""TransformerLens's processing of weights, under which many published dictionaries were trained.

`transformer_lens` is what `HookedTransformer.from_pretrained` does by default (TransformerLens 3.9, compared with it in
tests/peers). Probabilities stay what they were; activations and weights do not, so it is recorded with every result:

1. the scale and bias of each norm before attention, mlp and head are folded into the matrices that read it, and with
   LayerNorm these matrices lose their mean over the residual width, which a normed stream cannot see;
2. with LayerNorm, all that writes to the residual stream loses its mean over the residual width: this moves every
   point of the stream;
3. the head loses its mean over the vocabulary (not under a cap on logits, which would notice);
4. the biases of values go into the bias of the output matrix, because attention weights sum to one.

RMSNorm models keep their stream: of theirs only the norms' scales, the head and value biases move. Norms after
attention and mlp, and those of queries and keys, stay.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from qsae_jax.errors import UserError, nearest
from qsae_jax.lm.config import LMConfig
from qsae_jax.lm.layers import LayerNorm, RMSNorm
from qsae_jax.lm.model import LM, Block
from qsae_jax.mesh import place
from qsae_jax.products import einsum

PROCESSINGS = ("none", "transformer_lens")
Norm = LayerNorm | RMSNorm


def check_processing(name: str) -> str:
    """The name of a processing that there is."""
    if name not in PROCESSINGS:
        raise UserError(f"unknown processing `{name}`{nearest(name, PROCESSINGS)}; possible: {', '.join(PROCESSINGS)}")
    return name


def moves(c: LMConfig, site: str) -> bool:
    """Whether the processing changes the activations at a site: with LayerNorm all but what reads a norm and is not
    a value; with RMSNorm what leaves the last norm, and values that had a bias."""
    if c.layer_norm:
        return site not in ("attn.q", "attn.k", "mlp.pre", "mlp.post")
    return site == "final" or (site in ("attn.v", "attn.z") and c.qkv_bias)


def process(lm: LM, name: str, mesh: Mesh) -> LM:
    """The model under one of PROCESSINGS, on the mesh; the one given is untouched."""
    if check_processing(name) == "none":
        return lm
    dtype = lm.embed[...].dtype
    new = as_transformer_lens(_cast(lm, jnp.float32))
    return place(_cast(new, dtype), mesh)


def _cast(lm: LM, dtype: Any) -> LM:
    graph, state = nnx.split(lm)
    return nnx.merge(graph, jax.tree.map(lambda x: x.astype(dtype), state))


def as_transformer_lens(lm: LM) -> LM:
    """The float32 model, changed as TransformerLens changes it by default. It is changed in place."""
    c = lm.config
    layer_norm, valued = c.layer_norm, c.qkv_bias or c.layer_norm
    biases = {"qkv_bias": valued, "o_bias": c.o_bias or valued, "mlp_bias": c.mlp_bias or layer_norm}
    lm.config = replace(c, tied=False, head_bias=layer_norm, processing="transformer_lens", **biases)
    for block in lm.blocks:
        _fold_block(block)
        if layer_norm:
            _centre_writing(block)
        _fold_value_bias(block)
    _fold_head(lm, lm.embed if c.tied else lm.head)
    for written in (lm.embed, lm.positions) if layer_norm else ():
        _centre(written, -1)
    return lm


def _centre(v: nnx.Param | None, axis: int) -> None:
    """Take the mean over an axis out of a weight that is there."""
    if v is not None:
        v.set_value(v[...] - jnp.mean(v[...], axis=axis, keepdims=True))


def _absorbed(norm: Norm, w: nnx.Param) -> Float[Array, "..."] | None:
    """Fold a norm into a matrix `[d, ...]` that reads it; gives what a LayerNorm's bias adds behind the matrix."""
    old = w[...]
    offset = norm.offset if isinstance(norm, RMSNorm) else 0.0
    w.set_value(old * (offset + norm.scale[...]).reshape((-1,) + (1,) * (old.ndim - 1)))
    if isinstance(norm, RMSNorm):
        return None
    _centre(w, 0)
    return einsum("d,d...->...", norm.bias[...], old)


def _plain(norm: Norm) -> None:
    """Leave the norm without weights of its own."""
    offset = norm.offset if isinstance(norm, RMSNorm) else 0.0
    norm.scale.set_value(jnp.full_like(norm.scale[...], 1.0 - offset))
    if isinstance(norm, LayerNorm):
        norm.bias.set_value(jnp.zeros_like(norm.bias[...]))


def _add_bias(part: nnx.Module, name: str, added: Float[Array, "..."] | None, axes: tuple[str, ...]) -> None:
    """Add to a bias, which is made where the part has none."""
    old = getattr(part, name)
    if added is None:
        return
    # A Param may take the place of a None only when it is declared to be data.
    setattr(part, name, nnx.data(nnx.Param(added if old is None else old[...] + added, axes=axes)))


def _fold_block(block: Block) -> None:
    attn, mlp = block.attn, block.mlp
    for name, heads in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads")):
        _add_bias(attn, f"{name}_bias", _absorbed(block.attn_norm, getattr(attn, name)), (heads, "head_dim"))
    for name in ("gate", "up") if hasattr(mlp, "gate") else ("up",):
        _add_bias(mlp, f"{name}_bias", _absorbed(block.mlp_norm, getattr(mlp, name)), ("mlp",))
    _plain(block.attn_norm)
    _plain(block.mlp_norm)


def _centre_writing(block: Block) -> None:
    for written in (block.attn.o, block.attn.o_bias, block.mlp.down, block.mlp.down_bias):
        _centre(written, -1)


def _fold_value_bias(block: Block) -> None:
    attn = block.attn
    if attn.v_bias is None:
        return
    o, v = attn.o[...], attn.v_bias[...]
    added = einsum("hk,hkd->d", jnp.repeat(v, o.shape[0] // v.shape[0], axis=0), o)
    _add_bias(attn, "o_bias", added, ("embed",))
    attn.v_bias.set_value(jnp.zeros_like(v))


def _fold_head(lm: LM, read: nnx.Param) -> None:
    """The final norm into the head, which is its own from here on; then the head without its mean."""
    head = nnx.Param(read[...].T, axes=("embed", "vocab"))
    added = _absorbed(lm.final_norm, head)
    lm.head = nnx.data(nnx.Param(head[...].T, axes=("vocab", "embed")))
    _add_bias(lm, "head_bias", added, ("vocab",))
    _plain(lm.final_norm)
    if not lm.config.logit_cap:
        _centre(lm.head, 0)
        _centre(lm.head_bias, 0)
