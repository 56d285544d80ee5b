"""What results say of where they come from: versions, settings, the origin of dictionaries, and what their readers
must know."""

import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qsae_jax.acts.tokens import Windows
from qsae_jax.config import as_tables
from qsae_jax.lm.config import LMConfig
from qsae_jax.lm.load import stored_as
from qsae_jax.lm.process import moves
from qsae_jax.lm.sources import fetch
from qsae_jax.lm.tap import Point
from qsae_jax.recipe import TrainConfig
from qsae_jax.sae.fit import Job

LIBRARIES = ("qsae-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "gguf", "tokenizers")


def notes_on(model: str, processing: str) -> list[str]:
    """What every page that shows this model's numbers has to say."""
    kind, notes = stored_as(model), []
    if kind:
        notes.append(f"fp means the weights as shipped ({kind}), not the original floating point.")
    if processing != "none":
        notes.append(f"The weights were processed ({processing}) before they were quantized, as no shipped model is.")
    return notes


def hook_of(point: str) -> str:
    """A point as TransformerLens spells it."""
    return ".".join(
        f"hook_{part}" if part == "embed" or (i in (2, 3) and part not in ("attn", "mlp")) else part
        for i, part in enumerate(point.split("."))
    )


def origin(model: str, processing: str, point: str, windows: Windows, skip_first: int, tokens: str) -> dict[str, Any]:
    """What SAELens records of a dictionary's origin, under its names; and the processing of the model's weights."""
    facts = {"model_name": model, "hook_name": hook_of(point), "context_size": windows.seq, "dataset_path": tokens}
    facts |= {"prepend_bos": windows.bos, "seqpos_slice": [skip_first, None], "model_class_name": "qsae_jax.LM"}
    return facts | {"processing": processing}


def _short(model: Any) -> str:
    """`hf:google/gemma-2-2b@main` and `google/gemma-2-2b` as `gemma-2-2b`; TransformerLens's gpt2-small is gpt2."""
    name = Path(str(model).removeprefix("hf:").partition("@")[0]).name.lower()
    return {"gpt2-small": "gpt2"}.get(name, name)


def learnt_under(facts: Mapping[str, Any]) -> str | None:
    """The processing of the model that a dictionary's file names: ours, or SAELens's arguments, which begin at no
    processing (SAELens 6 loads `from_pretrained_no_processing`; `fold_ln` alone leaves the stream where it was). None
    where the file does not say."""
    if isinstance(named := facts.get("processing"), str):
        return named
    arguments = facts.get("model_from_pretrained_kwargs")
    if facts.get("model_class_name", "HookedTransformer") != "HookedTransformer" or not isinstance(arguments, Mapping):
        return None
    return "transformer_lens" if arguments.get("center_writing_weights") else "none"


def differences(
    facts: Mapping[str, Any], *, model: str, config: LMConfig, point: str, scheme: str, tokens: str, bos: bool | None
) -> list[str]:
    """Where a dictionary's own record differs from how it is used: each ends `The dictionary D ...`. `bos` is None
    where the token file does not say whether its windows begin with BOS."""
    said = []
    if isinstance(hook := facts.get("hook_name"), str) and hook.replace("hook_", "") != point.replace("hook_", ""):
        said.append(f"was trained at {hook}, not at {point}")
    if (learnt := facts.get("quantization")) and learnt != scheme:
        said.append(f"was trained on activations of {learnt}, not of {scheme}")
    if (named := facts.get("model_name")) and named != model and _short(named) != _short(model):
        said.append(f"was trained on {named}")
    # SAELens wants a prepend_bos; of a token file, which does not say, ours is False and means nothing.
    before = None if str(facts.get("dataset_path")).startswith("npy:") else facts.get("prepend_bos")
    if before is not None and bos is not None and before != bos:
        said.append(f"was trained with prepend_bos {before}, these windows have {bos}")
    under = learnt_under(facts)
    if under and under != config.processing and moves(config, Point.parse(point).site):
        said.append(f"was trained on a model with processing {under}, not {config.processing}: see --processing")
    if facts.get("dataset_path") == tokens:
        said.append("was trained on these tokens, or some of them: it is not judged on what it has not seen")
    return said


def learned(job: Job, train: TrainConfig) -> dict[str, Any]:
    """What a dictionary's file says of its training. A crosscoder's widths hold its twins one after the other."""
    facts = {"quantization": "+".join(job.twins), "seed": job.seed}
    facts |= {"training_tokens": job.tokens or train.tokens} | ({"shuffled": True} if job.shuffled else {})
    facts |= {"crosscoder": job.twins} if len(job.twins) > 1 else {}
    facts |= {"trained_from": job.origin} if job.origin else {}
    return facts | ({"training": as_tables(job.config)} if job.config else {})


def described(command: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The record of a run: what was asked, with which versions, and when."""
    versions = {name: version(name) for name in LIBRARIES}
    return {
        "command": command,
        "versions": versions,
        "settings": settings,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def stamp_tokens(source: str) -> list[Any]:
    """What changes when the text behind a token source does; for `stdlib-docs` the Python. A dataset of the hub is
    taken as it was read first."""
    kind, _, rest = source.partition(":")
    if kind in ("text", "npy"):
        return _stamps(Path(rest))
    return [platform.python_version()] if source == "stdlib-docs" else []


def stamp(source: str) -> list[Any]:
    """What changes when the files behind a model or a dictionary do: names, sizes and times."""
    return _stamps(fetch(source))


def _stamps(path: Path) -> list[Any]:
    files = [path] if path.is_file() else sorted(path.glob("*"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
