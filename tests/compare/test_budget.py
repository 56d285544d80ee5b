"""Laws that are planted are found again, crossings are those worked out by hand, and XLA counts the same products."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import curve_fit

from qsae_jax.compare.budget import (
    Law,
    crossing,
    flops_per_token,
    overtaking,
    power_law,
    price,
)
from qsae_jax.devices import ASSUMED, DEVICES
from qsae_jax.sae.model import init_sae
from qsae_jax.sae.objective import Now, make_objective
from qsae_jax.sae.settings import SAEConfig
from qsae_jax.sae.sparsity import ReLU

BUDGETS = np.geomspace(2e4, 5e6, 6)
PLANTED = Law(0.12, 30.0, 0.45)
HALVING = np.array([100.0, 400.0, 1600.0, 6400.0])
FALLING = np.array([1.1, 0.6, 0.35, 0.225])  # 0.1 + 10 / sqrt(tokens)


def noisy(law, draws, size=0.01, seed=0):
    return law.at(BUDGETS) * np.exp(np.random.default_rng(seed).normal(0, size, (draws, len(BUDGETS))))


def fitted(tokens, loss) -> Law:
    law = power_law(np.asarray(tokens), np.asarray(loss))
    assert law is not None
    return law


def numbers(law):
    return law.floor, law.scale, law.power


@pytest.mark.parametrize("budgets", [4, 6])
@pytest.mark.parametrize("power", [0.05, 0.3, 0.7, 1.3, 2.0])
@pytest.mark.parametrize("floor", [0.0, 0.02, 0.3])
def test_a_planted_law_is_found(floor, power, budgets):
    """Exact points, to 1e-6, of losses that begin at the floor plus 0.4; the control has another power."""
    tokens = np.geomspace(2e4, 5e6, budgets)
    law, other = (Law(floor, 0.4 * tokens[0] ** p, p) for p in (power, 0.8 * power))
    assert numbers(fitted(tokens, law.at(tokens))) == pytest.approx(numbers(law), rel=1e-6, abs=1e-6)
    assert numbers(fitted(tokens[::-1], law.at(tokens[::-1]))) == pytest.approx(numbers(law), rel=1e-6, abs=1e-6)
    assert fitted(tokens, other.at(tokens)).power == pytest.approx(0.8 * power, abs=1e-6)


def test_a_fit_is_that_of_curve_fit():
    """Levenberg and Marquardt's own descent in other variables, without bounds, from another start."""

    def logarithm(tokens, floor, log_scale, power):
        return np.log(floor + np.exp(log_scale - power * np.log(tokens)))

    for loss in noisy(PLANTED, 5):
        found, _ = curve_fit(logarithm, BUDGETS, np.log(loss), p0=[0.1, 2.0, 0.3], xtol=1e-14, ftol=1e-14)
        law = fitted(BUDGETS, loss)
        assert (law.floor, np.log(law.scale), law.power) == pytest.approx(found, rel=1e-5)
        assert fitted(BUDGETS, loss**1.1).power != pytest.approx(found[2], rel=1e-2)


def test_few_points():
    """Fewer than 4 have no floor: two points at 1 and 1/2 are on 10 / sqrt(tokens). One is no law, nor are none."""
    assert numbers(fitted(HALVING[:2], np.array([1.0, 0.5]))) == pytest.approx((0, 10, 0.5))
    three = fitted(HALVING[:3], FALLING[:3])
    assert three.floor == 0 and 0 < three.power < 0.5
    assert fitted(HALVING, FALLING).floor == pytest.approx(0.1)
    assert power_law(HALVING[:1], FALLING[:1]) is None and power_law(HALVING[:0], FALLING[:0]) is None


@pytest.mark.parametrize("loss", [[0.3] * 4, [0.3, 0.31, 0.35, 0.5], [0.3, 0.3]])
def test_what_does_not_fall_has_no_law(loss):
    assert power_law(HALVING[: len(loss)], np.array(loss)) is None
    assert crossing(HALVING[: len(loss)], np.array(loss), 0.29) == np.inf


@pytest.mark.parametrize("fall", [[9.0, 0.3, 0.3, 0.3], [0.5, 0.49, 0.48, 0.1], [0.5, 0.2, 0.4, 0.3]])
def test_no_curve_is_too_odd(fall):
    """Steeper than any law, falling ever faster, up and down: a law within its bounds, and no warning."""
    law = fitted(HALVING, np.array(fall))
    assert law.floor >= 0 and law.scale > 0 and 0 < law.power <= 2


def test_a_law_and_its_inverse():
    law = Law(0.1, 10.0, 0.5)
    assert law.at([100, 400]) == pytest.approx([1.1, 0.6]) and law.reaches(0.6) == pytest.approx(400)
    assert law.reaches(0.1) == law.reaches(0.05) == np.inf
    assert Law(0.0, 1.0, 1e-3).reaches(0.1) == np.inf  # 10^1000 tokens


