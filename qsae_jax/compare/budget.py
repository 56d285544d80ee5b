"""How many tokens retraining takes to overtake the dictionary that was carried over, and what they cost.

A dictionary's held-out loss falls with its training tokens as `floor + scale * tokens^-power`: the power law of Kaplan
et al. 2020 (arXiv 2001.08361) with the irreducible part `e` that Gao et al. 2024 (arXiv 2406.04093, on scaling laws)
give dictionaries, `L(n) = e + (n / n0)^-a`; `scale` is `n0^a`. Between two budgets that were run nothing of it is
needed; it only carries the curve past the last one.
"""

from dataclasses import asdict, dataclass
from math import exp, inf, isfinite, log
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.optimize import least_squares

from qsae_jax.devices import DEVICES
from qsae_jax.stats import Interval

FLAT, STEEPEST = 1e-4, 2.0
"""Powers that a law may have. Below the first a loss does not fall: by less than 0.1 % from 10^4 to 10^8 tokens."""
POINTS = 4
"""Budgets from which a floor can be told from a slower fall: three numbers need a fourth point to be wrong at."""
SHARES, POWERS = 1 - np.geomspace(1, 1e-3, 24), np.geomspace(0.02, STEEPEST, 24)
"""Where a fit may start: the floor's share of the loss at the smallest budget, and the power."""


@dataclass(frozen=True)
class Law:
    """`loss = floor + scale * tokens^-power`."""

    floor: float
    scale: float
    power: float

    def at(self, tokens: ArrayLike) -> np.ndarray:
        """The loss after so many tokens."""
        return self.floor + self.scale * np.asarray(tokens, np.float64) ** -self.power

    def reaches(self, level: float) -> float:
        """The tokens after which the loss is down to a level; infinite at the floor and below."""
        if not level > self.floor:
            return inf
        length = (log(self.scale) - log(level - self.floor)) / self.power
        return exp(length) if length < 700 else inf


def power_law(tokens: Float[np.ndarray, "n"], loss: Float[np.ndarray, "n"]) -> Law | None:
    """The law of a curve, by least squares of relative errors (of the loss's logarithm), with `floor >= 0`,
    `scale > 0` and `0 < power <= 2`.

    With fewer than 4 points the floor is fixed to 0, because it could not be told from a slower fall: what is read off
    such a law past its points is the fewest tokens that it may take. None with fewer than 2 points, and where the loss
    does not fall (its log-log slope is 0 or upward): no power above 0 says that. Tokens differ from each other, losses
    are above 0."""
    if len(tokens) < 2:
        return None
    t, y = np.log(np.asarray(tokens, np.float64)), np.log(np.asarray(loss, np.float64))
    first, away = float(t.min()), t - t.mean()
    slope = -float(away @ y) / float(away @ away)
    if not slope > FLAT:
        return None
    straight = np.array([0.0, min(slope, STEEPEST)])
    t = t - first
    share, power = _with_floor(t, y, straight) if len(t) >= POINTS else straight
    size = float(np.exp(np.mean(y - _shape(share, power, t))))
    return Law(float(size * share), float(size * (1 - share) * np.exp(power * first)), float(power))


def _shape(share: ArrayLike, power: ArrayLike, t: Float[np.ndarray, "n"]) -> np.ndarray:
    """The logarithm of a law that is 1 at the smallest budget, `t` being log tokens from there on."""
    return np.log(share + (1 - np.asarray(share)) * np.exp(-np.asarray(power) * t))


def _with_floor(
    t: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"], straight: Float[np.ndarray, "2"]
) -> Float[np.ndarray, "2"]:
    """The share of the floor and the power that fit best: SciPy's descent from the best point of a grid, or the
    straight line without a floor, where nothing fits better."""

    def off(share: ArrayLike, power: ArrayLike) -> np.ndarray:
        left = y - _shape(share, power, t)
        return left - left.mean(-1, keepdims=True)

    def slopes(x: Float[np.ndarray, "2"]) -> Float[np.ndarray, "n 2"]:
        falling = np.exp(-x[1] * t)
        moved = np.stack([falling - 1, (1 - x[0]) * t * falling], axis=1) / (x[0] + (1 - x[0]) * falling)[:, None]
        return moved - moved.mean(0)

    error = (off(SHARES[:, None, None], POWERS[None, :, None]) ** 2).sum(-1)
    row, column = np.unravel_index(error.argmin(), error.shape)
    start, bounds = [SHARES[row], POWERS[column]], ([0.0, FLAT], [1 - 1e-6, STEEPEST])
    close = dict.fromkeys(("xtol", "ftol", "gtol"), 1e-12)
    # dogbox, because it ends on a bound where the best fit lies on one; trf only comes near.
    found = least_squares(lambda x: off(*x), start, slopes, bounds, "dogbox", **close)  # pyright: ignore[reportArgumentType]
    return found.x if 2 * found.cost < (off(*straight) ** 2).sum() else straight


