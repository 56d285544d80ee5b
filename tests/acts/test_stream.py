"""The stream of activations against activations computed directly, and against itself resumed, cut and reseeded.

Windows of 5 tokens begin with tokens of their own, so that no two counted positions have the same activations.
"""

import jax
import numpy as np
import pytest

from qsae_jax.acts.stream import ActivationStream
from qsae_jax.acts.tokens import Windows
from qsae_jax.errors import UserError
from qsae_jax.lm.tap import Point, activations
from qsae_jax.mesh import make_mesh
from qsae_jax.quant.fake import fake_quantize

N, SEQ = 12, 5
POINT = Point(1, "resid_post")
IDS = np.random.default_rng(3).integers(0, 300, (N, SEQ)).astype(np.int32)
IDS[:, 0] = np.arange(N)


@pytest.fixture(scope="module")
def twins(tiny_lm):
    return {"fp": tiny_lm, "int4": fake_quantize(tiny_lm, "int4")}


@pytest.fixture
def stream(twins):
    """`stream(...)`: over 12 windows, blocks of 4, on one device unless said otherwise."""

    def make(data=1, twins=twins, **facts):
        if jax.device_count() < data:
            pytest.skip(f"needs {data} devices")
        facts = {"batch": 8, "windows_per_block": 4, "seed": 1} | facts
        return ActivationStream(twins, POINT, Windows(IDS, "made", bos=False), make_mesh(data, 1), **facts)

    return make


@pytest.fixture(scope="module")
def direct(twins):
    """Of each twin, the activations of every position `[window, position, d]`, computed in one go."""
    return {name: np.asarray(activations(lm, (POINT,), IDS)[0]) for name, lm in twins.items()}


def taken(stream, batches):
    """Of each twin, so many batches as one array."""
    got = [jax.device_get(next(stream)) for _ in range(batches)]
    return {name: np.concatenate([batch[name] for batch in got]) for name in got[0]}


def places(rows, positions):
    """Which position of `positions` each row is, to 1e-5: other batch shapes round differently."""
    away = np.abs(rows[:, None] - positions.reshape(-1, rows.shape[1])[None]).max(-1)
    assert away.min(-1).max() < 1e-5
    return away.argmin(-1)


@pytest.mark.parametrize(
    ("facts", "epochs"),
    [
        ({}, 1),  # 48 rows in three blocks of 16, two batches each
        ({"batch": 12}, 1),  # batches that span two blocks
        ({"batch": 24, "skip_first": 2}, 2),  # a batch wider than a block makes the block grow
        ({"windows_per_block": 8}, 2),  # an epoch ends inside a block
        ({"skip_first": 0, "batch": 5, "windows_per_block": 1}, 1),
    ],
    ids=str,
)
def test_every_counted_row_once_an_epoch(stream, direct, facts, epochs):
    """The places of all rows of some epochs are each counted position, once an epoch, for both twins the same token.
    Controls: one batch less leaves some out; the rows of a twin rolled by one are other tokens."""
    made = stream(**facts)
    counted = np.arange(N * SEQ).reshape(N, SEQ)[:, made.skip_first :].ravel()
    batches = epochs * len(counted) // made.batch
    assert batches * made.batch == epochs * len(counted)
    rows = taken(made, batches)
    at = places(rows["fp"], direct["fp"])
    assert np.array_equal(np.sort(at), np.sort(np.tile(counted, epochs)))
    assert np.array_equal(at, places(rows["int4"], direct["int4"]))
    assert np.bincount(at[: -made.batch], minlength=N * SEQ)[counted].min() < epochs
    assert not np.array_equal(np.roll(at, 1), places(rows["int4"], direct["int4"]))
    assert not np.array_equal(at, np.sort(at))


def test_twins_are_the_same_tokens(stream, twins):
    """The same model twice gives the same bits. Control: the same model in a stream of another seed does not."""
    rows = taken(stream(twins={"a": twins["fp"], "b": twins["fp"]}), 6)
    assert np.array_equal(rows["a"], rows["b"])
    assert not np.array_equal(rows["a"], taken(stream(seed=2), 6)["fp"])


def test_it_goes_on_from_what_was_taken(stream):
    """From every place, also inside a block and across two: the same bits. Control: one batch further."""
    whole = taken(stream(batch=12), 8)["int4"]
    for done in 1, 2, 5, 7:
        resumed = stream(batch=12, taken=12 * done)
        assert np.array_equal(next(resumed)["int4"], whole[12 * done : 12 * done + 12])
        assert resumed.taken == 12 * done + 12
        assert not np.array_equal(next(resumed)["int4"], whole[12 * done : 12 * done + 12])


