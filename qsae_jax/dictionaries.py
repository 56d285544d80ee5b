"""What `qsae sae info` and `qsae sae convert` do."""

import json
from argparse import Namespace
from pathlib import Path

from qsae_jax.errors import UserError
from qsae_jax.sae.formats import load_stored, save_sae
from qsae_jax.sae.info import info as facts_of
from qsae_jax.sae.info import lines


def info(given: Namespace) -> None:
    facts = facts_of(given.source)
    print(json.dumps(facts, indent=1, default=str) if given.json else "\n".join(lines(facts)))


def convert(given: Namespace) -> None:
    out = Path(given.out)
    if out.resolve() == Path.cwd() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"`{out}` is there already and not a new or empty folder: choose another --out")
    stored = load_stored(given.source)
    save_sae(stored.sae, out, stored.metadata | {"converted_from": f"{given.source} ({stored.format})"}, given.to)
    print(f"{out}: {given.to}, from {stored.format}")
