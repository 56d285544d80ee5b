"""The turns of rotary positions, plain and slowed down, and rotary on a part of a head.

Against transformers and against one turn at a time in float64; relative 1e-6, a few last places of float32. The
rotation itself is compared in test_model.py, and in test_families.py within whole models.
"""

import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.lm.rope import Rope, Slowed, rotary, turns

DIMS = 16
# Of these turns two fit more than 3 times into 40 positions, three fewer than half a time, and three are between.
LLAMA3 = Rope(77.0, DIMS, Slowed(5.0, 0.5, 3.0, 40))
KINDS = {"default": Rope(77.0, DIMS), "linear": Rope(66.0, DIMS, Slowed(3.0)), "llama3": LLAMA3}


def slow_turns(rope):
    """One turn at a time, by how many of its wavelengths fit into the original window."""
    made, slow = [], rope.slowed
    for i in range(rope.dims // 2):
        turn = rope.theta ** (-2 * i / rope.dims)
        if slow and not slow.original:
            turn /= slow.factor
        elif slow:
            fit = slow.original / (2 * math.pi / turn)
            if fit < slow.low:
                turn /= slow.factor
            elif fit <= slow.high:
                share = (fit - slow.low) / (slow.high - slow.low)
                turn = (1 - share) * turn / slow.factor + share * turn
        made.append(turn)
    return np.array(made)


def far(a, b):
    return np.abs(np.asarray(a) / np.asarray(b) - 1).max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_turns_one_at_a_time(kind):
    """Controls: another base is far away, and so are turns that are not slowed where they should be."""
    rope = KINDS[kind]
    np.testing.assert_allclose(turns(rope), slow_turns(rope), rtol=1e-6)
    assert turns(rope).dtype == jnp.float32 and turns(rope).shape == (DIMS // 2,)
    assert far(turns(replace(rope, theta=70.0)), slow_turns(rope))
    assert far(turns(replace(rope, slowed=None)), slow_turns(rope)) == (kind != "default")


@pytest.mark.parametrize("kind", KINDS)
def test_turns_are_those_of_transformers(torch, kind):
    """Controls: each number of the rule changed in turn is seen."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope, slow = KINDS[kind], KINDS[kind].slowed
    table = {"rope_type": kind, "rope_theta": rope.theta}
    table |= {"factor": slow.factor} if slow else {}
    if slow and slow.original:
        table |= {"low_freq_factor": slow.low, "high_freq_factor": slow.high}
        table |= {"original_max_position_embeddings": slow.original}
    config = LlamaConfig(
        hidden_size=4 * DIMS, num_attention_heads=4, max_position_embeddings=640, rope_parameters=table
    )
    made = ROPE_INIT_FUNCTIONS.get(kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
    theirs, scaling = made(config, device="cpu")
    assert scaling == 1
    np.testing.assert_allclose(turns(rope), theirs.numpy(), rtol=1e-6)
    assert far(turns(replace(rope, theta=rope.theta * 1.1)), theirs.numpy())
    for name in ("factor", "low", "high", "original") if kind == "llama3" else ("factor",) if slow else ():
        changed = replace(slow, **{name: type(getattr(slow, name))(getattr(slow, name) * 1.3)})
        assert far(turns(replace(rope, slowed=changed)), theirs.numpy()), name


def test_llama3_has_three_kinds_of_turns():
    """The numbers above try all of them: left alone, blended, and slowed by the whole factor."""
    ratio = np.asarray(turns(replace(LLAMA3, slowed=None))) / np.asarray(turns(LLAMA3))
    left, slowed = np.abs(ratio - 1) < 1e-6, np.abs(ratio - 5) < 1e-5
    assert (left.sum(), slowed.sum()) == (2, 3) and np.all(
        (ratio[~left & ~slowed] > 1.1) & (ratio < 5.1)[~left & ~slowed]
    )


def random_x(width, s=13):
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, s, 3, width)), jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_part_of_a_head_turns(dtype):
    """The first 4 of 10 coordinates turn as a head of 4 does, bit-equal, and the others stay. Controls: on all 10
    the others turn too; and the 4 do turn."""
    x = random_x(10).astype(dtype)
    ours = rotary(x, Rope(77.0, 4))
    assert ours.dtype == dtype
    np.testing.assert_array_equal(ours[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(ours[..., :4], rotary(x[..., :4], Rope(77.0, 4)))
    for part in (slice(0, 4), slice(4, 10)):
        assert np.abs(np.asarray(rotary(x, Rope(77.0, 10)) - ours, np.float32)[..., part]).max() > 0.1
    assert np.abs(np.asarray(ours - x, np.float32)[..., :4]).max() > 0.1


def test_slowed_positions_are_positions_further_on():
    """A head of the same numbers everywhere, slowed by 3, is at position 3p what it would be at p: within 1e-5.
    Control: slowed by 2 it is not. Position 0 does not turn at all."""
    x = jnp.broadcast_to(random_x(DIMS, s=1), (2, 13, 3, DIMS))
    plain, slowed = rotary(x, Rope(66.0, DIMS)), rotary(x, KINDS["linear"])
    np.testing.assert_allclose(slowed[:, ::3], plain[:, :5], atol=1e-5)
    assert np.abs(np.asarray(rotary(x, Rope(66.0, DIMS, Slowed(2.0)))[:, ::3] - plain[:, :5])).max() > 0.1
    np.testing.assert_array_equal(slowed[:, 0], x[:, 0])


def test_without_a_rope_nothing_turns():
    """Control: with one it does."""
    x = random_x(DIMS)
    assert rotary(x, None) is x
    assert np.abs(np.asarray(rotary(x, LLAMA3) - x)).max() > 0.1
