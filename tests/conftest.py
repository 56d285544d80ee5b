"""The policy of every test: eight simulated CPU devices, no hub, no silent rank promotion."""

import os

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import jax
import pytest

# Before any backend is touched. JAX_PLATFORMS=cuda runs the tests on a GPU instead.
if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "float32")

# The first example of a test compiles, so no deadline; the same examples in every run.
hypothesis.settings.register_profile("qsae", deadline=None, derandomize=True)
hypothesis.settings.load_profile("qsae")


@pytest.fixture(scope="session")
def torch():
    """The oracle of the parity tests, which are skipped where it is not installed."""
    return pytest.importorskip("torch", reason="torch, the oracle of this test, is installed on Python 3.11 only")
