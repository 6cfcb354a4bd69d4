"""The finite form of the response: ablations where attention and norms answer.

A graph by response is a first derivative. A whole ablation moves scores and norm
denominators further than that holds. Here each feature is changed in the local
replacement model with attention patterns and norms live and everything else of it as
graphs have it: gates held, error nodes constant, other features encoded again, nodes or
not (maths 22.70).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxclt.errors import InputError
from jaxclt.patching.change import Change, batched
from jaxclt.patching.effects import clean_effect, diverged
from jaxclt.patching.how import How, Part
from jaxclt.patching.subject import Subject

__all__ = ["FINITE", "FiniteEffects", "finite_effects"]

FINITE = How(mode="iterative", patterns="live", norms="live", gates="frozen")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FiniteEffects:
    """By how much each of B patches would change the answer; nan where it diverged."""

    change_BK: np.ndarray  # the targets that are tokens, demeaned logits
    contrast_B: np.ndarray  # see `Subject.contrast_K`


def finite_effects(
    subject: Subject,
    nodes: Sequence[int] | np.ndarray,
    *,
    factor: float = 0.0,
    gates: Part = "frozen",
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> FiniteEffects:
    """Change features one at a time where attention patterns and norms are live.

    Args:
      subject: the traced prompt.
      nodes: features by their slots in the graph.
      factor: on the activation; 0 ablates.
      gates: whether other features' are held. Those of neurons are smooth; live, with
        all neurons, this is the model itself.
      on_done: progress, (features done, features planned).

    Raises:
      InputError: for no feature, or one that the graph does not have.
    """
    node_B, A = np.asarray(nodes, int), subject.graph.n_features
    if not len(node_B) or node_B.min() < 0 or node_B.max() >= A:
        raise InputError(f"nodes: give features of the graph, 0 to {A - 1}")
    change = Change.of(subject.watch(node_B), factor)
    done = subject.effects(
        batched(change, [1] * len(node_B)),
        [(0, subject.model.cfg.n_layers - 1)] * len(node_B),
        dataclasses.replace(FINITE, gates=gates),
        subject.ask(),
        on_done=on_done,
    )
    clean = clean_effect(subject.patchable, subject.ask())
    change_BK = np.asarray(done.logit_K, float) - np.asarray(clean.logit_K, float)
    change_BK[diverged(done)] = np.nan
    return FiniteEffects(change_BK=change_BK, contrast_B=change_BK @ subject.contrast_K)
