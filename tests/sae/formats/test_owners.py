"""Every owner's layout, written here by hand, against slow formulas; and what each reader must not overlook."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file

from qsae_jax.errors import UserError
from qsae_jax.sae.formats import llama_scope, load_stored
from qsae_jax.sae.formats.pickled import write_tensors

from .conftest import D, K, M, arrays_of, formulas

CLOSE = {"rtol": 1e-5, "atol": 2e-5}
SCALE = 2.5
PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")


class Case(NamedTuple):
    """What to write, what the formulas then take (arrays and settings), and the faults that they must tell apart."""

    write: Any
    right: Any
    wrong: tuple[Any, ...]


def put(path, arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.asarray(value, order="C") for name, value in arrays.items()}, path)


def put_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def pick(a, *names, **more):
    return {name: a[name] for name in names} | more


def settings(**how):
    return lambda a: (a, how)


def changed(**how):
    """A fault: the arrays changed by functions of them, or a setting."""
    faults = {name: how.pop(name) for name in list(how) if callable(how[name])}
    return lambda a, right: (a | {name: of(a) for name, of in faults.items()}, right | how)


def saelens(kind, *names, six=True, scaler=None, **cfg):
    def write(folder, a):
        facts = {"d_in": D, "d_sae": M, "architecture": kind} | cfg
        metadata = {"hook_name": "blocks.3.hook_resid_post"}
        facts |= (
            {"metadata": {"sae_lens_version": "6.54.0"} | metadata} if six else {"hook_point": metadata["hook_name"]}
        )
        put_json(folder / "cfg.json", facts)
        if scaler:
            put_json(folder / "activation_scaler.json", {"scaling_factor": scaler})
        a = a | {"W_skip": a["W_skip"].T, "topk_threshold": np.float64(0.7), "log_threshold": np.log(a["threshold"])}
        put(folder / "sae_weights.safetensors", pick(a | {"scaling_factor": a["threshold"]}, *names))
        return folder

    return write


def rows_folded(a):
    n = np.linalg.norm(a["W_dec"], axis=-1)
    folded = {"W_enc": a["W_enc"] * n, "b_enc": a["b_enc"] * n, "W_dec": a["W_dec"] / n[:, None]}
    return a | folded | {"threshold": a["threshold"] * n}


def scaled(a, s=SCALE, out=None):
    return a | {"W_enc": a["W_enc"] * s, "W_dec": a["W_dec"] / (out or s), "b_dec": a["b_dec"] / (out or s)}


def scalar(a, value=0.7):
    return a | {"threshold": np.full(M, value, np.float32)}


JUMP = (*PLAIN, "threshold")
NO_B_DEC = changed(centred=False)
B_DEC = changed(centred=True)
LOG = changed(threshold=lambda a: np.exp(a["threshold"]))
NO_THRESHOLD = changed(threshold=lambda a: 0 * a["threshold"])
TURNED = changed(W_skip=lambda a: a["W_skip"].T)
NO_SKIP = changed(skip=False)
AS_ABOVE = lambda a, right: (a, right)  # noqa: E731  the untransformed arrays
SAELENS = {
    "standard": Case(saelens("standard", *PLAIN), settings(), (NO_B_DEC,)),
    "no architecture": Case(saelens(None, *PLAIN), settings(), (NO_B_DEC,)),
    "uncentred": Case(saelens("standard", *PLAIN, apply_b_dec_to_input=False), settings(centred=False), (B_DEC,)),
    "topk": Case(saelens("topk", *PLAIN, k=K), settings(act="topk"), (changed(act="relu"),)),
    "topk rescaled": Case(
        saelens("topk", *PLAIN, k=K, rescale_acts_by_decoder_norm=True),
        lambda a: (rows_folded(a), {"act": "topk"}),
        (lambda a, right: (arrays_of(), right),),
    ),
    "gated": Case(
        saelens("gated", "W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"),
        settings(act="gated"),
        (NO_B_DEC, changed(r_mag=lambda a: 0 * a["r_mag"]), changed(b_gate=lambda a: a["b_mag"])),
    ),
    "jumprelu": Case(saelens("jumprelu", *JUMP), settings(act="jumprelu"), (NO_B_DEC, LOG, NO_THRESHOLD)),
    "jumprelu in training": Case(
        saelens("jumprelu", *PLAIN, "log_threshold", jumprelu_bandwidth=0.1), settings(act="jumprelu"), (LOG,)
    ),
    "batchtopk in training": Case(
        saelens("batchtopk", *PLAIN, "topk_threshold", k=2.5),
        lambda a: (scalar(a), {"act": "jumprelu"}),
        (NO_THRESHOLD,),
    ),
    "matryoshka rescaled": Case(
        saelens("matryoshka_batchtopk", *PLAIN, "topk_threshold", k=2.5, rescale_acts_by_decoder_norm=True),
        lambda a: (scalar(rows_folded(a)), {"act": "jumprelu"}),
        (lambda a, right: (rows_folded(scalar(arrays_of())), right),),
    ),
    "batchtopk scaled and rescaled": Case(  # the threshold is in units of pre |W_dec|: S#763
        saelens("batchtopk", *PLAIN, "topk_threshold", scaler=SCALE, normalize_activations="expected_average_only_in",
                rescale_acts_by_decoder_norm=True),
        lambda a: (scalar(rows_folded(scaled(a)), 0.7 / SCALE), {"act": "jumprelu"}),
        (lambda a, right: (scalar(rows_folded(scaled(arrays_of()))), right),),
    ),
    "transcoder": Case(saelens("transcoder", *PLAIN), settings(centred=False), (B_DEC,)),
    "skip transcoder": Case(
        saelens("skip_transcoder", *PLAIN, "W_skip", apply_b_dec_to_input=False),
        settings(centred=False, skip=True),
        (TURNED, NO_SKIP),
    ),
    "jumprelu transcoder": Case(
        saelens("jumprelu_transcoder", *JUMP), settings(act="jumprelu", centred=False), (B_DEC, LOG)
    ),
    "jumprelu skip transcoder": Case(
        saelens("jumprelu_skip_transcoder", *JUMP, "W_skip"),
        settings(act="jumprelu", centred=False, skip=True),
        (TURNED, LOG),
    ),
    "layer norm": Case(
        saelens("standard", *PLAIN, normalize_activations="layer_norm"),
        settings(norm="layer_norm"),
        (changed(norm=None), changed(norm="constant_norm_rescale")),
    ),
    "constant norm": Case(
        saelens("topk", *PLAIN, k=K, normalize_activations="constant_norm_rescale"),
        settings(act="topk", norm="constant_norm_rescale"),
        (changed(norm=None),),
    ),
    "scaled": Case(
        saelens("jumprelu", *JUMP, scaler=SCALE, normalize_activations="expected_average_only_in"),
        lambda a: (scaled(a), {"act": "jumprelu"}),
        (changed(W_dec=lambda a: a["W_dec"] * SCALE), changed(threshold=lambda a: a["threshold"] * SCALE)),
    ),
    "5: topk": Case(
        saelens("standard", *PLAIN, six=False, activation_fn_str="topk", activation_fn_kwargs={"k": K}),
        settings(act="topk"),
        (changed(act="relu"),),
    ),
    "5: scaling factor": Case(
        saelens("standard", *PLAIN, "scaling_factor", six=False, finetuning_scaling_factor=True,
                normalize_activations=False, lr=1e-3),
        lambda a: (a | {"W_dec": a["W_dec"] * a["threshold"][:, None]}, {}),
        (changed(W_dec=lambda a: a["W_dec"] / a["threshold"][:, None]),),
    ),
    "5: boolean scale": Case(
        saelens("standard", *PLAIN, six=False, scaler=SCALE, normalize_activations=True),
        lambda a: (scaled(a), {}),
        (changed(W_enc=lambda a: a["W_enc"] / SCALE),),
    ),
}  # fmt: skip


def gemma(place, lower=False):
    def write(folder, a):
        folder = folder / place
        folder.mkdir(parents=True)
        names = {name: name.lower() if lower else name for name in JUMP}
        np.savez(folder / "params.npz", **{names[name]: a[name] for name in JUMP})
        return folder

    return write


def gemma_two(folder, a, place="layer_3_width_16k_l0_big_affine"):
    folder = folder / "transcoder_all" / place
    put(
        folder / "params.safetensors",
        {name.lower(): a[name] for name in JUMP} | {"affine_skip_connection": a["W_skip"]},
    )
    put_json(
        folder / "config.json", {"architecture": "jump_relu", "affine_connection": True, "model_name": "gemma-v3-1b-pt"}
    )
    return folder


ROOT = D**0.5
RES = "gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_71"
EMBEDDING = "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"
GEMMA = {
    "1": Case(gemma(RES), settings(act="jumprelu", centred=False), (B_DEC, LOG, NO_THRESHOLD)),
    "1 lower case": Case(gemma(RES, lower=True), settings(act="jumprelu", centred=False), (B_DEC,)),
    "1 embedding": Case(
        gemma(EMBEDDING),
        lambda a: (a | {"W_enc": a["W_enc"] / ROOT, "W_dec": a["W_dec"] * ROOT}, {"act": "jumprelu", "centred": False}),
        (lambda a, right: (arrays_of(), right),),
    ),
    "2 affine": Case(gemma_two, settings(act="jumprelu", centred=False, skip=True), (TURNED, B_DEC)),
}


def learnt(kind, names, io="out", **more):
    """dictionary_learning: names maps ours to its own; `.weight` is transposed."""

    def write(folder, a):
        a = a | {name: np.asarray(value) for name, value in more.items()}
        trainer = {"dict_class": kind, "activation_dim": D, "dict_size": M, "lm_name": "EleutherAI/pythia-70m"}
        trainer |= {"submodule_name": "resid_post_layer_3", "layer": 3} | ({"k": K} if "k" in more else {})
        put_json(folder / "config.json", {"trainer": trainer, "buffer": {"io": io, "ctx_len": 128}})
        tensors = {its: a[ours].T if its.endswith(".weight") else a[ours] for ours, its in names.items()}
        write_tensors(folder / "ae.pt", tensors)
        return folder

    return write


LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias"}
BATCH = LINEAR | {"b_dec": "b_dec", "k": "k", "threshold": "threshold"}
SAME = {name: name for name in JUMP}
K_AND = {"k": np.int32(K), "threshold": np.float32(0.7)}
LEARNT = {
    "AutoEncoder": Case(
        learnt("AutoEncoder", LINEAR | {"b_dec": "bias"}),
        lambda a: (rows_folded(a), {}),
        (NO_B_DEC, lambda a, right: (arrays_of(), right)),
    ),
    "AutoEncoderNew": Case(
        learnt("AutoEncoderNew", LINEAR | {"b_dec": "decoder.bias"}),
        settings(centred=False),
        (B_DEC, lambda a, right: (rows_folded(a), right)),
    ),
    "GatedAutoEncoder": Case(
        learnt("GatedAutoEncoder", {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_dec": "decoder_bias",
                                    "r_mag": "r_mag", "b_gate": "gate_bias", "b_mag": "mag_bias"}),
        settings(act="gated"),
        (NO_B_DEC, changed(b_mag=lambda a: a["b_gate"], b_gate=lambda a: a["b_mag"])),
    ),
    "AutoEncoderTopK": Case(learnt("AutoEncoderTopK", BATCH, **K_AND), settings(act="topk"), (NO_B_DEC,
                            lambda a, right: (scalar(a), right | {"act": "jumprelu"}))),
    "AutoEncoderTopK, older": Case(
        learnt("AutoEncoderTopK", LINEAR | {"b_dec": "b_dec", "k": "k"}, k=np.int32(K)),
        settings(act="topk"),
        (NO_B_DEC,),
    ),
    "BatchTopKSAE": Case(  # S#608: its threshold was dropped
        learnt("BatchTopKSAE", BATCH, **K_AND), lambda a: (scalar(a), {"act": "jumprelu"}),
        (changed(act="relu"), changed(act="topk"), NO_B_DEC),
    ),
    "MatryoshkaBatchTopKSAE": Case(
        learnt("MatryoshkaBatchTopKSAE", SAME | {"k": "k", "group_sizes": "group_sizes"}, **K_AND,
               group_sizes=np.asarray([8, 16])),
        lambda a: (scalar(a), {"act": "jumprelu"}),
        (NO_B_DEC,),
    ),
    "JumpReluAutoEncoder": Case(
        learnt("JumpReluAutoEncoder", SAME), settings(act="jumprelu", centred=False), (B_DEC, LOG, NO_THRESHOLD)
    ),
}  # fmt: skip


def sparsify(**cfg):
    def write(folder, a):
        folder = folder / "layers.3.mlp"
        facts = {"expansion_factor": 3, "normalize_decoder": True, "num_latents": 0, "k": K, "d_in": D, "signed": False}
        put_json(folder / "cfg.json", facts | cfg)
        put_json(folder.parent / "config.json", {"model": "EleutherAI/pythia-70m", "ctx_len": 2048})
        tensors = {"encoder.weight": a["W_enc"].T, "encoder.bias": a["b_enc"], "W_dec": a["W_dec"], "b_dec": a["b_dec"]}
        put(folder / "sae.safetensors", tensors | ({"W_skip": a["W_skip"].T} if "skip_connection" in cfg else {}))
        return folder

    return write


SPARSIFY = {
    "autoencoder": Case(sparsify(multi_topk=True), settings(act="topk"), (NO_B_DEC,)),
    "transcoder": Case(
        sparsify(transcode=True, skip_connection=True),
        settings(act="topk", centred=False, skip=True),
        (B_DEC, TURNED, NO_SKIP),
    ),
}
HOOKS = {"hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post"}
F_IN, F_OUT = D**0.5 / 6.3, D**0.5 / 3.4


def llama(**more):
    def write(folder, a):
        facts = HOOKS | {"act_fn": "jumprelu", "norm_activation": "dataset-wise", "jump_relu_threshold": 0.4}
        facts |= {"d_model": D, "d_sae": M} | more
        put_json(folder / "hyperparams.json", facts)
        put(folder / "checkpoints" / "final.safetensors", torch_like(a))
        return folder

    return write


def torch_like(a):
    return {"encoder.weight": a["W_enc"].T, "decoder.weight": a["W_dec"].T, "encoder.bias": a["b_enc"],
            "decoder.bias": a["b_dec"]}  # fmt: skip


def llamascopium(by_norm):
    def write(folder, a):
        lengths = {f"dataset_average_activation_norm.{HOOKS['hook_point_in']}": np.float32(6.3)}
        tensors = {"W_E": a["W_enc"], "b_E": a["b_enc"], "W_D": a["W_dec"], "b_D": a["b_dec"]}
        put(folder / "sae_weights.safetensors", tensors | lengths | {"log_jumprelu_threshold": np.log(a["threshold"])})
        facts = {"sae_type": "sae", "act_fn": "jumprelu", "norm_activation": "dataset-wise"}
        put_json(folder / "config.json", HOOKS | facts | {"sparsity_include_decoder_norm": by_norm})
        return folder

    return write


UNCENTRED = {"act": "jumprelu", "centred": False}
LLAMA = {
    "1": Case(  # S#645: its threshold was not scaled
        llama(hook_point_out="blocks.3.hook_mlp_out", dataset_average_activation_norm={"in": 6.3, "out": 3.4}),
        lambda a: (scalar(scaled(a, F_IN, F_OUT), 0.4 * F_IN), UNCENTRED),
        (
            lambda a, right: (scalar(a, 0.4), right),
            lambda a, right: (scalar(scaled(arrays_of(), F_IN), 0.4 * F_IN), right),
        ),
    ),
    "1 of one hook": Case(
        llama(dataset_average_activation_norm={"in": 6.3, "out": 6.3}),
        lambda a: (scalar(scaled(a, F_IN), 0.4 * F_IN), UNCENTRED),
        (lambda a, right: (scalar(a, 0.4), right),),
    ),
    "Llamascopium": Case(llamascopium(False), lambda a: (scaled(a, F_IN), UNCENTRED), (LOG, B_DEC)),
    "Llamascopium by norm": Case(
        llamascopium(True),
        lambda a: (scaled(a, F_IN) | {"threshold": a["threshold"] / np.linalg.norm(a["W_dec"], axis=-1)}, UNCENTRED),
        (changed(threshold=lambda a: arrays_of()["threshold"]),),
    ),
}


def crosscoder(folder, a):
    folder.mkdir(exist_ok=True)
    tensors = {"W_enc": a["W_enc"].reshape(2, D // 2, M), "W_dec": a["W_dec"].reshape(M, 2, D // 2)}
    write_tensors(folder / "cc_weights.pt", tensors | {"b_enc": a["b_enc"], "b_dec": a["b_dec"].reshape(2, D // 2)})
    return folder


CASES = {
    f"{owner}, {name}": case
    for owner, cases in {
        "saelens": SAELENS,
        "gemma_scope": GEMMA,
        "dictionary_learning": LEARNT,
        "sparsify": SPARSIFY,
        "llama_scope": LLAMA,
        "crosscoder": {"of two models": Case(crosscoder, settings(centred=False), (B_DEC,))},
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", CASES)
def test_codes_and_reconstruction(tmp_path, x, name):
    """To 1e-5 of formulas in float64. Controls: each oversight that the layout invites is far from them."""
    case = CASES[name]
    stored = load_stored(case.write(tmp_path, arrays_of()))
    assert stored.format.startswith(name.split(",")[0])
    arrays, how = case.right(arrays_of())
    right = formulas(arrays, x, **how)
    assert np.count_nonzero(right[0]) > 10
    np.testing.assert_allclose(stored.sae.encode(x), right[0], **CLOSE)
    np.testing.assert_allclose(stored.sae(x), right[1], **CLOSE)
    for fault in case.wrong:
        wrong_arrays, wrong_how = fault(arrays, how)
        wrong = formulas(wrong_arrays, x, **wrong_how)
        assert not all(np.allclose(a, b, **CLOSE) for a, b in zip(right, wrong, strict=True))


FACTS = {
    "saelens, standard": {"hook_name": "blocks.3.hook_resid_post"},
    "saelens, 5: topk": {"hook_name": "blocks.3.hook_resid_post"},
    "saelens, batchtopk in training": {"trained_as": "batchtopk"},
    "gemma_scope, 1": {"model_name": "google/gemma-2-2b", "hook_name": "blocks.3.hook_resid_post", "average_l0": 71},
    "gemma_scope, 1 embedding": {"hook_name": "hook_embed", "average_l0": 6},
    "gemma_scope, 2 affine": {"hook_name_out": "blocks.3.hook_mlp_out", "model_name": "google/gemma-3-1b-pt"},
    "dictionary_learning, AutoEncoder": {"hook_name": "blocks.3.hook_resid_post", "context_size": 128},
    "sparsify, autoencoder": {"hook_name": "blocks.3.hook_mlp_out", "model_name": "EleutherAI/pythia-70m"},
    "sparsify, transcoder": {"hook_name_out": "blocks.3.hook_mlp_out"},
    "llama_scope, 1": {"hook_name": "blocks.3.hook_resid_post", "hook_name_out": "blocks.3.hook_mlp_out"},
}


@pytest.mark.parametrize("name", FACTS)
def test_what_the_files_say_of_their_origin(tmp_path, name):
    assert FACTS[name].items() <= load_stored(CASES[name].write(tmp_path, arrays_of())).metadata.items()


@pytest.mark.parametrize("name", ["saelens, jumprelu", "gemma_scope, 1", "dictionary_learning, JumpReluAutoEncoder",
                                  "dictionary_learning, BatchTopKSAE"])  # fmt: skip
def test_a_code_at_its_threshold_is_off(tmp_path, name):
    """Pre-activations of exactly 2 at a threshold of 2: nothing is above it. Control: at 1.999 all are."""
    ones = np.ones((1, D), np.float32)
    for threshold, on in (2.0, 0), (1.999, M):
        a = arrays_of() | {"W_enc": np.full((D, M), 0.25, np.float32), "b_enc": np.zeros(M, np.float32)}
        a |= {"b_dec": np.zeros(D, np.float32), "threshold": np.full(M, threshold, np.float32)}
        write = CASES[name].write
        if "BatchTopK" in name:
            write = learnt("BatchTopKSAE", BATCH, k=np.int32(K), threshold=np.float32(threshold))
        stored = load_stored(write(tmp_path / str(threshold), a))
        assert np.count_nonzero(stored.sae.encode(ones)) == on


def test_a_hook_z_dictionary_says_so(tmp_path):
    """Ours reads heads side by side, and the file's wish to do that itself is kept for whom it concerns."""
    folder = saelens("standard", *PLAIN, reshape_activations="hook_z")(tmp_path, arrays_of())
    assert load_stored(folder).metadata["reshape_activations"] == "hook_z"


