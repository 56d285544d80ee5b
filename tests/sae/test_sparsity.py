"""Each sparsity against slow NumPy, straight-through gradients against their formulas, and scales that go through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.sae.loss import l0, step
from qsae_jax.sae.sparsity import BatchTopK, Gated, JumpReLU, ReLU, TopK, jump

RUN, OWN = jax.jit(lambda s, pre: s(pre), static_argnums=0), jax.jit(lambda s, pre: s(pre))


def codes_of(sparsity, pre):
    """Compiled: those without parameters as constants."""
    return (OWN if isinstance(sparsity, JumpReLU | Gated) else RUN)(sparsity, jnp.asarray(pre))


M, WIDTH = 12, 0.6
THETA = np.linspace(0.05, 0.9, M, dtype=np.float32)


@pytest.fixture
def pre(draw):
    """Pre-activations `[2, 7, m]`, of which some are within the kernel on either side of their threshold."""
    return draw(2, 2, 7, M) + 0.3


@pytest.fixture
def gated(draw):
    return [0.5 * draw(seed, M) for seed in (4, 5, 6)]


def topk(pre, k):
    return np.where(pre >= np.sort(pre, axis=-1)[..., -k, None], np.maximum(pre, 0), 0)


def batchtopk(pre, n):
    return np.where(pre >= np.sort(pre, axis=None)[-n], np.maximum(pre, 0), 0)


def gate(pre, b_gate, b_mag, r_mag):
    return np.where(pre + b_gate > 0, np.maximum(pre * np.exp(r_mag) + b_mag, 0), 0)


def test_codes_are_those_of_numpy(pre, gated):
    """Bit for bit, the gate's sizes to 1e-6, for two leading dimensions. Controls: k + 1; a batch's k one row at a
    time; thresholds a tenth higher; the gate's and the size's biases exchanged."""
    cases = [
        (ReLU(), np.maximum(pre, 0), np.abs(pre)),
        (TopK(3), topk(pre, 3), topk(pre, 4)),
        (BatchTopK(2.5), batchtopk(pre, 35), np.stack([batchtopk(row, 2) for row in pre.reshape(-1, M)])),
        (JumpReLU(jnp.asarray(THETA)), np.where(pre > THETA, pre, 0), np.where(pre > THETA + 0.1, pre, 0)),
        (Gated(*gated), gate(pre, *gated), gate(pre, gated[1], gated[0], gated[2])),
    ]
    for sparsity, right, wrong in cases:
        codes = codes_of(sparsity, pre)
        np.testing.assert_allclose(codes, right, rtol=1e-6, atol=1e-7 * (sparsity.name == "gated"))
        assert codes.shape == pre.shape and not np.allclose(codes, wrong.reshape(pre.shape)), sparsity.name


def test_negative_values_give_no_code():
    """Two positives where three are taken; a threshold below 0. Controls: what the cut takes away."""
    pre = jnp.array([[1.0, -2.0, 3.0, -4.0]])
    assert np.array_equal(codes_of(TopK(3), pre), [[1, 0, 3, 0]]) and float(np.sort(pre)[0, -3]) == -2
    assert np.array_equal(codes_of(BatchTopK(3), pre), [[1, 0, 3, 0]])
    low = JumpReLU(jnp.full(4, -2.5))
    assert np.array_equal(codes_of(low, pre), [[1, 0, 3, 0]]) and np.array_equal(
        np.where(pre > -2.5, pre, 0), [[1, -2, 3, 0]]
    )
    grad = jax.jit(jax.grad(lambda pre: jnp.sum(low(pre))))(pre)
    assert np.array_equal(grad, [[1, 0, 1, 0]])


def test_a_batchtopk_code_depends_on_the_batch(pre):
    """The same row beside larger ones loses codes; TopK's does not. k times the rows are taken, rounded down."""
    row, rest = pre[:, :1], pre[:, 1:] + 5
    both = np.concatenate([row, rest], axis=1)
    assert not np.array_equal(codes_of(BatchTopK(2), both)[:, 0], codes_of(BatchTopK(2), row)[:, 0])
    assert np.array_equal(codes_of(TopK(2), both)[:, 0], topk(row, 2)[:, 0])
    for k, n in [(2.5, 35), (0.01, 1)]:  # of 14 rows; at least one
        assert (np.asarray(codes_of(BatchTopK(k), pre + 9)) > 0).sum() == n


