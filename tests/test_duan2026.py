"""The studies of arXiv 2606.03002 as their files stand, with a tiny model, dictionary and text in the hub's place."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qsae_jax import SAE, save_sae
from qsae_jax.cli import main
from qsae_jax.files import read_json
from qsae_jax.lm.model import LM, LMConfig
from qsae_jax.lm.rope import Rope
from qsae_jax.lm.save import save_lm
from qsae_jax.quant.scheme import parse_scheme
from qsae_jax.recipe import read_study
from qsae_jax.sae.sparsity import JumpReLU, ReLU

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SHAPE = {"vocab": 300, "d_model": 16, "n_heads": 4, "head_dim": 4, "d_ff": 24, "norm_eps": 3e-3, "context": 64}
PYTHIA = LMConfig(family="gpt_neox", n_layers=6, n_kv_heads=4, rope=Rope(77.0, 2), tied=False, act="gelu",
                  score_scale=0.5, gated=False, layer_norm=True, parallel=True, qkv_bias=True, o_bias=True,
                  mlp_bias=True, **SHAPE)  # fmt: skip
GEMMA = LMConfig(family="gemma2", n_layers=13, n_kv_heads=2, rope=Rope(77.0, 4), tied=True, act="gelu_tanh",
                 score_scale=0.3, norm_offset=1.0, post_norms=True, embed_scale=4.0, score_cap=3.0, logit_cap=5.0,
                 windows=(8, 0) * 6 + (8,), **SHAPE)  # fmt: skip
ARMS = {"duan2026_pythia70m": (PYTHIA, "transformer_lens"), "duan2026_gemma2_2b": (GEMMA, "none")}


@pytest.fixture
def given(request, tiny_folder, tmp_path):
    """`--set` words that put a tiny model, dictionary and text in the hub's place."""
    import shutil

    config, processing = ARMS[request.param]
    save_lm(LM(config, nnx.Rngs(3)), tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, tmp_path / "model" / name)
    keys = jax.random.split(jax.random.key(0), 2)
    W, V = (jax.random.normal(key, shape) for key, shape in zip(keys, ((16, 40), (40, 16)), strict=True))
    sparsity = ReLU() if processing == "transformer_lens" else JumpReLU(jnp.full(40, 0.2))
    facts = {"hook_name": "x", "model_from_pretrained_kwargs": {}}
    save_sae(SAE(sparsity, W, jnp.zeros(40), V, jnp.zeros(16)), tmp_path / "sae", facts)
    random = np.random.default_rng(0)
    (tmp_path / "text.txt").write_text(" ".join(f"w{n}" for n in random.integers(0, 999, 900)))
    words = {"model": tmp_path / "model", "dictionary": tmp_path / "sae", "tokens.source": f"text:{tmp_path}/text.txt"}
    words |= {"tokens.seq": 16, "tokens.audit": 960}
    return request.param, processing, [w for key, value in words.items() for w in ("--set", f"{key}={value}")]


@pytest.mark.slow
@pytest.mark.parametrize("given", ARMS, indirect=True)
def test_the_published_study_runs(given, tmp_path):
    """Every system of the paper, its matched pruning, its predictor, and its published table on the page."""
    name, processing, words = given
    assert main(["run", str(EXPERIMENTS / f"{name}.toml"), "--out", str(tmp_path / "out"), *words]) == 0
    audit, study = read_json(tmp_path / "out" / "audit.json"), read_study(EXPERIMENTS / f"{name}.toml")
    assert audit["processing"] == processing and audit["tokens"]["skip_first"] == 0 and not audit["tokens"]["bos"]
    rows = {row["scheme"]: row for row in audit["rows"]}
    assert set(rows) == set(study.expected.rows) - {"fp"}
    assert rows["int8-duan2026"]["mean_r"] > rows["int4-duan2026"]["mean_r"]
    assert {(pair["scheme"], pair["other"]) for pair in audit["overlap"]} >= {("int6-duan2026", study.schemes[-1])}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Published values" in page and "Who survives?" in page and f"{study.expected.rows['fp']['ppl']:.5g}" in page


@pytest.mark.parametrize("name", ARMS)
def test_the_published_table_is_whole(name):
    """Every scheme of the file has its published row; shares of a row add up to 1, and perplexity and change agree."""
    study = read_study(EXPERIMENTS / f"{name}.toml")
    asked = {str(parse_scheme(s)) for s in ("fp", *(f"int{b}-duan2026" for b in range(4, 9)), study.schemes[-1])}
    assert set(study.expected.rows) == asked
    full = study.expected.rows["fp"]["ppl"]
    for scheme, row in study.expected.rows.items():
        if scheme != "fp":
            assert row["survived"] + row["blurred"] + row["damaged"] == pytest.approx(1, abs=2e-5), scheme
            assert row["ppl"] / full - 1 == pytest.approx(row["delta_ppl"], abs=2e-5), scheme
            assert set(row) <= set(study.expected.within)
