"""An audit that is stopped anywhere goes on to the bits of one that was not."""

import sys

import numpy as np
import pytest

from qsae_jax.audit.kept import Kept
from qsae_jax.audit.run import audits
from qsae_jax.errors import Interrupted, UserError
from qsae_jax.lm.tap import Point
from qsae_jax.sae.model import SAE

running = sys.modules[audits.__module__]

POINTS = ("blocks.1.resid_post", "blocks.0.mlp_out")
SCHEMES = ["int8", "int2-g8", "prune~int2"]


@pytest.fixture(scope="module")
def judge(tiny_lm, tiny_sae, tiny_windows):
    """`judge(folder, schemes)`: the audits of two points, one twin at a time."""
    saes: dict[str | Point, SAE] = {POINTS[0]: tiny_sae(), POINTS[1]: tiny_sae(1)}

    def go(folder, schemes=SCHEMES, n=21):
        return audits(tiny_lm, saes, tiny_windows(n), schemes, batch=4, errors_at=["blocks.2.resid_post"], keep=folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "at_once", lambda lm: 1)
        yield go


@pytest.fixture
def stops_after(monkeypatch):
    """`stops_after(n)`: the signal comes in the n-th forward pass of what follows; gives the count of them."""
    before = running.waited

    def set_to(calls):
        count = {"calls": 0}

        def counted(found, stopped):
            count["calls"] += 1
            return before(found, lambda: count["calls"] >= calls)

        monkeypatch.setattr(running, "waited", counted)
        return count

    return set_to


def same(one, other):
    assert one.keys() == other.keys() == set(POINTS)
    for point in POINTS:
        assert repr(one[point].facts) == repr(other[point].facts)  # NaN is not equal to itself
        for name, column in one[point].features.items():
            np.testing.assert_array_equal(column, other[point].features[name])


def test_stopped_anywhere_the_same_call_goes_on_to_the_same_bits(judge, stops_after, tmp_path):
    """In the first batch, within a batch, between passes, twice. Control: what was done is not done again."""
    whole, count = judge(None), stops_after(10**9)
    judge(tmp_path / "whole")
    everything = count["calls"]
    for i, stops in enumerate([(1,), (8,), (13, 9), (30,)]):
        folder, done = tmp_path / f"kept{i}", 0
        for stop in stops:
            count = stops_after(stop)
            with pytest.raises(Interrupted):
                judge(folder)
            done += (stop - 1) // 2 * 2  # of the batch that was broken off nothing counts
        count = stops_after(10**9)
        same(judge(folder), whole)
        assert count["calls"] == everything - done


def test_a_finished_pass_is_not_run_again_and_a_forgotten_one_is(judge, stops_after, tmp_path):
    first, count = judge(tmp_path / "kept"), stops_after(10**9)
    same(judge(tmp_path / "kept"), first)
    assert count["calls"] == 0
    Kept(tmp_path / "kept").forget()
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("other", [{"schemes": ["int8", "int2-g8"]}, {"n": 20}])
def test_sums_of_another_audit_are_forgotten(judge, stops_after, tmp_path, other):
    count = stops_after(20)
    with pytest.raises(Interrupted):
        judge(tmp_path / "kept")
    count = stops_after(10**9)
    same(judge(tmp_path / "kept", **other), judge(None, **other))
    assert count["calls"] == 2 * 2 * (5 + (other.get("n") != 20)) * len(other.get("schemes", SCHEMES))


def test_spoilt_sums_are_told_of(judge, stops_after, tmp_path):
    stops_after(20)
    with pytest.raises(Interrupted):
        judge(tmp_path / "kept")
    path = next((tmp_path / "kept").glob("pass*.npz"))
    path.write_bytes(path.read_bytes()[:300])
    stops_after(10**9)
    with pytest.raises(UserError, match=r"pass\d.npz` is spoilt .*delete `.*kept` to begin the audit anew"):
        judge(tmp_path / "kept")
