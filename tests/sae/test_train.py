"""Training against a loop in PyTorch: torch.optim.Adam, the same schedule, unit decoder rows."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from qsae_jax.mesh import on_data
from qsae_jax.sae.train import SAEConfig, finished, geometric_median, make_step, start

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
D, LATENTS, BATCH, STEPS = 8, 64, 16, 9
TOPK = SAEConfig(sparsity="topk", k=3, lr=0.013, warmup=0.25, decay=0.4, aux=0.37, k_aux=5, dead_after=2 * BATCH)
RELU = SAEConfig(sparsity="relu", l1=0.23, lr=0.013, warmup=0.25, decay=0.4, aux=0.37, dead_after=2 * BATCH)
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
"""Float32 against float64 over nine steps that each move a weight by up to 0.013."""


# Activations of mean square norm far from 1, with a mean that is not 0.
NOISE = np.random.default_rng(20).standard_normal((STEPS, BATCH, D), np.float32)
BATCHES = 5 * NOISE + np.linspace(-4, 6, D, dtype=np.float32)


@functools.cache
def started(config, mesh):
    return start(config, jnp.asarray(BATCHES[0]), LATENTS, STEPS, 4, mesh)


def begin(config, mesh):
    """A state to consume."""
    return jax.tree.map(jnp.copy, started(config, mesh))


@functools.cache
def step_of(config, mesh):
    return make_step(config, STEPS, mesh)


@functools.cache
def train(config, mesh, order=tuple(range(STEPS))):
    """The state after the batches, and the metrics of each."""
    state, step, metrics = begin(config, mesh), step_of(config, mesh), []
    for i in order:
        state, got = step(state, on_data(BATCHES[i], mesh))
        metrics.append(jax.device_get(got))
    return state, metrics


def torch_train(oracle, arrays, scale, config, project=True, unit=16):
    """The same training: parameters, losses, shares of dead latents, tokens since each latent fired. `project` takes
    the radial part off the decoder's gradient, `unit` is what a batch adds to the count of a silent latent."""
    torch, p, silent = oracle.torch, oracle.tensors(arrays), np.zeros(LATENTS, int)
    adam, losses, shares = torch.optim.Adam(list(p.values())), [], []
    for t, x in enumerate(BATCHES):
        adam.zero_grad()
        x, dead = oracle.tensor(x) / scale, np.flatnonzero(silent >= config.dead_after)
        if config.sparsity == "topk":
            loss, codes, _ = oracle.topk(p, x, config.k, config.aux, config.k_aux, dead)
        else:
            loss, codes, _ = oracle.relu(p, x, config.l1 * min((t + 1) / int(STEPS * config.warmup), 1))
        loss.backward()
        rows, grad = p["W_dec"].data, p["W_dec"].grad
        if project and config.sparsity == "topk":
            grad -= (grad * rows).sum(-1, keepdim=True) * rows
        adam.param_groups[0]["lr"] = oracle.learning_rate(t, STEPS, config.lr, config.warmup, config.decay)
        adam.step()
        if config.sparsity == "topk":
            rows /= rows.norm(dim=-1, keepdim=True)
        silent = np.where((codes > 0).any(0).numpy(), 0, silent + unit)
        losses.append(loss.item())
        shares.append(np.mean(silent >= config.dead_after))
    return {name: t.detach().numpy() for name, t in p.items()}, losses, shares, silent


@pytest.mark.parametrize("config", [TOPK, RELU], ids=["topk", "relu"])
def test_training_is_that_of_pytorch(mesh, params, oracle, config):
    """Losses, parameters, dead shares and silent tokens after nine steps, AuxK at work in the last ones. Controls: no
    projection of the decoder's gradient (topk), half the penalty (relu), silence counted in steps."""
    one = mesh(1, 1)
    first = started(config, one)
    given = {"oracle": oracle, "arrays": params(first.sae), "scale": float(first.scale), "config": config}
    state, metrics = train(config, one)
    p, losses, shares, silent = torch_train(**given)
    np.testing.assert_allclose([m.loss for m in metrics], losses, rtol=1e-4)
    for name, ours in params(state.sae).items():
        np.testing.assert_allclose(ours, p[name], err_msg=name, **CLOSE)
    np.testing.assert_allclose([m.dead for m in metrics], shares, rtol=1e-6)
    assert np.array_equal(state.silent, silent) and int(state.step) == STEPS
    broken = {"project": False, "unit": 1} if config is TOPK else {"config": replace(config, l1=config.l1 / 2)}
    wrong = torch_train(**given | broken)
    assert not np.allclose(params(state.sae)["W_dec"], wrong[0]["W_dec"], **CLOSE)
    assert config is RELU or (max(shares[:-1]) > 0 and not np.array_equal(state.silent, wrong[3]))


