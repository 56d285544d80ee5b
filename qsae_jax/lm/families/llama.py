"""Llama 2, 3 and 3.2, SmolLM2, Mistral, Qwen 2, 2.5 and 3: pre-norm RMSNorm, gated mlp, rotary positions."""

from typing import Any

import numpy as np

from qsae_jax.errors import UserError
from qsae_jax.lm.config import LMConfig
from qsae_jax.lm.families.facts import Facts, gguf_sizes, layer_windows, rope, rope_parameters
from qsae_jax.lm.families.table import Row
from qsae_jax.lm.rope import Rope, Slowed, turns

_HUB = "model.layers.{}."
TRUNK: tuple[Row, ...] = (
    ("model.embed_tokens.weight", "embed", "v d -> v d"),
    (_HUB + "input_layernorm.weight", "blocks.{}.attn_norm.scale", "d -> d"),
    (_HUB + "self_attn.q_proj.weight", "blocks.{}.attn.q", "(h k) d -> d h k"),
    (_HUB + "self_attn.k_proj.weight", "blocks.{}.attn.k", "(h k) d -> d h k"),
    (_HUB + "self_attn.v_proj.weight", "blocks.{}.attn.v", "(h k) d -> d h k"),
    (_HUB + "self_attn.o_proj.weight", "blocks.{}.attn.o", "d (h k) -> h k d"),
    (_HUB + "self_attn.q_proj.bias", "blocks.{}.attn.q_bias", "(h k) -> h k"),
    (_HUB + "self_attn.k_proj.bias", "blocks.{}.attn.k_bias", "(h k) -> h k"),
    (_HUB + "self_attn.v_proj.bias", "blocks.{}.attn.v_bias", "(h k) -> h k"),
    (_HUB + "self_attn.o_proj.bias", "blocks.{}.attn.o_bias", "d -> d"),
    (_HUB + "self_attn.q_norm.weight", "blocks.{}.attn.q_norm.scale", "k -> k"),
    (_HUB + "self_attn.k_norm.weight", "blocks.{}.attn.k_norm.scale", "k -> k"),
    (_HUB + "mlp.gate_proj.weight", "blocks.{}.mlp.gate", "f d -> d f"),
    (_HUB + "mlp.up_proj.weight", "blocks.{}.mlp.up", "f d -> d f"),
    (_HUB + "mlp.down_proj.weight", "blocks.{}.mlp.down", "d f -> f d"),
    (_HUB + "mlp.gate_proj.bias", "blocks.{}.mlp.gate_bias", "f -> f"),
    (_HUB + "mlp.up_proj.bias", "blocks.{}.mlp.up_bias", "f -> f"),
    (_HUB + "mlp.down_proj.bias", "blocks.{}.mlp.down_bias", "d -> d"),
    ("model.norm.weight", "final_norm.scale", "d -> d"),
    ("lm_head.weight", "head", "v d -> v d"),
)
ROWS: tuple[Row, ...] = (*TRUNK, (_HUB + "post_attention_layernorm.weight", "blocks.{}.mlp_norm.scale", "d -> d"))
IGNORED = r".*\.rotary_emb\.inv_freq"


def gguf_trunk(interleaved: bool) -> tuple[Row, ...]:
    """llama.cpp's names. `interleaved`: the rows of q and k, which rotary turns, have their two halves interleaved."""
    weight = "(h half two) d -> d h (two half)" if interleaved else "(h k) d -> d h k"
    bias = "(h half two) -> h (two half)" if interleaved else "(h k) -> h k"
    return (
        ("token_embd.weight", "embed", "v d -> v d"),
        ("blk.{}.attn_norm.weight", "blocks.{}.attn_norm.scale", "d -> d"),
        ("blk.{}.attn_q.weight", "blocks.{}.attn.q", weight),
        ("blk.{}.attn_k.weight", "blocks.{}.attn.k", weight),
        ("blk.{}.attn_v.weight", "blocks.{}.attn.v", "(h k) d -> d h k"),
        ("blk.{}.attn_output.weight", "blocks.{}.attn.o", "d (h k) -> h k d"),
        ("blk.{}.attn_q.bias", "blocks.{}.attn.q_bias", bias),
        ("blk.{}.attn_k.bias", "blocks.{}.attn.k_bias", bias),
        ("blk.{}.attn_v.bias", "blocks.{}.attn.v_bias", "(h k) -> h k"),
        ("blk.{}.attn_output.bias", "blocks.{}.attn.o_bias", "d -> d"),
        ("blk.{}.attn_q_norm.weight", "blocks.{}.attn.q_norm.scale", "k -> k"),
        ("blk.{}.attn_k_norm.weight", "blocks.{}.attn.k_norm.scale", "k -> k"),
        ("blk.{}.ffn_norm.weight", "blocks.{}.mlp_norm.scale", "d -> d"),
        ("blk.{}.ffn_gate.weight", "blocks.{}.mlp.gate", "f d -> d f"),
        ("blk.{}.ffn_up.weight", "blocks.{}.mlp.up", "f d -> d f"),
        ("blk.{}.ffn_down.weight", "blocks.{}.mlp.down", "d f -> f d"),
        ("blk.{}.ffn_gate.bias", "blocks.{}.mlp.gate_bias", "f -> f"),
        ("blk.{}.ffn_up.bias", "blocks.{}.mlp.up_bias", "f -> f"),
        ("blk.{}.ffn_down.bias", "blocks.{}.mlp.down_bias", "d -> d"),
        ("output_norm.weight", "final_norm.scale", "d -> d"),
        ("output.weight", "head", "v d -> v d"),
    )