def rewrite(file, **facts):
    def plant(folder):
        cfg = json.loads((folder / file).read_text())
        for key, value in facts.items():
            cfg = cfg | {key: cfg[key] | value if isinstance(value, dict) else value}
        (folder / file).write_text(json.dumps(cfg))

    return plant


FAULTS = {
    "a scale that is nowhere": ("saelens, scaled", lambda f: (f / "activation_scaler.json").unlink(), "says the scale"),
    "a factor not announced": (
        "saelens, 5: scaling factor",
        rewrite("cfg.json", finetuning_scaling_factor=False),
        "is false",
    ),
    "an old activation": ("saelens, 5: topk", rewrite("cfg.json", activation_fn_str="tanh-relu"), "`tanh-relu`"),
    "a centred transcoder": ("saelens, transcoder", rewrite("cfg.json", apply_b_dec_to_input=True), "has no meaning"),
    "a normed transcoder": (
        "saelens, transcoder",
        rewrite("cfg.json", normalize_activations="layer_norm"),
        "transcoder's",
    ),
    "temporal": ("saelens, standard", rewrite("cfg.json", architecture="temporal"), "`temporal` is not supported"),
    "an unset threshold": (
        "dictionary_learning, BatchTopKSAE",
        lambda f: learnt("BatchTopKSAE", BATCH, k=np.int32(K), threshold=np.float32(-1))(f, arrays_of()),
        "never set",
    ),
    "a class": (
        "dictionary_learning, AutoEncoder",
        rewrite("config.json", trainer={"dict_class": "IdentityDict"}),
        "Identity",
    ),
    "another k": (
        "dictionary_learning, AutoEncoderTopK",
        rewrite("config.json", trainer={"k": 9}),
        "k is 3, config.json says 9",
    ),
    "which of two": (
        "dictionary_learning, BatchTopKSAE",
        lambda f: (f / "config.json").unlink(),
        "AutoEncoderTopK or Batch",
    ),
    "a run cut short": (
        "dictionary_learning, AutoEncoder",
        lambda f: write_tensors(f / "ae.pt", dict.fromkeys(("step", "ae", "optimizer"), np.zeros(1, np.float32))),
        "for resuming",
    ),
    "groupmax": ("sparsify, autoencoder", rewrite("cfg.json", activation="groupmax"), "`groupmax`"),
    "signed": ("sparsify, autoencoder", rewrite("cfg.json", signed=True), "unknown key `signed`"),
    "widths": ("sparsify, autoencoder", rewrite("cfg.json", expansion_factor=4), "correct it"),
    "no lengths": (
        "llama_scope, 1",
        rewrite("hyperparams.json", dataset_average_activation_norm=None),
        "scale is unknown",
    ),
    "token-wise": ("llama_scope, 1", rewrite("hyperparams.json", norm_activation="token-wise"), "`token-wise`"),
    "an affine lost": ("gemma_scope, 2 affine", rewrite("config.json", affine_connection=False), "download it again"),
}


