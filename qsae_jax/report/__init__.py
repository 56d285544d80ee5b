"""Numbers -> tables, figures and one self-contained page. Reads result files, imports no JAX."""

from qsae_jax.report.page import write_report

__all__ = ["write_report"]
