"""Several processes that run one program, each with the devices of its own host: how they begin, and how they agree.

All walk the same way through the same stages and make the same numbers. A file is written by the first of them while
the others wait; what each sees for itself (a signal, a clock, free memory) is agreed on before anyone acts on it. The
folder of results must be one that all of them see.
"""

import importlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qsae_jax.errors import UserError

EVERY = 8
"""Questions between two agreements: an agreement waits for every process."""
_known = {"count": 1, "number": 0}


def _jax() -> Any:
    """Only where it is needed: who writes a report does without JAX."""
    return importlib.import_module("jax")


def _multihost() -> Any:
    return importlib.import_module("jax.experimental.multihost_utils")


def many() -> bool:
    return _known["count"] > 1


def first() -> bool:
    """Whether this process is the one that writes and speaks; the only one is."""
    return _known["number"] == 0


def launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher says that this is one of several processes: srun, or the hosts of a TPU pod."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    slices = environment.get("MEGASCALE_NUM_SLICES", "1")
    return any(n.isdigit() and int(n) > 1 for n in (tasks, slices)) or "," in environment.get(
        "TPU_WORKER_HOSTNAMES", ""
    )


def begin(asked: str) -> None:
    """Join the other processes: as `ADDRESS:PORT,COUNT,NUMBER` says; with `auto`, or where a launcher has begun this
    one, as JAX finds out from it. Before any device is touched."""
    if not asked and not launched(os.environ):
        return
    jax = _jax()

    how: dict[str, Any] = {}
    if asked not in ("", "auto"):
        parts = re.fullmatch(r"(.+:\d+),(\d+),(\d+)", asked)
        if not parts or not int(parts[3]) < int(parts[2]):
            raise UserError(
                f"--processes `{asked}` is not of the form ADDRESS:PORT,COUNT,NUMBER with NUMBER below COUNT, "
                "for example 10.0.0.1:8476,4,0"
            )
        how = {"coordinator_address": parts[1], "num_processes": int(parts[2]), "process_id": int(parts[3])}
    try:
        # Processes on CPUs speak over gloo; accelerators have ways of their own.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(**how)
        _known.update(count=jax.process_count(), number=jax.process_index())
    except (RuntimeError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"--processes: could not join the others ({said}): give ADDRESS:PORT,COUNT,NUMBER") from error


def wait(for_what: str = "a file") -> None:
    """Go on when all processes are here."""
    if many():
        _multihost().sync_global_devices(for_what)


def here(tree: Any) -> Any:
    """The arrays of a tree as NumPy's, on every process the whole of them."""
    jax = _jax()

    if not many():
        return jax.device_get(tree)
    return jax.tree.map(_whole, tree)


def _whole(leaf: Any) -> Any:
    jax = _jax()

    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return jax.device_get(leaf)
    return _multihost().process_allgather(leaf, tiled=True)


def least(number: int) -> int:
    """The least of what every process has."""
    return int(_every(number).min()) if many() else number


@dataclass
class Agreement:
    """What one process sees and all must act on. All ask as often as each other; they agree every EVERY-th time."""

    every: int = EVERY
    _asked: int = 0

    def any(self, seen: bool) -> bool:
        if not many():
            return seen
        self._asked += 1
        return self._asked % self.every == 0 and bool(_every(seen).any())


def _every(value: Any) -> Any:
    import numpy as np

    return _multihost().process_allgather(np.asarray(value))
