"""Schedules against loops, what is projected after a step, where activations lie, and latents that begin anew."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from qsae_jax.mesh import make_mesh
from qsae_jax.sae.model import SAE
from qsae_jax.sae.optimize import exponent, learning_rate, moved, optimizer, sparsity_rise, without_radial
from qsae_jax.sae.resample import ENCODER, resampled
from qsae_jax.sae.scale import geometric_median, scale_of
from qsae_jax.sae.settings import SAEConfig
from qsae_jax.sae.sparsity import Gated, JumpReLU, ReLU
from qsae_jax.sae.train import make_step, start
from tests.sae import trainer
from tests.sae.oracle import arrays_of

SCHEDULE = SAEConfig(lr=0.7, warmup=0.13, decay=0.41, sparsity_warmup=0.3, p_from=0.2, p_end=0.35, p_steps=4)


@pytest.mark.parametrize("more", [{}, {"schedule": "cosine"}, {"decay": 0.0}, {"warmup": 0.0}], ids=str)
def test_schedules_are_those_of_a_loop(more):
    """Learning rate, penalty and exponent at each of 30 steps, to 1e-6. Controls: one step later; a step without decay
    falls nowhere; the first step of a rise has no learning rate, but some penalty; without a rise it has all."""
    config, steps, at = replace(SCHEDULE, **more), 30, np.arange(30)
    ours = np.asarray([learning_rate(config, steps)(t) for t in at])
    right = np.array([trainer.learning_rate(config, steps, t) for t in at])
    right = right if config.decay else config.lr * np.minimum(at / 3, 1)
    if not config.warmup:
        right[0] = config.lr
    np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-7)
    assert not np.allclose(ours[1:], right[:-1], rtol=1e-3) and ours[0] == (0 if config.warmup else config.lr)
    rise = sparsity_rise(config, steps, jnp.asarray(at))
    np.testing.assert_allclose(rise, np.minimum((at + 1) / 9, 1), rtol=1e-6)
    p, made = exponent(config, steps, jnp.asarray(at))
    np.testing.assert_allclose(p, [trainer.exponents(config, steps, t) for t in at], rtol=1e-6)
    assert p[0] == 1 and np.isclose(p[-1], 0.35) and set(np.asarray(made).tolist()) == {0, 1, 2, 3, 4}


def test_no_step_goes_along_a_unit_row(make_sae):
    """The decoder's gradient is at right angles to its rows, and the rest of it untouched. Control: before."""
    sae = make_sae(ReLU())
    rows = np.asarray(sae.W_dec[...])
    rows = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    sae.W_dec.set_value(jnp.asarray(rows))
    given = make_sae(ReLU(), seed=9)
    before = np.array(given.W_dec[...])
    after = np.asarray(without_radial(sae, given).W_dec[...])
    assert np.abs((after * rows).sum(-1)).max() < 1e-6 < np.abs((before * rows).sum(-1)).min()
    np.testing.assert_allclose(after, before - (before * rows).sum(-1, keepdims=True) * rows, rtol=1e-5, atol=1e-6)


def test_a_threshold_stops_at_zero_and_comes_back(make_sae):
    """A step that would take thresholds below 0 leaves them at 0, and the next one up is whole: the gradient is not
    cut. `threshold_lr` is theirs alone. Control: without the projection the second step would end lower."""
    config = SAEConfig(sparsity="jumprelu", penalty="tanh", lr=0.1, threshold_lr=0.4, warmup=0.25, decay=0, beta1=0)
    sae: Any
    tx, sae = optimizer(config, 4), make_sae(JumpReLU(jnp.full(24, 0.3), 0.1))
    opt, seen = tx.init(sae), []
    for sign in 1.0, 1.0, -1.0:  # the first has no learning rate
        grads = jax.tree.map(lambda a, s=sign: jnp.full_like(a, s), sae)
        sae, opt = moved(config, tx, sae, grads, opt)
        seen.append((float(sae.sparsity.threshold[0]), float(sae.b_enc[0])))
    np.testing.assert_allclose([t for t, _ in seen], [0.3, 0, 0.4], atol=1e-5)
    np.testing.assert_allclose(seen[1][1] - seen[0][1], -0.1, atol=1e-5)


def test_scales_are_what_they_say(draw):
    """Root mean square norm; mean norm over the root of d; none; of twins each its own. Control: the first two differ
    by more than the root of d."""
    x, y = 3 * draw(1, 40, 4) + 1, 7 * draw(2, 40, 6)
    norms = np.linalg.norm(x, axis=-1)
    unit, root, none = (scale_of(SAEConfig(normalize=n), [jnp.asarray(x)]) for n in ("unit", "sqrt_d", "none"))
    np.testing.assert_allclose([unit, root, none], [(norms**2).mean() ** 0.5, norms.mean() / 2, 1], rtol=1e-6)
    assert not np.isclose(unit, 2 * root, rtol=1e-3)
    both = scale_of(SAEConfig(), [jnp.asarray(x), jnp.asarray(y)])
    np.testing.assert_allclose(both, np.repeat([unit, (y**2).sum(-1).mean() ** 0.5], [4, 6]), rtol=1e-6)


