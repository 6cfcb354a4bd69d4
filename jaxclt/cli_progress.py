"""Progress of work that has several stages, for the commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from rich.console import Console

__all__ = ["Bar", "Stages"]

Bar = Callable[[Console, str, str], AbstractContextManager[Callable[[int, int], None]]]


class Stages:
    """One progress bar after the other.

    Args:
      say: where to.
      bar: opens a bar of a name and a unit.
      unit: of the rates.
      units: of stages that have another one.
    """

    def __init__(
        self,
        say: Console,
        bar: Bar,
        unit: str = "tokens/s",
        units: Mapping[str, str] | None = None,
    ) -> None:
        self.say, self.bar, self.unit = say, bar, unit
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
            entered = self.bar(self.say, what, unit)
            self.name, self.update = what, self.stack.enter_context(entered)
        self.update(done, total)
