"""Dictionaries with no zero and no unit in them, meshes, and an oracle in PyTorch written from the papers' formulas."""

from types import SimpleNamespace

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


def topk_loss(torch, p, x, k, aux, k_aux, dead):
    """Gao et al. 2024: `mean |x - xhat|^2 + aux |e - ehat|^2 / |e - mean e|^2`, e the detached residual, ehat from the
    k_aux largest ReLU'd codes of the latents in `dead` (indices) without b_dec."""
    pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    best = pre.topk(k, dim=-1)
    codes = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
    e = x - (codes @ p["W_dec"] + p["b_dec"])
    loss = e.pow(2).sum(-1).mean()
    if len(dead):
        best = pre[:, dead].topk(min(k_aux, len(dead)), dim=-1)
        revived = torch.zeros_like(pre[:, dead]).scatter(-1, best.indices, best.values.relu())
        residual = e.detach()
        off = (residual - revived @ p["W_dec"][dead]).pow(2).sum()
        loss = loss + aux * off / (residual - residual.mean(0)).pow(2).sum()
    return loss, codes, e


def relu_loss(torch, p, x, l1):
    """Anthropic, April 2024: `mean |x - xhat|^2 + l1 mean sum_i f_i |W_dec[i]|`."""
    codes = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).relu()
    e = x - (codes @ p["W_dec"] + p["b_dec"])
    return e.pow(2).sum(-1).mean() + l1 * (codes * p["W_dec"].norm(dim=-1)).sum(-1).mean(), codes, e


def learning_rate(t, steps, lr, warmup, decay):
    """At step t from 0: linear rise from 0 over the first share of the steps, linear fall to 0 over the last."""
    rise, fall = int(steps * warmup), int(steps * decay)
    return lr * min(t / rise, 1.0, (steps - t) / fall)


@pytest.fixture
def oracle(torch):
    """The losses and the learning rate above, on float64 tensors: `tensors(arrays)`, `loss.backward()`, `grads(p)`."""

    def tensors(arrays):
        return {name: torch.tensor(a, dtype=torch.float64, requires_grad=True) for name, a in arrays.items()}

    return SimpleNamespace(
        tensors=tensors,
        tensor=lambda a: torch.tensor(np.asarray(a, np.float64)),
        grads=lambda p: {name: t.grad.numpy() for name, t in p.items()},
        topk=lambda *args, **named: topk_loss(torch, *args, **named),
        relu=lambda *args, **named: relu_loss(torch, *args, **named),
        learning_rate=learning_rate,
        torch=torch,
    )
