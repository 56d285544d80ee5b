"""A study with every arm, on a tiny model: its dictionaries, its comparisons, its page, and that it goes on."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from qsae_jax import arms
from qsae_jax.cli import main
from qsae_jax.devices import DEVICES
from qsae_jax.errors import Interrupted
from qsae_jax.files import read_json
from qsae_jax.sae.formats import save_sae
from qsae_jax.sae.model import SAE
from qsae_jax.sae.sparsity import TopK

pytestmark = pytest.mark.slow
STUDY = """
model = "{folder}/model"
point = "blocks.1.resid_post"
schemes = ["int8", "int2"]
compare = "int2,int3"
[tokens]
source = "text:{folder}/text.txt"
seq = 16
audit = 320
compare = 320
[sae]
k = 4
expansion = 2
lr = 0.03
[train]
tokens = 960
batch = 32
[arms]
adapt = 320
rank = 3
finetune = 320
budgets = [160, 480]
again = true
nonsense = true
probes = true
contexts = 2
crosscoder = "int2"
"""
SCHEMES = ("int2", "int3")
CLOSED = ("biases", "gain", "lowrank", "affine")


def weights(out, name):
    return load_file(out / "saes" / name / "sae_weights.safetensors")


def differ(out, one, other):
    a, b = weights(out, one), weights(out, other)
    return max(float(np.abs(a[key] - b[key]).max()) for key in a)


@pytest.fixture(scope="module")
def done(tiny_folder, tmp_path_factory):
    """The study's folder, run twice: the first time it was stopped in the comparison of its second scheme."""
    folder = tmp_path_factory.mktemp("arms")
    shutil.copytree(tiny_folder, folder / "model")
    words = [f"Word {i * 3719 % 10007} of {i + 1000}, {'abcdefgh'[i % 8] * (i % 5 + 1)}" for i in range(400)]
    (folder / "text.txt").write_text("\n".join(words))
    (folder / "s.toml").write_text(STUDY.format(folder=folder))
    argv = ["run", str(folder / "s.toml"), "--out", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patched:

        def stopped(*_, **__):
            raise Interrupted("comparison stopped")

        patched.setattr(arms, "compares", stopped)
        assert main(argv) == 130
    assert not (folder / "out/compare.json").exists() and not list((folder / "out").glob("compare/*"))
    made = {path: path.stat().st_mtime_ns for path in (folder / "out/saes").rglob("*.safetensors")}
    assert main(argv) == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made, "nothing was trained again"
    return folder


def test_the_dictionaries_of_every_arm_are_there(done):
    """By name, each with what its record says it learnt from."""
    out = done / "out"
    wanted = {"fp", "fp-seed1", "fp-finetuned", "random", "shuffled", "crosscoder"}
    for scheme in SCHEMES:
        wanted |= {scheme, f"{scheme}-seed1", f"{scheme}-finetuned", f"{scheme}-finetuned-160"}
        wanted |= {f"{scheme}-{n}" for n in (160, 480)} | {f"{scheme}-{how}" for how in CLOSED}
    assert {path.name for path in (out / "saes").iterdir()} == wanted
    told = {name: read_json(out / "saes" / name / "cfg.json")["metadata"] for name in wanted - {"crosscoder"}}
    assert {name for name, one in told.items() if one["quantization"] == "int3"} == {
        name for name in wanted if name.startswith("int3")
    }
    tokens = {"fp": 960, "int2-160": 160, "int3-480": 480, "int2-finetuned": 320, "int3-finetuned-160": 160}
    assert {name: told[name]["training_tokens"] for name in tokens} == tokens
    assert told["int2-gain"]["adaptation"] == "gain" and told["shuffled"]["shuffled"]


def test_a_budget_is_a_training_of_its_own(done, tmp_path):
    """The dictionary of 480 tokens is that of a study which trains on 480, with that length's schedule. Control: it is
    not where the longer training stood after 480."""
    shutil.copytree(done / "out", tmp_path / "out")
    text = (done / "s.toml").read_text()
    (tmp_path / "s.toml").write_text(text[: text.index("[arms]")].replace("960", "480"))
    assert main(["run", str(tmp_path / "s.toml"), "--out", str(tmp_path / "short"), "--set", "compare=int2"]) == 0
    short, long = weights(tmp_path / "short", "int2"), weights(done / "out", "int2-480")
    assert all(np.allclose(short[key], long[key], atol=1e-6) for key in short)
    assert differ(done / "out", "int2", "int2-480") > 1e-3


def test_fine_tuning_goes_on_from_the_dictionary_at_home(done):
    """Nearer to it than what was trained there from scratch on more tokens, and moved."""
    out = done / "out"
    for name in ("int2-finetuned", "int2-finetuned-160", "fp-finetuned"):
        moved = differ(out, "fp", name)
        assert 1e-4 < moved < differ(out, "fp", "fp-seed1"), name
    assert differ(out, "int2-finetuned", "fp-finetuned") > 1e-4, "it saw the twin's activations"


def test_each_scheme_is_judged_in_every_arm(done):
    """Rows of both files: all dictionaries on both models, with probes; what is shared is the same at home."""
    out, home = done / "out", {}
    for scheme, file in zip(SCHEMES, ("compare.json", "compare/int3.json"), strict=True):
        found = read_json(out / file)
        assert found["scheme"] == scheme and found["retrained"] == f"saes/{scheme}"
        rows = {(row["arm"], row["how"], row["judged_on"]): row for row in found["rows"]}
        hows = {("adapted", how) for how in (*CLOSED, "finetuned", "finetuned at home")}
        arms = {("retrained", ""), ("retrained", "another seed"), ("reseeded", ""), ("random", ""), ("shuffled", "")}
        wanted = {(*arm, model) for arm in hows | arms for model in ("fp", scheme)}
        assert set(rows) == wanted | {("reference", "", "fp"), ("transferred", "", scheme)}
        assert len(found["rows"]) == len(rows) and all(0 <= row["probe"]["value"] <= 1 for row in rows.values())
        assert rows["adapted", "affine", scheme]["fvu"]["value"] < rows["transferred", "", scheme]["fvu"]["value"]
        assert rows["random", "", "fp"]["fvu"]["value"] > rows["reference", "", "fp"]["fvu"]["value"]
        home[scheme] = {key: row for key, row in rows.items() if key[2] == "fp" and row["trained_on"] in ("fp", "")}
        told = found["verdict"]
        assert told["seeds"] == 2 and set(told["gaps"]) == {"transferred", *CLOSED, "finetuned"}
        assert set(found["matching"]) >= {"mmcs", "mnn_0.5", "mnn", "mnn_0.9", "assigned", "act_r", "lost", "split"}
    shared = [key for key in home["int2"] if key[0] in ("reference", "reseeded", "random", "shuffled")]
    assert len(shared) == 4 and all(home["int2"][key] == home["int3"][key] for key in shared)
    assert home["int2"]["adapted", "gain", "fp"] != home["int3"]["adapted", "gain", "fp"]


def test_budgets_texts_and_the_crosscoder_are_told(done):
    """Points of the curves with the ends that were judged too, latents in text, and whose the crosscoder's are."""
    found = read_json(done / "out/compare.json")
    curves, rows = found["curves"], {(r["arm"], r["how"], r["judged_on"]): r for r in found["rows"]}
    assert [one["tokens"] for one in curves["retrained"]] == [160, 480, 960]
    assert [one["tokens"] for one in curves["finetuned"]] == [160, 320]
    for arm, key in (("retrained", ("retrained", "")), ("finetuned", ("adapted", "finetuned"))):
        assert curves[arm][-1]["value"] == pytest.approx(rows[(*key, "int2")]["fvu"]["value"], rel=1e-5)
    assert curves["transferred"]["value"] == pytest.approx(rows["transferred", "", "int2"]["fvu"]["value"], rel=1e-5)
    assert found["verdict"]["price"]["tokens"] == curves["overtaking"]["tokens"]
    assert set(found["texts"]) == {"lost", "split", "new", "merged"}
    for fate, texts in found["texts"].items():
        assert [one["feature"] for one in texts] == [one["feature"] for one in found["fates"][fate][:2]]
    counted = found["crosscoder"]
    assert set(counted) == {"fp", "int2", "shared"} and sum(counted.values()) > 0
    assert "crosscoder" not in read_json(done / "out/compare/int3.json")


def test_the_page_shows_every_scheme(done):
    """The table of verdicts, and for each scheme its budgets and latents; the crosscoder where there is one."""
    page = (done / "out/report.html").read_text()
    assert "Every scheme&#39;s verdict." in page and page.count('id="caption-budgets') == 2
    assert page.count("A crosscoder of both models") == 1
    one = read_json(done / "out/compare/int3.json")
    fires = next(f"fires on {each[0]['tokens']:,} of the held-out" for each in one["fates"].values() if each)
    assert fires in page and f"<td>{one['verdict']['choice']}</td>" in page


def compare_command(done, out, **named):
    saes = done / "out/saes"
    given = {"sae": "fp", "retrained": "int2", "reseeded": "fp-seed1", "again": "int2-seed1"}
    given |= {"finetuned": "int2-finetuned", "shuffled": "shuffled"} | named
    argv = ["compare", "--model", str(done / "model"), "--tokens", f"text:{done / 'text.txt'}", "--seq", "16"]
    argv += ["--limit", "384", "--schemes", "int2", "--out", str(out), "--adapt", "64", "--probes"]
    return argv + [word for name, folder in given.items() for word in (f"--{name}", str(saes / folder))]


def narrow(d=8, latents=12):
    random = np.random.default_rng(0)
    rows = random.normal(size=(latents, d)).astype(np.float32)
    return SAE(TopK(3), rows.T, np.zeros(latents, np.float32), rows, np.zeros(d, np.float32))


def test_the_command_gives_the_numbers_of_the_study(done, tmp_path):
    """On the study's held-out windows, nothing adapted, every row that both have. Control: other windows."""
    study = read_json(done / "out/compare.json")
    mine = {}
    for limit in ("320", "304"):
        argv = compare_command(done, tmp_path / limit, shuffled="shuffled")
        assert main([*argv, "--adapt", "0", "--limit", limit]) == 0
        mine[limit] = read_json(tmp_path / limit / "compare.json")
    key = ("arm", "how", "judged_on")
    rows = {tuple(row[k] for k in key): row for row in study["rows"]}
    for limit, same in (("320", True), ("304", False)):
        assert len(mine[limit]["rows"]) == 12
        for row in mine[limit]["rows"]:
            values = [one[name]["value"] for one in (row, rows[tuple(row[k] for k in key)]) for name in ("fvu", "loss")]
            assert (values[:2] == pytest.approx(values[2:], rel=1e-5)) == same, row
    assert mine["320"]["verdict"]["gaps"]["finetuned"] == study["verdict"]["gaps"]["finetuned"]


def test_the_command_takes_every_arm_too(done, tmp_path, capsys):
    """`qsae compare` on the study's dictionaries and its held-out windows, the first 64 tokens for adapting: what it
    shares with the study has the study's numbers. What cannot be is one line."""
    saes, argv = done / "out/saes", compare_command(done, tmp_path / "one")
    save_sae(narrow(16, 32), done / "elsewhere", {"hook_name": "blocks.0.resid_post"})
    save_sae(narrow(16, 48), done / "wide", {"hook_name": "blocks.1.resid_post"})
    save_sae(narrow(16, 32), done / "wordy", {"hook_name": "blocks.1.resid_post", "training_tokens": "many"})
    save_sae(narrow(), done / "narrow", {"hook_name": "blocks.1.resid_post", "training_tokens": 48})
    assert main([*argv, "--budgets", str(saes / "int2-160"), str(saes / "int2-480")]) == 0
    mine, study = (read_json(file) for file in (tmp_path / "one/compare.json", done / "out/compare.json"))
    arms = {(row["arm"], row["how"]) for row in mine["rows"]}
    assert arms == {(row["arm"], row["how"]) for row in study["rows"]} - {("adapted", "finetuned at home")}
    assert mine["tokens"]["n"] == 320 and [p["tokens"] for p in mine["curves"]["retrained"]] == [160, 480, 960]
    seconds, overtaken = (mine["verdict"]["price"][key] for key in ("seconds", "tokens"))
    assert (seconds is None) == (overtaken["value"] is None) and (seconds is None or set(seconds) == set(DEVICES))
    capsys.readouterr()
    for more, said in (
        (["--budgets", str(saes / "random")], "does not say from how many tokens"),
        (["--budgets", str(saes / "int2-160"), str(saes / "int3-160")], "learnt from 160 tokens, as another does"),
        (["--retrained", str(saes / "int2-160"), "--budgets", str(saes / "int2-480")], "exchange them"),
        (["--budgets", str(saes / "int2-finetuned-160")], "goes on from `fp`: --budgets takes what was retrained"),
        (["--budgets", str(saes / "int2-160"), str(done / "narrow")], "is of width 8, but `blocks.1.resid_post`"),
        (["--reseeded", str(saes / "fp")], "--sae and --reseeded are both"),
        (["--reseeded", str(saes / "int2")], "--retrained and --reseeded are both"),
        (["--again", str(saes / "fp-seed1")], "--reseeded and --again are both"),
        (["--reseeded", str(saes / "fp-finetuned")], "--reseeded has the seed of --sae, 0"),
        (["--again", str(saes / "int3-seed1")], "--again was trained on activations of int3, not of int2"),
        (["--finetuned", str(saes / "int2-160")], "--finetuned does not go on from another dictionary"),
        (
            ["--retrained", str(saes / "random"), "--sae", str(saes / "int2")],
            "--sae was trained on activations of int2",
        ),
        (["--retrained", str(done / "elsewhere")], "--retrained was trained at blocks.0.resid_post, --sae at blocks.1"),
        (["--retrained", str(done / "wide")], "--retrained has 48 latents, --sae 32"),
        (["--budgets", str(done / "wordy")], "does not say from how many tokens"),
        (["--out", str(done / "out")], "is the folder of a study"),
        (["--adapt", "384"], "none is left to judge on"),
        (["--adapt", "16"], "15 tokens are too few to adapt a dictionary of width 16"),
        (["--skip-first", "16"], "skip"),
    ):
        assert main([*argv, "--out", str(tmp_path / "two"), *more]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and said in told, told
    assert not (tmp_path / "two/compare.json").exists()


def test_a_sweep_lays_its_studies_beside_each_other(done, tmp_path, capsys):
    """A folder and a row for every combination and scheme, with the numbers of its files; again, all is reused."""
    text = (done / "s.toml").read_text()
    text = text[: text.index("[arms]")].replace("960", "320").replace('"int2,int3"', '"int2"')
    sweep = '[sweep]\n"sae.expansion" = [0.5, 2]\npoint = ["blocks.1.mlp_out"]\n'
    (tmp_path / "s.toml").write_text(text + sweep)
    argv = ["run", str(tmp_path / "s.toml"), "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    found = json.loads((tmp_path / "out/sweep.json").read_text())["rows"]
    names = [f"sae.expansion={e},point=blocks.1.mlp_out" for e in ("0.5", "2")]
    assert [(row["study"], row["scheme"]) for row in found] == [(n, s) for n in names for s in ("int8", "int2")]
    audits = [read_json(tmp_path / "out" / name / "audit.json") for name in names]
    assert [one["point"] for one in audits] == ["blocks.1.mlp_out"] * 2
    assert [one["reference"]["latents"] for one in audits] == [8, 32]
    for row in found:
        folder = tmp_path / "out" / row["study"]
        assert row["survived"] in [one["survived"] for one in read_json(folder / "audit.json")["rows"]]
        if row["scheme"] == "int2":
            compared = read_json(folder / "compare.json")
            assert row["gap"] == compared["verdict"]["gaps"]["transferred"]["fvu"]
            assert row["fvu_retrained"] in [r["fvu"]["value"] for r in compared["rows"] if r["arm"] == "retrained"]
    capsys.readouterr()
    assert main(argv) == 0
    assert capsys.readouterr().out.count("already done") == 4 * 2


ODD = {
    "arms.budgets=20": "`arms.budgets`: 20 tokens are less than a step of 32",
    "arms.finetune=20": "`arms.finetune`: 20 tokens are less than a step of 32",
    "arms.adapt=30": "30 tokens are too few to adapt a dictionary of width 16",
    "arms.adapt=1000000": "are left to train on: lower it",
}


@pytest.mark.parametrize("setting, said", ODD.items())
def test_arms_that_are_too_small_are_refused_before_anything_is_trained(done, tmp_path, capsys, setting, said):
    argv = ["run", str(done / "s.toml"), "--out", str(tmp_path / "out"), "--set", setting]
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert said in told.splitlines()[-1] and "Traceback" not in told, told
    assert not (tmp_path / "out/saes").exists()


def test_what_a_sweep_varies_cannot_be_set(tmp_path, capsys):
    head = 'model = "m"\npoint = "p"\nschemes = ["int8"]\n'
    (tmp_path / "s.toml").write_text(head + '[sweep]\n"sae.k" = [3, 4]\n')
    (tmp_path / "t.toml").write_text("sweep = 3\n" + head)
    argv = ["run", "--out", str(tmp_path / "out")]
    for more, said in (
        ([str(tmp_path / "s.toml"), "--set", "sae.k=5"], "--set sae.k"),
        ([str(tmp_path / "t.toml")], "no table"),
    ):
        assert main([*argv, *more]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and said in told and not (tmp_path / "out").exists()


def test_a_sweep_over_no_list_is_refused(tmp_path, capsys):
    (tmp_path / "s.toml").write_text('model = "m"\npoint = "p"\nschemes = ["int8"]\n[sweep]\n"sae.k" = 3\n')
    assert main(["run", str(tmp_path / "s.toml"), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "`sweep.sae.k`" in told and not (tmp_path / "out").exists()
