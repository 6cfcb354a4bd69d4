"""How much of what features do changes from a counterfactual prompt (maths 23.5).

What is always on (syntax, a first token on which heads rest) does the same on both
prompts and steps back.
"""

from __future__ import annotations

import numpy as np

from jaxclt.clt.active import Active, active_features
from jaxclt.clt.coder import Dictionary
from jaxclt.errors import InputError
from jaxclt.graph.compute import memory_budget
from jaxclt.graph.config import AttributeConfig
from jaxclt.graph.graph import Graph
from jaxclt.io.model import Model
from jaxclt.text.prompts import Prompt
from jaxclt.trace.record import prompt_tokens, record_text

__all__ = ["aligned", "change_from", "check_counterfactual"]


def change_from(
    model: Model, dictionary: Dictionary, graph: Graph, prompt: Prompt
) -> np.ndarray:
    """Influence times the relative change of the activation, of each feature [A].

    Args:
      model: the graph was traced with.
      dictionary: the graph was traced with.
      graph: of a prompt.
      prompt: the counterfactual; of another length it is aligned, see `aligned`.

    Raises:
      InputError: if it is the traced prompt, or shares no token at either end with it
        and is of another length.
    """
    ids = prompt_tokens(model, prompt)
    there_T = aligned(graph.token_T.tolist(), ids)
    recording = record_text(model, ids, memory_budget(AttributeConfig()))
    other = active_features(dictionary, model.params, recording, model.cfg, len(ids))
    then_A = _values(other, graph, there_T)
    now_A = graph.value_A.astype(np.float64)
    size_A = np.maximum(np.abs(now_A), np.finfo(np.float64).tiny)
    return graph.influence_N[graph.feature_cols] * np.abs(now_A - then_A) / size_A


def check_counterfactual(model: Model, prompt: Prompt, other: Prompt) -> int:
    """Raise InputError unless two prompts can be aligned; tokens of the second more."""
    ids, there = prompt_tokens(model, prompt), prompt_tokens(model, other)
    aligned(list(ids), list(there))
    return len(there) - len(ids)


def aligned(token_T: list[int], other: list[int]) -> np.ndarray:
    """Where each token stands in the other prompt, [T]; -1 where it has no place.

    Prompts of equal length are aligned one to one, others by the tokens that they begin
    and end with alike.

    Raises:
      InputError: if the prompts are the same, or have nothing to be aligned by.
    """
    T, U = len(token_T), len(other)
    if token_T == other:
        raise InputError("--counterfactual: that is the traced prompt: change a word")
    if T == U:
        return np.arange(T)
    most = min(T, U)
    first = _alike(token_T[:most], other[:most])
    last = _alike(token_T[::-1][: most - first], other[::-1][: most - first])
    if first + last == 0:
        raise InputError(
            f"--counterfactual has {U} tokens, the prompt {T}, and they neither begin "
            "nor end alike: give one of as many tokens"
        )
    there_T = np.full(T, -1)
    there_T[:first] = np.arange(first)
    there_T[T - last :] = np.arange(U - last, U)
    return there_T


def _alike(one: list[int], other: list[int]) -> int:
    """How many tokens agree before the first that does not."""
    same = [a == b for a, b in zip(one, other, strict=True)]
    return same.index(False) if False in same else len(same)


def _values(other: Active, graph: Graph, there_T: np.ndarray) -> np.ndarray:
    """Activations of the graph's features in another prompt; 0 where not active."""
    places = zip(other.layer_A, other.pos_A, other.feature_A, strict=True)
    values = other.value_A.astype(float).tolist()
    found = dict(zip((tuple(map(int, at)) for at in places), values, strict=True))
    wanted = zip(graph.layer_A, there_T[graph.pos_A], graph.feature_A, strict=True)
    return np.array([found.get(tuple(map(int, at)), 0.0) for at in wanted])
