"""GGUF's block types against the `gguf` package bit for bit, and the sizes of their errors."""

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from qsae_jax.quant.fake import round_weight
from qsae_jax.quant.ggml import FALLBACKS, TYPES, Ggml, kept_as

PLAIN = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")  # those that `gguf` itself can write


def rounded(w, name):
    """Ours of rows `[out, in]`, as a file has them; jitted."""
    return np.asarray(round_weight(np.ascontiguousarray(w.T), Ggml(name))).T


def oracle(w, name):
    kind = Kind[name.upper()]
    return gguf.quants.dequantize(gguf.quants.quantize(w, kind), kind)


@pytest.fixture(scope="module")
def matrix():
    """32 rows of 512: normal ones, and those on which quantizers stumble."""
    random = np.random.default_rng(0)
    w = random.normal(size=(32, 512)).astype(np.float32)
    w[0] = 0
    w[1, 32:96] = 0  # zero blocks
    w[2] = 0.3
    w[3, 64:128] = -1.7  # constant blocks
    w[4] = -np.abs(w[4])
    w[5] = np.abs(w[5])
    w[6:10] = random.integers(-32, 33, (4, 512)) / 4  # ties of codes
    w[10:12] = random.integers(-2, 3, (2, 512))  # ties of extrema
    w[12] *= 1e-6  # q8_0's scale becomes 0
    w[13] *= 1e-5
    w[14] *= 1e-4  # scales are denormal in float16
    w[15] *= 1e3
    w[16] = w[16] ** 5  # heavy tails
    w[17, 1:] = 0
    w[18, ::2] = 0
    w[19, ::32] = 100  # one large weight a block, that is positive
    w[20] = random.integers(-254, 255, 512) / 2
    w[20, ::32] = 127  # ties of q8_0
    return w


@pytest.mark.parametrize("name", PLAIN)
def test_bit_equal_to_gguf(matrix, name):
    """Jitted, and one operation after the other. Control: every other type gives other values, and so do blocks that
    lie along the outputs."""
    expected = oracle(matrix, name)
    np.testing.assert_array_equal(rounded(matrix, name), expected)
    how = Ggml(name)
    with jax.disable_jit():
        eager = how.round(matrix.T, how.numbers(), jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(eager).T, expected)
    assert [other for other in TYPES if (rounded(matrix, other) == expected).all()] == [name]
    assert (expected != rounded(matrix.T, name).T).any()


def halves_to_even(w, name):
    """The oracle but for the rounding of codes that lie half way."""
    x = w.reshape(-1, 32)
    low, extremum = x.min(1, keepdims=True), np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)
    d, low, least, most = {
        "q8_0": (np.abs(extremum) / 127, 0 * low, -127, 127),
        "q4_0": (extremum / -8, 0 * low, -8, 7),
        "q5_0": (extremum / -16, 0 * low, -16, 15),
        "q4_1": ((x.max(1, keepdims=True) - low) / 15, low, 0, 15),
        "q5_1": ((x.max(1, keepdims=True) - low) / 31, low, 0, 31),
    }[name]
    by = np.where(d == 0, 0, 1 / np.where(d == 0, 1, d))
    d, least_kept = (v.astype(np.float16).astype(np.float32) for v in (d, low))
    return (np.round((x - low) * by).clip(least, most) * d + least_kept).reshape(w.shape)


@pytest.mark.parametrize("name", PLAIN)
def test_the_matrix_has_ties(matrix, name):
    """Control of the data: codes rounded half to even are others in some places, and nowhere else."""
    far = halves_to_even(matrix, name) != oracle(matrix, name)
    assert 5 < far.sum() < 0.2 * far.size and not far[21:].any()


KEPT = {
    (512, 256): {name: name for name in TYPES},
    (32, 96, 544): {name: FALLBACKS.get(name, name) for name in TYPES},
    (8, 100, 300): dict.fromkeys(TYPES, "f16"),
}


@pytest.mark.parametrize("inputs", KEPT, ids=lambda inputs: f"{inputs[-1]} inputs")
def test_kept_as(inputs):
    """What llama.cpp takes where a row is no multiple of the block. Control: where it is one, the type itself."""
    assert FALLBACKS == {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "q2_k": "q4_0", "q3_k": "q4_0"}
    for n in inputs:
        assert {name: kept_as(name, n) for name in TYPES} == KEPT[inputs]


@pytest.mark.parametrize("name", FALLBACKS)
def test_the_other_type_is_used(name):
    """Rows of 96 bit-equal to `gguf` in the other type, rows of 40 to float16. Control: not to any third type."""
    w = np.random.default_rng(1).normal(size=(4, 96)).astype(np.float32)
    alike = [other for other in PLAIN if (oracle(w, other) == rounded(w, name)).all()]
    assert alike == [FALLBACKS[name]]
    odd = w[:, :40]
    np.testing.assert_array_equal(rounded(odd, name), odd.astype(np.float16).astype(np.float32))


# |W - Q(W)| / |W| of standard normal weights, made with ggml's own quantizers in C on 256 rows of 2048.
PUBLISHED = {"q8_0": 0.0054, "q5_1": 0.0381, "q5_0": 0.0428, "q4_1": 0.0782, "q4_0": 0.0862, "iq4_nl": 0.07612}
PUBLISHED |= {"q6_k": 0.01774, "q5_k": 0.03610, "q4_k": 0.07135, "q3_k": 0.15084, "q2_k": 0.29677}


@pytest.mark.parametrize("name", PUBLISHED)
def test_errors_of_normal_weights(name):
    """Within 1.5 %, of 131072 weights. Control: no other type's size fits."""
    w = np.random.default_rng(2).standard_normal((8, 32, 512), dtype=np.float32)
    apart = np.linalg.norm(np.stack([rounded(x, name) for x in w]) - w) / np.linalg.norm(w)
    assert [other for other, size in PUBLISHED.items() if abs(apart / size - 1) < 0.015] == [name]
