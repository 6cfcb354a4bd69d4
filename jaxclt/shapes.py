"""Bucketed sizes: prompts of similar length share one compilation."""

from __future__ import annotations

__all__ = ["bucket", "round_up"]


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is at least n."""
    return -(-n // multiple) * multiple


def bucket(n: int, smallest: int = 8) -> int:
    """The next of smallest x 1, 2, 3, 4, 6, 8, 12, ...: never twice what is asked."""
    power = smallest
    while power * 2 <= n:
        power *= 2
    return next(size for size in (power, power * 3 // 2, power * 2) if size >= n)
