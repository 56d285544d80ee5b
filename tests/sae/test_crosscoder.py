"""What tells shared latents from those of one twin, on a crosscoder that is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.sae.crosscoder import Scaling, home, relative_norms, told_apart
from qsae_jax.sae.model import SAE
from qsae_jax.sae.sparsity import ReLU

D, M = 6, 5


@pytest.fixture
def made(draw):
    """Latent 0 has the same row in both twins, latent 1 only one in the first, latent 2 half of it in the second; the
    others differ. Activations are made of codes that the encoder reads back from one more coordinate each."""
    rows = draw(1, M, 2, D)
    rows[0, 1], rows[1, 1], rows[2, 1] = rows[0, 0], 0, rows[2, 0] / 2
    W_enc = draw(2, 2 * D, M)
    return SAE(ReLU(), *map(jnp.asarray, (W_enc, draw(3, M), rows.reshape(M, 2 * D), draw(4, 2 * D)))), rows


def test_relative_norms(made):
    sae, rows = made
    lengths = np.linalg.norm(rows, axis=-1).T
    np.testing.assert_allclose(relative_norms(sae), lengths / lengths.max(0), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(relative_norms(sae))[:, :3], [[1, 1, 1], [1, 0, 0.5]], rtol=1e-6)


def test_betas_are_the_least_squares(made, draw):
    """Each latent and twin against numpy.linalg.lstsq on what the other latents leave, over three batches of sizes that
    differ. Control: the whole activation in its place gives others."""
    sae, rows = made
    x = jnp.asarray(draw(5, 30, 2 * D))
    sums = Scaling.empty(sae)
    for part in (x[:7], x[7:8], x[8:]):
        sums = sums.add(sae, part)
    betas, codes = np.asarray(sums.betas(sae)), np.asarray(sae.encode(x), np.float64)
    error, own = np.asarray(x - sae(x)).reshape(30, 2, D), np.asarray(home(sae, 2))
    for twin in range(2):
        for i in range(M):
            basis = (codes[:, i : i + 1] * own[i]).reshape(-1, 1)
            whole, left = np.asarray(x).reshape(30, 2, D)[:, twin], error[:, twin] + codes[:, i : i + 1] * rows[i, twin]
            for y, same in ((left, True), (whole, False)):
                right = np.linalg.lstsq(basis, y.reshape(-1), rcond=None)[0][0]
                assert np.isclose(betas[twin, i], right, rtol=1e-3, atol=1e-4) == same


def test_shared_and_lone_latents_differ(made, draw):
    """Activations that the crosscoder itself makes: beta is 1 in both twins for a shared latent, 0 in the second for
    one that it lacks, a half where its row is half as long."""
    sae, _ = made
    codes = np.abs(draw(6, 40, M))

    class Known(SAE):
        def encode(self, x):
            return jnp.asarray(codes)

    known = Known(ReLU(), sae.W_enc, sae.b_enc[...], sae.W_dec[...], sae.b_dec[...])
    betas = np.asarray(Scaling.empty(known).add(known, known.decode(jnp.asarray(codes))).betas(known))
    np.testing.assert_allclose(betas[:, :3], [[1, 1, 1], [1, 0, 0.5]], atol=1e-4)
    assert np.all(betas[:, 3:].max(0) > 0.99)


def test_told_apart_has_a_row_a_latent(made, draw):
    """Norms, betas and firing rates as computed in one go, over batches. Control: the twins' names exchanged."""
    sae, _ = made
    x = jnp.asarray(draw(7, 24, 2 * D))
    table = told_apart(sae, [x[:8], x[8:]], ["fp", "int4"])
    np.testing.assert_allclose(table["firing_rate"], np.mean(np.asarray(sae.encode(x)) > 0, axis=0))
    betas = np.asarray(Scaling.empty(sae).add(sae, x).betas(sae))
    np.testing.assert_allclose(table["beta int4"], betas[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(table["relative_norm fp"], relative_norms(sae)[0])
    assert not np.allclose(table["beta fp"], betas[1], equal_nan=True)
