"""What is wrong with a folder is refused: a UserError of one line that names the thing.

Every damage is done to a copy of one folder, which loads as long as nothing is done to it: that is the control.
"""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qsae_jax.cli import main
from qsae_jax.errors import UserError
from qsae_jax.lm.families import HUB
from qsae_jax.lm.load import load_config, load_lm
from tests.lm.families import CONFIGS, FULL, LLAMA3, ROPE, SLIDING

Q = "model.layers.1.self_attn.q_proj.weight"


def config(remove=(), **changes):
    def damage(folder):
        file = folder / "config.json"
        facts = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in facts.items() if key not in remove}))

    return damage


def weights(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def put(name, value):
    return weights(lambda tensors: tensors.__setitem__(name, value))


def drop(name):
    return weights(lambda tensors: tensors.pop(name))


def spoil(number):
    return weights(lambda tensors: tensors[Q].__setitem__((2, 3), number))


def cut(share):
    def damage(folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])

    return damage


def shards(index):
    def damage(folder):
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def in_two(again=(), promised=()):
    """Two shards and their index; tensors `again` are in both, `promised` in none."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        names = sorted(tensors)
        home = {name: f"model-{1 + (name in names[: len(names) // 2])}.safetensors" for name in names}
        for shard in set(home.values()):
            save_file({x: tensors[x] for x in names if home[x] == shard or x in again}, folder / shard)
        index = {"weight_map": home | dict.fromkeys(promised, "model-1.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def eight_bits(folder):
    """A tensor of F8_E4M3, a type that NumPy does not have: the file is written by hand."""
    tensors = load_file(folder / "model.safetensors")
    header, body = {}, b""
    for name, value in tensors.items():
        raw = value.tobytes() if name != Q else bytes(value.size)
        kind = "F32" if name != Q else "F8_E4M3"
        header[name] = {"dtype": kind, "shape": value.shape, "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    head = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + body)


REFUSED = {
    "unknown key": (config(attention_sinks=4), "attention_sinks"),
    "unknown keys": (config(z_loss=1, sliding_window=8), "`sliding_window`, `z_loss`"),
    "quantized": (config(quantization_config={"bits": 4}), "quantization_config"),
    "model type": (config(model_type="lama"), "`lama`"),
    "nearest type": (config(model_type="lama"), "nearest: llama"),
    "no model type": (config(remove=["model_type"]), "model_type"),
    "no size": (config(remove=["hidden_size"]), "hidden_size"),
    "size of text": (config(hidden_size="24"), "`hidden_size` is '24'"),
    "size of zero": (config(num_hidden_layers=0), "num_hidden_layers"),
    "size of truth": (config(num_hidden_layers=True), "num_hidden_layers"),
    "epsilon": (config(rms_norm_eps="small"), "rms_norm_eps"),
    "activation": (config(hidden_act="quick_gelu"), "hidden_act"),
    "bias": (config(attention_bias=True), "blocks.0.attn.k_bias"),
    "bias of the mlp": (config(mlp_bias=True), "blocks.0.mlp.down_bias"),
    "rope type": (config(rope_parameters={"rope_type": "yarn", "rope_theta": 777.0}), "rope_type"),
    "rope factor": (config(rope_parameters={"rope_theta": 777.0, "factor": 8.0}), "factor"),
    "rope scaling": (config(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling"),
    "rope yarn": (config(rope_parameters=ROPE | {"rope_type": "yarn"}), "'yarn'"),
    "rope without a factor": (config(rope_parameters=ROPE | {"rope_type": "linear"}), "rope_parameters.factor"),
    "rope of no width": (config(rope_parameters=LLAMA3 | {"low_freq_factor": 3.0}), "low_freq_factor 3.0"),
    "groups": (config(num_key_value_heads=3), "key-value heads"),
    "heads": (config(num_attention_heads=5), "5 heads"),
    "list of types": (config(model_type=["llama"]), "['llama']"),
    "size beyond all": (config(hidden_size=2**40), "2**31"),
    "number beyond all": (config(rms_norm_eps=10**400), "too large"),
    "endless layers": (config(num_hidden_layers=10**9), "`num_hidden_layers`"),
    "odd width": (config(head_dim=3), "head_dim 3"),
    "other width": (config(head_dim=8), "k_proj"),
    "one layer less": (config(num_hidden_layers=2), "blocks.2."),
    "one layer more": (config(num_hidden_layers=4), "blocks.3."),
    "other vocabulary": (config(vocab_size=98), "(98, 24)"),
    "missing tensor": (drop(Q), "blocks.1.attn.q"),
    "missing head": (drop("lm_head.weight"), "head"),
    "stranger": (put("model.layers.1.self_attn.q_norm.weight", np.ones(6, np.float32)), "q_norm"),
    "transposed": (weights(lambda t: t.__setitem__(Q, t[Q].T.copy())), Q),
    "three dimensions": (weights(lambda t: t.__setitem__(Q, t[Q][None].copy())), Q),
    "integers": (weights(lambda t: t.__setitem__(Q, np.ones((48, 24), np.int8))), Q),
    "eight bits": (eight_bits, Q),
    "NaN": (spoil(np.nan), Q),
    "infinity": (spoil(-np.inf), Q),
    "empty file": (cut(0), "model.safetensors"),
    "cut in the header": (cut(0.01), "model.safetensors"),
    "cut in half": (cut(0.5), "model.safetensors"),
    "cut at the end": (cut(0.9999), "model.safetensors"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "missing shard": (shards({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}), "model-2"),
    "shard elsewhere": (shards({"weight_map": {"a": "../model.safetensors"}}), "model.safetensors"),
    "shard above": (shards({"weight_map": {"a": "sub/../../model-1.safetensors"}}), "model-1.safetensors"),
    "shard of a long name": (shards({"weight_map": {"a": "n" * 5000}}), "not in the folder"),
    "promised tensor": (in_two(promised=["model.extra.weight"]), "`model.extra.weight`, which no shard holds"),
    "tensor in two shards": (in_two(again=[Q]), f"`{Q}` is in `model-1.safetensors` and in"),
    "pickle alone": (pickled, "pickles are never read"),
    "no tensors": (weights(dict.clear), "holds no tensors"),
    "no map of shards": (shards({"metadata": {}}), "weight_map"),
    "index of nothing": (shards([]), "index.json"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config cut": (text("config.json", '{"model_type": "lla'), "config.json"),
    "config of a list": (text("config.json", "[]"), "config.json"),
    "config of bytes": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json"),
}


def refused(call, named):
    with pytest.raises(UserError) as caught:
        call()
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(facts, tensors, write_folder):
    return write_folder(facts, tensors(facts))


@pytest.mark.parametrize("damage, named", REFUSED.values(), ids=REFUSED.keys())
def test_refused(folder, damage, named):
    load_lm(str(folder))
    damage(folder)
    refused(lambda: load_lm(str(folder)), named)


IMPOSSIBLE = {
    "layer_types: one too many": ("qwen2", {"layer_types": [FULL] * 4}, "layer_types"),
    "layer_types: unknown": ("mistral", {"layer_types": [SLIDING, "chunked_attention", FULL]}, "layer_types"),
    "layer_types: text": ("gemma2", {"layer_types": SLIDING}, "layer_types"),
    "layer_types: lists": ("gemma3_text", {"layer_types": [[SLIDING]] * 3}, "layer_types"),
    "no window, mistral": ("mistral", {"sliding_window": None, "layer_types": [SLIDING] * 3}, "`layer_types`"),
    "no window, qwen2": ("qwen2", {"layer_types": [SLIDING] * 3}, "`sliding_window`"),
    "no window, gemma2": ("gemma2", {"sliding_window": None}, "`sliding_window`"),
    "first layer of text": ("qwen2", {"use_sliding_window": True, "max_window_layers": "two"}, "impossible"),
    "odd share": ("gpt_neox", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "on 3 of"),
    "share above one": ("gpt_neox", {"rope_parameters": ROPE | {"partial_rotary_factor": 2.0}}, "on 12 of 6"),
    "heads of gpt2": ("gpt2", {"n_head": 5}, "not a multiple of 5"),
    "heads beyond the width": ("gpt2", {"n_head": 25}, "impossible"),
    "activation of gpt2": ("gpt2", {"activation_function": "quick_gelu"}, "quick_gelu"),
    "activation of gemma": ("gemma2", {"hidden_activation": "mish"}, "mish"),
    "infinite": ("gpt_neox", {"layer_norm_eps": float("inf")}, "`layer_norm_eps` is inf"),
    "no number": ("gemma2", {"query_pre_attn_scalar": float("nan")}, "`query_pre_attn_scalar` is nan"),
    "negative": ("gemma2", {"attn_logit_softcapping": -3.0}, "`attn_logit_softcapping` is -3.0"),
    "truth": ("mistral", {"rms_norm_eps": True}, "`rms_norm_eps` is True"),
    "number for a truth": ("llama", {"tie_word_embeddings": 1}, "`tie_word_embeddings` is 1"),
    "list of sizes": ("llama", {"hidden_size": [24]}, "`hidden_size` is [24]"),
}


@pytest.mark.parametrize("kind, changes, named", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_impossible_facts(write_folder, kind, changes, named):
    """Each family's facts are read beside as many tensors as there may be layers; control: before the change."""
    facts, some = CONFIGS[kind][0] | {"model_type": kind}, {f"x{i}": np.ones(1, np.float32) for i in range(4)}
    assert load_config(str(write_folder(facts, some))) == HUB[kind].config(facts)
    refused(lambda: load_config(str(write_folder(facts | changes, some))), named)


