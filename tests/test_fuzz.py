"""A few hundred spoilt files of every format; `python -m tests.fuzz` goes on for as long as one likes."""

import random

import pytest

from tests.fuzz import Target, breaks, fuzz, spoilt


def test_no_spoilt_file_breaks_a_reader(tmp_path):
    """Every fault ends in a reading or in a UserError of one line."""
    found = [f"{target.name}: {told}" for target, told, _ in fuzz(6, 11, tmp_path)]
    assert found == []


@pytest.mark.parametrize("error", [ValueError("no"), MemoryError(), KeyError("x"), RecursionError()])
def test_a_reader_that_breaks_is_found(tmp_path, error):
    """Control: whatever is no UserError."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/a").write_bytes(b"abc")

    def read(_):
        raise error

    assert type(error).__name__ in breaks(Target("a", tmp_path / "whole", "a", read), random.Random(0), tmp_path / "w")


def test_faults_differ_and_come_again():
    """The same seed spoils alike, and most faults change the file."""
    data = bytes(range(256)) * 8
    one, two = ([spoilt(data, chance) for _ in range(200)] for chance in (random.Random(3), random.Random(3)))
    assert one == two and sum(each != data for each in one) > 190 and len({len(each) for each in one}) > 20
