"""Adaptations beside float64 NumPy and scikit-learn, and planted changes that each of them undoes or must not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge

from qsae_jax.compare.adapt import CLOSED, PRIOR, RIDGE, adapted, kept, nonsense
from qsae_jax.errors import UserError
from qsae_jax.sae.model import SAE, layer_norm
from qsae_jax.sae.sparsity import Gated, JumpReLU, ReLU, TopK

D, M, N = 20, 24, 3000
KINDS = ("topk", "jumprelu", "relu", "gated")


@pytest.fixture(scope="module")
def world():
    """Activations made of a few directions, most of them nearly orthogonal, and the directions."""
    rng = np.random.default_rng(0)
    rows = np.concatenate([np.linalg.qr(rng.normal(size=(D, D)))[0], rng.normal(size=(M - D, D))])
    rows = rows + 0.03 * rng.normal(size=rows.shape)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    codes = (rng.random((N, M)) < 0.12) * rng.gamma(4, 1, (N, M))
    return codes @ rows + 0.5 * rng.normal(size=D) + 0.05 * rng.normal(size=(N, D)), rows


@pytest.fixture(scope="module")
def made(world):
    x, rows = world

    def make(kind: str, centred: bool = True, norm=None) -> SAE:
        sparsity = {
            "topk": lambda: TopK(4),
            "jumprelu": lambda: JumpReLU(np.linspace(0.8, 1.6, M)),
            "relu": ReLU,
            "gated": lambda: Gated(np.full(M, -0.8), np.full(M, -0.1), np.linspace(-0.1, 0.1, M)),
        }[kind]()
        b_enc = None if kind == "gated" else np.linspace(-0.3, 0.1, M)
        arrays = [None if a is None else jnp.asarray(a, jnp.float32)
                  for a in (0.9 * rows.T, b_enc, rows, 0.8 * x.mean(0))]  # fmt: skip
        return SAE(sparsity, *arrays, centred=centred, norm=norm)

    return make


def f32(x):
    return jnp.asarray(x, jnp.float32)


def fvu(sae, x):
    return float(((x - np.asarray(sae(f32(x)))) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())


def changed(x, what):
    rng = np.random.default_rng(5)
    shift, u, v = rng.normal(size=(3, D))
    rotation = np.linalg.qr(rng.normal(size=(D, D)))[0]
    return {
        "same": x,
        "shift": x + 2 * shift,
        "both": 1.6 * x + shift,
        "rank1": x + 0.15 * np.outer(x @ u, v),
        "rotation": x @ rotation,
    }[what]


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_shift_is_undone_by_biases(kind, centred, made, world):
    """The same codes on the shifted activations as on those at home, and the same errors but for their mean."""
    x, sae = world[0], made(kind, centred)
    y = changed(x, "shift")
    one = adapted(sae, f32(x), f32(y))["biases"]
    np.testing.assert_allclose(one.encode(f32(y)), sae.encode(f32(x)), atol=2e-4)
    assert abs((y - np.asarray(one(f32(y)))).mean(0)).max() < 1e-4
    assert fvu(one, y) == pytest.approx(fvu(adapted(sae, f32(x), f32(x))["biases"], x), rel=1e-3)
    assert fvu(sae, y) > fvu(one, y) + 0.3  # the control: what was carried over does not have it


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_follow_a_scale(kind, made, world):
    """Activations 1.6 times as large fire as often; without new thresholds they do not."""
    x, sae = world[0], made(kind)
    y = changed(x, "both")
    one = adapted(sae, f32(x), f32(y))["biases"]
    at_home, here = (np.asarray(s.encode(f32(a)) > 0) for s, a in ((sae, x), (one, y)))
    if kind == "topk":  # chooses by rank: no threshold to move
        assert here.sum() == pytest.approx(at_home.sum(), rel=0.02)
    else:
        assert (at_home == here).mean() > 0.999
        assert (at_home == np.asarray(sae.encode(f32(y)) > 0)).mean() < 0.98


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what, cure", [("both", "gain"), ("rank1", "lowrank"), ("rotation", "affine")])
def test_each_change_has_its_cure(kind, what, cure, made, world):
    """As good as the same adaptation at home; a cheaper one is not, but for the scale, which the others undo too."""
    x, sae = world[0], made(kind)
    y = changed(x, what)
    home = fvu(adapted(sae, f32(x), f32(x), rank=2)[cure], x)
    found = {name: fvu(one, y) for name, one in adapted(sae, f32(x), f32(y), rank=2).items()}
    assert list(found) == list(CLOSED)
    assert found[cure] == pytest.approx(home, rel=0.25, abs=0.02)
    assert found[CLOSED[CLOSED.index(cure) - 1]] > found[cure] + 0.02


def test_a_rotation_is_another_dictionary(made, world):
    x, sae = world[0], made("topk")
    found = {what: adapted(sae, f32(x), f32(changed(x, what)), rank=2) for what in ("both", "rotation")}
    assert kept(sae, found["both"]["affine"]) > 0.99 and kept(sae, found["rotation"]["affine"]) < 0.5
    assert kept(sae, found["rotation"]["gain"]) == pytest.approx(1)
    W = np.asarray(sae.W_dec[...])
    other = np.asarray(found["rotation"]["affine"].W_dec[...])
    slow = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(W, other, strict=True)])
    assert kept(sae, found["rotation"]["affine"]) == pytest.approx(slow, abs=1e-5)


def test_gains_are_those_of_least_squares(made, world):
    """Beside a solution by lstsq of the whole design, prior included; the control has no prior."""
    x, sae = world[0], made("jumprelu")
    y = changed(x, "rank1")
    found = adapted(sae, f32(x), f32(y))
    z = np.asarray(found["biases"].encode(f32(y)), np.float64)
    W = np.asarray(found["biases"].W_dec[...], np.float64)
    design = (z[:, :, None] * W[None]).transpose(0, 2, 1)
    design = (design - design.mean(0)).reshape(-1, M)
    left = y - z @ W
    goal = (left - left.mean(0)).reshape(-1)
    count, power = (z > 0).sum(0), (z**2).sum(0) * (W**2).sum(1)
    prior = np.diag(np.sqrt(PRIOR * power / count))
    more = np.linalg.lstsq(np.vstack([design, prior]), np.concatenate([goal, np.zeros(M)]), rcond=None)[0]
    got = np.linalg.norm(np.asarray(found["gain"].W_dec[...]), axis=1) / np.linalg.norm(W, axis=1)
    np.testing.assert_allclose(got, 1 + more, atol=2e-4)
    free = np.linalg.lstsq(design, goal, rcond=None)[0]
    assert abs(got - 1 - free).max() > 2e-3
    b_dec = left.mean(0) - (more * z.mean(0)) @ W
    np.testing.assert_allclose(np.asarray(found["gain"].b_dec[...]), b_dec, atol=5e-4)


def test_the_map_is_ridge_regression(made, world):
    """The encoder of `affine` reads what scikit-learn's ridge makes of the twin's activations."""
    x, sae = world[0], made("topk")
    y = changed(x, "rank1") + 0.3 * np.random.default_rng(1).normal(size=x.shape)
    one = adapted(sae, f32(x), f32(y))["affine"]
    ridge = Ridge(alpha=RIDGE * np.median(np.var(y, axis=0)) * N).fit(y, x - y)
    read = y + ridge.predict(y)
    np.testing.assert_allclose(one.pre(f32(y)), sae.pre(f32(read)), atol=2e-3)
    assert abs(np.asarray(one.pre(f32(y))) - np.asarray(sae.pre(f32(y)))).max() > 0.1


def test_a_dictionary_that_normalises_reads_normalised_activations(made, world):
    x, sae = world[0], made("topk", norm=layer_norm)
    y = 3 * x  # undone by the norm already
    found = adapted(sae, f32(x), f32(y))
    np.testing.assert_allclose(found["affine"].encode(f32(y)), sae.encode(f32(x)), atol=2e-3)
    assert found["affine"].norm is layer_norm


def test_too_few_tokens_are_refused(made, world):
    with pytest.raises(UserError, match="24 tokens are too few"):
        adapted(made("topk"), f32(world[0][:24]), f32(world[0][:24]))


@pytest.mark.parametrize("kind", KINDS)
def test_nonsense_fires_about_as_often(kind, made, world):
    x, sae = world[0], made(kind)
    random = nonsense(sae, f32(x))
    rates = [float((np.asarray(s.encode(f32(x))) > 0).mean()) for s in (sae, random)]
    assert rates[1] == pytest.approx(rates[0], rel=0.15 if kind == "topk" else 0.02)
    assert fvu(random, x) > fvu(sae, x) and abs(kept(sae, random)) < 0.3
    np.testing.assert_array_equal(nonsense(sae, f32(x), 0).W_dec[...], random.W_dec[...])
    assert not np.array_equal(nonsense(sae, f32(x), 1).W_dec[...], random.W_dec[...])


def test_on_a_mesh_of_latents(made, world):
    from qsae_jax.mesh import make_mesh, place

    x, sae = world[0], made("jumprelu")
    y = changed(x, "both")
    whole, cut = (adapted(s, f32(x), f32(y))["affine"] for s in (sae, place(sae, make_mesh(1, 8))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), whole, cut)
