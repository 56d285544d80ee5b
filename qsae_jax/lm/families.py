"""What differs between families, as two tables each: the facts of its config, and name -> path + einops string.

A row of names is (regex of the stored name, path in our tree, stored layout -> our layout). Read forwards it loads,
backwards it exports. Whatever the tables do not name is refused: a config key that is neither used nor known to be
irrelevant may change what the model computes.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qsae_jax.errors import UserError
from qsae_jax.lm.model import LMConfig

Row = tuple[str, str, str]
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One family in one kind of file."""

    facts: Callable[[Facts], LMConfig]
    rows: tuple[Row, ...]
    ignored: str = r"$^"
    """Regex of stored tensors that carry no weight (buffers that are recomputed)."""


_HUB = r"model\.layers\.(\d+)\."
LLAMA_ROWS = (
    (r"model\.embed_tokens\.weight", "embed", "v d -> v d"),
    (_HUB + r"input_layernorm\.weight", "blocks.{}.attn_norm.scale", "d -> d"),
    (_HUB + r"self_attn\.q_proj\.weight", "blocks.{}.attn.q", "(h k) d -> d h k"),
    (_HUB + r"self_attn\.k_proj\.weight", "blocks.{}.attn.k", "(h k) d -> d h k"),
    (_HUB + r"self_attn\.v_proj\.weight", "blocks.{}.attn.v", "(h k) d -> d h k"),
    (_HUB + r"self_attn\.o_proj\.weight", "blocks.{}.attn.o", "d (h k) -> h k d"),
    (_HUB + r"post_attention_layernorm\.weight", "blocks.{}.mlp_norm.scale", "d -> d"),
    (_HUB + r"mlp\.gate_proj\.weight", "blocks.{}.mlp.gate", "f d -> d f"),
    (_HUB + r"mlp\.up_proj\.weight", "blocks.{}.mlp.up", "f d -> d f"),
    (_HUB + r"mlp\.down_proj\.weight", "blocks.{}.mlp.down", "d f -> f d"),
    (r"model\.norm\.weight", "final_norm.scale", "d -> d"),
    (r"lm_head\.weight", "head", "v d -> v d"),
)

# llama.cpp's converter stores the rows of q and k with the two rotary halves interleaved: (h half two), not (h k).
_GGUF = r"blk\.(\d+)\."
LLAMA_GGUF_ROWS = (
    (r"token_embd\.weight", "embed", "v d -> v d"),
    (_GGUF + r"attn_norm\.weight", "blocks.{}.attn_norm.scale", "d -> d"),
    (_GGUF + r"attn_q\.weight", "blocks.{}.attn.q", "(h half two) d -> d h (two half)"),
    (_GGUF + r"attn_k\.weight", "blocks.{}.attn.k", "(h half two) d -> d h (two half)"),
    (_GGUF + r"attn_v\.weight", "blocks.{}.attn.v", "(h k) d -> d h k"),
    (_GGUF + r"attn_output\.weight", "blocks.{}.attn.o", "d (h k) -> h k d"),
    (_GGUF + r"ffn_norm\.weight", "blocks.{}.mlp_norm.scale", "d -> d"),
    (_GGUF + r"ffn_gate\.weight", "blocks.{}.mlp.gate", "f d -> d f"),
    (_GGUF + r"ffn_up\.weight", "blocks.{}.mlp.up", "f d -> d f"),
    (_GGUF + r"ffn_down\.weight", "blocks.{}.mlp.down", "d f -> f d"),
    (r"output_norm\.weight", "final_norm.scale", "d -> d"),
    (r"output\.weight", "head", "v d -> v d"),
)

# Keys that do not change what the forward pass computes.
IRRELEVANT = frozenset(
    [
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "is_llama_config",
        "model_type",
        "pad_token_id",
        "pretraining_tp",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "use_cache",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "is_encoder_decoder",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "_name_or_path",
    ]
)


def _take(facts: Facts, key: str, kind: type, *default: Any) -> Any:
    value = facts.get(key)
    if value is None:
        if default:
            return default[0]
        raise UserError(f"config key `{key}` is missing: the model's configuration is incomplete")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)) or (kind is int and value <= 0):
        raise UserError(f"config key `{key}` is {value!r}, expected {kind.__name__}: correct config.json")
    return value


def _refuse_unknown(given: Iterable[str], known: Iterable[str]) -> None:
    if unknown := sorted(set(given) - set(known) - IRRELEVANT):
        keys = ", ".join(f"`{key}`" for key in unknown)
        raise UserError(f"unknown config key {keys}: it may change what the model computes, so it is not ignored")


