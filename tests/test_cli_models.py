"""The command line on models of several families: drawing them, processing their weights, and what is said of a
dictionary that was trained otherwise."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qsae_jax import load_lm, save_sae
from qsae_jax.cli import main
from qsae_jax.lm.families import HUB
from qsae_jax.lm.load import abstract_lm
from qsae_jax.lm.save import save_lm
from tests.lm.families import CONFIGS

POINT = "blocks.1.resid_post"
GPT2 = CONFIGS["gpt2"][0] | {"vocab_size": 300, "n_embd": 16}
SMALL = [w for s in ("train.tokens=240", "train.batch=40", "sae.k=4", "sae.expansion=2") for w in ("--set", s)]


@pytest.fixture(scope="module")
def gpt2(tiny_folder, tmp_path_factory):
    """A random GPT-2, whose LayerNorms make the processing move the stream, with the tokenizer of the tiny Llama."""
    random, folder = np.random.default_rng(5), tmp_path_factory.mktemp("lm") / "gpt2"
    empty = abstract_lm(HUB["gpt2"].config(GPT2))
    save_lm(jax.tree.map(lambda x: jnp.asarray(random.normal(0.1, 0.3, x.shape), x.dtype), empty), folder)
    for file in tiny_folder.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def audit(tiny_folder, tiny_sae, tmp_path, capsys):
    """`audit(metadata, ...)`: the audit.json of a dictionary of which this is the record, and the notes it printed."""
    (tmp_path / "some.txt").write_text("some words and others " * 20)

    def run(metadata, model=tiny_folder, sae=None, **more):
        if sae is None:
            save_sae(tiny_sae(), sae := tmp_path / "sae", metadata)
        given = {"model": model, "sae": sae, "tokens": f"text:{tmp_path}/some.txt", "schemes": "int8", "seq": 16}
        given |= {"limit": 96, "out": tmp_path / "out", "point": POINT, **more}
        assert main(["audit", *(str(word) for key, value in given.items() for word in (f"--{key}", value))]) == 0
        printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        return json.loads((tmp_path / "out/audit.json").read_text()), printed

    return run


def refused(argv, capsys):
    """The one line on standard error, after status 2."""
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("qsae: "), lines
    return lines[0]


def test_points_draws_without_loading_weights(tiny_folder, tmp_path, capsys):
    """A model of which every weight is NaN is drawn as the sound one. Control: what loads it refuses it."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    save_file({name: np.full_like(value, np.nan) for name, value in load_file(file).items()}, file)
    drawn = []
    for folder in (tiny_folder, tmp_path / "model"):
        assert main(["points", "--model", str(folder)]) == 0
        drawn.append(capsys.readouterr().out.removeprefix(str(folder)))
    assert drawn[0] == drawn[1]
    assert "llama, " in drawn[0] and "3 blocks of width 16" in drawn[0] and "BOS before each window: no" in drawn[0]
    assert "blocks.{0..2}.attn.q " in drawn[0] and "blocks.{0..2}.resid_mid " in drawn[0]
    argv = ["quantize", "--model", str(tmp_path / "model"), "--scheme", "int4", "--out", str(tmp_path / "out")]
    assert "NaN" in refused(argv, capsys)


def test_points_says_which_family(gpt2, capsys):
    """Control: it is not the Llama of the test above."""
    assert main(["points", "--model", str(gpt2)]) == 0
    told = capsys.readouterr().out
    assert "gpt2, " in told and "positions learned" in told and "blocks.{0..2}.mlp.up_bias" in told
    assert "mlp.gate" not in told


def test_processing_stands_in_the_audit(audit):
    """None by default, and then without a note; `transformer_lens` where it is asked for, and noted."""
    plain, said = audit({})
    assert plain["processing"] == "none" and plain["notes"] == said == []
    processed, said = audit({}, processing="transformer_lens")
    assert processed["processing"] == "transformer_lens"
    assert said == [f"note: {note}" for note in processed["notes"]] and len(said) == 1
    assert "processed (transformer_lens) before they were quantized" in said[0]


