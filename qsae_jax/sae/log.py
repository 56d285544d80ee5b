"""Metrics of a training: JSON lines always, TensorBoard and Weights & Biases where they are asked for.

Figures are fetched one round late: by then the device has long made them, and no step waits for the host.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qsae_jax.errors import UserError, nearest
from qsae_jax.hosts import first, here
from qsae_jax.sae.train import Metrics

KINDS = ("tensorboard", "wandb")
MANY = 4
"""Dictionaries whose FVU a bar has room for."""


class Writer(Protocol):
    """Takes the figures of one dictionary after so many tokens."""

    def write(self, tokens: int, figures: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One file; what lies after the point of resumption is dropped."""

    def __init__(self, path: Path, tokens: int):
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["tokens"] <= tokens]
        path.write_text("".join(line + "\n" for line in kept))
        self._path = path

    def write(self, tokens: int, figures: Mapping[str, float]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"tokens": tokens, **figures}) + "\n")

    def close(self) -> None:
        pass


class TensorBoard:
    """Event files in `FOLDER/tensorboard/NAME`; those after the point of resumption are purged by their readers."""

    def __init__(self, folder: Path, name: str, tokens: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError("train.log names tensorboard: pip install tensorboardX, or leave it out") from None
        self._to = SummaryWriter(str(folder / "tensorboard" / name), purge_step=tokens + 1 if tokens else None)

    def write(self, tokens: int, figures: Mapping[str, float]) -> None:
        for key, value in figures.items():
            self._to.add_scalar(key, value, tokens)

    def close(self) -> None:
        self._to.close()


class WeightsAndBiases:
    """A run for each dictionary, taken up again under the same id."""

    def __init__(self, folder: Path, name: str, tokens: int):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError("train.log names wandb: pip install wandb, or leave it out") from None
        file = folder / f".wandb-{name}"
        known = file.read_text() if tokens and file.is_file() else None
        self._run: Any = wandb.init(
            project="qsae_jax", name=name, dir=str(folder), id=known, resume="allow", reinit="create_new"
        )
        file.write_text(self._run.id)

    def write(self, tokens: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=tokens)

    def close(self) -> None:
        self._run.finish()


def check_kinds(kinds: Sequence[str]) -> None:
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"train.log `{kind}` is unknown{nearest(kind, KINDS)}; possible: {', '.join(KINDS)}")


class Logs:
    """The writers of all dictionaries of one training."""

    def __init__(self, folder: Path, names: Sequence[str], tokens: int, kinds: Sequence[str] = ()):
        check_kinds(kinds)
        self._folder = folder
        more = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
        self._writers: dict[str, list[Writer]] = {
            name: [JsonLines(folder / f"{name}.jsonl", tokens), *(more[kind](folder, name, tokens) for kind in kinds)]
            for name in (names if first() else ())
        }
        self._waiting: tuple[int, dict[str, Metrics], float] | None = None
        self.shown: dict[str, float] = {}
        """What a bar says: each dictionary's FVU, and the means of L0 and of the share of dead latents."""

    def take(self, tokens: int, metrics: dict[str, Metrics], speed: float) -> None:
        """Note figures, and write those noted before."""
        self.flush()
        self._waiting = (tokens, metrics, speed)

    def flush(self) -> None:
        if self._waiting is None:
            return
        (tokens, metrics, speed), self._waiting = self._waiting, None
        got = {name: _plain(one) for name, one in here(metrics).items()}
        for name, figures in got.items():
            if not np.isfinite(figures["fvu"]):
                raise UserError(f"the training of {name} diverged: delete `{self._folder}` and lower sae.lr")
            for writer in self._writers.get(name, ()):
                writer.write(tokens, figures | {"tokens_per_s": round(speed, 1)})
        means = {key: sum(one[key] for one in got.values()) / len(got) for key in ("l0", "dead")}
        each = {f"fvu {name}": one["fvu"] for name, one in got.items()} if len(got) <= MANY else {}
        self.shown = each | means | {"tokens/s": speed}

    def close(self) -> None:
        for writers in self._writers.values():
            for writer in writers:
                writer.close()


def _plain(metrics: Metrics) -> dict[str, float]:
    figures = {"loss": metrics.loss, "fvu": metrics.fvu, "l0": metrics.l0, "dead": metrics.dead, **metrics.parts}
    return {name: float(value) for name, value in figures.items()}