@pytest.mark.parametrize(
    "level, tokens, beyond",
    [
        (2.0, 100, False),  # already at the first budget
        (1.1, 100, False),
        (0.85, 200, False),  # half the way from 1.1 to 0.6: the middle of 100 and 400 in logarithms
        (0.6, 400, False),
        (0.225, 6400, False),
        (0.2, 10_000, True),  # 0.1 + 10 / 100
        (0.11, 1_000_000, True),
        (0.0999, None, True),  # below the floor
    ],
)
def test_where_retraining_overtakes(level, tokens, beyond):
    got = overtaking(HALVING, FALLING[None], np.array([level]))
    assert got["beyond"] == beyond and got["reached"] == (tokens is not None) and got["at_most"] == (level >= 1.1)
    assert got["tokens"]["value"] == (None if tokens is None else pytest.approx(tokens, rel=1e-6))
    assert got["tokens"]["low"] is got["tokens"]["high"] is None  # no resamples
    assert got["law"] == pytest.approx({"floor": 0.1, "scale": 10, "power": 0.5})
    assert json.loads(json.dumps(got, allow_nan=False)) == got


def test_the_first_crossing_counts_and_a_law_gives_no_less_than_what_was_run():
    assert crossing(HALVING, np.array([1.0, 0.4, 0.6, 0.2]), 0.5) == pytest.approx(100 * 4 ** (5 / 6))
    tokens, flattening = HALVING[[0, 1, 3]], np.array([1.0, 0.3, 0.2])
    assert fitted(tokens, flattening).reaches(0.199) < 6400  # without a floor it lies below the last point
    assert crossing(tokens, flattening, 0.199) == 6400


def test_a_curve_of_another_power_is_overtaken_elsewhere():
    level = np.array([0.2])
    slower = overtaking(HALVING, (0.1 + 10 * HALVING**-0.4)[None], level)["tokens"]["value"]
    assert slower == pytest.approx(100**2.5, rel=1e-6)  # 10 / 0.1 = 100 = tokens^0.4


@pytest.mark.parametrize("never, high", [(0, 200), (1, 400), (2, None)])
def test_resamples_that_never_get_there(never, high):
    """Of 40 resamples 2.5 % are one, which is left out at either end: of those at 200, one at 400 and so many that
    never get there. Two leave the upper end open."""
    levels = np.r_[0.85, 0.6, np.full(39 - never, 0.85), np.full(never, 0.05)]
    got = overtaking(HALVING, np.tile(FALLING, (41, 1)), levels)
    ends = [got["tokens"][name] for name in ("value", "low", "high")]
    assert ends == [pytest.approx(200), pytest.approx(200), high and pytest.approx(high)] and got["reached"]


def test_an_interval_holds_what_was_planted():
    """Points with 1 % of noise, the level beyond the last budget: the interval holds the planted crossing, and that
    of the powers the planted power. The control is another power, which it does not hold."""
    level, other = 0.14, Law(0.12, 30.0, 0.35)
    truth = PLANTED.reaches(level)
    assert truth == pytest.approx((30 / 0.02) ** (1 / 0.45)) and truth > BUDGETS[-1]
    got = overtaking(BUDGETS, np.r_[PLANTED.at(BUDGETS)[None], noisy(PLANTED, 200)], np.full(201, level))
    powers = np.sort([fitted(BUDGETS, loss).power for loss in noisy(PLANTED, 200, seed=1)])
    assert got["tokens"]["value"] == pytest.approx(truth, rel=1e-6) and got["beyond"]
    assert got["tokens"]["low"] < truth < (got["tokens"]["high"] or np.inf)
    assert powers[5] < PLANTED.power < powers[-6] and not powers[5] < other.power < powers[-6]


def counted(d, m, batch):
    """XLA's own count of operations of a ReLU dictionary's loss and gradients, for each token."""
    sae = init_sae(ReLU(), m, d, jnp.zeros(d), jax.random.key(0))
    objective = make_objective(SAEConfig(sparsity="relu"))
    now = Now(jnp.zeros(m, bool), jnp.ones(()), jnp.ones(()), jnp.ones(()))
    step = jax.jit(jax.grad(lambda sae, x: objective(sae, x, x, now).loss))
    facts = step.lower(sae, jnp.ones((batch, d))).compile().cost_analysis()
    assert facts is not None
    return facts["flops"] / batch


def test_flops():
    """By hand, and a dense dictionary's five products by XLA, which has 1 % more that are no products; the rule of 6
    operations a parameter would be 20 % more."""
    assert flops_per_token(1000, 4, 8, sparse=False) == 2000 + 4 * 8 * 2 * 5
    assert flops_per_token(1000, 4, 8, sparse=True) == 2000 + 4 * 8 * 2
    xla, mine = counted(256, 1024, 512), flops_per_token(0, 256, 1024, sparse=False)
    assert xla == pytest.approx(mine, rel=0.02) and xla != pytest.approx(6 * 2 * 256 * 1024, rel=0.02)


def test_price():
    """1e9 tokens of 1e9 operations: 1e18 over 0.4 of each peak; over all that two cores were measured to give."""
    got = price(1e9, 1e9)
    assert ASSUMED == 0.4 and got.keys() == DEVICES.keys()
    wanted = {"TPU v5e": 12690.355, "TPU v5p": 5446.6231, "TPU v6e": 2723.3115, "H100 SXM": 2527.8059}
    wanted |= {"H200": 2527.8059, "2 cores (AVX2)": 15151515.15, "2 cores (AVX-512)": 2941176.47}
    assert got == pytest.approx(wanted, rel=1e-7)
    assert price(2e9, 1e9) == pytest.approx({name: 2 * seconds for name, seconds in got.items()})
