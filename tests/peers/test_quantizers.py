"""Our quantizers beside the libraries that people quantize with. Each is skipped where its library is not installed.

Two floats that should be one code may fall to two sides of a tie, since libraries divide where we multiply by a
reciprocal; under `half` the extremum itself sits on one. So a comparison counts the weights that agree to 1e-6, and
asks for nearly all: the shares are floors, seen to be reached. Every control is another convention, rule or
granularity, and agrees far less.
"""

import jax
import numpy as np
import pytest

from qsae_jax.quant.codebook import dynamic_map
from qsae_jax.quant.fake import round_weight
from qsae_jax.quant.names import parse_how

F = np.float32


def ours(w, name):
    """`[out, in]` -> the same rounded."""
    return np.asarray(round_weight(np.ascontiguousarray(w.T), parse_how(name, name))).T


def alike(a, b):
    """The share of weights that agree to 1e-6 of the largest."""
    return float((np.abs(np.asarray(a, F) - b) <= 1e-6 * np.abs(b).max()).mean())


@pytest.fixture(scope="module")
def w():
    w = np.random.default_rng(0).standard_t(5, size=(64, 512)).astype(F)
    w[0, :128] = 0
    w[1] = np.abs(w[1])
    return w


# qwix: `half` for integers; a scale per output channel or per tile of inputs.


def by_qwix(w, kind, tile=None, method="absmax"):
    qwix = pytest.importorskip("qwix")
    q = qwix.quantize(w, kind, channelwise_axes=(0,), tiled_axes={1: tile} if tile else {}, calibration_method=method)
    return np.asarray(qwix.dequantize(q))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("tile, part", [(None, ""), (128, "-g128")])
def test_qwix_integers(w, bits, tile, part):
    theirs = by_qwix(w, f"int{bits}", tile)
    assert alike(ours(w, f"int{bits}{part}-half"), theirs) > 0.985
    most = 0.98 if bits == 2 else 0.9  # at 2 bits most weights are 0 under any scale
    assert alike(ours(w, f"int{bits}{part}"), theirs) < most
    assert alike(ours(w, f"int{bits}-g64-half"), theirs) < most


@pytest.mark.parametrize("kind, name, other", [
    ("nf4", "nf4", "fp4"),
    ("float8_e4m3fn", "fp8_e4m3", "fp8_e5m2"),
    ("float8_e5m2", "fp8_e5m2", "fp8_e4m3"),
    ("mxfp8", "mxfp8-scale_rceil", "mxfp8-scale_even"),
    ("mxfp4", "mxfp4-scale_rceil", "mxfp4"),
])  # fmt: skip
def test_qwix_floats(w, kind, name, other):
    theirs = by_qwix(w, kind, {"nf4": 64, "mxfp8": 32, "mxfp4": 32}.get(kind))
    assert alike(ours(w, name), theirs) > 0.999
    assert alike(ours(w, other), theirs) < 0.998


# compressed-tensors: what vLLM loads.


def by_compressed_tensors(w, torch, **args):
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**args)
    x = torch.from_numpy(w)
    parts = {"channel": x[:, None], "group": x.reshape(len(w), -1, args.group_size or 1)}[args.strategy]
    low, high = parts.amin(-1), parts.amax(-1)
    scale, zero = calculate_qparams(low, high, args)
    return forward.fake_quantize(x, scale, zero, args).numpy()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_integers(w, torch, bits, group, symmetric):
    """Its asymmetric zero point is added before rounding, which differs from ours on exact ties only."""
    how = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    theirs = by_compressed_tensors(w, torch, num_bits=bits, symmetric=symmetric, **how)
    part = f"-g{group}" if group else ""
    assert alike(ours(w, f"int{bits}{part}-{'half' if symmetric else 'asym'}"), theirs) > 0.985
    assert alike(ours(w, f"int{bits}{part}-{'asym' if symmetric else 'half'}"), theirs) < 0.9


def test_compressed_tensors_fp8(w, torch):
    theirs = by_compressed_tensors(w, torch, num_bits=8, type="float", strategy="channel", symmetric=True)
    assert alike(ours(w, "fp8_e4m3"), theirs) > 0.995 and alike(ours(w, "fp8_e4m3-tensor"), theirs) < 0.5


def test_compressed_tensors_power_of_two(w, torch):
    """Its scales are those of our rule `even`: the shared exponents are equal, every one of them."""
    mx = pytest.importorskip("compressed_tensors.quantization.utils.mxfp_utils")
    from qsae_jax.quant.grid import FloatGrid
    from qsae_jax.quant.mx import shared_exponent

    top = np.abs(w[1:]).reshape(-1, 32).max(1)
    theirs = mx.round_to_power_2(torch.from_numpy(top)).numpy()
    mine = np.asarray(shared_exponent(top, FloatGrid("fp4_e2m1"), "even")) + 2
    np.testing.assert_array_equal(2.0 ** mine.astype(F), theirs)
    floor = np.asarray(shared_exponent(top, FloatGrid("fp4_e2m1"), "floor")) + 2
    assert (2.0 ** floor.astype(F) != theirs).any()


# bitsandbytes: flattened blocks.


