"""GPT-NeoX and Pythia (arXiv 2204.06745, 2304.01373): LayerNorm, attention and mlp in parallel or not, rotary on a part
of each head, q, k and v in one matrix, interleaved by head."""

from typing import Any

from qsae_jax.errors import UserError
from qsae_jax.lm.config import LMConfig
from qsae_jax.lm.families.facts import Facts, gguf_sizes, rope, rope_parameters
from qsae_jax.lm.families.gpt2 import GGUF_ROWS as GPT2_GGUF_ROWS
from qsae_jax.lm.families.table import Row
from qsae_jax.lm.rope import Rope

_HUB = "gpt_neox.layers.{}."
ROWS: tuple[Row, ...] = (
    ("gpt_neox.embed_in.weight", "embed", "v d -> v d"),
    (_HUB + "input_layernorm.weight", "blocks.{}.attn_norm.scale", "d -> d"),
    (_HUB + "input_layernorm.bias", "blocks.{}.attn_norm.bias", "d -> d"),
    (_HUB + "attention.query_key_value.weight", "blocks.{}.attn.q|k|v", "(h three k) d -> three d h k"),
    (_HUB + "attention.query_key_value.bias", "blocks.{}.attn.(q|k|v)_bias", "(h three k) -> three h k"),
    (_HUB + "attention.dense.weight", "blocks.{}.attn.o", "d (h k) -> h k d"),
    (_HUB + "attention.dense.bias", "blocks.{}.attn.o_bias", "d -> d"),
    (_HUB + "post_attention_layernorm.weight", "blocks.{}.mlp_norm.scale", "d -> d"),
    (_HUB + "post_attention_layernorm.bias", "blocks.{}.mlp_norm.bias", "d -> d"),
    (_HUB + "mlp.dense_h_to_4h.weight", "blocks.{}.mlp.up", "f d -> d f"),
    (_HUB + "mlp.dense_h_to_4h.bias", "blocks.{}.mlp.up_bias", "f -> f"),
    (_HUB + "mlp.dense_4h_to_h.weight", "blocks.{}.mlp.down", "d f -> f d"),
    (_HUB + "mlp.dense_4h_to_h.bias", "blocks.{}.mlp.down_bias", "d -> d"),
    ("gpt_neox.final_layer_norm.weight", "final_norm.scale", "d -> d"),
    ("gpt_neox.final_layer_norm.bias", "final_norm.bias", "d -> d"),
    ("embed_out.weight", "head", "v d -> v d"),
    ("lm_head.weight", "head", "v d -> v d"),  # as GPTNeoXForCausalLM of newer transformers may name it
)
IGNORED = r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"
# llama.cpp's converter puts q, k and v one after the other, as GPT-2 has them; there are no learned positions.
GGUF_ROWS = tuple(row for row in GPT2_GGUF_ROWS if row[1] != "positions")


def neox(facts: Facts) -> LMConfig:
    """A `config.json` of model_type gpt_neox."""
    d, heads = facts.take("hidden_size", int, 6144), facts.take("num_attention_heads", int, 64)
    table, width = facts.inner("rope_parameters"), d // heads
    share = table.take("partial_rotary_factor", float, facts.take("rotary_pct", float, 0.25))
    theta, dims = facts.take("rotary_emb_base", float, 10000.0), _rotated(int(width * share))
    turns = rope(table, facts.inner("rope_scaling"), dims, theta)
    # Written beside the keys that transformers reads, by some of its versions.
    facts.only(rope_theta=turns.theta, partial_rotary_factor=share)
    shape = {
        "vocab": facts.take("vocab_size", int, 50432),
        "d_model": d,
        "n_layers": facts.take("num_hidden_layers", int, 44),
        "n_heads": heads,
        "n_kv_heads": heads,
        "head_dim": width,
        "d_ff": facts.take("intermediate_size", int, 24576),
        "norm_eps": facts.take("layer_norm_eps", float, 1e-5),
        "tied": facts.take("tie_word_embeddings", bool, False),
        "context": facts.take("max_position_embeddings", int, 2048),
    }
    return _made(facts, shape, turns, facts.activation("hidden_act", "gelu"), facts.take("attention_bias", bool, True))


def _rotated(dims: int) -> int:
    if dims < 2 or dims % 2:
        raise UserError(f"config: rotary positions on {dims} of a head's coordinates, expected an even number")
    return dims


def _made(facts: Facts, shape: dict[str, Any], turns: Rope, act: str, biased: bool) -> LMConfig:
    return LMConfig(
        family="gpt_neox",
        **shape,
        rope=turns,
        act=act,
        score_scale=shape["head_dim"] ** -0.5,
        parallel=facts.take("use_parallel_residual", bool, True),
        layer_norm=True,
        gated=False,
        qkv_bias=biased,
        o_bias=biased,
        mlp_bias=True,
    )


def neox_gguf(facts: Facts) -> LMConfig:
    """GGUF metadata of architecture gptneox, which does not name the activation: the exact GELU of Pythia, and
    of GPT-NeoX-20B, the one model of 44 layers, its tanh form."""
    shape = gguf_sizes(facts, "attention.layer_norm_epsilon")
    dims, theta = facts.take("rope.dimension_count", int), facts.take("rope.freq_base", float, 10000.0)
    act, biased = "gelu_tanh" if shape["n_layers"] == 44 else "gelu", "blk.0.attn_qkv.bias" in facts.get("tensors")
    return _made(facts, shape, Rope(theta, _rotated(dims)), act, biased)


def export_neox(c: LMConfig) -> dict[str, Any]:
    assert c.rope
    share = c.rope.dims / c.head_dim
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": c.vocab,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "intermediate_size": c.d_ff,
        "layer_norm_eps": c.norm_eps,
        "rope_parameters": rope_parameters(c.rope) | {"partial_rotary_factor": share},
        "max_position_embeddings": c.context,
        "hidden_act": {"gelu_tanh": "gelu_new"}.get(c.act, c.act),
        "use_parallel_residual": c.parallel,
        "attention_bias": c.qkv_bias,
        "tie_word_embeddings": c.tied,
    }