def _require(facts: Facts, **only: Any) -> None:
    for key, wanted in only.items():
        if (got := facts.get(key)) is not None and got != wanted:
            raise UserError(f"config key `{key}` is {got!r}: only {wanted!r} is supported for this family")


def _rope_theta(facts: Facts) -> float:
    """transformers 4 has `rope_theta` and `rope_scaling`, transformers 5 one dict `rope_parameters`."""
    rope = facts.get("rope_parameters") or {}
    _refuse_unknown(rope, ["rope_theta", "rope_type"])
    _require(rope, rope_type="default")
    _require(facts, rope_scaling={})
    return _take({**facts, **rope}, "rope_theta", float, 10000.0)


def llama_facts(facts: Facts) -> LMConfig:
    """A Hugging Face `config.json` of model_type llama."""
    sizes = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size num_key_value_heads"
    others = "head_dim rms_norm_eps rope_theta rope_scaling rope_parameters tie_word_embeddings hidden_act"
    more = "attention_bias mlp_bias max_position_embeddings rope_interleaved"
    _refuse_unknown(facts, f"{sizes} {others} {more}".split())
    _require(facts, hidden_act="silu", attention_bias=False, mlp_bias=False, rope_interleaved=False)
    d, heads = _take(facts, "hidden_size", int), _take(facts, "num_attention_heads", int)
    return _checked(
        LMConfig(
            family="llama",
            vocab=_take(facts, "vocab_size", int),
            d_model=d,
            n_layers=_take(facts, "num_hidden_layers", int),
            n_heads=heads,
            n_kv_heads=_take(facts, "num_key_value_heads", int, heads),
            head_dim=_take(facts, "head_dim", int, d // heads),
            d_ff=_take(facts, "intermediate_size", int),
            norm_eps=_take(facts, "rms_norm_eps", float, 1e-6),
            rope_theta=_rope_theta(facts),
            tied=_take(facts, "tie_word_embeddings", bool, False),
            context=_take(facts, "max_position_embeddings", int, 2048),
        )
    )


def llama_gguf_facts(facts: Facts) -> LMConfig:
    """GGUF metadata of architecture llama, without the prefix; `vocab_size` and `tied` are read off the tensors."""
    known = "block_count context_length embedding_length feed_forward_length attention.head_count vocab_size tied "
    known += "attention.head_count_kv rope.freq_base attention.layer_norm_rms_epsilon rope.dimension_count "
    known += "attention.key_length attention.value_length"
    _refuse_unknown(facts, known.split())
    d, heads = _take(facts, "embedding_length", int), _take(facts, "attention.head_count", int)
    width = _take(facts, "attention.key_length", int, d // heads)
    _require(facts, **{"rope.dimension_count": width, "attention.value_length": width})
    return _checked(
        LMConfig(
            family="llama",
            vocab=_take(facts, "vocab_size", int),
            d_model=d,
            n_layers=_take(facts, "block_count", int),
            n_heads=heads,
            n_kv_heads=_take(facts, "attention.head_count_kv", int, heads),
            head_dim=width,
            d_ff=_take(facts, "feed_forward_length", int),
            norm_eps=_take(facts, "attention.layer_norm_rms_epsilon", float),
            rope_theta=_take(facts, "rope.freq_base", float, 10000.0),
            tied=_take(facts, "tied", bool),
            context=_take(facts, "context_length", int),
        )
    )


def _checked(c: LMConfig) -> LMConfig:
    if c.n_heads % c.n_kv_heads:
        raise UserError(f"config: {c.n_heads} heads cannot share {c.n_kv_heads} key-value heads: correct config.json")
    if c.head_dim % 2:
        raise UserError(f"config: head_dim {c.head_dim} is odd, rotary positions need an even one: correct config.json")
    return c


def llama_export(c: LMConfig) -> dict[str, Any]:
    """The `config.json` that transformers needs to build the same model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "max_position_embeddings": c.context,
        "tie_word_embeddings": c.tied,
        "attention_bias": False,
        "mlp_bias": False,
    }


HUB = {"llama": Family(llama_facts, LLAMA_ROWS, ignored=r".*\.rotary_emb\.inv_freq")}
GGML = {"llama": Family(llama_gguf_facts, LLAMA_GGUF_ROWS)}
EXPORT = {"llama": llama_export}
