"""The sections of the page that answer a question each, in their order."""

from collections.abc import Callable, Sequence

from qsae_jax.report import asked, audited
from qsae_jax.report.part import Part
from qsae_jax.report.results import Results

SECTIONS: Sequence[tuple[str, Callable[[Results], list[Part]]]] = (
    ("Published values", audited.expected),
    ("Why features are lost", audited.lost),
    ("Controls and intervals", audited.controls),
    ("Do schemes lose the same features?", audited.overlap),
    ("Perplexity, properly", asked.protocols),
    ("Who survives?", asked.survivors),
    ("Where does the damage arise?", asked.where),
    ("The most damaged features in text", asked.worst),
    ("Do features still act?", asked.acting),
)


def sections(results: Results) -> list[tuple[str, list[Part]]]:
    """Those that there are results for."""
    made = [(title, make(results)) for title, make in SECTIONS]
    return [(title, parts) for title, parts in made if parts]
