"""Progress of long work in lines, where no bar is drawn: logs, pipes, notebooks."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable

__all__ = ["EVERY_S", "Pace", "logged", "rate_text"]

EVERY_S = 10.0  # between two lines


class Pace:
    """At most one line every ten seconds: what, done of total, rate, time left.

    Nothing is said in the first ten seconds, so that short work stays quiet.

    Args:
      say: gets each line.
      clock: seconds.
    """

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.say, self.clock = say, clock
        self.said = clock()
        self.what, self.first, self.began = "", 0, self.said

    def __call__(
        self, what: str, done: int, total: int, *, unit: str = "/s", note: str = ""
    ) -> None:
        """Take note that `done` of `total` of `what` are done.

        Args:
          what: name of the stage.
          done: so far.
          total: planned.
          unit: after the rate.
          note: instead of the rate.
        """
        now = self.clock()
        if what != self.what or done < self.first:
            self.what, self.first, self.began = what, done, now
        if now - self.said < EVERY_S:
            return
        self.said = now
        parts = [f"{what}: {done:,} of {total:,}"]
        rate = (done - self.first) / (now - self.began) if now > self.began else 0.0
        if note or rate:
            parts.append(note or f"{rate_text(rate)}{unit}")
        if rate:
            left = datetime.timedelta(seconds=round(max(total - done, 0) / rate))
            parts.append(f"{left} left")
        self.say(", ".join(parts))


def rate_text(rate: float) -> str:
    """A rate in three digits or more, without an exponent where it is large."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def logged() -> Callable[[str, int, int], None]:
    """Progress of a Python call: what, done, total; to the logger "jaxclt", INFO."""
    return Pace(logging.getLogger("jaxclt").info)
