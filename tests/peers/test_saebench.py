"""Dictionaries that we write, through SAEBench's core evaluation as it is, against our own numbers for the same tokens.

It wants NumPy below 2, so it has an environment of its own, whose Python QSAE_SAEBENCH_PYTHON names
(`python3.11 -m venv DIR && DIR/bin/pip install sae-bench==0.6.0`); run_saebench.py runs there."""

import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from flax import nnx

from qsae_jax.acts.tokens import Windows
from qsae_jax.compare.fidelity import MEASURES, judge
from qsae_jax.lm.model import LM, LMConfig
from qsae_jax.lm.rope import Rope
from qsae_jax.lm.save import save_lm
from qsae_jax.lm.tap import Point, capture, patch
from qsae_jax.lm.tokenizer import TextTokenizer
from qsae_jax.mesh import make_mesh
from qsae_jax.sae.formats import save_sae
from qsae_jax.sae.model import folded_norms, with_sparsity
from qsae_jax.sae.settings import SAEConfig
from qsae_jax.sae.sparsity import JumpReLU, ReLU
from qsae_jax.sae.train import finished, make_step, start

PYTHON = os.environ.get("QSAE_SAEBENCH_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="QSAE_SAEBENCH_PYTHON names no Python that has sae_bench")

POINT = Point(1, "resid_post")
SPECIAL = (256, 257)  # bos and eos: SAEBench counts no token that is one of them
CLOSE, FAULT = 1e-5, 1e-3
"""Relative: codes and logits are float32 on both sides, their sums float32 there and float64 here (3e-7 is seen). The
control is a hundred times as far."""


def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<bos>", "<eos>"])
    return TextTokenizer(inner, *SPECIAL, False)


@pytest.fixture(scope="module")
def lm():
    """The tiny model, with heads of the width that TransformerLens assumes (width / heads), and a loss that an
    ablation changes; not larger, because their KL is NaN once a probability is 0 in float32."""
    shape = {"vocab": 300, "d_model": 16, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 4, "d_ff": 24}
    scalars = {"norm_eps": 3e-3, "rope": Rope(777.0, 4), "tied": False, "context": 64}
    lm = LM(LMConfig(family="llama", **shape, **scalars, act="silu", score_scale=4**-0.5), nnx.Rngs(0))
    lm.head[...] = 4 * lm.head[...]
    return lm


@pytest.fixture(scope="module")
def tokens():
    """`plain` has no special tokens, `special` has many."""
    plain, special = np.random.default_rng(5).integers(0, 256, (2, 24, 16), dtype=np.int32)
    special[:, 0] = SPECIAL[0]
    special[3:9, 11] = SPECIAL[1]
    return {"plain": plain, "special": special}


@pytest.fixture(scope="module")
def dictionaries(lm, tokens, tiny_sae):
    """By the names of SAELens's architectures. The JumpReLU is a BatchTopK, trained a little."""
    x = capture(lm, POINT)(tokens["plain"]).reshape(-1, 16)
    config, mesh = SAEConfig(sparsity="batchtopk", k=4, lr=0.01), make_mesh(1, 1)
    state, step = start(config, [x], 32, 5, 0, mesh), make_step(config, 5, mesh)
    for _ in range(5):
        state, _ = step(state, x)
    jump = finished(state, config)
    assert isinstance(jump.sparsity, JumpReLU)
    random = {"topk": folded_norms(tiny_sae(0)), "standard": with_sparsity(tiny_sae(1), ReLU())}
    for dead, sae in enumerate(random.values(), start=2):
        sae.b_enc[...] = sae.b_enc[...].at[:dead].set(-1000.0)  # never fire, each its own number
    return random | {"jumprelu": jump}


@pytest.fixture(scope="module")
def theirs(lm, tokens, dictionaries, tmp_path_factory):
    """What SAEBench's result files hold, by tokens and dictionary."""
    work = tmp_path_factory.mktemp("saebench")
    save_lm(lm, work / "model", tokenizer=tokenizer())
    facts = {"model_name": str(work / "model"), "hook_name": f"blocks.{POINT.layer}.hook_{POINT.site}"}
    facts |= {"context_size": 16, "prepend_bos": False}
    for name, sae in dictionaries.items():
        save_sae(sae, work / "sae" / name, facts)
    for name, ids in tokens.items():
        (work / "tokens" / name).mkdir(parents=True)
        pa.parquet.write_table(pa.table({"tokens": list(ids)}), work / "tokens" / name / "train.parquet")
        # SAELens asks the hub which tokenizer made a data set, and takes no folder for an answer: here is its cache.
        cached = work / "hub" / f"datasets--tokens--{name}"
        for path, text in {
            "refs/main": "0" * 40,
            f"snapshots/{'0' * 40}/sae_lens.json": json.dumps({"tokenizer_name": str(work / "model")}),
        }.items():
            (cached / path).parent.mkdir(parents=True)
            (cached / path).write_text(text)
    script, out = Path(__file__).with_name("run_saebench.py"), work / "out.json"
    several = [f"tokens/{name}" for name in tokens]
    command = [PYTHON, script, work / "model", out, *several, "--", *(work / "sae" / name for name in dictionaries)]
    alone = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    alone |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(work / "hub")}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=alone, cwd=work)
    assert done.returncode == 0 and out.is_file(), (done.stdout + done.stderr)[-4000:]
    return json.loads(out.read_text())


def metrics(facts):
    return {name: value for group in facts["eval_result_metrics"].values() for name, value in group.items()}


def log_softmax(logits):
    away = np.asarray(logits, np.float64)
    away = away - away.max(-1, keepdims=True)
    return away - np.log(np.exp(away).sum(-1, keepdims=True))


