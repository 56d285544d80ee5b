"""Facts of a model's configuration, taken one by one; what nobody took is refused, since it may change what the model
computes."""

from collections.abc import Mapping
from typing import Any

from qsae_jax.errors import UserError
from qsae_jax.lm.rope import Rope, Slowed

# Keys that do not change what the forward pass computes.
# fmt: off
IRRELEVANT = frozenset([
    "_name_or_path", "_num_labels", "architectures", "attention_dropout", "attn_pdrop", "bos_token_id",
    "cache_implementation", "chunk_size_feed_forward", "classifier_dropout", "dtype", "embd_pdrop", "eos_token_id",
    "gradient_checkpointing", "hidden_dropout", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder",
    "is_llama_config", "label2id", "model_type", "n_ctx", "n_special", "output_attentions", "output_hidden_states",
    "output_past", "pad_token_id", "predict_special_tokens", "pretraining_tp", "problem_type",
    "reorder_and_upcast_attn", "resid_pdrop", "return_dict", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params", "torch_dtype",
    "transformers.js_config", "transformers_version", "unk_token_id", "unsloth_fixed", "unsloth_version",
    "use_cache",
])
# fmt: on
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""Hugging Face's names of activation functions -> ours. `gelu_new` is the tanh approximation."""


class Facts:
    """A config and the keys that were asked of it."""

    def __init__(self, given: Mapping[str, Any], inside: str = ""):
        self.given, self.inside, self.seen = given, inside, set[str]()

    def get(self, key: str) -> Any:
        self.seen.add(key)
        return self.given.get(key)

    def take(self, key: str, kind: type, *default: Any) -> Any:
        """The value under a key, of one kind (numbers above zero); null counts as absent."""
        value = self.get(key)
        if value is None:
            if default:
                return default[0]
            raise UserError(f"config key `{self.inside}{key}` is missing: the model's configuration is incomplete")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        bad = not isinstance(value, kind) or (kind is not bool and isinstance(value, bool))
        if bad or (kind in (int, float) and not 0 < value < float("inf")):
            above = " above 0" if kind in (int, float) else ""
            raise UserError(
                f"config key `{self.inside}{key}` is {value!r}, expected {kind.__name__}{above}: correct it"
            )
        return value

    def unless_null(self, key: str, kind: type, default: Any) -> Any:
        """Where the key is absent the default, where it is null 0: the thing is off."""
        return self.take(key, kind, 0 if key in self.given else default)

    def only(self, **wanted: Any) -> None:
        """Refuse keys that are given and have another value."""
        for key, value in wanted.items():
            if (got := self.get(key)) is not None and got != value:
                raise UserError(
                    f"config key `{self.inside}{key}` is {got!r}: only {value!r} is supported for this family"
                )

    def activation(self, key: str, default: str) -> str:
        name = self.take(key, str, default)
        if name not in ACTIVATIONS:
            raise UserError(f"config key `{key}` is {name!r}: supported are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]

    def inner(self, key: str) -> "Facts":
        """A table inside; its unknown keys are unknown too."""
        value = self.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise UserError(
                f"config key `{self.inside}{key}` is {value!r}, expected a table: correct the configuration"
            )
        return Facts(value or {}, f"{self.inside}{key}.")

    def done(self) -> None:
        if unknown := sorted(set(self.given) - self.seen - IRRELEVANT):
            keys = ", ".join(f"`{self.inside}{key}`" for key in unknown)
            raise UserError(f"unknown config key {keys}: it may change what the model computes, so it is not ignored")


def gguf_sizes(facts: Facts, eps: str) -> dict[str, Any]:
    """What all GGUF metadata say, without the architecture's prefix; `eps` is the key of the norms' epsilon.
    `vocab_size`, `tied` and `tensors` are read off the tensors."""
    d, heads = facts.take("embedding_length", int), facts.take("attention.head_count", int)
    facts.get("tensors")
    return {
        "vocab": facts.take("vocab_size", int),
        "d_model": d,
        "n_layers": facts.take("block_count", int),
        "n_heads": heads,
        "n_kv_heads": facts.take("attention.head_count_kv", int, heads),
        "head_dim": d // heads,
        "d_ff": facts.take("feed_forward_length", int),
        "norm_eps": facts.take(eps, float),
        "tied": facts.take("tied", bool),
        "context": facts.take("context_length", int),
    }


def layer_windows(facts: Facts, layers: int, window: int, default: list[bool]) -> tuple[int, ...]:
    """The window of each layer: those that `layer_types` calls sliding, or by default those that the family's
    pattern does."""
    kinds = facts.get("layer_types")
    if kinds is not None:
        known = {"sliding_attention": True, "full_attention": False}
        if not isinstance(kinds, list) or len(kinds) != layers or not set(map(str, kinds)) <= set(known):
            raise UserError(f"config key `layer_types` must name {' or '.join(known)} for each of {layers} layers")
        default = [known[kind] for kind in kinds]
    if any(default) and not window:
        raise UserError("config key `sliding_window` is missing, but `layer_types` has sliding layers: add it")
    return tuple(window if sliding else 0 for sliding in default) if any(default) else ()


def rope(new: Facts, old: Facts, dims: int, theta: float) -> Rope:
    """The turns that a table of transformers 5 (`rope_parameters`) or 4 (`rope_scaling`, the base outside) describes;
    where both stand there transformers follows the old one."""
    base = new.take("rope_theta", float, old.take("rope_theta", float, theta))
    made = Rope(base, dims, _slowed(old if old.given else new))
    new.done()
    old.done()
    return made


def _slowed(table: Facts) -> Slowed | None:
    kind = table.take("rope_type", str, table.take("type", str, "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return Slowed(table.take("factor", float))
    if kind == "llama3":
        low, high = table.take("low_freq_factor", float), table.take("high_freq_factor", float)
        if low >= high:
            raise UserError(
                f"config: low_freq_factor {low} is not below high_freq_factor {high}: correct the configuration"
            )
        return Slowed(table.take("factor", float), low, high, table.take("original_max_position_embeddings", int))
    raise UserError(f"config key `{table.inside}rope_type` is {kind!r}: supported are default, linear and llama3")


def rope_parameters(made: Rope) -> dict[str, Any]:
    """The table of `rope_parameters` that gives these turns."""
    slow = made.slowed
    if slow is None:
        return {"rope_type": "default", "rope_theta": made.theta}
    if not slow.original:
        return {"rope_type": "linear", "rope_theta": made.theta, "factor": slow.factor}
    named = {"low_freq_factor": slow.low, "high_freq_factor": slow.high}
    named |= {"factor": slow.factor, "original_max_position_embeddings": slow.original}
    return {"rope_type": "llama3", "rope_theta": made.theta} | named
