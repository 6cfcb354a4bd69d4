"""What long commands share: progress on stderr, a stop, and a directory they hold."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
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

from jaxclt.runs.kept import owned
from jaxclt.runs.pace import Pace, rate_text

__all__ = ["Interrupted", "Run", "Stages", "Stop", "lines", "progress", "running"]
__all__ += ["stoppable"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def lines(say: Console) -> Callable[[str], None]:
    """A function that prints a line as it is."""
    return lambda text: say.print(text, markup=False, soft_wrap=True)


# -- the stop --------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """A command ends because it was asked to; `status` is what it exits with."""

    def __init__(self, status: int) -> None:
        super().__init__()
        self.status = status


class Stop:
    """Whether the process was asked to end, which its loops look at."""

    signal = 0

    def __call__(self) -> bool:
        """Whether it was."""
        return self.signal != 0

    @property
    def status(self) -> int:
        """What to exit with: 130 after Ctrl-C, 143 after SIGTERM, as shells have it."""
        return 128 + self.signal

    def look(self) -> None:
        """End here if that was asked for.

        Raises:
          Interrupted: if so.
        """
        if self():
            raise Interrupted(self.status)


@contextmanager
def stoppable(say: Console) -> Iterator[Stop]:
    """A stop that Ctrl-C or SIGTERM sets; the second one leaves at once.

    An exception raised by the handler of a signal would be lost in a callback that C
    code runs, such as a collector's; a flag is not. The operating system's handler
    writes to a pipe that a thread reads, so that a press is answered while the main
    thread waits for a compiler or a device.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals are heard in the main thread only
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    hearing = threading.Thread(target=_hear, args=(reader, stop, say), daemon=True)
    hearing.start()
    # A command in the background, or under nohup, may have to ignore one.
    heeded = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    before_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {n: signal.signal(n, lambda *_: None) for n in heeded}
    try:
        yield stop
    except KeyboardInterrupt:
        stop.look()  # what a stopped loop raises has no status
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before_fd)
        os.write(writer, b"\0")  # ends the thread
        hearing.join()
        os.close(writer)
        os.close(reader)


def _hear(reader: int, stop: Stop, say: Console) -> None:
    while number := os.read(reader, 1)[0]:
        if number not in SIGNALS:
            continue
        if stop():
            say.show_cursor()  # which a bar hides
            os._exit(128 + number)
        stop.signal = number
        say.print(
            "stopping at the next step (loading and compiling are finished first); "
            "Ctrl-C or SIGTERM again leaves at once",
            soft_wrap=True,
        )


# -- progress --------------------------------------------------------------------------


class _Rate(ProgressColumn):
    """How many per second, or the note that is given instead."""

    def render(self, task: Task) -> Text:
        """Rate once it is known."""
        speed = task.finished_speed or task.speed
        unit, note = task.fields["unit"], task.fields["note"]
        return Text(note or (f"{rate_text(speed)} {unit}" if speed else ""))


class Stages:
    """One progress bar after the other; off a terminal, a line now and then.

    Args:
      say: where to.
      unit: of the rates.
      units: of stages that have another one.
      look: called at every report, to end the command there; see `Stop.look`.
    """

    def __init__(
        self,
        say: Console,
        unit: str = "tokens/s",
        units: Mapping[str, str] | None = None,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        self.unit, self.units, self.look = unit, units or {}, look
        self.name, self.pace = "", Pace(lines(say))
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        # Where nobody watches a bar would leave an empty line.
        quiet = not say.is_terminal
        self.bar = None if quiet else Progress(*columns, console=say, transient=True)

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, what: str, done: int, total: int, *, note: str = "") -> None:
        """Report that `done` of `total` of stage `what` are done.

        Args:
          what: name of the stage.
          done: so far.
          total: planned.
          note: shown instead of the rate.
        """
        self.look()
        unit = self.units.get(what, self.unit)
        if self.bar is None:
            self.pace(what, done, total, unit=f" {unit}", note=note)
            return
        if what != self.name:
            self.name = what
            for task in self.bar.task_ids:
                self.bar.remove_task(task)
            self.bar.add_task(what, total=None, unit=unit, note="")
            self.bar.start()
        self.bar.update(
            self.bar.task_ids[0], completed=done, total=total, note=note, refresh=False
        )


@contextmanager
def progress(
    say: Console, what: str, unit: str, look: Callable[[], None] = lambda: None
) -> Iterator[Callable[[int, int], None]]:
    """One stage, of (done, total)."""
    with Stages(say, unit, look=look) as stages:
        yield partial(stages, what)


# -- a command -------------------------------------------------------------------------


class Run:
    """What a command has while it runs.

    Attributes:
      say: where progress and warnings go.
      stop: set by Ctrl-C and SIGTERM, if the command looks at it.
      look: ends the command if it is set.
    """

    def __init__(self, say: Console, stop: Stop, stack: ExitStack) -> None:
        self.say, self.stop, self.look, self._stack = say, stop, stop.look, stack
        self.line = lines(say)

    def own(self, out: Path, *, makes: str = "") -> None:
        """Hold a directory until the command ends, once it is seen to be writable.

        Args:
          out: directory.
          makes: see `jaxclt.runs.kept.owned`.

        Raises:
          InputError: if it cannot be written, or another command holds it.
        """
        self._stack.enter_context(owned(out, makes=makes))

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.line(f"jaxclt: warning: {text}")

    def stages(
        self, unit: str = "tokens/s", units: Mapping[str, str] | None = None
    ) -> Stages:
        """Progress bars, at every report of which the command may end."""
        return Stages(self.say, unit, units, self.look)

    def progress(
        self, what: str, unit: str
    ) -> AbstractContextManager[Callable[[int, int], None]]:
        """One such stage, of (done, total)."""
        return progress(self.say, what, unit, self.look)


@contextmanager
def running(say: Console, *, long: bool) -> Iterator[Run]:
    """A command's `Run`.

    Args:
      say: where it reports.
      long: whether it looks by itself if it is to stop; others are interrupted.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(stoppable(say)) if long else Stop()
        yield Run(say, stop, stack)
