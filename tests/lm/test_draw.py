"""A model drawn in words: what is said of it is counted again, and compared with transformers."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from qsae_jax.lm.draw import drawing
from qsae_jax.lm.families import HUB
from qsae_jax.lm.load import abstract_lm
from qsae_jax.lm.process import as_transformer_lens
from qsae_jax.lm.tap import capture
from tests.lm.families import CONFIGS

CASES = [(name, i) for name, configs in CONFIGS.items() for i in range(len(configs))]


def config_of(name, i=0, **changes):
    return HUB[name].config(json.loads(json.dumps(CONFIGS[name][i])) | changes)


def read(text):
    """The facts as lines, and the tables as dicts: weight -> (shape, parameters), point -> shape."""
    facts, weights, places = (part.splitlines() for part in text.split("\n\n"))
    shaped = {}
    for line in weights[1:]:
        name, *shape, size = line.replace(" x ", "x").split()
        assert name not in shaped
        shaped[name] = (tuple(map(int, shape[0].split("x"))), int(size.replace(",", "")))
    split = [line.replace(" x ", "x").split() for line in places[1:]]
    return facts, shaped, {name: tuple(map(int, shape.split("x"))) for name, shape in split}


def total(facts):
    return int(facts[0].split(": ")[1].split()[1].replace(",", ""))


@pytest.mark.parametrize("name, i", CASES)
def test_every_weight_is_listed(name, i):
    """The rows times the blocks they stand for are the total, and their names and shapes those of the tree. Control:
    one block more is drawn with another total and the same rows."""
    config = config_of(name, i)
    facts, weights, _ = read(drawing(name, config, None))
    blocks = {row: 3 if row.startswith("blocks.{0..2}.") else 1 for row in weights}
    assert sum(size * blocks[row] for row, (_, size) in weights.items()) == total(facts)
    assert all(np.prod(shape) == size for shape, size in weights.values())
    flat = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(abstract_lm(config)))}
    for layer in range(3):
        for row, (shape, _) in weights.items():
            flat_name = row.replace("{0..2}", str(layer))
            assert flat.pop(flat_name, shape if blocks[row] == 1 else None) == shape
    assert flat == {}
    more, rows, _ = read(drawing(name, replace(config, n_layers=4, windows=()), None))
    assert total(more) - total(facts) == sum(size for row, (_, size) in weights.items() if blocks[row] == 3)
    assert len(rows) == len(weights)


@pytest.mark.parametrize("name, i", [("llama", 0), ("gemma2", 0), ("gpt2", 1), ("gpt_neox", 2)])
def test_the_total_is_that_of_transformers(torch, name, i):
    """Heads tied and of their own. Control: one block more is another total in both."""
    from transformers import AutoConfig, AutoModelForCausalLM

    totals = []
    for layers in (3, 4):
        key = "n_layer" if name == "gpt2" else "num_hidden_layers"
        changes = {key: layers}
        config = AutoConfig.for_model(name, **json.loads(json.dumps(CONFIGS[name][i])) | changes)
        theirs = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        assert total(read(drawing(name, config_of(name, i, **changes), None))[0]) == theirs
        totals.append(theirs)
    assert totals[0] < totals[1]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_points_have_the_shapes_of_activations(tokens, name):
    """What a capture of the first block and the ends gives, token by token; a model in parallel has no `resid_mid`.
    Control: the same model one after the other has."""
    config = config_of(name)
    _, _, places = read(drawing(name, config, None))
    random = np.random.default_rng(0)
    lm = jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(x.dtype), abstract_lm(config))
    names = {row: row.replace("{0..2}", "0") for row in places}
    kept = capture(lm, names.values())(tokens)
    assert {row: kept[point].shape[2:] for row, point in names.items()} == places
    assert len(places) == (12 if config.parallel else 13) and places["blocks.{0..2}.resid_post"] == (24,)
    assert ("blocks.{0..2}.resid_mid" in places) == (name != "gpt_neox")
    assert "blocks.{0..2}.resid_mid" in read(drawing(name, replace(config, parallel=False), None))[2]


SLIDING = [
    ((4, 4, 4, 0, 0, 4, 0, 4), "a window of 4 in 5 of 8 blocks: 0-2, 5, 7"),
    ((0, 0, 0, 0, 0, 0, 7, 7), "a window of 7 in 2 of 8 blocks: 6-7"),
    ((3,) * 8, "a window of 3 in 8 of 8 blocks: 0-7"),
    ((0, 0, 0, 9, 0, 0, 0, 0), "a window of 9 in 1 of 8 blocks: 3"),
]


@pytest.mark.parametrize("windows, expected", SLIDING)
def test_windows_are_named_as_ranges(windows, expected):
    """Control: without windows there is no such line."""
    config = replace(config_of("gemma2"), n_layers=8, windows=windows)
    assert expected in read(drawing("x", config, None))[0]
    assert "a window" not in drawing("x", replace(config, windows=()), None)


# A fact -> the config that has it, and what takes it away.
FACTS = {
    "gated mlp of 40 (gelu_tanh)": ("gemma2", {"gated": False}),
    "RMSNorm before and after": ("gemma2", {"post_norms": False}),
    "caps: 3.0 on scores, 5.0 on logits": ("gemma2", {"score_cap": 0.0}),
    "head tied": ("gemma2", {"tied": False}),
    "8 heads of 6 on 2 key-value heads": ("gemma2", {"n_kv_heads": 4}),
    "base 77, 33 in windows": ("gemma3_text", {"local_rope": None}),
    "context 64": ("gemma2", {"context": 65}),
    "rotary of 4": ("gpt_neox", {"rope": config_of("llama").rope}),
    "(gelu) in parallel, LayerNorm": ("gpt_neox", {"parallel": False}),
    "positions learned": ("gpt2", {"rope": config_of("llama").rope}),
    "eps 0.003": ("gpt2", {"norm_eps": 0.001}),
}


@pytest.mark.parametrize("fact", FACTS)
def test_facts(fact):
    """Each is said of the model that has it. Control: with the fact changed it is not."""
    name, change = FACTS[fact]
    assert fact in drawing("x", config_of(name), None)
    assert fact not in drawing("x", replace(config_of(name), **change), None)


@pytest.mark.parametrize("bos, expected", [(True, "yes"), (False, "no"), (None, None)])
def test_bos(bos, expected):
    lines = [line for line in drawing("x", config_of("llama"), bos).splitlines() if "BOS" in line]
    assert lines == ([f"BOS before each window: {expected}"] if expected else [])


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_a_processed_model_is_drawn(name):
    """With the head and the biases that its processing made. Control: before, the head was tied."""
    random = np.random.default_rng(0)
    made = jax.tree.map(lambda x: jax.numpy.asarray(random.normal(size=x.shape), x.dtype), abstract_lm(config_of(name)))
    assert "head" not in read(drawing(name, config_of(name), None))[1]
    weights = read(drawing(name, as_transformer_lens(made).config, None))[1]
    assert weights["head"] == ((97, 24), 97 * 24) and ("head_bias" in weights) == (name == "gpt2")
