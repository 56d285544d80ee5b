"""Dictionaries that cross between us and their owners' real code, both ways: SAELens in every architecture, saved in
training and for inference; dictionary_learning through its own load_dictionary; sparsify."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.sae.formats import load_stored, save_sae
from qsae_jax.sae.model import NORMS, SAE
from qsae_jax.sae.sparsity import Gated, JumpReLU, ReLU, TopK
from tests.sae.formats.conftest import arrays_of
from tests.sae.formats.test_owners import CASES

torch = pytest.importorskip("torch")

CLOSE = {"rtol": 1e-5, "atol": 2e-5}  # float32 sums of 8 and 24 products
D, M, K = 8, 24, 3


@pytest.fixture
def x():
    return 2 * np.random.default_rng(9).standard_normal((7, D), np.float32) + 1


def fill(module):
    """Every parameter and buffer of floats off its default: rows of many lengths, thresholds above zero."""
    generator = torch.Generator().manual_seed(3)
    for name, value in module.state_dict().items():
        if not value.dtype.is_floating_point:
            continue
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float32)
        if name in ("W_dec", "decoder.weight"):
            drawn *= torch.linspace(0.5, 2, M)[:, None] if name == "W_dec" else torch.linspace(0.5, 2, M)
        value.copy_((drawn.abs() + 0.3 if "threshold" in name else drawn).to(value.dtype))
    return module


def theirs(module, x):
    """Codes and what the module gives for x."""
    with torch.no_grad():
        x = torch.tensor(x)
        return module.encode(x).numpy(), module(x).numpy()


def ours(sae, x):
    return np.asarray(sae.encode(x)), np.asarray(sae(x))


def agree(one, two):
    return all(np.allclose(a, b, **CLOSE) for a, b in zip(one, two, strict=True))


def check(sae, right, x):
    """Codes and outputs agree, and are not trivial. Control: with the decoder's rows in another order they do not."""
    assert np.count_nonzero(right[0]) > 10
    assert agree(ours(sae, x), right)
    sae.W_dec[...] = sae.W_dec[...][::-1]
    assert not agree(ours(sae, x), right)


def dictionary(kind, centred=True, skip=False, norm=None, transcodes=False):
    rng = np.random.default_rng(5)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    sparsity = {"relu": ReLU(), "topk": TopK(K), "jumprelu": JumpReLU(jnp.abs(draw(M)) + 0.3),
                "gated": Gated(draw(M), draw(M), draw(M))}[kind]  # fmt: skip
    b_enc = None if kind == "gated" else draw(M)
    rows = draw(M, D) * jnp.linspace(0.5, 2, M)[:, None]
    return SAE(sparsity, draw(D, M), b_enc, rows, draw(D), centred, draw(D, D) if skip else None, NORMS.get(norm),
               transcodes)  # fmt: skip


INFERENCE = ["standard", "topk", "gated", "jumprelu", "transcoder", "skip_transcoder", "jumprelu_transcoder",
             "jumprelu_skip_transcoder"]  # fmt: skip


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("kind", INFERENCE)
def test_we_read_every_architecture_of_saelens(tmp_path, x, kind, norm):
    """What its `save_model` writes. A transcoder's norm is refused: SAELens does not undo it, nor do we know more."""
    registry = pytest.importorskip("sae_lens.registry")
    make, config = registry.SAE_CLASS_REGISTRY[kind]
    facts = {"k": K, "rescale_acts_by_decoder_norm": True} if kind == "topk" else {}
    facts |= {"d_out": D, "apply_b_dec_to_input": False} if "transcoder" in kind else {}
    sae = fill(make(config(d_in=D, d_sae=M, normalize_activations=norm, **facts)))
    sae.save_model(tmp_path)
    if "transcoder" in kind and norm != "none":
        with pytest.raises(Exception, match="transcoder's normalize_activations"):
            load_stored(tmp_path)
        return
    stored = load_stored(tmp_path)
    assert "transcoder" not in kind or stored.sae.transcodes
    check(stored.sae, theirs(sae, x), x)


