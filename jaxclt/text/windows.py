"""Windows of tokens that passes over text run on; which of their positions count."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from jaxclt.errors import InputError, check_at_least
from jaxclt.io.model import Model
from jaxclt.io.tokenizer import Tokenizer
from jaxclt.text.corpus import (
    PAD,
    by_hash,
    check_context,
    countable,
    pack_windows,
    read_documents,
)
from jaxclt.text.prompts import Prompt, PromptRow, prompt_ids, prompt_rows

__all__ = ["BATCH_TOKENS", "Data", "Mask", "TokenWindows", "batches", "check_windows"]
__all__ += ["read_windows", "row_ids"]

Data = str | os.PathLike[str] | Iterable[Prompt | np.ndarray]
Mask = Literal["all"] | np.ndarray | Sequence[Any] | None

BATCH_TOKENS = 2048  # positions that go through the model together


@dataclasses.dataclass(frozen=True)
class TokenWindows:
    """Windows of tokens, and which of their positions count.

    Attributes:
      token_WS: int32, -1 after the text.
      mask_WS: bool.
    """

    token_WS: np.ndarray
    mask_WS: np.ndarray

    @property
    def n_tokens(self) -> int:
        """Positions that count."""
        return int(self.mask_WS.sum())

    @property
    def digest(self) -> str:
        """A digest of tokens and mask."""
        found = hashlib.sha256(repr(self.token_WS.shape).encode())
        found.update(self.token_WS.tobytes() + self.mask_WS.tobytes())
        return found.hexdigest()

    def take(self, rows: slice) -> TokenWindows:
        """Some of the windows."""
        return TokenWindows(self.token_WS[rows], self.mask_WS[rows])

    def first(self, n_tokens: int) -> TokenWindows:
        """As many of the first windows as have this many positions that count."""
        have_W = np.cumsum(self.mask_WS.sum(1))
        return self.take(slice(0, int(np.searchsorted(have_W, n_tokens)) + 1))


def read_windows(
    model: Model,
    data: Data | TokenWindows,
    *,
    mask: Mask = None,
    tokens: int = 200_000,
    context: int = 256,
    shard: tuple[int, int] = (0, 1),
    on_tokens: Callable[[int, int], None] = lambda done, total: None,
) -> TokenWindows:
    """Windows of tokens from a text source, or from texts or token ids given.

    Args:
      model: from `load_model`.
      data: where text is, as for `jaxclt train --data` (a file, a folder, ``hub:...``),
        or a .jsonl file of prompts, see `prompt_rows`, each one window;
        or an iterable of windows: each a prompt (text or a chat) or token ids. All of
        them are taken.
      mask: which positions count. None: no padding, no special token, not the first of
        a window, where many models park attention. ``"all"``: all but padding. Or bool
        [S] for all windows, [W, S], or one row for each window (padding never counts).
      tokens: positions that count to take from a text source or from prompts.
      context: positions of a window cut from a text source.
      shard: (i, n) takes every n-th window from the i-th on.
      on_tokens: progress of the tokenizer.

    Raises:
      InputError: if there is no text, a token is not the model's, or the mask does not
        fit.
    """
    if isinstance(data, TokenWindows):
        check_windows(model, data.token_WS)
        return data.take(slice(shard[0], None, shard[1]))
    if isinstance(data, str | os.PathLike):
        check_at_least(1, tokens=tokens, context=context)
        rows = prompt_rows(data)
        if rows is None:
            token_WS = _cut(model, data, tokens, context, on_tokens)
        else:
            token_WS = _padded(model, row_ids(model.tokenizer, rows))
        found = TokenWindows(token_WS, _mask(model, token_WS, mask)).first(tokens)
    else:
        token_WS = _padded(model, data)
        found = TokenWindows(token_WS, _mask(model, token_WS, mask))
    found = found.take(slice(shard[0], None, shard[1]))
    if not found.n_tokens:
        raise InputError("no position of the data counts: give more text, or a mask")
    return found


def _cut(
    model: Model,
    source: str | os.PathLike[str],
    tokens: int,
    context: int,
    on_tokens: Callable[[int, int], None],
) -> np.ndarray:
    check_context(context, model.cfg.n_ctx)
    documents = by_hash(read_documents(os.fspath(source), tokens=tokens))
    return pack_windows(
        list(documents.values()),
        model.tokenizer,
        size=context,
        n_tokens=tokens,
        on_tokens=on_tokens,
    )


def row_ids(tokenizer: Tokenizer, rows: Iterable[PromptRow]) -> Iterator[list[int]]:
    """Token ids of the prompts of a file.

    Raises:
      InputError: as `prompt_ids`, naming file and line.
    """
    for row in rows:
        try:
            yield prompt_ids(tokenizer, row.prompt)
        except InputError as error:
            raise InputError(f"{row.place}: {error}") from None


def _padded(model: Model, data: Iterable[Prompt | np.ndarray]) -> np.ndarray:
    rows = [prompt_ids(model.tokenizer, x) for x in data]
    if not rows or not max(map(len, rows)):
        raise InputError("the data has no tokens: give at least one window")
    token_WS = np.full((len(rows), max(map(len, rows))), PAD, np.int64)
    for row_S, ids in zip(token_WS, rows, strict=True):
        row_S[: len(ids)] = ids
    check_windows(model, token_WS)
    behind_WS = np.cumsum(token_WS == PAD, axis=1) > 0
    if ((token_WS != PAD) & behind_WS).any():
        raise InputError("padding (-1) stands before a token: put it after the text")
    return token_WS.astype(np.int32)


def check_windows(model: Model, token_WS: np.ndarray) -> None:
    """Raise InputError for windows that the model cannot read."""
    n = model.cfg.d_vocab
    if ((token_WS < PAD) | (token_WS >= n)).any():
        raise InputError(f"a window holds a token that is not in 0..{n - 1}")
    if token_WS.shape[1] > model.cfg.n_ctx:
        raise InputError(
            f"a window has {token_WS.shape[1]} tokens, the model takes at most "
            f"{model.cfg.n_ctx}: cut it"
        )


def _mask(model: Model, token_WS: np.ndarray, mask: Mask) -> np.ndarray:
    text_WS = token_WS != PAD
    if mask is None:
        return countable(token_WS, model.tokenizer.special_ids)
    if isinstance(mask, str):
        if mask != "all":
            raise InputError(f'mask {mask!r}: give None, "all" or an array of bool')
        return text_WS
    W, S = token_WS.shape
    rows = list(mask)
    if rows and np.ndim(rows[0]) == 1:
        given_WS = np.zeros((W, S), bool)
        if len(rows) != W or max(map(len, rows)) > S:
            raise InputError(
                f"the mask has {len(rows)} rows of up to {max(map(len, rows))}, the "
                f"windows are {W} of {S}"
            )
        for to_S, row in zip(given_WS, rows, strict=True):
            to_S[: len(row)] = np.asarray(row, bool)
        return given_WS & text_WS
    if len(rows) != S:
        raise InputError(
            f"the mask has {len(rows)} positions, the windows {S}: give one for each"
        )
    return np.asarray(rows, bool)[None] & text_WS


def batches(
    windows: TokenWindows, start: int, n_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Batches of one shape from a window on: tokens, mask, and windows done by then."""
    n, S = windows.token_WS.shape
    W = min(n, max(1, n_tokens // S))
    for i in range(start, n, W):
        part = windows.take(slice(i, i + W))
        pad = ((0, W - len(part.token_WS)), (0, 0))
        yield (
            np.pad(part.token_WS, pad, constant_values=PAD),
            np.pad(part.mask_WS, pad),
            min(i + W, n),
        )
