"""GGUF's K-quants: bit-equal to ggml's own C, and to the `gguf` package's reading of the bytes they would be kept as.

Codes and scales are found outside of jit here, values under it: where they agree, so do the two."""

import json
from functools import cache
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from qsae_jax.quant.fake import round_weight
from qsae_jax.quant.ggml import Ggml
from qsae_jax.quant.kquant import K_TYPES

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "ggml_k.json").read_text())
GIVEN = 16  # rows whose bytes the goldens hold
CODES = dict.fromkeys(("q3_k", "q6_k"), np.s_[:64]) | {"q2_k": np.s_[16:80], "q4_k": np.s_[16:], "q5_k": np.s_[48:]}


def rows_of(seed, n=GIVEN):
    """Nearly normal rows of 256, exact in float32: sums of four 16-bit integers of a fixed stream."""
    raw = np.random.PCG64(seed).random_raw(n * 256).astype("<u8").view("<u2").astype(np.int64)
    return ((raw.reshape(n, 256, 4).sum(-1) - 131070) / 2**15).astype(np.float32)


def golden_rows():
    """The rows whose bytes ggml wrote: a normal one, and those on which quantizers stumble."""
    x = rows_of(7)
    # Where a division by the reciprocal gives another code (of q2_k, q4_k, q5_k), and q3_k needs its fifth pass.
    x[12], x[13] = rows_of(1)[6], np.round(rows_of(148)[3] * 4) / 4
    x[14], x[15] = np.round(rows_of(103)[9] * 4) / 4, rows_of(77)[11]
    x[1] = x[1] * x[1] * x[1]  # heavy tails
    x[2] = np.abs(x[2])
    x[3] = -np.abs(x[3])
    x[4, 32:80] = 0  # zero sub-blocks
    x[5:7] = np.round(x[5:7] * 4) / 4
    x[7] *= np.float32(2.0**-20)  # scales that float16 has no normal number for
    x[8] *= np.float32(1000)
    x[9, 64:128] = 0.75
    x[9, 128:160] = -0.75  # constant sub-blocks
    x[10, 3::32] *= np.float32(25)
    x[11] = x[11] / 8 + np.float32(2)  # a range far from zero
    return x


def rows():
    """64 of them: those of the goldens, then those of which nothing but finite values is asked, then normal ones."""
    x = np.concatenate([golden_rows(), rows_of(2, 48)])
    x[16] = 0
    x[17], x[18], x[19] = 0.3, -0.3, 1e-3
    x[20] *= np.float32(1e-30)
    x[21], x[22] = 1e-20, -1e-37
    x[23, 1:] = 0
    x[24] *= np.float32(1e8)  # more than float16 holds
    return x


@cache
def values(name):
    """Ours of the rows, jitted, in a matrix of 32 outputs."""
    return np.asarray(round_weight(np.ascontiguousarray(rows().reshape(32, 512).T), Ggml(name))).T.reshape(64, 256)


@cache
def parts(name):
    """d, dmin `[rows]`, scales, mins `[rows, s]` and codes `[rows, 256]`, one operation after the other."""
    found = jax.device_get(K_TYPES[name](np.ascontiguousarray(rows().T)[None]))
    return [v.reshape(64) for v in found[:2]] + [v[0].reshape(-1, 64).T for v in found[2:]]


def decoded(raw, name):
    return gguf.quants.dequantize(np.ascontiguousarray(raw, np.uint8), Kind[name.upper()])


def golden(name):
    return np.stack([np.frombuffer(bytes.fromhex(row), np.uint8) for row in GOLDENS[name]])


def two_bits(codes):
    """Of 128 codes the j-th 32 in bits 2j and 2j + 1 of 32 bytes."""
    c = codes.reshape(2, 4, 32)
    return (c[:, 0] | c[:, 1] << 2 | c[:, 2] << 4 | c[:, 3] << 6).reshape(-1)


def nibbles(codes, run):
    """A run of codes in the low halves of so many bytes, the next in their high halves."""
    c = codes.reshape(-1, 2, run)
    return (c[:, 0] | c[:, 1] << 4).reshape(-1)


def one_bit(bits):
    """The i-th 32 in bit i of 32 bytes."""
    return sum(run << i for i, run in enumerate(bits.reshape(8, 32)))


def six_bit(s, m):
    """Eight scales and eight minima of 6 bits in 12 bytes: the last four's upper 2 bits are with the first four."""
    first = [s[j] | s[j + 4] >> 4 << 6 for j in range(4)] + [m[j] | m[j + 4] >> 4 << 6 for j in range(4)]
    return first + [(s[j] & 15) | (m[j] & 15) << 4 for j in range(4, 8)]


def q3_scales(s):
    """Sixteen scales of 6 bits in 12 bytes: low halves in eight, and four times 2 bits in each of four."""
    low = [(s[j] & 15) | (s[j + 8] & 15) << 4 for j in range(8)]
    return low + [sum(s[j + 4 * i] >> 4 << 2 * i for i in range(4)) for j in range(4)]