@pytest.mark.parametrize("table", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(64, 512), (128, 96)])
def test_bitsandbytes(torch, table, block, double, shape):
    """Rows that are and are not multiples of a block."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = np.random.default_rng(1).normal(size=shape).astype(F)
    q, state = bnb.quantize_4bit(torch.from_numpy(w), blocksize=block, quant_type=table, compress_statistics=double)
    theirs = bnb.dequantize_4bit(q, state).numpy()
    name = table + (f"-g{block}" if block != 64 else "") + ("-double" if double else "")
    # Of the 512 magnitudes in 8 bits one sits on a tie.
    assert alike(ours(w, name), theirs) > (0.995 if double else 0.999)
    other = {"nf4": "fp4", "fp4": "nf4"}[table]
    assert alike(ours(w, name.replace(table, other)), theirs) < 0.5
    assert alike(ours(w, f"{table}-g32"), theirs) < 0.9


def test_bitsandbytes_dynamic_map():
    bnb = pytest.importorskip("bitsandbytes.functional")
    np.testing.assert_array_equal(dynamic_map(), bnb.create_dynamic_map().numpy())


# torchao.


@pytest.mark.parametrize("mapping, name, other", [
    ("SYMMETRIC", "half", "no_clip"),
    ("SYMMETRIC_NO_CLIPPING_ERR", "no_clip", "half"),
    ("ASYMMETRIC", "asym", "half"),
])  # fmt: skip
@pytest.mark.parametrize("bits", [4, 8])
def test_torchao_integers(w, torch, mapping, name, other, bits):
    ao = pytest.importorskip("torchao.quantization.quant_primitives")
    q, size, x = 2 ** (bits - 1), (1, 128), torch.from_numpy(w)
    ends = (x, ao.MappingType[mapping], size, torch.int8, -q, q - 1)
    scale, zero = ao.choose_qparams_affine(*ends, eps=1e-12)
    codes = ao.quantize_affine(x, size, scale, zero, torch.int8, -q, q - 1)
    theirs = ao.dequantize_affine(codes, size, scale, zero, torch.int8, -q, q - 1).numpy()
    assert alike(ours(w, f"int{bits}-g128-{name}"), theirs) > 0.985
    assert alike(ours(w, f"int{bits}-g128-{other}"), theirs) < 0.9


@pytest.mark.parametrize("rule", ["floor", "ceil", "rceil", "even"])
@pytest.mark.parametrize("element", ["mxfp4", "mxfp8", "mxfp8_e5m2"])
def test_torchao_mx(w, torch, rule, element):
    """Bit for bit. Control: the other rules are not."""
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    dtype = {"mxfp4": torch.float4_e2m1fn_x2, "mxfp8": torch.float8_e4m3fn, "mxfp8_e5m2": torch.float8_e5m2}[element]
    scale, codes = mx.to_mx(torch.from_numpy(w), dtype, 32, mx.ScaleCalculationMode[rule.upper()])
    theirs = mx.to_dtype(codes, scale, dtype, 32, torch.float32).numpy()
    np.testing.assert_array_equal(ours(w, f"{element}-scale_{rule}"), theirs)
    others = {
        name for name in ("floor", "ceil", "rceil", "even") if (ours(w, f"{element}-scale_{name}") == theirs).all()
    }
    assert others <= {rule} | ({"ceil", "rceil", "even"} if element == "mxfp8_e5m2" else set())


def test_torchao_nvfp4(w, torch):
    """Two levels; torchao keeps block scales of at least 2^-6 of the whole, so tiny blocks are left out."""
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = torch.from_numpy(w[2:].copy())
    whole = nv.per_tensor_amax_to_scale(x.abs().max())
    scales, packed = nv.nvfp4_quantize(x, 16, whole)
    low, high = packed & 15, packed >> 4
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = table[torch.stack([low, high], -1).reshape(x.shape).long()].reshape(len(x), -1, 16)
    theirs = (values * scales.float().reshape(len(x), -1, 1) * whole).reshape(x.shape).numpy()
    assert alike(ours(w[2:], "nvfp4"), theirs) > 0.995
    assert alike(ours(w[2:], "fp4_e2m1-g16"), theirs) < 0.5


# HQQ.


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_hqq(torch, bits):
    hqq = pytest.importorskip("hqq.core.quantize")
    w = np.random.default_rng(5).standard_t(4, size=(32, 256)).astype(F) * F(0.05)
    codes, meta = hqq.Quantizer.quantize(torch.from_numpy(w), nbits=bits, group_size=64, axis=1, optimize=True,
                                         round_zero=bits == 4, bitpack=False, device="cpu")  # fmt: skip
    theirs = ((codes.float() - meta["zero"]) * meta["scale"]).reshape(w.shape).numpy()
    mine = ours(w, f"int{bits}-g64-hqq")
    assert (np.abs(mine - theirs) <= 1e-5 * np.abs(w).max()).mean() > 0.995
    assert (np.abs(ours(w, f"int{bits}-g64-affine") - theirs) <= 1e-5 * np.abs(w).max()).mean() < 0.5


# AutoAWQ's own quantizer, which cannot be installed beside these: its three lines.


@pytest.mark.parametrize("bits", [3, 4])
def test_autoawq(w, torch, bits):
    """Groups of positive weights are where it differs from `asym`."""
    x, top = torch.from_numpy(np.abs(w) + 0.1).reshape(-1, 128), 2**bits - 1
    scale = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)).clamp(min=1e-5) / top
    zero = (-torch.round(x.amin(1, keepdim=True) / scale)).clamp(0, top)
    theirs = ((torch.clamp(torch.round(x / scale) + zero, 0, top) - zero) * scale).reshape(w.shape).numpy()
    assert alike(ours(np.abs(w) + F(0.1), f"int{bits}-g128-asym_tight"), theirs) > 0.99
    assert alike(ours(np.abs(w) + F(0.1), f"int{bits}-g128-asym"), theirs) < 0.5


def test_jax_is_the_one_under_test():
    assert jax.default_backend() == "cpu"