# llama.cpp's converter interleaves them for Llama alone.
GGUF_ROWS = gguf_trunk(interleaved=True)
PLAIN_GGUF_ROWS = gguf_trunk(interleaved=False)
GGUF_IGNORED = r"rope_freqs\.weight"  # read as a fact


def sizes(facts: Facts, eps: float = 1e-6, context: int = 2048, kv_heads: int | None = None) -> dict[str, Any]:
    """What all configs of this form say, with transformers' defaults where a key may be left out."""
    d, heads = facts.take("hidden_size", int), facts.take("num_attention_heads", int)
    return {
        "vocab": facts.take("vocab_size", int),
        "d_model": d,
        "n_layers": facts.take("num_hidden_layers", int),
        "n_heads": heads,
        "n_kv_heads": facts.take("num_key_value_heads", int, kv_heads or heads),
        "d_ff": facts.take("intermediate_size", int),
        "norm_eps": facts.take("rms_norm_eps", float, eps),
        "context": facts.take("max_position_embeddings", int, context),
    }


def _made(facts: Facts, family: str, head_dim: int | None, shape: dict[str, Any], **features: Any) -> LMConfig:
    width = facts.take("head_dim", int, head_dim or shape["d_model"] // shape["n_heads"])
    tied = facts.take("tie_word_embeddings", bool, False)
    act = facts.activation("hidden_act", "silu")
    base = facts.take("rope_theta", float, 10000.0)
    turns = rope(facts.inner("rope_parameters"), facts.inner("rope_scaling"), width, base)
    rest = {"head_dim": width, "rope": turns, "tied": tied, "act": act, "score_scale": width**-0.5}
    return LMConfig(family=family, **shape, **rest, **features)


def llama(facts: Facts) -> LMConfig:
    """A `config.json` of model_type llama."""
    facts.only(rope_interleaved=False)
    biased = facts.take("attention_bias", bool, False)
    features = {"qkv_bias": biased, "o_bias": biased, "mlp_bias": facts.take("mlp_bias", bool, False)}
    return _made(facts, "llama", None, sizes(facts), **features)


def mistral(facts: Facts) -> LMConfig:
    """model_type mistral: every layer has the window; null, as from version 0.2 on, is none. transformers does not
    ask `layer_types`, so one that says otherwise is refused."""
    shape = sizes(facts, context=131_072, kv_heads=8)
    n, window = shape["n_layers"], facts.unless_null("sliding_window", int, 4096)
    facts.only(layer_types=["sliding_attention" if window else "full_attention"] * n)
    return _made(facts, "mistral", None, shape, windows=(window,) * n if window else ())


def _qwen(facts: Facts, family: str, head_dim: int | None, **features: Any) -> LMConfig:
    facts.only(use_mrope=False)
    shape = sizes(facts, context=32_768, kv_heads=32)
    window = facts.unless_null("sliding_window", int, 4096)
    window = window if facts.take("use_sliding_window", bool, False) else 0
    first, n = facts.get("max_window_layers"), shape["n_layers"]
    first = 28 if first is None else first
    default = [bool(window) and layer >= first for layer in range(n)]
    windows = layer_windows(facts, n, window, default)
    return _made(facts, family, head_dim, shape, windows=windows, **features)


def qwen2(facts: Facts) -> LMConfig:
    """model_type qwen2: Qwen 2 and 2.5, with biases on q, k and v."""
    return _qwen(facts, "qwen2", None, qkv_bias=True)


def qwen3(facts: Facts) -> LMConfig:
    """model_type qwen3: norms on queries and keys."""
    biased = facts.take("attention_bias", bool, False)
    return _qwen(facts, "qwen3", 128, qk_norm=True, qkv_bias=biased, o_bias=biased)


def gguf_shape(facts: Facts) -> dict[str, Any]:
    """The sizes of a GGUF file of this form, whose heads may have a width of their own and turn whole."""
    shape = gguf_sizes(facts, "attention.layer_norm_rms_epsilon")
    width = facts.take("attention.key_length", int, shape["head_dim"])
    facts.only(**{"attention.value_length": width, "rope.dimension_count": width})
    return shape | {"head_dim": width}


def gguf_rope(facts: Facts, dims: int) -> Rope:
    """The turns of a GGUF file: a base, and with Llama 3 a tensor of what each turn is divided by, which is read
    back as the rule that made it."""
    theta = facts.take("rope.freq_base", float, 10000.0)
    # llama.cpp takes a factor without a type as linear.
    kind, factor = facts.take("rope.scaling.type", str, "linear"), facts.take("rope.scaling.factor", float, 1.0)
    divisors = facts.get("rope_freqs")
    if kind not in ("none", "linear") or (kind == "linear" and factor != 1.0 and divisors is not None):
        raise UserError(
            f"GGUF key `rope.scaling.type` is {kind!r}: supported are none and linear, without `rope_freqs`"
        )
    if divisors is not None and (divisors.shape != (dims // 2,) or not (divisors > 0).all()):
        raise UserError(f"tensor `rope_freqs.weight` must hold {dims // 2} positive numbers: convert the file again")
    if divisors is None:
        return Rope(theta, dims, Slowed(factor) if kind == "linear" and factor != 1.0 else None)
    plain, slow = Rope(theta, dims), Slowed(float(np.max(divisors)), original=8192)
    made = Rope(theta, dims, slow)
    if not np.allclose(np.asarray(turns(plain)) / divisors, np.asarray(turns(made)), rtol=1e-4):
        raise UserError("tensor `rope_freqs.weight` does not follow Llama 3's rule (low 1, high 4, original 8192)")
    return made


def _gguf(facts: Facts, family: str, **features: Any) -> LMConfig:
    shape = gguf_shape(facts)
    width = shape["head_dim"]
    return LMConfig(
        family=family, **shape, rope=gguf_rope(facts, width), act="silu", score_scale=width**-0.5, **features
    )


def llama_gguf(facts: Facts) -> LMConfig:
    """GGUF metadata of architecture llama, which Mistral's files have too; llama.cpp gives it no window."""
    has = facts.get("tensors")
    features = {"qkv_bias": "blk.0.attn_q.bias" in has, "o_bias": "blk.0.attn_output.bias" in has}
    return _gguf(facts, "llama", mlp_bias="blk.0.ffn_up.bias" in has, **features)


def qwen2_gguf(facts: Facts) -> LMConfig:
    return _gguf(facts, "qwen2", qkv_bias=True)


def qwen3_gguf(facts: Facts) -> LMConfig:
    return _gguf(facts, "qwen3", qk_norm=True)


def export_sizes(c: LMConfig, kind: str, architecture: str) -> dict[str, Any]:
    """What all configs of this form say."""
    return {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": c.vocab,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.norm_eps,
        "max_position_embeddings": c.context,
        "tie_word_embeddings": c.tied,
    }


def _export(c: LMConfig, kind: str, architecture: str, **more: Any) -> dict[str, Any]:
    assert c.rope
    act = {"hidden_act": HUB_ACTIVATIONS[c.act], "rope_parameters": rope_parameters(c.rope)}
    return export_sizes(c, kind, architecture) | act | more


HUB_ACTIVATIONS = {"silu": "silu", "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def export_llama(c: LMConfig) -> dict[str, Any]:
    return _export(c, "llama", "LlamaForCausalLM", attention_bias=c.qkv_bias, mlp_bias=c.mlp_bias)


def export_mistral(c: LMConfig) -> dict[str, Any]:
    return _export(c, "mistral", "MistralForCausalLM", sliding_window=max(c.windows, default=None))


def _window_facts(c: LMConfig) -> dict[str, Any]:
    window = max(c.windows, default=0)
    kinds = ["sliding_attention" if c.window_of(layer) else "full_attention" for layer in range(c.n_layers)]
    return {"sliding_window": window or None, "use_sliding_window": bool(window), "layer_types": kinds}


def export_qwen2(c: LMConfig) -> dict[str, Any]:
    return _export(c, "qwen2", "Qwen2ForCausalLM", **_window_facts(c))


def export_qwen3(c: LMConfig) -> dict[str, Any]:
    return _export(c, "qwen3", "Qwen3ForCausalLM", attention_bias=c.qkv_bias, **_window_facts(c))
