"""Integer grids under every convention against a slow NumPy quantizer, bit for bit, and published error sizes."""

import jax
import numpy as np
import pytest

from qsae_jax.quant.fake import round_weight
from qsae_jax.quant.grid import ASYMMETRIC, SYMMETRIC, IntGrid
from qsae_jax.quant.group import TENSOR, Groups
from qsae_jax.quant.scale import RULES
from qsae_jax.quant.scaled import Scaled

CONVENTIONS = (*SYMMETRIC, *ASYMMETRIC)
RANGED = ("restricted", "full_qmax", "no_clip", "asym", "affine")  # whose range holds every weight
GROUPS = {"channel": 0, "tensor": -1, "groups of 5, 3 left": 5, "groups of 13, the whole": 13, "groups of 40": 40}


def rounded(w, bits, convention, group=0):
    """Ours of a matrix `[out, in]`: our layout is inputs first."""
    groups = TENSOR if group == -1 else Groups(group)
    return np.asarray(round_weight(np.ascontiguousarray(w.T), Scaled(IntGrid(bits, convention), groups))).T


@pytest.fixture(scope="module")
def matrix():
    """`[out, in]`: normal rows, and the rows on which quantizers stumble."""
    w = np.random.default_rng(0).normal(size=(16, 13)).astype(np.float32)
    w[0] = 0
    w[1] = np.abs(w[1])
    w[2] = -np.abs(w[2])
    w[3] = 0.25
    w[4, 1:] = 0
    w[5] *= 1e-30
    w[7, :6] = [3, -3, 3, -3, 1.5, -1.5]  # ties of extrema and of rounding
    w[8] = np.linspace(-7, 6.99, 13)  # the largest magnitude of all, and it is negative
    w[9, 5:10] = 0  # a group of zeros
    return w


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_bit_equal_to_numpy(slow_quantize, matrix, convention, group):
    """2 to 8 bits. Control: every other convention gives other values, except that full_qmax and restricted are one
    quantizer under an absmax scale: the code by which they differ is never reached; and where the range holds zero
    anyway, asym_tight is asym."""
    for bits in range(2, 9):
        ours = rounded(matrix, bits, convention, group)
        np.testing.assert_array_equal(ours, slow_quantize(matrix, bits, convention, group))
        alike = {other for other in CONVENTIONS if (slow_quantize(matrix, bits, other, group) == ours).all()}
        pairs = [{"restricted", "full_qmax"}] + [{"asym", "asym_tight"}] * (group == -1)
        assert alike == next((pair for pair in pairs if convention in pair), {convention})


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_granularity_is_the_one_asked_for(slow_quantize, matrix, convention):
    """Control of the groups: each granularity differs from each other one, and from groups along the outputs."""
    given = {group: rounded(matrix, 4, convention, group) for group in (0, -1, 5, 4)}
    for group, ours in given.items():
        assert all((ours != other).any() for size, other in given.items() if size != group)
        if group >= 0:
            assert (ours != slow_quantize(matrix.T, 4, convention, group).T).any()
    np.testing.assert_array_equal(given[0], rounded(matrix, 4, convention, 13))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_size_of_weights_does_not_matter(matrix, convention):
    """Powers of two come through bit for bit; weights so small that a reciprocal would overflow stay finite, and as
    far away as they are large. Control: a factor that is no power of two is not bit-equal."""
    ours = rounded(matrix, 4, convention)
    if convention == "asym_tight":
        return  # its scale is at least 1e-5 / 15, whatever the weights
    for factor in (2.0**80, 2.0**-20):
        np.testing.assert_array_equal(rounded(matrix * np.float32(factor), 4, convention), ours * np.float32(factor))
    assert (rounded(matrix * np.float32(3), 4, convention) != ours * np.float32(3)).any()
    for size in (1e-36, 1e-37, 1e-38, 1e-39, 1e-42):
        tiny = matrix[7:] * np.float32(size)
        assert (np.abs(rounded(tiny, 4, convention) - tiny) <= np.abs(tiny).max() + np.float32(1e-37)).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_codes_are_whole_and_on_the_grid(matrix, convention, bits):
    """The bounds that the docstring of grid.py promises, and a zero that stays zero. Control: one code less at
    either end would not hold for some row."""
    q, how, x = 2 ** (bits - 1), Scaled(IntGrid(bits, convention)), matrix.T
    found = how.scales(x, how.numbers())
    codes = np.asarray(how.codes(x, found, how.numbers()))
    low, high = {"restricted": (1 - q, q - 1), "full_qmax": (1 - q, q - 1)}.get(
        convention, (0, 2 * q - 1) if convention in ASYMMETRIC else (-q, q - 1)
    )
    assert (codes == np.round(codes)).all()
    assert (codes.min(), codes.max()) == (low, high)
    values = np.asarray(how.values(codes, found)).T
    assert (values[0] == 0).all() and np.isfinite(values).all()
    keeps_zero = (values[matrix == 0] == 0).all()
    assert keeps_zero or convention in ("affine", "asym_tight")


