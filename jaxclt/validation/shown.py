"""Necessity and sufficiency of the shown graph (maths 16.14).

With m the logit of the answer minus that of the foil, C the features that the pruned
graph shows, and all other features of the prompt the rest:

    sufficiency = (m(keep only C) - m(none)) / (m(all) - m(none))
    necessity   = (m(all) - m(drop only C)) / (m(all) - m(none))

What is not kept is held at a reference: zero, or a counterfactual prompt's values.
Error nodes, embeddings and attention patterns are kept in all of them, so that m(none)
is what these reach without any feature. Twice: ``clamped``, the graph's own linear
claim (features stay as recorded, norms held), where necessity and sufficiency are one
number, and ``live``, the local replacement model, in which features and norms respond.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from jaxclt.errors import InputError
from jaxclt.files.json_text import rounded
from jaxclt.patching.batch import in_chunks
from jaxclt.patching.circuit import held_chunk
from jaxclt.patching.effects import Ask, diverged
from jaxclt.patching.how import How
from jaxclt.patching.subject import Subject
from jaxclt.validation.stats import mean_of

__all__ = ["HOWS", "Measure", "check_reference", "held_leads", "shown"]

HOWS = {
    "clamped": How(mode="constrained", norms="frozen"),
    "live": How(mode="iterative", gates="live"),
}
N_RANDOM = 10  # sets of as many features
CHUNK = 8  # passes of one program
SMALL = 1e-6  # of m: what features do below it is nothing to have a share of


class Measure(NamedTuple):
    """What m is: tokens at the last position, and their weights in it."""

    ask: Ask
    weight_K: np.ndarray


def shown(
    subject: Subject,
    measure: Measure,
    key: Array,
    *,
    reference: Subject | None = None,
    n_random: int = N_RANDOM,
) -> dict[str, Any]:
    """How much of the answer's lead the shown features make, alone and as a loss.

    Args:
      subject: a traced prompt.
      measure: m, of the answer and its foil.
      key: of the random sets.
      reference: a counterfactual prompt of as many tokens; None holds at zero.
      n_random: sets of equally many active features to compare with.

    Returns:
      ``necessity`` and ``sufficiency`` of the live semantics, None where features do
      nothing or a pass diverged; ``clamped`` and ``live``, each with these, the four
      m's, and ``random``, means with intervals over the random sets; ``intervals``,
      None of both: of a single prompt there is none; ``n`` features and ``n_active``.

    Raises:
      InputError: if the reference has another number of tokens or other features.
    """
    local, graph = subject.local, subject.graph
    clean_LTU = np.asarray(local.tables.clean_LTU)
    place_N3 = _places(subject)
    mine_LTU = np.zeros(clean_LTU.shape, bool)
    mine_LTU[tuple(place_N3.T)] = True
    active_A3 = np.argwhere(clean_LTU != 0)
    n = min(int(graph.pruning.keep_N[graph.feature_cols].sum()), len(active_A3))
    sets = [mine_LTU]
    for one in jax.random.split(key, n_random):
        drawn = np.asarray(jax.random.permutation(one, len(active_A3)))[:n]
        sets.append(np.zeros_like(mine_LTU))
        sets[-1][tuple(active_A3[drawn].T)] = True
    every = np.ones_like(mine_LTU)
    held = [~every, every, *(~x for x in sets), *sets]
    value_LTU = _reference(subject, reference)
    out: dict[str, Any] = {
        "n": n,
        "n_active": len(active_A3),
        "reference": "zero" if reference is None else "counterfactual prompt",
        "errors": "kept",
    }
    for name, how in HOWS.items():
        m_B = held_leads(subject, measure, np.stack(held), value_LTU, how)
        out[name] = _section(m_B, key)
    live = out["live"]
    return {
        "necessity": live["necessity"],
        "sufficiency": live["sufficiency"],
        "intervals": {"necessity": None, "sufficiency": None},
        **out,
    }


def _section(m_B: np.ndarray, key: Array) -> dict[str, Any]:
    """Shares of one semantics, from m of all, none, and sets kept and dropped."""
    whole, none = m_B[:2]
    keep_C, drop_C = m_B[2:].reshape(2, -1)
    made = whole - none
    if not abs(made) > SMALL * max(1.0, abs(whole)):
        made = np.nan
    shares = {
        "necessity": (whole - drop_C) / made,
        "sufficiency": (keep_C - none) / made,
    }
    random = {name: mean_of(share_C[1:], key) for name, share_C in shares.items()}
    return {
        **{name: rounded(float(share_C[0])) for name, share_C in shares.items()},
        "m": {
            "all": rounded(float(whole)),
            "none": rounded(float(none)),
            "keep": rounded(float(keep_C[0])),
            "drop": rounded(float(drop_C[0])),
        },
        "random": random,
    }


def held_leads(
    subject: Subject,
    measure: Measure,
    held_BLTU: np.ndarray,
    value_LTU: np.ndarray,
    how: How,
    *,
    together: bool = False,
    chunk: int = CHUNK,
) -> np.ndarray:
    """m [B] of passes in which some features are held; nan where one diverged.

    Args:
      subject: a recorded prompt.
      measure: m.
      held_BLTU: which features, of the local replacement model's tables.
      value_LTU: at which values.
      how: see `held_chunk`.
      together: passes of a chunk run side by side.
      chunk: passes of one program.
    """
    model, tables = subject.patchable, subject.local.tables

    def call(part: Array) -> Any:
        how_ = how.of(model.coder)
        values = tables, part, value_LTU, measure.ask
        return held_chunk(model, *values, how=how_, together=together)

    done = in_chunks(call, held_BLTU, np.arange(len(held_BLTU)), chunk)
    m_B = np.asarray(done.logit_K, np.float64) @ measure.weight_K
    return np.where(diverged(done), np.nan, m_B)


def _places(subject: Subject) -> np.ndarray:
    """(layer, position, slot in the tables) of the shown features."""
    graph, slots = subject.graph, subject.local.feature_LU
    at = np.flatnonzero(graph.pruning.keep_N[graph.feature_cols])
    rows = [graph.feature(int(a)) for a in at]
    return np.array(
        [(l, t, np.searchsorted(slots[l], f)) for l, t, f in rows], int
    ).reshape(-1, 3)


def _reference(subject: Subject, other: Subject | None) -> np.ndarray:
    clean_LTU = np.asarray(subject.local.tables.clean_LTU)
    if other is None:
        return np.zeros_like(clean_LTU)
    check_reference(subject, other)
    return np.asarray(other.local.tables.clean_LTU)


def check_reference(subject: Subject, other: Subject) -> None:
    """Raise InputError unless a prompt's features are those of the traced one."""
    if other.n_tokens != subject.n_tokens:
        raise InputError(
            f"the counterfactual prompt has {other.n_tokens} tokens, the traced one "
            f"{subject.n_tokens}: give one of as many"
        )
    pairs = zip(subject.local.feature_LU, other.local.feature_LU, strict=True)
    if not all(np.array_equal(*pair) for pair in pairs):
        raise InputError(
            "the dictionary is so large that other features are held for the "
            "counterfactual prompt: leave --counterfactual out"
        )
