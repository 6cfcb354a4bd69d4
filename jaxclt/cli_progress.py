"""What commands say on stderr while they work: lines, bars with rate and ETA."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

__all__ = ["Stages", "lines", "progress", "stoppable"]


def lines(say: Console) -> Callable[[str], None]:
    """A function that says a line as it is."""
    return lambda text: say.print(text, markup=False, soft_wrap=True)


@contextmanager
def progress(
    say: Console, what: str, unit: str
) -> Iterator[Callable[[int, int], None]]:
    """A bar of (done, total), with rate and ETA."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    # Where nobody watches a bar would leave an empty line.
    quiet = not say.is_terminal
    with Progress(*columns, console=say, transient=True, disable=quiet) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def stoppable(say: Console) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, once; the second time it interrupts."""
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        say.print("keeping what is done so far; Ctrl-C again to leave without it")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


class _Rate(ProgressColumn):
    """How many per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """Rate once it is known."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.3g} {self.unit}" if speed else "")


class Stages:
    """One progress bar after the other.

    Args:
      say: where to.
      unit: of the rates.
      units: of stages that have another one.
    """

    def __init__(
        self,
        say: Console,
        unit: str = "tokens/s",
        units: Mapping[str, str] | None = None,
    ) -> None:
        self.say, self.unit = say, unit
        self.units, self.stack = units or {}, ExitStack()
        self.name, self.update = "", lambda done, total: None

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Report that `done` of `total` of stage `what` are done."""
        if what != self.name:
            self.stack.close()
            unit = self.units.get(what, self.unit)
            entered = progress(self.say, what, unit)
            self.name, self.update = what, self.stack.enter_context(entered)
        self.update(done, total)
