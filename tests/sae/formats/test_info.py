"""`qsae sae info` and `qsae sae convert`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qsae_jax.cli import main
from qsae_jax.sae.formats import load_stored, save_sae
from qsae_jax.sae.info import info, lines

from .conftest import D, M, arrays_of
from .test_owners import CASES
from .test_writers import FACTS, dictionary

GOLDEN = Path(__file__).parents[1] / "goldens" / "topk"


def test_the_facts_of_a_dictionary(tmp_path):
    """Norms, thresholds and shares against NumPy. Controls: a row of zeros, a latent that never fires, are counted."""
    sae, a = dictionary("jumprelu"), arrays_of()
    sae.W_dec[...] = sae.W_dec[...].at[3].set(0)
    sae.sparsity.threshold[...] = sae.sparsity.threshold[...].at[5].set(np.inf)
    save_sae(sae, tmp_path / "a", FACTS)
    fires = np.linspace(-10, 0, M, dtype=np.float32)
    save_file({"sparsity": fires}, tmp_path / "a" / "sparsity.safetensors")
    facts = info(tmp_path / "a")
    norms = np.linalg.norm(a["W_enc"], axis=0)
    assert facts["encoder_norms"] == pytest.approx({"min": norms.min(), "median": np.median(norms), "max": norms.max()})
    assert facts["decoder_norms"]["min"] == 0 and facts["zero_decoder_rows"] == pytest.approx(1 / M)
    finite = np.delete(a["threshold"], 5)
    assert facts["threshold"] == pytest.approx({"min": finite.min(), "median": np.median(finite), "max": finite.max(),
                                                "never": 1 / M})  # fmt: skip
    assert facts["bias_norms"]["b_dec"] == pytest.approx(np.linalg.norm(a["b_dec"]))
    assert facts["parameters"] == 2 * D * M + 2 * M + D and sum(facts["parameter_shares"].values()) == pytest.approx(1)
    frequency = 10.0**fires
    assert facts["density"] == pytest.approx({"dead": (fires < -9).mean(), "over_1_percent": (frequency > 0.01).mean(),
                                              "over_10_percent": (frequency > 0.1).mean(),
                                              "median": np.median(frequency)})  # fmt: skip
    assert (facts["architecture"], facts["origin"]) == ("jumprelu", FACTS)
    assert "density" not in info(GOLDEN) and "threshold" not in info(GOLDEN)


def test_the_verb_tells_them(tmp_path, capsys):
    """As text and as JSON, of any owner's files."""
    assert main(["sae", "info", str(GOLDEN)]) == 0
    said = capsys.readouterr().out
    assert "topk (k 3)" in said and "blocks.0.hook_resid_post" in said and "saelens 6" in said
    folder = CASES["gemma_scope, 2 affine"].write(tmp_path, arrays_of())
    assert main(["sae", "info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"] == "jumprelu, transcoder with a skip connection" and facts["format"] == "gemma_scope 2"
    assert all("\n" not in line for line in lines(facts))


def test_a_dictionary_is_carried_from_owner_to_owner(tmp_path, capsys, x):
    """sparsify to SAELens to dictionary_learning: the same codes. An old version of SAELens does not stay in the file,
    which SAELens would then read as an old one."""
    source = CASES["sparsify, autoencoder"].write(tmp_path / "in", arrays_of())
    right, way = load_stored(source), source
    for to in ("saelens", "dictionary_learning", "sparsify"):
        assert main(["sae", "convert", str(way), "--to", to, "--out", str(tmp_path / to)]) == 0
        way = tmp_path / to
        np.testing.assert_allclose(load_stored(way).sae.encode(x), right.sae.encode(x), rtol=1e-5, atol=1e-5)
    assert "converted_from" in load_stored(tmp_path / "saelens").metadata
    old = CASES["saelens, 5: topk"].write(tmp_path / "old", arrays_of())
    cfg = json.loads((old / "cfg.json").read_text()) | {"sae_lens_version": "5.3.0"}
    (old / "cfg.json").write_text(json.dumps(cfg))
    assert main(["sae", "convert", str(old), "--to", "saelens", "--out", str(tmp_path / "new")]) == 0
    assert load_stored(tmp_path / "new").metadata["sae_lens_version"].startswith("6.")


@pytest.mark.parametrize(
    "words, message",
    [
        (["info", "nowhere"], "`nowhere` is not there"),
        (["inform", "x"], "invalid choice: 'inform'"),
        (["convert", "{golden}", "--to", "gemma_scope", "--out", "{out}"], "Gemma Scope holds JumpReLU"),
        (["convert", "{golden}", "--to", "safetensors", "--out", "{out}"], "no format `safetensors`"),
        (["convert", "{golden}", "--to", "saelens", "--out", "{golden}"], "not a new or empty folder"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, capsys, words, message):
    golden = shutil.copytree(GOLDEN, tmp_path / "golden")
    words = [word.format(golden=golden, out=tmp_path / "out") for word in words]
    assert main(["sae", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()
