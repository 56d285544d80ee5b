"""Rounding modes, granularity, scale rules and types of scale against slow NumPy, and what holds of every quantizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qsae_jax.errors import UserError
from qsae_jax.quant.fake import fake_quantize, round_weight
from qsae_jax.quant.grid import FLOATS, IntGrid
from qsae_jax.quant.group import DUAN2026, Groups
from qsae_jax.quant.names import parse_how
from qsae_jax.quant.rounding import MODES
from qsae_jax.quant.scale import stored

F = np.float32


def ours(w, name, path=""):
    """`[out, in]` -> the same rounded."""
    return np.asarray(round_weight(np.ascontiguousarray(w.T), parse_how(name, name), 1, path)).T


@pytest.fixture(scope="module")
def w():
    """`[24, 40]`, heavy tails, so that clipping pays."""
    return np.random.default_rng(2).standard_t(3, size=(24, 40)).astype(F)


SLOW_MODES = {
    "nearest": np.round,
    "away": lambda x: np.trunc(x + np.copysign(F(0.5), x)),
    "floor": np.floor,
    "ceil": np.ceil,
    "trunc": np.trunc,
}


@pytest.mark.parametrize("mode", SLOW_MODES)
def test_modes(w, mode):
    """Bit-equal, on weights that hold exact ties too. Control: no two modes agree."""
    w = w.copy()
    w[0] = np.arange(40) / 2 - 10  # row of ties: absmax 10 and codes to 7 do not make them; the next row's 7 does
    w[1] = np.clip(np.arange(40) / 2 - 10, -7, 7)

    def slow(name):
        scale = np.abs(w).max(1, keepdims=True) * F(1 / 7)
        return np.clip(SLOW_MODES[name](w * (F(1) / scale)), -8, 7) * scale

    np.testing.assert_array_equal(ours(w, f"int4-{mode}"), slow(mode))
    assert [name for name in SLOW_MODES if (slow(name) == slow(mode)).all()] == [mode]


def test_stochastic_rounding_is_keyed_and_unbiased(w):
    """The same draw and path, the same bits; the mean of 400 draws is the weight within 5 standard errors of every
    weight's chance; each value is one of the two neighbours. Control: nearest is not within them."""
    names = [f"int4-stochastic#{i}" for i in range(400)]
    draws = np.stack([ours(w, name) for name in names])
    np.testing.assert_array_equal(draws[3], ours(w, names[3]))
    assert (draws[0] != draws[1]).any() and (draws[0] != ours(w, names[0], "elsewhere")).any()
    scale = np.abs(w).max(1, keepdims=True) * F(1 / 7)
    assert (np.abs(draws - w) <= scale * 1.0001).all()
    fraction = (w / scale) % 1
    chance = 5 * scale * (np.sqrt(fraction * (1 - fraction) / 400) + 1 / 400)  # and for the rare: five more or less
    assert (np.abs(draws.mean(0) - w) < chance).all()
    assert (np.abs(ours(w, "int4") - w) > chance).any()


@pytest.mark.parametrize("name", FLOATS)
def test_modes_of_small_floats_bracket(w, name):
    """floor <= nearest <= ceil, trunc towards zero, and each is a value of the format (a fixed point of nearest)."""
    by = {mode: ours(w, f"{name}-{mode}") for mode in MODES}
    assert (by["floor"] <= by["nearest"]).all() and (by["nearest"] <= by["ceil"]).all()
    assert (np.abs(by["trunc"]) <= np.abs(w) * 1.0001).all() and (by["floor"] < by["ceil"]).any()
    for mode in MODES:
        inside = np.isin(by[mode], np.concatenate([by["floor"].ravel(), by["ceil"].ravel()]))
        assert inside.mean() > 0.99, mode


# Granularity.


def slow_int4(x):
    scale = np.abs(x).max() * F(1 / 7) or F(1)
    return np.clip(np.round(x * (F(1) / scale)), -8, 7) * scale


