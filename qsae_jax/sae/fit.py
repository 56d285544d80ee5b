"""Training several dictionaries on one stream of activations: all see the same tokens in the same order.

The states are kept every minute and when the work is stopped; the same call goes on from there to the same bits.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qsae_jax.acts.stream import ActivationStream
from qsae_jax.config import LARGEST, as_tables
from qsae_jax.errors import Interrupted, UserError
from qsae_jax.files import drop, make_folder, read_json, write_json
from qsae_jax.hosts import Agreement
from qsae_jax.progress import progress, stop_signal
from qsae_jax.sae.levels import edges
from qsae_jax.sae.log import Logs, check_kinds
from qsae_jax.sae.model import SAE
from qsae_jax.sae.settings import SAEConfig
from qsae_jax.sae.train import Metrics, Step, TrainState, finished, make_step, start
from qsae_jax.store import Steps

SETTINGS = "settings.json"
KEEP_EVERY_S = 60.0
LOG_EVERY = 8
FIRST_ROWS = 8192
"""Activations from which scale and centre are found."""


@dataclass(frozen=True)
class Job:
    """One dictionary to train: on which twin's activations, from which seed, and how where that differs."""

    twin: str
    """One of the stream's twins."""
    seed: int = 0
    config: SAEConfig | None = None
    beside: tuple[str, ...] = ()
    """More twins, which a crosscoder reads side by side with the first."""
    origin: str = ""
    """The dictionary that it goes on from, by name."""
    tokens: int = 0
    """Activations after which it is done, with a schedule of its own; 0 is all of the training's."""
    shuffled: bool = False
    """Each coordinate of its batches is shuffled among the rows by itself: what is left to learn is nonsense."""

    @property
    def twins(self) -> list[str]:
        return [self.twin, *self.beside]

    def seen(self, batch: Mapping[str, Array]) -> list[Array]:
        """What it reads, of each twin."""
        return [batch[twin] for twin in self.twins]

    def aims(self, batch: Mapping[str, Array]) -> list[Array] | None:
        """What it reconstructs, where the stream has a second point."""
        keys = [f"{twin} target" for twin in self.twins]
        return [batch[key] for key in keys] if keys[0] in batch else None


def fit(
    stream: ActivationStream,
    jobs: Mapping[str, Job],
    config: SAEConfig,
    tokens: int,
    folder: Path,
    initial: Mapping[str, SAE] | None = None,
    log: Sequence[str] = (),
    after: int = 0,
) -> dict[str, SAE]:
    """Train every job on `tokens` activations; metrics go to `folder/NAME.jsonl`, and to TensorBoard and Weights &
    Biases where `log` names them. `initial` are the dictionaries that jobs go on from. The first `after` rows of the
    stream are passed over: those that such dictionaries learnt from already.

    States that an interrupted call kept in the folder are gone on from, if they were made under the same settings."""
    check_kinds(log)
    steps = {name: _steps(job, tokens, stream.batch) for name, job in jobs.items()}
    most = max(steps.values())
    settings = _settings(stream, jobs, config, tokens) | ({"after": after} if after else {})
    first = stream.first(FIRST_ROWS)
    settings |= {f"activations of {name}": float(jnp.linalg.norm(x)) for name, x in first.items()}
    states = _begin(first, stream, jobs, config, steps, initial or {})
    del first
    make_folder(folder)
    with Steps(folder / "steps") as kept:
        if kept.latest is not None:
            _same(settings, folder)
        stream.taken, stream.until = after, after + most * stream.batch
        if kept.latest is None:
            write_json(folder / SETTINGS, settings)
            _forget_logs(folder, jobs)
        else:
            states, plain = kept.load(states)
            stream.taken = int(plain["taken"])
        work = _Work(stream, jobs, {name: job.config or config for name, job in jobs.items()}, steps, kept, after)
        with closing(Logs(folder, list(jobs), stream.taken - after, log)) as logs:
            states = work.done(states, logs)
    return {name: finished(state, work.configs[name]) for name, state in states.items()}


