"""`python -m qsae_jax` is `qsae`."""

import sys

from qsae_jax.cli import main

sys.exit(main())
