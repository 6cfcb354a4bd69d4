"""The sentences of a story, each said by a rule of its own (maths 23.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxclt.graph.agreement import spearman
from jaxclt.graph.nodes import quoted
from jaxclt.patching.predicted import as_predicted

if TYPE_CHECKING:
    from jaxclt.story.tell import Story

__all__ = ["RULES", "sentences", "trust"]

Facts = dict[str, Any]
LITTLE = 0.05  # share of the lead below which an effect is not told
LOUD = 0.2  # share of influence that is worth a sentence


def sentences(told: Story, facts: Facts) -> tuple[str, ...]:
    """What holds of a graph, in order."""
    found = (rule(told, facts) for rule in RULES)
    return tuple(text for text in found if text)


def _answer(told: Story, facts: Facts) -> str:
    answer, foil = map(quoted, facts["names"])
    sure = facts["probability"]
    chance = f" (p {sure:.2f})" if np.isfinite(sure) else ""
    return f"The model answers {answer}{chance}, {told.lead:.1f} logits above {foil}."


def _tokens(told: Story, facts: Facts) -> str:
    """The tokens that matter most, at most three."""
    del facts
    ranked = sorted(told.tokens, key=lambda token: -abs(token.effect))[:3]
    found = [x for x in ranked if abs(x.effect) > LITTLE * abs(told.lead)]
    if not found:
        return ""
    parts = [f"{quoted(x.token)} {_change(x.effect)}" for x in found]
    return f"Without one of its tokens the lead changes most for {_and(parts)}."


def _groups(told: Story, facts: Facts) -> str:
    """Groups whose ablation moves the lead, at most four, the largest first."""
    del facts
    done = [g for g in told.groups if g.measured is not None]
    ranked = sorted(done, key=lambda group: -abs(group.measured or 0))[:4]
    found = [g for g in ranked if abs(g.measured or 0) > LITTLE * abs(told.lead)]
    if not found:
        return ""
    parts = [
        f"{group.name} ({_count(len(group.nodes))}) {_change(group.measured or 0)}"
        + ("" if group.predicted is None else f", predicted {_change(group.predicted)}")
        for group in found
    ]
    return f"Ablating groups of features changes it: {'; '.join(parts)}."


def _silent(told: Story, facts: Facts) -> str:
    """Said where no group of features moves the lead."""
    del facts
    moved = [abs(g.measured) for g in told.groups if g.measured is not None]
    if not moved or max(moved) > LITTLE * abs(told.lead):
        return ""
    return (
        "Ablating any one of the largest groups of features moves the lead by at most "
        f"{max(moved):.2f}: many small ones share the work, or errors do it."
    )


def _sink(told: Story, facts: Facts) -> str:
    del facts
    positions, share = told.sink["positions"], told.sink["share"] or 0
    if not positions or share < LOUD:
        return ""
    effects = [abs(x.effect) for x in told.tokens if x.position in positions]
    measured = f"; without it the lead changes by {max(effects):.2f}" if effects else ""
    where = ", ".join(map(str, positions))
    return (
        f"{share:.0%} of the influence that the graph traces to tokens is of position "
        f"{where}, on which heads rest (massive activations){measured}."
    )


def _disagree(told: Story, facts: Facts) -> str:
    """Said where the graph's shares rank the tokens otherwise than measurements do."""
    del facts
    if len(told.tokens) < 4:
        return ""
    share = np.array([x.share or 0.0 for x in told.tokens])
    effect = np.abs([x.effect for x in told.tokens])
    rank = spearman(share, effect)
    if not np.isfinite(rank) or rank > 0.5:
        return ""
    return (
        "Read tokens by the measured effects: the graph's shares of influence rank "
        f"them otherwise (Spearman {rank:.2f})."
    )


def _unexplained(told: Story, facts: Facts) -> str:
    del told
    replacement = facts["scores"].replacement
    return (
        f"{1 - replacement:.0%} of the influence on the answer comes from errors, "
        "which no feature explains."
    )


RULES: Sequence[Callable[[Any, Facts], str]] = (
    _answer,
    _tokens,
    _groups,
    _silent,
    _sink,
    _disagree,
    _unexplained,
)


def trust(told: Story, facts: Facts) -> str:
    """How far the groups' effects went as predicted."""
    del facts
    done = [
        as_predicted(g.predicted, g.measured) is None
        for g in told.groups
        if g.predicted is not None and g.measured is not None
    ]
    if not done:
        return "No group of features could be ablated: nothing here is tested."
    return (
        f"{sum(done)} of {len(done)} ablated groups went as the local replacement "
        "model predicted (within a factor of 2, or 0.1 logits); `jaxclt validate` "
        "tests single features."
    )


def _change(x: float) -> str:
    return f"{x:+.1f}" if abs(x) >= 0.95 else f"{x:+.2f}"


def _count(n: int) -> str:
    return f"{n} feature" + "s" * (n != 1)


def _and(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