@pytest.mark.parametrize("o, i", [(8, 8), (24, 40), (5, 7), (100, 3), (7, 100)])
def test_blocks(w, o, i):
    """2-D blocks with remainders at both edges, bit for bit. Control: the block turned round."""

    def slow(o, i):
        out = np.empty_like(w)
        for a in range(0, 24, o):
            for b in range(0, 40, i):
                out[a : a + o, b : b + i] = slow_int4(w[a : a + o, b : b + i])
        return out

    np.testing.assert_array_equal(ours(w, f"int4-b{o}x{i}"), slow(o, i))
    assert (slow(o, i) != slow(i, o)).any() or o == i


def test_the_papers_head_shared_scale():
    """arXiv 2606.03002 takes the largest magnitude over every axis but the last of TransformerLens's tensors: q, k, v
    `[head, d, head_dim]`, o `[head, head_dim, d]`, mlp `[d, f]`. Control: per channel differs where heads are shared,
    and only there."""
    r = np.random.default_rng(0)
    q = (r.normal(size=(20, 4, 6)) * np.arange(1, 5)[None, :, None]).astype(F)  # ours: d, head, head_dim
    o, up = r.normal(size=(4, 6, 20)).astype(F), r.normal(size=(20, 40)).astype(F)

    def paper(x, bits=4):
        scale = np.abs(x).max(axis=tuple(range(x.ndim - 1)), keepdims=True) * F(1 / 7)
        return np.clip(np.round(x * (F(1) / scale)), -8, 7) * scale

    shared, channel = parse_how("int4-duan2026", ""), parse_how("int4", "")
    heads_first = q.transpose(1, 0, 2)
    np.testing.assert_array_equal(round_weight(q, shared, 1), paper(heads_first).transpose(1, 0, 2))
    assert (np.asarray(round_weight(q, channel, 1)) != paper(heads_first).transpose(1, 0, 2)).any()
    np.testing.assert_array_equal(round_weight(o, shared, 2), paper(o))
    np.testing.assert_array_equal(round_weight(o, channel, 2), paper(o))
    np.testing.assert_array_equal(round_weight(up, shared, 1), paper(up))
    assert shared.groups == DUAN2026
    noise, error = (
        np.linalg.norm(round_weight(q, parse_how(name, ""), 1) - q) for name in ("noise@int4-duan2026", "int4-duan2026")
    )
    assert noise == pytest.approx(error, rel=1e-4) and error > 1.1 * np.linalg.norm(round_weight(q, channel, 1) - q)


def test_a_remainder_is_a_group_of_its_own():
    """Its shape is told, and no padding has a say: a last group of positive weights keeps its range."""
    assert (
        Groups(16).rest((40, 24)) == (8, 0)
        and Groups(16, 9).rest((40, 24)) == (8, 6)
        and Groups().rest((40, 24)) == (0, 0)
    )
    w = np.full((1, 20), 5, F) + np.arange(20, dtype=F)
    for name in ("int4-g16-affine", "int4-g16-asym_tight"):
        np.testing.assert_array_equal(ours(w, name)[:, 16:], ours(w[:, 16:], name.replace("-g16", "")))
    assert (np.abs(ours(w, "int4-g16-affine") - w) < 0.51).all()


# Scale rules.


@pytest.mark.parametrize("convention", ["full_qmax", "half", "asym", "affine"])
@pytest.mark.parametrize("percent", [99.0, 90.0])
def test_percentile(w, convention, percent):
    """1e-6 of NumPy's quantiles put through the convention's own rule; more error at the ends, control: the rule
    without clipping, and another percentile, differ."""
    q = percent / 100
    asymmetric = convention in ("asym", "affine")
    low = (
        np.quantile(w, 1 - q, axis=1, keepdims=True)
        if asymmetric
        else -np.quantile(np.abs(w), q, axis=1, keepdims=True)
    )
    high = np.quantile(w, q, axis=1, keepdims=True) if asymmetric else -low
    clipped = np.clip(w, low, high)
    got = ours(w, f"int4-{convention}-p{percent:g}")
    inside = (w >= low) & (w <= high)
    plain = ours(clipped.astype(F), f"int4-{convention}")
    np.testing.assert_allclose(got[inside], plain[inside], atol=1e-5)
    assert np.abs(got - ours(w, f"int4-{convention}")).max() > 0.05
    assert np.abs(got - ours(w, f"int4-{convention}-p95")).max() > 0.05