@pytest.mark.parametrize("convention", RANGED)
def test_what_is_not_clipped_is_half_a_step_off(matrix, convention):
    """|W - Q(W)| <= scale / 2 (1 + 1e-5), for the rules whose range holds every weight; asym may round its zero
    point by another half. Control: `half` and `signed_full` clip, and exceed it."""
    scale = np.asarray(RULES[convention](matrix.T, IntGrid(4, convention).bounds())[0]).T
    slack = 1.0 if convention == "asym" else 0.5
    assert (np.abs(rounded(matrix, 4, convention) - matrix) <= scale * slack * (1 + 1e-5)).all()
    for clipping in ("half", "signed_full"):
        scale = np.asarray(RULES[clipping](matrix.T, IntGrid(4, clipping).bounds())[0]).T
        assert (np.abs(rounded(matrix, 4, clipping) - matrix) > np.abs(scale) * 0.51).any() == (
            clipping == "signed_full"
        )


# |W - Q(W)| / |W| of `jax.random.normal(jax.random.key(0), (4096, 128))` in groups of 128, for 8 to 2 bits; each made
# with the formula of the library that the convention comes from (shared/reference/quant.md).
PUBLISHED = {
    "restricted": (0.00647, 0.01302, 0.02645, 0.05468, 0.11723, 0.27368, 0.76650),
    "full_qmax": (0.00647, 0.01302, 0.02645, 0.05468, 0.11723, 0.27368, 0.76650),
    "half": (0.00651, 0.01305, 0.02634, 0.05351, 0.11057, 0.23704, 0.54891),
    "signed_full": (0.00640, 0.01281, 0.02567, 0.05131, 0.10303, 0.20748, 0.42354),
    "no_clip": (0.00643, 0.01292, 0.02607, 0.05316, 0.11159, 0.25455, 0.72045),
    "asym": (0.00591, 0.01187, 0.02393, 0.04855, 0.10055, 0.21548, 0.50292),
}


@pytest.fixture(scope="module")
def errors():
    """Relative errors of every convention at 8 to 2 bits, on the weights of the table."""
    w = np.asarray(jax.random.normal(jax.random.key(0), (4096, 128)))
    return {
        convention: [
            float(np.linalg.norm(rounded(w, bits, convention) - w) / np.linalg.norm(w)) for bits in range(8, 1, -1)
        ]
        for convention in PUBLISHED
    }  # fmt: skip


@pytest.mark.parametrize("convention", PUBLISHED)
def test_errors_of_normal_weights(errors, convention):
    """To every digit of the table, five after the point. Control: no other convention's row fits, its twin apart."""

    def fits(row):
        return np.allclose(errors[convention], row, rtol=0, atol=5.1e-6)

    assert fits(PUBLISHED[convention])
    rows = {row for row in PUBLISHED.values() if row != PUBLISHED[convention]}
    assert len(rows) == 4 and not any(fits(row) for row in rows)
