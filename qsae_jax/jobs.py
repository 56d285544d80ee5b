"""Which dictionaries one training makes: every combination of the settings that stand in braces, for every twin.

    --sae topk,batchtopk --set 'sae.expansion={8,16}' --set 'train.seed={0..2}'

A dictionary is named by its twin and by what differs: `int4-batchtopk-expansion16-seed2`.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qsae_jax.config import build, expanded, split_list, with_settings
from qsae_jax.errors import UserError
from qsae_jax.recipe import TrainConfig
from qsae_jax.sae.fit import Job
from qsae_jax.sae.formats.stored import Stored
from qsae_jax.sae.log import check_kinds
from qsae_jax.sae.settings import USED_BY, SAEConfig
from qsae_jax.sae.sparsity import JumpReLU, TopK

MANY = 64
"""Dictionaries in one training: each holds its weights four times."""


def _choices(settings: Sequence[str]) -> dict[str, list[str]]:
    """`key=value` settings by key, each with what its braces stand for."""
    choices = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set `{setting}` is not of the form key=value, for example sae.k=32")
        choices[key.strip()] = expanded(value)
    return choices


def _variants(kinds: str, settings: Sequence[str], defaults: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each combination is called after its twin, and its tables."""
    choices = {"sae.sparsity": split_list(kinds)} | _choices(settings)
    for values in itertools.product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        called = [
            value if key == "sae.sparsity" else key.rpartition(".")[2] + value
            for key, value in chosen.items()
            if len(choices[key]) > 1
        ]
        yield (
            "".join(f"-{part}" for part in called),
            with_settings(defaults, [f"{key}={value}" for key, value in chosen.items()]),
        )


def begun_as(stored: Stored) -> dict[str, Any]:
    """The settings under which a dictionary goes on as it was: its kind of codes, and how many. A JumpReLU's L0 is not
    in its weights; where its file does not say what it was driven to, the user must."""
    sparsity = stored.sae.sparsity
    if isinstance(sparsity, TopK):
        return {"sparsity": "topk", "k": float(sparsity.k)}
    if isinstance(sparsity, JumpReLU):
        told = stored.metadata.get("training")
        before = told if isinstance(told, dict) else {}
        goal = before.get("target_l0" if before.get("sparsity") == "jumprelu" else "k")
        return {"sparsity": "jumprelu"} | ({"target_l0": float(goal)} if isinstance(goal, int | float) else {})
    return {"sparsity": sparsity.name}


def _check_used(settings: Sequence[str], kinds: Sequence[str], goes_on: bool) -> None:
    """Refuse a setting that would change nothing, or the name of a dictionary alone."""
    if len(set(kinds)) < len(kinds):
        raise UserError(f"--sae {','.join(kinds)} names a kind twice: once is enough")
    for key, choices in _choices(settings).items():
        name = key.removeprefix("sae.")
        uses = [kind for kind in kinds if kind in USED_BY.get(name, kinds)]
        if key.startswith("sae.") and (not uses or (len(choices) > 1 and len(uses) < len(kinds))):
            raise UserError(f"--set {key} is for {', '.join(USED_BY[name])}, not for {', '.join(kinds)}: leave it out")
        if goes_on and key in ("sae.expansion", "sae.centre", "sae.threshold"):
            raise UserError(f"--set {key}: the dictionary that --from names has it already: leave it out")


def _check_written(config: SAEConfig, transcodes: bool) -> None:
    """Refuse what no format would hold, before it is trained."""
    if transcodes and config.sparsity in ("topk", "gated"):
        raise UserError(f"--sae {config.sparsity}: SAELens has no such transcoder: take batchtopk, jumprelu or relu")
    if config.skip and not transcodes:
        raise UserError("key `sae.skip` is for transcoders: name what is to be reconstructed with --target")


def plan_jobs(
    twins: Sequence[Sequence[str]],
    kinds: str,
    settings: Sequence[str],
    before: Mapping[str, Stored],
    transcodes: bool = False,
) -> tuple[dict[str, Job], TrainConfig]:
    """The jobs of a training, by name, and what they share. Each of `twins` is what one dictionary reads: one twin, or
    those of a crosscoder. `kinds` names sparsities, comma-separated; empty is topk
    (batchtopk for transcoders), or the kind of the one dictionary in `before` that all go on from, by its source."""
    origin, stored = next(iter(before.items()), ("", None))
    defaults = {"sae": begun_as(stored) if stored else {}, "train": {}}
    kinds = kinds or defaults["sae"].get("sparsity", "batchtopk" if transcodes else "topk")
    _check_used(settings, split_list(kinds), stored is not None)
    if stored and kinds == "jumprelu" and not {"target_l0", "sae.target_l0"} & {*defaults["sae"], *_choices(settings)}:
        raise UserError(f"the file of `{origin}` does not say its L0: give --set sae.target_l0=..")
    jobs, shared = {}, set()
    for called, tables in _variants(kinds, settings, defaults):
        if unknown := set(tables) - {"sae", "train"}:
            raise UserError(f"--set: unknown table `{sorted(unknown)[0]}`; possible: sae.*, train.*")
        config, how = build(SAEConfig, tables["sae"], "sae."), build(TrainConfig, tables["train"], "train.")
        check_kinds(how.log)
        _check_written(config, transcodes)
        shared.add(how.without_seed())
        jobs |= {f"{'+'.join(read)}{called}": Job(read[0], how.seed, config, tuple(read[1:]), origin) for read in twins}
    if len(shared) > 1:
        raise UserError("--set: of train.* only the seed may stand in braces: all dictionaries see the same batches")
    if len(jobs) > MANY:
        raise UserError(f"--set: these are {len(jobs)} dictionaries, more than {MANY} at once: name fewer")
    return jobs, shared.pop()
