"""Likeness of two dictionaries on two models, beside NumPy on whole arrays."""

import numpy as np
import pytest

from qsae_jax import capture, fake_quantize
from qsae_jax.compare import likeness
from qsae_jax.compare.likeness import figures, named, together
from qsae_jax.lm.tap import check_point
from qsae_jax.mesh import make_mesh

POINT, SKIP = "blocks.1.resid_post", 3


def codes(lm, sae, ids):
    x = np.asarray(capture(lm, POINT)(ids))[:, SKIP:].reshape(-1, 16)
    return np.asarray(sae.encode(x), np.float64)


def pearson(a, b):
    with np.errstate(invalid="ignore"):
        r = np.corrcoef(a.T, b.T)[: a.shape[1], a.shape[1] :]
    return np.where((a.std(0) > 0)[:, None] & (b.std(0) > 0)[None], r, np.nan)


def test_codes_of_two_models_are_correlated_over_the_same_tokens(tiny_lm, tiny_sae, tiny_windows, monkeypatch):
    """Each dictionary on its own model, over the first TOKENS only, in batches that leave a part over. Controls: the
    models exchanged, and one window more."""
    monkeypatch.setattr(likeness, "TOKENS", 7 * 16 + 5)
    windows, twin, saes = tiny_windows(9), fake_quantize(tiny_lm, "int2"), (tiny_sae(0), tiny_sae(1))
    point, mesh = check_point(tiny_lm, POINT), make_mesh(1, 1)
    r = together((tiny_lm, twin), saes, windows, point, mesh, SKIP, 4, lambda: False)
    ids = windows.ids[:7]
    assert r == pytest.approx(pearson(codes(tiny_lm, saes[0], ids), codes(twin, saes[1], ids)), abs=2e-5, nan_ok=True)
    for lms, some in (((twin, tiny_lm), ids), ((tiny_lm, twin), windows.ids[:8])):
        other = pearson(*(codes(lm, sae, some) for lm, sae in zip(lms, saes, strict=True)))
        assert np.nanmax(np.abs(other - r)) > 1e-2


def test_the_figures_are_of_latents_that_fire(tiny_sae):
    """A dictionary beside itself is all alike; one latent that never fired is in no share. Control: another one."""
    sae, fired = tiny_sae(0), np.arange(32)
    r = np.eye(32)
    r[0] = r[:, 0] = np.nan
    same = figures(sae, sae, (fired, fired), r)
    assert {same[name] for name in ("mmcs", "mnn_0.5", "mnn", "mnn_0.9", "assigned", "act_r", "act_same")} == {1.0}
    assert same["lost"] == same["new"] == 0
    other = figures(sae, tiny_sae(1), (fired, fired), np.zeros((32, 32)))
    assert other["mmcs"] < 0.9 and other["mnn_0.9"] < 0.1 and other["lost"] > 0.5 and other["act_same"] == 0


def test_fates_are_named_by_how_often_they_fire(tiny_sae):
    """The most frequent first, at most SHOWN, and none that does not fire."""
    rng = np.random.default_rng(0)
    fired = rng.permutation(32), rng.permutation(32)
    found = named(tiny_sae(0), tiny_sae(1), fired)
    for fate, side in (("lost", 0), ("new", 1)):
        tokens = [one["tokens"] for one in found[fate]]
        assert tokens == sorted(tokens, reverse=True) and 0 not in tokens and len(tokens) > 5
        assert [fired[side][one["feature"]] for one in found[fate]] == tokens
