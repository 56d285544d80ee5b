"""MX and NVFP4 blocks against slow NumPy in float64 and ml_dtypes' casts, and the small floats' rounding modes."""

from functools import cache

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from qsae_jax.quant.fake import round_weight
from qsae_jax.quant.grid import FloatGrid
from qsae_jax.quant.mx import ELEMENTS, RULES, Blocks, shared_exponent

# Exponent and mantissa bits, bias, largest value: OCP Microscaling Formats v1.0, tables 1 to 5.
FORMATS = {
    "fp4_e2m1": (2, 1, 1, 6.0),
    "fp6_e2m3": (2, 3, 1, 7.5),
    "fp6_e3m2": (3, 2, 3, 28.0),
    "fp8_e4m3": (4, 3, 7, 448.0),
    "fp8_e5m2": (5, 2, 15, 57344.0),
}
DTYPES = {
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
}


@cache
def table(element):
    """The values from 0 up, in the order of their codes, so that a value of even mantissa has an even place."""
    e_bits, m_bits, bias, largest = FORMATS[element]
    values = []
    for e in range(2**e_bits):
        for m in range(2**m_bits):
            lead, power = (1, e - bias) if e else (0, 1 - bias)
            values.append((lead + m / 2**m_bits) * 2.0**power)
    return np.asarray([x for x in values if x <= largest])


def nearest(x, element):
    """In float64; of two equally near the one of even mantissa; beyond the largest, the largest."""
    values = table(element)
    size = np.minimum(np.abs(np.asarray(x, np.float64)), values[-1])
    above = np.searchsorted(values, size)
    below = np.maximum(above - 1, 0)
    up, down = values[above] - size, size - values[below]
    at = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return np.copysign(values[at], x)


def slow_exponent(top, element, rule):
    """Of one largest magnitude, by the words of mx.py."""
    _, m_bits, _, largest = FORMATS[element]
    emax = np.frexp(largest)[1] - 1
    fraction, e = np.frexp(np.float64(top))  # 1/2 <= fraction < 1
    floor = e - 1 - emax
    if rule == "ceil":
        return floor + (fraction != 0.5)
    if rule == "rceil":
        return next(k for k in range(floor - 2, floor + 3) if np.ldexp(largest, k) >= top)
    if rule == "even":
        return np.frexp(np.ldexp(np.floor(np.ldexp(fraction, m_bits + 1) + 0.5), e))[1] - 1 - emax - (m_bits + 1)
    return floor


def slow(w, name, rule):
    """Rows in blocks of 32, and a rest."""
    out = np.zeros(w.shape, np.float64)
    for row, kept in zip(w, out, strict=True):
        for i in range(0, len(row), 32):
            x = row[i : i + 32].astype(np.float64)
            if x.any():
                scale = np.ldexp(1.0, slow_exponent(np.abs(x).max(), ELEMENTS[name], rule))
                kept[i : i + 32] = nearest(x / scale, ELEMENTS[name]) * scale
    return out


def rounded(w, name, *rule):
    """Ours of rows `[out, in]`."""
    return np.asarray(round_weight(np.ascontiguousarray(w.T), Blocks(name, *rule))).T


@pytest.fixture(scope="module")
def matrix():
    """24 rows of 80: two blocks and a short one."""
    random = np.random.default_rng(0)
    w = random.normal(size=(24, 80)).astype(np.float32)
    w[0] = 0
    w[1, 32:64] = 0
    w[2] = -np.abs(w[2])
    w[3] = w[3] ** 5
    w[4] *= 1e-25
    w[5] *= 1e30
    w[6] = random.integers(-24, 25, 80) / 4  # ties
    w[7] = 2.0 ** random.integers(-9, 10, 80)
    for row, top in zip(w[8:18], (4, 6, 7, 7.5, 7.75, 7.9375, 7.999, 5, 7.2, 7.6), strict=True):
        row[:] = np.clip(row, -3.9, 3.9)
        row[[3, 40, 70]] = top, -top, top * 2**-7
        row[5] = 3 * 2.0**-29  # the last place of e5m2 under a scale of 2^-13, not of 2^-12
    w[18, 1:] = 0
    return w


@pytest.mark.parametrize("name", ELEMENTS)
def test_bit_equal_to_numpy(matrix, name):
    """Under each of the four rules, the short block and zeros among them. Control: each other rule, and blocks along
    the outputs, give other values."""
    expected = {rule: slow(matrix, name, rule) for rule in RULES}
    for rule in RULES:
        ours = rounded(matrix, name, rule)
        assert [other for other in RULES if (expected[other] == ours).all()] == [rule]
        assert not ours[0].any() and not ours[1, 32:64].any()
        assert (ours != slow(matrix.T, name, rule).T).any()