WEIRD: tuple[Any, ...] = (None, [1], {"a": []}, "x", -1, 1e9)
ONE_EACH = ["saelens, topk rescaled", "saelens, 5: topk", "gemma_scope, 2 affine", "dictionary_learning, BatchTopKSAE",
            "sparsify, transcoder", "llama_scope, 1"]  # fmt: skip


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_fact_of_another_type_is_no_traceback(tmp_path, name):
    """Each fact of the configuration in turn, in one line if it is refused; most are."""
    folder = CASES[name].write(tmp_path, arrays_of())
    file = next(p for n in ("cfg.json", "hyperparams.json", "config.json") if (p := folder / n).is_file())
    cfg, refused = json.loads(file.read_text()), 0
    for key in cfg:
        for value in WEIRD:
            file.write_text(json.dumps(cfg | {key: value}))
            try:
                load_stored(folder)
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > len(cfg)


def test_the_scale_of_r1_distill_comes_from_the_list(tmp_path, x):
    """SAELens's pretrained_saes.yaml has the factor that the files lack. Control: without it they are refused."""
    a = arrays_of()
    put(tmp_path / "sae_weights.safetensors", torch_like(a) | {"log_jumprelu_threshold": np.log(a["threshold"])})
    put_json(tmp_path / "config.json", HOOKS | {"act_fn": "jumprelu", "norm_activation": "dataset-wise"})
    with pytest.raises(UserError, match="llama_scope_r1_distill/ID"):
        load_stored(tmp_path)
    codes, out = formulas(scaled(a), x, **UNCENTRED)
    stored = llama_scope.read(tmp_path, {"norm_scaling_factor": SCALE})
    np.testing.assert_allclose(stored.sae.encode(x), codes, **CLOSE)
    np.testing.assert_allclose(stored.sae(x), out, **CLOSE)


