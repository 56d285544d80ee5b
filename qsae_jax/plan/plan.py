"""Stages of a study, with bytes on one device, time by the roofline, and the first thing that does not fit.

Twins that are trained on are held together, and the audit holds as many as half of the free memory has room for
(audit/run.py), as the study itself does. Weights, states and activations are those of the study's own arrays; what
lives within a program is what XLA says of the program compiled for a CPU, whose fusions are not those of a TPU. Time
is of products, memory traffic and links alone: not of loading, quantizing, compiling, tokenizing or writing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qsae_jax import arms
from qsae_jax.acts.stream import ActivationStream
from qsae_jax.acts.tokens import Windows, tokens_at_once
from qsae_jax.audit.run import MOST
from qsae_jax.compare.fidelity import AT_ONCE
from qsae_jax.devices import DEVICES, Device
from qsae_jax.errors import UserError, nearest
from qsae_jax.lm.load import abstract_lm, load_config
from qsae_jax.lm.tap import FINAL, check_point
from qsae_jax.mesh import MOST_SIMULATED, make_mesh, spread
from qsae_jax.plan.programs import Cost, Programs, bytes_of, bytes_of_twin, judged, rows, shaped, training
from qsae_jax.quant.scheme import parse_schemes
from qsae_jax.recipe import Study
from qsae_jax.sae.fit import Job

PROCESS = 0.6 * 2**30
"""Bytes of Python, the libraries and compiled programs in a process: it shares its memory with the arrays where the
device is a CPU (measured; experiments/README.md)."""


@dataclass
class Stage:
    """One stage of a study on one device."""

    name: str
    held: dict[str, float] = field(default_factory=dict)
    """Bytes that are there together, by what they are."""
    runs: dict[str, tuple[float, Cost]] = field(default_factory=dict)
    """Programs: how often each runs, and what a run takes."""

    @property
    def bytes(self) -> float:
        return sum(self.held.values())

    def seconds(self, device: Device) -> float:
        return sum(times * cost.seconds(device) for times, cost in self.runs.values())


@dataclass(frozen=True)
class Plan:
    """What a study takes."""

    device: str
    mesh: tuple[int, int]
    simulated: tuple[int, int]
    stages: list[Stage]

    @property
    def lacks(self) -> tuple[str, str, float] | None:
        """The first thing that will not fit: its stage, what it is, and the bytes that would be held with it."""
        for stage in self.stages:
            held = 0.0
            for what, size in stage.held.items():
                held += size
                if held > DEVICES[self.device].memory:
                    return stage.name, what, held
        return None

    def as_dict(self) -> dict[str, Any]:
        device = DEVICES[self.device]
        stages = [
            {"stage": stage.name, "bytes": stage.bytes, "seconds": stage.seconds(device), "held": stage.held}
            | {"programs": {name: _told(times, cost, device) for name, (times, cost) in stage.runs.items()}}
            for stage in self.stages
        ]
        lacks = self.lacks and dict(zip(("stage", "what", "bytes"), self.lacks, strict=True))
        return {"device": self.device, "mesh": list(self.mesh), "compiled_for": list(self.simulated)} | {
            "memory": device.memory, "stages": stages, "will_not_fit": lacks}  # fmt: skip


def _told(times: float, cost: Cost, device: Device) -> dict[str, Any]:
    moved = {kind: {"count": count, "bytes": size} for kind, (count, size) in cost.collectives.items()}
    return {"times": times, "operations": cost.operations, "seconds": cost.seconds(device), "collectives": moved,
            "temporary": cost.temporary}  # fmt: skip


def named_device(text: str) -> str:
    """A device of the table by its name or a word of it: `v5e`, `H100`, `AVX2`; `cpu` is the faster of the two."""
    words = {name: name.lower().replace("(", "").replace(")", "") for name in DEVICES}
    words["2 cores (AVX-512)"] += " cpu"
    found = [name for name, all_of in words.items() if text.lower() in (name.lower(), *all_of.split())]
    if len(found) != 1:
        raise UserError(f"unknown device `{text}`{nearest(text, list(DEVICES))}: choose one of {', '.join(DEVICES)}")
    return found[0]


def plan(study: Study, data: int, model: int, device: str) -> Plan:
    """The plan of a study on a mesh of `data` x `model` devices, from the model's config alone."""
    if study.dictionary:
        raise UserError("plan: the study takes a dictionary that is there; give one that trains its own")
    have = min(MOST_SIMULATED, jax.device_count())
    if model > have:
        raise UserError(f"plan: {model} devices over model are more than the {have} that are simulated: lower it")
    shorter = max(min(data, have // model), 1)
    return Plan(device, (data, model), (shorter, model), _Planning(study, data, shorter, model, device).stages())


@dataclass
class _Planning:
    study: Study
    data: int
    shorter: int
    model: int
    device: str

    def __post_init__(self) -> None:
        s = self.study
        self.mesh = make_mesh(self.shorter, self.model)
        config = load_config(s.model)
        lm = spread(abstract_lm(config)) if s.fsdp else abstract_lm(config)
        self.lm = shaped(lm, self.mesh, jnp.dtype(s.dtype))
        self.point = check_point(self.lm, s.point)
        self.cpu = "cores" in self.device
        tokens = tokens_at_once("cpu" if self.cpu else "accelerator")
        self.windows = s.batch or self.data * max(tokens // s.tokens.seq, 1)
        here = max(self.windows * self.shorter // self.data, self.shorter)
        self.programs = Programs(self.lm, self.point, self.mesh, here, s.tokens.seq, s.tokens.skip_first)

    def stages(self) -> list[Stage]:
        s = self.study
        found = [self._training("train", arms.trained(s))]
        found.append(self._audit())
        if more := arms.finetuned(s):
            found.append(self._training("finetune", more))
        if s.compared:
            found.append(self._comparison())
        return found

    def _held(self, twins: int) -> dict[str, float]:
        process = {"Python and its libraries": PROCESS} if self.cpu else {}
        return process | {"the model": bytes_of(self.lm), f"{twins} quantized twins": twins * bytes_of_twin(self.lm)}

    def _training(self, name: str, jobs: dict[str, Job]) -> Stage:
        s, programs = self.study, self.programs
        twins = dict.fromkeys(twin for job in jobs.values() for twin in job.twins)
        batch = max(s.train.batch * self.shorter // self.data, 1)
        stage = Stage(name, self._held(len([twin for twin in twins if twin != "fp"])))
        kinds: dict[int, tuple[Any, Cost]] = {}
        states, longest = 0.0, 0
        for job in jobs.values():
            width = len(job.twins)
            if width not in kinds:
                steps = max(s.train.tokens // s.train.batch, 1)
                kinds[width] = training(s.sae, programs.width, batch, steps, self.mesh, width)
            states += bytes_of(kinds[width][0])
            longest = max(longest, job.tokens or s.train.tokens)
        taken = dict.fromkeys(kinds, 0.0)
        for job in jobs.values():
            taken[len(job.twins)] += (job.tokens or s.train.tokens) // s.train.batch
        listening = programs.listening(self.point)
        block = self._block(batch)
        stage.held["dictionaries and optimizers"] = states
        stage.held["two blocks of activations"] = 2 * len(twins) * bytes_of(rows((block, programs.width), self.mesh))
        if self.cpu:
            stage.held["states on their way to the disk"] = states
        costs = [listening, *(cost for _, cost in kinds.values())]
        stage.held["within a program"] = max(cost.temporary + cost.result for cost in costs)
        counted = programs.windows * (s.tokens.seq - s.tokens.skip_first)
        passes = longest * self.shorter / self.data / counted
        stage.runs["forward passes"] = len(twins) * passes, listening
        for width, (_, cost) in kinds.items():
            stage.runs["steps" if width == 1 else f"steps on {width} twins"] = taken[width], cost
        return stage

    def _block(self, batch: int) -> int:
        s = self.study
        ids = np.broadcast_to(np.zeros((), np.int32), (4 * self.programs.windows + 64, s.tokens.seq))
        stream = ActivationStream({"fp": self.lm}, self.point, Windows(ids, "", True), self.mesh, batch=batch,
                                  skip_first=s.tokens.skip_first, forward=self.programs.windows)  # fmt: skip
        return stream.rows_per_block

    def _sae(self) -> Any:
        s = self.study
        state, _ = training(s.sae, self.programs.width, self.mesh.shape["data"], 1, self.mesh)
        return judged(s.sae, state, self.mesh)

    def _audit(self) -> Stage:
        s, programs = self.study, self.programs
        schemes = [scheme for scheme in parse_schemes(",".join(s.schemes)) if not scheme.full]
        free = DEVICES[self.device].memory - bytes_of(self.lm)
        twins = max(1, min(MOST, int(free // (2 * bytes_of(self.lm))), len(schemes)))
        passes = -(-len(schemes) // twins)
        twins = -(-len(schemes) // passes)
        sae, stage = self._sae(), Stage("audit", self._held(twins))
        listening, losses = programs.listening(self.point, FINAL), programs.losses(twins + 1)
        sums = programs.sums(sae, twins + 1)
        stage.held["the dictionary"] = bytes_of(sae)
        stage.held["activations of all runs"] = (twins + 1) * listening.result
        stage.held["sums"] = 3 * sums.result if self.cpu else sums.result  # on the host in float64
        stage.held["within a program"] = max(cost.temporary + cost.result for cost in (listening, losses, sums))
        times = passes * self._times(s.tokens.audit)
        stage.runs |= {"forward passes": (times * (twins + 1), listening), "losses": (times, losses),
                       "sums over features": (times, sums)}  # fmt: skip
        return stage

    def _times(self, tokens: int) -> float:
        """Batches of windows that hold so many tokens."""
        return max(-(-max(tokens // self.study.tokens.seq, 1) // self.windows), 1)

    def _comparison(self) -> Stage:
        """Every dictionary spliced into both models: the full-precision model judges those of all schemes."""
        s, programs = self.study, self.programs
        sae, stage = self._sae(), Stage("compare", self._held(1))
        shared = 2 + 2 * s.arms.nonsense + bool(s.arms.finetune)
        own = 1 + s.arms.again + len(arms.adaptations(s)) // max(len(s.compared), 1) + bool(s.arms.finetune)
        each = [shared + own * len(s.compared), *[shared + own] * len(s.compared)]
        listening, going = programs.listening(self.point, FINAL), programs.going_on()
        spliced, losses = programs.spliced(sae), programs.losses(1 + AT_ONCE)
        stage.held["dictionaries"] = max(each) * bytes_of(sae)
        stage.held["activations"] = listening.result + (2 + max(each)) * going.result
        stage.held["within a program"] = max(cost.temporary + cost.result for cost in (listening, going, losses))
        times = self._times(s.tokens.compare)
        # The budgets' dictionaries are encoded only, likeness and probes encode once more.
        fewer = len(s.arms.budgets) + bool(s.arms.finetune) * (1 + sum(n < s.arms.finetune for n in s.arms.budgets))
        encoded = sum(each) * (1 + s.arms.probes) + len(s.compared) * (2 + fewer * bool(s.arms.budgets))
        judgements: Sequence[int] = [n + 2 for n in each]  # zero and mean ablation
        stage.runs |= {"forward passes": (3 * times * len(each), listening), "splices": (times * encoded, spliced),
                       "passes from the point on": (times * sum(judgements), going),
                       "losses": (times * sum(-(-n // AT_ONCE) for n in judgements), losses)}  # fmt: skip
        return stage
