"""GPT-2: LayerNorm, learned positions, biases everywhere, q, k and v in one matrix."""

from typing import Any

from qsae_jax.lm.config import LMConfig
from qsae_jax.lm.families.facts import Facts, gguf_sizes
from qsae_jax.lm.families.table import Row

_HUB = "transformer.h.{}."
# Its Conv1D holds matrices [in, out], as ours are.
ROWS: tuple[Row, ...] = (
    ("transformer.wte.weight", "embed", "v d -> v d"),
    ("transformer.wpe.weight", "positions", "s d -> s d"),
    (_HUB + "ln_1.weight", "blocks.{}.attn_norm.scale", "d -> d"),
    (_HUB + "ln_1.bias", "blocks.{}.attn_norm.bias", "d -> d"),
    (_HUB + "attn.c_attn.weight", "blocks.{}.attn.q|k|v", "d (three h k) -> three d h k"),
    (_HUB + "attn.c_attn.bias", "blocks.{}.attn.(q|k|v)_bias", "(three h k) -> three h k"),
    (_HUB + "attn.c_proj.weight", "blocks.{}.attn.o", "(h k) d -> h k d"),
    (_HUB + "attn.c_proj.bias", "blocks.{}.attn.o_bias", "d -> d"),
    (_HUB + "ln_2.weight", "blocks.{}.mlp_norm.scale", "d -> d"),
    (_HUB + "ln_2.bias", "blocks.{}.mlp_norm.bias", "d -> d"),
    (_HUB + "mlp.c_fc.weight", "blocks.{}.mlp.up", "d f -> d f"),
    (_HUB + "mlp.c_fc.bias", "blocks.{}.mlp.up_bias", "f -> f"),
    (_HUB + "mlp.c_proj.weight", "blocks.{}.mlp.down", "f d -> f d"),
    (_HUB + "mlp.c_proj.bias", "blocks.{}.mlp.down_bias", "d -> d"),
    ("transformer.ln_f.weight", "final_norm.scale", "d -> d"),
    ("transformer.ln_f.bias", "final_norm.bias", "d -> d"),
    ("lm_head.weight", "head", "v d -> v d"),
)
# The causal mask, stored as a buffer.
IGNORED = r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"
GGUF_ROWS: tuple[Row, ...] = (
    ("token_embd.weight", "embed", "v d -> v d"),
    ("position_embd.weight", "positions", "s d -> s d"),
    ("blk.{}.attn_norm.weight", "blocks.{}.attn_norm.scale", "d -> d"),
    ("blk.{}.attn_norm.bias", "blocks.{}.attn_norm.bias", "d -> d"),
    ("blk.{}.attn_qkv.weight", "blocks.{}.attn.q|k|v", "(three h k) d -> three d h k"),
    ("blk.{}.attn_qkv.bias", "blocks.{}.attn.(q|k|v)_bias", "(three h k) -> three h k"),
    ("blk.{}.attn_output.weight", "blocks.{}.attn.o", "d (h k) -> h k d"),
    ("blk.{}.attn_output.bias", "blocks.{}.attn.o_bias", "d -> d"),
    ("blk.{}.ffn_norm.weight", "blocks.{}.mlp_norm.scale", "d -> d"),
    ("blk.{}.ffn_norm.bias", "blocks.{}.mlp_norm.bias", "d -> d"),
    ("blk.{}.ffn_up.weight", "blocks.{}.mlp.up", "f d -> d f"),
    ("blk.{}.ffn_up.bias", "blocks.{}.mlp.up_bias", "f -> f"),
    ("blk.{}.ffn_down.weight", "blocks.{}.mlp.down", "d f -> f d"),
    ("blk.{}.ffn_down.bias", "blocks.{}.mlp.down_bias", "d -> d"),
    ("output_norm.weight", "final_norm.scale", "d -> d"),
    ("output_norm.bias", "final_norm.bias", "d -> d"),
    ("output.weight", "head", "v d -> v d"),
)
BIASED: dict[str, Any] = {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "layer_norm": True, "gated": False}


def gpt2(facts: Facts) -> LMConfig:
    """A `config.json` of model_type gpt2."""
    facts.only(scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    d, heads = facts.take("n_embd", int, 768), facts.take("n_head", int, 12)
    return LMConfig(
        family="gpt2",
        vocab=facts.take("vocab_size", int, 50257),
        d_model=d,
        n_layers=facts.take("n_layer", int, 12),
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=d // heads,
        d_ff=facts.take("n_inner", int, 4 * d),
        norm_eps=facts.take("layer_norm_epsilon", float, 1e-5),
        rope=None,
        tied=facts.take("tie_word_embeddings", bool, True),
        context=facts.take("n_positions", int, 1024),
        act=facts.activation("activation_function", "gelu_new"),
        score_scale=(d // heads) ** -0.5 if facts.take("scale_attn_weights", bool, True) else 1.0,
        **BIASED,
    )


def gpt2_gguf(facts: Facts) -> LMConfig:
    shape = gguf_sizes(facts, "attention.layer_norm_epsilon")
    return LMConfig(family="gpt2", **shape, rope=None, act="gelu_tanh", score_scale=shape["head_dim"] ** -0.5, **BIASED)


def export_gpt2(c: LMConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": c.vocab,
        "n_embd": c.d_model,
        "n_layer": c.n_layers,
        "n_head": c.n_heads,
        "n_inner": c.d_ff,
        "n_positions": c.context,
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(c.act, c.act),
        "scale_attn_weights": c.score_scale != 1.0,
        "tie_word_embeddings": c.tied,
    }
