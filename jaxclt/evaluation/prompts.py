"""What dictionaries are evaluated on: held-out windows, and prompts picked from them.

The paper compares the replacement model where the model is right and not too sure
(section 2.2), and traces short prompts whose next word is rare, new to the prompt, and
predicted with a loss above 0.2 (appendix R): what is obvious needs no circuit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence

import jax
import numpy as np

from jaxclt.evaluation.concepts import ConceptPair
from jaxclt.io.model import Model
from jaxclt.text.corpus import PAD
from jaxclt.text.prompts import PromptRow, prompt_rows, prompt_text
from jaxclt.text.windows import TokenWindows, read_windows, row_ids

__all__ = ["EvalText", "graph_filter", "pick_prompts", "read_eval_text", "unsure"]

SURE = 0.8  # confidence from which the paper leaves a prompt out
RARE = 1e-4  # share of the text that a graph's target may make up
LEAST_LOSS = 0.2  # nats


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalText:
    """Held-out windows, which predictions are compared, and the truth.

    Attributes:
      windows: tokens, and the positions whose reconstruction counts.
      ask_WS: bool, positions whose next token is compared.
      next_WS: int32, the next token of the text; -1 where it is not known.
      count_V: how often each token occurs in the text (more than `windows` holds).
      prompts: whether each window is a prompt by itself, whose last position asks.
      pairs: of sentences, for the Contrastive Eval; None: the built-in ones.
    """

    windows: TokenWindows
    ask_WS: np.ndarray
    next_WS: np.ndarray
    count_V: np.ndarray
    prompts: bool
    pairs: Sequence[ConceptPair] | None = None

    @property
    def digest(self) -> str:
        """Tells texts apart."""
        found = hashlib.sha256(self.windows.digest.encode())
        found.update(self.ask_WS.tobytes() + self.next_WS.tobytes())
        return found.hexdigest()

    def take(self, n: int) -> EvalText:
        """The first n windows."""
        return dataclasses.replace(
            self,
            windows=self.windows.take(slice(n)),
            ask_WS=self.ask_WS[:n],
            next_WS=self.next_WS[:n],
        )


def read_eval_text(
    model: Model,
    data: str | os.PathLike[str],
    *,
    tokens: int,
    context: int,
    count_tokens: int = 200_000,
) -> EvalText:
    """Windows of held-out text, or prompts from a .jsonl file.

    Args:
      model: from `load_model`.
      data: as for `jaxclt train --data`; or a .jsonl file of ``{"prompt": ...}`` (or
        ``{"messages": ...}``), each with the right ``answer`` (its first token counts)
        if there is one.
      tokens: positions to evaluate.
      context: positions of a window of text.
      count_tokens: tokens among which it is counted how rare a token is.

    Raises:
      InputError: if there is no text, or a line is not what it should be.
    """
    rows = prompt_rows(data)
    if rows is None:
        n_tokens = max(tokens, count_tokens)
        every = read_windows(model, data, tokens=n_tokens, context=context)
        windows = every.first(tokens)
        next_WS = np.full_like(windows.token_WS, PAD)
        next_WS[:, :-1] = windows.token_WS[:, 1:]
        ask_WS = windows.mask_WS & (next_WS != PAD)
    else:
        answers = [row.answer for row in rows]  # before any work
        every = windows = read_windows(model, row_ids(model.tokenizer, rows))
        next_WS = np.full_like(windows.token_WS, PAD)
        ask_WS = np.zeros(windows.token_WS.shape, bool)
        last_W = (windows.token_WS != PAD).sum(1) - 1
        here = np.arange(len(rows)), last_W
        ask_WS[here] = True
        next_WS[here] = [
            _answer(model, row, answer, int(last))
            for row, answer, last in zip(rows, answers, last_W, strict=True)
        ]
    found = EvalText(
        windows=windows,
        ask_WS=ask_WS,
        next_WS=next_WS,
        count_V=_counts(every.token_WS, model.cfg.d_vocab),
        prompts=rows is not None,
    )
    return found.take(len(windows.first(tokens).token_WS)) if found.prompts else found


def _answer(model: Model, row: PromptRow, answer: str, last: int) -> int:
    """The token after a prompt, or -1."""
    if not answer:
        return PAD
    ids = model.tokenizer.encode(prompt_text(model.tokenizer, row.prompt) + answer)
    return ids[last + 1] if len(ids) > last + 1 else PAD


def _counts(token_WS: np.ndarray, d_vocab: int) -> np.ndarray:
    return np.bincount(token_WS[token_WS != PAD], minlength=d_vocab)


def unsure(
    model_WS: np.ndarray, confidence_WS: np.ndarray, next_WS: np.ndarray
) -> np.ndarray:
    """Where the model is right and less than 80% sure (section 2.2), bool [W, S].

    Args:
      model_WS: the model's most probable next token.
      confidence_WS: its probability.
      next_WS: the true next token; -1 counts as not right.
    """
    return (model_WS == next_WS) & (confidence_WS < SURE)


def graph_filter(
    token_WS: np.ndarray,
    model_WS: np.ndarray,
    confidence_WS: np.ndarray,
    next_WS: np.ndarray,
    count_V: np.ndarray,
) -> np.ndarray:
    """Positions that make good prompts for graphs (appendix R), bool [W, S].

    The model is right with a confidence below 80% and a loss above 0.2, the target
    makes up less than 1e-4 of the text and is not among the tokens before it.

    Args:
      token_WS: windows.
      model_WS: the model's most probable next token.
      confidence_WS: its probability.
      next_WS: the true next token, or -1.
      count_V: occurrences of each token in the text.
    """
    good_WS = unsure(model_WS, confidence_WS, next_WS)
    good_WS &= -np.log(np.maximum(confidence_WS, 1e-30)) > LEAST_LOSS
    share_V = count_V / max(count_V.sum(), 1)
    good_WS &= share_V[np.maximum(next_WS, 0)] < RARE
    for w, s in zip(*np.nonzero(good_WS), strict=True):
        good_WS[w, s] = next_WS[w, s] not in token_WS[w, : s + 1]
    return good_WS


def pick_prompts(
    token_WS: np.ndarray,
    good_WS: np.ndarray,
    n: int,
    key: jax.Array,
    *,
    lengths: tuple[int, int],
) -> list[Sequence[int]]:
    """Prompts (token ids) that end at good positions, at most one of a window.

    Args:
      token_WS: windows.
      good_WS: positions at which a prompt may end.
      n: how many at most.
      key: draws windows and positions.
      lengths: fewest and most tokens of a prompt.
    """
    places = np.argwhere(good_WS)
    places = places[(places[:, 1] + 1 >= lengths[0]) & (places[:, 1] + 1 <= lengths[1])]
    places = places[np.asarray(jax.random.permutation(key, len(places)), int)]
    _, first = np.unique(places[:, 0], return_index=True)
    chosen = places[np.sort(first)[:n]]
    return [token_WS[w, : s + 1].tolist() for w, s in chosen]
