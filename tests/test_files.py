"""Files and folders appear whole or not at all."""

import json
import os

import numpy as np
import pytest

from qsae_jax.errors import UserError, nearest
from qsae_jax.files import make_folder, read_json, staged, staged_file, write_json


def test_json_of_numbers_that_json_has_not(tmp_path):
    write_json(tmp_path / "a.json", {"n": float("nan"), "i": np.float32(0.5), "l": (np.int64(3), float("inf"))})
    assert json.loads((tmp_path / "a.json").read_text()) == {"n": None, "i": 0.5, "l": [3, None]}


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(RuntimeError), staged_file(tmp_path / "a.json") as draft:
        draft.write_text("half")
        raise RuntimeError
    assert read_json(tmp_path / "a.json") == {"old": 1} and os.listdir(tmp_path) == ["a.json"]


def test_a_folder_that_fails_leaves_the_old_folder(tmp_path):
    for text, fails in (("old", False), ("new", True)):
        try:
            with staged(tmp_path / "f") as draft:
                (draft / "x").write_text(text)
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
    assert (tmp_path / "f/x").read_text() == "old" and os.listdir(tmp_path) == ["f"]
    with staged(tmp_path / "f") as draft:
        (draft / "y").write_text("new")
    assert os.listdir(tmp_path / "f") == ["y"]


@pytest.mark.parametrize("text", ["", "{", "[1]", "{'a': 1}", "[" * 100_000])
def test_what_is_no_json_object_refuses(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_a_place_that_cannot_be_written_refuses(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        make_folder(tmp_path / "file" / "inner")
    with pytest.raises(UserError), staged(tmp_path / "file" / "inner" / "f"):
        pass


def test_an_error_is_one_line_and_names_the_nearest():
    assert "\n" not in str(UserError("two\nlines  here")) and str(UserError("two\nlines  here")) == "two lines here"
    assert nearest("int9", ["int8", "fp", "noise"]) == "; nearest: int8"
    assert nearest("zzz", ["int8"]) == ""