def f16(x):
    return np.frombuffer(np.float16(x).tobytes(), np.uint8)


def packed(name, d, dmin, s, m, c):
    """The bytes of one block (layouts: ggml-common.h). Codes and scales that are signed get their offset."""
    assert (np.float16(d) == d) and (np.float16(dmin) == dmin)
    s, m, c = (np.asarray(v).astype(np.int64) for v in (s, m, c))
    if name == "q2_k":
        fields = [s | m << 4, two_bits(c), f16(d), f16(dmin)]
    elif name == "q3_k":
        fields = [one_bit((c + 4) >> 2), two_bits((c + 4) & 3), q3_scales(s + 32), f16(d)]
    elif name == "q4_k":
        fields = [f16(d), f16(dmin), six_bit(s, m), nibbles(c, 32)]
    elif name == "q5_k":
        fields = [f16(d), f16(dmin), six_bit(s, m), one_bit(c >> 4), nibbles(c & 15, 32)]
    else:
        fields = [nibbles((c + 32) & 15, 64), two_bits((c + 32) >> 4), s & 255, f16(d)]
    out = np.concatenate([np.asarray(field, np.int64) for field in fields])
    assert out.min() >= 0 and out.max() < 256
    return out.astype(np.uint8)


def all_packed(name, parts):
    return np.stack([packed(name, *one) for one in zip(*parts, strict=True)])


@pytest.mark.parametrize("name", K_TYPES)
def test_a_file_gives_these_values(name):
    """Codes and scales packed as a file has them, read by `gguf`: bit for bit, of all rows. Control: with the scales
    shifted by one sub-block, with neighbouring runs of codes exchanged, with the halves of each byte of codes
    exchanged, no row of normal weights is the same."""
    raw = all_packed(name, parts(name))
    np.testing.assert_array_equal(decoded(raw, name), values(name))
    d, dmin, scales, mins, codes = parts(name)
    runs = codes.reshape(64, -1, 2, 32)[:, :, ::-1].reshape(64, 256)
    halves = raw.copy()
    halves[:, CODES[name]] = halves[:, CODES[name]] >> 4 | halves[:, CODES[name]] << 4
    faults = [[d, dmin, np.roll(scales, 1, axis=1), mins, codes], [d, dmin, scales, mins, runs]]
    for other in (halves, *(all_packed(name, fault) for fault in faults)):
        assert (decoded(other, name) != values(name))[25:].any(axis=1).all()


@pytest.mark.parametrize("name", K_TYPES)
def test_bytes_equal_ggmls(name):
    """The very bytes that ggml's C writes, but for the codes of sub-blocks whose scale is 0, which mean nothing.
    Control: no row of ours has the bytes of the row before."""
    raw, (d, _, scales, _, _) = all_packed(name, parts(name))[:GIVEN], parts(name)
    whole = (d[:, None] * scales != 0).all(axis=1)[:GIVEN]
    assert whole.sum() >= 8
    np.testing.assert_array_equal(raw[whole], golden(name)[whole])
    assert (raw != np.roll(golden(name), 1, axis=0)).any(axis=1).all()


@pytest.mark.parametrize("name", [*K_TYPES, "iq4_nl"])
def test_values_equal_ggmls(name):
    """Bit for bit, jitted. Control: the rows in another order, and one changed byte of codes, are noticed."""
    ours, raw = values(name)[:GIVEN], golden(name)
    np.testing.assert_array_equal(ours, decoded(raw, name))
    assert (ours != decoded(np.roll(raw, 1, axis=0), name)).any(axis=1).all()
    other = raw.copy()
    other[0, 60] ^= 33
    assert 1 <= (ours != decoded(other, name)).sum() <= 2


def test_iq4_nl_outside_of_jit():
    """The distortion of the rows of the goldens, bit for bit."""
    how = Ggml("iq4_nl")
    eager = np.asarray(how.round(np.ascontiguousarray(golden_rows().T), how.numbers(), jax.random.key(0))).T
    np.testing.assert_array_equal(eager, decoded(golden("iq4_nl"), "iq4_nl"))


@pytest.mark.parametrize("name", [*K_TYPES, "iq4_nl"])
def test_zeros_and_constants_are_finite(name):
    """A block of zeros stays zeros; blocks of one value come out within 4 %, and a lone weight too. Magnitudes that
    no float16 scale holds end as zero below, and finite above. Control: normal weights are not as near."""
    x, ours = rows(), values(name)
    assert np.isfinite(ours).all() and not ours[16].any()
    assert (np.abs(ours[20:23]) <= 1e-7).all()
    far = np.abs(ours - x).max(axis=1) / np.maximum(np.abs(x).max(axis=1), 1e-30)
    assert (far[[17, 18, 19, 23]] < 0.04).all() and not ours[23, 32:].any()
    assert np.median(np.abs(ours - x)[25:].max(axis=1)) > 0.04
