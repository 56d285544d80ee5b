"""The table of families that the tests go through: for each, three small configurations with every scalar off its
default, and where transformers' PyTorch model has our points. A new family is one entry."""

ROPE = {"rope_type": "default", "rope_theta": 77.0}
LINEAR = {"rope_type": "linear", "rope_theta": 66.0, "factor": 3.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 77.0, "factor": 5.0}
LLAMA3 |= {"low_freq_factor": 0.5, "high_freq_factor": 3.0, "original_max_position_embeddings": 16}
SLIDING, FULL = "sliding_attention", "full_attention"

BASE = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
BASE |= {"num_attention_heads": 8, "max_position_embeddings": 64}
GROUPED = BASE | {"num_key_value_heads": 2, "head_dim": 6, "rms_norm_eps": 3e-3, "rope_parameters": ROPE}
# 24 / 8 = 3, so the head width is given; those that do not give it have 4 heads.
UNGROUPED = {key: value for key, value in GROUPED.items() if key != "head_dim"}
UNGROUPED |= {"num_attention_heads": 4, "num_key_value_heads": 4}
GEMMA2 = GROUPED | {"query_pre_attn_scalar": 11, "sliding_window": 4}
GEMMA2 |= {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}
GEMMA3 = GROUPED | {"query_pre_attn_scalar": 11, "sliding_window": 4, "layer_types": [SLIDING, FULL, SLIDING]}
GEMMA3 |= {"rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 33.0}, FULL: ROPE}}
GPT2 = {"vocab_size": 97, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_inner": 40, "n_positions": 64}
GPT2 |= {"layer_norm_epsilon": 3e-3}
NEOX = BASE | {"num_attention_heads": 4, "layer_norm_eps": 3e-3}
NEOX |= {"rope_parameters": ROPE | {"partial_rotary_factor": 0.7}}  # 4 of 6

CONFIGS = {
    "llama": [
        GROUPED | {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
        GROUPED | {"rope_parameters": LINEAR, "tie_word_embeddings": True, "hidden_act": "gelu"},
        UNGROUPED | {"rms_norm_eps": 1e-2},
    ],
    "mistral": [
        GROUPED | {"sliding_window": 5},
        GROUPED | {"sliding_window": None, "head_dim": 8, "tie_word_embeddings": True},
        GROUPED | {"sliding_window": 3, "rope_parameters": LINEAR, "hidden_act": "gelu_new"},
    ],
    "qwen2": [
        UNGROUPED,
        UNGROUPED | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        UNGROUPED | {"use_sliding_window": True, "sliding_window": 3, "layer_types": [FULL, SLIDING, FULL],
                           "tie_word_embeddings": True, "num_key_value_heads": 2},
    ],
    "qwen3": [
        GROUPED,
        GROUPED | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "attention_bias": True},
        GROUPED | {"tie_word_embeddings": True, "rope_parameters": LINEAR},
    ],
    "gemma2": [
        GEMMA2,
        GEMMA2 | {"attention_bias": True, "attn_logit_softcapping": None, "layer_types": [FULL, SLIDING, SLIDING]},
        GEMMA2 | {"hidden_activation": "gelu", "final_logit_softcapping": None, "tie_word_embeddings": False},
    ],
    "gemma3_text": [
        GEMMA3,
        GEMMA3 | {"attention_bias": True, "rope_parameters": GEMMA3["rope_parameters"] | {FULL: LINEAR}},
        GEMMA3 | {"final_logit_softcapping": 5.0, "layer_types": [FULL, SLIDING, FULL]},
    ],
    "gpt2": [
        GPT2,
        GPT2 | {"activation_function": "relu", "tie_word_embeddings": False},
        GPT2 | {"activation_function": "gelu", "scale_attn_weights": False},
    ],
    "gpt_neox": [
        NEOX,
        NEOX | {"use_parallel_residual": False, "hidden_act": "gelu_new"},
        NEOX | {"attention_bias": False, "tie_word_embeddings": True, "intermediate_size": 48},
    ],
}  # fmt: skip

# Point -> (module, whether its input or its output is meant). `{}` is the layer.
_LAYER = "model.layers.{}"
LLAMA_POINTS = {
    "embed": ("model.embed_tokens", "out"),
    "blocks.{}.resid_pre": (_LAYER, "in"),
    "blocks.{}.attn.q": (_LAYER + ".self_attn.q_proj", "out"),
    "blocks.{}.attn.k": (_LAYER + ".self_attn.k_proj", "out"),
    "blocks.{}.attn.v": (_LAYER + ".self_attn.v_proj", "out"),
    "blocks.{}.attn.z": (_LAYER + ".self_attn.o_proj", "in"),
    "blocks.{}.attn_out": (_LAYER + ".self_attn", "out"),
    "blocks.{}.resid_mid": (_LAYER + ".post_attention_layernorm", "in"),
    "blocks.{}.mlp.pre": (_LAYER + ".mlp.gate_proj", "out"),
    "blocks.{}.mlp.post": (_LAYER + ".mlp.down_proj", "in"),
    "blocks.{}.mlp_out": (_LAYER + ".mlp", "out"),
    "blocks.{}.resid_post": (_LAYER, "out"),
    "final": ("model.norm", "out"),
}
GEMMA_POINTS = LLAMA_POINTS | {
    "blocks.{}.attn_out": (_LAYER + ".post_attention_layernorm", "out"),
    "blocks.{}.resid_mid": (_LAYER + ".pre_feedforward_layernorm", "in"),
    "blocks.{}.mlp_out": (_LAYER + ".post_feedforward_layernorm", "out"),
}
_H = "transformer.h.{}"
GPT2_POINTS = {
    "embed": ("transformer.wte", "out"),
    "blocks.{}.resid_pre": (_H, "in"),
    "blocks.{}.attn.qkv": (_H + ".attn.c_attn", "out"),
    "blocks.{}.attn.z": (_H + ".attn.c_proj", "in"),
    "blocks.{}.attn_out": (_H + ".attn", "out"),
    "blocks.{}.resid_mid": (_H + ".ln_2", "in"),
    "blocks.{}.mlp.pre": (_H + ".mlp.c_fc", "out"),
    "blocks.{}.mlp.post": (_H + ".mlp.c_proj", "in"),
    "blocks.{}.mlp_out": (_H + ".mlp", "out"),
    "blocks.{}.resid_post": (_H, "out"),
    "final": ("transformer.ln_f", "out"),
}
_N = "gpt_neox.layers.{}"
NEOX_POINTS = {
    "embed": ("gpt_neox.embed_in", "out"),
    "blocks.{}.resid_pre": (_N, "in"),
    "blocks.{}.attn.qkv": (_N + ".attention.query_key_value", "out"),
    "blocks.{}.attn.z": (_N + ".attention.dense", "in"),
    "blocks.{}.attn_out": (_N + ".attention", "out"),
    "blocks.{}.resid_mid": (_N + ".post_attention_layernorm", "in"),
    "blocks.{}.mlp.pre": (_N + ".mlp.dense_h_to_4h", "out"),
    "blocks.{}.mlp.post": (_N + ".mlp.dense_4h_to_h", "in"),
    "blocks.{}.mlp_out": (_N + ".mlp", "out"),
    "blocks.{}.resid_post": (_N, "out"),
    "final": ("gpt_neox.final_layer_norm", "out"),
}
POINTS = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA_POINTS)
POINTS |= {"gemma2": GEMMA_POINTS, "gemma3_text": GEMMA_POINTS, "gpt2": GPT2_POINTS, "gpt_neox": NEOX_POINTS}
# How a fused q, k, v lies in the last axis.
FUSED = {"gpt2": "b s (three h k) -> three b s (h k)", "gpt_neox": "b s (h three k) -> three b s (h k)"}


def randomised(torch, model):
    """A model of transformers with random weights, norms and biases around one."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=random) * 0.3
            p.copy_(noise if p.ndim > 1 else 1 + noise)
    return model.eval()
