"""Several studies of one file: every combination of the values in its table `sweep`, a folder each, and their numbers
beside each other in `sweep.json`.

    [sweep]
    "sae.expansion" = [0.5, 1, 2]
    point = ["blocks.4.resid_post", "blocks.8.resid_post"]
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsae_jax.config import build, read_toml, with_settings
from qsae_jax.errors import UserError
from qsae_jax.files import make_folder, read_json, write_json
from qsae_jax.recipe import Study
from qsae_jax.study import check_points, run_study


def read_studies(path: Path, settings: Sequence[str] = ()) -> dict[str, Study]:
    """The studies of a TOML file, with `key=value` settings laid over them, by what differs; one without a table
    `sweep` is named by the empty string."""
    tables = read_toml(path)
    swept = tables.pop("sweep", {})
    if not isinstance(swept, dict):
        raise UserError(f"key `sweep` of `{path}` is no table: write [sweep], and under it lists of values")
    if both := [key for key in (setting.partition("=")[0].strip() for setting in settings) if key in swept]:
        raise UserError(f"--set {both[0]}: the sweep of `{path}` gives it several values: edit them there")
    if wrong := [key for key, values in swept.items() if not isinstance(values, list) or not values]:
        raise UserError(f"key `sweep.{wrong[0]}` of `{path}` is no list, or empty: write for example [1, 2, 4]")
    if twice := [key for key, values in swept.items() if len({_written(value) for value in values}) < len(values)]:
        raise UserError(f"key `sweep.{twice[0]}` of `{path}` has a value twice: give each once")
    found = {}
    for chosen in itertools.product(*swept.values()):
        named = [f"{key}={_written(value)}" for key, value in zip(swept, chosen, strict=True)]
        found[",".join(named)] = build(Study, with_settings(tables, [*named, *settings]))
    return found


def _written(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def run_studies(studies: Mapping[str, Study], out: str | Path, command: str = "") -> Path:
    """Run each in a folder of its own, and give the path of `sweep.json`."""
    out = make_folder(Path(out))
    for study in studies.values():  # before the first is begun
        check_points(study)
    for name, study in studies.items():
        print(f"{name}:")
        run_study(study, out / name, command)
    write_json(out / "sweep.json", {"command": command, "rows": [row for name in studies for row in rows(out, name)]})
    return out / "sweep.json"


def rows(out: Path, name: str) -> list[dict[str, Any]]:
    """A row for each scheme of one study: what survives, and how the arms of its comparison stand."""
    folder = out / name
    found = {}
    for row in read_json(folder / "audit.json")["rows"]:
        found[row["scheme"]] = {key: row[key] for key in ("survived", "delta_ppl", "fvu")}
    for file in [folder / "compare.json", *sorted((folder / "compare").glob("*.json"))]:
        if file.is_file():
            compared = read_json(file)
            found.setdefault(compared["scheme"], {}).update(_compared(compared))
    return [{"study": name, "scheme": scheme} | numbers for scheme, numbers in found.items()]


def _compared(compare: dict[str, Any]) -> dict[str, Any]:
    """FVU of the dictionaries of `train.seed`; the gap is the verdict's, a mean over seeds where there are two."""
    arms = {(row["arm"], row["judged_on"]): row["fvu"]["value"] for row in compare["rows"] if not row["how"]}
    scheme, told = compare["scheme"], compare["verdict"]
    keys = {"reference": "fp", "transferred": scheme, "retrained": scheme}
    numbers = {f"fvu_{arm}": arms.get((arm, judged_on)) for arm, judged_on in keys.items()}
    return numbers | {"verdict": told["choice"], "gap": told["gaps"]["transferred"]["fvu"]}
