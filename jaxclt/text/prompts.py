"""What a prompt may be: text, token ids or a chat; and files of prompts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxclt.errors import InputError
from jaxclt.files.lines import json_rows, text_of
from jaxclt.io.chat import Message, check_messages, is_chat
from jaxclt.io.tokenizer import Bos, Tokenizer

__all__ = ["Given", "Opened", "Prompt", "PromptRow", "prompt_ids", "prompt_rows"]
__all__ += ["prompt_text", "read_prompts"]


# Text, token ids as they stand, or messages {"role", "content"} that the model's own
# template makes a text of, up to where the assistant is to speak.
Given = str | Sequence[int] | Sequence[Message]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A prompt whose first token is chosen.

    Attributes:
      prompt: ids stay as they are.
      bos: whether a beginning-of-sequence token is put first.
    """

    prompt: Given
    bos: Bos = "auto"

    @classmethod
    def of(cls, prompt: Prompt) -> Opened:
        """Any prompt; one that does not say otherwise begins as the tokenizer does."""
        return prompt if isinstance(prompt, Opened) else cls(prompt)


Prompt = Given | Opened

_USAGE = 'write a JSON object such as {"prompt": "text"}'


def prompt_text(tokenizer: Tokenizer, prompt: Prompt) -> str:
    """A prompt as the text that the model reads.

    Raises:
      InputError: for messages that the model's template does not take.
    """
    given = Opened.of(prompt).prompt
    if isinstance(given, str):
        return given
    if is_chat(given):
        return tokenizer.chat(given)
    return tokenizer.decode(_whole_numbers(given))


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt | np.ndarray) -> list[int]:
    """Token ids of a prompt; ids that are given stay as they are, whatever they are.

    Raises:
      InputError: for anything that is not a prompt, and as `Tokenizer.encode` and
        `Tokenizer.chat`.
    """
    if isinstance(prompt, np.ndarray):
        return _whole_numbers(prompt)
    opened = Opened.of(prompt)
    if isinstance(opened.prompt, str) or is_chat(opened.prompt):
        return tokenizer.encode(prompt_text(tokenizer, opened), opened.bos)
    return _whole_numbers(opened.prompt)


def _whole_numbers(prompt: Any) -> list[int]:
    try:
        given_T = np.asarray(prompt)
    except ValueError:  # rows of different lengths
        given_T = np.zeros((0, 0))
    if given_T.ndim != 1 or (len(given_T) and given_T.dtype.kind not in "iu"):
        raise InputError(
            "a prompt is a text, a list of token ids, or a list of messages "
            '{"role": "user", "content": "text"}'
        )
    return [int(i) for i in given_T]


# -- files -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PromptRow:
    """A prompt of a file."""

    prompt: str | list[dict[str, str]]
    place: str  # file and line
    row: dict[str, Any]  # with whatever else stands there

    @property
    def answer(self) -> str:
        """The right continuation, "" if the row has none."""
        return text_of({"answer": None} | self.row, "answer", self.place)


def prompt_rows(data: str | os.PathLike[str]) -> list[PromptRow] | None:
    """The rows of a .jsonl of prompts; None if it is anything else.

    A row has a ``prompt``, or ``messages`` of a chat. One whose prompt is null or blank
    is skipped.

    Raises:
      InputError: if a row after the first is not a prompt, or one holds no text.
    """
    path = Path(data)
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    found, seen = [], 0
    for number, row in json_rows(path):
        place = f"{path} line {number}"
        if not isinstance(row, dict) or not {"prompt", "messages"} & row.keys():
            if seen:
                raise InputError(f"{place}: {_USAGE}")
            return None
        seen += 1
        prompt = _prompt_of(row, place)
        if prompt:
            found.append(PromptRow(prompt, place, row))
    if seen and not found:
        raise InputError(f"{path} holds no prompt: all its rows are empty")
    return found or None


def _prompt_of(row: dict[str, Any], place: str) -> str | list[dict[str, str]]:
    messages = row.get("messages")
    if messages is None:
        text = text_of({"prompt": None} | row, "prompt", place)
        return text if text.strip() else ""
    if row.get("prompt") is not None:
        raise InputError(f"{place}: give a prompt or messages, not both")
    try:
        return check_messages(messages)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def read_prompts(path: str | os.PathLike[str]) -> list[Given]:
    """Prompts of a .txt file (one a line) or a .jsonl file (see `prompt_rows`).

    Raises:
      InputError: if the file is missing or holds none, or a line is not such a row.
    """
    path = Path(path)
    if path.suffix == ".jsonl" and path.is_file():
        rows = prompt_rows(path)
        prompts: list[Given] = [row.prompt for row in rows or ()]
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read prompts from {path}: {error}") from error
        prompts = [line for line in text.split("\n") if line.strip()]
    if not prompts:
        raise InputError(f"{path} holds no prompt: write one a line")
    return prompts