TRAINING = ["standard", "topk", "gated", "jumprelu", "batchtopk", "matryoshka_batchtopk"]


@pytest.mark.parametrize("scale", [None, 2.5])
@pytest.mark.parametrize("kind", TRAINING)
def test_we_read_what_saelens_saves_in_training(tmp_path, x, kind, scale):
    """Its checkpoint gives the codes that its own inference dictionary has, made from it by SAELens: norms and scale
    folded, the threshold of a BatchTopK carried over."""
    sae_lens, registry = pytest.importorskip("sae_lens"), pytest.importorskip("sae_lens.registry")
    make, config = registry.SAE_TRAINING_CLASS_REGISTRY[kind]
    facts = {"k": K} if "topk" in kind else {}
    facts |= {"matryoshka_widths": [8, M]} if "matryoshka" in kind else {}
    norm = "expected_average_only_in" if scale else "none"
    sae = fill(make(config(d_in=D, d_sae=M, normalize_activations=norm, **facts)))
    sae.save_model(tmp_path / "training")
    if scale:
        (tmp_path / "training" / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
        sae.fold_activation_norm_scaling_factor(scale)
    sae.save_inference_model(tmp_path / "inference")
    right = theirs(sae_lens.SAE.load_from_disk(tmp_path / "inference"), x)
    check(load_stored(tmp_path / "inference").sae, right, x)
    check(load_stored(tmp_path / "training").sae, right, x)


@pytest.mark.parametrize(
    "case",
    [
        *({"kind": kind, "centred": c} for kind in ("relu", "topk", "jumprelu", "gated") for c in (True, False)),
        *({"kind": "topk", "norm": norm} for norm in NORMS),
        *({"kind": kind, "skip": skip, "centred": False, "transcodes": True} for kind in ("relu", "jumprelu")
          for skip in (True, False)),
    ],
    ids=str,
)  # fmt: skip
def test_saelens_reads_what_we_write(tmp_path, x, case):
    sae_lens = pytest.importorskip("sae_lens")
    sae = dictionary(**case)
    save_sae(sae, tmp_path / "a", {"hook_name": "blocks.1.hook_resid_post", "quantization": "int4"})
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "a")
    assert loaded.cfg.metadata.quantization == "int4"
    check(sae, theirs(loaded, x), x)


CLASSES = {
    "AutoEncoder": (D, M),
    "AutoEncoderNew": (D, M),
    "GatedAutoEncoder": (D, M),
    "JumpReluAutoEncoder": (D, M),
    "AutoEncoderTopK": (D, M, K),
    "BatchTopKSAE": (D, M, K),
    "MatryoshkaBatchTopKSAE": (D, M, K, [8, M - 8]),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_we_read_every_class_of_dictionary_learning(tmp_path, x, kind):
    """What its own loader makes of the same file, which for an AutoEncoder moves the decoder's norms."""
    theirs_of = pytest.importorskip("dictionary_learning.utils")
    module = fill(getattr(theirs_of, kind)(*CLASSES[kind]))
    torch.save(module.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": M, "lm_name": "m", "k": K}
    trainer = trainer if len(CLASSES[kind]) > 2 else {key: v for key, v in trainer.items() if key != "k"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128, "io": "out"}}))
    loaded, _ = theirs_of.load_dictionary(str(tmp_path), device="cpu")
    check(load_stored(tmp_path).sae, theirs(loaded, x), x)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu", "gated"])
def test_dictionary_learning_reads_what_we_write(tmp_path, x, kind, centred):
    """Through its own load_dictionary. Its AutoEncoder gives codes the norms of the decoder, and reading ours does."""
    theirs_of = pytest.importorskip("dictionary_learning.utils")
    sae = dictionary(kind, centred)
    save_sae(sae, tmp_path / "a", format="dictionary_learning")
    loaded, _ = theirs_of.load_dictionary(str(tmp_path / "a"), device="cpu")
    right = theirs(loaded, x)
    check(load_stored(tmp_path / "a").sae, right, x)
    norms = np.linalg.norm(sae.W_dec[...], axis=-1) if (kind, centred) == ("relu", True) else 1
    assert agree((ours(sae, x)[0] * norms, ours(sae, x)[1]), right)


