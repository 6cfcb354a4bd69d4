"""What a graph explains: targets as they are given become targets of a recording."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxclt.clt.coder import Dictionary
from jaxclt.errors import InputError
from jaxclt.graph.prompt import Prompt
from jaxclt.graph.targets import salient_targets, token_targets
from jaxclt.io.model import Model
from jaxclt.trace.target_text import read_targets
from jaxclt.types import LMParams, Recording, Targets

__all__ = ["TargetChoice", "choose_targets", "next_tokens", "targets_identity"]
__all__ += ["target_labels"]

# Texts (see `target_text`), or targets of `jaxclt.graph.targets`, or a function that
# makes them from the model and its recording of the prompt (not padded).
TargetChoice = str | Sequence[str] | Targets | Callable[[LMParams, Recording], Targets]


def choose_targets(
    choice: TargetChoice,
    model: Model,
    dictionary: Dictionary,
    recording: Recording,
    n_tokens: int,
) -> Targets:
    """Targets of a recorded prompt: its most probable next tokens if none are given.

    Args:
      choice: what is to be explained.
      model: tokenizer and weights.
      dictionary: where features are looked up.
      recording: the clean pass, maybe padded.
      n_tokens: length of the prompt.

    Raises:
      InputError: if texts cannot be read or do not fit, or a function returned anything
        else.
    """
    if callable(choice):
        choice = choice(model.params, recording)
        if not isinstance(choice, Targets):
            raise InputError("the function given as targets did not return Targets")
    if isinstance(choice, Targets):
        return choice
    if texts := _texts(choice):
        return read_targets(texts, model, dictionary, recording, n_tokens=n_tokens)
    return salient_targets(model.params, recording.out_TD[n_tokens - 1])


def targets_identity(choice: TargetChoice, targets: Targets) -> list[str] | str:
    """What tells targets apart: their texts, or a digest; empty if none are given."""
    if not isinstance(choice, Targets) and not callable(choice):
        return _texts(choice)
    total = hashlib.sha256(repr(targets.labels).encode())
    for leaf in jax.tree.leaves(targets):
        total.update(f"{leaf.dtype}{leaf.shape}".encode() + np.asarray(leaf).tobytes())
    return total.hexdigest()


def _texts(choice: str | Sequence[str]) -> list[str]:
    return [choice] if isinstance(choice, str) else list(choice)


def next_tokens(model: Model, p: Prompt) -> Targets:
    """The targets if all are next tokens, else the most probable next tokens."""
    chosen, last = p.targets, p.n_tokens - 1
    out_D = p.recording.out_TD[last]
    if ((chosen.token_K >= 0) & (chosen.pos_K == last)).all():
        return token_targets(model.params, out_D, jnp.asarray(chosen.token_K))
    return salient_targets(model.params, out_D)


def target_labels(model: Model, targets: Targets) -> tuple[str, ...]:
    """Token strings, and what other targets are called."""
    ids = [int(i) for i in targets.token_K]
    return tuple(
        label or (model.tokenizer.token_strings([i])[0] if i >= 0 else "target")
        for label, i in zip(targets.labels, ids, strict=True)
    )
