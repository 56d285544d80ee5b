"""What the words of the command line stand for, where several verbs take them: windows, points, schemes, notes."""

from argparse import Namespace
from pathlib import Path

from qsae_jax.acts.tokens import Windows, load_windows
from qsae_jax.errors import UserError
from qsae_jax.files import read_json, write_json
from qsae_jax.lm.model import LM
from qsae_jax.lm.tap import Point
from qsae_jax.lm.tokenizer import load_tokenizer
from qsae_jax.quant.scheme import Scheme, parse_schemes
from qsae_jax.record import described, differences, notes_on
from qsae_jax.sae.formats import Stored


def tell(path: Path) -> None:
    print(f"report: {path}")


def record(given: Namespace, command: str, out: Path) -> None:
    """`run.json`, unless a study keeps its own there."""
    file = out / "run.json"
    if not (file.is_file() and read_json(file).get("stages")):
        write_json(file, described(command, vars(given)))


def check_free(out: Path, kind: str, model: str, point: str) -> None:
    """Refuse a folder in which an audit or a comparison (`kind`) would replace a study's, or be shown beside what is
    of another model or point."""
    if (out / "run.json").is_file() and read_json(out / "run.json").get("stages"):
        raise UserError(f"`{out}` is the folder of a study, whose results these would replace: choose another --out")
    for other in {"audit", "compare"} - {kind}:
        if (file := out / f"{other}.json").is_file():
            facts = read_json(file)
            if (facts.get("model"), facts.get("point")) != (model, point):
                raise UserError(f"`{file}` is of {facts.get('model')} at {facts.get('point')}: choose another --out")


def schemes_of(given: Namespace) -> tuple[Scheme, ...]:
    return tuple(scheme.within(given.layers) for scheme in parse_schemes(given.schemes))


def windows_of(given: Namespace, lm: LM) -> Windows:
    tokenizer = None if given.tokens.startswith("npy:") else load_tokenizer(given.model)
    windows = load_windows(given.tokens, tokenizer, given.seq, given.bos, lm.config.vocab)
    if 0 < given.limit < windows.seq:
        raise UserError(f"--limit {given.limit} is less than one window of {windows.seq}: raise it, or lower --seq")
    return windows.part(0, given.limit // windows.seq) if given.limit else windows


def point_of(given: Namespace, stored: Stored) -> str:
    point = given.point or stored.metadata.get("hook_name")
    if not isinstance(point, str):
        raise UserError("the dictionary's file names no hook: give --point, for example blocks.8.resid_post")
    return str(Point.parse(point))


def notes_of(given: Namespace, lm: LM, windows: Windows, point: str, used: dict[str, tuple[Stored, str]]) -> list[str]:
    """What a reader must know, and where a dictionary's own record differs from how it is used here: for each folder
    the dictionary and the scheme whose activations it should have learnt."""
    notes = notes_on(given.model, lm.config.processing)
    bos = None if given.tokens.startswith("npy:") else windows.bos
    for folder, (stored, scheme) in used.items():
        said = differences(stored.metadata, model=given.model, config=lm.config, point=point, scheme=scheme,
                           tokens=given.tokens, bos=bos)  # fmt: skip
        notes += [f"The dictionary {folder} {what}." for what in said]
    for note in notes:
        print(f"note: {note}")
    return notes
