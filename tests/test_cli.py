"""The commands as a user types them: statuses, one line for each mistake, nothing half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qsae_jax import fake_quantize, load_lm, save_sae
from qsae_jax.cli import main

POINT = "blocks.1.resid_post"


@pytest.fixture
def inputs(tiny_folder, tiny_sae, tiny_windows, tmp_path):
    """Words of the command line for a sound audit, by name; a test replaces one of them."""
    save_sae(tiny_sae(), tmp_path / "sae", {"hook_name": "blocks.1.hook_resid_post"})
    np.save(tmp_path / "tokens.npy", tiny_windows(6).ids)
    shutil.copytree(tiny_folder, tmp_path / "model")
    return {
        "--model": str(tmp_path / "model"),
        "--sae": str(tmp_path / "sae"),
        "--tokens": f"npy:{tmp_path / 'tokens.npy'}",
        "--schemes": "int8,int4-g8",
        "--out": str(tmp_path / "out"),
    }


def words(verb, given):
    return [verb, *(word for pair in given.items() for word in pair)]


def refused(argv, capsys):
    """The one line on standard error, after status 2."""
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("qsae: "), lines
    return lines[0]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def plant(fault, given, folder):
    """Spoil the inputs in one way; what the one line has to name."""
    model = folder / "model"
    if fault == "missing file":
        return given | {"--tokens": f"npy:{folder}/none.npy"}, "none.npy"
    if fault == "truncated safetensors":
        truncate(model / "model.safetensors")
        return given, "model.safetensors"
    if fault == "truncated GGUF":
        (folder / "x.gguf").write_bytes(b"GGUF\x03\0\0\0\x05\0\0\0")
        return given | {"--model": str(folder / "x.gguf")}, "x.gguf"
    if fault == "unknown config key":
        facts = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(facts | {"new_trick": 2}))
        return given, "new_trick"
    if fault == "unknown point":
        return given | {"--point": "blocks.1.resid_pos"}, "resid_post"
    if fault == "unknown scheme":
        return given | {"--schemes": "int4,imt8"}, "int8"
    if fault == "wrong width":
        weights = load_file(folder / "sae" / "sae_weights.safetensors")
        weights |= {"W_enc": weights["W_enc"][:8].copy(), "W_dec": weights["W_dec"][:, :8].copy()}
        save_file(weights | {"b_dec": weights["b_dec"][:8].copy()}, folder / "sae" / "sae_weights.safetensors")
        cfg = json.loads((folder / "sae" / "cfg.json").read_text())
        (folder / "sae" / "cfg.json").write_text(json.dumps(cfg | {"d_in": 8}))
        return given, "width 8"
    if fault == "NaN weights":
        weights = load_file(model / "model.safetensors")
        weights["model.norm.weight"][3] = np.nan
        save_file(weights, model / "model.safetensors")
        return given, "model.norm.weight"
    if fault == "empty text":
        (folder / "empty.txt").write_text(" \n")
        return given | {"--tokens": f"text:{folder}/empty.txt"}, "empty.txt"
    (folder / "file").write_text("")
    return given | {"--out": f"{folder}/file/out"}, "file/out"


FAULTS = (
    *("missing file", "truncated safetensors", "truncated GGUF", "unknown config key", "unknown point"),
    *("unknown scheme", "wrong width", "NaN weights", "empty text", "unwritable folder"),
)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_malformed_input_gives_one_line(fault, inputs, tmp_path, capsys):
    given, named = plant(fault, inputs, tmp_path)
    assert named in refused(words("audit", given), capsys)
    assert not (tmp_path / "out" / "audit.json").exists() and not list(tmp_path.glob("out/.*"))


def test_sound_inputs_are_not_refused(inputs, tmp_path, capsys):
    """The control of the ten above; and what an audit leaves."""
    assert main(words("audit", inputs)) == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["audit.json", "features.parquet", "report.html", "run.json"]
    assert [row["scheme"] for row in json.loads((tmp_path / "out/audit.json").read_text())["rows"]] == [
        "int8",
        "int4-g8",
    ]
    assert "report.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, named",
    [
        (["adit"], "audit"),
        (["audit", "--modell", "x"], "--help"),
        (["run", "none.toml"], "none.toml"),
        (["report", "none"], "none"),
        (["quantize", "--model", "none", "--scheme", "int4", "--out", "x"], "none"),
        (["audit", "--batch", "many"], "--batch"),
        (["points", "--model", "hf:none/none"], "hf:none/none"),
    ],
)
def test_a_mistyped_command_gives_one_line(argv, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named in refused(argv, capsys)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("change", [{"--batch": "-3"}, {"--seq": "0"}, {"--skip-first": "99"}, {"--limit": "-1"}])
def test_a_number_out_of_range_gives_one_line(change, inputs, capsys, tmp_path):
    (tmp_path / "some.txt").write_text("words " * 100)
    refused(words("audit", inputs | {"--tokens": f"text:{tmp_path}/some.txt", "--seq": "16"} | change), capsys)


@pytest.mark.parametrize(
    "setting, named",
    [
        ("sae.lr=inf", "finite"),
        ("sae.lr=1e30", "diverged"),
        ("sae.sparsity=topkk", "topk"),
        ("train.seed=99999999999", "train.seed"),
        ("sae.warmup=0.9", "sae.warmup"),
        ("sae.k=0", "sae.k"),
    ],
)
def test_a_training_that_cannot_be_gives_one_line(setting, named, inputs, tmp_path, capsys):
    given = {key: inputs[key] for key in ("--model", "--tokens", "--out")} | {"--point": POINT}
    more = ("train.tokens=240", "train.batch=40", "sae.expansion=2", *(() if "sae.k=" in setting else ("sae.k=4",)))
    argv = [*words("train", given), *(w for s in (*more, setting) for w in ("--set", s))]
    assert main(argv) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qsae: ")]
    assert len(told) == 1 and named in told[0], told
    assert not (tmp_path / "out" / "saes").exists()


@pytest.mark.parametrize(
    "option, value, named",
    [("--mesh", "0x0", "mesh"), ("--limit", "3", "--limit 3"), ("--seq", "100", "--seq"), ("--schemes", "fp", "`fp`")],
)
def test_what_does_not_fit_gives_one_line(option, value, named, inputs, capsys, tmp_path):
    (tmp_path / "some.txt").write_text("words " * 100)
    told = refused(
        words("audit", inputs | {"--tokens": f"text:{tmp_path}/some.txt", "--seq": "16"} | {option: value}), capsys
    )
    assert named in told


def test_a_quantized_folder_says_what_it_is(inputs, tmp_path, capsys):
    """Its page cannot call int4 weights full precision without a word."""
    out = tmp_path / "int4"
    assert main(["quantize", "--model", inputs["--model"], "--scheme", "int4", "--out", str(out)]) == 0
    assert main(words("audit", inputs | {"--model": str(out), "--schemes": "int8"})) == 0
    assert main(words("audit", inputs | {"--out": str(tmp_path / "plain"), "--schemes": "int8"})) == 0
    notes = [json.loads((tmp_path / name / "audit.json").read_text())["notes"] for name in ("out", "plain")]
    assert any("int4, written by qsae quantize" in note for note in notes[0]) and notes[1] == []


@pytest.mark.slow
def test_ctrl_c_in_an_audit_ends_with_130(inputs, tmp_path, tiny_windows):
    """Interrupted among its batches: no crash of the interpreter, no result written, sums kept to go on from."""
    np.save(tmp_path / "tokens.npy", tiny_windows(200_000).ids)
    command = [sys.executable, "-m", "qsae_jax", *words("audit", inputs | {"--batch": "8"})]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    ) as going:
        assert going.stderr
        assert any(line.startswith("audit:") for line in going.stderr)  # among its batches: said after 20 seconds
        going.send_signal(signal.SIGINT)
        told = going.stderr.read()
    assert going.returncode == 130 and "the same command goes on" in told and "Traceback" not in told
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["audit"]
    assert {path.name for path in (tmp_path / "out/audit").iterdir()} == {"begun.json", "pass0.npz"}


def test_debug_shows_the_traceback(capsys):
    assert main(["adit", "--debug"]) == 2
    told = capsys.readouterr().err
    assert "Traceback" in told and told.splitlines()[-1].startswith("qsae: unknown verb")


def test_quantize_writes_a_folder_that_gives_the_twins_logits(inputs, tmp_path, tiny_lm, tiny_windows, capsys):
    out = tmp_path / "int4"
    argv = ["quantize", "--model", inputs["--model"], "--scheme", "int4-g8", "--out", str(out)]
    assert main(argv) == 0
    tokens = tiny_windows(2).ids
    written, twin = load_lm(str(out)), fake_quantize(tiny_lm, "int4-g8")
    np.testing.assert_array_equal(written(tokens), twin(tokens))
    assert np.abs(np.asarray(written(tokens) - tiny_lm(tokens))).max() > 1e-3
    assert (out / "tokenizer.json").is_file() and (out / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert "int4" in refused(argv, capsys), "a folder with something in it is not overwritten"


def test_schemes_and_points_tell_what_there_is(inputs, capsys):
    assert main(["schemes"]) == 0 and main(["points", "--model", inputs["--model"]]) == 0
    told = capsys.readouterr().out
    assert all(
        name in told for name in ("signed_full", "-scale_e8m0", "nvfp4", "q4_k", "prune~SCHEME", "duan2026", "[4-8]")
    )
    assert "blocks.{0..2}.resid_post" in told


def test_layers_are_those_that_change(inputs, tmp_path, capsys, tiny_lm):
    """--layers names them in every result; a scheme that names its own is refused, and blocks that are not there."""
    out = tmp_path / "audit"
    argv = words("audit", inputs | {"--out": str(out)})
    schemes = argv.index("--schemes") + 1
    argv[schemes] = "int2,int{2,3}[mlp.down],prune0.3"
    assert "names its weights already" in refused([*argv, "--layers", "1-2"], capsys)
    argv[schemes] = "int2,prune0.3"
    assert "there is no block 9: the model has blocks 0 to 2" in refused([*argv, "--layers", "3-9"], capsys)
    assert "runs backwards" in refused([*argv, "--layers", "2-1"], capsys)
    assert main([*argv, "--layers", "2"]) == 0
    rows = json.loads((out / "audit.json").read_text())["rows"]
    assert [row["scheme"] for row in rows] == ["int2[2]", "prune0.3[2]"]
    assert all(row["survived"] == 1 and row["activation_rel_mse"] == 0 for row in rows), "block 2 is after the point"
    assert all(row["ppl"] != 0 and row["kl"] > 0 for row in rows)
    folder = tmp_path / "twin"
    given = ["quantize", "--model", inputs["--model"], "--scheme", "q4_k", "--layers", "1", "--out", str(folder)]
    assert main(given) == 0
    assert "note: q4_k[1]: rows of 16 are kept as f16, as llama.cpp does" in capsys.readouterr().out
    assert "is found by perplexity" in refused([*given[:4], "prune~int4", "--out", str(tmp_path / "no")], capsys)


@pytest.mark.slow
def test_train_then_compare(inputs, tmp_path, capsys):
    """Dictionaries on fp and int4 from one command, judged by the next."""
    common = {key: inputs[key] for key in ("--model", "--tokens")}
    given = common | {
        "--point": POINT,
        "--schemes": "fp,int4",
        "--out": str(tmp_path / "t"),
        "--set": "train.tokens=240",
    }
    more = [w for setting in ("train.batch=40", "sae.k=4", "sae.expansion=2") for w in ("--set", setting)]
    assert main(words("train", given) + more) == 0
    assert sorted(os.listdir(tmp_path / "t")) == ["run.json", "saes", "train"]
    cfg = json.loads((tmp_path / "t/saes/int4/cfg.json").read_text())
    assert cfg["metadata"]["quantization"] == "int4" and cfg["k"] == 4 and cfg["d_sae"] == 32
    assert cfg["metadata"]["processing"] == "none"
    arms = {"--sae": str(tmp_path / "t/saes/fp"), "--retrained": str(tmp_path / "t/saes/int4")}
    assert main(words("compare", common | arms | {"--schemes": "int4", "--out": inputs["--out"]})) == 0
    capsys.readouterr()
    assert json.loads((tmp_path / "out/compare.json").read_text())["verdict"]["choice"] in (
        "keep",
        "adapt",
        "retrain",
        "unsure",
    )
    facts = json.loads((tmp_path / "out/compare.json").read_text())
    assert facts["retrained"] == arms["--retrained"] and any("trained on these tokens" in n for n in facts["notes"])
    assert "qsae compare" in (tmp_path / "out/report.html").read_text()
    given["--out"] = str(tmp_path / "seeded")
    assert main([*words("train", given | {"--schemes": "fp"}), *more, "--set", "train.seed=1"]) == 0
    argv = words("compare", common | arms | {"--reseeded": f"{tmp_path}/seeded/saes/fp", "--schemes": "int4"})
    assert main([*argv, "--out", inputs["--out"]]) == 0
    facts = json.loads((tmp_path / "out/compare.json").read_text())
    assert facts["verdict"]["floor"] > 0 and [row["arm"] for row in facts["rows"]].count("reseeded") == 2
    capsys.readouterr()
    assert "`train.reseed`" in refused([*words("train", given), "--set", "train.reseed=3"], capsys)
    assert "`sae.kk`" in refused([*words("train", given), "--set", "sae.kk=3"], capsys)


STUDY = """
model = "{folder}/model"
point = "blocks.1.resid_post"
schemes = ["int8", "noise@int4"]
compare = "int4"
[tokens]
source = "npy:{folder}/tokens.npy"
audit = 32
compare = 32
[train]
tokens = {tokens}
batch = 40
[sae]
k = 4
expansion = 2
"""


@pytest.mark.slow
def test_a_study_is_reused_and_redone_where_it_changed(inputs, tmp_path, capsys):
    (tmp_path / "s.toml").write_text(STUDY.format(folder=tmp_path, tokens=400))
    argv = ["run", str(tmp_path / "s.toml"), "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    first = (tmp_path / "out/compare.json").read_bytes()
    assert sorted(p.name for p in (tmp_path / "out/saes").iterdir()) == ["fp", "fp-seed1", "int4"]
    capsys.readouterr()
    assert main(argv) == 0
    assert capsys.readouterr().out.count("already done") == 4
    assert main([*argv, "--set", "mesh=2x4"]) == 0
    assert capsys.readouterr().out.count("already done") == 4, "on another mesh it is the same study"
    assert main([*argv, "--set", "schemes=int8,int2"]) == 0
    assert capsys.readouterr().out.count("already done") == 3
    assert (tmp_path / "out/compare.json").read_bytes() == first
    assert "`tokens.sek`" in refused([*argv, "--set", "tokens.sek=3"], capsys)
    assert "`schemes`" in refused([*argv, "--set", "schemes=fp"], capsys)
    np.save(tmp_path / "tokens.npy", np.load(tmp_path / "tokens.npy")[::-1].copy())
    assert main(argv) == 0
    assert capsys.readouterr().out.count("already done") == 0, "other tokens under the same name"
    assert (tmp_path / "out/compare.json").read_bytes() != first


@pytest.mark.slow
def test_a_study_without_a_comparison_and_with_a_dictionary(inputs, tmp_path, capsys):
    """One dictionary and no comparison; then its audit by another study, with braces, and nothing trained."""
    text = STUDY.format(folder=tmp_path, tokens=400).replace('compare = "int4"\n', "")
    (tmp_path / "s.toml").write_text(text)
    out, other = tmp_path / "out", tmp_path / "other"
    assert main(["run", str(tmp_path / "s.toml"), "--out", str(out)]) == 0
    assert [p.name for p in (out / "saes").iterdir()] == ["fp"] and not (out / "compare.json").exists()
    assert "Keep, adapt" not in (out / "report.html").read_text()
    argv = ["run", str(tmp_path / "s.toml"), "--out", str(other), "--set", f"dictionary={out}/saes/fp"]
    assert main([*argv, "--set", "schemes=int8,noise@int4,int{3,2}[{0..1},mlp.down]"]) == 0
    capsys.readouterr()
    facts = json.loads((other / "audit.json").read_text())
    rows = {row["scheme"]: row for row in facts["rows"]}
    assert list(rows)[2:] == [f"int{bits}[{layer},mlp.down]" for bits in (3, 2) for layer in (0, 1)]
    assert facts["sae"] == f"{out}/saes/fp" and not (other / "saes").exists()
    assert rows["int8"] == json.loads((out / "audit.json").read_text())["rows"][0]
    assert any("trained on these tokens" in note for note in facts["notes"])
    assert "leave one of them out" in refused([*argv, "--set", "compare=int4"], capsys)
    assert main([*argv, "--set", 'schemes=["int8", "noise@int4"]']) == 0, "a list as in the file"
    capsys.readouterr()
    assert main(argv) == 0, "the same schemes, so nothing is left to do"
    assert capsys.readouterr().out.count("already done") == 2


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_half_written_and_the_command_goes_on(inputs, tmp_path):
    """Interrupted in training: status 130, one line, no dictionary; the same command ends with the bits of a run
    that nobody interrupted."""
    (tmp_path / "s.toml").write_text(STUDY.format(folder=tmp_path, tokens=8_000))

    argv = ["run", str(tmp_path / "s.toml"), "--out"]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    log = tmp_path / "stopped/train/fp.jsonl"
    command = [sys.executable, "-m", "qsae_jax", *argv, str(tmp_path / "stopped")]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as going:
        while going.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) > 2):
            time.sleep(0.05)
        going.send_signal(signal.SIGINT)
        _, told = going.communicate(timeout=120)
    assert going.returncode == 130, told
    assert told.splitlines()[-1].startswith("qsae: stopped after") and "Traceback" not in told
    left = [p for p in (tmp_path / "stopped").rglob("*") if p.name.startswith(".") or "saes" in p.parts]
    assert left == [], left
    for out in ("stopped", "whole"):
        assert main([*argv, str(tmp_path / out)]) == 0
    for name in ("fp", "int4", "fp-seed1"):
        a, b = (load_file(tmp_path / out / "saes" / name / "sae_weights.safetensors") for out in ("stopped", "whole"))
        assert all(np.array_equal(a[key], b[key]) for key in a), name
