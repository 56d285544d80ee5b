"""Our quantizers beside the libraries that people quantize with. Each is skipped where its library is not installed.

Two values are one where they agree to 1e-6 of themselves. Where they are not, the weight has to lie halfway between
them: a torch library divides by the scale where we multiply by its reciprocal, so that a tie may fall to the other
side. Under `half` the extremum of a group is such a tie (and one weight of a group at most is), elsewhere there are
none in random numbers. The tie is looked for in float32's rounding of the highest code: 2e-7 * 2^bits of a step.
Whatever else differs is a test of its own, that says whose formula it is. Every control is another convention, rule
or granularity, and must fail the same comparison.
"""

import jax
import numpy as np
import pytest

from qsae_jax.quant.codebook import dynamic_map, nested
from qsae_jax.quant.fake import round_weight
from qsae_jax.quant.names import parse_how

F = np.float32
SHAPE = (64, 512)


def ours(w, name):
    """`[out, in]` -> the same rounded."""
    return np.asarray(round_weight(np.ascontiguousarray(w.T), parse_how(name, name))).T


def apart(a, b):
    a, b = np.asarray(a, F), np.asarray(b, F)
    return np.abs(a - b) > 1e-6 * np.maximum(np.abs(a), np.abs(b))


def agree(w, mine, theirs, bits=4, ties=0):
    """No more than `ties` weights differ, and these lie halfway between the two."""
    far = apart(mine, theirs)
    off, step = np.abs(w - (mine + theirs) / 2)[far], np.abs(mine - theirs)[far]
    return far.sum() <= ties and (off <= 2e-7 * 2**bits * step).all()


@pytest.fixture(scope="module")
def w():
    """Heavy tails, rows of very different size, a group of zeros, a row without negative weights and one
    without positive ones."""
    rng = np.random.default_rng(0)
    w = (rng.standard_t(5, SHAPE) * 10 ** rng.uniform(-2, 1, (SHAPE[0], 1))).astype(F)
    w[0, :128] = 0
    w[1], w[2] = np.abs(w[1]), -np.abs(w[2])
    return w


# qwix: `half` for integers; a scale per output channel or per tile of inputs. It and we run on one compiler, which
# makes of its divisions the products that ours are: bit for bit.


def by_qwix(w, kind, tile=None, method="absmax"):
    qwix = pytest.importorskip("qwix")
    q = qwix.quantize(w, kind, channelwise_axes=(0,), tiled_axes={1: tile} if tile else {}, calibration_method=method)
    return np.asarray(qwix.dequantize(q))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("tile, part", [(None, ""), (128, "-g128")])
