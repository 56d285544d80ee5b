"""Texts of a dataset on the hub, `hf:DATASET[@REV][:CONFIG[:SPLIT]]`: its parquet files are read, no code is run.

The rows of the column `text` that are not blank are the documents, each as it stands (WikiText-2 so gives what arXiv
2606.03002 tokenizes: lines that are not empty, joined by blank lines). A dataset whose split has more than MOST
characters gives the first of them.
"""

import re
from fnmatch import fnmatch
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from qsae_jax.errors import UserError
from qsae_jax.hub import from_hub

MOST = 100_000_000
COLUMN = "text"


def texts(source: str) -> list[str]:
    """The documents of a dataset."""
    found = re.fullmatch(r"hf:([^:@]+)(?:@([^:]+))?(?::([^:]+))?(?::([^:]+))?", source)
    if not found:
        raise UserError(f"token source `{source}` is not of the form hf:DATASET[@REV][:CONFIG[:SPLIT]]")
    name, revision, config, split = found[1], found[2] or "", found[3] or "", found[4] or "train"
    folder = f"{config}/" if config else ""
    patterns = [f"{folder}{split}-*.parquet", f"{folder}{split}.parquet", f"{folder}{split}/*.parquet"]
    patterns += [] if config else [f"data/{split}-*.parquet", f"data/{split}.parquet"]
    files = from_hub(source, name, revision, lambda: _snapshot(name, revision, patterns))
    shards = sorted(
        file for file in files.rglob("*.parquet") if any(fnmatch(str(file.relative_to(files)), one) for one in patterns)
    )
    if not shards:
        raise UserError(
            f"`{source}`: no parquet files of split `{split}`{f' of `{config}`' if config else ''} on the hub: "
            "name another, hf:DATASET:CONFIG:SPLIT"
        )
    return _read(source, shards)


def _snapshot(name: str, revision: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, repo_type="dataset", revision=revision or None, allow_patterns=patterns))


def _read(source: str, shards: list[Path]) -> list[str]:
    documents, size = [], 0
    for shard in shards:
        try:
            with pq.ParquetFile(shard) as file:
                names = file.schema_arrow.names
                if COLUMN not in names:
                    raise UserError(f"`{source}` has no column `{COLUMN}` but {', '.join(names)}: take another dataset")
                for batch in file.iter_batches(columns=[COLUMN]):
                    some = [text for text in batch.column(0).to_pylist() if isinstance(text, str) and text.strip()]
                    documents += some
                    size += sum(map(len, some))
                    if size > MOST:
                        return documents
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"`{shard}` is not a readable parquet file ({error}): delete it and fetch anew") from error
    if not documents:
        raise UserError(f"`{source}` holds no text: name another split")
    return documents
