"""Gradients added up over parts of a batch are those of the whole batch."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.errors import UserError
from qsae_jax.mesh import make_mesh, on_data
from qsae_jax.sae.fit import check_fits
from qsae_jax.sae.levels import levels_for
from qsae_jax.sae.model import init_sae, on_mesh
from qsae_jax.sae.objective import Now, gradients
from qsae_jax.sae.settings import SAEConfig
from qsae_jax.sae.sparsity import JumpReLU
from qsae_jax.sae.train import make_sparsity

B, D, M = 32, 8, 24
CONFIG = SAEConfig(k=3, l1=0.23, l0=0.31, bandwidth=0.8, aux=0.0)
NOW = Now(jnp.zeros(M, bool), jnp.asarray(0.7), jnp.asarray(0.6), jnp.asarray(1.3))


@pytest.fixture
def both(draw):
    """`both(config, mesh)`: what is seen and its gradients in one go, and in `config.accumulate` parts."""

    def make(config, mesh):
        sparsity = make_sparsity(config, M)
        if isinstance(sparsity, JumpReLU):
            sparsity = JumpReLU(jnp.linspace(0.1, 0.9, M), config.bandwidth)
        sae = on_mesh(init_sae(sparsity, M, D, jnp.asarray(draw(3, D) / 2), jax.random.key(1)), mesh)
        x = on_data(draw(9, B, D) + 0.4, mesh)
        return [
            jax.jit(gradients(settings, levels_for(mesh)))(sae, x, x, NOW)
            for settings in (replace(config, accumulate=1), config)
        ]

    return make


def close(one, other):
    return all(
        np.allclose(a, b, rtol=1e-5, atol=1e-5)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


@pytest.mark.parametrize("shape, parts", [((1, 1), 4), ((2, 4), 2)])
@pytest.mark.parametrize("sparsity", ["topk", "relu", "gated", "jumprelu"])
def test_parts_of_a_batch_give_its_gradients(both, shape, parts, sparsity):
    """Losses, errors, counts and gradients. Control: those of the first half are others."""
    config = replace(CONFIG, sparsity=sparsity, accumulate=parts)
    if sparsity == "jumprelu":
        config = replace(config, penalty="tanh", tanh_scale=0.3)
    whole, added = both(config, make_mesh(*shape))
    assert close(whole, added)
    assert not close(whole[0].error, jnp.roll(added[0].error, 1, axis=0))


def test_a_choice_over_the_batch_is_each_parts_own(both):
    """BatchTopK, which would otherwise have to see all codes at once: as many codes, not the same ones."""
    whole, added = both(replace(CONFIG, sparsity="batchtopk", accumulate=4), make_mesh(1, 1))
    assert whole[0].fired.sum() == added[0].fired.sum() == 3 * B
    assert not close(whole, added)


def test_a_batch_that_is_not_divided_is_refused():
    check_fits(replace(CONFIG, accumulate=4), M, B, False)
    with pytest.raises(UserError, match=r"train\.batch 32 is not divided by sae\.accumulate 5"):
        check_fits(replace(CONFIG, accumulate=5), M, B, False)
