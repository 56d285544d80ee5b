"""Files of SAELens 6: goldens that the real one wrote (tests/peers/write_goldens.py), our own, and broken ones."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qsae_jax.errors import UserError
from qsae_jax.sae.formats import load_sae, load_stored, save_sae
from qsae_jax.sae.sparsity import ReLU, TopK, across

GOLDENS = Path(__file__).parents[1] / "goldens"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums of 8 and 24 products
# What each golden shows, and the change to cfg.json that would ignore it.
FACTS = {
    "topk": {"k": 4},
    "topk_uncentred": {"apply_b_dec_to_input": True},
    "topk_rescaled": {"rescale_acts_by_decoder_norm": False},
    "standard": {"apply_b_dec_to_input": False},
    "standard_uncentred": {"apply_b_dec_to_input": True},
}


def edit(folder, **facts):
    """Change facts of cfg.json; None removes one."""
    cfg = json.loads((folder / "cfg.json").read_text()) | facts
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in cfg.items() if value is not None}))


@pytest.fixture
def copied(tmp_path):
    """`copied(case)`: a golden's folder to break."""
    return lambda case: Path(shutil.copytree(GOLDENS / case, tmp_path / case))


@pytest.mark.parametrize("case", FACTS)
def test_codes_and_reconstruction_of_saelens(case, copied):
    """What SAELens computed, to 1e-5. Control: with the fact that the golden shows ignored, the codes differ."""
    expected = load_file(GOLDENS / case / "expected.safetensors")
    sae = load_sae(GOLDENS / case)
    np.testing.assert_allclose(sae.encode(expected["x"]), expected["codes"], **CLOSE)
    np.testing.assert_allclose(sae.decode(sae.encode(expected["x"])), expected["reconstruction"], **CLOSE)
    assert isinstance(sae.sparsity, TopK if case.startswith("topk") else ReLU) and np.any(expected["codes"])
    folder = copied(case)
    edit(folder, **FACTS[case])
    assert not np.allclose(load_sae(folder).encode(expected["x"]), expected["codes"], **CLOSE)


def test_what_saelens_says_of_a_dictionary_is_kept():
    metadata = load_stored(GOLDENS / "topk").metadata
    assert metadata["hook_name"] == "blocks.0.hook_resid_post" and metadata["sae_lens_version"].startswith("6.")


def test_a_decoder_row_of_zeros_is_a_dead_latent(copied):
    """Rescaled by a norm of 0 it gives codes of 0, and no NaN. Control: the plain division gives NaN."""
    folder = copied("topk_rescaled")
    arrays = load_file(folder / "sae_weights.safetensors")
    arrays["W_dec"][5] = 0
    save_file(arrays, folder / "sae_weights.safetensors")
    codes = np.asarray(load_sae(folder).encode(load_file(folder / "expected.safetensors")["x"]))
    assert np.isfinite(load_sae(folder).W_dec[...]).all() and not np.any(codes[:, 5]) and np.any(codes)
    with np.errstate(invalid="ignore"):
        assert np.isnan(arrays["W_dec"] / np.linalg.norm(arrays["W_dec"], axis=-1, keepdims=True)).any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_floats_are_read_as_float32(copied, dtype):
    """The same numbers rounded to a file's dtype, bit for bit in float32. Control: float64 had to be rounded."""
    folder = copied("topk")
    arrays = {k: v.astype(jnp.dtype(dtype)) for k, v in load_file(folder / "sae_weights.safetensors").items()}
    save_file({k: v * v.dtype.type(1 / 3) for k, v in arrays.items()}, folder / "sae_weights.safetensors")
    sae, right = load_sae(folder), arrays["W_enc"] * arrays["W_enc"].dtype.type(1 / 3)
    assert sae.W_enc.dtype == jnp.float32
    assert np.array_equal(sae.W_enc, right.astype(np.float32))
    assert np.array_equal(right.astype(np.float32), right) == (dtype != "float64")


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("sparsity", [ReLU(), TopK(3)], ids=["relu", "topk"])
def test_saved_and_loaded_again(tmp_path, make_sae, params, mesh, sparsity, centred):
    """The same bits, sparsity, centring and metadata, saved from eight devices. Control: one bit of b_dec changed."""
    sae = make_sae(sparsity, centred=centred)
    save_sae(sae, tmp_path / "a", {"quantization": "int4-g128", "seed": 3})
    stored = load_stored(tmp_path / "a", mesh(2, 4))
    assert {s.data.shape for s in stored.sae.W_enc[...].addressable_shards} == {(8, 6)}
    sparsity = across(sparsity, sae.latents, mesh(2, 4))
    assert (stored.sae.sparsity, stored.sae.centred) == (sparsity, centred)
    assert {"quantization": "int4-g128", "seed": 3}.items() <= stored.metadata.items()
    save_sae(stored.sae, tmp_path / "b", stored.metadata)
    again = params(load_sae(tmp_path / "b"))
    assert all(np.array_equal(again[name], a) for name, a in params(sae).items())
    assert (tmp_path / "a" / "cfg.json").read_bytes() == (tmp_path / "b" / "cfg.json").read_bytes()
    stored.sae.b_dec[...] = jnp.nextafter(stored.sae.b_dec[...], 9.0)
    assert not np.array_equal(params(stored.sae)["b_dec"], again["b_dec"])