def test_an_npz_that_would_fill_the_memory_is_not_unpacked(tmp_path):
    """Zeros, packed a thousandfold. Control: the same arrays stored are read up to the check of their numbers. Pickled
    objects in one are refused too."""
    folder = tmp_path / RES
    folder.mkdir(parents=True)
    arrays = {name: np.zeros_like(value) for name, value in arrays_of().items() if name in JUMP}
    arrays["W_enc"] = np.zeros((D, 1 << 16), np.float32)
    np.savez_compressed(folder / "params.npz", **arrays)
    with pytest.raises(UserError, match=r"would unpack to \d{7} bytes"):
        load_stored(folder)
    np.savez(folder / "params.npz", **arrays)
    with pytest.raises(UserError, match="has shape"):
        load_stored(folder)
    np.savez(folder / "params.npz", **arrays | {"W_dec": np.asarray([{}], object)})
    with pytest.raises(UserError, match=r"not a readable \.npz file of numbers"):
        load_stored(folder)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_reader_does_not_know_is_refused_in_one_line(tmp_path, fault):
    """Control: before the fault is planted, the files are read."""
    name, plant, message = FAULTS[fault]
    folder: Path = CASES[name].write(tmp_path, arrays_of())
    load_stored(folder)
    plant(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_stored(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
