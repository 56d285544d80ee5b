"""Five short trainings that share their compiled steps: between them every option of `[sae]`, off its default."""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qsae_jax.mesh import make_mesh, on_data
from qsae_jax.sae.settings import SAEConfig
from qsae_jax.sae.train import make_step, start

D, OUT, LATENTS, BATCH, STEPS = 8, 6, 64, 16, 9
COMMON: Any = {"lr": 0.013, "beta1": 0.8, "beta2": 0.97, "warmup": 0.25, "decay": 0.4, "sparsity_warmup": 0.4}
COMMON |= {"dead_after": 2 * BATCH, "aux": 0.37, "k_aux": 5, "l1": 0.23}

TOPK = SAEConfig(sparsity="topk", k=3, **COMMON)
BATCHTOPK = SAEConfig(
    sparsity="batchtopk", k=2.6, k_first=5, clip=0.9, ema=0.7, per_latent=True, **COMMON | {"aux": 0.0}
)
"""Without AuxK, whose branches are half of what there is to compile."""
ANNEAL = SAEConfig(
    sparsity="p_anneal", p_end=0.4, p_from=0.3, p_steps=3, unit_decoder="no", normalize="none", max_norm=1.3, **COMMON
)
GATED = SAEConfig(sparsity="gated", schedule="cosine", centre="mean", **COMMON)
"""Of a crosscoder over two twins, each with a scale of its own."""
JUMP = SAEConfig(
    sparsity="jumprelu", l0=3.1, penalty="step", threshold=0.012, bandwidth=0.3, threshold_lr=0.021, clip=2.2,
    pre_act=0.05, skip=True, normalize="sqrt_d", **COMMON,
)  # fmt: skip
"""Of a transcoder with a skip connection and two scales."""
CONFIGS = {"topk": TOPK, "batchtopk": BATCHTOPK, "p_anneal": ANNEAL, "gated": GATED, "jumprelu": JUMP}

# Activations of mean square norm far from 1, with a mean that is not 0, the second half larger, one row very long.
NOISE = np.random.default_rng(20).standard_normal((STEPS, BATCH, D + OUT), np.float32)
X = (5 * NOISE[..., :D] + np.linspace(-4, 6, D, dtype=np.float32)) * np.repeat(np.array([0.2, 1], np.float32), D // 2)
X[:, 5] *= 4
Y = 3 * NOISE[..., D:] + X[..., :OUT] - 1


def shape_of(config):
    """How many twins, and whether it is a transcoder."""
    return SimpleNamespace(twins=2 if config is GATED else 1, transcodes=config is JUMP)


def batches(config):
    return list(zip(X, Y if config is JUMP else X, strict=True))


def started(config, data=1, model=1) -> Any:
    return _started(config, data, model)


@functools.cache
def _started(config, data, model):
    first = np.split(X[0], shape_of(config).twins, axis=-1)
    target = [jnp.asarray(Y[0])] if config is JUMP else None
    return start(config, [jnp.asarray(x) for x in first], LATENTS, STEPS, 4, make_mesh(data, model), target)


def begin(config, data=1, model=1) -> Any:
    """A state to consume."""
    return jax.tree.map(jnp.copy, started(config, data, model))


def step_of(config, data=1, model=1) -> Any:
    return _step_of(config, data, model)


@functools.cache
def _step_of(config, data, model):
    return make_step(config, STEPS, make_mesh(data, model), shape_of(config).twins)


def trained(config, data=1, model=1, order=tuple(range(STEPS))) -> Any:
    """The state after the batches, and the metrics of each."""
    return _trained(config, data, model, order)


@functools.cache
def _trained(config, data, model, order):
    state, step, metrics, mesh = begin(config, data, model), step_of(config, data, model), [], make_mesh(data, model)
    for i in order:
        given = (X[i], Y[i]) if config is JUMP else (X[i],)
        state, got = step(state, *(on_data(a, mesh) for a in given))
        metrics.append(jax.device_get(got))
    return state, metrics
