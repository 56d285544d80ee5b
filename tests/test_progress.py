"""Signals: asked for at safe points, and never forgotten."""

import os
import signal

import pytest

from qsae_jax.errors import Interrupted
from qsae_jax.progress import stop_signal


def test_a_signal_that_nobody_asked_for_stops_at_the_end(capsys):
    """Control: without one the block ends well, and the handlers are what they were."""
    before = signal.getsignal(signal.SIGINT)
    ended = []
    with pytest.raises(Interrupted, match="goes on"), stop_signal() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
        ended.append(True)
    with stop_signal() as stopped:
        assert not stopped()
    assert ended and signal.getsignal(signal.SIGINT) is before
    assert "stopping at the next safe point" in capsys.readouterr().err


def test_what_stops_by_itself_says_so_and_a_second_signal_breaks_off():
    with pytest.raises(Interrupted, match="mine"), stop_signal() as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
        if stopped():
            raise Interrupted("mine")
    with pytest.raises(KeyboardInterrupt), stop_signal():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
