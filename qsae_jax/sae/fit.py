"""Training several dictionaries on one stream of activations: twins and seeds see the same tokens in the same order.

The states are kept every minute and when the work is stopped; the same call goes on from there to the same bits.
"""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qsae_jax.acts.stream import ActivationStream
from qsae_jax.config import as_tables
from qsae_jax.errors import Interrupted, UserError
from qsae_jax.files import make_folder, read_json, write_json
from qsae_jax.progress import progress, stop_signal
from qsae_jax.sae.model import SAE
from qsae_jax.sae.train import Metrics, SAEConfig, TrainState, finished, make_step, start
from qsae_jax.store import Steps

SETTINGS = "settings.json"
KEEP_EVERY_S = 60.0
LOG_EVERY = 8
FIRST_ROWS = 8192
"""Activations from which scale and centre are found."""


@dataclass(frozen=True)
class Job:
    """One dictionary to train: on which twin's activations, from which seed."""

    twin: str
    seed: int = 0


def fit(
    stream: ActivationStream, jobs: Mapping[str, Job], config: SAEConfig, tokens: int, folder: Path
) -> dict[str, SAE]:
    """Train every job on `tokens` activations; metrics go to `folder/NAME.jsonl`.

    States that an interrupted call kept in the folder are gone on from, if they were made under the same settings."""
    steps = tokens // stream.batch
    if steps < 1:
        raise UserError(
            f"train.tokens {tokens} is less than one batch of {stream.batch}: raise it or lower train.batch"
        )
    settings = _settings(stream, jobs, config, tokens)
    make_folder(folder)
    with Steps(folder / "steps") as kept:
        first = stream.first(FIRST_ROWS)
        settings |= {f"activations of {name}": f"{float(jnp.linalg.norm(x)):.3g}" for name, x in first.items()}
        if kept.latest is not None:
            _same(settings, folder)
        states, stream.taken = _begin(first, stream, jobs, config, steps), 0
        if kept.latest is None:
            write_json(folder / SETTINGS, settings)
            _forget_logs(folder, jobs)
        else:
            states, plain = kept.load(states)
            stream.taken = int(plain["taken"])
        states = _run(stream, jobs, config, steps, states, kept, folder)
    return {name: finished(state) for name, state in states.items()}


def forget_steps(folder: Path) -> None:
    """Drop the kept states of a finished training."""
    shutil.rmtree(folder / "steps", ignore_errors=True)
    (folder / SETTINGS).unlink(missing_ok=True)


def _settings(stream: ActivationStream, jobs: Mapping[str, Job], config: SAEConfig, tokens: int) -> dict[str, Any]:
    facts = {f"sae.{name}": value for name, value in as_tables(config).items()}
    facts |= {f"job {name}": as_tables(job) for name, job in jobs.items()}
    return facts | {"train.tokens": tokens} | stream.described()


def _same(settings: dict[str, Any], folder: Path) -> None:
    """Refuse to go on under other settings: the states would belong to neither."""
    before = read_json(folder / SETTINGS)
    other = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
    if other:
        named = ", ".join(sorted(other))
        raise UserError(
            f"`{folder}` holds an unfinished training under other settings ({named}): "
            f"repeat these settings, or delete `{folder / 'steps'}` to start anew"
        )


def _forget_logs(folder: Path, jobs: Mapping[str, Job]) -> None:
    """Logs of an earlier training in this folder would be told beside this one's."""
    for path in folder.glob("*.jsonl"):
        if path.stem not in jobs:
            path.unlink()


def _begin(
    first: Mapping[str, Array], stream: ActivationStream, jobs: Mapping[str, Job], config: SAEConfig, steps: int
) -> dict[str, TrainState]:
    if unknown := sorted({job.twin for job in jobs.values()} - set(first)):
        raise UserError(f"no activations of `{unknown[0]}` in the stream; it has {', '.join(first)}")
    width = next(iter(first.values())).shape[-1]
    latents = width * config.expansion
    if config.sparsity == "topk" and config.k > latents:
        raise UserError(f"sae.k {config.k} is more than the {latents} latents: lower it")
    return {name: start(config, first[job.twin], latents, steps, job.seed, stream.mesh) for name, job in jobs.items()}


def _run(
    stream: ActivationStream,
    jobs: Mapping[str, Job],
    config: SAEConfig,
    steps: int,
    states: dict[str, TrainState],
    kept: Steps,
    folder: Path,
) -> dict[str, TrainState]:
    step = make_step(config, steps, stream.mesh)
    done, last = stream.taken // stream.batch, time.monotonic()
    logs = {name: Log(folder / f"{name}.jsonl", done * stream.batch) for name in jobs}
    with progress(f"train {', '.join(jobs)}", steps * stream.batch) as advance, stop_signal() as stopped:
        advance(done * stream.batch)
        began, at = time.monotonic(), done
        while done < steps:
            batch = next(stream)
            metrics = {}
            for name, job in jobs.items():
                states[name], metrics[name] = step(states[name], batch[job.twin])
            done += 1
            figures = {}
            if done % LOG_EVERY == 0 or done == steps:
                speed = (done - at) * stream.batch / (time.monotonic() - began)
                written = {name: logs[name].write(done * stream.batch, got, speed) for name, got in metrics.items()}
                _finite(written)
                figures = _shown(written) | {"tokens/s": speed}
            advance(stream.batch, **figures)
            if stopped() or (time.monotonic() - last > KEEP_EVERY_S and done < steps):
                kept.save(done, states, {"taken": float(stream.taken)})
                last = time.monotonic()
            if stopped():
                raise Interrupted(f"stopped after {done} of {steps} steps, which are kept: the same command goes on")
    return states


def _finite(written: Mapping[str, dict[str, float]]) -> None:
    """Refuse to go on with a dictionary that has no numbers left."""
    for name, one in written.items():
        if not np.isfinite(one["fvu"]):
            raise UserError(f"the training of {name} diverged: lower sae.lr")


def _shown(written: Mapping[str, dict[str, float]]) -> dict[str, float]:
    """What a bar says of all jobs: each one's FVU, and the means of L0 and of the share of dead latents."""
    means = {key: sum(one[key] for one in written.values()) / len(written) for key in ("l0", "dead")}
    return {f"fvu {name}": one["fvu"] for name, one in written.items()} | means


class Log:
    """Metrics of one dictionary as JSON lines; what lies after the point of resumption is dropped."""

    def __init__(self, path: Path, tokens: int):
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["tokens"] <= tokens]
        path.write_text("".join(line + "\n" for line in kept))
        self.path = path

    def write(self, tokens: int, metrics: Metrics, speed: float) -> dict[str, float]:
        got = jax.device_get(metrics)
        figures = {"fvu": float(got.fvu), "l0": float(got.l0), "dead": float(got.dead)}
        line = {"tokens": tokens, "loss": float(got.loss), **figures, "tokens_per_s": round(speed, 1)}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return figures
