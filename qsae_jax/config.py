"""Frozen dataclasses <-> TOML and `--set key=value`. Unknown keys refuse, with the nearest names."""

import dataclasses
import math
import re
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from qsae_jax.errors import UserError, nearest

T = TypeVar("T")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"study `{path}` is not there: give a TOML file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"study `{path}` is not readable TOML ({error}): correct it") from error


def build(kind: type[T], given: dict[str, Any], where: str = "") -> T:
    """A dataclass from nested tables; every value is checked against the field's type."""
    fields = {f.name: f for f in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in given.items():
        name = f"{where}{key}"
        if key not in fields:
            known = ", ".join(f"`{where}{f}`" for f in fields)
            raise UserError(f"unknown key `{name}`{nearest(key, fields)}; possible: {known}")
        values[key] = _converted(hints[key], value, name)
    missing = [f.name for f in fields.values() if f.name not in values and _required(f)]
    if missing:
        raise UserError(f"key `{where}{missing[0]}` is missing: add it to the study")
    return kind(**values)


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _converted(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"key `{name}` is {value!r}, expected a table of keys")
        return build(typing.cast(type, hint), value, f"{name}.")
    origin = typing.get_origin(hint)
    if origin is tuple:
        if isinstance(value, str):
            listed = _toml_list(value)
            value = [part for part in split_list(value) if part] if listed is None else listed
        if not isinstance(value, list):
            raise UserError(f"key `{name}` is {value!r}, expected a list")
        return tuple(_converted(typing.get_args(hint)[0], item, name) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"key `{name}` is {value!r}, expected a table of keys")
        inner = typing.get_args(hint)[1]
        return {key: _converted(inner, item, f"{name}.{key}") for key, item in value.items()}
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _converted(next(a for a in typing.get_args(hint) if a is not types.NoneType), value, name)
    return _scalar(hint, value, name)


def _scalar(hint: type, value: Any, name: str) -> Any:
    """Numbers also from text, because `--set` gives text; a whole number serves as a float, never the reverse."""
    try:
        if hint is bool and isinstance(value, str):
            value = {"true": True, "false": False}[value.lower()]
        elif hint in (int, float) and isinstance(value, str):
            value = hint(value.replace("_", ""))
        elif hint is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
    except (KeyError, ValueError):
        value = None if hint is not str else value
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"key `{name}` is {value}: give a finite number")
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise UserError(f"key `{name}` does not hold {hint.__name__}: correct its value")
    return value


def _toml_list(text: str) -> list[Any] | None:
    """A list as it is written in a study; None of a text that is none."""
    try:
        value = tomllib.loads(f"x = {text}")["x"] if text.startswith("[") else None
    except ValueError:
        return None
    return value if isinstance(value, list) else None


def split_list(text: str) -> list[str]:
    """The items of a comma-separated list; a comma in brackets or braces belongs to its item."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


MOST = 1000
"""Names that braces may stand for."""


def expanded(text: str) -> list[str]:
    """What braces stand for, as in a shell: `int{8..6}` is int8, int7, int6, and `a{b,c}` ab, ac."""
    found = re.search(r"\{([^{}]*)\}", text)
    if not found:
        if unpaired := next((sign for sign in "{}" if sign in text), None):
            raise UserError(f"`{text}`: `{unpaired}` has no partner: write for example int{{8..2}}")
        return [text]
    inner = found[1]
    if span := re.fullmatch(r"(\d{1,4})\.\.(\d{1,4})", inner):
        first, last = map(int, span.groups())
        choices = [str(i) for i in range(first, last + 1)] or [str(i) for i in range(first, last - 1, -1)]
    else:
        choices = split_list(inner)
        if len(choices) < 2:
            raise UserError(f"`{text}`: braces hold a range or several things: write for example {{8..2}} or {{4,8}}")
    before, after = text[: found.start()], text[found.end() :]
    whole = [name for choice in choices[:MOST] for name in expanded(before + choice + after)]
    if len(choices) > MOST or len(whole) > MOST:
        raise UserError(f"`{text}` stands for more than {MOST} names: name fewer")
    return whole


def with_settings(tables: dict[str, Any], settings: typing.Sequence[str]) -> dict[str, Any]:
    """The tables with `key.inner=value` settings laid over them."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in tables.items()}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise UserError(f"--set `{setting}` is not of the form key=value, for example sae.k=32")
        table, *rest = name.strip().split(".")
        if not rest:
            merged[table] = value
        elif isinstance(merged.setdefault(table, {}), dict):
            merged[table][".".join(rest)] = value
        else:
            raise UserError(f"--set `{setting}`: `{table}` is a value, not a table")
    return merged


LARGEST = 2**31 - 1
"""What a 32-bit number holds."""


def check_at_least(config: Any, where: str, **least: float) -> None:
    """Refuse a number below its least possible value, or a whole one that 32 bits do not hold."""
    for name, low in least.items():
        value = getattr(config, name)
        if not value >= low or (isinstance(value, int) and value > LARGEST):
            raise UserError(f"key `{where}{name}` is {value}: give {low} to {LARGEST}")


def as_tables(config: Any) -> dict[str, Any]:
    """A dataclass as plain nested dicts, for a result's record."""
    return dataclasses.asdict(config)
