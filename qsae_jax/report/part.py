"""What a section of the page is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qsae_jax.report.tables import Table


@dataclass(frozen=True)
class Part:
    """One figure, table or list of texts with its caption, and what it says and cannot say."""

    name: str
    caption: str
    svg: str = ""
    table: Table | None = None
    said: Sequence[str] = ()
    texts: Sequence[dict[str, Any]] = ()
    """Features with their contexts, as `contexts.json` has them, and a line on each, `head`."""
