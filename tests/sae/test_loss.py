"""Losses and their gradients against PyTorch in float64, written from the papers (see conftest)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.sae.loss import auxk, dense_pass, mse, topk_pass
from qsae_jax.sae.sparsity import ReLU, TopK

CLOSE = {"rtol": 2e-5, "atol": 2e-5}  # float32 against float64, gradients of order 1
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
K, AUX, L1 = 3, 0.37, 0.23
DEAD = np.array([1, 4, 5, 9, 13, 20, 22])


def mask(dead):
    return jnp.zeros(24, bool).at[jnp.asarray(dead, int)].set(True)


def topk_total(sae, x, dead, k_aux):
    """The TopK objective as training puts it together."""
    passed = topk_pass(sae, x)
    return mse(passed.error) + AUX * auxk(sae, x, passed.error, dead, k_aux)


def relu_total(sae, x):
    passed = dense_pass(sae, x)
    return mse(passed.error) + L1 * passed.penalty


@pytest.fixture
def ours(params):
    """`ours(loss, sae, ...)`: value, and gradients by name."""

    def run(loss, *args):
        value, grads = jax.jit(jax.value_and_grad(loss), static_argnums=range(3, len(args)))(*args)
        return float(value), params(grads)

    return run


@pytest.fixture
def theirs(params, oracle):
    """`theirs(loss, sae, x)`: the same of the oracle."""

    def run(loss, sae, x):
        p = oracle.tensors(params(sae))
        value = loss(p, oracle.tensor(x))[0]
        value.backward()
        return value.item(), oracle.grads(p)

    return run


def same(one, two):
    return np.isclose(one[0], two[0], **CLOSE) and all(np.allclose(one[1][n], two[1][n], **CLOSE) for n in NAMES)


@pytest.mark.parametrize(("dead", "k_aux"), [(DEAD, 2), (DEAD[:3], 5)], ids=["many", "few"])
def test_topk_with_auxk_is_the_papers(make_sae, draw, ours, theirs, oracle, dead, k_aux):
    """Value and four gradients, with more and with fewer dead latents than k_aux. Controls: another coefficient,
    another k, another number of auxiliary latents."""
    sae, x = make_sae(TopK(K)), jnp.asarray(draw(7, 12, 8))
    got = ours(topk_total, sae, x, mask(dead), k_aux)

    def paper(k=K, aux=AUX, k_aux=k_aux):
        return theirs(lambda p, x: oracle.topk(p, x, k, aux, k_aux, dead), sae, x)

    assert same(got, paper())
    assert not any(same(got, wrong) for wrong in (paper(aux=1 / 32), paper(k=K + 1), paper(k_aux=1)))


def test_relu_with_l1_is_the_papers(make_sae, draw, ours, theirs, oracle):
    """Value and four gradients. Controls: another coefficient; the L1 of codes without the norms of decoder rows."""
    sae, x = make_sae(ReLU()), jnp.asarray(draw(7, 12, 8))
    got = ours(relu_total, sae, x)

    def bare(p, x):
        loss, codes, _ = oracle.relu(p, x, 0.0)
        return (loss + L1 * codes.sum(-1).mean(),)

    assert same(got, theirs(lambda p, x: oracle.relu(p, x, L1), sae, x))
    assert not same(got, theirs(lambda p, x: oracle.relu(p, x, 0.1), sae, x))
    assert not same(got, theirs(bare, sae, x))


def test_auxk_uses_only_dead_latents(make_sae, draw, params):
    """The gradient reaches dead latents alone, and no b_dec through the decoder. Control: all latents dead."""
    sae, x = make_sae(TopK(K)), jnp.asarray(draw(7, 12, 8))
    grads = jax.jit(jax.grad(lambda sae, dead: auxk(sae, x, topk_pass(sae, x).error, dead, 5)))
    some, every = params(grads(sae, mask(DEAD))), params(grads(sae, mask(range(24))))
    alive = np.setdiff1d(np.arange(24), DEAD)
    for at in (lambda p: p["W_enc"][:, alive], lambda p: p["b_enc"][alive], lambda p: p["W_dec"][alive]):
        assert not np.any(at(some)) and np.any(at(every))
    assert np.any(some["W_enc"][:, DEAD]) and np.any(some["W_dec"][DEAD])


def test_auxk_leaves_the_residual_alone(make_sae, draw):
    """The residual is a constant: no gradient through it. Control: the square of the same residual has one."""
    sae, x = make_sae(TopK(K)), jnp.asarray(draw(7, 12, 8))
    error = topk_pass(sae, x).error
    assert not np.any(jax.grad(lambda e: auxk(sae, x, e, mask(DEAD), 5))(error))
    assert np.any(jax.grad(mse)(error))


def test_fast_and_dense_passes_agree(make_sae, draw, params):
    """Error, firing counts, and the gradients of the mse, float32. Control: another k."""
    x = jnp.asarray(draw(7, 12, 8))

    @jax.jit(static_argnums=0)
    def judged(through, sae):
        passed = through(sae, x)
        return passed.error, passed.fired, jax.grad(lambda sae: mse(through(sae, x).error))(sae)

    fast, dense = judged(topk_pass, make_sae(TopK(K))), judged(dense_pass, make_sae(TopK(K)))
    other = judged(dense_pass, make_sae(TopK(K + 1)))
    np.testing.assert_allclose(fast[0], dense[0], **CLOSE)
    assert np.array_equal(fast[1], dense[1]) and not np.array_equal(fast[1], other[1])
    for name in NAMES:
        np.testing.assert_allclose(params(fast[2])[name], params(dense[2])[name], **CLOSE)
        assert not np.allclose(params(fast[2])[name], params(other[2])[name], **CLOSE)


def test_firing_counts_only_positive_codes(make_sae, draw):
    """Against NumPy, where a bias of -3 makes some of the k chosen negative. Control: k a token is more."""
    sae, x = make_sae(TopK(6)), jnp.asarray(draw(7, 12, 8))
    sae.b_enc[...] = sae.b_enc[...] - 6
    codes = np.asarray(sae.encode(x))
    for through in topk_pass, dense_pass:
        assert np.array_equal(through(sae, x).fired, (codes > 0).sum(0))
    assert 0 < (codes > 0).sum() < 6 * len(x)