def slow_mse(w, convention, group):
    """The loop of GPTQ's quantizer over one group at a time, in float32: 80 shrinks, |error|^2.4, strict."""
    out = np.empty_like(w)
    for row in range(len(w)):
        for start in range(0, w.shape[1], group):
            x = w[row, start : start + group]
            best = np.inf
            for i in range(80):
                p = F(1 - i * F(0.01))
                if convention == "half":
                    scale = np.abs(x).max() * F(1 / 7.5) * p
                    y = np.clip(np.round(x * (F(1) / scale)), -8, 7) * scale
                else:
                    low, high = min(x.min(), F(0)), max(x.max(), F(0))
                    whole = (high - low) * F(1 / 15)
                    zero = np.round(-low * (F(1) / whole))
                    y = (np.clip(np.round(x * (F(1) / (whole * p))) + zero, 0, 15) - zero) * (whole * p)
                error = (np.abs(y - x).astype(np.float64) ** 2.4).sum()
                if error < best:
                    best, out[row, start : start + group] = error, y
    return out


@pytest.mark.parametrize("convention, group", [("half", 40), ("asym", 8)])
def test_mse_search(w, convention, group):
    """The same shrink chosen in every group (1e-6), and less error than without. Control: a square's shrinks differ."""
    name = f"int4-{convention}" + (f"-g{group}" if group < 40 else "")
    got, slow = ours(w, f"{name}-mse"), slow_mse(w, convention, group)
    np.testing.assert_allclose(got, slow, atol=1e-6 * np.abs(w).max())
    assert (np.abs(got - w) ** 2.4).sum() < 0.97 * (np.abs(ours(w, name) - w) ** 2.4).sum()
    assert (np.abs(got - ours(w, name)) > 1e-3).any()


def slow_hqq(w, bits, group):
    """Badri & Shaji's proximal steps for all groups together, in float64 but for nothing."""
    x = w.reshape(-1, group).astype(np.float64)
    low, high, top = x.min(1, keepdims=True), x.max(1, keepdims=True), 2**bits - 1
    by = np.minimum(top / (high - low), 2e4)
    zero = -low * by
    zero = np.round(zero) if bits == 4 else zero
    before = np.inf
    for _ in range(20):
        codes = np.clip(np.round(x * by + zero), 0, top)
        apart = x - (codes - zero) / by
        size = np.maximum(np.abs(apart), 1e-30)
        shrunk = np.sign(apart) * np.maximum(size - size**-0.3 / 10, 0)
        zero = (codes - (x - shrunk) * by).mean(1, keepdims=True)
        error = np.abs(apart).mean()
        if not error < before:
            break
        before = error
    codes = np.clip(np.round(x * by + zero), 0, top)
    return ((codes - zero) / by).reshape(w.shape)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_hqq(bits):
    """At least 999 weights in a thousand within 1e-4 of a float64 run of the same steps (a code on a tie may fall to
    the other side). Control: minmax is further off, in its |error|^0.7 too."""
    w = np.random.default_rng(5).standard_t(4, size=(32, 128)).astype(F) * F(0.05)
    got, slow = ours(w, f"int{bits}-g64-hqq"), slow_hqq(w, bits, 64)
    assert (np.abs(got - slow) < 1e-4 * np.abs(w).max()).mean() > 0.999
    plain = ours(w, f"int{bits}-g64-affine")
    assert (np.abs(plain - slow) < 1e-4 * np.abs(w).max()).mean() < 0.9
    if bits < 8:
        assert (np.abs(got - w) ** 0.7).sum() < (np.abs(plain - w) ** 0.7).sum()


