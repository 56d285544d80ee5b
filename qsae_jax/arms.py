"""The arms of a study's comparison: which dictionaries are trained, adapted and fine-tuned, and how they are judged.

Every dictionary is a folder in `saes/`, in SAELens's format: `fp`, a scheme's own, `SCHEME-biases` and so on for those
that were adapted, `SCHEME-finetuned`, `SCHEME-8192` for what was retrained on fewer tokens, `SCHEME-seed1` from the
other seed.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from qsae_jax.acts.stream import ActivationStream
from qsae_jax.acts.tokens import Windows, counted_rows, in_order, windows_per_forward
from qsae_jax.audit.contexts import contexts, with_text
from qsae_jax.compare import adapt, budget, probe
from qsae_jax.compare.transfer import Arms, compares
from qsae_jax.errors import Interrupted, UserError
from qsae_jax.files import make_folder
from qsae_jax.hosts import here
from qsae_jax.lm.model import LM
from qsae_jax.lm.tap import Point, activations, weights_before, width_at
from qsae_jax.lm.tokenizer import load_tokenizer
from qsae_jax.mesh import on_data, return_freed
from qsae_jax.progress import progress, stop_signal
from qsae_jax.quant.fake import fake_quantize
from qsae_jax.recipe import Study
from qsae_jax.record import learned, origin
from qsae_jax.sae.crosscoder import tally, told_apart
from qsae_jax.sae.fit import Job, fit, forget_steps
from qsae_jax.sae.formats import load_sae, save_sae
from qsae_jax.sae.model import SAE

ROWS = 1024
"""Activations whose codes are alive at a time."""
FEW = 8192
"""Tokens on which the thresholds of a random dictionary are found, where nothing is adapted."""


def trained(study: Study) -> dict[str, Job]:
    """What is trained from scratch, by name."""
    t, arms = study.train, study.arms
    jobs = {"fp": Job("fp", t.seed)}
    if study.compared:
        jobs |= {scheme: Job(scheme, t.seed) for scheme in study.compared} | {f"fp-seed{t.reseed}": Job("fp", t.reseed)}
    for scheme in study.compared:
        jobs |= {f"{scheme}-{n}": Job(scheme, t.seed, tokens=n) for n in arms.budgets}
        jobs |= {f"{scheme}-seed{t.reseed}": Job(scheme, t.reseed)} if arms.again else {}
    if study.arms.crosscoder:
        jobs["crosscoder"] = Job("fp", t.seed, beside=(study.arms.crosscoder,))
    return jobs | ({"shuffled": Job("fp", t.seed, shuffled=True)} if study.compared and arms.nonsense else {})


def finetuned(study: Study) -> dict[str, Job]:
    """What goes on from the full-precision dictionary on a quantized model's activations; and at home, which tells
    how much of its gain is that it learnt from more tokens: those after the ones that it was trained on."""
    arms, seed = study.arms, study.train.seed
    jobs = {"fp-finetuned": Job("fp", seed, origin="fp", tokens=arms.finetune)} if arms.finetune else {}
    for scheme in study.compared if arms.finetune else ():
        jobs[f"{scheme}-finetuned"] = Job(scheme, seed, origin="fp", tokens=arms.finetune)
        for n in arms.budgets:
            if n < arms.finetune:
                jobs[f"{scheme}-finetuned-{n}"] = Job(scheme, seed, origin="fp", tokens=n)
    return jobs


def adaptations(study: Study) -> list[str]:
    """What the stage of adapting makes, as folders."""
    some = [f"{scheme}-{how}" for scheme in study.compared for how in adapt.CLOSED] if study.arms.adapt else []
    return [*some, *(["random"] if study.compared and study.arms.nonsense else [])]


def train(study: Study, lm: LM, windows: Windows, point: Point, mesh: Mesh, jobs: Mapping[str, Job], out: Path) -> None:
    """Train the jobs on one stream of the training's windows; those with an origin go on from it, on what follows in
    the stream (which begins again where the text ends)."""
    twins = {name: lm if name == "fp" else fake_quantize(lm, name) for name in dict.fromkeys(_twins(jobs))}
    stream = ActivationStream(twins, point, windows, mesh, batch=study.train.batch, seed=study.train.shuffle,
                              skip_first=study.tokens.skip_first, forward=study.batch)  # fmt: skip
    initial = {name: load_sae(out / "saes" / job.origin, mesh) for name, job in jobs.items() if job.origin}
    config = replace(study.sae, lr=study.arms.finetune_lr or study.sae.lr) if initial else study.sae
    folder = out / ("finetune" if initial else "train")
    most = max(job.tokens or study.train.tokens for job in jobs.values())
    after = study.train.tokens if initial else 0
    for name, sae in fit(stream, jobs, config, most, folder, initial, study.train.log, after).items():
        job = replace(jobs[name], config=config)
        _save(study, sae, windows, point, out / "saes" / name, learned(job, study.train))
    forget_steps(folder)


def _twins(jobs: Mapping[str, Job]) -> list[str]:
    return [twin for job in jobs.values() for twin in job.twins]


def _save(study: Study, sae: SAE, windows: Windows, point: Point, folder: Path, facts: Mapping[str, Any]) -> None:
    s = study
    known = origin(s.model, s.processing, str(point), windows, s.tokens.skip_first, s.tokens.source)
    save_sae(sae, folder, known | dict(facts))


def rows_at(lm: LM, windows: Windows, point: Point, mesh: Mesh, skip_first: int, batch: int) -> Float[Array, "n d"]:
    """The counted activations of all windows, held at once: for the few tokens that an adaptation takes."""
    parts = []
    with stop_signal() as stopped:
        for ids, weight in in_order(windows, windows_per_forward(batch, windows, mesh)):
            (x,) = activations(lm, (point,), on_data(ids, mesh))
            parts.append(np.asarray(here(counted_rows(x[: int(weight.sum())], skip_first)), np.float32))
            if stopped():
                raise Interrupted("stopped; the same command begins this stage again")
    return jnp.asarray(np.concatenate(parts))


def check_adapt(study: Study, lm: LM, windows: Windows, point: Point) -> None:
    """Refuse `arms.adapt` before anything is trained: too few tokens, or more than there are."""
    if study.arms.adapt:
        some = -(-study.arms.adapt // windows.seq)
        if some > len(windows):
            raise UserError(f"key `arms.adapt` takes {some} windows, and {len(windows)} are left to train on: lower it")
        if study.arms.rank > width_at(lm, point):
            raise UserError(f"key `arms.rank` is {study.arms.rank}: give at most the width, {width_at(lm, point)}")
        adapt.check_enough(some * (windows.seq - study.tokens.skip_first), width_at(lm, point))


def adapted(study: Study, lm: LM, windows: Windows, point: Point, mesh: Mesh, out: Path) -> None:
    """Adapt the full-precision dictionary to every scheme, on the first tokens of the training."""
    s, some = study, windows.part(0, -(-(study.arms.adapt or FEW) // windows.seq))
    where: Any = {"mesh": mesh, "skip_first": s.tokens.skip_first, "batch": s.batch}
    sae = load_sae(out / "saes" / "fp", mesh)
    with progress("adapt", len(s.compared) + 1) as advance:
        home = rows_at(lm, some, point, **where)
        advance(1)
        for scheme in s.compared:
            there = rows_at(fake_quantize(lm, scheme), some, point, **where)
            return_freed()
            found = adapt.adapted(sae, home, there, s.arms.rank) if s.arms.adapt else {}
            for how, one in found.items():
                facts = {"quantization": scheme, "adapted_from": "fp", "adaptation": how, "training_tokens": len(home)}
                _save(study, one, windows, point, out / "saes" / f"{scheme}-{how}", facts)
            advance(1)
        if s.arms.nonsense:
            _save(study, adapt.nonsense(sae, home), windows, point, out / "saes" / "random", {"quantization": "fp"})


def compare(
    study: Study, lm: LM, windows: Windows, point: Point, mesh: Mesh, facts: Mapping[str, Any], out: Path
) -> None:
    """`compare.json` of the first scheme, `compare/SCHEME.json` of the others."""
    s = study
    shared = {"sae": "fp", "reseeded": f"fp-seed{s.train.reseed}"}
    if s.arms.nonsense:
        shared |= {"random": "random", "shuffled": "shuffled"}
    shared |= {"fp-finetuned": "fp-finetuned"} if s.arms.finetune else {}
    held = {name: load_sae(out / "saes" / one, mesh) for name, one in shared.items()}
    labels = None
    if s.arms.probes:
        labels = probe.labels(windows, load_tokenizer(s.model))
    told = dict(facts) | {name: f"saes/{folder}" for name, folder in shared.items()}
    found = compares(lm, {scheme: _arms(s, scheme, mesh, out) for scheme in s.compared}, held, windows, point,
                     labels=labels, prices=prices(lm, point, held["sae"], s.sae.selects), batch=s.batch, mesh=mesh,
                     skip_first=s.tokens.skip_first, facts=told)  # fmt: skip
    for scheme, one in found.items():
        one.facts["retrained"] = f"saes/{scheme}"
        lms = lm, fake_quantize(lm, scheme)
        if s.arms.contexts:
            pair = held["sae"], load_sae(out / "saes" / scheme, mesh)
            one.facts["texts"] = _texts(s, lms, pair, windows, point, mesh, one.facts["fates"])
        if s.arms.crosscoder == scheme:
            one.facts["crosscoder"] = _told_apart(s, lms, windows, point, mesh, out)
        del lms
        return_freed()
    folder = make_folder(out / "compare") if len(s.compared) > 1 else out
    for i, (scheme, one) in enumerate(found.items()):  # all or none: what is half there would be shown
        one.write(folder / f"{scheme}.json" if i else out / "compare.json")


def _arms(study: Study, scheme: str, mesh: Mesh, out: Path) -> Arms:
    def get(name: str) -> SAE:
        return load_sae(out / "saes" / name, mesh)

    s = study
    ways = [how for how in adapt.CLOSED if s.arms.adapt]
    hows = {how: get(f"{scheme}-{how}") for how in ways}
    hows |= {"finetuned": get(f"{scheme}-finetuned")} if s.arms.finetune else {}
    retrained = get(scheme)
    by = {n: get(f"{scheme}-{n}") for n in s.arms.budgets}
    curves = {"retrained": by | {s.train.tokens: retrained}} if by else {}
    if s.arms.finetune:
        fewer = {n: get(f"{scheme}-finetuned-{n}") for n in s.arms.budgets if n < s.arms.finetune}
        curves["finetuned"] = fewer | {s.arms.finetune: hows["finetuned"]}
    again = get(f"{scheme}-seed{s.train.reseed}") if s.arms.again else None
    return Arms(retrained, hows, again, curves)


def prices(lm: LM, point: Point, sae: SAE, sparse: bool) -> Callable[[float], dict[str, float]]:
    """What so many tokens of training such a dictionary cost, in seconds by device."""
    flops = budget.flops_per_token(weights_before(lm, point), sae.d, sae.latents, sparse)
    return lambda tokens: budget.price(tokens, flops)


FATES = {"lost": 0, "split": 0, "new": 1, "merged": 1}
"""Of which dictionary the latents of a fate are: the one carried over, or the retrained one."""


def _texts(
    study: Study,
    lms: tuple[LM, LM],
    saes: tuple[SAE, SAE],
    windows: Windows,
    point: Point,
    mesh: Mesh,
    fates: Mapping[str, list[dict[str, Any]]],
) -> dict[str, list[dict[str, Any]]]:
    """For the latents of each fate that fire most, the contexts where they are strongest, with both models' values."""
    tokenizer = None if study.tokens.source.startswith("npy:") else load_tokenizer(study.model)
    told: Any = {"mesh": mesh, "skip_first": study.tokens.skip_first, "batch": study.batch}
    found = {}
    with stop_signal() as stopped:
        for fate, which in FATES.items():
            some = [one["feature"] for one in fates[fate][: study.arms.contexts]]
            shown = contexts(*lms, saes[which], windows, point, some, stopped=stopped, **told)
            found[fate] = with_text(shown, tokenizer) if tokenizer else shown
    return found


def _told_apart(
    study: Study, lms: tuple[LM, LM], windows: Windows, point: Point, mesh: Mesh, out: Path
) -> dict[str, int]:
    """Whose the crosscoder's latents are."""
    names = ("fp", study.arms.crosscoder)
    sides = [rows_at(lm, windows, point, mesh, study.tokens.skip_first, study.batch) for lm in lms]
    rows = jnp.concatenate(sides, axis=-1)
    batches = (rows[i : i + ROWS] for i in range(0, len(rows), ROWS))
    return tally(told_apart(load_sae(out / "saes" / "crosscoder", mesh), batches, names), names)
