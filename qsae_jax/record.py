"""What results say of where they come from: versions, settings, the origin of dictionaries, and what their readers
must know."""

import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qsae_jax.acts.tokens import Windows
from qsae_jax.lm.load import stored_as
from qsae_jax.lm.sources import fetch
from qsae_jax.recipe import TrainConfig
from qsae_jax.sae.fit import Job

LIBRARIES = ("qsae-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "gguf", "tokenizers")


def notes_on(model: str) -> list[str]:
    """What every page that shows this model's numbers has to say."""
    kind = stored_as(model)
    return [f"fp means the weights as shipped ({kind}), not the original floating point."] if kind else []


def origin(model: str, point: str, windows: Windows, skip_first: int, tokens: str) -> dict[str, Any]:
    """What SAELens records of a dictionary's origin, under its names."""
    hook = ".".join(
        f"hook_{part}" if part == "embed" or (i in (2, 3) and part not in ("attn", "mlp")) else part
        for i, part in enumerate(point.split("."))
    )
    facts = {"model_name": model, "hook_name": hook, "context_size": windows.seq, "dataset_path": tokens}
    return facts | {"prepend_bos": windows.bos, "seqpos_slice": [skip_first, None], "model_class_name": "qsae_jax.LM"}


def learned(job: Job, train: TrainConfig) -> dict[str, Any]:
    """What a dictionary's file says of its training."""
    return {"quantization": job.twin, "seed": job.seed, "training_tokens": train.tokens}


def described(command: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The record of a run: what was asked, with which versions, and when."""
    versions = {name: version(name) for name in LIBRARIES}
    return {
        "command": command,
        "versions": versions,
        "settings": settings,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def stamp(source: str) -> list[Any]:
    """What changes when the files behind a source do: names, sizes and times; for `stdlib-docs` the Python."""
    if source == "stdlib-docs":
        return [platform.python_version()]
    kind, _, rest = source.partition(":")
    path = Path(rest) if kind in ("text", "npy") else fetch(source)
    files = [path] if path.is_file() else sorted(path.glob("*"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
