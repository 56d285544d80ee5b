"""A study: tokens, dictionaries, audit, comparison and report, in order, each stage reused when it is already done.

A stage is done when its files are there and were made under the same settings: `run.json` keeps, for each stage, a
key of everything that the stage depends on.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from qsae_jax.acts.stream import ActivationStream
from qsae_jax.acts.tokens import Windows, load_windows
from qsae_jax.audit.run import audit
from qsae_jax.compare.transfer import compare
from qsae_jax.config import as_tables, build, check_at_least, read_toml, with_settings
from qsae_jax.errors import UserError
from qsae_jax.files import make_folder, read_json, staged_file, write_json
from qsae_jax.lm.load import load_lm, stored_as
from qsae_jax.lm.model import LM
from qsae_jax.lm.sources import SMOLLM2
from qsae_jax.lm.tap import check_point
from qsae_jax.lm.tokenizer import load_tokenizer
from qsae_jax.mesh import parse_mesh
from qsae_jax.quant.fake import fake_quantize
from qsae_jax.quant.scheme import parse_scheme, parse_schemes
from qsae_jax.report import write_report
from qsae_jax.sae.fit import Job, fit, forget_steps
from qsae_jax.sae.formats import load_sae, save_sae
from qsae_jax.sae.model import SAE
from qsae_jax.sae.train import SAEConfig

LIBRARIES = ("qsae-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "gguf", "tokenizers")


@dataclass(frozen=True)
class TokensConfig:
    """Where tokens come from. The first windows are held out for audit and comparison, training takes the others."""

    source: str = "stdlib-docs"
    seq: int = 256
    bos: str = "auto"
    skip_first: int = 1
    audit: int = 8192
    """Tokens of the audit."""
    compare: int = 4096
    """Tokens of the comparison: the first of the audit's."""

    def __post_init__(self) -> None:
        check_at_least(self, "tokens.", seq=2, skip_first=0, audit=1, compare=1)


@dataclass(frozen=True)
class TrainConfig:
    """How much the dictionaries learn from."""

    tokens: int = 131_072
    batch: int = 512
    """Activations in a step."""
    seed: int = 0
    reseed: int = 1
    """The seed of the dictionary that is the floor for every difference."""
    shuffle: int = 0
    """The seed of the order of tokens, the same for all dictionaries."""

    def __post_init__(self) -> None:
        check_at_least(self, "train.", tokens=1, batch=1, seed=0, reseed=0, shuffle=0)
        if self.seed == self.reseed:
            raise UserError(f"key `train.reseed` is {self.reseed}, as train.seed: a floor needs another seed")