def test_qwix_symmetric(w, bits, tile, part):
    """Exact. Controls: another convention, another granularity."""
    theirs = by_qwix(w, f"int{bits}", tile)
    np.testing.assert_array_equal(ours(w, f"int{bits}{part}-half"), theirs)
    for other in f"{part}-full_qmax", "-g64-half":
        assert not agree(w, ours(w, f"int{bits}{other}"), theirs, bits, SHAPE[0] * 4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tile, part", [(None, ""), (128, "-g128")])
def test_qwix_asymmetric(w, bits, tile, part):
    """Exact but on exact ties, which a test below holds. Controls: the range without zero (rows 1 and 2), symmetric."""
    theirs = by_qwix(w, f"int{bits}", tile, "minmax")
    np.testing.assert_array_equal(ours(w, f"int{bits}{part}-asym"), theirs)
    for other in "asym_tight", "half":
        assert not agree(w, ours(w, f"int{bits}{part}-{other}"), theirs, bits, SHAPE[0] * 4)


@pytest.mark.parametrize("kind, tile, name, other", [
    ("nf4", 64, "nf4", "nf4-g128"),
    ("float8_e4m3fn", None, "fp8_e4m3", "fp8_e4m3-g128"),
    ("float8_e5m2", None, "fp8_e5m2", "fp8_e4m3"),
    ("mxfp8", 32, "mxfp8-scale_rceil", "mxfp8-scale_even"),
    ("mxfp4", 32, "mxfp4-scale_rceil", "mxfp4-scale_floor"),
])  # fmt: skip
def test_qwix_floats(w, kind, tile, name, other):
    """Exact. Control: another rule, granularity or element."""
    theirs = by_qwix(w, kind, tile)
    np.testing.assert_array_equal(ours(w, name), theirs)
    assert not agree(w, ours(w, other), theirs)


def test_qwix_nvfp4(w):
    """Its nvfp4 has one level of scale: ours, to 1e-6, where the matrix's own is 1. Controls: where it is not; block
    scales in float32."""
    w = w / np.abs(w).max() * F(2688)
    assert agree(w, ours(w, "nvfp4"), by_qwix(w, "nvfp4", 16))
    assert not agree(w, ours(w / F(3), "nvfp4"), by_qwix(w / F(3), "nvfp4", 16))
    assert not agree(w, ours(w, "fp4_e2m1-g16"), by_qwix(w, "nvfp4", 16))


# compressed-tensors: what vLLM loads.

PARTS = {"channel": "", "group": "-g128", "block": "-b16x64"}


def by_compressed_tensors(w, torch, strategy, size=128, whole=None, **args):
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    x, (n, m) = torch.from_numpy(w), w.shape
    extra = {"block_structure": [16, 64]} if strategy == "block" else {}
    extra |= {"group_size": size} if "group" in strategy else {}
    args = QuantizationArgs(strategy=strategy, **extra, **args)
    parts = x[:, None] if strategy == "channel" else x.reshape(n, -1, size)
    if strategy == "block":
        parts = x.reshape(n // 16, 16, m // 64, 64).transpose(1, 2).flatten(2)
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args, global_scale=whole)
    codes = forward.quantize(x, scale, zero, args, global_scale=whole)
    made = forward.dequantize(codes, scale, zero, args, global_scale=whole).numpy()
    np.testing.assert_array_equal(made, forward.fake_quantize(x, scale, zero, args, global_scale=whole).numpy())
    return made


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("strategy", PARTS)
def test_compressed_tensors_symmetric(w, torch, bits, strategy):
    """But for ties at the extremum, one to a group at most. Controls: another convention, another granularity."""
    theirs = by_compressed_tensors(w, torch, strategy, num_bits=bits, symmetric=True)
    groups = w.size // {"channel": 512, "group": 128, "block": 1024}[strategy]
    assert agree(w, ours(w, f"int{bits}{PARTS[strategy]}-half"), theirs, bits, groups)
    for other in f"{PARTS[strategy]}-full_qmax", "-b64x16-half":
        assert not agree(w, ours(w, f"int{bits}{other}"), theirs, bits, groups)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("strategy", PARTS)
def test_compressed_tensors_asymmetric(w, torch, bits, strategy):
    """All, to 1e-6. Controls: the range without zero (rows 1 and 2; every block has both signs), symmetric."""
    theirs = by_compressed_tensors(w, torch, strategy, num_bits=bits, symmetric=False)
    assert agree(w, ours(w, f"int{bits}{PARTS[strategy]}-asym"), theirs, bits)
    for other in ["half"] if strategy == "block" else ["asym_tight", "half"]:
        assert not agree(w, ours(w, f"int{bits}{PARTS[strategy]}-{other}"), theirs, bits)


@pytest.mark.parametrize("strategy", ["channel", "block"])
def test_compressed_tensors_fp8(w, torch, strategy):
    """All, to 1e-6. Control: another granularity."""
    theirs = by_compressed_tensors(w, torch, strategy, num_bits=8, type="float", symmetric=True)
    assert agree(w, ours(w, f"fp8_e4m3{PARTS[strategy]}"), theirs)
    assert not agree(w, ours(w, "fp8_e4m3-g128"), theirs)


@pytest.mark.parametrize("bits, name, rule", [(4, "mxfp4", "even"), (6, "mxfp6_e2m3", "even"), (8, "mxfp8", "rceil")])
def test_compressed_tensors_mx(w, torch, bits, name, rule):
    """Exact. Its mxfp8 rounds absmax to fp4's mantissa, and so goes up from 448 * 2^n on: above it `rceil` goes up
    too, and the two part at 448 itself. Controls: the other rules; a block of absmax 448."""
    kind = {"num_bits": bits, "type": "float", "symmetric": True, "scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
    theirs = by_compressed_tensors(w, torch, "group", 32, **kind)
    for other in "floor", "ceil", "rceil", "even":
        assert (ours(w, f"{name}-scale_{other}") == theirs).all() == (other == rule)
    at = np.zeros((1, 32), F)
    at[0, :2] = 448, 2.0**-9  # e4m3's least number, under the smaller scale
    same = (ours(at, f"{name}-scale_{rule}") == by_compressed_tensors(at, torch, "group", 32, **kind)).all()
    assert same == (rule == "even")


def by_compressed_tensors_nvfp4(w, torch):
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    whole = utils.generate_gparam(torch.from_numpy(w).min(), torch.from_numpy(w).max())
    kept = {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}
    return by_compressed_tensors(w, torch, "tensor_group", 16, whole, num_bits=4, type="float", symmetric=True, **kept)


def test_compressed_tensors_nvfp4(w, torch):
    """All, to 1e-6, with both levels. Control: block scales in float32."""
    theirs = by_compressed_tensors_nvfp4(w, torch)
    assert agree(w, ours(w, "nvfp4"), theirs)
    assert not agree(w, ours(w, "fp4_e2m1-g16"), theirs)


def test_exact_ties_of_asymmetric_integers(torch):
    """qwix and compressed-tensors add the zero point before they round to even, we and torchao after: an odd zero
    point turns every exact tie, and nothing else. Control: an even one turns none."""
    ao = pytest.importorskip("torchao.quantization.quant_primitives")
    for low, odd in (-7, True), (-8, False):
        halves = np.arange(low + 1, low + 14) + 0.5
        w = np.concatenate([[low, low + 15, 0], halves]).astype(F)[None]
        mine, tied = ours(w, "int4-asym"), w % 1 == 0.5
        qwix = by_qwix(w, "int4", method="minmax")
        np.testing.assert_array_equal(qwix, by_compressed_tensors(w, torch, "channel", num_bits=4, symmetric=False))
        np.testing.assert_array_equal(mine != qwix, tied if odd else np.zeros_like(tied))
        x, kind = torch.from_numpy(w), (torch.int8, -8, 7)
        scale, zero = ao.choose_qparams_affine(x, ao.MappingType.ASYMMETRIC, (1, 16), *kind)
        codes = ao.quantize_affine(x, (1, 16), scale, zero, *kind)
        np.testing.assert_array_equal(mine, ao.dequantize_affine(codes, (1, 16), scale, zero, *kind).numpy())


# bitsandbytes: flattened blocks.


def by_bitsandbytes(w, torch, table, block, double=False):
    bnb = pytest.importorskip("bitsandbytes.functional")
    x = torch.from_numpy(w)
    q, state = bnb.quantize_4bit(x, blocksize=block, quant_type=table, compress_statistics=double)
    # From its codes and magnitudes: dequantize_4bit of 0.50.2 is wrong on CPUs with AVX-512 where a row is no multiple
    # of a block (off by up to 1.9 on normal numbers, of which none is farther than 0.5 from its own code).
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if double else state.absmax
    packed = q.reshape(-1).numpy()
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: w.size]
    values = state.code.numpy()[codes] * np.repeat(absmax.numpy(), block)[: w.size]
    return values.reshape(w.shape), state


NORMAL = {shape: np.random.default_rng(1).normal(size=shape).astype(F) for shape in [(64, 512), (128, 96), (50, 100)]}


@pytest.mark.parametrize("table, other", [("nf4", "fp4"), ("fp4", "nf4")])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("shape", NORMAL)
def test_bitsandbytes(torch, table, other, block, shape):
    """Exact, in rows that are and are not multiples of a block, the last block cut short. Controls: the other table,
    another block; blocks that end with the row, where the row is no multiple."""
    w = NORMAL[shape]
    theirs, _ = by_bitsandbytes(w, torch, table, block)
    np.testing.assert_array_equal(ours(w, f"{table}-g{block}"), theirs)
    assert not agree(w, ours(w, f"{other}-g{block}"), theirs) and not agree(w, ours(w, f"{table}-g32"), theirs)
    if shape[1] % block:
        rows = np.concatenate([ours(w[i : i + 1], f"{table}-g{block}") for i in range(8)])
        assert not agree(w[:8], rows, theirs[:8])


@pytest.mark.parametrize("table", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("shape", NORMAL)
def test_bitsandbytes_double(torch, table, block, shape):
    """All, to 1e-6, but for blocks whose magnitude bitsandbytes' CPU kernel brings to another 8-bit code: it looks up
    a table of 65536 numbers from -1 to 1, so that its cuts are off the midpoints by up to 1/65535. Ours are not.
    Control: magnitudes in float32."""
    w = NORMAL[shape]
    theirs, state = by_bitsandbytes(w, torch, table, block, double=True)
    far = np.pad(apart(ours(w, f"{table}-g{block}-double"), theirs).reshape(-1), (0, -w.size % block))
    turned = far.reshape(-1, block).any(1)
    top = np.abs(np.pad(w.reshape(-1), (0, -w.size % block))).reshape(-1, block).max(1)
    away = top - state.offset.numpy()
    y = away / np.repeat(state.state2.absmax.numpy(), 256)[: len(away)]
    middles = (dynamic_map()[1:] + dynamic_map()[:-1]) / 2
    assert turned.sum() <= 1 + len(top) // 100
    assert (np.abs(y[turned, None] - middles).min(1) < 1.01 / 65535).all()
    mine, nearest = np.asarray(jax.jit(nested)(top)), np.abs(y[:, None] - dynamic_map()).argmin(1)
    values = dynamic_map()[nearest] * np.repeat(state.state2.absmax.numpy(), 256)[: len(away)] + state.offset.numpy()
    np.testing.assert_allclose(mine, values, rtol=1e-6)
    assert apart(ours(w, f"{table}-g{block}"), theirs).mean() > 0.5


def test_bitsandbytes_dynamic_map():
    """Exact. Control: the unsigned map."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    np.testing.assert_array_equal(dynamic_map(), bnb.create_dynamic_map().numpy())
    assert (dynamic_map() != bnb.create_dynamic_map(signed=False).numpy()).any()


# torchao.


@pytest.mark.parametrize("mapping, name, others", [
    ("SYMMETRIC", "half", ("no_clip", "full_qmax")),
    ("SYMMETRIC_NO_CLIPPING_ERR", "no_clip", ("half", "signed_full")),
    ("ASYMMETRIC", "asym", ("half", "asym_tight")),
])  # fmt: skip
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_torchao_integers(w, torch, mapping, name, others, bits):
    """To 1e-6 all of no_clip and asym; half but for ties at the extremum, one to a group at most. Controls: other
    conventions, another granularity."""
    ao = pytest.importorskip("torchao.quantization.quant_primitives")
    size, x, kind = (1, 128), torch.from_numpy(w), (torch.int8, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    scale, zero = ao.choose_qparams_affine(x, ao.MappingType[mapping], size, *kind)
    codes = ao.quantize_affine(x, size, scale, zero, *kind)
    theirs = ao.dequantize_affine(codes, size, scale, zero, *kind).numpy()
    ties = w.size // 128 if name == "half" else 0
    assert agree(w, ours(w, f"int{bits}-g128-{name}"), theirs, bits, ties)
    for other in (f"g64-{name}", *(f"g128-{convention}" for convention in others)):
        assert not agree(w, ours(w, f"int{bits}-{other}"), theirs, bits, ties)


def by_torchao_mx(w, torch, element, rule):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    kind = {
        "mxfp4": torch.float4_e2m1fn_x2, "mxfp6_e2m3": mx.DTYPE_FP6_E2M3, "mxfp6_e3m2": mx.DTYPE_FP6_E3M2,
        "mxfp8": torch.float8_e4m3fn, "mxfp8_e5m2": torch.float8_e5m2,
    }[element]  # fmt: skip
    scale, codes = mx.to_mx(torch.from_numpy(w), kind, 32, mx.ScaleCalculationMode[rule.upper()])
    return mx.to_dtype(codes, scale, kind, 32, torch.float32).numpy()


LARGEST = {"mxfp4": 6.0, "mxfp6_e2m3": 7.5, "mxfp6_e3m2": 28.0, "mxfp8": 448.0, "mxfp8_e5m2": 57344.0}


def at_the_edges(largest):
    """Blocks whose absmax is where a rule turns: a power of two, the largest value, halfway to the next; and one
    float below and above."""
    tops = np.asarray([1, largest, 1.5, 1.75, 1.875, 1.9375], F)[:, None] * F(2) ** np.arange(-20, 21).astype(F)
    tops = np.concatenate([np.nextafter(tops.ravel(), F(0)), tops.ravel(), np.nextafter(tops.ravel(), F(np.inf))])
    w = np.random.default_rng(3).uniform(-1, 1, (len(tops), 32)).astype(F) * tops[:, None]
    w[:, 0] = tops
    return w, tops


@pytest.mark.parametrize("rule", ["floor", "ceil", "rceil", "even"])
@pytest.mark.parametrize("element", LARGEST)
def test_torchao_mx(w, torch, rule, element):
    """Exact, also where the rules turn. But for rceil one float above largest * 2^n: torchao's ceil(log2(.)) in
    float32 is n there, and so clips; ours is n + 1, as cvt.rp of Blackwell has it. Control: the other rules; of e5m2,
    whose exponents reach far below its blocks, only floor differs on plain weights."""
    edges, tops = at_the_edges(LARGEST[element])
    above = np.isin(tops, np.nextafter(LARGEST[element] * F(2) ** np.arange(-30, 31).astype(F), F(np.inf)))
    plain = edges[~above] if rule == "rceil" else edges
    theirs = by_torchao_mx(w, torch, element, rule), by_torchao_mx(plain, torch, element, rule)
    np.testing.assert_array_equal(ours(w, f"{element}-scale_{rule}"), theirs[0])
    np.testing.assert_array_equal(ours(plain, f"{element}-scale_{rule}"), theirs[1])
    for other in {"floor", "ceil", "rceil", "even"} - {rule}:
        same = (ours(w, f"{element}-scale_{other}") == theirs[0]).all()
        assert not same or (element == "mxfp8_e5m2" and "floor" not in (rule, other)), other


def test_the_next_power_of_two_is_found_exactly(torch):
    """One float above 6 * 2^n, where nothing may be clipped, the scale is 2^(n + 1). torchao keeps 2^n, from n = 4 on
    and below -4. Control: at 6 * 2^n itself both keep 2^n."""
    w = np.zeros((2, 32), F)
    w[:, 0], w[:, 1] = (np.nextafter(F(96), F(np.inf)), 96), 24
    mine, theirs = ours(w, "mxfp4-scale_rceil"), by_torchao_mx(w, torch, "mxfp4", "rceil")
    np.testing.assert_array_equal(mine[:, :2], [[96, 32], [96, 24]])  # 24 is 1.5 * 16, and 0.75 * 32 a tie
    np.testing.assert_array_equal(theirs[:, :2], [[96, 24], [96, 24]])


def by_torchao_nvfp4(w, torch):
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = torch.from_numpy(w)
    whole = nv.per_tensor_amax_to_scale(x.abs().max())
    scales, packed = nv.nvfp4_quantize(x, 16, whole)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = table[torch.stack([packed & 15, packed >> 4], -1).reshape(x.shape).long()].reshape(len(x), -1, 16)
    return (values * scales.float().reshape(len(x), -1, 1) * whole).reshape(x.shape).numpy()


def test_torchao_nvfp4(torch):
    """All, to 1e-6, down to blocks 2^-15 of the largest; but torchao keeps no block scale below 2^-6, and so rounds
    smaller blocks more coarsely, where ours and compressed-tensors go on to e4m3's 2^-9. Control: block scales in
    float32."""
    w = np.random.default_rng(2).standard_normal((16, 16)).astype(F) * F(2) ** -np.arange(16, dtype=F)[:, None]
    small = np.abs(w).max(1) / 6 < 2.0**-6 * np.abs(w).max() / 2688
    mine, theirs = ours(w, "nvfp4"), by_torchao_nvfp4(w, torch)
    assert small.any() and not small.all()
    assert agree(w[~small], mine[~small], theirs[~small]) and apart(mine[small], theirs[small]).any(1).all()
    assert agree(w, mine, by_compressed_tensors_nvfp4(w, torch))
    assert not agree(w[~small], ours(w, "fp4_e2m1-g16")[~small], theirs[~small])


# HQQ.


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("size", [0.01, 0.05, 1.0])
def test_hqq(torch, bits, size):
    """To 1e-6 of the largest weight, which a single code of difference would pass a thousandfold: all codes are
    equal. With groups at its limits: constant, within 1e-4, within 3e-4 (the inverse scale is at most 2e4), zero.
    Control: without the proximal steps."""
    hqq = pytest.importorskip("hqq.core.quantize")
    rng = np.random.default_rng(5)
    w = rng.standard_t(4, size=SHAPE).astype(F) * F(size)
    w[0, :64], w[1, :64], w[2, :64], w[3, :64] = 0.3, 0.3 + rng.random(64) * 9e-5, rng.random(64) * 3e-4, 0
    kind = {"group_size": 64, "axis": 1, "round_zero": bits == 4, "bitpack": False, "device": "cpu"}
    for optimize in True, False:
        codes, meta = hqq.Quantizer.quantize(torch.from_numpy(w), nbits=bits, optimize=optimize, **kind)
        theirs = ((codes.float() - meta["zero"]) * meta["scale"]).reshape(w.shape).numpy()
        error = np.abs(ours(w, f"int{bits}-g64-hqq") - theirs)
        assert (error.max() <= 1e-6 * np.abs(w).max()) == optimize


# AutoAWQ's own quantizer, which cannot be installed beside these: its three lines.


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 0.1, -0.1])
def test_autoawq(w, torch, bits, shift):
    """All, to 1e-6, in groups of both signs, of one, and of one number. Controls: the range with zero (which differs
    where a group has one sign), symmetric, another granularity."""
    w = np.sign(shift) * np.abs(w) + F(shift) if shift else w.copy()
    w[2, :128] = 0.3
    x, top = torch.from_numpy(w).reshape(-1, 128), 2**bits - 1
    scale = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)).clamp(min=1e-5) / top
    zero = (-torch.round(x.amin(1, keepdim=True) / scale)).clamp(0, top)
    theirs = ((torch.clamp(torch.round(x / scale) + zero, 0, top) - zero) * scale).reshape(w.shape).numpy()
    assert agree(w, ours(w, f"int{bits}-g128-asym_tight"), theirs, bits)
    for other in "g128-asym", "g128-half", "g64-asym_tight":
        assert not agree(w, ours(w, f"int{bits}-{other}"), theirs, bits)


def test_jax_is_the_one_under_test():
    assert jax.default_backend() == "cpu"
