"""Configs and names as they are published on the hub, by transformers 4: read as transformers 5 reads them.

The oracle of a config is transformers itself: what it makes of the published keys and writes down again must be the
same facts to us. Sizes are small, keys are those of the published files.
"""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from qsae_jax.lm.families import HUB
from qsae_jax.lm.load import load_lm
from qsae_jax.lm.save import stored_tensors
from tests.lm.families import CONFIGS
from tests.lm.test_process import random_lm

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 7, "vocab_size": 97}
COMMON = {"initializer_range": 0.02, "torch_dtype": "bfloat16", "transformers_version": "4.40.0", "use_cache": True}
PUBLISHED = {
    "gpt2": {
        "n_ctx": 64, "n_embd": 24, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 97,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05, "attn_pdrop": 0.1, "embd_pdrop": 0.1,
        "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_use_proj": True,
        "summary_proj_to_labels": True, "summary_type": "cls_index", "n_special": 0,
        "predict_special_tokens": True, "output_past": True, "initializer_range": 0.02,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "gpt_neox": SIZES | COMMON | {
        "hidden_act": "gelu", "layer_norm_eps": 1e-05, "max_position_embeddings": 64, "num_attention_heads": 2,
        "rotary_emb_base": 9000, "rotary_pct": 0.34, "use_parallel_residual": True, "partial_rotary_factor": 0.34,
        "rope_theta": 9000, "tie_word_embeddings": False,
        "classifier_dropout": 0.1, "hidden_dropout": 0.0, "attention_dropout": 0.0, "rope_scaling": None,
    },
    "llama": SIZES | COMMON | {
        "attention_bias": False, "hidden_act": "silu", "max_position_embeddings": 131072, "mlp_bias": False,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": True, "head_dim": 6,
    },
    "mistral": SIZES | COMMON | {
        "hidden_act": "silu", "max_position_embeddings": 32768, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    },
    "qwen2": SIZES | COMMON | {
        "attention_dropout": 0.0, "hidden_act": "silu", "max_position_embeddings": 32768, "max_window_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False, "use_mrope": False,
    },
    "qwen3": SIZES | COMMON | {
        "attention_bias": False, "head_dim": 8, "hidden_act": "silu", "max_position_embeddings": 40960,
        "max_window_layers": 28, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "gemma2": SIZES | COMMON | {
        "attention_bias": False, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 8,
        "cache_implementation": "hybrid", "sliding_window_size": 4096,
        "hidden_act": "gelu_pytorch_tanh", "rope_theta": 10000.0,
        "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192, "num_attention_heads": 4,
        "num_key_value_heads": 2, "query_pre_attn_scalar": 8, "rms_norm_eps": 1e-06, "sliding_window": 4096,
    },
    "gemma3_text": SIZES | COMMON | {
        "attention_bias": False, "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 8,
        "cache_implementation": "hybrid", "hidden_activation": "gelu_pytorch_tanh", "num_attention_heads": 4,
        "max_position_embeddings": 131072, "num_key_value_heads": 2, "query_pre_attn_scalar": 8,
        "rms_norm_eps": 1e-06, "rope_local_base_freq": 9000, "rope_theta": 900000, "sliding_window": 512,
        "sliding_window_pattern": 6, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_configs(torch, kind):
    """Control: with a number of the published file changed, the facts are others."""
    from transformers import AutoConfig

    published = json.loads(json.dumps(PUBLISHED[kind]))
    theirs = AutoConfig.for_model(kind, **json.loads(json.dumps(published))).to_dict()
    ours = HUB[kind].config(published | {"model_type": kind, "architectures": ["AnyForCausalLM"]})
    assert ours == HUB[kind].config(theirs)
    eps = next(key for key in published if key.endswith(("_eps", "_epsilon")))
    assert HUB[kind].config(published | {eps: 2e-3}) != ours


def test_what_the_published_configs_say():
    """Read by hand off the files above."""
    said = {kind: HUB[kind].config(dict(facts)) for kind, facts in PUBLISHED.items()}
    assert said["gemma3_text"].windows == (512, 512, 512, 512, 512, 0, 512)
    assert said["gemma3_text"].local_rope.theta == 9000 and said["gemma3_text"].local_rope.slowed is None
    assert said["gemma3_text"].rope.theta == 900000 and said["gemma3_text"].rope.slowed.factor == 8
    assert said["gemma2"].windows == (4096, 0, 4096, 0, 4096, 0, 4096)
    assert said["mistral"].windows == (4096,) * 7 and said["qwen2"].windows == ()
    assert (said["llama"].rope.slowed.factor, said["llama"].rope.slowed.original) == (32, 8192)
    assert (said["gpt_neox"].rope.theta, said["gpt_neox"].rope.dims) == (9000, 4)


def as_published(kind, tensors):
    """The names and the buffers of the published files."""
    if kind == "gpt2":
        masks = {f"h.{layer}.attn.bias": np.ones((1, 1, 64, 64), np.float32) for layer in range(3)}
        return {name.removeprefix("transformer."): x for name, x in tensors.items()} | masks
    if kind == "gpt_neox":
        at = [f"gpt_neox.layers.{layer}.attention." for layer in range(3)]
        buffers = {x + "bias": np.ones((1, 1, 64, 64), np.uint8) for x in at}
        buffers |= {x + "masked_bias": np.full((), -1e9, np.float32) for x in at}
        return tensors | buffers | {x + "rotary_emb.inv_freq": np.ones(2, np.float32) for x in at}
    return {name.removeprefix("model."): x for name, x in tensors.items()}  # as of the trunk alone


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_published_names(write_folder, kind):
    """Bit-equal weights. Control: one tensor of another layer in its place is seen."""
    lm = random_lm(kind, 0)
    tensors = as_published(kind, stored_tensors(lm))
    facts = dict(CONFIGS[kind][0]) | {"model_type": kind}

    def same(tensors, name):
        loaded = load_lm(str(write_folder(facts, {key: np.array(x) for key, x in tensors.items()}, name)))
        pairs = zip(jax.tree.leaves(nnx.state(lm)), jax.tree.leaves(nnx.state(loaded)), strict=True)
        return all(bool((a == b).all()) for a, b in pairs)

    assert same(tensors, "published")
    first = next(name for name in tensors if ".1." in name and tensors[name].ndim == 2)
    assert not same(tensors | {first: tensors[first.replace(".1.", ".2.")]}, "wrong")


def test_a_head_under_two_names_is_refused(write_folder):
    from qsae_jax.errors import UserError

    tensors = stored_tensors(random_lm("gpt_neox", 0))
    facts = dict(CONFIGS["gpt_neox"][0]) | {"model_type": "gpt_neox"}
    load_lm(str(write_folder(facts, tensors, "one")))
    with pytest.raises(UserError, match=r"embed_out\.weight.*lm_head\.weight"):
        load_lm(str(write_folder(facts, tensors | {"lm_head.weight": tensors["embed_out.weight"].copy()}, "two")))
