"""What `qsae sae info` and `qsae sae convert` do, and what `qsae train --crosscoder` tells."""

import json
from argparse import Namespace
from pathlib import Path

import jax.numpy as jnp

from qsae_jax.acts.stream import ActivationStream
from qsae_jax.files import new_folder, staged_file
from qsae_jax.sae.crosscoder import tally, told_apart
from qsae_jax.sae.fit import Job
from qsae_jax.sae.formats import load_stored, save_sae
from qsae_jax.sae.info import info as facts_of
from qsae_jax.sae.info import lines
from qsae_jax.sae.model import SAE


def info(given: Namespace) -> None:
    facts = facts_of(given.source)
    print(json.dumps(facts, indent=1, default=str) if given.json else "\n".join(lines(facts)))


def convert(given: Namespace) -> None:
    out = new_folder(Path(given.out))
    stored = load_stored(given.source)
    save_sae(stored.sae, out, stored.metadata | {"converted_from": f"{given.source} ({stored.format})"}, given.to)
    print(f"{out}: {given.to}, from {stored.format}")


SCALED_ON = 16_384
"""Tokens of the training's stream on which a crosscoder's latents are told apart."""


def tell_apart(sae: SAE, job: Job, stream: ActivationStream, folder: Path) -> str:
    """Writes `latents.parquet` into a crosscoder's folder; a line that sums it up. Twins of one model share nearly all
    latents, and a handful of rare ones look lone by chance."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = job.twins
    batches = (jnp.concatenate(job.seen(next(stream)), axis=-1) for _ in range(-(-SCALED_ON // stream.batch)))
    columns = told_apart(sae, batches, names)
    with staged_file(folder / "latents.parquet") as draft:
        pq.write_table(pa.table(columns), draft)
    counts = tally(columns, names)
    told = ", ".join(f"{counts[name]} of {name} alone" for name in names)
    return f"{sum(counts.values())} latents fired: {told}, {counts['shared']} shared (latent scaling)"