# Types of scale.


def test_types_of_scale():
    """Against NumPy's and ml_dtypes' casts, powers of two rounded up; largest and smallest, and zero."""
    import ml_dtypes

    s = np.concatenate([np.geomspace(1e-9, 1e6, 200), [0.0, 2.0**-3, 448.0, 1e-7]]).astype(F)
    np.testing.assert_array_equal(stored(s, "f16"), np.minimum(s, 65504).astype(np.float16).astype(F))
    np.testing.assert_array_equal(stored(s, "bf16"), s.astype(ml_dtypes.bfloat16).astype(F))
    np.testing.assert_array_equal(stored(s, "e4m3"), np.minimum(s, 448).astype(ml_dtypes.float8_e4m3fn).astype(F))
    np.testing.assert_array_equal(stored(-s, "e4m3"), -np.asarray(stored(s, "e4m3")))
    np.testing.assert_array_equal(stored(s, "f32"), s)
    positive = s[s > 0]
    np.testing.assert_array_equal(stored(positive, "e8m0"), 2.0 ** np.ceil(np.log2(positive.astype(np.float64))))


@pytest.mark.parametrize("kind", ["f16", "bf16", "e4m3", "e8m0"])
def test_codes_are_found_with_the_stored_scale(w, kind):
    """Bit for bit; control: the float32 scale gives other values."""
    unit = np.abs(w).max() * F(1 / 7) * F(1 / 448)  # of e4m3, whose range is small
    scale = np.asarray(stored(np.abs(w).max(1, keepdims=True) * F(1 / 7), kind, unit))
    slow = np.clip(np.round(w * (F(1) / scale)), -8, 7) * scale
    np.testing.assert_array_equal(ours(w, f"int4-scale_{kind}"), slow)
    assert (slow != ours(w, "int4")).any()


# What holds of every quantizer.

EVERY = (
    *("int8", "int4", "int2", "int4-half", "int5-signed_full", "int4-no_clip", "int4-g5-asym", "int4-tensor-affine"),
    *("int4-b5x7", "int4-floor", "int4-g8-scale_f16", "fp8_e4m3", "fp8_e5m2-g8", "fp6_e2m3", "fp6_e3m2-tensor"),
    *(
        "fp4_e2m1-ceil",
        "nf4-g8",
        "fp4-g8",
        "mxfp4",
        "mxfp8-scale_even",
        "nvfp4",
        "q8_0",
        "q4_0",
        "q4_1",
        "q5_0",
        "bf16",
    ),
)
LOOSE = {
    "int4-half",
    "int4-floor",
    "int4-g5-asym",
    "fp4_e2m1-ceil",
    "int5-signed_full",
    "nvfp4",
    "q4_0",
    "q5_0",
    "q4_1",
}
# Multiples of 2^-12, so that no scale is a denormal number, which devices flush to zero.
finite = hnp.arrays(np.int32, (8, 32), elements=st.integers(-400_000, 400_000)).map(lambda x: x.astype(F) / F(4096))


@pytest.mark.parametrize("name", EVERY)
def test_properties(name):
    """Equivariant to a power of two and to the order of channels, zero stays zero (but for a kept minimum), finite,
    and rounding twice is rounding once where the extremum is on the grid (LOOSE: where it may not be)."""

    @settings(max_examples=12)
    @given(finite)
    def check(w):
        once = ours(w, name)
        assert np.isfinite(once).all()
        if name not in ("bf16", "q8_0", "q4_0", "q4_1", "q5_0") and "scale_" not in name:  # whose range is a type's
            np.testing.assert_array_equal(ours(w * F(16), name), once * F(16))
        if "tensor" not in name and "-b" not in name and name != "nvfp4":
            order = np.random.default_rng(0).permutation(8)
            np.testing.assert_array_equal(ours(w[order], name), once[order])
        assert (ours(np.zeros_like(w), name) == 0).all()
        if name not in LOOSE:
            np.testing.assert_allclose(ours(once, name), once, rtol=0, atol=2e-6 * max(np.abs(w).max(), 1e-30))

    check()


