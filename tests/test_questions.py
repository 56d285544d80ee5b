"""A study that asks everything, on a tiny model: its files, their numbers beside each other, and its page."""

import json

import pytest

from qsae_jax.cli import main
from qsae_jax.files import read_json

pytestmark = pytest.mark.slow
STUDY = """
model = "{folder}/model"
point = "blocks.1.resid_post"
schemes = ["int8", "int2", "same", "noise@int2", "noise@int2#1", "prune~int2"]
errors_at = ["blocks.{{0..2}}.resid_post"]
match = 64
[tokens]
source = "text:{folder}/text.txt"
seq = 16
audit = 640
[sae]
k = 4
expansion = 3
[train]
tokens = 1600
batch = 32
[[perplexity]]
name = "chunked"
window = 16
bos = "never"
tokens = 320
[[perplexity]]
name = "sliding"
window = 16
stride = 4
bos = "never"
tokens = 160
[predict]
schemes = ["int2"]
[contexts]
scheme = "int2"
features = 3
tokens = 320
[act]
features = 4
tokens = 320
scheme = "int2"
[expected]
source = "nobody"
[expected.rows.int2]
ppl = 100.0
survived = 0.25
[expected.within]
ppl = 0.5
"""


@pytest.fixture(scope="module")
def done(tiny_folder, tmp_path_factory):
    """The study's folder, run once."""
    import shutil

    folder = tmp_path_factory.mktemp("asked")
    shutil.copytree(tiny_folder, folder / "model")
    words = [f"word {i * 37 % 101} of line {i}, and {'abcdefgh'[i % 8] * (i % 5 + 1)}" for i in range(400)]
    (folder / "text.txt").write_text("\n".join(words))
    (folder / "s.toml").write_text(STUDY.format(folder=folder))
    assert main(["run", str(folder / "s.toml"), "--out", str(folder / "out")]) == 0
    return folder


def test_every_answer_is_there(done, capsys):
    """Files, and what they hold; run again, nothing is done anew; what is asked no more is taken away."""
    out = done / "out"
    audit = read_json(out / "audit.json")
    rows = {row["scheme"]: row for row in audit["rows"]}
    assert rows["same"]["survived"] == 1 and rows["same"]["kl"] < 1e-6 and rows["same"]["mean_r"] > 0.999999
    assert rows["same"]["delta_ppl"] == 0 and rows["same"]["top1"] == 1 and not any(rows["same"]["causes"].values())
    assert list(rows["int2"]["errors"]) == [f"blocks.{i}.resid_post" for i in range(3)]
    assert rows["int2"]["errors"]["blocks.1.resid_post"] == pytest.approx(rows["int2"]["activation_rel_mse"], rel=1e-5)
    assert rows["prune~int2"]["matched"]["tokens"] == 64 and rows["noise@int2#1"]["of"] == "int2"
    assert [one["family"] for one in audit["draws"]] == ["noise@int2"] and audit["draws"][0]["draws"] == 2
    lost = sum(rows["int2"]["causes"].values())
    assert lost == pytest.approx(1 - rows["int2"]["survived"])
    found = read_json(out / "perplexity.json")
    assert [row["scheme"] for row in found["rows"][:3]] == ["fp", "int8", "int2"] and len(found["rows"]) == 14
    assert set(read_json(out / "predict.json")["schemes"]) == {"int2"}
    contexts = read_json(out / "contexts.json")
    assert contexts["scheme"] == "int2" and len(contexts["features"]) == 3
    one = next(c for f in contexts["features"] for c in f["peak"])
    assert len(one["text"]) == len(one["ids"]) == len(one["fp"]) == len(one["twin"])
    acted = read_json(out / "act.json")
    assert len(acted["features"]) == 4 and set(acted["summary"]) == {"ablate", "steer"}
    capsys.readouterr()
    again = ["run", str(done / "s.toml"), "--out", str(out)]
    assert main(again) == 0
    assert capsys.readouterr().out.count("already done, reused") == 7
    assert main([*again, "--set", "act.features=0", "--set", "act.scheme=", "--set", "expected.source=somebody"]) == 0
    assert "Source: somebody" in (out / "report.html").read_text()
    assert not (out / "act.json").exists() and (out / "contexts.json").exists()
    page = (out / "report.html").read_text()
    assert "Do features still act?" not in page and "Perplexity, properly" in page and "Published values" in page


