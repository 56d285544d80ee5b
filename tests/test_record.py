"""What is said of a dictionary's origin: each difference where it is there, and nothing where it is not."""

from dataclasses import replace

import numpy as np
import pytest

from qsae_jax.acts.tokens import Windows
from qsae_jax.lm.families import HUB
from qsae_jax.lm.load import load_lm
from qsae_jax.lm.save import save_lm
from qsae_jax.lm.tap import Point, points
from qsae_jax.record import differences, learnt_under, notes_on, origin
from tests.lm.families import CONFIGS

LAYER_NORM = HUB["gpt2"].config(dict(CONFIGS["gpt2"][0]))
RMS_NORM = HUB["gemma2"].config(dict(CONFIGS["gemma2"][0]))
USED = {"model": "hf:google/gemma-2-2b@main", "config": LAYER_NORM, "point": "blocks.1.resid_post"}
USED |= {"scheme": "fp", "tokens": "text:some.txt", "bos": True}


def said(facts, **changes):
    return differences(facts, **(USED | changes))


# A dictionary's record -> what is said of it, when it is used as USED says; None: nothing.
RECORDS = [
    ({}, None),
    ({"hook_name": "blocks.1.hook_resid_post"}, None),
    ({"hook_name": "blocks.1.resid_post"}, None),
    ({"hook_name": "blocks.1.hook_resid_pre"}, "at blocks.1.hook_resid_pre, not at blocks.1.resid_post"),
    ({"hook_name": "blocks.11.hook_resid_post"}, "at blocks.11.hook_resid_post, not"),
    ({"quantization": "fp"}, None),
    ({"quantization": "int4"}, "activations of int4, not of fp"),
    ({"model_name": "hf:google/gemma-2-2b@main"}, None),
    ({"model_name": "google/gemma-2-2b"}, None),
    ({"model_name": "gemma-2-2b"}, None),
    ({"model_name": "Gemma-2-2B"}, None),
    ({"model_name": "gemma-2-2b-it"}, "trained on gemma-2-2b-it"),
    ({"model_name": "gpt2-small"}, "trained on gpt2-small"),
    ({"prepend_bos": True}, None),
    ({"prepend_bos": False}, "prepend_bos False, these windows have True"),
    ({"prepend_bos": None}, None),
    ({"processing": "none"}, None),
    ({"processing": "transformer_lens"}, "processing transformer_lens, not none: see --processing"),
    ({"model_from_pretrained_kwargs": {}}, None),
    ({"model_from_pretrained_kwargs": {"center_writing_weights": False}}, None),
    ({"model_from_pretrained_kwargs": {"center_writing_weights": True}}, "processing transformer_lens, not none"),
    ({"dataset_path": "stdlib-docs"}, None),
    ({"dataset_path": "text:some.txt"}, "trained on these tokens"),
]


@pytest.mark.parametrize("facts, expected", RECORDS)
def test_a_difference_is_said_where_it_is_there(facts, expected):
    """Each line alone: the ones without a difference are the controls."""
    lines = said(facts)
    assert len(lines) == (expected is not None), lines
    assert all(expected in line and line.startswith("was trained ") for line in lines)


def test_all_differences_are_said_at_once():
    facts = {"hook_name": "embed", "quantization": "int8", "model_name": "other", "prepend_bos": False}
    facts |= {"processing": "transformer_lens", "dataset_path": "text:some.txt"}
    assert len(said(facts)) == 6 and len(said(facts, bos=None)) == 5


@pytest.mark.parametrize("model", ["gpt2", "openai-community/gpt2", "hf:openai-community/gpt2@main", "/models/gpt2/"])
def test_gpt2_small_is_gpt2(model):
    """TransformerLens's name for it. Control: gpt2-medium is another."""
    assert said({"model_name": "gpt2-small"}, model=model) == said({"model_name": "gpt2"}, model=model) == []
    assert said({"model_name": "gpt2-medium"}, model=model) == ["was trained on gpt2-medium"]


@pytest.mark.parametrize("prepended", [True, False])
def test_unknown_windows_say_nothing_of_bos(prepended):
    """Neither those that are used nor those it was trained on. Control: known ones that differ do."""
    facts = {"prepend_bos": prepended, "dataset_path": "text:other.txt"}
    assert said(facts | {"dataset_path": "npy:x.npy"}, bos=not prepended) == []
    assert said(facts, bos=None) == said(facts, bos=prepended) == []
    assert len(said(facts, bos=not prepended)) == 1


