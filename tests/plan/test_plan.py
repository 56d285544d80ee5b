"""A plan beside the arrays that a study really holds, and what it says of meshes that are not here."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.acts.stream import ActivationStream
from qsae_jax.acts.tokens import Windows
from qsae_jax.cli import main
from qsae_jax.devices import DEVICES, Device
from qsae_jax.errors import UserError
from qsae_jax.lm.load import abstract_lm, load_lm
from qsae_jax.lm.tap import Point
from qsae_jax.mesh import make_mesh, mesh_shape
from qsae_jax.plan import named_device, plan, written
from qsae_jax.plan.programs import Cost, bytes_of, bytes_of_twin, shaped, training
from qsae_jax.quant.fake import fake_quantize
from qsae_jax.recipe import ArmsConfig, Study, TokensConfig, TrainTwiceConfig
from qsae_jax.sae.settings import SAEConfig
from qsae_jax.sae.train import start

SMALL = SAEConfig(k=4, expansion=2)
MESHES = [(1, 1), (2, 4)]


@pytest.fixture(scope="module")
def study(tiny_folder):
    return Study(
        str(tiny_folder), "blocks.1.resid_post", ("int8", "fp", "int4"), "int4", sae=SMALL,
        tokens=TokensConfig(seq=16, audit=640, compare=320), train=TrainTwiceConfig(tokens=3200, batch=32),
        arms=ArmsConfig(finetune=320, budgets=(160,), nonsense=True),
    )  # fmt: skip


def on_one(tree):
    """Bytes of real arrays on the first device."""
    first = jax.devices()[0]
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return sum(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards if s.device == first)


@pytest.mark.parametrize("data, model", MESHES)
def test_bytes_are_those_of_the_arrays(tiny_folder, data, model):
    """Of the model as loaded, of a twin's own weights and of a training's state, on one device. Control: the other
    mesh's."""
    mesh = make_mesh(data, model)
    lm = load_lm(str(tiny_folder), mesh=mesh)
    assert bytes_of(shaped(abstract_lm(lm.config), mesh)) == on_one(lm)
    twin = fake_quantize(lm, "int4")
    own = [b for a, b in zip(jax.tree.leaves(lm), jax.tree.leaves(twin), strict=True) if a is not b]
    assert bytes_of_twin(shaped(abstract_lm(lm.config), mesh)) == on_one(own)
    shape, _ = training(SMALL, 16, 32, 10, mesh)
    real = start(SMALL, [jnp.ones((64, 16)) + jnp.arange(64.0)[:, None]], 32, 10, 0, mesh)
    assert bytes_of(shape) == on_one(real)
    other, _ = training(SMALL, 16, 32, 10, make_mesh(*MESHES[data == 1]))
    assert bytes_of(other) != bytes_of(shape)


def test_the_stages_hold_what_the_study_holds(study, tiny_lm):
    """Stages in order; the states of all jobs; two blocks of the stream's rows for both twins; steps as they are."""
    found = plan(study, 1, 1, "H200")
    stages = {stage.name: stage for stage in found.stages}
    assert list(stages) == ["train", "audit", "finetune", "compare"] and found.lacks is None
    one, _ = training(SMALL, 16, 32, 10, make_mesh(1, 1))
    # fp, fp of another seed, shuffled; int4 and its budget.
    assert stages["train"].held["dictionaries and optimizers"] == 5 * bytes_of(one)
    steps, _ = stages["train"].runs["steps"]
    assert steps == 4 * 100 + 5
    windows = Windows(np.zeros((900, 16), np.int32), "", False)
    stream = ActivationStream({"fp": tiny_lm}, Point(1, "resid_post"), windows, make_mesh(1, 1), 32, forward=1024)
    assert stages["train"].held["two blocks of activations"] == 2 * 2 * stream.rows_per_block * 16 * 4
    passes, _ = stages["audit"].runs["forward passes"]
    assert passes == 3, "full precision and two twins, one batch"
    assert written(found).count("GiB a device") == 4 and written(found).endswith("it fits")
    assert json.loads(json.dumps(found.as_dict()))["will_not_fit"] is None