@pytest.mark.parametrize("damage", ["rope yarn", "missing shard", "pickle alone", "list of types", "no tensors"])
def test_points_tells_one_line(folder, damage, capsys):
    """Status 2 and one line at the command line; control: 0 and a drawing before the damage."""
    assert main(["points", "--model", str(folder)]) == 0 and capsys.readouterr().out
    REFUSED[damage][0](folder)
    assert main(["points", "--model", str(folder)]) == 2
    told = capsys.readouterr()
    assert REFUSED[damage][1] in told.err and told.err.count("\n") == 1 and told.out == ""


@pytest.mark.parametrize(
    "harmless",
    [
        config(use_cache=False, attention_dropout=0.1, eos_token_id=[1, 2], torch_dtype="bfloat16"),
        config(hidden_act="silu", rope_scaling=None, attention_bias=False),
        put("model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(3, np.float32)),
        in_two(),
    ],
)
def test_what_changes_nothing_is_not_refused(folder, tokens, harmless):
    """Control of the refusals: keys and buffers that the forward pass does not read give the same logits."""
    before = np.asarray(load_lm(str(folder))(tokens))
    harmless(folder)
    np.testing.assert_array_equal(np.asarray(load_lm(str(folder))(tokens)), before)


def test_all_strangers_are_listed_in_one_error(folder):
    names = [f"model.layers.{i}.mlp.extra.weight" for i in range(3)]
    weights(lambda tensors: tensors.update(dict.fromkeys(names, np.ones(2, np.float32))))(folder)
    with pytest.raises(UserError) as caught:
        load_lm(str(folder))
    assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize("name", ["nowhere", "notes.txt", "nowhere.gguf"])
def test_a_path_that_is_no_model(tmp_path, name):
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(UserError, match=name):
        load_lm(str(tmp_path / name))
