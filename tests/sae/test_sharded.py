"""TopK and BatchTopK on a mesh: the choice is exact, the lists give what dense products give, and little travels."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qsae_jax.mesh import make_mesh, on_data
from qsae_jax.plan.counts import traffic
from qsae_jax.plan.programs import rows, shaped
from qsae_jax.products import matmul
from qsae_jax.sae import sharded
from qsae_jax.sae.levels import levels_by_products, levels_on_mesh
from qsae_jax.sae.model import SAE, on_mesh
from qsae_jax.sae.select import top_k
from qsae_jax.sae.settings import SAEConfig
from qsae_jax.sae.sharded import kept_of_batch, kept_of_rows
from qsae_jax.sae.train import make_sparsity, make_step, start

MESHES = [(8, 1), (2, 4), (1, 8)]
B, D, M = 16, 12, 64


@pytest.fixture
def pre():
    """Pre-activations with many equal ones, and a row of which nothing is positive."""
    x = np.random.default_rng(0).standard_normal((B, M)).round(1).astype(np.float32)
    x[3] = -np.abs(x[3]) - 0.1
    return x


def placed(x, mesh):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", "model")))


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("k", [1, 7, 40])
def test_the_k_largest_of_a_row_are_those_of_top_k(pre, shape, k):
    """Equal ones too: the earlier latent is kept. Control: without the merge every device would keep k."""
    mesh = make_mesh(*shape)
    kept = np.asarray(jax.jit(lambda x: kept_of_rows(x, k, mesh))(placed(pre, mesh)))
    right = np.zeros_like(kept)
    right[np.arange(B)[:, None], np.asarray(jax.lax.top_k(pre, k)[1])] = True
    assert np.array_equal(kept, right)
    parts = pre.reshape(B, shape[1], -1)
    _, own = top_k(jnp.asarray(parts), min(k, parts.shape[-1]))
    assert shape[1] == 1 or own.size > kept.sum()


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("n", [4, 100, 800])
def test_the_n_largest_of_a_batch_are_the_largest(pre, shape, n):
    """As many as are positive at most; the values are those of a sort, whichever of equal ones are kept."""
    mesh = make_mesh(*shape)
    kept = np.asarray(jax.jit(lambda x: kept_of_batch(x, n, mesh))(placed(pre, mesh)))
    right = np.sort(np.maximum(pre, 0).ravel())[::-1][:n]
    right = right[right > 0]
    np.testing.assert_array_equal(np.sort(pre[kept])[::-1], right)
    assert n == 800 or (pre >= right.min()).sum() > len(right), "there should be equal ones to choose from"


def dictionary(config, mesh):
    rng = np.random.default_rng(1)
    W_enc, b_enc, W_dec, b_dec = (
        jnp.asarray(rng.standard_normal(shape).astype(np.float32) / 2) for shape in ((D, M), (M,), (M, D), (D,))
    )
    return on_mesh(SAE(make_sparsity(config, M), W_enc, b_enc, W_dec, b_dec), mesh)


def run(levels, config, sae, x):
    """What the levels are, and gradients of a function of what they add that weighs every number differently."""
    weights = jnp.asarray(np.random.default_rng(2).standard_normal((B, D)), jnp.float32)

    def value(sae):
        found = levels(config, sae, x, jnp.float32(0.6), matmul)
        return jnp.sum(jnp.cos(jnp.arange(found.added.shape[1]))[None, :, None] * found.added * weights[:, None]), found

    (_, found), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(sae)
    return found, grads


XS = np.random.default_rng(3).standard_normal((B, D)).astype(np.float32)
XS[: B // 8] *= 5  # most codes of a batch are those of a few rows


def close(one, other):
    return [np.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)]


@cache
def dense(config):
    """By products on one device."""
    return run(levels_by_products, config, dictionary(config, make_mesh(1, 1)), XS)


TOPK, BATCH = SAEConfig(sparsity="topk", k=5), SAEConfig(sparsity="batchtopk", k=5)
LEVELS = SAEConfig(sparsity="matryoshka", k=5, groups=(0.1, 0.35, 0.55))
CASES = [(config, shape, 4) for config in (TOPK, BATCH) for shape in MESHES] + [
    (LEVELS, (2, 4), 4),
    (LEVELS, (8, 1), 1),
    (BATCH, (2, 4), 1),
    (replace(TOPK, k_first=9.0), (2, 4), 4),
    (replace(BATCH, k_first=9.0), (1, 8), 4),
]


@pytest.mark.parametrize("config, shape, spread", CASES)
def test_lists_on_a_mesh_are_dense_products_on_one_device(config, shape, spread, monkeypatch):
    """Also with room for its even share alone, where some device always has more than that. Control: the gradients of
    another k."""
    monkeypatch.setattr(sharded, "SPREAD", spread)
    mesh = make_mesh(*shape)
    found, mine = run(lambda *given: levels_on_mesh(mesh, *given), config, dictionary(config, mesh), on_data(XS, mesh))
    wanted, grads = dense(config)
    assert all(close(found, wanted)) and all(close(mine, grads))
    _, wrong = dense(replace(config, k=6, k_first=config.k_first and 12.0))
    assert not all(close(wrong, mine))


def step_traffic(config, mesh, batch, latents):
    state = jax.eval_shape(lambda x: start(config, [x], latents, 100, 0, mesh), jnp.zeros((64, D)))
    step: Any = make_step(config, 100, mesh)
    return traffic(step.lower(shaped(state, mesh), rows((batch, D), mesh)).compile().as_text())


@pytest.mark.parametrize("kind, shape", [(kind, shape) for kind in ("topk", "batchtopk") for shape in MESHES] + [
    (kind, (2, 4)) for kind in ("matryoshka", "relu", "jumprelu", "gated")])  # fmt: skip
def test_what_travels_in_a_step(kind, shape):
    """Gradients over `data`, what is added over `model`, candidates and counts: never pre-activations, of which a
    gather would be the largest of all. Control: the limit is less than these."""
    batch, latents, k = 512, 1024, 4
    data, model = shape
    config = SAEConfig(sparsity=kind, k=k, groups=(0.25, 0.75), expansion=latents / D)
    found = step_traffic(config, make_mesh(*shape), batch, latents)
    assert set(found) <= {"all-reduce", "all-gather"}, found
    own, part = batch // data, latents // model
    gradients = (2 * D + 4) * part * (data > 1)
    added = 5 * own * D * (model > 1)  # levels, their gradients, AuxK's and the gate's
    candidates = 2 * own * k * model + 4 * latents + 2 * own
    assert sum(size for _, size in found.values()) <= 4 * (gradients + added + candidates)
    assert sum(count for count, _ in found.values()) <= (60 if kind in ("batchtopk", "matryoshka") else 14)
    assert gradients + added + candidates < batch * latents / 2
