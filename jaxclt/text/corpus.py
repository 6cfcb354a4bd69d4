"""Text becomes windows of tokens; some documents are held out.

A document is a file, a line of a .jsonl file (its ``text``), or a part of a file
between ``<|endoftext|>`` marks; long ones are cut at line ends into pieces, which
count as documents. Documents are put in the order of their SHA-256, which shuffles
them, drops copies, and decides which are held out, all without a random state.

Special tokens are never trained on, nor is the first position of a window: there many
models park attention, with activations hundreds of times larger than elsewhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import numpy as np

from jaxclt.errors import InputError
from jaxclt.files.lines import json_rows, text_of
from jaxclt.io.tokenizer import Tokenizer
from jaxclt.text.hub import PREFIX, stream_texts

__all__ = ["Windows", "by_hash", "check_context", "countable", "cut_windows"]
__all__ += ["pack_windows", "read_documents", "split_documents"]

SUFFIXES = (".txt", ".md", ".rst", ".utf8", ".jsonl")
PIECE = 20_000  # characters
CHARACTERS = 6  # of a token, more than in most text, so that there are enough
SHORTEST = 16  # tokens of a window worth running, if the context allows more
PAD = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """Token windows [W, S], int32, padded with -1 after the text."""

    train_WS: np.ndarray
    held_WS: np.ndarray
    special: frozenset[int]  # token ids that are never trained on
    digest: str  # of all the rest
    first: bool = False  # whether the first position is trained on

    @classmethod
    def of(
        cls,
        train_WS: np.ndarray,
        held_WS: np.ndarray,
        *,
        special: Collection[int] = (),
        first: bool = False,
    ) -> Windows:
        """Windows with their digest.

        Args:
          train_WS: token ids [W, S], padded with -1 after the text.
          held_WS: likewise, never trained on.
          special: token ids that are never trained on.
          first: train on the first position too. Models of text park attention there;
            one trained only on short prompts may not.
        """
        train_WS, held_WS = (np.asarray(x, np.int32) for x in (train_WS, held_WS))
        digest = hashlib.sha256(train_WS.tobytes() + b"|" + held_WS.tobytes())
        digest.update(repr(sorted(special)).encode() + b"first" * first)
        return cls(
            train_WS=train_WS,
            held_WS=held_WS,
            special=frozenset(special),
            digest=digest.hexdigest(),
            first=first,
        )

    def valid(self, token_WS: np.ndarray) -> np.ndarray:
        """Which positions of windows like these are trained on, bool [W, S]."""
        return countable(token_WS, self.special, first=self.first)


def countable(
    token_WS: np.ndarray, special: Collection[int], *, first: bool = False
) -> np.ndarray:
    """Which positions of windows count, bool [W, S].

    No padding and no special token, and the first position only if `first`.
    """
    counts_WS = (token_WS != PAD) & ~np.isin(token_WS, sorted(special))
    if not first:
        counts_WS[:, 0] = False
    return counts_WS


def check_context(size: int, n_ctx: int) -> None:
    """Raise InputError if windows of text cannot have this many positions.

    The first is never trained on; beyond its context a model does not know where it is.
    """
    if size < 2:
        raise InputError(f"--context {size}: windows need at least 2 tokens")
    if size <= n_ctx:
        return
    most = f"--context {size}: the model takes at most {n_ctx}"
    if n_ctx <= SHORTEST:
        most += (
            f", too short for running text: give --context {n_ctx}, or (not to train) "
            'give a .jsonl of prompts, lines {"prompt": ...}'
        )
    raise InputError(most)


def read_documents(path: str | Path, *, tokens: int = 1_000_000) -> Iterator[str]:
    """Documents of a file, of all text files of a folder, or of a dataset on the hub.

    Args:
      path: file, folder (in the order of names), or ``hub:...`` (see `hub`).
      tokens: that are needed of a dataset on the hub, which may have no end.

    Raises:
      InputError: if there is no text there, or a line of a .jsonl has none.
    """
    if str(path).startswith(PREFIX):
        for text in stream_texts(str(path), CHARACTERS * tokens):
            yield from _pieces(text.strip())
        return
    path = Path(path)
    if not path.exists():
        raise InputError(f"--data {path}: there is no such file or folder")
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    files = [f for f in files if f.is_file() and f.suffix in SUFFIXES]
    if not files:
        raise InputError(f"--data {path}: no file ends in {', '.join(SUFFIXES)}")
    for file in files:
        if file.suffix == ".jsonl":
            texts = _jsonl_texts(file)
        else:
            text = file.read_text("utf-8-sig", errors="replace")
            texts = text.split("<|endoftext|>")
        for document in texts:
            yield from _pieces(document.strip())


def _jsonl_texts(file: Path) -> Iterator[str]:
    for number, row in json_rows(file, "replace"):
        place = f"{file}:{number}"
        if not isinstance(row, dict) or "text" not in row:
            raise InputError(f"{place}: each line must be a JSON object with `text`")
        yield text_of(row, "text", place)


def _pieces(text: str) -> Iterator[str]:
    while text:
        end = len(text)
        if end > PIECE:
            cuts = (text.rfind(mark, PIECE // 2, PIECE) for mark in ("\n\n", "\n", " "))
            end = next((cut for cut in cuts if cut > 0), PIECE)
        yield text[:end]
        text = text[end:].strip()


def by_hash(documents: Iterable[str]) -> dict[str, str]:
    """Documents in the order of their hashes, each once."""
    found = {hashlib.sha256(text.encode()).hexdigest(): text for text in documents}
    return dict(sorted(found.items()))


def split_documents(
    documents: Iterator[str], held: Iterator[str] | None, share: float
) -> tuple[list[str], list[str]]:
    """Training and held-out documents, each in the order of their hashes.

    Args:
      documents: to train on.
      held: documents to evaluate on, never trained on; None takes `share` of the
        others.
      share: of the documents that are held out when `held` is None.

    Raises:
      InputError: if either part would be empty.
    """
    every = by_hash(documents)
    if held is not None:
        apart = by_hash(held)
    else:
        # Hashes are uniform: the smallest ones are a random share.
        apart = dict(list(every.items())[: max(1, round(len(every) * share))])
    train = [text for key, text in every.items() if key not in apart]
    if not train or not apart:
        raise InputError(
            f"the data has {len(every)} documents; at least one to train on and one "
            "to hold out are needed"
        )
    return train, list(apart.values())


def cut_windows(
    train: list[str],
    held: list[str],
    tokenizer: Tokenizer,
    *,
    size: int,
    train_tokens: int,
    held_tokens: int,
    on_tokens: Callable[[int, int], None] = lambda done, total: None,
) -> Windows:
    """Tokenise documents until there are enough tokens, and cut them into windows.

    Args:
      train: training documents.
      held: held-out documents.
      tokenizer: of the model; its bos opens every window if the model was trained so.
      size: positions of a window.
      train_tokens: stop after this many; with fewer the run sees some twice.
      held_tokens: likewise.
      on_tokens: progress.
    """
    train_WS, held_WS = (
        pack_windows(
            documents, tokenizer, size=size, n_tokens=enough, on_tokens=on_tokens
        )
        for documents, enough in ((train, train_tokens), (held, held_tokens))
    )
    return Windows.of(train_WS, held_WS, special=tokenizer.special_ids)


def pack_windows(
    documents: list[str],
    tokenizer: Tokenizer,
    *,
    size: int,
    n_tokens: int,
    on_tokens: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Windows [W, S] of documents, int32, padded with -1, until there are enough.

    Args:
      documents: texts, in the order they are taken.
      tokenizer: of the model; its bos opens every window if the model was trained so.
      size: positions of a window.
      n_tokens: stop after the batch of documents that reaches this many.
      on_tokens: progress.

    Raises:
      InputError: if windows would be too small, or no document is long enough.
    """
    check_context(size, size)
    # A model of a short context reads short texts.
    shortest = SHORTEST if size > SHORTEST else 2
    rows, count = [], 0
    body = size - len(tokenizer.opening)
    for start in range(0, len(documents), 64):
        for ids in tokenizer.encode_many(documents[start : start + 64]):
            text = tokenizer.opened(ids)[len(tokenizer.opening) :]
            for i in range(0, len(text), body):
                part = tokenizer.opening + text[i : i + body]
                if len(part) >= shortest:
                    rows.append(part + [PAD] * (size - len(part)))
                    count += len(part) - 1
        on_tokens(min(count, n_tokens), n_tokens)
        if count >= n_tokens:
            break
    if not rows:
        raise InputError(f"the data has no document of {shortest} tokens")
    return np.asarray(rows, np.int32)
