"""The verdict of a validation: sentences, each with the rule by which it is said.

A rule is a row of `RULES`: a name, when it holds, and what it says then. The names of
those that hold are ``levels`` of validation.json, their sentences its ``verdict``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxclt.validation.say import (
    BY,
    percent,
    show,
    shown_astray,
    shown_in_words,
    with_interval,
)

__all__ = ["RULES", "Rule", "verdict"]

Report = dict[str, Any]

GOOD, FAIR = 0.9, 0.7  # rank correlations of like with like
RIGHT = 0.95  # share of right signs that goes with a good one
WEAK = 0.4  # rank correlations below it say nothing of single features


class Rule(NamedTuple):
    """A sentence, and when it is said."""

    name: str
    when: Callable[[Report], bool]
    text: Callable[[Report], str]


def verdict(report: Report) -> tuple[list[str], str]:
    """Names of the rules that hold, in order, and their sentences as one paragraph."""
    held = [rule for rule in RULES if rule.when(report)]
    return [rule.name for rule in held], " ".join(rule.text(report) for rule in held)


def _level(line: dict[str, Any]) -> str:
    """good, fair or poor; none where nothing could be measured."""
    rank, sign = line["spearman"], line["sign"]
    if rank is None or sign is None:
        return "none"
    if rank >= GOOD and sign >= RIGHT:
        return "good"
    return "fair" if rank >= FAIR else "poor"


def _of_level(line: str, level: str, text: str) -> Rule:
    """What is said of one of the lines where it reaches a level."""

    def say(report: Report) -> str:
        found = report[line]
        return text.format(
            rank=with_interval(found),
            sign=percent(found["sign"]),
            slope=show(found["slope"]),
            near=percent(found["within_2"]),
            by=BY[found["predicted_by"]],
        )

    return Rule(f"{line}_{level}", lambda report: _level(report[line]) == level, say)


_INSIDE = (
    "Inside the graph's assumptions (norms held) ablations do what its total effects "
    "say: Spearman {rank}, sign right for {sign}, slope {slope}"
)
_IN_MODEL = (
    "In the model (norms live) they follow {by} with Spearman {rank}, sign right for "
    "{sign}, slope {slope}, {near} within a factor of 2"
)


def _on_contrast(report: Report) -> bool:
    return report["held"]["on"] == "contrast"


def _times(slope: float) -> str:
    return f"{1 / slope:.0f}" if slope < 0.2 else f"{1 / slope:.1f}"


def _shrinks(report: Report) -> bool:
    """Whether norms take back what total effects say, though these hold inside."""
    held = report["held"]["targets"]["slope"]
    value = report["live"]["value"]["slope_on_targets"]
    return held is not None and value is not None and 0 < value < 0.6 * held


def _is_last_norm(report: Report) -> bool:
    """Whether the last norm to first order brings the slope (in logs) half way back."""
    value, last = (
        report["live"][x]["slope_on_targets"] for x in ("value", "last_norm")
    )
    return last is not None and last > 0 and abs(np.log(last)) < -np.log(value) / 2


def _smaller(report: Report) -> str:
    slope = report["live"]["value"]["slope_on_targets"]
    return (
        f"Effects on the logits are {_times(slope)} times smaller in the model than "
        "the graph says"
    )


def _better(name: str, than: str) -> Callable[[Report], bool]:
    """Whether one prediction of the live line ranks clearly better than another."""

    def when(report: Report) -> bool:
        line = report["live"]
        by = line["predicted_by"]
        one, other = ((line if x == by else line[x])["spearman"] for x in (name, than))
        return one is not None and other is not None and one > other + 0.1

    return when


def _weak(rank: float | None) -> bool:
    return rank is not None and rank < WEAK


def _beaten(report: Report) -> list[str]:
    found = report["influence_vs_kl"]
    own = found["influence"] or 0
    return [x for x in ("activation", "direct") if (found[x] or 0) > own]


def _influence(report: Report) -> str:
    found = report["influence_vs_kl"]
    return (
        "Influence ranks how much an ablation matters with Spearman "
        f"{show(found['influence'])}"
    )


def _tokens(report: Report, *, least: float) -> bool:
    """Whether shares of tokens rank their effects, massive positions aside."""
    found = report.get("tokens", {}).get("without_massive")
    return found is not None and found >= least


def _shares(report: Report) -> str:
    found = report["tokens"]
    said = (
        "The graph's shares of the prompt's tokens rank what the model loses without "
        f"them with Spearman {show(found['spearman'])}"
    )
    if not found["massive"]:
        return f"{said}."
    at = ", ".join(map(str, found["massive"]))
    return f"{said} ({show(found['without_massive'])} without position {at})."


def _keeps_direction(report: Report) -> str:
    """The replacement model of the graph, then the same with live norms, gates live and
    held."""
    spread = report["faithfulness"]["encoder"]["next_layer"]
    low, high = spread["interval"]
    said = (
        "A perturbation keeps its direction one layer on with cosine "
        f"{show(spread['mean'])} [{show(low)}, {show(high)}]"
    )
    return f"{said} (the paper reports about 0.8)"


def _gates_turn(report: Report) -> bool:
    """Whether held gates bring back what a perturbation loses one layer on."""
    live, held = (
        report["faithfulness"].get(f"encoder_{x}", {}).get("next_layer", {}).get("mean")
        for x in ("live", "held")
    )
    return live is not None and held is not None and held > live + 0.1


def _gates(report: Report) -> str:
    live, held = (report["faithfulness"][f"encoder_{x}"] for x in ("live", "held"))
    flipped = live["flipped"]["mean"]
    flips = "" if flipped is None else f"{show(flipped, 1)} features flip on the way: "
    return (
        f"{flips}with gates held it is {show(held['next_layer']['mean'])}, with gates "
        f"live {show(live['next_layer']['mean'])} (norms live in both)"
    )


def _live_patterns(report: Report) -> str:
    found = report["patterns_live"]
    small, full, start = found.get("small"), found["full"], ""
    if small is not None:
        start = (
            f"small changes follow {BY[small['predicted_by']]} with Spearman "
            f"{with_interval(small)}, "
        )
    others = (
        f"{BY[name]} {show(full[name]['spearman'])}" for name in BY if name in full
    )
    return (
        f"With patterns live too, {start}ablations follow {BY['finite']} with "
        f"{with_interval(full)} ({'; '.join(others)})."
    )


RULES: tuple[Rule, ...] = (
    Rule(
        "shown",
        lambda report: (
            report["shown"]["sufficiency"] is not None and not shown_astray(report)
        ),
        shown_in_words,
    ),
    Rule("shown_astray", shown_astray, shown_in_words),
    Rule(
        "shown_none",
        lambda report: report["shown"]["sufficiency"] is None,
        lambda report: (
            f"No feature changes {report['contrast']} together with the others, or "
            "the model diverges without them: nothing is said of the shown graph."
        ),
    ),
    Rule(
        "sure_answer",
        lambda report: report["options"]["foil"] is None and _on_contrast(report),
        lambda report: (
            f"The answer is all but certain (p {report['probability']:.3f}) and its "
            f"probability cannot move much: effects are of {report['contrast']}."
        ),
    ),
    Rule(
        "foil",
        lambda report: report["options"]["foil"] is not None,
        lambda report: f"Effects are of {report['contrast']}, as asked.",
    ),
    _of_level(
        "held", "good", f"{_INSIDE}: its signs and ranks can be relied on there."
    ),
    _of_level("held", "fair", f"{_INSIDE}: its signs can be relied on, ranks roughly."),
    _of_level("held", "poor", f"{_INSIDE}: even there, do not rely on single nodes."),
    _of_level(
        "held", "none", "Inside the graph's assumptions nothing could be measured."
    ),
    _of_level("live", "good", f"{_IN_MODEL}: ask it (`jaxclt patch`), and believe it."),
    _of_level("live", "fair", f"{_IN_MODEL}: patch before you claim a single feature."),
    _of_level(
        "live", "poor", f"{_IN_MODEL}: only a patch says what a feature does here."
    ),
    _of_level("live", "none", "In the model nothing could be measured."),
    Rule(
        "last_norm_takes_back",
        lambda report: _shrinks(report) and _is_last_norm(report),
        lambda report: (
            f"{_smaller(report)}: the last norm, which the graph holds, takes the rest "
            "back (to first order it explains a slope of "
            f"{show(report['live']['last_norm']['slope_on_targets'])})."
        ),
    ),
    Rule(
        "norms_take_back",
        lambda report: _shrinks(report) and not _is_last_norm(report),
        lambda report: (
            f"{_smaller(report)}, as norms answer, which the graph holds; the last one "
            "alone does not explain it."
        ),
    ),
    Rule(
        "value_misleads",
        _better("local", "value"),
        lambda report: (
            "Total effects alone rank them with "
            f"{with_interval(report['live']['value'])} there."
        ),
    ),
    Rule(
        "derivative_leads",
        _better("derivative", "local"),
        lambda report: (
            f"{BY['derivative'].capitalize()} ranks them better, "
            f"{with_interval(report['live']['derivative'])}: go by it."
        ),
    ),
    Rule(
        "random_weak",
        lambda report: _weak(report["live"]["random"]["spearman"]),
        lambda report: (
            "Random features are ranked with "
            f"{show(report['live']['random']['spearman'])}: read nothing into weak "
            "nodes."
        ),
    ),
    Rule(
        "first_position",
        lambda report: "first_position" in report,
        lambda report: (
            f"{report['first_position']['n']} features at massive positions "
            f"({', '.join(map(str, report['first_position']['positions']))}) are left "
            "out: Spearman "
            f"{show(report['first_position']['live']['spearman'])} in the model."
        ),
    ),
    Rule("patterns_live", lambda report: True, _live_patterns),
    Rule("tokens", lambda report: _tokens(report, least=FAIR), _shares),
    Rule(
        "tokens_misled",
        lambda report: "tokens" in report and not _tokens(report, least=FAIR),
        lambda report: (
            f"{_shares(report)} Go by what the model loses without a token, not by the "
            "graph's share."
        ),
    ),
    Rule(
        "influence_leads",
        lambda report: not _beaten(report),
        lambda report: (
            f"{_influence(report)} (activation "
            f"{show(report['influence_vs_kl']['activation'])}, direct edge "
            f"{show(report['influence_vs_kl']['direct'])})."
        ),
    ),
    Rule(
        "influence_beaten",
        lambda report: bool(_beaten(report)),
        lambda report: (
            f"{_influence(report)}, less than {' and '.join(_beaten(report))}: do not "
            "rank features by influence alone here."
        ),
    ),
    Rule(
        "pairwise",
        lambda report: report["pairwise"]["spearman"] is not None,
        lambda report: (
            "Influence between features and what moves what: Spearman "
            f"{show(report['pairwise']['spearman'])} (the paper reports 0.72)."
        ),
    ),
    Rule(
        "pairwise_none",
        lambda report: report["pairwise"]["spearman"] is None,
        lambda report: "Influence between features could not be compared.",
    ),
    Rule(
        "perturbations",
        lambda report: (
            report["faithfulness"]["encoder"]["next_layer"]["mean"] is not None
            and not _gates_turn(report)
        ),
        lambda report: f"{_keeps_direction(report)}.",
    ),
    Rule(
        "gates_turn_perturbations",
        _gates_turn,
        lambda report: f"{_keeps_direction(report)}; {_gates(report)}.",
    ),
    Rule(
        "diverged",
        lambda report: report["diverged"] > 0,
        lambda report: (
            f"{report['diverged']} of {report['patches']} patches diverged (their "
            "numbers left the range that can be held); they are counted here and "
            "ranked nowhere."
        ),
    ),
)