@pytest.mark.parametrize("name", ELEMENTS)
def test_what_is_clipped(matrix, name):
    """In units of its scale nothing is larger than the element's largest value. Control: before the rounding the
    blocks of `floor` and `even` reach beyond it, those of `ceil` and `rceil` do not."""
    element = ELEMENTS[name]
    largest, top = FORMATS[element][-1], np.abs(matrix[2:, :32]).max(axis=1)
    for rule in RULES:
        e = np.asarray([slow_exponent(x, element, rule) for x in top])
        limit = np.ldexp(largest, e)
        assert (np.abs(rounded(matrix, name, rule)[2:, :32]).max(axis=1) <= limit).all()
        assert (top > limit).any() == (rule in ("floor", "even"))


# What the shared exponent of an element is, by hand: element, largest magnitude -> floor, ceil, rceil, even.
EXPONENTS = [
    ("fp4_e2m1", 4.0, (0, 0, 0, 0)),  # a power of two
    ("fp4_e2m1", np.nextafter(np.float32(4), np.float32(5)), (0, 1, 0, 0)),
    ("fp4_e2m1", 6.0, (0, 1, 0, 0)),  # the largest value
    ("fp4_e2m1", np.nextafter(np.float32(6), np.float32(7)), (0, 1, 1, 0)),
    ("fp4_e2m1", np.nextafter(np.float32(7), np.float32(6)), (0, 1, 1, 0)),
    ("fp4_e2m1", 7.0, (0, 1, 1, 1)),  # half way to 8
    ("fp4_e2m1", np.nextafter(np.float32(8), np.float32(7)), (0, 1, 1, 1)),
    ("fp4_e2m1", 8.0, (1, 1, 1, 1)),
    ("fp6_e2m3", 7.5, (0, 1, 0, 0)),
    ("fp6_e2m3", 7.75, (0, 1, 1, 1)),
    ("fp6_e3m2", 28.0, (0, 1, 0, 0)),
    ("fp6_e3m2", 29.0, (0, 1, 1, 0)),
    ("fp6_e3m2", 30.0, (0, 1, 1, 1)),
    ("fp8_e4m3", 256.0, (0, 0, 0, 0)),
    ("fp8_e4m3", 448.0, (0, 1, 0, 0)),
    ("fp8_e4m3", 449.0, (0, 1, 1, 0)),
    ("fp8_e4m3", 496.0, (0, 1, 1, 1)),
    ("fp8_e5m2", 57344.0, (0, 1, 0, 0)),
    ("fp8_e5m2", 57345.0, (0, 1, 1, 0)),
    ("fp8_e5m2", 61440.0, (0, 1, 1, 1)),
]


def test_exponents_by_hand():
    """Ours and the slow one, at twenty magnitudes times powers of two from 2^-100 to 2^100."""
    ours = jax.jit(shared_exponent, static_argnums=(1, 2))
    for element in FORMATS:
        tops, expected = zip(*(row[1:] for row in EXPONENTS if row[0] == element), strict=True)
        powers = np.asarray([-100, -20, 0, 7, 100])[:, None]
        x = np.ldexp(np.asarray(tops, np.float32), powers)
        for rule, e in zip(RULES, np.asarray(expected).T, strict=True):
            np.testing.assert_array_equal(ours(x, FloatGrid(element), rule), e + powers)
            assert [slow_exponent(top, element, rule) for top in x[2]] == e.tolist()


def test_mxfp4_equals_gguf(matrix):
    """Of normal weights bit for bit. Where `gguf` differs there is an exact tie, of which it takes the value of
    smaller magnitude. Control: weights on a quarter grid have such ties."""
    w = np.random.default_rng(1).normal(size=(24, 96)).astype(np.float32)
    grid = np.random.default_rng(2).integers(-24, 25, (24, 96)).astype(np.float32) / 4
    for x, ties in ((w, False), (grid, True)):
        theirs = gguf.quants.dequantize(gguf.quants.quantize(x, Kind.MXFP4), Kind.MXFP4)
        ours = rounded(x, "mxfp4")
        other = ours != theirs
        assert other.any() == ties
        assert (np.abs(ours - x) == np.abs(theirs - x))[other].all()
        assert (np.abs(theirs) < np.abs(ours))[other].all()


def slow_nvfp4(w, levels=2):
    whole = np.abs(w).max().astype(np.float64) / (448 * 6) if levels == 2 else 1.0
    out = np.zeros(w.shape, np.float64)
    for row, kept in zip(w, out, strict=True):
        for i in range(0, len(row), 16):
            x = row[i : i + 16].astype(np.float64)
            scale = nearest(np.abs(x).max() / 6 / whole, "fp8_e4m3") * whole
            kept[i : i + 16] = nearest(x / scale, "fp4_e2m1") * scale if scale else 0
    return out


