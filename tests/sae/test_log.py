"""Metrics on their way to files."""

import json

import jax.numpy as jnp
import pytest

from qsae_jax.errors import UserError
from qsae_jax.sae.log import Logs
from qsae_jax.sae.train import Metrics


def metrics(fvu):
    return Metrics(jnp.float32(2), jnp.float32(fvu), jnp.float32(7), jnp.float32(0.5), {"mse": jnp.float32(3)})


def lines(folder, name="fp"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_figures_are_written_one_round_late_and_all_of_them(tmp_path):
    """After the second round the first is in the file, after a flush both, with every term of the loss."""
    logs = Logs(tmp_path, ["fp", "int4"], 0)
    logs.take(10, {"fp": metrics(0.3), "int4": metrics(0.4)}, 99)
    assert lines(tmp_path) == []
    logs.take(20, {"fp": metrics(0.2), "int4": metrics(0.25)}, 99)
    assert [line["tokens"] for line in lines(tmp_path)] == [10]
    logs.flush()
    assert [round(line["fvu"], 4) for line in lines(tmp_path, "int4")] == [0.4, 0.25]
    assert lines(tmp_path)[0].keys() == {"tokens", "loss", "fvu", "l0", "dead", "mse", "tokens_per_s"}
    assert logs.shown["fvu int4"] == pytest.approx(0.25) and logs.shown["dead"] == 0.5


def test_a_training_without_numbers_stops(tmp_path):
    """NaN names the dictionary and the remedy. Control: the other one alone goes on."""
    logs = Logs(tmp_path, ["fp", "int4"], 0)
    logs.take(10, {"fp": metrics(0.3)}, 9)
    logs.take(20, {"int4": metrics(float("nan"))}, 9)
    with pytest.raises(UserError, match=r"training of int4 diverged: delete .* lower sae\.lr"):
        logs.flush()


def test_tensorboard_has_the_scalars(tmp_path):
    """Event files of each dictionary, read back record by record (length, crc, bytes, crc): tag, tokens and value."""
    from tensorboardX.proto.event_pb2 import Event

    logs = Logs(tmp_path, ["fp"], 0, ["tensorboard"])
    logs.take(10, {"fp": metrics(0.25)}, 9)
    logs.flush()
    logs.close()
    (file,) = (tmp_path / "tensorboard" / "fp").glob("events*")
    data, at, found = file.read_bytes(), 0, {}
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        at += 16 + size
    assert found["fvu"] == (10, 0.25) and found["mse"] == (10, 3.0)


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    """wandb in place of what is there: one line with the remedy; an unknown one with the nearest."""
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Logs(tmp_path, ["fp"], 0, ["wandb"])
    with pytest.raises(UserError, match="nearest: wandb"):
        Logs(tmp_path, ["fp"], 0, ["wandbb"])
