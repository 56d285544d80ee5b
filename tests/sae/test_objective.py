"""Every objective and all its gradients against PyTorch in float64, as lists, as dense products and on meshes."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.mesh import make_mesh, on_data
from qsae_jax.products import in_bfloat16
from qsae_jax.sae.levels import edges, levels_for
from qsae_jax.sae.model import SAE, on_mesh
from qsae_jax.sae.objective import Now, make_objective
from qsae_jax.sae.settings import SAEConfig
from qsae_jax.sae.sparsity import Gated, JumpReLU
from qsae_jax.sae.train import make_sparsity
from tests.sae.oracle import arrays_of, loss, tensors_of

B, D, OUT, M = 16, 8, 6, 24
CLOSE: Any = {"rtol": 3e-5, "atol": 3e-5}  # float32 against float64, numbers of order 1 to 100
SCALARS = SAEConfig(
    k=3, groups=(0.25, 0.35, 0.4), l1=0.23, p_end=0.3, p_steps=7, l0=0.31, target_l0=4.5, tanh_scale=0.3,
    pre_act=0.19, bandwidth=0.8, aux=0.37, k_aux=2,
)  # fmt: skip
ROOMS = [[], [5, 23], [1, 9, 20], [1, 4, 5, 9, 13, 20, 22]]
"""No latent dead, as many as k_aux, m / 8, and more: AuxK has a branch for each."""


def case(sparsity, mesh=(1, 1), *, transcodes=False, skip=False, twins=1, fault="", **more):
    config = replace(SCALARS, sparsity=sparsity, **more)
    name = f"{sparsity}-{more.get('penalty', '')}-{mesh[0]}x{mesh[1]}"
    return pytest.param(SimpleNamespace(**{k: v for k, v in locals().items() if k != "more"}), id=name)


CASES = [
    case("topk", fault="b_dec"),
    case("topk", (8, 1), fault="b_dec"),
    case("batchtopk", (2, 4), transcodes=True, skip=True, k=2.6, k_first=6.3, fault="b_dec"),
    case("matryoshka", (1, 8), skip=True, k=2.6, fault="levels"),
    case("topk", (2, 4), transcodes=True, skip=True, k_first=7, fault="attached"),
    case("batchtopk", transcodes=True, skip=True, k=2.6, k_first=6.3, fault="b_dec"),
    case("batchtopk", (1, 8), k=2.6, fault="attached"),
    case("matryoshka", skip=True, k=2.6, fault="levels"),
    case("matryoshka", (2, 4), k=2.6, aux=0.0, fault="levels"),
    case("relu", twins=2, fault="norms"),
    case("p_anneal", transcodes=True, fault="p"),
    case("gated", skip=True, fault="unfrozen"),
    case("jumprelu", penalty="step", fault="codes"),
    case("jumprelu", transcodes=True, skip=True, penalty="tanh", fault="norms"),
    case("jumprelu", penalty="quadratic", fault="codes"),
    case("jumprelu", (1, 8), transcodes=True, penalty="target", fault="codes"),
]


@pytest.fixture
def make(draw):
    """A dictionary of a case with no zero and no unit in it, and what it reads and reconstructs."""

    def one(case):
        out = OUT if case.transcodes else D
        sparsity = make_sparsity(case.config, M)
        if isinstance(sparsity, JumpReLU):
            sparsity = JumpReLU(jnp.linspace(0.1, 0.9, M), case.config.bandwidth)
        if isinstance(sparsity, Gated):
            sparsity = Gated(*(0.5 * draw(seed, M) for seed in (5, 6, 7)))
        W_dec = draw(2, M, out) * np.linspace(0.3, 0.9, M, dtype=np.float32)[:, None]
        bias = None if isinstance(sparsity, Gated) else jnp.asarray(0.5 * draw(1, M))
        W_skip = jnp.asarray(draw(8, D, out)) / 3 if case.skip else None
        W_enc, W_dec, b_dec = (jnp.asarray(a) for a in (draw(0, D, M) / 2, W_dec, draw(3, out) / 2))
        sae = SAE(sparsity, W_enc, bias, W_dec, b_dec, not case.transcodes, W_skip)
        x = draw(9, B, D) + 0.4
        return sae, x, draw(10, B, out) if case.transcodes else x

    return one


@cache
def compiled(config, mesh, twins):
    objective = make_objective(config, levels_for(mesh), twins)

    def value(sae, x, y, now):
        seen = objective(sae, x, y, now)
        return seen.loss, seen

    return jax.jit(jax.value_and_grad(value, has_aux=True))


def at(dead):
    mask = np.isin(np.arange(M), dead)
    return SimpleNamespace(dead=mask, rise=0.7, p=0.6, weight=1.3)


def theirs(torch, case, sae, x, y, now, **fault):
    """Loss, error, codes, gradients."""
    p = tensors_of(torch, arrays_of(sae))
    x, y = (torch.tensor(a, dtype=torch.float64) for a in (x, y))
    total, error, codes = loss(torch, case.config, p, x, y, now, not case.transcodes, case.twins, **fault)
    total.backward()
    grads = {n: np.zeros(t.shape) if t.grad is None else t.grad.numpy() for n, t in p.items()}
    return total.item(), error.detach().numpy(), codes.detach().numpy(), grads


def same(ours, right):
    return all(np.allclose(ours[name], right[name], **CLOSE) for name in right)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_the_papers(torch, mesh, make, case):
    """Loss, error, firing counts, smallest codes, and the gradient of every parameter, to 3e-5: for each branch of
    AuxK, centred or a transcoder, with a skip, free decoder norms, k on its way down, on one device and on meshes.
    Control: a fault of the case, which its gradient shows."""
    sae, x, y = make(case)
    where = mesh(*case.mesh)
    run = compiled(case.config, where, case.twins)
    cut, *given = on_mesh(sae, where), *(on_data(a, where) for a in (x, y))
    now, ours = at([]), {}
    for dead in ROOMS if case.config.selects and case.config.aux else ROOMS[::3]:
        now = at(dead)
        numbers = (jnp.asarray(n, jnp.float32) for n in (now.rise, now.p, now.weight))
        (value, seen), grads = run(cut, *given, Now(jnp.asarray(now.dead), *numbers))
        total, error, codes, right = theirs(torch, case, sae, x, y, now)
        ours = arrays_of(grads)
        np.testing.assert_allclose(value, total, rtol=3e-5)
        np.testing.assert_allclose(seen.error, error, **CLOSE)
        assert np.array_equal(seen.fired, (codes > 0).sum(0)) and ours.keys() == right.keys()
        for name in right:
            np.testing.assert_allclose(ours[name], right[name], err_msg=f"{name}, {len(dead)} dead", **CLOSE)
        if case.config.selects:
            np.testing.assert_allclose(seen.least, np.where(codes > 0, codes, np.inf).min(0), rtol=1e-5)
        if case.config.sparsity == "p_anneal":
            sizes = codes * np.linalg.norm(sae.W_dec[...], axis=-1)
            after = (sizes[sizes > 0] ** (0.6 - 0.7 / 7)).sum() / B
            np.testing.assert_allclose(seen.parts["next"], after, rtol=1e-5)
    assert not same(ours, theirs(torch, case, sae, x, y, now, fault=case.fault)[3])


def test_an_empty_row_has_a_gradient_that_is_a_number(make):
    """A decoder row of zeros, whose length has none. Control: jnp.linalg.norm's is NaN."""
    case = SimpleNamespace(config=replace(SCALARS, sparsity="relu"), transcodes=False, skip=False, twins=2)
    sae, x, y = make(case)
    sae.W_dec.set_value(sae.W_dec[...].at[3].set(0))
    now = Now(jnp.zeros(M, bool), *jnp.asarray([0.7, 0.6, 1.3]))
    grads = compiled(case.config, make_mesh(1, 1), 2)(sae, x, y, now)[1]
    assert all(np.all(np.isfinite(a)) for a in arrays_of(grads).values())
    assert np.isnan(jax.grad(lambda row: jnp.linalg.norm(row))(jnp.zeros(3))).all()


