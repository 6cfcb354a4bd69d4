"""The form of a task's example, and what a tokenizer must make of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

from jaxclt.errors import shown

__all__ = ["Checked", "Example", "Tokens", "check"]

Span = tuple[int, int]


class Tokens(Protocol):
    """What is asked of a tokenizer, see `jaxclt.io.tokenizer`."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...

    def find(self, text: str) -> int | None:
        """The token that a text is."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt with a right and a wrong next token, and a prompt that turns them.

    Attributes:
      prompt: text.
      answer: what follows it, with its leading space if it has one.
      foil: what does not follow it.
      counterfactual: the prompt with one thing changed, after which the answer is wrong
        or no better than the foil; "" if there is none.
      task: its name, "" of a user's own.
      spans: parts of the prompt by name, characters from and to (not included).
      counterfactual_spans: the same parts of the counterfactual prompt.
    """

    prompt: str
    answer: str
    foil: str
    counterfactual: str = ""
    task: str = ""
    spans: Mapping[str, Span] = dataclasses.field(default_factory=dict)
    counterfactual_spans: Mapping[str, Span] = dataclasses.field(default_factory=dict)


class Checked(NamedTuple):
    """Examples that a tokenizer takes, and of the others why not."""

    kept: list[Example]
    dropped: list[tuple[Example, str]]


def check(examples: Iterable[Example], tokenizer: Tokens) -> Checked:
    """Sort examples by whether they can be measured on a model.

    Answer and foil must be single, different tokens that do not merge with the prompt,
    and the prompt and its counterfactual equally many tokens.

    Args:
      examples: of any task.
      tokenizer: of the model.
    """
    kept, dropped = [], []
    for example in examples:
        why = _why_not(example, tokenizer)
        if why:
            dropped.append((example, why))
        else:
            kept.append(example)
    return Checked(kept, dropped)


def _why_not(example: Example, tokenizer: Tokens) -> str:
    """Why a tokenizer does not take an example; empty if it does."""
    ids = tokenizer.encode(example.prompt)
    pair = []
    for name in ("answer", "foil"):
        text = getattr(example, name)
        pair.append(tokenizer.find(text))
        if pair[-1] is None:
            return f"{name} {shown(text)} is not one token"
        if tokenizer.encode(example.prompt + text)[: len(ids)] != ids:
            return f"{name} {shown(text)} merges with the end of the prompt"
    if pair[0] == pair[1]:
        return f"answer and foil {shown(example.foil)} are the same token"
    if example.counterfactual:
        there = tokenizer.encode(example.counterfactual)
        if len(there) != len(ids):
            return f"{len(ids)} tokens, its counterfactual {len(there)}"
        if there == ids:
            return "its counterfactual is the prompt"
    return ""
