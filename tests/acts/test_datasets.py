"""Datasets of the hub, out of folders in the layout of its cache; nothing is fetched."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qsae_jax.acts import datasets
from qsae_jax.acts.datasets import texts
from qsae_jax.errors import UserError

LINES = ["", " = Title = \n", "   ", "some text\n", None, "more"]


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A dataset in the cache: two shards of train, one of test, in a configuration; and another without one."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    for repo in ("datasets--org--wiki", "datasets--org--plain"):
        (tmp_path / repo / "refs").mkdir(parents=True)
        (tmp_path / repo / "refs" / "main").write_text(commit)
    wiki, plain = (tmp_path / repo / "snapshots" / commit for repo in ("datasets--org--wiki", "datasets--org--plain"))

    def write(path, column, lines):
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({column: pa.array(lines, pa.string())}), path)

    write(wiki / "raw-v1" / "train-00000-of-00002.parquet", "text", LINES)
    write(wiki / "raw-v1" / "train-00001-of-00002.parquet", "text", ["last"])
    write(wiki / "raw-v1" / "test-00000-of-00001.parquet", "text", ["a test"])
    write(wiki / "other" / "train-00000-of-00001.parquet", "text", ["another configuration"])
    write(plain / "data" / "train-00000-of-00001.parquet", "sentence", ["no text"])
    return wiki


def test_documents_are_the_lines_that_are_not_blank(cached):
    assert texts("hf:org/wiki:raw-v1") == [" = Title = \n", "some text\n", "more", "last"]
    assert texts("hf:org/wiki:raw-v1:test") == ["a test"]
    assert texts("hf:org/wiki@main:other:train") == ["another configuration"]


def test_a_large_one_is_read_from_its_beginning(cached, monkeypatch):
    monkeypatch.setattr(datasets, "MOST", 5)
    assert "last" not in texts("hf:org/wiki:raw-v1")


@pytest.mark.parametrize(
    "source, what",
    [
        ("hf:org/wiki:raw-v1:validation", "no parquet files of split `validation` of `raw-v1`"),
        ("hf:org/plain", "has no column `text` but sentence"),
        ("hf:org/absent", "offline|OFFLINE|no copy"),
        ("hf:", "is not of the form hf:DATASET"),
    ],
)
def test_what_is_not_there_is_named(cached, source, what):
    with pytest.raises(UserError, match=what):
        texts(source)


def test_a_damaged_file_is_named(cached):
    (cached / "raw-v1" / "test-00000-of-00001.parquet").write_bytes(np.arange(9).tobytes())
    with pytest.raises(UserError, match="not a readable parquet file"):
        texts("hf:org/wiki:raw-v1:test")
