"""nf4 and fp4 against a slow NumPy quantizer bit for bit, and the error sizes of bitsandbytes' own tests."""

import numpy as np
import pytest

from qsae_jax.quant.codebook import NESTED, TABLES, Lookup, dynamic_map
from qsae_jax.quant.fake import round_weight

# fmt: off
VALUES = {
    "nf4": [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    # In the order of bitsandbytes' codes, sign in the highest bit.
    "fp4": sorted({s * x / 12 for s in (1, -1) for x in (0, 0.0625, 8, 12, 4, 6, 2, 3)}),
}
# fmt: on


def rounded(w, *lookup):
    """Ours of a matrix `[out, in]`: our layout is inputs first."""
    return np.asarray(round_weight(np.ascontiguousarray(w.T), Lookup(*lookup))).T


def looked_up(x, values):
    """The nearest of ascending values, in float32; of two equally near the lower."""
    values = np.asarray(values, np.float32)
    return values[np.searchsorted((values[:-1] + values[1:]) / np.float32(2), x, side="left")]


def scaled(x, top, values, kept=None):
    return looked_up(x * (np.float32(1) / (top or np.float32(1))), values) * (top if kept is None else kept)


def slow(w, table, block=64, double=False):
    flat = w.reshape(-1)
    cuts = [flat[i : i + block] for i in range(0, flat.size, block)]
    tops = np.asarray([np.abs(x).max() for x in cuts])
    kept = tops
    if double:
        mean = np.float32(tops.astype(np.float64).mean())
        runs = [tops[i : i + 256] - mean for i in range(0, tops.size, 256)]
        kept = np.concatenate([scaled(x, np.abs(x).max(), dynamic_map()) for x in runs]) + mean
    blocks = [scaled(x, top, VALUES[table], size) for x, top, size in zip(cuts, tops, kept, strict=True)]
    return np.concatenate(blocks).reshape(w.shape)


def weights(out, n):
    """Rows with blocks of zeros, of one sign, and tiny; ties between values of fp4."""
    w = np.random.default_rng(0).normal(size=(out, n)).astype(np.float32)
    w[0] = 0
    w[1] = -np.abs(w[1])
    w[2] = 0.25
    w[3] *= 1e-30
    w[4] = np.resize(np.float32([12, 10, 7, 5, 3.5, 2.5, -10, -7, -5, -3.5, -2.5, 0]), n) / 8
    return w


SHAPES = {"whole blocks": (10, 128, 64), "blocks across rows, the last of 16": (10, 40, 64)}
SHAPES |= {"blocks of 32": (6, 96, 32), "one block, longer than all": (6, 9, 64), "5 does not divide": (7, 12, 5)}


@pytest.mark.parametrize("out, n, block", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("table", TABLES)
def test_bit_equal_to_numpy(table, out, n, block):
    """Zeros stay zeros. Control: the other table, other blocks, and blocks of the transpose give other values."""
    w = weights(out, n)
    ours = rounded(w, table, block)
    np.testing.assert_array_equal(ours, slow(w, table, block))
    assert np.isfinite(ours).all() and not ours[w == 0].any()
    assert (ours != slow(w, next(other for other in TABLES if other != table), block)).any()
    assert (ours != slow(w, table, 16)).any()
    assert w.size <= block or (ours != slow(w.T, table, block).T).any()


@pytest.mark.parametrize("table", TABLES)
def test_a_tie_goes_to_the_lower_value(table):
    """Every midpoint, exact in float32, beside a 1; its upper neighbour goes up."""
    values = np.asarray(VALUES[table], np.float32)
    middle = (values[:-1] + values[1:]) / np.float32(2)
    assert (rounded(np.append(middle, 1)[None], table)[0, :-1] == values[:-1]).all()
    above = np.append(np.nextafter(middle, np.float32(2)), np.float32(1))
    assert (rounded(above[None], table)[0, :-1] == values[1:]).all()


@pytest.mark.parametrize("out, n, block", [(48, 128, 16), (9, 40, 64)], ids=["256 and 128 blocks", "6 blocks"])
def test_double(out, n, block):
    """Magnitudes in 8 bits, 2e-6 of the largest: only their mean is summed in another order. Control: kept as they
    are, and with the mean left in, they are hundreds of times as far away."""
    w = weights(out, n) + np.float32(0.5)
    w[5:] *= np.linspace(0.5, 2, out - 5, dtype=np.float32)[:, None]
    ours, bound = rounded(w, "nf4", block, True), 2e-6 * np.abs(w).max()
    np.testing.assert_allclose(ours, slow(w, "nf4", block, True), rtol=0, atol=bound)
    assert np.abs(ours - slow(w, "nf4", block)).max() > 200 * bound
    assert NESTED == 256


def test_double_of_zeros():
    """Nothing to divide by: zeros, and one magnitude in all blocks, come through as they do without `double`."""
    w = np.zeros((4, 96), np.float32)
    np.testing.assert_array_equal(rounded(w, "fp4", 64, True), w)
    w[:] = np.resize(np.float32([1.5, -0.5, 0.25]), 96)
    np.testing.assert_array_equal(rounded(w, "fp4", 64, True), slow(w, "fp4"))


def test_the_dynamic_map():
    """256 ascending values, symmetric but for 0 and 1; eight computed by hand: the middles of 2^i parts of .1 to 1,
    times 10^(i-6), 1e-6 relative. Control: the next value is elsewhere."""
    values = dynamic_map()
    assert values.shape == (256,) and values.dtype == np.float32 and (np.diff(values) > 0).all()
    assert {0.0, 1.0} <= set(values.tolist())
    np.testing.assert_array_equal(values[:127], -values[254:127:-1])
    hand = {0: -0.99296875, 127: 0, 128: 5.5e-7, 129: 3.25e-6, 130: 7.75e-6, 131: 2.125e-5, 190: 0.09859375, 255: 1}
    for i, value in hand.items():
        assert values[i] == pytest.approx(value, rel=1e-6, abs=0)
        assert i == 255 or values[i + 1] != pytest.approx(value, rel=1e-2, abs=0)


# Mean |W - Q(W)| of 1024 x 1024 standard normal weights, and its deviation (bitsandbytes, tests/test_functional.py).
# fmt: off
PUBLISHED = {
    ("nf4", 32): (0.067746, 0.000069), ("nf4", 64): (0.072798, 0.000074), ("nf4", 128): (0.076831, 0.000091),
    ("nf4", 256): (0.080337, 0.000101), ("fp4", 64): (0.096543, 0.000099), ("fp4", 128): (0.102969, 0.000134),
}
# fmt: on


@pytest.fixture(scope="module")
def normal():
    return np.random.default_rng(1).standard_normal((1024, 1024), dtype=np.float32)


@pytest.mark.parametrize("table, block", PUBLISHED)
def test_errors_of_normal_weights(normal, table, block):
    """Within seven deviations. Control: no other row fits, of the other table or other blocks."""
    error = float(np.abs(rounded(normal, table, block) - normal).mean(dtype=np.float64))
    fits = [row for row, (mean, deviation) in PUBLISHED.items() if abs(error - mean) < 7 * deviation]
    assert fits == [(table, block)]