def test_nvfp4_equals_numpy():
    """Two levels of scale, 1e-6 of each value, for the first is float32; rows of 88, so the last block has 8.
    Blocks whose scale e4m3 does not hold become zero. Control: one level alone is far away."""
    w = np.random.default_rng(3).normal(size=(24, 88)).astype(np.float32)
    w[0] = 0
    w[1, 16:32] = 0
    w[2] *= np.float32(1e-4)  # denormal scales
    w[3] *= np.float32(1e-8)
    for factor in (1.0, 0.013, 1e-20):
        x = w * np.float32(factor)
        ours = rounded(x, "nvfp4")
        np.testing.assert_allclose(ours, slow_nvfp4(x), rtol=1e-6, atol=0)
        assert not ours[0].any() and not ours[1, 16:32].any() and not ours[3].any() and ours[2].any()
        far = np.abs(ours - slow_nvfp4(x, levels=1)).max()
        assert far > 0.02 * np.abs(x).max()
    assert not rounded(w * 0, "nvfp4").any()


def probes(element):
    """Every value, the middles between them, what lies next to these, denormal ones, and beyond the largest."""
    values = table(element)
    x = np.concatenate([values, (values[1:] + values[:-1]) / 2, [values[1] / 4, values[1] / 1e3, 1e-30]])
    x = x.astype(np.float32)
    x = np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(0))])
    random = np.random.default_rng(4)
    x = np.concatenate([x, random.uniform(0, values[-1], 500), np.exp(random.uniform(-12, np.log(values[-1]), 500))])
    x = x.astype(np.float32)
    x = x[np.abs(x) >= np.finfo(np.float32).tiny]
    assert x.size < 2000
    return np.resize(np.concatenate([x, -x]), 4000)


_rounded = jax.jit(FloatGrid.rounded, static_argnums=2)


def grid_rounded(x, element, mode, u=0.0):
    return np.asarray(_rounded(x, FloatGrid(element).bounds(), mode, np.full_like(x, u)))


@pytest.mark.parametrize("element", FORMATS)
def test_elements_equal_ml_dtypes(element):
    """Nearest, halves to even, clipped first: bit-equal, denormals and every tie among them; and so is the table of
    this file. Control: halves away from zero are not."""
    x = probes(element)
    x = np.clip(x, -FORMATS[element][-1], FORMATS[element][-1])
    expected = x.astype(DTYPES[element]).astype(np.float32)
    np.testing.assert_array_equal(grid_rounded(x, element, "nearest"), expected)
    np.testing.assert_array_equal(nearest(x, element), expected)
    assert (grid_rounded(x, element, "away") != expected).any()
    assert len(table(element)) == {"fp4": 8, "fp6": 32, "fp8": 127 if element == "fp8_e4m3" else 124}[element[:3]]


def test_rounding_modes_of_fp8():
    """Each against a search of e4m3's values: the next below, above, towards zero, the nearest with halves away from
    zero; by chance the one above with the chance that is its share. Control: no mode equals another."""
    x = probes("fp8_e4m3")
    x[np.abs(x) > 448] = 0
    values = np.unique(np.concatenate([-table("fp8_e4m3"), table("fp8_e4m3")]))
    low = values[np.searchsorted(values, x, side="right") - 1]
    high = values[np.searchsorted(values, x, side="left")]
    inner, outer = (np.where(x > 0, a, b) for a, b in ((low, high), (high, low)))
    wide = x.astype(np.float64)
    away = np.where(np.abs(outer - wide) <= np.abs(wide - inner), outer, inner)
    expected = {"floor": low, "ceil": high, "trunc": inner, "away": away, "nearest": nearest(x, "fp8_e4m3")}
    for mode in expected:
        ours = grid_rounded(x, "fp8_e4m3", mode)
        assert [other for other, values in expected.items() if (ours == values).all()] == [mode]
    share = (wide - low) / np.where(high > low, high - low, 1)
    for u in (0.0, 0.3, 0.6, 0.99):
        ours = grid_rounded(x, "fp8_e4m3", "stochastic", u)
        np.testing.assert_array_equal(ours, np.where(np.float32(u) < share, high, low))


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_chance_is_fair(name):
    """The mean of 4096 outputs alike is the weight itself, within five deviations. Control: rounded to the nearest
    it is not, and another draw gives other values."""
    x = np.linspace(0.1, 1.75, 16, dtype=np.float32)  # a block of which nothing is clipped
    w = np.tile(x, (4096, 1))
    ours, again = (rounded(w, name, "floor", "stochastic", draw) for draw in (0, 1))
    bound = 5 * ours.std(axis=0) / 64 + 1e-6
    assert (np.abs(ours.mean(axis=0, dtype=np.float64) - x) <= bound).all()
    assert (np.abs(rounded(w, name)[0] - x) > bound).any() and (ours != again).any()