def test_levels_end_where_the_shares_do():
    """Rounded ends of the sums of shares, the last one m. Control: the shares rounded one by one end elsewhere."""
    config = SAEConfig(sparsity="matryoshka", groups=(0.13, 0.13, 0.74))
    assert edges(config, 20) == [3, 5, 20] and edges(replace(config, sparsity="batchtopk"), 20) == [20]
    assert np.cumsum([round(20 * share) for share in config.groups]).tolist() == [3, 6, 21]


def test_bfloat16_products_are_summed_in_float32(draw):
    """Operands rounded, products and sums in float32, to 1e-6. Control: operands not rounded, and a rounded sum."""
    x, w = draw(1, 5, 40), draw(2, 40, 7)
    low = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for a in (x, w)]
    got = np.asarray(in_bfloat16(jnp.asarray(x), jnp.asarray(w)))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, low[0] @ low[1], rtol=1e-5, atol=1e-5)
    for wrong in x @ w, np.asarray(jnp.asarray(got, jnp.bfloat16), np.float32):
        assert not np.allclose(got, wrong, rtol=1e-4, atol=1e-4)


def test_bfloat16_reaches_the_products_of_lists_and_of_dense_codes():
    """A dictionary's loss moves when its operands are rounded, by less than a part in a hundred. Control: without the
    setting it is the same to the bit."""
    x = jnp.asarray(np.random.default_rng(3).standard_normal((16, 8), np.float32))
    for kind in ("topk", "relu"):
        config = SAEConfig(sparsity=kind, k=3, aux=0, threshold=0.1)
        rows = np.random.default_rng(4).standard_normal((24, 8), np.float32)
        bias = None if kind == "gated" else jnp.zeros(24)
        sae = SAE(make_sparsity(config, 24), jnp.asarray(rows.T), bias, jnp.asarray(rows) / 8, jnp.zeros(8))
        now = Now(jnp.zeros(24, bool), *jnp.ones(3))
        plain, again, rounded = (
            float(make_objective(replace(config, bf16=bool(bf16)))(sae, x, x, now).loss) for bf16 in (0, 0, 1)
        )
        assert plain == again and 0 < abs(rounded - plain) < 0.01 * plain, kind
