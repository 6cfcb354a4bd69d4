"""What features are set to: zero, means of a text, or a counterfactual prompt's values.

Maths 24.1.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxclt.errors import InputError
from jaxclt.patching.local import values_on
from jaxclt.patching.subject import Subject
from jaxclt.story.change import aligned
from jaxclt.text.windows import TokenWindows
from jaxclt.trace.record import record_prompt

__all__ = ["Ablate", "References", "mean_values", "references", "values_at"]

Ablate = Literal["zero", "mean", "counterfactual"]


class References(NamedTuple):
    """What features are set to, [L, T, U] of the tables of a prompt.

    Attributes:
      value_LTU: the reference.
      held_LTU: bool, which features are ever held: those that are active on the prompt.
        Silent ones answer by themselves, neurons that were not chosen are error.
      then_LTU: values on the counterfactual prompt, None without one.
    """

    value_LTU: np.ndarray
    held_LTU: np.ndarray
    then_LTU: np.ndarray | None


def references(
    subject: Subject, there: Subject | None, text: TokenWindows | None, ablate: Ablate
) -> References:
    """The reference of an ablation.

    Args:
      subject: the prompt.
      there: the counterfactual prompt, which ``counterfactual`` needs.
      text: whose means are taken, which ``mean`` needs.
      ablate: which reference.

    Raises:
      InputError: if what it needs is not there, or prompts cannot be aligned.
    """
    if ablate == "counterfactual" and there is None:
        raise InputError(
            '--ablate counterfactual needs a prompt: give --counterfactual "PROMPT"'
        )
    if ablate == "mean" and text is None:
        raise InputError("--ablate mean needs the text of the means: give --data FILE")
    clean_LTU = np.asarray(subject.local.tables.clean_LTU)
    held_LTU = clean_LTU != 0
    then_LTU = None if there is None else values_at(subject, there)
    if ablate == "counterfactual":
        assert then_LTU is not None
        return References(then_LTU, held_LTU, then_LTU)
    if ablate == "mean":
        assert text is not None
        return References(mean_values(subject, text), held_LTU, then_LTU)
    return References(np.zeros_like(clean_LTU), held_LTU, then_LTU)


def values_at(subject: Subject, other: Subject) -> np.ndarray:
    """What a prompt's features are on another prompt, [L, T, U].

    Args:
      subject: the prompt, whose tables say which features.
      other: the other one, of equal length or one that begins or ends alike; nothing
        is active at a token that has no place there.

    Raises:
      InputError: if the prompts are the same or cannot be aligned (`aligned`).
    """
    pair = (x.patchable.recording.token_T for x in (subject, other))
    there_T = aligned(*(np.asarray(token_T).tolist() for token_T in pair))
    value_LSU = np.asarray(values_on(other.patchable, subject.local.tables))
    has_1T1 = (there_T >= 0)[None, :, None]
    return value_LSU[:, there_T] * has_1T1


def mean_values(subject: Subject, windows: TokenWindows) -> np.ndarray:
    """Means [L, T, U] of a prompt's features over a text, the same at all positions."""
    model, tables = subject.model, subject.local.tables
    total_LU, n = np.zeros(()), 0
    for token_S, mask_S in zip(windows.token_WS, windows.mask_WS, strict=True):
        token_S = np.where(token_S < 0, 0, token_S)
        recording = record_prompt(
            model.params, jnp.asarray(token_S), model.cfg, keep_patterns=False
        )
        there = dataclasses.replace(subject.patchable, recording=recording)
        value_LSU = np.asarray(values_on(there, tables), np.float64)
        total_LU = total_LU + np.einsum("LSU,S->LU", value_LSU, mask_S.astype(float))
        n += int(mask_S.sum())
    dtype = subject.patchable.recording.mid_LTD.dtype
    mean_LU = (total_LU / n).astype(dtype)
    return np.repeat(mean_LU[:, None], subject.n_tokens, 1)