def test_the_page_answers_every_question(done):
    """A section each, with a paragraph; and the expected values beside ours."""
    page = (done / "out" / "report.html").read_text()
    row = read_json(done / "out" / "audit.json")["rows"][1]
    cell = f"{100 * row['survived']:.1f} % [{100 * row['intervals']['survived'][0]:.3g}, "
    assert cell in page and f"<td>{100 * row['causes']['noisy']:.1f} %</td>" in page
    for title in ("Published values", "Why features are lost", "Controls and intervals", "Who survives?",
                  "Where does the damage arise?", "The most damaged features in text"):  # fmt: skip
        assert f"<h2>{title}" in page, title
    assert page.count('class="context"') > 2 and "published numbers are within their tolerance" in page
    assert "NaN" not in page and ">None<" not in page


@pytest.mark.parametrize(
    "setting, what",
    [
        ("predict.schemes=int3", "`int3` is not in the audit"),
        ("act.scheme=int7", "`int7` is not in the audit"),
        ("contexts.features=-1", "features"),
        ("contexts.features=0", "say at how many features"),
        ("match=-3", "match"),
        ("at.blocks.1.hook_resid_post=x", "the study's own"),
        ("expected.rows={}", "table of keys"),
        ("errors_at=blocks.9.resid_post", "blocks 0 to 2"),
        ("tokens.source=npy:{}/tokens.npy", "cuts the text anew"),
        ("predict.others=/nowhere", "/nowhere"),
    ],
)
def test_a_wrong_question_is_one_line(done, setting, what, capsys, tiny_windows):
    import numpy as np

    np.save(done / "tokens.npy", tiny_windows(200).ids)
    argv = ["run", str(done / "s.toml"), "--out", str(done / "other"), "--set", setting.format(done)]
    assert main(argv) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qsae: ")]
    assert what in line


def test_a_study_says_what_it_was_asked(done):
    """`run.json` keeps the questions; a dictionary at another point is judged in the same passes."""
    settings = json.loads((done / "out" / "run.json").read_text())["settings"]
    assert settings["perplexity"][1]["stride"] == 4 and settings["expected"]["rows"]["int2"]["ppl"] == 100.0
    sae = f"{done}/out/saes/fp"
    argv = ["run", str(done / "s.toml"), "--out", str(done / "two"), "--set", f"dictionary={sae}"]
    argv += ["--set", f"at.blocks.0.resid_post={sae}", "--set", "act.features=0", "--set", "contexts.features=0"]
    argv += ["--set", "act.scheme=", "--set", "contexts.scheme=", "--set", "expected.rows.int2=3"][:4]
    argv += ["--set", "predict.schemes=[]", "--set", "perplexity=[]", "--set", "schemes=int2,same"]
    assert main(argv) == 0
    here, there = (
        read_json(done / "two" / "audit.json"),
        read_json(done / "two" / "at" / "blocks.0.resid_post" / "audit.json"),
    )
    assert here["rows"][0]["ppl"] == there["rows"][0]["ppl"] and there["point"] == "blocks.0.resid_post"
    assert here["rows"][0]["mean_r"] == pytest.approx(
        read_json(done / "out" / "audit.json")["rows"][1]["mean_r"], abs=1e-5
    )
    assert there["rows"][0]["mean_r"] != here["rows"][0]["mean_r"]
    assert "Each point has a dictionary of its own" in (done / "two" / "report.html").read_text()
