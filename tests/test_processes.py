"""Two processes with four devices each are one mesh of eight: the same study, the same numbers."""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from qsae_jax import hosts
from qsae_jax.errors import UserError
from qsae_jax.files import read_features

STUDY = """
model = "{folder}/model"
point = "blocks.1.resid_post"
schemes = ["int8", "int2"]
errors_at = ["blocks.2.resid_post"]
compare = "int2"
mesh = "2x4"
[tokens]
source = "text:{folder}/text.txt"
seq = 16
audit = 320
compare = 320
[sae]
sparsity = "batchtopk"
k = 4
expansion = 2
[train]
tokens = 1280
batch = 32
[arms]
adapt = 320
finetune = 320
[contexts]
features = 3
[act]
features = 2
"""
RUN = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
from qsae_jax.cli import main
sys.exit(main(sys.argv[2:]))
"""
pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def study(tiny_folder, tmp_path_factory):
    """`study(out, count)`: the study run by so many processes; what each of them said."""
    folder = tmp_path_factory.mktemp("processes")
    shutil.copytree(tiny_folder, folder / "model")
    words = [f"Word {i * 3719 % 10007} of {i + 1000}, {'abcdefgh'[i % 8] * (i % 5 + 1)}" for i in range(400)]
    (folder / "text.txt").write_text("\n".join(words))
    known = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    known |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "JAX_PLATFORMS": "cpu"}

    def go(out, count):
        (folder / "s.toml").write_text(STUDY.format(folder=folder))
        port, going = free_port(), []
        for number in range(count):
            argv = [sys.executable, "-c", RUN, str(8 // count), "run", str(folder / "s.toml"), "--out", str(out)]
            argv += ["--processes", f"localhost:{port},{count},{number}"] if count > 1 else []
            going.append(subprocess.Popen(argv, env=os.environ | known, text=True, stdout=-1, stderr=-1))
        said = [one.communicate(timeout=600) for one in going]
        assert [one.returncode for one in going] == [0] * count, said
        return said

    return go


def test_two_processes_give_the_numbers_of_one(study, tmp_path):
    """Dictionaries, and what the audit says of rounding, to rounding; the second process is silent and leaves no
    file of its own."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    study(alone, 1)
    said = study(both, 2)
    spoken = [
        [line for line in out.splitlines() if line.startswith(("report:", "note:", "tokens:"))] for out, _ in said
    ]
    assert len(spoken[0]) == 1 and spoken[1] == [] and "train fp" in said[0][1] and "train fp" not in said[1][1]
    names = [{str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} for out in (alone, both)]
    assert names[0] == names[1]
    for name in ("fp", "int2", "fp-seed1"):
        one, other = (load_file(out / f"saes/{name}/sae_weights.safetensors") for out in (alone, both))
        for key in one:
            np.testing.assert_allclose(one[key], other[key], rtol=1e-4, atol=1e-5, err_msg=f"{name} {key}")
    one, other = (json.loads((out / "audit.json").read_text()) for out in (alone, both))
    for key in ("ppl", "kl", "mean_r", "fvu", "activation_rel_mse"):
        mine, theirs = ([row[key] for row in facts["rows"]] for facts in (one, other))
        np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=2e-4, err_msg=key)
    tables = [read_features(out / "features.parquet")["int2"]["r"] for out in (alone, both)]
    np.testing.assert_allclose(*tables, atol=1e-4)
    assert not np.allclose(np.roll(tables[0], 1), tables[1], atol=1e-4)


@pytest.mark.parametrize("given", ["localhost,2,0", "localhost:1,2,2", "localhost:1,2", "2"])
def test_processes_that_cannot_be_are_refused(given):
    with pytest.raises(UserError, match="ADDRESS:PORT,COUNT,NUMBER with NUMBER below COUNT"):
        hosts.begin(given)


def test_a_launcher_is_known_by_its_environment():
    assert hosts.launched({"SLURM_STEP_NUM_TASKS": "4"}) and hosts.launched({"TPU_WORKER_HOSTNAMES": "a,b"})
    assert hosts.launched({"MEGASCALE_NUM_SLICES": "2"})
    for alone in ({}, {"SLURM_NTASKS": "4"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"TPU_WORKER_HOSTNAMES": "localhost"}):
        assert not hosts.launched(alone)
