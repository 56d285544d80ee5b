"""Which dictionaries one training makes: every combination of the settings that stand in braces, for every twin.

    --sae topk,batchtopk --set sae.expansion={8,16} --set train.seed={0..2}

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
from qsae_jax.sae.settings import SAEConfig
from qsae_jax.sae.sparsity import BatchTopK, JumpReLU, Sparsity, TopK

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


def begun_as(sparsity: Sparsity) -> dict[str, Any]:
    """The settings under which a dictionary goes on as it was: its kind of codes, and how many."""
    if isinstance(sparsity, TopK):
        return {"sparsity": "topk", "k": float(sparsity.k)}
    if isinstance(sparsity, JumpReLU | BatchTopK):
        return {"sparsity": "jumprelu"}
    return {"sparsity": sparsity.name}


def plan_jobs(
    twins: Sequence[str], kinds: str, settings: Sequence[str], before: Mapping[str, Stored], transcodes: bool = False
) -> tuple[dict[str, Job], TrainConfig]:
    """The jobs of a training, by name, and what they share. `kinds` names sparsities, comma-separated; empty is topk
    (batchtopk for transcoders), or the kind of the one dictionary in `before` that all go on from, by its source."""
    origin, stored = next(iter(before.items()), ("", None))
    defaults = {"sae": begun_as(stored.sae.sparsity) if stored else {}, "train": {}}
    kinds = kinds or defaults["sae"].get("sparsity", "batchtopk" if transcodes else "topk")
    jobs, shared = {}, set()
    for called, tables in _variants(kinds, settings, defaults):
        if unknown := set(tables) - {"sae", "train"}:
            raise UserError(f"--set: unknown table `{sorted(unknown)[0]}`; possible: sae.*, train.*")
        config, how = build(SAEConfig, tables["sae"], "sae."), build(TrainConfig, tables["train"], "train.")
        check_kinds(how.log)
        if transcodes and config.sparsity in ("topk", "gated"):
            raise UserError(
                f"--sae {config.sparsity}: SAELens has no such transcoder: take batchtopk, jumprelu or relu"
            )
        if config.skip and not transcodes:
            raise UserError("key `sae.skip` is for transcoders: name what is to be reconstructed with --target")
        shared.add(how.without_seed())
        jobs |= {f"{twin}{called}": Job(twin, how.seed, config, origin) for twin in twins}
    if len(shared) > 1:
        raise UserError("--set: of train.* only the seed may stand in braces: all dictionaries see the same batches")
    if len(jobs) > MANY:
        raise UserError(f"--set: these are {len(jobs)} dictionaries, more than {MANY} at once: name fewer")
    return jobs, shared.pop()