def test_start_scale_and_metrics(mesh, params):
    """The scale is the root of the mean square norm; fvu and l0 of the first step against NumPy, before it moves.
    Control: fvu about zero instead of about the mean."""
    state = started(TOPK, mesh(1, 1))
    x, sae = BATCHES[0].astype(np.float64), state.sae
    scale = np.sqrt((x**2).sum(-1).mean())
    np.testing.assert_allclose(state.scale, scale, rtol=1e-6)
    codes = np.asarray(sae.encode(BATCHES[0] / state.scale))
    error = ((BATCHES[0] / scale - np.asarray(sae.decode(codes))) ** 2).sum()
    got = step_of(TOPK, mesh(1, 1))(begin(TOPK, mesh(1, 1)), jnp.asarray(BATCHES[0]))[1]
    np.testing.assert_allclose(got.fvu, error / (((x - x.mean(0)) / scale) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(got.l0, (codes > 0).sum(-1).mean(), rtol=1e-6)
    assert not np.isclose(got.fvu, error / ((x / scale) ** 2).sum(), rtol=1e-3)


def test_finished_reads_activations_as_they_are(mesh):
    """`scale * reconstruction(x / scale)` to 1e-5, and the codes scaled alike. Control: the dictionary not folded."""
    state, _ = train(TOPK, mesh(1, 1))
    x, sae, scale = jnp.asarray(BATCHES[0]), finished(state), state.scale
    np.testing.assert_allclose(sae(x), scale * state.sae(x / scale), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae.encode(x), scale * state.sae.encode(x / scale), rtol=1e-5, atol=1e-4)
    assert not np.allclose(sae(x), state.sae(x), rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(np.linalg.norm(sae.W_dec[...], axis=-1), 1, rtol=1e-6)


def test_geometric_median_is_where_the_distances_are_least(draw):
    """Against SciPy's minimisation, with outliers, to 1e-3. Control: the mean is far from it."""
    x = draw(5, 60, 4)
    x[:6] += 30
    wide = x.astype(np.float64)  # SciPy takes differences of 1e-8
    far = minimize(lambda c: np.linalg.norm(wide - c, axis=-1).sum(), np.median(wide, axis=0), tol=1e-9).x
    np.testing.assert_allclose(geometric_median(jnp.asarray(x)), far, atol=1e-3)
    assert np.abs(x.mean(0) - far).max() > 1


@pytest.mark.parametrize(("config", "data", "model"), [(TOPK, 8, 1), (TOPK, 2, 4), (RELU, 1, 8)])
def test_every_mesh_trains_the_same(mesh, params, config, data, model):
    """Losses and parameters as on one device, to float32; each device holds its share of the latents, Adam's moments
    too. Control: two batches exchanged."""
    state, metrics = train(config, mesh(data, model))
    right, losses = train(config, mesh(1, 1))
    np.testing.assert_allclose([m.loss for m in metrics], [m.loss for m in losses], rtol=1e-4)
    for name, ours in params(state.sae).items():
        np.testing.assert_allclose(ours, params(right.sae)[name], err_msg=name, **CLOSE)
    cut = [leaf for leaf in jax.tree.leaves((state.sae, state.opt)) if leaf.shape == (D, LATENTS)]
    assert len(cut) == 3 and all(len(leaf.sharding.device_set) == data * model for leaf in cut)
    assert {s.data.shape for leaf in cut for s in leaf.addressable_shards} == {(D, LATENTS // model)}
    other = train(config, mesh(1, 1), (0, 2, 1, *range(3, STEPS)))[0]
    assert not np.allclose(params(state.sae)["W_dec"], params(other.sae)["W_dec"], **CLOSE)


def test_the_old_state_is_consumed(mesh):
    """Donation: the large arrays of the state given are gone, those of the state returned are not."""
    one = mesh(1, 1)
    old = begin(TOPK, one)
    new, _ = step_of(TOPK, one)(old, jnp.asarray(BATCHES[0]))
    large = [[leaf for leaf in jax.tree.leaves(s) if leaf.size >= D * LATENTS] for s in (old, new)]
    assert all(leaf.is_deleted() for leaf in large[0]) and not any(leaf.is_deleted() for leaf in large[1])


def mean_best_cosine(rows, truth):
    """Of each true feature with the decoder row most like it."""
    rows = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return (truth @ rows.T).max(-1).mean()


@pytest.mark.parametrize(
    "config", [SAEConfig(k=3, lr=0.02), SAEConfig(sparsity="relu", l1=0.1, lr=0.02)], ids=["topk", "relu"]
)
def test_a_planted_dictionary_is_found(mesh, config):
    """32 true directions in 16 dimensions, 3 at a time: the mean best cosine rises from below 0.65 to above 0.8 and
    fvu falls to a fifth of the first. Control: the cosine before training."""
    rng, one, steps = np.random.default_rng(0), mesh(1, 1), 400
    truth = rng.standard_normal((32, 16))
    truth /= np.linalg.norm(truth, axis=-1, keepdims=True)

    def sample():
        chosen = np.argsort(rng.random((128, 32)), axis=-1)[:, :3]
        codes = np.zeros((128, 32))
        np.put_along_axis(codes, chosen, rng.uniform(1, 2, (128, 3)), axis=-1)
        return jnp.asarray(codes @ truth, jnp.float32)

    state, step = start(config, sample(), 64, steps, 0, one), make_step(config, steps, one)
    before, fvu = mean_best_cosine(np.asarray(state.sae.W_dec[...]), truth), []
    for _ in range(steps):
        state, metrics = step(state, sample())
        fvu.append(float(metrics.fvu))
    after = mean_best_cosine(np.asarray(state.sae.W_dec[...]), truth)
    assert before < 0.65 and after > 0.8 and fvu[-1] < fvu[0] / 5, (before, after, fvu[0], fvu[-1])
