"""Progress bars: one a stage, with the figures of the moment. Quiet when the output is not a terminal."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qsae_jax import hosts
from qsae_jax.errors import Interrupted

Advance = Callable[..., None]
QUIET_EVERY_S = 20.0


@contextlib.contextmanager
def progress(stage: str, total: int) -> Iterator[Advance]:
    """A bar for one stage; inside, `advance(n, fvu=0.12, ...)` moves it by n and shows the figures."""
    if not hosts.first():
        yield lambda n=1, **figures: None
        return
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _lines(stage, total)
        return
    columns = (
        TextColumn("[bold]{task.description:<28}"),
        *(BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn()),
        *(TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[figures]}")),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(stage, total=total, figures="")

        def advance(n: int = 1, **figures: float) -> None:
            bars.update(task, advance=n)
            if figures:  # they stay until there are new ones
                bars.update(task, figures=_text(figures))

        yield advance


def _text(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:,.4g}" for name, value in figures.items())


def _lines(stage: str, total: int) -> Advance:
    """For logs: a line every 20 seconds and one at the end."""
    state: dict[str, Any] = {"done": 0, "said": time.monotonic(), "figures": ""}

    def advance(n: int = 1, **figures: float) -> None:
        state["done"] += n
        state["figures"] = _text(figures) or state["figures"]
        now = time.monotonic()
        if now - state["said"] > QUIET_EVERY_S or state["done"] >= total:
            state["said"] = now
            print(f"{stage}: {state['done']}/{total}  {state['figures']}", file=sys.stderr, flush=True)

    return advance


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C and SIGTERM do not break off a step: `stopped()` tells that one came. A second one breaks. One
    that came too late to be asked for stops the work at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came: list[int] = []

    def note(number: int, _: object) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        print("stopping at the next safe point; once more breaks off", file=sys.stderr, flush=True)

    agreed = hosts.Agreement()
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: agreed.any(bool(came))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if hosts.Agreement(every=1).any(bool(came)):
        raise Interrupted("stopped; the same command goes on")
