"""Arrays with no zero and no unit in them, and slow formulas in float64."""

import numpy as np
import pytest

D, M, K = 8, 24, 3


def arrays_of(seed=0):
    """In our orientation; decoder rows of many lengths, thresholds among the pre-activations, W_skip not symmetric."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.standard_normal(shape, np.float32)

    lengths = rng.permutation(np.linspace(0.3, 2, M, dtype=np.float32))[:, None]
    found = {"W_enc": draw(D, M), "b_enc": draw(M), "W_dec": draw(M, D) * lengths, "b_dec": draw(D)}
    found |= {"threshold": np.abs(draw(M)) + 0.5, "W_skip": draw(D, D), "b_gate": draw(M), "b_mag": draw(M)}
    return found | {"r_mag": 0.5 * draw(M)}


def formulas(a, x, act="relu", centred=True, norm=None, skip=False, at_least=False):
    """Codes and reconstruction."""
    a = {name: np.asarray(v, np.float64) for name, v in a.items()}
    x, scale, shift = np.asarray(x, np.float64), 1.0, 0.0
    if norm == "layer_norm":
        shift, scale = x.mean(-1, keepdims=True), x.std(-1, ddof=1, keepdims=True)
        x = (x - shift) / (scale + 1e-5)
    elif norm == "constant_norm_rescale":
        scale = np.linalg.norm(x, axis=-1, keepdims=True) / D**0.5
        x = x / scale
    pre = (x - a["b_dec"] * centred) @ a["W_enc"] + (0 if act == "gated" else a["b_enc"])
    if act == "topk":
        codes = np.maximum(pre, 0) * (pre >= np.sort(pre, axis=-1)[:, -K, None])
    elif act == "jumprelu":
        codes = np.maximum(pre, 0) * (pre >= a["threshold"] if at_least else pre > a["threshold"])
    elif act == "gated":
        codes = np.maximum(pre * np.exp(a["r_mag"]) + a["b_mag"], 0) * (pre + a["b_gate"] > 0)
    else:
        codes = np.maximum(pre, 0)
    out = codes @ a["W_dec"] + a["b_dec"] + (x @ a["W_skip"] if skip else 0)
    return codes, out * scale + shift


@pytest.fixture
def x():
    return 2 * np.random.default_rng(9).standard_normal((7, D), np.float32) + 1
