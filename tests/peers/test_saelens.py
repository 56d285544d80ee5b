"""What we train, read by the real SAELens. Files both ways: test_dictionaries.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.mesh import make_mesh
from qsae_jax.sae.formats import save_sae
from qsae_jax.sae.settings import SPARSITIES, SAEConfig
from qsae_jax.sae.train import finished, make_step, start

sae_lens = pytest.importorskip("sae_lens")
torch = pytest.importorskip("torch")

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums of 8 and 24 products


@pytest.fixture
def x():
    return 2 * np.random.default_rng(9).standard_normal((7, 8), np.float32) + 1


def theirs(sae, x):
    """Codes and reconstruction of SAELens."""
    with torch.no_grad():
        codes = sae.encode(torch.tensor(x))
        return codes.numpy(), sae.decode(codes).numpy()


def ours(sae, x):
    return np.asarray(sae.encode(x)), np.asarray(sae(x))


def agree(one, two):
    return all(np.allclose(a, b, **CLOSE) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_saelens_reads_what_we_train(tmp_path, x, sparsity):
    """Trained a little on activations of mean square norm far from 1, folded, saved. Control: the same with biases in
    the scale of training."""
    config = SAEConfig(sparsity=sparsity, k=3, lr=0.01, groups=(0.25, 0.75))
    mesh, acts = make_mesh(1, 1), jnp.asarray(np.tile(x, (9, 1)))
    state, step = start(config, [acts], 24, 5, 0, mesh), make_step(config, 5, mesh)
    for _ in range(5):
        state, _ = step(state, acts)
    sae = finished(state, config)
    save_sae(sae, tmp_path)
    loaded = sae_lens.SAE.load_from_disk(tmp_path)
    assert agree(ours(sae, x), theirs(loaded, x)) and np.any(ours(sae, x)[0])
    assert not agree(jax.device_get(ours(state.sae, x)), theirs(loaded, x))