def kernel(pre):
    return (np.abs((pre - THETA) / WIDTH) < 0.5).astype(float)


def test_jumprelu_gradients_are_the_papers(pre, draw):
    """`-(theta/eps) K((z - theta)/eps)` summed over the batch, and the hard mask for z, float32 to 1e-5. Controls: the
    upper half of the kernel alone (what a ReLU on top of the codes leaves), and no theta."""
    g = draw(3, 2, 7, M)
    sparsity = JumpReLU(jnp.asarray(THETA), WIDTH)
    to_pre, grads = jax.jit(jax.grad(lambda pre, s: jnp.sum(g * s(pre)), (0, 1)))(jnp.asarray(pre), sparsity)
    right = (-THETA / WIDTH * kernel(pre) * g).sum((0, 1))
    np.testing.assert_allclose(grads.threshold[...], right, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(to_pre, g * (pre > THETA), rtol=1e-6)
    upper = (-THETA / WIDTH * kernel(pre) * (pre > THETA) * g).sum((0, 1))
    assert not np.allclose(right, upper, rtol=1e-2) and not np.allclose(right, right / THETA, rtol=1e-2)


def test_step_gradients_are_the_papers(pre, draw):
    """`-(1/eps) K((z - theta)/eps)` on pre-activations, none for z, float32 to 1e-5. Control: the step of codes, as in
    dictionary_learning, sees the upper half of the kernel (and codes of 0 where theta < eps/2)."""
    rows, g = pre.reshape(-1, M), draw(3, 14)
    value, pull = jax.vjp(lambda z, t: l0(z, t, WIDTH), jnp.asarray(rows), jnp.asarray(THETA))
    to_pre, to_threshold = pull(jnp.asarray(g))
    assert np.array_equal(value, (rows > THETA).sum(-1)) and not np.any(to_pre)
    right = (-kernel(rows) / WIDTH * g[:, None]).sum(0)
    np.testing.assert_allclose(to_threshold, right, rtol=1e-5, atol=1e-5)
    codes = JumpReLU(jnp.asarray(THETA))(jnp.asarray(rows))
    (wrong,) = jax.vjp(lambda t: l0(codes, t, WIDTH), jnp.asarray(THETA))[1](jnp.asarray(g))
    assert not np.allclose(wrong, right, rtol=1e-2)


def test_both_steps_have_the_width_of_their_kernel():
    """Half a bandwidth on either side of the threshold and no further. Control: a wider kernel sees the others."""
    z, theta = jnp.array([[0.701], [0.79], [1.0], [1.2], [1.299]]), jnp.ones((1, 1))

    def seen(f, width):
        each = jax.vmap(lambda z: jax.grad(lambda t: jnp.sum(f(z[None], t, width)))(theta)[0, 0])
        return np.asarray(jax.jit(each)(z)) != 0

    for f in jump, step:
        assert np.array_equal(seen(f, 0.41), [False, False, True, True, False])
        assert np.all(seen(f, 0.61))


@pytest.mark.parametrize("each", [False, True], ids=["number", "per latent"])
def test_scaled_is_the_sparsity_of_larger_pre_activations(pre, gated, each):
    """`scaled(c)(c pre) = c codes` to 1e-6, for a number and (without ranks across latents) for one each. Control: not
    scaled."""
    c = jnp.asarray(np.linspace(0.3, 4, M, dtype=np.float32) if each else np.float32(3.7))
    pre, along = jnp.asarray(pre), c.reshape(1, 1, -1) if each else c
    threshold, gates = JumpReLU(jnp.asarray(THETA), WIDTH), Gated(*gated)
    for sparsity in [ReLU(), threshold, gates] if each else [ReLU(), TopK(3), BatchTopK(2), threshold, gates]:
        new = sparsity.scaled(c)
        np.testing.assert_allclose(codes_of(new, along * pre), along * codes_of(sparsity, pre), rtol=1e-6, atol=1e-6)
        assert isinstance(sparsity, ReLU | TopK | BatchTopK) or not np.allclose(
            codes_of(sparsity, along * pre), along * codes_of(sparsity, pre), rtol=1e-3
        )
    assert threshold.scaled(c).bandwidth == WIDTH