def ours(lm, sae, ids):
    """SAEBench's metrics as its formulas have them, from our codes and reconstructions, in float64."""
    x = capture(lm, POINT)(ids)
    codes = sae.encode(x)
    spliced = [log_softmax(patch(lm, {POINT: edit})(ids)) for edit in (lambda x: x, sae, jnp.zeros_like)]
    counted = ~np.isin(ids, SPECIAL)
    n = counted.sum()
    x, y, codes = (np.asarray(v, np.float64)[counted] for v in (x, sae.decode(codes, x), codes))
    error, size = ((x - y) ** 2).sum(-1), (x**2).sum(-1)
    norms = np.linalg.norm(x, axis=-1), np.linalg.norm(y, axis=-1)
    fired = (codes > 0).mean(0)
    facts = {
        "l0": (codes != 0).sum(-1).mean(),
        "l1": codes.sum(-1).mean(),
        "mse": error.mean() / n,
        "explained_variance_legacy": np.mean(1 - error / ((x - x.mean(0)) ** 2).sum(-1)),
        # Theirs: the mean activation is taken of squares, and squared once more.
        "explained_variance": 1 - error.mean() / (size.mean() - np.mean((x**2).mean(0)) ** 2),
        "cossim": np.mean((x * y).sum(-1) / norms[0] / norms[1]),
        "l2_norm_in": norms[0].mean(),
        "l2_norm_out": norms[1].mean(),
        "l2_ratio": np.mean(norms[1] / norms[0]),
        "relative_reconstruction_bias": np.mean(norms[1] ** 2) / np.mean((x * y).sum(-1)),
        "frac_alive": np.mean(fired > 0),
        "freq_over_1_percent": np.mean(fired > 0.01),
        "freq_over_10_percent": np.mean(fired > 0.1),
    }
    clean, mine, zero = spliced
    loss = [-np.take_along_axis(p[:, :-1], ids[:, 1:, None], -1)[..., 0][counted[:, :-1]].mean() for p in spliced]
    kl = [(np.exp(clean) * (clean - p)).sum(-1)[counted].mean() for p in (mine, zero)]
    facts |= {"ce_loss_without_sae": loss[0], "ce_loss_with_sae": loss[1], "ce_loss_with_ablation": loss[2]}
    facts |= {"ce_loss_score": (loss[2] - loss[1]) / (loss[2] - loss[0])}
    facts |= {"kl_div_with_sae": kl[0], "kl_div_with_ablation": kl[1], "kl_div_score": (kl[1] - kl[0]) / kl[1]}
    return {name: float(value) for name, value in facts.items()}, fired


def apart(one, two):
    """Relative distances of the metrics; scores cancel, so one near 0 counts as 0.1."""
    return {name: abs(one[name] - two[name]) / max(abs(one[name]), 0.1) for name in one}


OF_THE_MODEL = {"l2_norm_in", "ce_loss_without_sae", "ce_loss_with_ablation", "kl_div_with_ablation"}


@pytest.mark.parametrize("name", ["topk", "jumprelu", "standard"])
@pytest.mark.parametrize("kind", ["plain", "special"])
def test_every_metric_that_it_has(lm, tokens, dictionaries, theirs, kind, name):
    """Each latent's density too, which is a count. Control: another dictionary's numbers, and other tokens'."""
    facts = theirs[kind][name]
    mine, fired = ours(lm, dictionaries[name], tokens[kind])
    assert {key: d for key, d in apart(mine, metrics(facts)).items() if not d < CLOSE} == {}
    density = [row["feature_density"] for row in facts["eval_result_details"]]
    assert np.allclose(density, fired, rtol=1e-6, atol=0)
    others = [metrics(theirs[kind][one]) for one in dictionaries if one != name]
    for key in set(mine) - OF_THE_MODEL:
        assert max(apart(mine, one)[key] for one in others) > FAULT, key
    assert apart(mine, metrics(theirs["special" if kind == "plain" else "plain"][name]))["ce_loss_without_sae"] > CLOSE


@pytest.mark.parametrize("name", ["topk", "jumprelu", "standard"])
def test_what_qsae_compare_says(lm, tokens, dictionaries, theirs, name):
    """L0, the share of live latents, CE recovered, and FVU, which theirs gives by its mse (a mean over tokens, divided
    by their number once more). KL recovered is not the same: theirs counts the last token of a window too. Control:
    another dictionary's sums, and 1 - explained_variance, which is no FVU."""
    ids, mesh = tokens["plain"], make_mesh(1, 1)
    judged = judge(lm, dictionaries, Windows(ids, "random", bos=False), POINT, mesh, skip_first=0)
    x = np.asarray(capture(lm, POINT)(ids), np.float64).reshape(-1, 16)
    facts = metrics(theirs["plain"][name])
    said = {"l0": facts["l0"], "alive": facts["frac_alive"], "ce_recovered": facts["ce_loss_score"]}
    said |= {"fvu": facts["mse"] * len(x) ** 2 / ((x - x.mean(0)) ** 2).sum()}
    mine = {one: {key: MEASURES[key](sums_of(judged[one])) for key in said} for one in dictionaries}
    assert {key: d for key, d in apart(mine[name], said).items() if not d < CLOSE} == {}
    assert any(max(apart(mine[one], said).values()) > FAULT for one in dictionaries if one != name)
    assert abs(mine[name]["fvu"] - (1 - facts["explained_variance"])) > FAULT * mine[name]["fvu"]


def sums_of(one):
    return jax.tree.map(lambda value: value.sum(0), one.sums)
