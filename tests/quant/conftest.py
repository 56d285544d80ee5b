"""A tiny random LM, and an integer quantizer written out slowly from the formulas of the literature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.lm.load import abstract_lm
from qsae_jax.lm.model import LMConfig
from qsae_jax.lm.rope import Rope


@pytest.fixture(scope="session")
def lm():
    """Two blocks, 20 inputs of each matrix but o (24) and down (40); grouped queries, every width another."""
    config = LMConfig("llama", 61, 20, 2, 4, 2, 6, 40, 3e-3, Rope(777.0, 6), False, 64, "silu", 6**-0.5)
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), abstract_lm(config))


def _slow_group(x, bits, convention):
    """One group of weights: NumPy float32, half to even, a scale as `extent * f32(1 / divisor)`, codes by the
    reciprocal of the scale, so that they are the same bit for bit whatever compiles them."""
    q = 2 ** (bits - 1)
    one, zero = np.float32(1), np.float32(0)
    if convention == "asym_tight":
        scale = max(x.max() - x.min(), np.float32(1e-5)) * np.float32(1 / (2**bits - 1))
        offset = np.clip(-np.round(x.min() * (one / scale)), 0, 2**bits - 1)
        codes = np.clip(np.round(x * (one / scale)) + offset, 0, 2**bits - 1)
        return (codes - offset) * scale
    if convention == "affine":
        scale = (x.max() - x.min()) * np.float32(1 / (2**bits - 1)) or one
        codes = np.clip(np.round((x - x.min()) * (one / scale)), 0, 2**bits - 1)
        return codes * scale + x.min()
    if convention == "asym":
        low, high = min(x.min(), zero), max(x.max(), zero)
        scale = (high - low) * np.float32(1 / (2**bits - 1)) or one
        offset = np.round(-low * (one / scale))
        codes = np.clip(np.round(x * (one / scale)) + offset, 0, 2**bits - 1)
        return (codes - offset) * scale
    top = np.abs(x).max()
    scale = {
        "restricted": lambda: top * np.float32(1 / (q - 1)),
        "full_qmax": lambda: top * np.float32(1 / (q - 1)),
        "half": lambda: top * np.float32(1 / (q - 0.5)),
        "signed_full": lambda: x[np.abs(x).argmax()] * np.float32(-1 / q),
        "no_clip": lambda: max(-x.min() * np.float32(1 / q), x.max() * np.float32(1 / (q - 1))),
    }[convention]()
    scale = scale or one
    lowest = 1 - q if convention == "restricted" else -q
    return np.clip(np.round(x * (one / scale)), lowest, q - 1) * scale


@pytest.fixture(scope="session")
def slow_quantize():
    """`[out, in]`, as torch's Linear and the files have it -> the same rounded; group 0 a row, -1 the matrix, else
    that many consecutive inputs of a row, the last group shorter."""

    def quantize(w, bits, convention="full_qmax", group=0):
        w = np.asarray(w, np.float32)
        if group == -1:
            return _slow_group(w.ravel(), bits, convention).reshape(w.shape)
        out, size = np.empty_like(w), group or w.shape[1]
        for row in range(w.shape[0]):
            for start in range(0, w.shape[1], size):
                out[row, start : start + size] = _slow_group(w[row, start : start + size], bits, convention)
        return out

    return quantize