def test_a_stream_set_back_gives_the_same_again(stream):
    """`taken` is the whole state. Control: without setting it back the next batch is another."""
    made = stream()
    first, second = taken(made, 1)["fp"], taken(made, 3)["fp"]
    made.taken = 0
    assert np.array_equal(taken(made, 1)["fp"], first) and not np.array_equal(second[:8], first)


def test_epochs_and_seeds_differ(stream, direct):
    """The second epoch comes in another order than the first, another seed in a third. Control: the same seed."""
    at = places(taken(stream(), 12)["fp"], direct["fp"])
    assert not np.array_equal(at[:48], at[48:])
    assert np.array_equal(at, places(taken(stream(), 12)["fp"], direct["fp"]))
    assert not np.array_equal(at, places(taken(stream(seed=2), 12)["fp"], direct["fp"]))


def test_eight_devices_give_what_one_does(stream, direct):
    """On a mesh of 8x1 the same rows in the same order, to 1e-5, an eighth of a batch on each device. Control: the
    places of another seed."""
    eight = stream(data=8)
    batch = next(eight)["fp"]
    assert {s.data.shape for s in batch.addressable_shards} == {(1, 16)}
    one = taken(stream(), 1)["fp"]
    np.testing.assert_allclose(batch, one, atol=1e-5)
    assert not np.allclose(one, taken(stream(seed=2), 1)["fp"], atol=1e-5)


def test_the_order_does_not_depend_on_the_forward_pass(stream, direct):
    """One, two or four windows at a time: the same places. Control: the size of a block does change them."""
    at = places(taken(stream(forward=4), 6)["fp"], direct["fp"])
    for forward in 1, 2:
        assert np.array_equal(at, places(taken(stream(forward=forward), 6)["fp"], direct["fp"]))
    assert not np.array_equal(at, places(taken(stream(windows_per_block=6), 6)["fp"], direct["fp"]))


def test_first_looks_and_takes_nothing(stream, direct):
    """Rows of the first block, at most as many as there are; the batches that follow are those of a fresh stream."""
    made = stream()
    first = made.first(5)["int4"]
    assert first.shape == (5, 16) and made.first(99)["fp"].shape == (16, 16) and made.taken == 0
    block = places(taken(stream(), 2)["int4"], direct["int4"])
    assert set(places(np.asarray(first), direct["int4"])) < set(block)
    assert np.array_equal(taken(made, 1)["fp"], taken(stream(), 1)["fp"])


def test_no_more_than_two_blocks_are_held(stream):
    """Batches of 12 over blocks of 16, one forward pass a window, also after the stream was sent far ahead: whole or in
    the making, two blocks after each batch. Control: the batches come from nine blocks, each window passed once."""
    made = stream(batch=12, forward=1)
    seen, passes, rows_of = [], [], made._rows
    made._rows = lambda tokens: passes.append(len(tokens)) or rows_of(tokens)
    for _ in range(12):
        next(made)
        seen.append({*made._blocks, *made._parts})
    assert len(set.union(*seen)) == 10 and 9 * 4 <= sum(passes) <= 10 * 4
    made.taken += 48 * 10
    next(made)
    assert max(map(len, [*seen, {*made._blocks, *made._parts}])) == 2


def test_the_next_block_is_made_while_this_one_is_given_out(stream):
    """Blocks of 16 rows from 4 passes, batches of 4: after each batch a quarter more of the next block is on its way.
    Control: a batch that takes a whole block has asked for the whole of the next."""
    made = stream(batch=4, forward=1)
    ahead = []
    for _ in range(3):
        next(made)
        ahead.append(len(made._parts[1]))
    assert ahead == [1, 2, 3]
    whole = stream(batch=16, forward=1)
    next(whole)
    assert len(whole._parts[1]) == 4


def test_a_second_point_gives_the_same_tokens(stream, twins, direct):
    """Under `NAME target`, row by row the activations of the other point at the same places. Control: another point."""
    other = Point(0, "mlp_out")
    got = taken(stream(target=other), 3)
    assert list(got) == ["fp", "fp target", "int4", "int4 target"]
    for name, lm in twins.items():
        at = places(got[name], direct[name])
        for point, same in ((other, True), (Point(1, "mlp_out"), False)):
            aims = np.asarray(activations(lm, (point,), IDS)[0]).reshape(N * SEQ, -1)[at]
            assert np.allclose(got[f"{name} target"], aims, atol=1e-5) == same


def test_a_skip_of_whole_windows_is_refused(stream):
    stream(skip_first=SEQ - 1)
    with pytest.raises(UserError, match="--skip-first 5"):
        stream(skip_first=SEQ)
