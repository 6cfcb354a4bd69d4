"""A set measured: what each member adds, other sets of its size, other prompts.

Maths 24.6 and 24.7.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxclt.circuits.ablation import MEASURED, Stage, places_of
from jaxclt.circuits.rankings import BASELINES
from jaxclt.circuits.references import Ablate, references
from jaxclt.circuits.search import ALONE, Shares, top
from jaxclt.errors import InputError
from jaxclt.files.json_text import rounded
from jaxclt.patching.subject import Subject
from jaxclt.runs.kept import Answers
from jaxclt.tasks.form import Example
from jaxclt.text.windows import TokenWindows
from jaxclt.trace.target_text import read_token
from jaxclt.validation.shown import Measure
from jaxclt.validation.stats import mean_of

__all__ = ["Members", "beside", "members_of", "on_prompts"]

N_RANDOM = 10  # sets of as many features


class Members(NamedTuple):
    """The members of a set, what adds most first.

    Attributes:
      order: places among the members as candidates stand.
      sufficiency: what each adds to it.
      necessity: likewise.
      measured: bool, otherwise predicted to first order.
    """

    order: np.ndarray
    sufficiency: np.ndarray
    necessity: np.ndarray
    measured: np.ndarray


def members_of(stage: Stage, set_A: np.ndarray) -> Members:
    """What each member adds; measured of the `ALONE` that are predicted to add least.

    All of a small set, so that nobody has to believe a prediction of it.
    """
    at = np.flatnonzero(set_A)
    steps = stage.slopes(set_A)
    adds = Shares(*(np.nan_to_num(x[at]) for x in steps))
    asked = np.argsort(adds.sufficiency + adds.necessity, kind="stable")[:ALONE]
    without_BA = np.repeat(set_A[None], len(asked) + 1, 0)
    without_BA[np.arange(len(asked)), at[asked]] = False
    found = stage.measure(without_BA)
    for share_M, share_B in zip(adds, found, strict=True):
        share_M[asked] = share_B[-1] - share_B[:-1]
    order = np.argsort(-(adds.sufficiency + adds.necessity), kind="stable")
    measured = np.isin(np.arange(len(at)), asked)
    return Members(
        order, adds.sufficiency[order], adds.necessity[order], measured[order]
    )


def beside(
    stage: Stage, ranks: Mapping[str, np.ndarray], set_A: np.ndarray, key: jax.Array
) -> dict[str, Any]:
    """The set, others of its size by `BASELINES` and at random, and all candidates."""
    k, A = int(set_A.sum()), len(set_A)
    names = ["circuit", *BASELINES.values(), "all candidates"]
    sets = [set_A, *(top(ranks[name], k) for name in BASELINES), np.ones(A, bool)]
    for one in jax.random.split(key, N_RANDOM):
        sets.append(np.zeros(A, bool))
        sets[-1][np.asarray(jax.random.permutation(one, A))[:k]] = True
    keep_B, drop_B = stage.keep_and_drop(np.stack(sets))
    shares = stage.leads.shares(keep_B, drop_B)
    bad = stage.leads.astray
    found: dict[str, Any] = {}
    for b, name in enumerate(names):
        s, n = shares.at(b)
        found[name] = {
            "features": int(sets[b].sum()),
            "sufficiency": None if bad else rounded(s),
            "necessity": None if bad else rounded(n),
            "kept": rounded(float(keep_B[b])),
            "dropped": rounded(float(drop_B[b])),
        }
    first = len(names)
    random: dict[str, Any] = {"sets": N_RANDOM, "features": k}
    for name, x_B in zip(Shares._fields, shares, strict=True):
        said = mean_of(x_B[first:], key)
        random[name] = None if bad else said["mean"]
        random[f"{name}_interval"] = None if bad else said["interval"]
    for name, x_B in (("kept", keep_B), ("dropped", drop_B)):
        random[name] = mean_of(x_B[first:], key)["mean"]
    return found | {"random": random}


def on_prompts(
    stage: Stage,
    set_A: np.ndarray,
    examples: Sequence[Example],
    ablate: Ablate,
    text: TokenWindows | None,
    key: jax.Array,
) -> dict[str, Any] | None:
    """A set on other prompts, its features at the same positions; None without any.

    Args:
      stage: of the prompt that the set was found on.
      set_A: the set.
      examples: the prompts, of as many tokens.
      ablate: which reference; each prompt's own.
      text: whose means are taken, which ``mean`` needs.
      key: of the intervals.

    Raises:
      InputError: for a prompt of another length, or without what its ablation needs.
    """
    if not examples:
        return None
    place_A3 = _features(stage)[set_A]
    rows = [_on_prompt(stage, place_A3, x, ablate, text) for x in examples]
    found: dict[str, Any] = {"prompts": rows}
    for name in Shares._fields:
        said = mean_of(np.array([row[name] for row in rows], float), key)
        found[name], found[f"{name}_interval"] = said["mean"], said["interval"]
    return found | {"n": sum(row["sufficiency"] is not None for row in rows)}


def _on_prompt(
    stage: Stage,
    place_A3: np.ndarray,
    example: Example,
    ablate: Ablate,
    text: TokenWindows | None,
) -> dict[str, Any]:
    model, dictionary = stage.subject.model, stage.subject.dictionary
    one, there = Subject.of(model, dictionary, example.prompt), None
    if one.n_tokens != stage.subject.n_tokens:
        raise InputError(
            f"paraphrase {example.prompt!r} has {one.n_tokens} tokens, the prompt "
            f"{stage.subject.n_tokens}: give paraphrases of as many tokens"
        )
    if ablate == "counterfactual" and example.counterfactual:
        there = Subject.of(model, dictionary, example.counterfactual)
    what = references(one, there, text, ablate)
    pair = [read_token(model, x) for x in (example.answer, example.foil)]
    at_A3, known_A = places_of(one, place_A3)
    ask = dataclasses.replace(stage.measure_of.ask, token_K=np.array(pair, np.int32))
    own = Stage(
        subject=one,
        measure_of=Measure(ask, np.array([1.0, -1.0])),
        value_LTU=what.value_LTU,
        held_LTU=what.held_LTU,
        place_A3=at_A3[known_A],
        kept=Answers(None, MEASURED),
        on_pass=stage.on_pass,
    )
    s, n = own.measure(np.ones((1, int(known_A.sum())), bool)).at(0)
    bad = own.leads.astray
    return {
        "prompt": example.prompt,
        "sufficiency": None if bad else rounded(s),
        "necessity": None if bad else rounded(n),
        "leads": {name: rounded(m) for name, m in own.leads.items()},
    }


def _features(stage: Stage) -> np.ndarray:
    """Layer, position and feature of the candidates, [A, 3]."""
    slots = stage.subject.local.feature_LU
    rows = stage.place_A3.tolist()
    return np.array([(l, t, slots[l][u]) for l, t, u in rows], int).reshape(-1, 3)
