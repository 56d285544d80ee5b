"""The dictionary against its formulas in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.errors import UserError
from qsae_jax.mesh import place
from qsae_jax.sae.model import check_width, init_sae, with_sparsity
from qsae_jax.sae.sparsity import BatchTopK, JumpReLU, ReLU, TopK

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def formulas(p, x, k, centred):
    """pre, codes and reconstruction."""
    p = {name: a.astype(np.float64) for name, a in p.items()}
    pre = (x - p["b_dec"] * centred) @ p["W_enc"] + p["b_enc"]
    codes = np.maximum(pre, 0) * (pre >= np.sort(pre, axis=-1)[..., -k, None])
    return pre, codes, codes @ p["W_dec"] + p["b_dec"]


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("sparsity", [ReLU(), TopK(3)], ids=["relu", "topk"])
@pytest.mark.parametrize("lead", [(), (2, 3)], ids=str)
def test_codes_and_reconstruction(make_sae, draw, params, sparsity, centred, lead):
    """To 1e-5 in float32, for any leading shape. Control: the other convention of `centred` differs."""
    sae, x = make_sae(sparsity, centred=centred), draw(9, *lead, 8)
    k = getattr(sparsity, "k", 24)
    for ours, right, wrong in zip(
        (sae.pre(x), sae.encode(x), sae(x)),
        formulas(params(sae), x, k, centred),
        formulas(params(sae), x, k, not centred),
        strict=True,
    ):
        np.testing.assert_allclose(ours, right, **CLOSE)
        assert not np.allclose(ours, wrong, **CLOSE)


def test_bf16_activations_are_read_in_float32(make_sae, draw):
    """The codes of bf16 activations are those of the same numbers in float32, bit for bit. Control: bf16 products."""
    sae, x = make_sae(ReLU()), jnp.asarray(draw(9, 5, 8), jnp.bfloat16)
    codes = sae.encode(x)
    assert codes.dtype == jnp.float32 and np.array_equal(codes, sae.encode(x.astype(jnp.float32)))
    rough = (x - sae.b_dec[...].astype(x.dtype)[None]) @ sae.W_enc[...].astype(x.dtype)
    assert not np.allclose(codes, jax.nn.relu(rough + sae.b_enc[...][None]), **CLOSE)


def test_a_new_dictionary_has_unit_rows_and_a_tied_start(draw):
    """Unit decoder rows to float32, the encoder their transpose, b_dec the centre; the seed matters."""
    centre = jnp.asarray(draw(1, 8))
    sae = init_sae(TopK(2), 24, 8, centre, jax.random.key(3))
    np.testing.assert_allclose(np.linalg.norm(sae.W_dec[...], axis=-1), 1, rtol=1e-6)
    assert np.array_equal(sae.W_enc[...], sae.W_dec[...].T) and np.array_equal(sae.b_dec[...], centre)
    assert not np.any(sae.b_enc[...]) and (sae.d, sae.latents) == (8, 24)
    other = init_sae(TopK(2), 24, 8, centre, jax.random.key(4))
    assert not np.allclose(sae.W_dec[...], other.W_dec[...])


@pytest.mark.parametrize("sparsity", [ReLU(), TopK(3)], ids=["relu", "topk"])
def test_sharded_on_latents_is_the_same(make_sae, draw, mesh, sparsity):
    """On a 2x4 mesh each device holds 6 of 24 latents; codes and reconstruction as on one device, to 1e-5."""
    sae, x = make_sae(sparsity), draw(9, 5, 8)
    cut = place(sae, mesh(2, 4))
    assert {s.data.shape for s in cut.W_enc[...].addressable_shards} == {(8, 6)}
    assert {s.data.shape for s in cut.W_dec[...].addressable_shards} == {(6, 8)}
    assert {s.data.shape for s in sae.W_enc[...].addressable_shards} == {(8, 24)}  # the control
    np.testing.assert_allclose(cut.encode(x), sae.encode(x), **CLOSE)
    np.testing.assert_allclose(cut(x), sae(x), **CLOSE)


def test_a_dictionary_of_another_width_is_refused(make_sae):
    check_width(make_sae(ReLU()), 8, "blocks.0.resid_post")
    with pytest.raises(UserError, match=r"width 8.*blocks\.0\.resid_post.*width 9"):
        check_width(make_sae(ReLU()), 9, "blocks.0.resid_post")


def test_other_codes_leave_arrays_and_settings_apart():
    """From thresholds, which are arrays, to a number of codes, which is none, and back: jitted either way. Control: a
    number put where thresholds were is taken for an array."""
    sae = init_sae(ReLU(), 24, 8, jnp.zeros(8), jax.random.key(3))
    jumping = with_sparsity(sae, JumpReLU(jnp.ones(24)))
    chosen = with_sparsity(jumping, BatchTopK(3.0))
    again = with_sparsity(chosen, JumpReLU(jnp.ones(24)))
    assert [len(jax.tree.leaves(one)) for one in (sae, jumping, chosen, again)] == [4, 5, 4, 5]
    x = jnp.ones((5, 8))
    assert np.array_equal(jax.jit(lambda sae: sae(x))(again), jumping(x))
    jumping.sparsity = BatchTopK(3.0)
    assert any(isinstance(leaf, BatchTopK) for leaf in jax.tree.leaves(jumping))
