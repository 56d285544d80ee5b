"""A study killed at random moments, with no warning, ends as one that was left alone: bit for bit.

QSAE_KILLS says how often it is killed: 4 by default, and with 20 it takes four minutes. Every process shares what XLA
has compiled, or most of them would be killed while compiling.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

KILLS = int(os.environ.get("QSAE_KILLS", "4"))
STUDY = """
model = "{folder}/model"
point = "blocks.1.resid_post"
schemes = ["int8", "int2"]
compare = "int2"
[tokens]
source = "text:{folder}/text.txt"
seq = 16
audit = 320
compare = 320
[sae]
k = 4
expansion = 2
[train]
tokens = 16000
batch = 32
[arms]
adapt = 320
finetune = 320
budgets = [160]
"""
# States are kept every tenth of a second in place of every minute: so that the kills fall between and within keeping.
RUN = """
import sys, time
import jax
jax.config.update("jax_num_cpu_devices", 1)
from qsae_jax.audit.kept import Kept
import qsae_jax.sae.fit as fitting
from qsae_jax.cli import main
fitting.KEEP_EVERY_S = sys.modules[Kept.__module__].KEEP_EVERY_S = 0.1
print("begun", flush=True)
sys.exit(main(sys.argv[1:]))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def begin(tiny_folder, tmp_path_factory):
    """`begin(out)`: a process that runs the study into a folder, given back when it has imported all."""
    folder = tmp_path_factory.mktemp("kill")
    shutil.copytree(tiny_folder, folder / "model")
    words = [f"Word {i * 3719 % 10007} of {i + 1000}, {'abcdefgh'[i % 8] * (i % 5 + 1)}" for i in range(400)]
    (folder / "text.txt").write_text("\n".join(words))
    (folder / "s.toml").write_text(STUDY.format(folder=folder))
    known = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    known |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "JAX_PLATFORMS": "cpu"}

    def go(out):
        argv = [sys.executable, "-c", RUN, "run", str(folder / "s.toml"), "--out", str(out)]
        with (folder / "said").open("w") as said:
            going = subprocess.Popen(argv, env=os.environ | known, stdout=said, stderr=said)
        while "begun" not in (folder / "said").read_text():
            assert going.poll() is None, (folder / "said").read_text()
            time.sleep(0.02)
        return going

    return go


def results(out):
    """All that a study leaves, but for its times and the versions of files."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if path.suffix == ".jsonl":
            found[name] = [json.loads(line) | {"tokens_per_s": 0} for line in path.read_text().splitlines()]
        elif path.name == "run.json":
            found[name] = [(stage["name"], stage["key"]) for stage in json.loads(path.read_text())["stages"]]
        elif path.suffix != ".html":
            found[name] = path.read_bytes()
    return found


def test_a_killed_study_ends_as_one_that_was_left_alone(begin, tmp_path):
    """SIGKILL after a random time, again and again until it is through, and anew until all kills are spent. Control:
    some of the kills did stop a training that had kept a state, and some fell after it."""
    whole = begin(tmp_path / "whole")
    assert whole.wait() == 0
    begin(tmp_path / "again").wait()  # with what is compiled already
    began = time.monotonic()
    begin(tmp_path / "timed").wait()
    lasts, wanted = time.monotonic() - began, results(tmp_path / "whole")
    assert {"audit.json", "compare.json", "features.parquet", "saes/int2/sae_weights.safetensors"} <= set(wanted)
    assert results(tmp_path / "timed").keys() == wanted.keys()
    chance, killed, kept, late, ends = random.Random(0), 0, 0, 0, 0
    while killed < KILLS:
        out = tmp_path / f"killed{ends}"
        while True:
            going = begin(out)
            try:
                going.wait(chance.uniform(0, lasts) if killed < KILLS else None)
            except subprocess.TimeoutExpired:
                going.send_signal(signal.SIGKILL)
                going.wait()
                killed += 1
                kept += any((out / "train/steps").glob("[0-9]*"))
                late += (out / "saes/fp").exists()
                continue
            assert going.returncode == 0
            break
        ends += 1
        got = results(out)
        assert got.keys() == wanted.keys()
        assert [name for name in wanted if got[name] != wanted[name]] == []
        shutil.rmtree(out)
    assert killed >= KILLS and ends >= 1 and (KILLS < 10 or (kept and late)), (killed, kept, late, ends)
