"""Training states, kept by Orbax: the newest two steps, each whole or not there."""

import contextlib
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from qsae_jax.errors import UserError
from qsae_jax.files import make_folder


class Steps:
    """The steps in a folder. A step is a tree of arrays, stored under the names of its leaves, and a dict of plain
    numbers."""

    def __init__(self, folder: Path):
        newest: Any = ocp.training.preservation_policies.LatestN(2)
        where: Any = make_folder(folder).absolute()
        self._kept = ocp.training.Checkpointer(where, preservation_policy=newest, cleanup_tmp_directories=True)

    @property
    def latest(self) -> int | None:
        return self._kept.latest.step if self._kept.latest else None

    def save(self, step: int, tree: Any, plain: dict[str, float]) -> None:
        try:
            self._kept.save_checkpointables(step, {"state": _named(tree), "plain": plain}, overwrite=True)
        except (OSError, ValueError, RuntimeError) as error:
            # TensorStore tells of a full disk with a ValueError, of which a line is too long to be shown whole.
            full = "No space left" in str(error)
            if not full and not isinstance(error, OSError):
                raise
            said = "no space is left on the disk" if full else getattr(error, "strerror", None) or error
            remedy = "make room" if full else "see that it is there and writable"
            raise UserError(
                f"cannot keep a step in `{self._kept.directory}` ({said}): {remedy}; the same command goes on from the "
                "step before"
            ) from error

    def load(self, like: Any) -> tuple[Any, dict[str, float]]:
        """The newest step, its arrays placed as those of `like`."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _named(like))
        try:
            got = self._kept.load_checkpointables(self.latest, {"state": shapes, "plain": None})
        except (ValueError, KeyError, OSError) as error:
            where = self._kept.directory
            raise UserError(
                f"the steps in `{where}` do not fit this training: delete the folder to start anew"
            ) from error
        leaves = [got["state"][name] for name in _named(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), dict(got["plain"])

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A step that could not be written is told of by `close` once more: the first word counts.
        with contextlib.suppress(*((Exception,) if kind else ())):
            self._kept.close()


def _named(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