def test_cfg_json_has_what_saelens_6_needs(tmp_path, make_sae):
    """The keys of a cfg.json of SAELens 6.54 itself, and a version of the format, without which SAELens takes it for
    an older one and drops the metadata. Control: a standard dictionary has no k."""
    for case, sparsity in ("topk", TopK(3)), ("standard", ReLU()):
        save_sae(make_sae(sparsity), tmp_path / case)
        ours, theirs = (json.loads((folder / case / "cfg.json").read_text()) for folder in (tmp_path, GOLDENS))
        assert set(ours) == set(theirs)
        assert {key for key in ours if ours[key] != theirs[key]} <= {"metadata"}
        assert ours["metadata"]["sae_lens_version"].split(".")[0] == "6"
        assert ("k" in ours) == (case == "topk")


def rewritten(change):
    """A fault of the weights: the arrays after `change`."""

    def plant(folder):
        arrays = load_file(folder / "sae_weights.safetensors")
        change(arrays)
        save_file(arrays, folder / "sae_weights.safetensors")

    return plant


def truncate(folder):
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


FAULTS = {
    "no folder": (shutil.rmtree, "is not there: give a folder"),
    "no cfg": (lambda folder: (folder / "cfg.json").unlink(), "cfg.json` is not there"),
    "cfg half": (lambda folder: (folder / "cfg.json").write_text('{"d_in": 8'), "not readable JSON"),
    "no weights": (lambda folder: (folder / "sae_weights.safetensors").unlink(), "safetensors` is not there"),
    "truncated": (truncate, "not a readable safetensors file"),
    "nan": (rewritten(lambda a: a["b_enc"].__setitem__(2, np.nan)), "b_enc holds NaN"),
    "infinite": (rewritten(lambda a: a["W_dec"].__setitem__((2, 1), np.inf)), "W_dec holds NaN or infinite"),
    "transposed": (rewritten(lambda a: a.update(W_enc=a["W_enc"].T.copy())), r"W_enc has shape \(24, 8\)"),
    "array missing": (rewritten(lambda a: a.pop("b_dec")), "expected W_enc, b_enc, W_dec, b_dec"),
    "array unknown": (rewritten(lambda a: a.update(threshold=a["b_enc"].copy())), "holds .*threshold"),
    "widths": (lambda folder: edit(folder, d_sae=25), r"\(8, 25\): correct cfg.json"),
    "architecture": (
        lambda folder: edit(folder, architecture="matching_pursuit"),
        "`matching_pursuit` is not supported",
    ),
    "unfinished": (lambda folder: edit(folder, architecture="batchtopk"), "expected .*topk_threshold"),
    "whitened": (lambda folder: edit(folder, normalize_activations="covariance_whitening"), "covariance_whitening"),
    "no scale": (lambda folder: edit(folder, normalize_activations="expected_average_only_in"), "no activation_scaler"),
    "heads": (lambda folder: edit(folder, reshape_activations="hook_q"), "reshape_activations `hook_q`"),
    "unknown key": (lambda folder: edit(folder, rescale_acts_by_decoder_norms=True), "unknown key.*nearest: rescale"),
    "k too big": (lambda folder: edit(folder, k=25), "k 25, expected a whole number up to 24"),
    "k missing": (lambda folder: edit(folder, k=None), "k None"),
    "k no number": (lambda folder: edit(folder, k="3"), "k '3'"),
    "k zero": (lambda folder: edit(folder, k=0), "k 0"),
    "two owners": (lambda folder: (folder / "params.npz").touch(), "of different dictionaries"),
    "another": (
        lambda folder: [p.unlink() for p in folder.iterdir()],
        "holds nothing; a dictionary's folder has one of",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_dictionary_is_refused_in_one_line(copied, fault):
    """One line that names the folder and the fault. Control: the golden before it was broken is read."""
    plant, message = FAULTS[fault]
    folder = copied("topk")
    load_sae(folder)
    plant(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_sae(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