def test_geometric_median_is_where_the_distances_are_least(draw):
    """Against SciPy's minimisation, with outliers, to 1e-3. Control: the mean is far from it."""
    x = draw(5, 60, 4)
    x[:6] += 30
    wide = x.astype(np.float64)  # SciPy takes differences of 1e-8
    far = minimize(lambda c: np.linalg.norm(wide - c, axis=-1).sum(), np.median(wide, axis=0), tol=1e-9).x
    np.testing.assert_allclose(geometric_median(jnp.asarray(x)), far, atol=1e-3)
    assert np.abs(x.mean(0) - far).max() > 1


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated"])
def test_dead_latents_begin_anew_at_a_token(draw, kind):
    """Each dead row writes a token less b_dec, at length 1, and reads it at a fifth of the mean length of living rows;
    biases begin at 0, thresholds where they began, and Adam forgets these rows alone. Control: the living stay."""
    m, d, dead = 24, 8, np.isin(np.arange(24), [2, 3, 11, 19])
    own = {"relu": ReLU(), "jumprelu": JumpReLU(jnp.asarray(draw(5, m))), "gated": Gated(*jnp.asarray(draw(5, 3, m)))}
    bias = None if kind == "gated" else jnp.asarray(draw(4, m))
    W_enc, W_dec, b_dec = (jnp.asarray(draw(i, *shape)) for i, shape in enumerate([(d, m), (m, d), (d,)]))
    sae = SAE(own[kind], W_enc, bias, W_dec, b_dec)
    opt: Any = jax.tree.map(lambda a: a + 1, optimizer(SAEConfig(), 9).init(sae))
    x, error = jnp.asarray(draw(6, 5, d)), jnp.asarray(draw(7, 5, d))
    forgot: Any
    new, forgot = resampled(sae, opt, jnp.asarray(dead), x, x, error, 0.07, jax.random.key(1))
    before, after = arrays_of(sae), arrays_of(new)
    tokens = np.asarray(x) - before["b_dec"]
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    chosen = (after["W_dec"][dead] @ tokens.T).argmax(-1)
    np.testing.assert_allclose(after["W_dec"][dead], tokens[chosen], rtol=1e-5, atol=1e-6)
    length = ENCODER * np.linalg.norm(before["encoder"][~dead], axis=-1).mean()
    np.testing.assert_allclose(after["encoder"][dead], length * tokens[chosen], rtol=1e-5, atol=1e-6)
    for name in set(before) - {"b_dec"}:
        assert np.array_equal(after[name][~dead], before[name][~dead])
        assert not np.any(after[name][dead] == before[name][dead])
    for name in set(before) - {"b_dec", "encoder", "W_dec"}:
        np.testing.assert_allclose(after[name][dead], 0.07 if name == "threshold" else 0, rtol=1e-6)
    for moments in forgot[0].mu, forgot[0].nu:
        for name, a in arrays_of(moments).items():
            assert np.all(a == 1) if name == "b_dec" else not np.any(a[dead]) and np.all(a[~dead] == 1)


def test_tokens_are_drawn_by_the_square_of_their_loss(draw):
    """4,000 dead latents over tokens with errors of length 1, 2 and 3: shares of 1, 16 and 81 of 98, within 3 standard
    deviations. Controls: in proportion to the loss; in equal shares."""
    n, error = 4000, np.eye(3, dtype=np.float32) * [[1], [2], [3]]
    sae = SAE(ReLU(), jnp.ones((3, n)), jnp.zeros(n), jnp.ones((n, 3)), jnp.zeros(3))
    args = jnp.eye(3), jnp.eye(3), jnp.asarray(error), 0.0, jax.random.key(3)
    new = resampled(sae, optimizer(SAEConfig(), 9).init(sae), jnp.ones(n, bool), *args)[0]
    shares = np.asarray(new.W_dec[...]).mean(0)
    for odds, same in [([1, 16, 81], True), ([1, 4, 9], False), ([1, 1, 1], False)]:
        p = np.array(odds) / sum(odds)
        assert np.all(np.abs(shares - p) < 3 * np.sqrt(p * (1 - p) / n)) == same


def test_they_begin_anew_when_it_is_time(draw):
    """Every 48 tokens: after three steps of 16, of those that have not fired for 16 tokens, whose silence begins again.
    Control: after the second step silence goes on."""
    config = SAEConfig(sparsity="relu", resample=48, dead_after=16, normalize="none", centre="zero", lr=1e-4)
    x, mesh = jnp.asarray(draw(1, 16, 8)), make_mesh(1, 1)
    state: Any
    state, step, silent = start(config, [x], 24, 4, 0, mesh), make_step(config, 4, mesh), []
    dead = np.arange(24) % 4 == 0
    state.sae.b_enc.set_value(jnp.where(dead, -100.0, 0.1))
    for _ in range(3):
        state, _ = step(state, x)
        silent.append(np.asarray(state.silent))
    assert np.all(silent[1][dead] == 32) and np.all(silent[2][dead] == 0)
    assert not np.any(np.asarray(state.sae.b_enc[...])[dead]) and np.all(np.asarray(state.sae.b_enc[...])[~dead] > 0)
