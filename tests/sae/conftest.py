"""Dictionaries with no zero and no unit in them, and meshes. The losses in PyTorch are in oracle.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.mesh import make_mesh
from qsae_jax.sae.model import SAE

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


@pytest.fixture
def draw():
    """`draw(seed, *shape)`: float32 normal numbers."""
    return lambda seed, *shape: np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.fixture
def make_sae(draw):
    """A random dictionary: biases away from zero, decoder rows of many lengths, encoder no transpose of them."""

    def make(sparsity, d=8, m=24, seed=0, centred=True):
        W_dec = draw(seed + 2, m, d) * np.linspace(0.5, 2, m, dtype=np.float32)[:, None]
        arrays = draw(seed, d, m), 0.5 * draw(seed + 1, m), W_dec, draw(seed + 3, d)
        return SAE(sparsity, *map(jnp.asarray, arrays), centred=centred)

    return make


@pytest.fixture
def params():
    """The four arrays of a dictionary (or of its gradients) by name, copied to NumPy."""
    return lambda sae: {name: np.array(getattr(sae, name)[...]) for name in NAMES}


@pytest.fixture
def mesh():
    """`mesh(data, model)`, skipped where there are fewer devices."""

    def make(data, model):
        if jax.device_count() < data * model:
            pytest.skip(f"needs {data * model} devices")
        return make_mesh(data, model)

    return make
