"""What a run directory holds, read back for its page."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qsae_jax.errors import UserError
from qsae_jax.files import read_features, read_json

Columns = dict[str, np.ndarray]
ANSWERS = ("perplexity", "predict", "contexts", "act")


@dataclass(frozen=True)
class Results:
    """The files of one run; what was not run is None or empty."""

    audit: dict[str, Any] | None = None
    compare: dict[str, Any] | None = None
    compared: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The comparisons at other schemes."""
    run: dict[str, Any] | None = None
    features: dict[str, Columns] = field(default_factory=dict)
    """Scheme -> the columns of its features."""
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What was asked beyond the audit, by file: perplexity, predict, contexts, act."""
    at: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Audits at other points."""
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """Dictionary -> its training metrics, in order of tokens."""

    @property
    def head(self) -> dict[str, Any]:
        """Model, point, tokens and notes: of the audit, else of the comparison."""
        return self.audit or self.compare or {}


def read_results(folder: Path) -> Results:
    """The results in a folder; one without an audit and without a comparison is refused."""
    if not folder.is_dir():
        raise UserError(f"`{folder}` is not a folder: give the --out of qsae audit, compare, run or demo")
    found = {
        name: read_json(file) for name in ("audit", "compare", "run") if (file := folder / f"{name}.json").exists()
    }
    if "audit" not in found and "compare" not in found:
        raise UserError(f"`{folder}` holds neither audit.json nor compare.json: run qsae audit or qsae compare first")
    features = folder / "features.parquet"
    table = read_features(features) if features.is_file() and "audit" in found else {}
    answers = {name: read_json(file) for name in ANSWERS if (file := folder / f"{name}.json").exists()}
    at = {file.parent.name: read_json(file) for file in sorted((folder / "at").glob("*/audit.json"))}
    compared = {file.stem: read_json(file) for file in sorted((folder / "compare").glob("*.json"))}
    return Results(**found, compared=compared, features=table, answers=answers, at=at, curves=_curves(folder / "train"))


def _curves(folder: Path) -> dict[str, list[dict[str, float]]]:
    curves = {}
    for path in sorted(folder.glob("*.jsonl")):
        try:
            curves[path.stem] = [json.loads(line) for line in path.read_text().splitlines()]
        except ValueError as error:
            raise UserError(f"`{path}` is not a readable log ({error}): delete it") from error
    return {name: lines for name, lines in curves.items() if lines}
