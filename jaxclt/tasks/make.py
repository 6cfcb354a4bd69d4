"""Examples of a task, by a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from jaxclt.errors import InputError, check_at_least, check_choice
from jaxclt.tasks.form import Example, Span, Tokens, check
from jaxclt.tasks.templates import TASKS, Parts

__all__ = ["make"]

DRAWS = 1000  # in a row that bring nothing new: a task is exhausted


def make(
    task: str, n: int, seed: int = 0, *, tokenizer: Tokens | None = None
) -> list[Example]:
    """Different examples of a task, always the same of a seed.

    Args:
      task: one of `TASKS`.
      n: how many.
      seed: of the draws; the first of n + 1 examples are the n.
      tokenizer: of the model (`model.tokenizer`): examples that it does not take are
        passed over, see `check`. None keeps all.

    Raises:
      InputError: for an unknown task, or if there are not as many.
    """
    check_choice("task", task, TASKS)
    check_at_least(1, n=n)
    rng = random.Random(f"{task} {seed}")
    found: list[Example] = []
    seen: set[tuple[str, str]] = set()
    missed = 0
    while len(found) < n and missed < DRAWS:
        example = _example(task, rng)
        pair = example.prompt, example.counterfactual
        missed = missed + 1 if pair in seen else 0
        if pair not in seen and (tokenizer is None or check([example], tokenizer).kept):
            found.append(example)
        seen.add(pair)
    if len(found) < n:
        taken = "" if tokenizer is None else " that this model's tokenizer takes"
        raise InputError(
            f"task {task!r}: found {len(found)} different examples{taken}, not {n}: "
            "ask for fewer, or give a file of your own"
        )
    return found


def _example(task: str, rng: random.Random) -> Example:
    def draw(among: Sequence[Any], *but: Any) -> Any:
        left = [x for x in among if x not in but]
        # `random()` is the one draw that Python promises to keep.
        return left[int(rng.random() * len(left))]

    filled = TASKS[task](draw)
    prompt, spans = _joined(filled.prompt)
    other, other_spans = _joined(filled.counterfactual)
    return Example(
        prompt=prompt,
        answer=filled.answer,
        foil=filled.foil,
        counterfactual=other,
        task=task,
        spans=spans,
        counterfactual_spans=other_spans,
    )


def _joined(parts: Parts) -> tuple[str, dict[str, Span]]:
    """The text of parts, and where the named ones are in it."""
    text, spans = "", {}
    for part in parts:
        name, piece = part if isinstance(part, tuple) else ("", part)
        if name:
            spans[name] = len(text), len(text) + len(piece)
        text += piece
    return text, spans