@dataclass(frozen=True)
class Study:
    """Everything that decides the numbers of a run."""

    model: str
    point: str
    schemes: tuple[str, ...]
    """Schemes of the audit."""
    compare: str
    """The scheme whose model a dictionary is retrained on."""
    tokens: TokensConfig = field(default_factory=TokensConfig)
    sae: SAEConfig = field(default_factory=SAEConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    batch: int = 0
    """Windows in a forward pass; 0 chooses by the device."""
    mesh: str = "1x1"
    """Devices over data x over model, or `auto`."""


# Sized for 8 minutes on two slow cores: a matrix product at 110 GFLOP/s, of which most of the time is made.
DEMO = Study(
    model=SMOLLM2,
    point="blocks.8.resid_post",
    schemes=("int8", "int7", "int6", "int5", "int4", "noise@int4"),
    compare="int4",
    sae=SAEConfig(sparsity="topk", k=32, expansion=8, lr=1.5e-3),
    tokens=TokensConfig(audit=4096, compare=2048),
    train=TrainConfig(tokens=73_728),
)


def read_study(path: Path, settings: Sequence[str] = ()) -> Study:
    """A study from a TOML file, with `key=value` settings laid over it."""
    return build(Study, with_settings(read_toml(path), settings))


def run_study(study: Study, out: str | Path, command: str = "") -> Path:
    """Run what is not done yet of a study into a folder; gives the path of its report."""
    return Stages(study, make_folder(Path(out)), command).all()


def notes_on(model: str) -> list[str]:
    """What every page that shows this model's numbers has to say."""
    kind = stored_as(model)
    return [f"fp means the weights as shipped ({kind}), not the original floating point."] if kind else []


def origin(model: str, point: str, windows: Windows, skip_first: int, tokens: str) -> dict[str, Any]:
    """What SAELens records of a dictionary's origin, under its names."""
    hook = ".".join(
        f"hook_{part}" if i in (2, 3) and part not in ("attn", "mlp") else part
        for i, part in enumerate(point.split("."))
    )
    facts = {"model_name": model, "hook_name": hook, "context_size": windows.seq, "dataset_path": tokens}
    return facts | {"prepend_bos": windows.bos, "seqpos_slice": [skip_first], "model_class_name": "qsae_jax.LM"}


@dataclass
class Stages:
    """A study on its way through its folder."""

    study: Study
    out: Path
    command: str

    def __post_init__(self) -> None:
        s = self.study
        parse_schemes(",".join(s.schemes))
        self.mesh = parse_mesh(s.mesh)
        self.scheme = str(parse_scheme(s.compare))
        if self.scheme == "fp":
            raise UserError("key `compare` is `fp`: name the scheme to compare full precision with, for example int4")
        self.jobs = {"fp": Job("fp", s.train.seed), self.scheme: Job(self.scheme, s.train.seed)}
        self.jobs |= {f"fp-seed{s.train.reseed}": Job("fp", s.train.reseed)}
        self.record = self._record()

    @cached_property
    def lm(self) -> LM:
        lm = load_lm(self.study.model, mesh=self.mesh)
        check_point(lm, self.study.point)
        return lm

    @cached_property
    def windows(self) -> Windows:
        facts = read_json(self.out / "tokens.json")
        return Windows(np.load(self.out / "tokens.npy", mmap_mode="r"), facts["source"], facts["bos"])

    @property
    def facts(self) -> dict[str, Any]:
        return {"model": self.study.model, "notes": notes_on(self.study.model)}

    def all(self) -> Path:
        s, t = self.study, self.study.tokens
        tokens = [s.model, t.source, t.seq, t.bos]
        training = [*tokens, s.point, as_tables(s.sae), as_tables(s.train), self.scheme, t.skip_first, t.audit, s.mesh]
        self._stage("tokens", tokens, ["tokens.npy", "tokens.json"], self._tokens)
        self._stage("train", training, [f"saes/{name}/cfg.json" for name in self.jobs], self._train)
        self._stage("audit", [*training, s.schemes], ["audit.json", "features.parquet"], self._audit)
        self._stage("compare", [*training, t.compare], ["compare.json"], self._compare)
        return write_report(self.out)

    def _record(self) -> dict[str, Any]:
        file = self.out / "run.json"
        before = read_json(file) if file.is_file() else {}
        versions = {name: version(name) for name in LIBRARIES}
        record = {"command": self.command, "versions": versions, "settings": as_tables(self.study)}
        return record | {"stages": before.get("stages", []), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}

    def _stage(self, name: str, depends: list[Any], files: list[str], work: Callable[[], None]) -> None:
        key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
        done = {stage["name"]: stage for stage in self.record["stages"]}
        if done.get(name, {}).get("key") == key and all((self.out / file).is_file() for file in files):
            print(f"{name}: already done, reused")
            return
        began = time.monotonic()
        work()
        done[name] = {"name": name, "seconds": round(time.monotonic() - began, 1), "key": key}
        self.record["stages"] = list(done.values())
        write_json(self.out / "run.json", self.record)

    def _tokens(self) -> None:
        t = self.study.tokens
        tokenizer = None if t.source.startswith("npy:") else load_tokenizer(self.study.model)
        windows = load_windows(t.source, tokenizer, t.seq, t.bos, self.lm.config.vocab)
        with staged_file(self.out / "tokens.npy") as draft, draft.open("wb") as file:
            np.save(file, windows.ids)
        write_json(self.out / "tokens.json", {"source": windows.source, "bos": windows.bos})
        self.__dict__.pop("windows", None)

    def _held_out(self, tokens: int) -> Windows:
        return self.windows.part(0, max(tokens // self.windows.seq, 1))

    def _train(self) -> None:
        s, held = self.study, len(self._held_out(self.study.tokens.audit))
        if len(self.windows) <= held:
            raise UserError(
                f"tokens: {len(self.windows)} windows, {held} of them held out: nothing is left to train on"
            )
        twins = {"fp": self.lm, self.scheme: fake_quantize(self.lm, self.scheme)}
        stream = ActivationStream(
            twins,
            check_point(self.lm, s.point),
            self.windows.part(held, len(self.windows)),
            self.mesh,
            batch=s.train.batch,
            seed=s.train.shuffle,
            skip_first=s.tokens.skip_first,
            forward=s.batch,
        )
        saes = fit(stream, self.jobs, s.sae, s.train.tokens, self.out / "train")
        for name, sae in saes.items():
            save_sae(sae, self.out / "saes" / name, self._metadata(name))
        forget_steps(self.out / "train")

    def _metadata(self, name: str) -> dict[str, Any]:
        s, job = self.study, self.jobs[name]
        facts = origin(s.model, s.point, self.windows, s.tokens.skip_first, s.tokens.source)
        return facts | {"quantization": job.twin, "seed": job.seed, "training_tokens": s.train.tokens}

    def _sae(self, name: str) -> SAE:
        return load_sae(self.out / "saes" / name, self.mesh)

    def _audit(self) -> None:
        s = self.study
        facts = self.facts | {"sae": "saes/fp"}
        windows = self._held_out(s.tokens.audit)
        judged = audit(self.lm, self._sae("fp"), windows, s.schemes, s.point, skip_first=s.tokens.skip_first,
                       batch=s.batch, mesh=self.mesh, facts=facts)  # fmt: skip
        judged.write(self.out)

    def _compare(self) -> None:
        s = self.study
        windows = self._held_out(min(s.tokens.compare, s.tokens.audit))
        judged = compare(self.lm, self.scheme, self._sae("fp"), self._sae(self.scheme), windows, s.point,
                         reseeded=self._sae(f"fp-seed{s.train.reseed}"), skip_first=s.tokens.skip_first,
                         batch=s.batch, mesh=self.mesh, facts=self.facts)  # fmt: skip
        judged.write(self.out)