def _steps(job: Job, tokens: int, batch: int) -> int:
    wanted = job.tokens or tokens
    if (steps := wanted // batch) < 1:
        raise UserError(f"a training on {wanted} tokens is less than one batch of {batch}: "
                        "raise it or lower train.batch")  # fmt: skip
    return steps


def forget_steps(folder: Path) -> None:
    """Drop the kept states of a finished training."""
    drop(folder / "steps", folder / SETTINGS)


def _settings(stream: ActivationStream, jobs: Mapping[str, Job], config: SAEConfig, tokens: int) -> dict[str, Any]:
    facts = {f"sae.{name}": value for name, value in as_tables(config).items()}
    facts |= {f"job {name}": as_tables(job) for name, job in jobs.items()}
    return facts | {"train.tokens": tokens} | stream.described()


def _same(settings: dict[str, Any], folder: Path) -> None:
    """Refuse to go on under other settings: the states would belong to neither."""
    before, settings = read_json(folder / SETTINGS), json.loads(json.dumps(settings))
    other = [key for key in {**before, **settings} if not _alike(key, before.get(key), settings.get(key))]
    if other:
        named = ", ".join(sorted(other))
        raise UserError(f"`{folder}` holds an unfinished training under other settings ({named}): "
                        f"repeat these settings, or delete `{folder / 'steps'}` to start anew")  # fmt: skip


def _alike(key: str, one: Any, other: Any) -> bool:
    """Norms of activations differ by rounding from mesh to mesh, and by more from model to model."""
    norms = key.startswith("activations of ") and None not in (one, other)
    return math.isclose(one, other, rel_tol=1e-3) if norms else one == other


def _forget_logs(folder: Path, jobs: Mapping[str, Job]) -> None:
    """Logs of an earlier training in this folder would be told beside this one's."""
    drop(*(path for path in folder.glob("*.jsonl") if path.stem not in jobs), folder / "tensorboard")


def _begin(
    first: Mapping[str, Array],
    stream: ActivationStream,
    jobs: Mapping[str, Job],
    config: SAEConfig,
    steps: Mapping[str, int],
    initial: Mapping[str, SAE],
) -> dict[str, TrainState]:
    if unknown := sorted({twin for job in jobs.values() for twin in job.twins} - set(first)):
        raise UserError(f"no activations of `{unknown[0]}` in the stream; it has {', '.join(first)}")
    states = {}
    for name, job in jobs.items():
        how, x = job.config or config, job.seen(first)
        latents = initial[name].latents if name in initial else max(round(x[0].shape[-1] * how.expansion), 1)
        y = job.aims(first)
        widths = [sum(part.shape[-1] for part in side) for side in (x, x if y is None else y)]
        if name in initial and [initial[name].d, initial[name].d_out] != widths:
            has = f"{initial[name].d} and {initial[name].d_out}"
            raise UserError(f"the dictionary to go on from reads and writes widths {has}, the activations have "
                            f"{widths[0]} and {widths[1]}: take the points that it was trained on")  # fmt: skip
        check_fits(how, latents, stream.batch, y is not None)
        states[name] = start(how, x, latents, steps[name], job.seed, stream.mesh, y, initial.get(name))
    return states


def check_fits(config: SAEConfig, latents: int, batch: int, transcodes: bool) -> None:
    """Refuse what could not be trained, or not be saved."""
    if latents > LARGEST or batch * latents > LARGEST * 64:
        raise UserError(f"sae.expansion {config.expansion:g} gives {latents} latents, more than are counted: lower it")
    if config.selects and config.k_most > latents:
        raise UserError(f"sae.k {config.k_most:g} is more than the {latents} latents: lower it")
    if config.sparsity in ("batchtopk", "matryoshka") and batch * latents > LARGEST:
        raise UserError(f"train.batch {batch} times {latents} latents is more than 32 bits count: lower train.batch")
    if batch % config.accumulate:
        raise UserError(f"train.batch {batch} is not divided by sae.accumulate {config.accumulate}: change one of them")
    ends = edges(config, latents)
    if any(one >= next_one for one, next_one in zip([0, *ends], ends, strict=False)):
        raise UserError(f"sae.groups of {latents} latents end at {ends}: give shares of at least one latent each")
    if config.skip and not transcodes:
        raise UserError("key `sae.skip` is for transcoders: give the stream a second point")


@dataclass
class _Work:
    """A training on its way."""

    stream: ActivationStream
    jobs: Mapping[str, Job]
    configs: Mapping[str, SAEConfig]
    steps: Mapping[str, int]
    kept: Steps
    after: int

    def __post_init__(self) -> None:
        kinds = {name: (config, self.steps[name], len(self.jobs[name].twins)) for name, config in self.configs.items()}
        made = {kind: make_step(*kind[:2], self.stream.mesh, kind[2]) for kind in set(kinds.values())}
        self.step: dict[str, Step] = {name: made[kind] for name, kind in kinds.items()}

    def done(self, states: dict[str, TrainState], logs: Logs) -> dict[str, TrainState]:
        stream, batch = self.stream, self.stream.batch
        due = Agreement()
        at, last, most, took = (stream.taken - self.after) // batch, time.monotonic(), max(self.steps.values()), 0.0
        with progress(_title(self.jobs), most * batch) as advance, stop_signal() as stopped:
            advance(at * batch)
            began = time.monotonic()
            for done in range(at + 1, most + 1):
                metrics = self._once(done, states)
                if done % LOG_EVERY == 0 or done in self.steps.values():
                    logs.take(done * batch, metrics, (done - at) * batch / (time.monotonic() - began))
                advance(batch, **logs.shown)
                # Many dictionaries take long to keep: a twentieth of the time is spent on it at most.
                halt, late = stopped(), time.monotonic() - last > max(KEEP_EVERY_S, 20 * took)
                if halt or (due.any(late) and done < most):
                    logs.flush()
                    before = time.monotonic()
                    self.kept.save(done, states, {"taken": float(stream.taken)})
                    last = time.monotonic()
                    took = last - before
                if halt:
                    raise Interrupted(f"stopped after {done} of {most} steps, which are kept: the same command goes on")
            logs.flush()
        return states

    def _once(self, done: int, states: dict[str, TrainState]) -> dict[str, Metrics]:
        """One step of every dictionary that is not done, on the same tokens."""
        batch, metrics = next(self.stream), {}
        for name, job in self.jobs.items():
            if done > self.steps[name]:
                continue
            x, y = _beside(job.seen(batch)), job.aims(batch)
            x = _shuffled(x, job.seed, done) if job.shuffled else x
            given = (x,) if y is None else (x, _beside(y))
            states[name], metrics[name] = self.step[name](states[name], *given)
        return metrics


def _beside(parts: Sequence[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


@jax.jit
def _shuffled(x: Float[Array, "b d"], seed: int, step: int) -> Float[Array, "b d"]:
    """Every column permuted by itself: each coordinate keeps its values, and no two belong together."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jnp.take_along_axis(x, jnp.argsort(jax.random.uniform(key, x.shape), axis=0), axis=0)


def _title(jobs: Mapping[str, Job]) -> str:
    return f"train {', '.join(jobs)}" if len(jobs) <= 4 else f"train {len(jobs)} dictionaries"