def test_what_will_not_fit_is_named(study, monkeypatch):
    """A device of 1 MB: the first thing beyond it, with its stage. Control: of 1 GB, nothing."""
    for memory, lacks in ((1e6, True), (1e9, False)):
        monkeypatch.setitem(DEVICES, "H200", Device(1e12, 1e12, memory, 1e9, 1e9, 1.0))
        found = plan(study, 1, 1, "H200")
        assert (found.lacks is not None) == lacks == ("WILL NOT FIT: train holds" in written(found))
        if found.lacks:
            stage, what, held = found.lacks
            sizes = list(found.stages[0].held.values())
            at = list(found.stages[0].held).index(what)
            assert stage == "train" and sum(sizes[:at]) <= memory < held == sum(sizes[: at + 1])


def test_a_large_mesh_is_compiled_as_a_smaller_one(study):
    """The same share on each device: a step on 1024x2 has the operations of one on 4x2 with a batch of 256th."""
    large = plan(
        replace(study, arms=ArmsConfig(), train=TrainTwiceConfig(tokens=32_768_000, batch=32_768)), 1024, 2, "TPU v5e"
    )
    small = plan(replace(study, arms=ArmsConfig(), train=TrainTwiceConfig(tokens=128_000, batch=128)), 4, 2, "TPU v5e")
    assert large.simulated == (4, 2) and large.mesh == (1024, 2)
    steps = [one.stages[0].runs["steps"][1] for one in (large, small)]
    assert steps[0].operations == steps[1].operations and steps[0].collectives
    assert "compiled for 4x2" in written(large) and "compiled for" not in written(small)


def test_the_roofline():
    """2e12 operations of float32 and 1e12 of bfloat16 at half of 4e12 and 8e12; memory; links and their latency."""
    device = Device(8e12, 4e12, 1.0, 1e9, 1e8, 0.5)
    busy = Cost({"float32": 2e12, "bfloat16": 1e12}, 1e8, 0, 0, 3e7, {"all-reduce": (4, 1.5e7)})
    assert busy.seconds(device) == pytest.approx(1.0 + 0.25 + 0.3 + 4 * 5e-6)
    assert replace(busy, read=5e9).seconds(device) == pytest.approx(5.0 + 0.3 + 4 * 5e-6)


NAMES = {"v5e": "TPU v5e", "H100": "H100 SXM", "h200": "H200", "cpu": "2 cores (AVX-512)", "avx2": "2 cores (AVX2)"}


@pytest.mark.parametrize("text, name", NAMES.items())
def test_devices_by_a_word(text, name):
    assert named_device(text) == name == named_device(name)


def test_what_cannot_be_planned_is_one_line(study, tmp_path, capsys):
    for wrong in ("tpu", "v7", ""):
        with pytest.raises(UserError, match="choose one of"):
            named_device(wrong)
    for wrong in ("4", "0x1", "axb"):
        with pytest.raises(UserError, match=f"mesh `{wrong}`"):
            mesh_shape(wrong)
    with pytest.raises(UserError, match="takes a dictionary that is there"):
        plan(replace(study, compare="", arms=ArmsConfig(), dictionary="somewhere"), 1, 1, "H200")
    assert main(["plan", str(tmp_path / "no.toml"), "--device", "v5e"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command(study, tmp_path, capsys):
    """Text, and the same as JSON."""
    (tmp_path / "s.toml").write_text(
        f'model = "{study.model}"\npoint = "{study.point}"\nschemes = ["int8"]\n[tokens]\nseq = 16\n[sae]\nk = 4\n'
    )
    argv = ["plan", str(tmp_path / "s.toml"), "--mesh", "2x2", "--device", "v6e", "--set", "sae.expansion=2"]
    assert main(argv) == 0
    assert "study on 2x2 of TPU v6e, 32 GiB each" in capsys.readouterr().out
    assert main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["mesh"] == [2, 2] and [stage["stage"] for stage in told["stages"]] == ["train", "audit"]
    assert told["stages"][0]["programs"]["steps"]["collectives"]