def dense(coder, x):
    """Codes of sparsify, which gives the k largest and where they are, and its output: not that of `forward`, which
    with multi_topk is made of the 4 k largest."""
    with torch.no_grad():
        top = coder.encode(torch.tensor(x))
        codes = torch.zeros(len(x), M).scatter(-1, top.top_indices, top.top_acts)
        out = coder.decode(top.top_acts, top.top_indices)
        return codes.numpy(), (out if coder.W_skip is None else out + torch.tensor(x) @ coder.W_skip.mT).numpy()


CODERS = [{}, {"multi_topk": True}, {"transcode": True}, {"transcode": True, "skip_connection": True}]


@pytest.mark.parametrize("facts", CODERS, ids=str)
def test_we_read_what_sparsify_saves(tmp_path, x, facts):
    sparsify = pytest.importorskip("sparsify")
    coder = fill(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=M, k=K, **facts)))
    coder.save_to_disk(tmp_path / "layers.3")
    check(load_stored(tmp_path / "layers.3").sae, dense(coder, x), x)


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"centred": False},
        {"centred": False, "transcodes": True},
        {"centred": False, "transcodes": True, "skip": True},
    ],
    ids=str,
)
def test_sparsify_reads_what_we_write(tmp_path, x, case):
    sparsify = pytest.importorskip("sparsify")
    sae = dictionary("topk", **case)
    save_sae(sae, tmp_path / "layers.3", format="sparsify")
    coder = sparsify.SparseCoder.load_from_disk(tmp_path / "layers.3")
    assert coder.cfg.k == K and coder.cfg.transcode == sae.transcodes
    check(sae, dense(coder, x), x)


PUBLISHED = {
    "gemma_2": ("gemma_scope, 1", "google/gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_71"),
    "gemma_2, embedding": (
        "gemma_scope, 1 embedding",
        "google/gemma-scope-2b-pt-res",
        "embedding/width_4k/average_l0_6",
    ),
    "gemma_3": (
        "gemma_scope, 2 affine",
        "google/gemma-scope-2-1b-pt",
        "transcoder_all/layer_3_width_16k_l0_big_affine",
    ),
    "llama_scope": ("llama_scope, 1 of one hook", "fnlp/Llama3_1-8B-Base-LXR-8x", ""),
    "dictionary_learning_1": ("dictionary_learning, BatchTopKSAE", "org/saes", ""),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts_as_saelens_reads_them(tmp_path, monkeypatch, x, name):
    """Files that we laid out by hand, given to SAELens's own loader of that owner in place of a download."""
    loaders, registry = (pytest.importorskip(f"sae_lens.{m}") for m in ("loading.pretrained_sae_loaders", "registry"))
    case, repository, inside = PUBLISHED[name]
    folder = CASES[case].write(tmp_path, arrays_of())
    root = Path(str(folder).removesuffix(inside)) if inside else folder

    def local(repo_id="", filename="", subfolder="", **_):
        return str(root / subfolder / filename)

    monkeypatch.setattr(loaders, "hf_hub_download", local)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *_: {"w_enc": [D, M], "w_dec": [M, D]})
    loader = loaders.NAMED_PRETRAINED_SAE_LOADERS[name.split(",")[0]]
    sizes = {"d_in": D, "d_sae": M, "dtype": "float32", "device": "cpu"}
    place = inside or "."
    cfg, state, _ = loader(repository, place, "cpu", False, sizes)
    cfg = loaders.handle_config_defaulting(cfg)
    make, config = registry.SAE_CLASS_REGISTRY[cfg["architecture"]]
    sae = make(config.from_dict(cfg))
    sae.load_state_dict(state)
    if cfg["normalize_activations"] == "expected_average_only_in":
        sae.fold_activation_norm_scaling_factor(D**0.5 / 6.3)
    check(load_stored(folder).sae, theirs(sae, x), x)
