"""Operations of a function, read off its jaxpr; traffic between devices, read off its compiled program.

XLA's own count knows no loops (it takes a body once) and its text no products that were fused away, so products are
counted before compiling: 2 operations for each multiplication of every `dot_general` whose result is needed, times
the length of the scans around it. What is not needed is not counted: of a model that is listened to in the middle, the
blocks after that.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, Literal, Var

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4,
         "s64": 8, "u64": 8, "f64": 8}  # fmt: skip


def operations(function: Callable[..., Any], *args: Any) -> dict[str, float]:
    """Floating-point operations of all products of a call, by the dtype of their operands; `args` may be shapes."""
    closed = jax.make_jaxpr(function)(*args)
    found: dict[str, float] = {}
    _needed(closed.jaxpr, [True] * len(closed.jaxpr.outvars), 1.0, found)
    return found


def _needed(jaxpr: Jaxpr, wanted: Sequence[bool], times: float, found: dict[str, float]) -> list[bool]:
    """Count what the wanted results take, and say which inputs they take."""
    live = {var for var, want in zip(jaxpr.outvars, wanted, strict=True) if want and isinstance(var, Var)}
    for eqn in reversed(jaxpr.eqns):
        outs = [var in live for var in eqn.outvars]
        if not (any(outs) or eqn.effects):
            continue
        reads = [True] * len(eqn.invars)
        if eqn.primitive.name == "dot_general":
            kind = str(getattr(eqn.invars[0].aval, "dtype", "float32"))
            found[kind] = found.get(kind, 0.0) + times * _products(eqn)
        else:
            more = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
            for inner in _inside(eqn.params):
                exact = eqn.primitive.name in ("jit", "pjit", "closed_call", "remat", "checkpoint")
                some = outs if exact else [True] * len(inner.outvars)
                taken = _needed(inner, some, more, found)
                reads = taken if exact and len(taken) == len(reads) else reads
        live |= {var for var, read in zip(eqn.invars, reads, strict=True) if read and not isinstance(var, Literal)}
    return [var in live for var in jaxpr.invars]


def _inside(params: dict[str, Any]) -> list[Jaxpr]:
    """The jaxprs of a call or loop; of a choice the branch that takes most, rules for derivatives aside."""
    if "branches" in params:
        return [max((branch.jaxpr for branch in params["branches"]), key=_whole)]
    # A closed jaxpr wraps one up to JAX 0.11 and is one from there on.
    values = [getattr(value, "jaxpr", value) for value in params.values()]
    return [value for value in values if isinstance(value, Jaxpr)]


def _whole(jaxpr: Jaxpr) -> float:
    found: dict[str, float] = {}
    _needed(jaxpr, [True] * len(jaxpr.outvars), 1.0, found)
    return sum(found.values())


def _products(eqn: Any) -> float:
    """2 x (elements of the result) x (length that is summed over)."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    summed = np.prod([eqn.invars[0].aval.shape[axis] for axis in contracted], dtype=float)
    return float(2 * np.prod(eqn.outvars[0].aval.shape, dtype=float) * summed)


def traffic(text: str) -> dict[str, tuple[int, float]]:
    """Of a compiled program's text: for each kind of collective how many there are and the bytes of their results on
    one device, those in loops as often as the loop runs."""
    parts, name = dict[str, list[str]](), ""
    for line in text.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.\-]+)\s.*\{$", line):
            name = opened[1]
            parts[name] = []
            entry = name if line.startswith("ENTRY") else None
            parts.setdefault("", []).extend([entry] if entry else [])
        elif name:
            parts[name].append(line)
    found: dict[str, tuple[int, float]] = {}
    for start in parts.get("", []):
        _walk(parts, start, 1, found)
    return found


def _walk(parts: dict[str, list[str]], name: str, times: int, found: dict[str, tuple[int, float]]) -> None:
    for line in parts.get(name, []):
        for kind in COLLECTIVES:
            if made := re.search(rf"= (.*?) {kind}(?:-start)?\(", line):
                count, size = found.get(kind, (0, 0.0))
                found[kind] = (count + times, size + times * _bytes(made[1]))
        for inner in re.findall(r"(?:to_apply|calls|body|true_computation|false_computation)=%?([\w.\-]+)", line):
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            _walk(parts, inner, times * (int(trips[1]) if trips and " while(" in line else 1), found)


def _bytes(shape: str) -> float:
    """Of a shape as HLO writes it, `f32[8,128]{1,0}`, or a tuple of them."""
    sizes = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return float(sum(SIZES.get(kind, 4) * np.prod([int(n) for n in dims.split(",") if n], dtype=float)
                     for kind, dims in sizes))  # fmt: skip