@settings(max_examples=60)
@given(finite, st.sampled_from(["int8", "int4", "int3-g5", "int4-b5x7", "int4-no_clip", "int6-tensor"]))
def test_error_within_half_a_step(w, name):
    """|W - Q(W)| <= scale/2, by the largest scale of the matrix; control: a third of a step is exceeded somewhere."""
    how = parse_how(name, "")
    scale = np.abs(w).max() / (2.0 ** (how.grid.bits - 1) - 1)
    assert (np.abs(ours(w, name) - w) <= 0.5 * scale * (1 + 1e-5) + 1e-30).all()


def test_half_a_step_is_reached(w):
    scale = np.abs(w).max(1, keepdims=True) / 7
    assert (np.abs(ours(w, "int4") - w) > scale / 3).any()


@pytest.mark.parametrize("name", ["int4", "fp8_e4m3", "nf4", "mxfp4", "nvfp4", "q4_0", "int4-mse", "int4-g64-hqq"])
def test_denormals_and_constants_stay_finite(name):
    w = np.zeros((4, 64), F)
    w[0] = 1e-41
    w[1] = 0.25
    w[2] = -3e4
    w[3, 0] = 1e-30
    got = ours(w, name)
    assert np.isfinite(got).all() and (np.abs(got[0]) < 1e-35).all()
    np.testing.assert_allclose(got[1:3], w[1:3], rtol=0.35)


def test_infinities_and_nan_are_refused(lm):
    """Named by path. Control: the model without them is taken."""
    for bad in (np.inf, -np.inf, np.nan):
        broken = jax.tree.map(jnp.array, lm)
        w = broken.blocks[1].mlp.down
        w.set_value(w.get_value().at[3, 2].set(bad))
        with pytest.raises(UserError, match=r"`blocks.1.mlp.down` holds infinities or NaN, or numbers too large, 1 do"):
            fake_quantize(broken, "int4")
        fake_quantize(broken, "int4[0]")


EAGER = (
    *(
        "int4",
        "int4-g5-asym",
        "int3-affine",
        "int4-half-mse",
        "int4-g8-hqq",
        "int4-p99",
        "int4-stochastic",
        "int4-b5x7",
    ),
    *("fp8_e4m3", "fp6_e3m2-stochastic", "nf4-double", "mxfp4-scale_even", "nvfp4", "q4_1", "prune0.3", "noise@int4"),
)


