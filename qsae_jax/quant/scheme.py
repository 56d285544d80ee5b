"""A Scheme: how weights are distorted, as data. Its short name is printed in every result and parses back.

fp                    the weights as they are
int{2..8}             per output channel, symmetric, full_qmax, nearest-even: the paper's quantizer
  -tensor | -channel | -g{n}          one scale per matrix, per output channel (default), per n inputs of a channel
  -asym                               minimum to maximum, with an integer zero point
  -restricted | -half | -signed_full | -no_clip | -full_qmax     another symmetric convention (below)
noise@SCHEME[#draw]   Gaussian weight noise with that scheme's error norm, matrix by matrix
"""

import re
from dataclasses import dataclass

from qsae_jax.errors import UserError, nearest
from qsae_jax.quant.grid import SYMMETRIC

EXAMPLES = (
    *("fp", "int8", "int7", "int6", "int5", "int4", "int3", "int2", "int4-g128", "int4-g32-asym", "int4-tensor"),
    *("int4-half", "int8-restricted", "int4-g32-signed_full", "noise@int4"),
)


@dataclass(frozen=True)
class Scheme:
    """What is done to the linear weights of the blocks. `bits` 0 is full precision."""

    bits: int = 0
    group: int = 0
    """Inputs that share a scale: 0 a whole output channel, -1 the whole matrix."""
    convention: str = "full_qmax"
    noise: bool = False
    """Replace the rounding error by Gaussian noise of the same norm."""
    draw: int = 0
    """Which draw of the noise."""

    def __post_init__(self) -> None:
        if self.bits not in (0, *range(2, 9)) or self.group < -1 or not 0 <= self.draw < 2**31:
            raise UserError(f"no such scheme: {self.bits} bits, group {self.group}, draw {self.draw}; `qsae schemes`")
        if (self.draw and not self.noise) or (self.noise and not self.bits):
            raise UserError("no such scheme: a draw needs noise, and noise needs bits")
        if self.convention not in (*SYMMETRIC, "asym"):
            raise UserError(f"scheme: unknown convention `{self.convention}`{nearest(self.convention, SYMMETRIC)}")

    def __str__(self) -> str:
        if not self.bits:
            return "fp"
        parts = [f"int{self.bits}"]
        if self.group:
            parts.append("tensor" if self.group < 0 else f"g{self.group}")
        if self.convention != "full_qmax":
            parts.append(self.convention)
        name = "-".join(parts)
        return (f"noise@{name}" + (f"#{self.draw}" if self.draw else "")) if self.noise else name


def parse_scheme(name: "str | Scheme") -> Scheme:
    """The Scheme of a short name; a name that says nothing, twice, or the unknown is refused part by part."""
    if isinstance(name, Scheme):
        return name
    text = name.strip().lower()
    if text.startswith("noise@"):
        inner, _, draw = text.removeprefix("noise@").partition("#")
        base = parse_scheme(inner)
        if base.noise or not base.bits or (draw and not draw.isdecimal()):
            raise UserError(
                f"scheme `{name}`: noise@ takes a quantizer and a draw, for example noise@int4 or noise@int4#1"
            )
        return Scheme(base.bits, base.group, base.convention, noise=True, draw=int(draw or 0))
    if text == "fp":
        return Scheme()
    head, *tails = text.split("-")
    found = re.fullmatch(r"int(\d+)", head)
    if not found or not 2 <= int(found[1]) <= 8:
        raise UserError(f"unknown scheme `{name}`{nearest(text, EXAMPLES)}; `qsae schemes` lists them")
    return Scheme(int(found[1]), *_granularity_and_convention(name, tails))


def _granularity_and_convention(name: str, tails: list[str]) -> tuple[int, str]:
    groups, conventions = [], []
    for tail in tails:
        if tail in ("tensor", "channel") or re.fullmatch(r"g[1-9]\d*", tail):
            groups.append({"tensor": -1, "channel": 0}.get(tail) if not tail.startswith("g") else int(tail[1:]))
        elif tail == "asym" or tail in SYMMETRIC:
            conventions.append(tail)
        elif tail != "nearest":
            known = ("tensor", "channel", "g128", "asym", *SYMMETRIC)
            raise UserError(
                f"scheme `{name}`: unknown part `{tail}`{nearest(tail, known)}; possible: {', '.join(known)}"
            )
    if len(groups) > 1 or len(conventions) > 1:
        raise UserError(f"scheme `{name}` names two granularities or two conventions: leave one out")
    return (groups or [0])[0], (conventions or ["full_qmax"])[0]


def parse_schemes(names: str) -> tuple[Scheme, ...]:
    """A comma-separated list, without repeats, in the order given."""
    schemes = tuple(dict.fromkeys(parse_scheme(name) for name in names.split(",") if name.strip()))
    if not schemes:
        raise UserError("the list of schemes is empty: give for example --schemes int8,int6,int4-g128")
    return schemes
