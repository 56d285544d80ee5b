"""The short names of distortions, printed by each and parsed here.

int{2..8}                 rounding to integers; fp8_e4m3 fp8_e5m2 fp6_e2m3 fp6_e3m2 fp4_e2m1 to small floats, with
  -tensor -channel -g{n} -b{o}x{i} -duan2026      what shares a scale (default: an output channel)
  -restricted -full_qmax -half -signed_full -no_clip     integers: symmetric, and which (default: full_qmax)
  -asym -asym_tight -affine                              integers: asymmetric, and which
  -absmax -minmax -p{percent} -mse -hqq                  how the scale is chosen (default: the convention's own)
  -nearest -away -floor -ceil -trunc -stochastic         how it is rounded (default: nearest, halves to even)
  -scale_f16 -scale_bf16 -scale_e4m3 -scale_e8m0         the type of the scale (default: float32)
nf4 fp4                   bitsandbytes' tables in blocks of 64; -g{n} other blocks, -double scales in 8 bits
mxfp4 mxfp6_e2m3 mxfp6_e3m2 mxfp8 mxfp8_e5m2    -scale_floor -scale_ceil -scale_rceil -scale_even, and the roundings
nvfp4                     with both levels of scale, and the roundings
q8_0 q4_0 q4_1 q5_0 q5_1 iq4_nl q2_k q3_k q4_k q5_k q6_k     GGUF
same bf16 f16 prune{fraction} noise@SCHEME permuted@SCHEME prune~SCHEME noise~SCHEME     controls
  #{draw}                 after -stochastic, noise and permuted: another draw
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from qsae_jax.errors import UserError, nearest
from qsae_jax.quant.codebook import TABLES, Lookup
from qsae_jax.quant.control import Cast, Matched, Noise, Permuted, Prune, Same
from qsae_jax.quant.ggml import TYPES, Ggml
from qsae_jax.quant.grid import ASYMMETRIC, FLOATS, SYMMETRIC, FloatGrid, IntGrid
from qsae_jax.quant.group import CHANNEL, DUAN2026, TENSOR, Groups
from qsae_jax.quant.how import How
from qsae_jax.quant.mx import ELEMENTS, RULES, Blocks
from qsae_jax.quant.rounding import MODES
from qsae_jax.quant.scale import STORED
from qsae_jax.quant.scaled import Scaled

HEADS = (*(f"int{b}" for b in range(2, 9)), *FLOATS, *TABLES, *ELEMENTS, "nvfp4", *TYPES, "bf16", "f16", "same")
EXAMPLES = (
    *("fp", "int8", "int7", "int6", "int5", "int4", "int3", "int2", "int4-g128", "int4-g32-asym", "int4-tensor"),
    *("int4-half", "int8-restricted", "int4-g32-signed_full", "int4-g128-mse", "int4-g64-hqq", "int4-stochastic#1"),
    *("int6-duan2026", "int4-g32-asym-scale_f16", "fp8_e4m3", "fp6_e3m2-tensor", "nf4", "nf4-double", "mxfp4"),
    *("mxfp8-scale_rceil", "nvfp4", "q4_k", "q6_k", "bf16", "same", "prune0.2", "noise@int4"),
    *("permuted@int4", "prune~int4"),
    *("int4[4-8]", "int8[mlp.down]+int4"),
)

GRANULARITY = r"tensor|channel|g[1-9]\d{0,8}|b[1-9]\d{0,8}x[1-9]\d{0,8}|duan2026"
MODE, DRAWN = "|".join(MODES), ("stochastic",)
Kinds = Mapping[str, tuple[str, tuple[str, ...]]]
"""Kind of part -> its pattern, and examples for a message."""

FLOAT_PARTS: Kinds = {
    "granularity": (GRANULARITY, ("tensor", "channel", "g128", "b128x128", "duan2026")),
    "scale rule": (r"absmax|mse|p[\d.]{1,12}", ("absmax", "mse", "p99.9")),
    "rounding mode": (MODE, tuple(MODES)),
    "type of scale": ("|".join(f"scale_{kind}" for kind in STORED), tuple(f"scale_{kind}" for kind in STORED)),
}
INT_PARTS: Kinds = FLOAT_PARTS | {
    "convention": ("|".join((*SYMMETRIC, *ASYMMETRIC)), (*ASYMMETRIC, *SYMMETRIC)),
    "scale rule": (r"absmax|minmax|mse|hqq|p[\d.]{1,12}", ("absmax", "minmax", "mse", "hqq", "p99.9")),
}
TABLE_PARTS: Kinds = {"granularity": (r"g[1-9]\d{0,8}", ("g64",)), "nesting": ("double", ("double",))}
NV_PARTS: Kinds = {"rounding mode": FLOAT_PARTS["rounding mode"]}
MX_PARTS: Kinds = NV_PARTS | {
    "scale rule": ("|".join(f"scale_{rule}" for rule in RULES), tuple(f"scale_{rule}" for rule in RULES))
}


def parse_how(text: str, scheme: str) -> How | Matched:
    """The distortion of a name; `scheme` is what the user wrote, for messages."""
    body, hash_, number = text.partition("#")
    if hash_ and not (number.isascii() and number.isdecimal() and len(number) < 10):
        raise UserError(f"scheme `{scheme}`: `#{number}` is no draw: write for example noise@int4#1")
    how = _control(body, scheme) or _quantizer(body, scheme)
    if not hash_ or not int(number):
        return how
    drawn = isinstance(how, Noise | Permuted) or getattr(how, "mode", "") in DRAWN or getattr(how, "by", "") == "noise"
    if not drawn:
        raise UserError(f"scheme `{scheme}`: there is nothing random in `{body}`: leave `#{number}` out")
    return replace(how, draw=int(number))  # pyright: ignore[reportArgumentType]


def _control(text: str, scheme: str) -> How | Matched | None:
    if text == "same":
        return Same()
    if text in ("bf16", "f16"):
        return Cast(text)
    if found := re.fullmatch(r"prune([^~@]*)", text):
        return Prune(_number(found[1], 0, 1, "a fraction of the weights, for example prune0.2", scheme))
    found = re.fullmatch(r"(noise|permuted|prune)([^@~]*)([@~])(.*)", text)
    if not found:
        return None
    kind, factor, sign, inner = found.groups()
    if kind + sign not in ("noise@", "permuted@", "noise~", "prune~") or (factor and kind + sign != "noise@"):
        raise UserError(
            f"scheme `{scheme}`: unknown control `{kind}{factor}{sign}`; possible: noise@ permuted@ noise~ prune~"
        )
    if inner == "fp" or re.match(r"noise|permuted|prune", inner):
        raise UserError(f"scheme `{scheme}`: {kind}{sign} takes a quantizer, for example {kind}{sign}int4")
    base = Cast(inner) if inner in ("bf16", "f16") else _quantizer(inner, scheme)
    if sign == "~":
        return Matched(kind, base)
    if kind == "permuted":
        return Permuted(base)
    most = "a factor of the noise, for example noise0.5@int4"
    return Noise(base, _number(factor, 0, 1000, most, scheme) if factor else 1.0)


def _number(text: str, low: float, high: float, what: str, scheme: str) -> float:
    """A positive number with at most six digits, as it is printed."""
    if not re.fullmatch(r"\d{1,4}(?:\.\d{1,12})?(?:e-\d{1,2})?", text) or not low < float(f"{float(text):.6g}") < high:
        raise UserError(f"scheme `{scheme}`: `{text}` is not {what}")
    return float(f"{float(text):.6g}")


def _quantizer(text: str, scheme: str) -> How:
    head, *tails = text.split("-")
    head = {"mxfp8_e4m3": "mxfp8"}.get(head, head)
    if head not in HEADS or head in ("bf16", "f16", "same"):
        kin = [known for known in HEADS if head and known.startswith(f"{head}_")]
        close = f"; it comes as {', '.join(kin)}" if kin else nearest(text, EXAMPLES) if tails else nearest(head, HEADS)
        raise UserError(
            f"unknown scheme `{text}`{'' if text == scheme else f' in `{scheme}`'}{close}; `qsae schemes` lists them"
        )
    if head.startswith("int"):
        return _scaled(IntGrid(int(head[3:])), _parts(scheme, head, tails, INT_PARTS), scheme)
    if head in FLOATS:
        return _scaled(FloatGrid(head), _parts(scheme, head, tails, FLOAT_PARTS), scheme)
    if head in TABLES:
        got = _parts(scheme, head, tails, TABLE_PARTS)
        block = int(got.get("granularity", "g64")[1:])
        if block > 4096:
            raise UserError(f"scheme `{scheme}`: blocks of {head} hold at most 4096 weights, as bitsandbytes has them")
        return Lookup(head, block, "nesting" in got)
    if head in TYPES:
        _parts(scheme, head, tails, {})
        return Ggml(head)
    got = _parts(scheme, head, tails, NV_PARTS if head == "nvfp4" else MX_PARTS)
    return Blocks(
        head, got.get("scale rule", "scale_floor").removeprefix("scale_"), got.get("rounding mode", "nearest")
    )


def _parts(scheme: str, head: str, tails: list[str], kinds: Kinds) -> dict[str, str]:
    """Each kind of part that the name has; the unknown, and one kind twice, are refused."""
    got: dict[str, str] = {}
    known = [example for _, examples in kinds.values() for example in examples]
    for tail in tails:
        kind = next((kind for kind, (pattern, _) in kinds.items() if re.fullmatch(pattern, tail)), None)
        if kind is None:
            possible = f"possible: {', '.join(known)}" if known else f"{head} has no parts"
            raise UserError(f"scheme `{scheme}`: unknown part `{tail}` of {head}{nearest(tail, known)}; {possible}")
        if kind in got:
            raise UserError(
                f"scheme `{scheme}` names two of one kind ({kind}), `{got[kind]}` and `{tail}`: leave one out"
            )
        got[kind] = tail
    return got


def _scaled(grid: IntGrid | FloatGrid, got: dict[str, str], scheme: str) -> Scaled:
    rule, mode = got.get("scale rule", ""), got.get("rounding mode", "nearest")
    kept = got.get("type of scale", "scale_f32").removeprefix("scale_")
    if isinstance(grid, IntGrid):
        grid = IntGrid(grid.bits, got.get("convention", "asym" if rule == "hqq" else "full_qmax"))
    _check(grid, rule, mode, kept, scheme)
    if rule.startswith("p"):
        rule = f"p{_number(rule[1:], 50, 100, 'a percentile between 50 and 100, for example p99.9', scheme):.6g}"
    rule = "" if rule in ("absmax", "minmax") else rule
    return Scaled(grid, _groups(got.get("granularity", "channel")), rule, mode, kept)


def _check(grid: IntGrid | FloatGrid, rule: str, mode: str, kept: str, scheme: str) -> None:
    asymmetric = grid.convention in ASYMMETRIC
    minimum = rule == "hqq" or grid.convention == "affine"
    for wrong, why in (
        (rule == "absmax" and asymmetric, f"absmax is a symmetric rule and {grid.convention} is not symmetric"),
        (rule == "minmax" and not asymmetric, "minmax is an asymmetric rule: add -asym, or leave it out"),
        (rule == "hqq" and grid.convention != "asym", f"hqq is asymmetric and has no convention {grid.convention}"),
        (rule == "hqq" and mode != "nearest", f"hqq rounds to the nearest, not by {mode}"),
        (kept in ("e4m3", "e8m0") and minimum, f"scale_{kept} does not hold the minimum that is kept beside the scale"),
        (
            mode in ("floor", "ceil") and grid.convention == "signed_full",
            f"the scale of signed_full carries a sign, so {mode} has no one direction: take another convention",
        ),
        (kept == "e8m0" and grid.convention == "signed_full", "scale_e8m0 has no sign, and signed_full needs one"),
    ):
        if wrong:
            raise UserError(f"scheme `{scheme}`: {why}")


def _groups(text: str) -> Groups:
    if text.startswith("b"):
        outputs, inputs = map(int, text[1:].split("x"))
        return Groups(inputs, outputs)
    named = {"tensor": TENSOR, "channel": CHANNEL, "duan2026": DUAN2026}
    return named[text] if text in named else Groups(int(text[1:]))
