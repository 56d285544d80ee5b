"""`qsae train` in all its forms, and `qsae sae`, as a user types them."""

import json
import shutil

import numpy as np
import pytest

from qsae_jax import load_sae, verbs
from qsae_jax.cli import main
from qsae_jax.sae.formats import load_stored

pytestmark = pytest.mark.slow

POINT = "blocks.1.resid_post"


@pytest.fixture
def train(tiny_folder, tiny_windows, tmp_path):
    """`train(out, words)`: the exit status of a small training into that folder."""
    np.save(tmp_path / "tokens.npy", tiny_windows(12).ids)

    def run(out, *more, schemes="fp,int4"):
        given = ["--model", str(tiny_folder), "--tokens", f"npy:{tmp_path / 'tokens.npy'}", "--point", POINT]
        small = ["--set", "train.tokens=96", "--set", "train.batch=16"]
        small += [] if "--from" in more else ["--set", "sae.expansion=2"]
        return main(["train", *given, "--schemes", schemes, *small, *more, "--out", str(tmp_path / out)])

    return run


@pytest.mark.slow
def test_kinds_and_seeds_on_one_stream(train, tmp_path, capsys):
    """Two twins, two kinds, two seeds: eight folders named by what differs, each saying its twin, seed and kind; and
    TensorBoard's files. Control: the seeds differ in weights."""
    given = [
        "--sae",
        "batchtopk,relu",
        "--set",
        "sae.k=3",
        "--set",
        "train.seed={0,1}",
        "--set",
        "train.log=tensorboard",
    ]
    assert train("a", *given) == 0
    names = sorted(path.name for path in (tmp_path / "a" / "saes").iterdir())
    assert names == sorted(f"{t}-{k}-seed{s}" for t in ("fp", "int4") for k in ("batchtopk", "relu") for s in (0, 1))
    one, other = (load_stored(tmp_path / "a" / "saes" / f"int4-batchtopk-seed{s}") for s in (0, 1))
    assert one.sae.sparsity.name == "jumprelu" and (one.metadata["quantization"], one.metadata["seed"]) == ("int4", 0)
    assert one.metadata["training"]["sparsity"] == "batchtopk"
    assert not np.allclose(one.sae.W_dec[...], other.sae.W_dec[...])
    assert len(list((tmp_path / "a" / "train" / "tensorboard").iterdir())) == 8
    assert len(list((tmp_path / "a" / "train").glob("*.jsonl"))) == 8
    capsys.readouterr()
    assert main(["sae", "info", str(tmp_path / "a" / "saes" / "fp-relu-seed1"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["latents"] == 32 and "fp" in json.dumps(facts)


@pytest.mark.slow
def test_a_transcoder_and_a_crosscoder(train, tmp_path, capsys):
    """From the stream to an MLP's output, the hook of what is written in the file; both twins side by side, with a
    table of its latents. Controls: audit refuses either in one line, and a crosscoder of one twin is refused."""
    assert train("t", "--target", "blocks.1.mlp_out", "--set", "sae.skip=true", "--set", "sae.k=3", schemes="fp") == 0
    made = load_stored(tmp_path / "t" / "saes" / "fp")
    assert made.sae.transcodes and made.sae.W_skip is not None
    assert made.metadata["hook_name_out"] == "blocks.1.hook_mlp_out"
    assert train("c", "--crosscoder", "--sae", "batchtopk", "--set", "sae.k=3") == 0
    assert "shared" in capsys.readouterr().out
    crossed = tmp_path / "c" / "saes" / "fp+int4"
    assert load_sae(crossed).d == 32 and (crossed / "latents.parquet").is_file()
    assert train("x", "--crosscoder", schemes="fp") == 2
    for folder in (tmp_path / "t" / "saes" / "fp", crossed):
        words = ["--model", "M", "--tokens", f"npy:{tmp_path / 'tokens.npy'}", "--schemes", "int4", "--point", POINT]
        words[1] = str(made.metadata["model_name"])
        assert main(["audit", *words, "--sae", str(folder), "--out", str(tmp_path / "audit")]) == 2
        assert len(capsys.readouterr().err.splitlines()[-1:]) == 1


def test_going_on_from_a_dictionary(train, tmp_path, capsys, monkeypatch):
    """With a learning rate of almost 0 the dictionary comes out as it went in, and the file names it. Control: without
    `--from` another does. It goes on after the 96 tokens that the first one saw, of the same source only. One that is
    not there gives one line."""
    passed, done = [], verbs.fit

    def fit(*args):
        passed.append(args[-1])
        return done(*args)

    monkeypatch.setattr(verbs, "fit", fit)
    assert train("a", "--set", "sae.k=3", schemes="fp") == 0
    before = str(tmp_path / "a" / "saes" / "fp")
    assert train("b", "--from", before, "--set", "sae.lr=1e-9", schemes="fp") == 0
    shutil.copy(tmp_path / "tokens.npy", tmp_path / "others.npy")
    assert train("e", "--from", before, "--tokens", f"npy:{tmp_path / 'others.npy'}", schemes="fp") == 0
    assert passed == [0, 96, 0]
    assert train("c", "--set", "sae.k=3", "--set", "sae.lr=1e-9", "--set", "train.seed=5", schemes="fp") == 0
    one, two, new = (load_stored(tmp_path / name / "saes" / "fp") for name in "abc")
    np.testing.assert_allclose(two.sae.W_dec[...], one.sae.W_dec[...], atol=1e-5)
    assert two.metadata["trained_from"] == before and two.sae.sparsity == one.sae.sparsity
    assert not np.allclose(new.sae.W_dec[...], one.sae.W_dec[...], atol=1e-2)
    capsys.readouterr()
    assert train("d", "--from", str(tmp_path / "none")) == 2
    assert "none` is not there" in capsys.readouterr().err
