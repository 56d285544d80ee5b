"""GGUF's block types: what llama.cpp's quantizer makes of a matrix that has no importance matrix.

    q8_0 q4_0 q5_0     32 inputs share a scale d       W ~ d q
    q4_1 q5_1          and a minimum m                 W ~ d q + m
    iq4_nl             d times one of sixteen values that are denser near zero
    q2_k .. q6_k       256 inputs in sub-blocks whose scales are quantized in turn: kquant.py

Scales are kept as float16. Codes of the first two kinds are found with the reciprocal of the float32 scale
(ggml-quants.c, and gguf's quants.py, which are bit-equal).

A row of a K-quant has to be a multiple of 256. Where it is not, llama.cpp takes another type for that matrix, and so
does this (FALLBACKS; llama.cpp of October 2026, commit 0c1e570. Older ones took iq4_nl for q2_k and q3_k); a row that
is no multiple of 32 is kept as float16. `kept_as` says which.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from qsae_jax.products import alone
from qsae_jax.quant.codebook import nearest_of
from qsae_jax.quant.group import Groups
from qsae_jax.quant.kquant import K_TYPES, TINY, divided, summed, values
from qsae_jax.quant.rounding import MODES
from qsae_jax.quant.scale import first_largest, inverse, stored

FALLBACKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def q8_0(x: Float32[Array, "g 32 o"]) -> Float32[Array, "g 32 o"]:
    """d = absmax/127, q to the nearest, halves away from zero."""
    d = divided(jnp.max(jnp.abs(x), axis=-2, keepdims=True), 127)
    return MODES["away"](x * inverse(d), None) * stored(d, "f16")


def _symmetric(x: Float32[Array, "g 32 o"], q: int) -> Float32[Array, "g 32 o"]:
    """q4_0 (q = 8), q5_0 (q = 16): the element of largest magnitude gets the code -q; halves up."""
    d = divided(first_largest(x), -q)
    codes = jnp.clip(jnp.trunc(alone(x * inverse(d)) + np.float32(q + 0.5)), 0, 2 * q - 1)
    return (codes - q) * stored(d, "f16")


def _minimum(x: Float32[Array, "g 32 o"], top: int) -> Float32[Array, "g 32 o"]:
    """q4_1 (top = 15), q5_1 (top = 31): from the minimum up; halves up."""
    low, high = jnp.min(x, axis=-2, keepdims=True), jnp.max(x, axis=-2, keepdims=True)
    d = divided(high - low, top)
    codes = jnp.clip(jnp.trunc(alone((x - low) * inverse(d)) + np.float32(0.5)), 0, top)
    return alone(codes * stored(d, "f16")) + stored(low, "f16")


def iq4_nl(x: Float32[Array, "g 32 o"]) -> Float32[Array, "g 32 o"]:
    """Of 15 scales the one whose least-squares fit explains most, each error weighted by the weight's square."""
    extremum, weight = first_largest(x), x * x
    some = jnp.abs(extremum) >= TINY
    around = jnp.where(some, extremum, 1.0)

    def fit(by: Array) -> tuple[Array, Array]:
        q = nearest_of(x * by, IQ4_NL, upper=True)
        return summed(alone(weight * q * x)), summed(alone(weight * q * q))

    def step(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        scale, gain = best
        qx, qq = fit((jnp.asarray(i, jnp.float32) - 7 + IQ4_NL[0]) / around)
        better = (qq > 0) & (qx * qx > gain * qq)
        found = qx / jnp.where(qq > 0, qq, 1.0)
        return jnp.where(better, found, scale), jnp.where(better, found * qx, gain)

    qx, qq = fit(divided(jnp.ones_like(around), divided(-around, IQ4_NL[0])))
    scale = jnp.where(qq > 0, qx / jnp.where(qq > 0, qq, 1.0), 0.0)
    scale, _ = jax.lax.fori_loop(0, 15, step, (scale, scale * qx))
    scale = jnp.where(some, scale, 0.0)
    return nearest_of(x * inverse(scale), IQ4_NL, upper=True) * stored(scale, "f16")


TYPES: dict[str, tuple[int, Callable[[Array], Array]]] = {
    "q8_0": (32, q8_0),
    "q4_0": (32, lambda x: _symmetric(x, 8)),
    "q5_0": (32, lambda x: _symmetric(x, 16)),
    "q4_1": (32, lambda x: _minimum(x, 15)),
    "q5_1": (32, lambda x: _minimum(x, 31)),
    "iq4_nl": (32, iq4_nl),
    **{name: (256, lambda x, k=k: values(k(x))) for name, k in K_TYPES.items()},
}
"""Each type's block of inputs, and what becomes of blocks `[g, block, o]`."""


def kept_as(name: str, inputs: int) -> str:
    """The type that a matrix with rows of so many inputs gets when `name` is asked for."""
    if inputs % TYPES[name][0] == 0:
        return name
    other = FALLBACKS.get(name, "f16")
    return other if other == "f16" or inputs % TYPES[other][0] == 0 else "f16"


@dataclass(frozen=True)
class Ggml:
    """A type of GGUF, by its name in TYPES."""

    name: str

    draw = 0

    def __str__(self) -> str:
        return self.name

    def form(self) -> "Ggml":
        return self

    def numbers(self) -> tuple[()]:
        return ()

    def round(self, w: Float32[Array, "n o"], numbers: tuple[()], key: Array) -> Float32[Array, "n o"]:
        """Weights `[inputs, outputs]` as the file's reader gets them back."""
        kind = kept_as(self.name, w.shape[0])
        if kind == "f16":
            return stored(w, "f16")
        size, quantize = TYPES[kind]
        return Groups(size).each(quantize, w)