def crossing(tokens: Float[np.ndarray, "n"], curve: Float[np.ndarray, "n"], level: float) -> float:
    """The tokens at which a curve over rising budgets is first down to a level.

    Between two budgets: linear in the logarithm of tokens. At the first one already: that budget, which is an upper
    bound. Past the last one: by the power law, and no fewer than the last budget; infinite where the law's floor is
    not below the level or the curve has no law."""
    down = np.flatnonzero(curve <= level)
    if not len(down):
        law = power_law(tokens, curve)
        return max(law.reaches(level), float(tokens[-1])) if law else inf
    i = int(down[0])
    if i == 0:
        return float(tokens[0])
    way = (curve[i - 1] - level) / (curve[i - 1] - curve[i])
    return float(tokens[i - 1] * (tokens[i] / tokens[i - 1]) ** way)


def overtaking(
    tokens: Float[np.ndarray, "n"], curves: Float[np.ndarray, "rows n"], levels: Float[np.ndarray, "rows"]
) -> dict[str, Any]:
    """The training tokens at which retraining overtakes the dictionary that was carried over, ready for JSON.

    `tokens` rise; row 0 of the losses of retrained dictionaries (`curves`) and of the transferred one (`levels`) is
    over all held-out tokens, each other row over one resample of them, the same for both. `low` and `high` are order
    statistics, beyond which 2.5 % of the resamples lie on either side: infinities have an order but no mean, so that
    neither interpolation nor the expanded percentiles of `stats.percentile` would do. None stands for never (`high`
    where more than 2.5 % of the resamples never get there), and for ends without resamples. A value of `tokens[0]` is
    an upper bound (`at_most`). `beyond`: no budget that was run is enough, and the value is the law's. `reached`:
    there is one.
    The intervals hold what other held-out tokens would change; another seed, or a law that fails, they do not."""
    tokens, curves = np.asarray(tokens, np.float64), np.asarray(curves, np.float64)
    value, *drawn = (crossing(tokens, curve, float(level)) for curve, level in zip(curves, levels, strict=True))
    drawn.sort()
    tail = len(drawn) // 40
    low, high = (drawn[tail], drawn[-1 - tail]) if drawn else (inf, inf)
    law = power_law(tokens, curves[0])
    return {
        "tokens": {name: x if isfinite(x) else None for name, x in Interval(value, low, high).as_dict().items()},
        "beyond": not bool((curves[0] <= levels[0]).any()),
        "at_most": bool(curves[0][0] <= levels[0]),
        "law": asdict(law) if law else None,
        "reached": isfinite(value),
    }


def flops_per_token(parameters_before_point: int, d: int, latents: int, sparse: bool) -> float:
    """Floating-point operations of training a dictionary on one token, each seen once.

    The model's forward pass up to the point, 2 for each parameter (Kaplan et al. 2020, section 2.1): of matrices, so
    without the embedding, which is looked up; and without attention's own products, of queries with keys and of weights
    with values, which grow with the window. The dictionary, 2 * d * latents for each product that touches all latents:
    five of them dense (the encoder and the decoder forwards; the gradients to W_enc, to W_dec and to the codes; the
    activations need none), the encoder's alone where `sparse`: in the TopK family on a device that holds all latents,
    where the others read as many rows as there are codes (sae/sparse.py). The optimizer, the choice of codes and AuxK
    are not counted, nor Gated's two more products."""
    products = 1 if sparse else 5
    return 2.0 * parameters_before_point + products * 2.0 * d * latents


def price(tokens: float, flops: float) -> dict[str, float]:
    """Seconds that tokens of so many operations each take on one chip of each device: at ASSUMED of the peak of its
    bfloat16 products, or at the rate that was measured."""
    return {name: tokens * flops / (one.bf16 * one.reached) for name, one in DEVICES.items()}