@pytest.mark.parametrize("name", EAGER)
def test_jit_equals_eager(w, name):
    """Bit for bit, though a compiler would fuse products and sums (products.alone); where a sum over many weights
    goes into every value, to the last digits of that sum."""
    how, x, key = parse_how(name, name), jnp.asarray(w.T), jax.random.key(3)
    eager = np.asarray(how.round(x, how.numbers(), key))
    jitted = np.asarray(jax.jit(lambda x: how.round(x, how.numbers(), key))(x))
    if name in ("int4-g8-hqq", "nf4-double", "noise@int4"):
        np.testing.assert_allclose(jitted, eager, rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_array_equal(jitted, eager)


def test_a_sweep_over_bits_compiles_once():
    """Bits, draws, fractions and factors are numbers; control: a convention is a form of its own."""
    from qsae_jax.quant.fake import _distorted

    w, before = np.ones((37, 11), F), _distorted._cache_size()
    for name in (*(f"int{b}" for b in range(2, 9)), *(f"int{b}-stochastic#{b}" for b in range(2, 9))):
        ours(w, name)
    assert _distorted._cache_size() == before + 2
    for name in ("prune0.1", "prune0.2", "noise@int4", "noise@int5#3", "noise0.5@int2"):
        ours(w, name)
    assert _distorted._cache_size() == before + 4
    ours(w, "int4-half")
    assert _distorted._cache_size() == before + 5


def test_gradients_pass_straight_through(lm):
    """d loss / d W through the quantizer is the gradient at the rounded weights; control: without it there is none."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
    how, x = parse_how("int3-g4-asym", ""), jnp.arange(8.0)
    through = jax.grad(lambda w: jnp.sum((x @ round_weight(w, how)) ** 2))(w)
    at = jax.grad(lambda v: jnp.sum((x @ v) ** 2))(round_weight(w, how))
    np.testing.assert_allclose(through, at, rtol=1e-6)
    plain = jax.grad(lambda w: jnp.sum((x @ jax.jit(lambda w: how.round(w, how.numbers(), None))(w)) ** 2))(w)
    assert np.abs(plain - through).max() > 1

    tokens = np.arange(12).reshape(2, 6)
    grads = jax.jit(jax.grad(lambda lm: jnp.mean(fake_quantize(lm, "int4[1]")(tokens) ** 2)))(lm)
    size = float(jnp.abs(grads.blocks[1].mlp.down[...]).max())
    assert size > 0 and np.isfinite(size)


def test_bits_of_one_grid_share_a_form():
    assert IntGrid(4).bounds().high == 7 and parse_how("int4", "").form() == parse_how("int7", "").form()


def test_e4m3_scales_hold_weights_of_any_size(w):
    """They are kept in units of the matrix, so that small weights do not vanish (1e-6 relative). Control: without the
    unit they do."""
    for name in ("int8-scale_e4m3", "fp8_e4m3-scale_e4m3", "int4-g8-asym-scale_e4m3"):
        error = np.linalg.norm(ours(w, name) - w) / np.linalg.norm(w)
        small = w * F(1e-3)
        assert np.linalg.norm(ours(small, name) - small) / np.linalg.norm(small) == pytest.approx(error, rel=0.05)
        assert error < 0.15
    assert (np.asarray(stored(np.abs(w * F(1e-3)).max(1) / 127, "e4m3")) == 0).all()


def test_a_percentile_of_mostly_zeros_keeps_the_range():
    w = np.zeros((2, 40), F)
    w[0, :4] = [0.7, -0.3, 0.2, 0.1]
    np.testing.assert_array_equal(ours(w, "int4-p80"), ours(w, "int4"))


def test_chances_of_one_draw_are_independent():
    """Stochastic rounding, noise and permutation of one draw and path; and a control's inner rounding is the scheme's
    own. Control: a draw and itself."""
    w = np.random.default_rng(0).normal(size=(64, 64)).astype(F)
    errors = {
        name: (ours(w, name, "blocks.0.mlp.up") - w).ravel()
        for name in (
            "int4-stochastic#1",
            "noise@int8#1",
            "permuted@int8#1",
            "int4-stochastic",
            "permuted@int4-stochastic",
        )
    }
    a, b, c, own, inner = errors.values()
    for x, y in ((a, b), (a, c), (b, c), (own, inner)):
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / 64
    assert np.corrcoef(a, a)[0, 1] > 0.99
    np.testing.assert_allclose(np.sort(own), np.sort(inner), atol=1e-6)


@pytest.mark.parametrize("part", ["scale_e8m0", "trunc"])
def test_mse_searches_with_what_is_then_used(w, part):
    """The type of scale and the rounding mode have a part in the search: less error than without it, in every row."""
    searched, plain = (np.sum(np.abs(ours(w, f"int4{mse}-{part}") - w) ** 2.4, axis=1) for mse in ("-mse", ""))
    assert (searched <= plain * (1 + 1e-5)).all() and searched.sum() < 0.95 * plain.sum()
