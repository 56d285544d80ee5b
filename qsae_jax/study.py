"""A study: tokens, dictionaries, audit, comparison and report, in order, each stage reused when it is already done.

A stage is done when its files are there and were made under the same settings: `run.json` keeps, for each stage, a
key of everything that the stage depends on. The mesh is not among it: on another one the numbers are the same to
rounding, and what was begun on one goes on on another.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from qsae_jax import arms, questions
from qsae_jax.acts.tokens import Windows, load_windows
from qsae_jax.audit.kept import Kept
from qsae_jax.audit.run import audits
from qsae_jax.config import as_tables, expanded
from qsae_jax.errors import UserError
from qsae_jax.files import drop, make_folder, read_json, staged_file, write_json
from qsae_jax.lm.load import abstract_lm, load_config, load_lm
from qsae_jax.lm.model import LM
from qsae_jax.lm.tap import check_point
from qsae_jax.lm.tokenizer import load_tokenizer
from qsae_jax.mesh import parse_mesh
from qsae_jax.progress import progress
from qsae_jax.quant.fake import departures
from qsae_jax.quant.scheme import parse_scheme, parse_schemes
from qsae_jax.recipe import Study
from qsae_jax.record import described, differences, notes_on, stamp, stamp_tokens
from qsae_jax.report import write_report
from qsae_jax.sae.fit import Job
from qsae_jax.sae.formats import FILES, Stored, load_stored
from qsae_jax.sae.formats.sources import find


@dataclass
class Stages:
    """A study on its way through its folder."""

    study: Study
    out: Path
    command: str

    def __post_init__(self) -> None:
        s = self.study
        self.schemes = parse_schemes(",".join(s.schemes))
        if all(scheme.full for scheme in self.schemes):
            raise UserError("key `schemes` names only `fp`, which is the reference: add one to audit, for example int4")
        self.mesh = parse_mesh(s.mesh)
        self.jobs = arms.trained(s)
        self.finetuned = arms.finetuned(s)
        self.errors_at = [name for one in s.errors_at for name in expanded(one)]
        self.record = self._record()

    @cached_property
    def lm(self) -> LM:
        s = self.study
        lm = load_lm(s.model, s.dtype, self.mesh, s.processing, s.fsdp)
        for point in (s.point, *s.at, *self.errors_at):
            check_point(lm, point)
        for scheme in (*self.schemes, *map(parse_scheme, s.compared)):
            departures(lm, scheme)  # Refuses what the model has no weights for, before anything is trained.
        return lm

    @cached_property
    def windows(self) -> Windows:
        facts = read_json(self.out / "tokens.json")
        return Windows(np.load(self.out / "tokens.npy", mmap_mode="r"), facts["source"], facts["bos"])

    @cached_property
    def facts(self) -> dict[str, Any]:
        return {"model": self.study.model, "notes": notes_on(self.study.model, self.study.processing)}

    def all(self) -> Path:
        s, t = self.study, self.study.tokens
        tokens = [s.model, stamp(s.model), t.source, stamp_tokens(t.source), t.seq, t.bos, version("qsae-jax")]
        training = [
            *tokens,
            s.processing,
            s.dtype,
            s.point,
            as_tables(s.sae),
            {key: value for key, value in as_tables(s.train).items() if key != "log"},
            s.compared,
            t.skip_first,
            t.audit,
        ]
        learnt = [*training, [[name, as_tables(job)] for name, job in self.jobs.items()]]
        self._stage("tokens", tokens, ["tokens.npy", "tokens.json"], self._tokens)
        if s.dictionary:
            training += [[one, stamp(str(find(one).folder))] for one in (s.dictionary, *s.at.values())]
        else:
            self._stage("train", learnt, _files(self.jobs), lambda: self._train(self.jobs))
        audited = [*training, s.schemes, s.at, s.errors_at, s.match]
        files = [f"{folder}{file}" for folder in ("", *(f"at/{point}/" for point in s.at))
                 for file in ("audit.json", "features.parquet")]  # fmt: skip
        self._stage("audit", audited, files, self._audit)
        self._questions(audited)
        self._comparison(learnt)
        write_json(self.out / "run.json", self.record)  # what was asked may have changed where nothing was to be done
        return write_report(self.out)

    def _comparison(self, learnt: list[Any]) -> None:
        """Adapted and fine-tuned dictionaries, and the comparison of all; an earlier study's is taken away."""
        s = self.study
        if not s.compare:
            drop(self.out / "compare.json", self.out / "compare")
            return
        for name, some, work in (
            ("adapt", arms.adaptations(s), self._adapt),
            ("finetune", list(self.finetuned), lambda: self._train(self.finetuned)),
        ):
            if some:
                self._stage(name, [*learnt, as_tables(s.arms), some], _files(some), work)
        files = ["compare.json", *(f"compare/{scheme}.json" for scheme in s.compared[1:])]
        self._stage("compare", [*learnt, s.tokens.compare, as_tables(s.arms)], files, self._compare)

    def _questions(self, audited: list[Any]) -> None:
        """What is asked beyond the audit; the answers of an earlier study are taken away."""
        s, folder = self.study, self.out
        asked: dict[str, tuple[Any, Callable[[], Any]]] = {
            "perplexity": (s.perplexity, lambda: questions.by_protocol(s, self.lm, folder, self.mesh)),
            "predict": (s.predict.schemes, lambda: questions.who_survives(s, folder, self._main().sae)),
            "contexts": (s.contexts.features, lambda: self._closer("contexts")),
            "act": (s.act.features, lambda: self._closer("act")),
        }
        for name, (wanted, answer) in asked.items():
            file = folder / f"{name}.json"
            if wanted:
                depends = [*audited, as_tables(s)[name]]
                depends += [
                    stamp_tokens(f"text:{one}/features.parquet") for one in s.predict.others * (name == "predict")
                ]
                self._stage(name, depends, [file.name], lambda file=file, answer=answer: write_json(file, answer()))
            else:
                drop(file)

    def _closer(self, what: str) -> dict[str, Any]:
        windows = self._held_out(self.study.tokens.audit)
        return questions.closer(self.study, self.lm, self._main().sae, windows, self.out, self.mesh, what)

    def _main(self) -> Stored:
        """The dictionary of the audit."""
        return load_stored(self.study.dictionary or self.out / "saes" / "fp", self.mesh)

    def _record(self) -> dict[str, Any]:
        file = self.out / "run.json"
        before = read_json(file) if file.is_file() else {}
        return described(self.command, as_tables(self.study)) | {"stages": before.get("stages", [])}

    def _stage(self, name: str, depends: list[Any], files: list[str], work: Callable[[], None]) -> None:
        key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
        done = {stage["name"]: stage for stage in self.record["stages"]}
        if done.get(name, {}).get("key") == key and all((self.out / file).is_file() for file in files):
            print(f"{name}: already done, reused")
            return
        # Until it is done anew, what lies here may be of two minds.
        self.record["stages"] = [stage for stage in done.values() if stage["name"] != name]
        write_json(self.out / "run.json", self.record)
        began = time.monotonic()
        work()
        done[name] = {"name": name, "seconds": round(time.monotonic() - began, 1), "key": key,
                      "mesh": self.study.mesh}  # fmt: skip
        self.record["stages"] = list(done.values())
        write_json(self.out / "run.json", self.record)

    def _tokens(self) -> None:
        t = self.study.tokens
        with progress("tokens: model, tokenizer, text", 3) as advance:
            vocab = self.lm.config.vocab
            advance(1)
            tokenizer = None if t.source.startswith("npy:") else load_tokenizer(self.study.model)
            advance(1)
            windows = load_windows(t.source, tokenizer, t.seq, t.bos, vocab)
            with staged_file(self.out / "tokens.npy") as draft, draft.open("wb") as file:
                np.save(file, windows.ids)
            write_json(self.out / "tokens.json", {"source": windows.source, "bos": windows.bos})
            advance(1)
        self.__dict__.pop("windows", None)

    def _held_out(self, tokens: int) -> Windows:
        return self.windows.part(0, max(tokens // self.windows.seq, 1))

    def _learnt_from(self) -> Windows:
        held = len(self._held_out(self.study.tokens.audit))
        if len(self.windows) <= held:
            raise UserError(
                f"tokens: {len(self.windows)} windows, {held} of them held out: nothing is left to train on"
            )
        return self.windows.part(held, len(self.windows))

    def _train(self, jobs: dict[str, Job]) -> None:
        s, windows, point = self.study, self._learnt_from(), check_point(self.lm, self.study.point)
        arms.check_adapt(s, self.lm, windows, point)
        arms.train(s, self.lm, windows, point, self.mesh, jobs, self.out)

    def _adapt(self) -> None:
        s, windows, point = self.study, self._learnt_from(), check_point(self.lm, self.study.point)
        arms.check_adapt(s, self.lm, windows, point)
        arms.adapted(s, self.lm, windows, point, self.mesh, self.out)

    def _audit(self) -> None:
        s, windows = self.study, self._held_out(self.study.tokens.audit)
        drop(self.out / "at")  # points of an earlier study
        named = {s.point: s.dictionary or "saes/fp"} | s.at
        stored = {point: load_stored(name, self.mesh) for point, name in s.at.items()} | {s.point: self._main()}
        notes = [note for point, name in named.items() for note in self._notes(stored[point], name, point)]
        found = audits(self.lm, {point: stored[point].sae for point in named}, windows, self.schemes,
                       skip_first=s.tokens.skip_first, batch=s.batch, mesh=self.mesh, errors_at=self.errors_at,
                       match=s.match, facts=self.facts | {"notes": [*self.facts["notes"], *notes]},
                       keep=self.out / "audit")  # fmt: skip
        for (point, judged), name in zip(found.items(), named.values(), strict=True):
            judged.facts["sae"] = name
            judged.write(make_folder(self.out / "at" / point) if point in s.at else self.out)
        Kept(self.out / "audit").forget()

    def _notes(self, stored: Stored, name: str, point: str) -> list[str]:
        """Where a given dictionary's own record differs from how it is used."""
        s = self.study
        if not s.dictionary:
            return []
        bos = None if s.tokens.source.startswith("npy:") else self.windows.bos
        said = differences(stored.metadata, model=s.model, config=self.lm.config, point=point, scheme="fp",
                           tokens=s.tokens.source, bos=bos)  # fmt: skip
        return [f"The dictionary {name} {what}." for what in said]

    def _compare(self) -> None:
        s = self.study
        drop(self.out / "compare.json", self.out / "compare")  # schemes of an earlier study
        windows, point = self._held_out(s.tokens.compare), check_point(self.lm, s.point)
        arms.compare(s, self.lm, windows, point, self.mesh, self.facts, self.out)


def check_points(study: Study) -> None:
    """Refuse points that the model does not have, from its config alone."""
    lm = abstract_lm(load_config(study.model))
    for point in (study.point, *study.at):
        check_point(lm, point)


def _files(dictionaries: Iterable[str]) -> list[str]:
    return [f"saes/{name}/{file}" for name in dictionaries for file in FILES]


def run_study(study: Study, out: str | Path, command: str = "") -> Path:
    """Run what is not done yet of a study into a folder; gives the path of its report."""
    return Stages(study, make_folder(Path(out)), command).all()
