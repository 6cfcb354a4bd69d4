"""What was to be expected of a patch, beside what it did (maths 16.13).

Three predictions of each target's logit: the graph's total effects, with norms, gates
and patterns held; the model's own derivative, everything live, to first order; the
local replacement model, patched likewise, with its gates held and norms and patterns as
in the patch. The last one shares the patch's assumptions, and is what it is judged by.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxclt.files.json_text import number
from jaxclt.graph.contrast import contrast
from jaxclt.graph.graph import Graph
from jaxclt.graph.group_effects import group_effects
from jaxclt.patching.change import batched
from jaxclt.patching.effects import diverged
from jaxclt.patching.plan import Patch

__all__ = ["RULE", "as_predicted", "predictions", "told"]

LITTLE = 0.1  # logits
RULE = (
    "as predicted: within a factor of 2 of the local replacement model's prediction, "
    f"or {LITTLE} logits from it"
)


def as_predicted(predicted: float, measured: float) -> str | None:
    """Why a measured effect is not the predicted one; None if it is, see `RULE`."""
    size, real = abs(predicted), abs(measured)
    if abs(measured - predicted) <= max(LITTLE, max(size, real) / 2):
        return None
    if predicted * measured < 0:
        return "it goes the other way"
    return "less than half of it" if real < size else "more than twice as much"


def predictions(patch: Patch, measured_K: np.ndarray) -> list[dict[str, Any]]:
    """Predicted beside measured changes of the logits of a patch's targets.

    Args:
      patch: not one that only heads see, which nothing predicts.
      measured_K: changes of demeaned logits of `Subject.answers`; nan: it diverged.

    Returns:
      ``{token, graph, derivative, replacement, measured, as_predicted, why}`` of each
      target and, where the graph contrasts two, of their difference; None for what is
      not known.
    """
    subject = patch.subject
    by = {"replacement": _replacement(patch, len(measured_K))}
    if subject.traced is not None:
        by = {**_by_graph(subject.traced, patch, subject.targets), **by}
    by["measured"] = np.asarray(measured_K, np.float64)
    names = list(subject.answers[1])
    if subject.traced is not None and subject.contrast_K.min() < 0:
        names.append(contrast(subject.traced).text)
        by = {k: np.append(x_K, subject.contrast_K @ x_K) for k, x_K in by.items()}
    return [
        _judged(name, {key: number(x_K[k]) for key, x_K in by.items()})
        for k, name in enumerate(names)
    ]


def _judged(name: str, found: dict[str, float | None]) -> dict[str, Any]:
    row = {"token": name, "graph": None, "derivative": None, **found}
    said, measured = found["replacement"], found["measured"]
    if said is None or measured is None:
        return {**row, "as_predicted": None, "why": "there is no answer"}
    why = as_predicted(said, measured)
    return {**row, "as_predicted": why is None, "why": why}


def _replacement(patch: Patch, n_targets: int) -> np.ndarray:
    """Changes in the local replacement model, [K]."""
    subject, now = patch.subject, patch.now
    how = dataclasses.replace(patch.how, mode="iterative", gates="frozen")
    whole = int(now.features.layer_E.min()), subject.model.cfg.n_layers - 1
    # Next to the patch stands one that changes nothing: the clean answer.
    clean = dataclasses.replace(
        now, factor_E=np.ones_like(now.factor_E), offset_E=np.zeros_like(now.offset_E)
    )
    both = jax.tree.map(lambda *x: np.concatenate(x), now, clean)
    sizes = [len(now.factor_E)] * 2
    done = subject.effects(batched(both, sizes), [whole] * 2, how, subject.ask())
    if diverged(done)[0]:
        return np.full(n_targets, np.nan)
    logit_2K = np.asarray(done.logit_K, np.float64)
    return logit_2K[0] - logit_2K[1]


def _by_graph(graph: Graph, patch: Patch, targets: np.ndarray) -> dict[str, np.ndarray]:
    """Predictions of a graph that has all that is changed for nodes, [K] each."""
    node_E3, now = patch.now.node_E3, patch.now
    place_A3 = np.stack([graph.layer_A, graph.pos_A, graph.feature_A], 1)
    slot = {tuple(place): a for a, place in enumerate(place_A3.tolist())}
    found = [slot.get(tuple(place)) for place in node_E3.tolist()]
    if any(a is None or graph.value_A[a] == 0 for a in found):
        return {}
    node_E, amount_E = (
        np.array(found, int),
        np.asarray(now.amounts(now.features.value_E), np.float64),
    )
    (change_K,) = group_effects(graph, [node_E], amounts=[amount_E])
    by = {"graph": change_K[targets]}
    if graph.derivative_KN is not None:
        unit_KE = graph.derivative_KN[:, node_E] / graph.value_A[node_E]
        by["derivative"] = (unit_KE.astype(np.float64) @ amount_E)[targets]
    return by


def told(row: dict[str, Any]) -> str:
    """One target's judgement in words."""
    if row["as_predicted"]:
        return "as predicted"
    return f"not as predicted: {row['why']}"