OTHERWISE = {
    "hook_name": ("blocks.1.hook_resid_pre", "was trained at blocks.1.hook_resid_pre, not at blocks.1.resid_post."),
    "model_name": ("gpt2-medium", "was trained on gpt2-medium."),
    "prepend_bos": (True, "was trained with prepend_bos True, these windows have False."),
    "model_from_pretrained_kwargs": ({"center_writing_weights": True},
                                     "with processing transformer_lens, not none: see --processing."),
}  # fmt: skip


def test_a_dictionary_trained_otherwise_is_noted(audit, gpt2, tmp_path):
    """Printed and in audit.json, a line each and in this order. Control: one trained alike gives none."""
    notes, said = audit({key: value for key, (value, _) in OTHERWISE.items()}, model=gpt2)
    assert said == [f"note: {note}" for note in notes["notes"]] and len(said) == len(OTHERWISE)
    for note, (_, expected) in zip(notes["notes"], OTHERWISE.values(), strict=True):
        assert note.startswith(f"The dictionary {tmp_path}/sae was ") and note.endswith(expected)
    alike = {"hook_name": "blocks.1.hook_resid_post", "model_name": "gpt2-small", "prepend_bos": False}
    notes, said = audit(alike | {"model_from_pretrained_kwargs": {}}, model=gpt2)
    assert notes["notes"] == said == []


def test_train_records_the_processing_that_an_audit_asks_for(audit, gpt2, tmp_path):
    """A dictionary trained under the processing is noted when it is audited without. Controls: not with it; and the
    processing did move the stream, and left the perplexity within 1e-4."""
    argv = ["train", "--model", str(gpt2), "--point", POINT, "--seq", "16", "--tokens", f"text:{tmp_path}/some.txt"]
    assert main([*argv, *SMALL, "--out", str(tmp_path / "t"), "--processing", "transformer_lens"]) == 0
    record = json.loads((tmp_path / "t/saes/fp/cfg.json").read_text())["metadata"]
    assert record["processing"] == "transformer_lens" and record["hook_name"] == "blocks.1.hook_resid_post"
    sae, named = tmp_path / "t/saes/fp", "trained on a model with processing"
    plain, told = audit({}, gpt2, sae)
    assert [line.partition(named)[2] for line in told if named in line] == [
        " transformer_lens, not none: see --processing."
    ]
    processed, told = audit({}, gpt2, sae, processing="transformer_lens")
    assert told and not any(named in line for line in told)
    plain, processed = plain["reference"], processed["reference"]
    assert processed["ppl"] == pytest.approx(plain["ppl"], rel=1e-4)
    assert processed["fvu"] != pytest.approx(plain["fvu"], rel=1e-2)


@pytest.mark.parametrize("verb", ["audit", "train", "compare"])
def test_an_unknown_processing_gives_one_line(verb, tiny_folder, capsys, tmp_path):
    argv = [verb, "--model", str(tiny_folder), "--tokens", "x", "--out", str(tmp_path / "out")]
    told = refused([*argv, "--processing", "transformer_lense"], capsys)
    assert "--processing" in told and "transformer_lense" in told and "'transformer_lens'" in told.replace("`", "'")
    assert not (tmp_path / "out").exists()


def test_a_study_with_an_unknown_processing_is_refused(capsys, tmp_path, tiny_folder):
    """With the nearest name, before anything is made. Control: with that name it is another complaint."""
    file = tmp_path / "s.toml"
    text = f'model = "{tiny_folder}"\npoint = "{POINT}"\nschemes = ["int8"]\ncompare = "{{}}"\nprocessing = "{{}}"\n'
    file.write_text(text.format("fp", "transformer_lense"))
    argv = ["run", str(file), "--out", str(tmp_path / "out")]
    assert "unknown processing `transformer_lense`; nearest: transformer_lens" in refused(argv, capsys)
    assert not (tmp_path / "out").exists()
    assert "`compare` is `fp`" in refused([*argv, "--set", "processing=transformer_lens"], capsys)
    assert "unknown processing `lens`" in refused([*argv, "--set", "processing=lens"], capsys)


def test_a_loaded_model_is_the_one_that_was_drawn(gpt2):
    """The fixture is what it says: learned positions, LayerNorm, three blocks, the tiny dictionary's width."""
    config = load_lm(str(gpt2)).config
    assert config.layer_norm and config.rope is None and (config.n_layers, config.d_model, config.vocab) == (3, 16, 300)
