"""Configuration: what is written is what is meant, and anything else refuses."""

from dataclasses import dataclass, field

import pytest

from qsae_jax.config import as_tables, build, read_toml, with_settings
from qsae_jax.errors import UserError


@dataclass(frozen=True)
class Inner:
    k: int = 3
    rate: float = 0.5
    on: bool = True


@dataclass(frozen=True)
class Outer:
    name: str
    schemes: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)
    limit: int | None = None


def test_tables_and_settings_become_dataclasses():
    tables = {"name": "a", "schemes": ["x", "y"], "inner": {"k": 7, "rate": 1}}
    wanted = Outer("a", ("x", "y"), Inner(k=9, rate=1.0, on=False), limit=4)
    assert build(Outer, with_settings(tables, ["inner.k=9", "inner.on=false", "limit=4"])) == wanted
    assert build(Outer, as_tables(wanted) | {"schemes": ["x", "y"]}) == wanted
    assert build(Outer, with_settings({"name": "a"}, ["schemes=p, q"])).schemes == ("p", "q")


@pytest.mark.parametrize(
    "tables, settings, named",
    [
        ({"name": "a", "shemes": []}, [], "nearest: schemes"),
        ({"name": "a", "inner": {"kk": 1}}, [], "`inner.kk`"),
        ({}, [], "`name` is missing"),
        ({"name": "a", "inner": {"k": 1.5}}, [], "`inner.k`"),
        ({"name": "a", "inner": {"k": True}}, [], "`inner.k`"),
        ({"name": 3}, [], "`name`"),
        ({"name": "a", "inner": 3}, [], "a table"),
        ({"name": "a"}, ["inner.k=many"], "`inner.k`"),
        ({"name": "a"}, ["inner.on=maybe"], "`inner.on`"),
        ({"name": "a"}, ["inner"], "key=value"),
        ({"name": "a"}, ["name.x=1"], "`name` is a value"),
    ],
)
def test_what_does_not_fit_refuses(tables, settings, named):
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        build(Outer, with_settings(tables, settings))


def test_a_broken_file_refuses(tmp_path):
    (tmp_path / "s.toml").write_text("a = [1,")
    for path in (tmp_path / "s.toml", tmp_path / "none.toml"):
        with pytest.raises(UserError, match=path.name):
            read_toml(path)