UNDER = [
    ({}, None),
    ({"processing": "none"}, "none"),
    ({"processing": "transformer_lens"}, "transformer_lens"),
    ({"processing": "none", "model_from_pretrained_kwargs": {"center_writing_weights": True}}, "none"),
    ({"model_from_pretrained_kwargs": None}, None),
    ({"model_from_pretrained_kwargs": {}}, "none"),
    ({"model_from_pretrained_kwargs": {"center_writing_weights": False}}, "none"),
    ({"model_from_pretrained_kwargs": {"fold_ln": False}}, "none"),
    ({"model_from_pretrained_kwargs": {"fold_ln": True}}, "none"),
    ({"model_from_pretrained_kwargs": {"fold_ln": True, "center_writing_weights": True}}, "transformer_lens"),
    ({"model_from_pretrained_kwargs": {"n_devices": 2}}, "none"),
    ({"model_from_pretrained_kwargs": {"center_writing_weights": True}}, "transformer_lens"),
]


@pytest.mark.parametrize("facts, expected", UNDER)
def test_what_a_record_says_of_the_processing(facts, expected):
    """Ours by name, SAELens's by its arguments. Control: a class that TransformerLens does not process says nothing."""
    assert learnt_under(facts) == expected
    assert learnt_under({"model_class_name": "HookedTransformer"} | facts) == expected
    assert learnt_under({"model_class_name": "AutoModelForCausalLM"} | facts) == facts.get("processing")


def test_the_processing_that_is_asked_for_is_the_one_that_counts():
    """With --processing transformer_lens the warnings turn round; an RMSNorm model's stream does not move."""
    centred, plain = ({"model_from_pretrained_kwargs": {"center_writing_weights": moved}} for moved in (True, False))
    processed = {"config": replace(LAYER_NORM, processing="transformer_lens")}
    assert said(centred, **processed) == said(plain) == said({}, **processed) == []
    assert said(plain, **processed) == [
        "was trained on a model with processing none, not transformer_lens: see --processing"
    ]
    for facts in (centred, plain, {"processing": "transformer_lens"}):
        assert said(facts, config=RMS_NORM) == []
        assert said(facts, config=replace(RMS_NORM, processing="transformer_lens")) == []


def test_notes_on_a_model(tiny_folder, tiny_lm, tmp_path):
    """Packed or distorted weights, and processed ones. Control: of the plain model nothing."""
    save_lm(tiny_lm, tmp_path / "int4", {"qsae_jax": "int4, written by a test"})
    model, packed = str(tiny_folder), str(tmp_path / "int4")
    assert notes_on(model, "none") == []
    (shipped,) = notes_on(packed, "none")
    (processed,) = notes_on(model, "transformer_lens")
    assert "not the original floating point" in shipped and "(int4, written by a test)" in shipped
    assert "processed (transformer_lens)" in processed
    assert notes_on(packed, "transformer_lens") == [shipped, processed]


def test_an_origin_agrees_with_itself(tiny_folder):
    """What is recorded when a dictionary is trained, read when it is used in the same way on other tokens: no
    difference, at any point; and SAELens's names. Control: used at another point it differs."""
    lm = load_lm(str(tiny_folder))
    windows = Windows(np.zeros((2, 16), np.int32), "text:some.txt", bos=True)
    hooks = []
    for point in map(str, points(lm)):
        facts = origin("org/tiny", "none", point, windows, 3, "text:some.txt")
        hooks.append(facts["hook_name"])
        assert str(Point.parse(hooks[-1])) == point
        used = {"model": "hf:org/tiny", "point": point, "tokens": "text:other.txt"}
        assert said(facts | {"quantization": "fp"}, **used) == []
        assert len(said(facts, **(used | {"point": "blocks.7.resid_pre"}))) == 1
    assert {"hook_embed", "blocks.1.hook_resid_post", "blocks.0.attn.hook_z", "blocks.2.mlp.hook_post",
            "blocks.0.hook_attn_out", "blocks.0.hook_mlp_out", "final"} <= set(hooks)  # fmt: skip
    assert facts["context_size"] == 16 and facts["prepend_bos"] is True and facts["seqpos_slice"] == [3, None]
    assert facts["processing"] == learnt_under(facts) == "none"
    assert learnt_under(origin("tiny", "transformer_lens", "embed", windows, 0, "x")) == "transformer_lens"
