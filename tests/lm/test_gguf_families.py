"""A GGUF file of every family is the model that its Hugging Face folder is.

The files are written as llama.cpp's converter writes them: names by the `gguf` package's own map from Hugging Face's,
and the four changes that the converter makes to tensors, written out slowly here. No default is left in the metadata
but what such files do not carry (the query scale and the order of windows of Gemma, the activation).
"""

import gguf
import jax
import numpy as np
import pytest
from flax import nnx

from qsae_jax.errors import UserError
from qsae_jax.lm.families import GGML, HUB
from qsae_jax.lm.load import load_lm
from qsae_jax.lm.save import save_lm, stored_tensors
from tests.lm.families import CONFIGS, GEMMA2, GEMMA3, GPT2, GROUPED, LLAMA3, NEOX, ROPE, SLIDING, UNGROUPED
from tests.lm.test_process import random_lm

LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
FILES = {
    "llama": ("llama", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama slowed": ("llama", GROUPED | {"rope_parameters": LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                         "original_max_position_embeddings": 8192, "rope_theta": 500000.0}}),
    "llama linear": ("llama", GROUPED | {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 3.0}}),
    "qwen2": ("qwen2", UNGROUPED),
    "qwen3": ("qwen3", GROUPED | {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", GEMMA2 | {"query_pre_attn_scalar": 6}),
    "gemma3": ("gemma3_text", GEMMA3 | {"query_pre_attn_scalar": 6, "layer_types": [SLIDING] * 3,
               "rope_parameters": {SLIDING: LOCAL, "full_attention": ROPE}}),
    "gpt2": ("gpt2", GPT2),
    "gptneox": ("gpt_neox", NEOX),
    "gptneox sequential": ("gpt_neox", NEOX | {"use_parallel_residual": False}),
}  # fmt: skip
ARCHITECTURES = {"gemma3_text": "gemma3", "gpt_neox": "gptneox"}


def converted(name, w, lm, kind):
    """A tensor as the converter leaves it."""
    c = lm.config
    if kind == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
        heads = c.n_heads if "q_proj" in name else c.n_kv_heads
        rows, half = [], c.head_dim // 2
        for head in range(heads):
            for i in range(half):
                rows += [w[head * c.head_dim + i], w[head * c.head_dim + half + i]]
        return np.stack(rows)
    if kind == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return w.T
    if kind == "gpt_neox" and "query_key_value" in name:
        parts = [[], [], []]
        for head in range(c.n_heads):
            for which in range(3):
                at = (3 * head + which) * c.head_dim
                parts[which].append(w[at : at + c.head_dim])
        return np.concatenate([row for part in parts for row in part])
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return w + np.float32(1)
    return w


def described(writer, lm, kind):
    c = lm.config
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.d_model)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_heads)
    if c.layer_norm:
        writer.add_layer_norm_eps(c.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(c.norm_eps)
        writer.add_head_count_kv(c.n_kv_heads)
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    if c.rope:
        writer.add_rope_freq_base(c.rope.theta)
        writer.add_rope_dimension_count(c.rope.dims)
    if kind == "gpt_neox":
        writer.add_parallel_residual(c.parallel)
    if c.windows:
        writer.add_sliding_window(max(c.windows))
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(c.score_cap)
    if c.logit_cap:
        writer.add_final_logit_softcapping(c.logit_cap)


def rope_factors(c):
    """Llama 3's divisors as the converter computes them, one turn at a time."""
    slow, out = c.rope.slowed, []
    for i in range(0, c.rope.dims, 2):
        length = 2 * np.pi * c.rope.theta ** (i / c.rope.dims)
        if length < slow.original / slow.high:
            out.append(1.0)
        elif length > slow.original / slow.low:
            out.append(slow.factor)
        else:
            share = (slow.original / length - slow.low) / (slow.high - slow.low)
            out.append(1 / ((1 - share) / slow.factor + share))
    return np.array(out, np.float32)


def write(path, lm, kind, change=converted):
    architecture = ARCHITECTURES.get(kind, kind)
    writer = gguf.GGUFWriter(path, architecture)
    described(writer, lm, kind)
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(number, lm.config.n_layers)
    for name, w in stored_tensors(lm).items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored, name
        writer.add_tensor(stored, np.ascontiguousarray(change(name, w, lm, kind)))
    if lm.config.rope and lm.config.rope.slowed:
        if lm.config.rope.slowed.original:
            writer.add_tensor("rope_freqs.weight", rope_factors(lm.config))
        else:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(lm.config.rope.slowed.factor)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return str(path)


def apart(a, b):
    pairs = zip(jax.tree.leaves(nnx.state(a)), jax.tree.leaves(nnx.state(b)), strict=True)
    return max(float(abs(x - y).max()) for x, y in pairs)


def test_every_architecture_has_a_file():
    assert {ARCHITECTURES.get(kind, kind) for kind, _ in FILES.values()} == set(GGML)


@pytest.mark.parametrize("case", FILES)
def test_a_file_is_the_folder(monkeypatch, tokens, tmp_path, case):
    """The same config and bit-equal weights (Gemma's to 1e-7: one is added and taken away), hence logits within 1e-4;
    it goes on to a Hugging Face folder. Control: as the converter would not write it, it is another model."""
    kind, facts = FILES[case]
    monkeypatch.setitem(CONFIGS, kind, [facts])
    lm = random_lm(kind, 0)
    assert lm.config == HUB[kind].config(dict(facts))
    got = load_lm(write(tmp_path / "model.gguf", lm, kind))
    rounded = {
        "norm_eps": np.float32,
        "rope": lambda rope: None if rope is None else (np.float32(rope.theta), rope.dims),
    }
    for field in (
        "score_cap",
        "logit_cap",
        "score_scale",
        "local_rope",
        "windows",
        "act",
        "tied",
        "parallel",
        "context",
    ):
        assert getattr(got.config, field) == getattr(lm.config, field), field
    for field, cut in rounded.items():
        assert cut(getattr(got.config, field)) == cut(getattr(lm.config, field)), field
    assert apart(got, lm) <= (2e-7 if kind.startswith("gemma") else 0)
    expected = np.asarray(lm(tokens))
    assert np.abs(got(tokens) - expected).max() < 1e-4
    save_lm(got, tmp_path / "folder")
    assert np.abs(load_lm(str(tmp_path / "folder"))(tokens) - expected).max() < 1e-4
    if kind not in ("qwen2", "qwen3"):  # whose tensors the converter leaves as they are
        other = write(tmp_path / "other.gguf", lm, kind, change=lambda name, w, lm, kind: w.T if "c_" in name else w)
        if kind != "gpt2":
            assert np.abs(load_lm(other)(tokens) - expected).max() > 1e-2
        else:
            swapped = write(tmp_path / "swapped.gguf", lm, kind, change=lambda *a: np.roll(converted(*a), 1, axis=0))
            assert np.abs(load_lm(swapped)(tokens) - expected).max() > 1e-2


def test_divisors_of_another_rule_are_refused(monkeypatch, tmp_path):
    """Control: those of Llama 3's rule load, above."""
    monkeypatch.setitem(CONFIGS, "llama", [FILES["llama slowed"][1]])
    lm = random_lm("llama", 0)
    monkeypatch.setattr("tests.lm.test_gguf_families.rope_factors", lambda c: np.array([1, 2, 3], np.float32))
    with pytest.raises(UserError, match="rope_freqs"):
        load_lm(write(tmp_path / "model.gguf", lm, "llama"))
