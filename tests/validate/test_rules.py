"""Every sentence of a verdict, on a report where it is said and on one where not."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from jaxclt.validation.rules import RULES, verdict


def line(spearman: float | None = 0.95, sign: float | None = 0.98, **more: Any):
    return {
        "spearman": spearman,
        "interval": [0.9, 0.97],
        "sign": sign,
        "slope": 0.9,
        "within_2": 0.8,
        "n": 60,
        **more,
    }


def spread(mean: float | None, flipped: float | None = None) -> dict[str, Any]:
    interval = [None, None] if mean is None else [mean - 0.1, mean + 0.1]
    return {
        "next_layer": {"mean": mean, "interval": interval, "n": 90},
        "flipped": {"mean": flipped},
    }


def shares(
    all_: float, later: float, massive: tuple[int, ...] = (0,)
) -> dict[str, Any]:
    return {"spearman": all_, "without_massive": later, "massive": list(massive)}


def report(**changes: Any) -> dict[str, Any]:
    """A report in which all is well; changes by dotted names."""
    live = line(predicted_by="local", random=line(), targets=line())
    for name in ("value", "derivative", "last_norm"):
        live[name] = line(slope_on_targets=0.9)
    made: dict[str, Any] = {
        "options": {"foil": None},
        "contrast": "logit( Paris) - logit( Rome)",
        "probability": 0.7,
        "held": line(predicted_by="value", on="targets", targets=line()),
        "live": live,
        "patterns_live": {
            "small": line(predicted_by="derivative"),
            "full": line(predicted_by="finite", value=line(0.4)),
        },
        "influence_vs_kl": {"influence": 0.8, "activation": 0.5, "direct": 0.6},
        "pairwise": {"spearman": 0.7},
        "faithfulness": {
            "encoder": spread(0.8),
            "encoder_live": spread(0.8, flipped=2.4),
            "encoder_held": spread(0.85),
        },
        "faithfulness_layers": [0],
        "diverged": 0,
        "shown": {
            "sufficiency": 0.79,
            "necessity": 0.98,
            "n": 47,
            "n_active": 305,
            "live": {
                "random": {"sufficiency": {"mean": 0.02}},
                "m": {"all": 8.58, "none": 1.83, "keep": 7.17, "drop": 1.93},
            },
        },
        "patches": 500,
    }
    for path, value in changes.items():
        *way, last = path.split("__")
        at = made
        for key in way:
            at = at[key]
        at[last] = value
    return made


APART = {"positions": [0], "n": 12, "live": line(0.1)}
SHRINKS = {"live__value__slope_on_targets": 0.09}
# By rule: a change with which it is said, what it then says, and one without.
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "shown": (
        {},
        "The 47 features shown (of 305), kept alone, make logit( Paris) - "
        "logit( Rome) 7.2 where it is 8.6; dropped alone, 1.9; without any feature it "
        "is 1.8 (sufficiency 79%, as many at random 2%; necessity 98%).",
        {"shown__sufficiency": 1.9},
    ),
    "shown_astray": (
        {"shown__live__m__none": 9.1},
        "without any feature it is 9.1: others work against them, do not read shares "
        "into it.",
        {},
    ),
    "shown_none": (
        {"shown__sufficiency": None},
        "nothing is said of the shown graph",
        {},
    ),
    "sure_answer": (
        {"held__on": "contrast", "probability": 0.999},
        "all but certain (p 0.999) and its probability cannot move much: effects are "
        "of logit( Paris) - logit( Rome).",
        {},
    ),
    "foil": ({"options__foil": 7}, "logit( Rome), as asked.", {}),
    "held_good": ({}, "ranks can be relied on", {"held__sign": 0.94}),
    "held_fair": ({"held__sign": 0.94}, "ranks roughly", {"held__spearman": 0.69}),
    "held_poor": ({"held__spearman": 0.69}, "do not rely on single", {}),
    "held_none": ({"held__spearman": None}, "assumptions nothing could be", {}),
    "live_good": ({}, "and believe it", {"live__spearman": 0.89}),
    "live_fair": ({"live__spearman": 0.89}, "patch before", {"live__spearman": 0.3}),
    "live_poor": ({"live__spearman": 0.3}, "only a patch says", {}),
    "live_none": ({"live__sign": None}, "In the model nothing could", {}),
    "last_norm_takes_back": (
        SHRINKS,
        "Effects on the logits are 11 times smaller in the model than the graph says: "
        "the last norm, which the graph holds, takes the rest back",
        SHRINKS | {"live__last_norm__slope_on_targets": 0.1},
    ),
    "norms_take_back": (
        SHRINKS | {"live__last_norm__slope_on_targets": 0.1},
        "Effects on the logits are 11 times smaller in the model than the graph says, "
        "as norms answer",
        SHRINKS,
    ),
    "value_misleads": (
        {"live__value__spearman": 0.5},
        "Total effects alone rank them with 0.50",
        {"live__value__spearman": 0.9},
    ),
    "derivative_leads": (
        {"live__spearman": 0.8},
        "The model's own derivative ranks them better, 0.95",
        {"live__spearman": 0.9},
    ),
    "random_weak": (
        {"live__random__spearman": 0.39},
        "read nothing into weak nodes",
        {"live__random__spearman": 0.41},
    ),
    "first_position": (
        {"first_position": APART},
        "12 features at massive positions (0) are left out: Spearman 0.10",
        {},
    ),
    "tokens": (
        {"tokens": shares(0.5, 0.8)},
        "rank what the model loses without them with Spearman 0.50 (0.80 without "
        "position 0).",
        {"tokens": shares(0.8, 0.5)},
    ),
    "tokens_misled": (
        {"tokens": shares(0.5, 0.6, massive=())},
        "with Spearman 0.50. Go by what the model loses",
        {},
    ),
    "influence_leads": ({}, "(activation 0.50", {"influence_vs_kl__direct": 0.9}),
    "influence_beaten": ({"influence_vs_kl__direct": 0.9}, "less than direct: do", {}),
    "pairwise": ({}, "moves what: Spearman 0.70", {"pairwise__spearman": None}),
    "pairwise_none": ({"pairwise__spearman": None}, "could not be compared", {}),
    "perturbations": (
        {},
        "one layer on with cosine 0.80 [0.70, 0.90] (the paper reports about 0.8).",
        {"faithfulness__encoder": spread(None)},
    ),
    "gates_turn_perturbations": (
        {"faithfulness__encoder_held": spread(0.95)},
        "about 0.8); 2.4 features flip on the way: with gates held it is 0.95, with "
        "gates live 0.80",
        {},
    ),
    "diverged": ({"diverged": 3}, "3 of 500 patches diverged", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_sentence_is_said_where_it_holds_and_nowhere_else(name: str):
    there, text, elsewhere = CASES[name]
    levels, said = verdict(report(**copy.deepcopy(there)))
    assert name in levels
    assert text in said
    levels, said = verdict(report(**copy.deepcopy(elsewhere)))
    assert name not in levels
    assert text not in said


def test_every_rule_has_a_case():
    always = {"patterns_live"}  # the third line, whatever it says
    assert {rule.name for rule in RULES} == set(CASES) | always
    levels, said = verdict(report())
    assert "patterns_live" in levels
    assert "small changes follow the model's own derivative" in said
    bare = report()
    del bare["patterns_live"]["small"]
    assert "small changes" not in verdict(bare)[1]


def test_no_random_features_are_not_called_weak():
    levels, _ = verdict(report(live__random=line(None, None)))
    assert "random_weak" not in levels


def test_one_level_of_each_line():
    for changes in ({}, {"held__spearman": 0.5}, {"live__spearman": None}):
        levels, _ = verdict(report(**changes))
        for kind in ("held", "live"):
            among = {f"{kind}_{x}" for x in ("good", "fair", "poor", "none")}
            assert len(among & set(levels)) == 1


def test_nothing_is_smaller_where_the_graph_is_wrong_inside_too():
    """A slope far from 1 with norms held is not the norms' doing."""
    changes = SHRINKS | {"held__targets__slope": 0.1}
    levels, _ = verdict(report(**changes))
    assert not {"last_norm_takes_back", "norms_take_back"} & set(levels)
