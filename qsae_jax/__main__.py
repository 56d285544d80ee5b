"""The command itself: `qsae`, and `python -m qsae_jax`."""

import sys

from qsae_jax.pages import with_huge_pages


def run() -> int:
    with_huge_pages()
    from qsae_jax.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
