"""Gemma 2 (arXiv 2408.00118) and the text model of Gemma 3 (arXiv 2503.19786): scales stored less one, norms before
and after, scaled embeddings, windows in most layers; caps on scores and logits (2), norms on queries and keys and a
rotary base of their own for windows (3)."""

from typing import Any

from qsae_jax.lm.config import LMConfig
from qsae_jax.lm.families.facts import Facts, layer_windows, rope, rope_parameters
from qsae_jax.lm.families.llama import HUB_ACTIVATIONS, TRUNK, export_sizes, gguf_rope, gguf_shape, gguf_trunk, sizes
from qsae_jax.lm.families.table import Row
from qsae_jax.lm.rope import Rope

_HUB = "model.layers.{}."
ROWS: tuple[Row, ...] = (
    *TRUNK,
    (_HUB + "post_attention_layernorm.weight", "blocks.{}.attn_post.scale", "d -> d"),
    (_HUB + "pre_feedforward_layernorm.weight", "blocks.{}.mlp_norm.scale", "d -> d"),
    (_HUB + "post_feedforward_layernorm.weight", "blocks.{}.mlp_post.scale", "d -> d"),
)
GGUF_ROWS: tuple[Row, ...] = (
    *gguf_trunk(interleaved=False),
    ("blk.{}.post_attention_norm.weight", "blocks.{}.attn_post.scale", "d -> d"),
    ("blk.{}.post_ffw_norm.weight", "blocks.{}.mlp_post.scale", "d -> d"),
)
ALIKE: dict[str, Any] = {"norm_offset": 1.0, "post_norms": True}


def _pattern(layers: int, every: int) -> list[bool]:
    """All layers but each `every`-th have a window."""
    return [(layer + 1) % every > 0 for layer in range(layers)]


def _shared(facts: Facts, kv_heads: int, context: int) -> dict[str, Any]:
    facts.only(use_bidirectional_attention=False)
    shape = sizes(facts, context=context, kv_heads=kv_heads)
    biased = facts.take("attention_bias", bool, False)
    # Early files name the activation under another key too, which transformers does not read.
    facts.get("hidden_act")
    return shape | ALIKE | {
        "head_dim": facts.take("head_dim", int, 256),
        "tied": facts.take("tie_word_embeddings", bool, True),
        "act": facts.activation("hidden_activation", "gelu_pytorch_tanh"),
        "score_scale": facts.take("query_pre_attn_scalar", float, 256.0) ** -0.5,
        "embed_scale": shape["d_model"] ** 0.5,
        "qkv_bias": biased,
        "o_bias": biased,
    }  # fmt: skip


def gemma2(facts: Facts) -> LMConfig:
    """A `config.json` of model_type gemma2."""
    shape = _shared(facts, kv_heads=4, context=8192)
    n, base = shape["n_layers"], facts.take("rope_theta", float, 10000.0)
    facts.get("sliding_window_size")  # stands in gemma-2-9b beside the key that is read
    return LMConfig(
        family="gemma2",
        **shape,
        rope=rope(facts.inner("rope_parameters"), facts.inner("rope_scaling"), shape["head_dim"], base),
        windows=layer_windows(facts, n, facts.unless_null("sliding_window", int, 4096), _pattern(n, 2)),
        score_cap=facts.unless_null("attn_logit_softcapping", float, 50.0),
        logit_cap=facts.unless_null("final_logit_softcapping", float, 30.0),
    )


def gemma3(facts: Facts) -> LMConfig:
    """A `config.json` of model_type gemma3_text."""
    facts.only(attn_logit_softcapping=None)  # transformers reads it and does not use it
    shape = _shared(facts, kv_heads=4, context=131_072)
    n, width = shape["n_layers"], shape["head_dim"]
    every = facts.take("sliding_window_pattern", int, facts.take("_sliding_window_pattern", int, 6))
    tables = facts.inner("rope_parameters")
    base, local = facts.take("rope_theta", float, 1e6), facts.take("rope_local_base_freq", float, 1e4)
    made = LMConfig(
        family="gemma3_text",
        **shape,
        rope=rope(tables.inner("full_attention"), facts.inner("rope_scaling"), width, base),
        local_rope=rope(tables.inner("sliding_attention"), Facts({}), width, local),
        windows=layer_windows(facts, n, facts.unless_null("sliding_window", int, 4096), _pattern(n, every)),
        qk_norm=True,
        logit_cap=facts.unless_null("final_logit_softcapping", float, 0.0),
    )
    tables.done()
    return made


def _gguf_shared(facts: Facts, largest: int) -> dict[str, Any]:
    """Files do not say what queries are scaled by: llama.cpp knows it by the number of layers."""
    shape = gguf_shape(facts)
    scalar = shape["d_model"] / shape["n_heads"] if shape["n_layers"] == largest else shape["head_dim"]
    rest = {"act": "gelu_tanh", "score_scale": scalar**-0.5, "embed_scale": shape["d_model"] ** 0.5}
    return shape | ALIKE | rest


def gemma2_gguf(facts: Facts) -> LMConfig:
    shape = _gguf_shared(facts, largest=46)
    window = facts.take("attention.sliding_window", int, 4096)
    return LMConfig(
        family="gemma2",
        **shape,
        rope=gguf_rope(facts, shape["head_dim"]),
        windows=layer_windows(facts, shape["n_layers"], window, _pattern(shape["n_layers"], 2)),
        score_cap=facts.take("attn_logit_softcapping", float, 50.0),
        logit_cap=facts.take("final_logit_softcapping", float, 30.0),
    )


def gemma3_gguf(facts: Facts) -> LMConfig:
    shape = _gguf_shared(facts, largest=62)
    window, every = facts.take("attention.sliding_window", int), facts.take("attention.sliding_window_pattern", int, 6)
    local = facts.take("rope.freq_base_swa", float, facts.take("rope.local.freq_base", float, 1e4))
    return LMConfig(
        family="gemma3_text",
        **shape,
        rope=gguf_rope(facts, shape["head_dim"]),
        local_rope=Rope(local, shape["head_dim"]),
        windows=layer_windows(facts, shape["n_layers"], window, _pattern(shape["n_layers"], every)),
        qk_norm=True,
        logit_cap=facts.take("final_logit_softcapping", float, 0.0),
    )


def _export(c: LMConfig, kind: str, architecture: str) -> dict[str, Any]:
    sliding = [bool(c.window_of(layer)) for layer in range(c.n_layers)]
    return export_sizes(c, kind, architecture) | {
        "hidden_activation": HUB_ACTIVATIONS[c.act],
        "attention_bias": c.qkv_bias,
        "query_pre_attn_scalar": _whole(c.score_scale**-2),
        "sliding_window": max(c.windows, default=None),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in sliding],
        "attn_logit_softcapping": c.score_cap or None,
        "final_logit_softcapping": c.logit_cap or None,
    }


def _whole(x: float) -> float | int:
    """A whole number as such: transformers wants one, and (n^-1/2)^-2 is only nearly n."""
    return round(x) if abs(x - round(x)) < 1e-6 else x


def export_gemma2(c: LMConfig) -> dict[str, Any]:
    assert c.rope
    return _export(c, "gemma2", "Gemma2ForCausalLM") | {"rope_parameters": rope_parameters(c.rope)}


def export_gemma3(c: LMConfig) -> dict[str, Any]:
    assert c.rope
    assert c.local_rope
    turns = {"full_attention": rope_parameters(c.rope), "sliding_attention": rope_parameters(c.local_rope)}
    return _export(c, "gemma3_text", "Gemma3ForCausalLM") | {"rope_parameters": turns}
