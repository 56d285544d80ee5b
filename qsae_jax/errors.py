"""The errors a user can cause. Each message is one line that names the thing and the remedy."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Something the user can mend: the command line prints the message alone and exits with status 2."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class Interrupted(Exception):
    """The work was stopped from outside; what is on disk is whole and the same command goes on from there."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names most like `name`, as the tail of an error message: `; nearest: a, b`."""
    close = get_close_matches(name, list(known), n=count, cutoff=0.4)
    return f"; nearest: {', '.join(close)}" if close else ""
