"""What the dictionaries say about the model: table, labels, patches, graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import task
from families import Label, label, partitions
from jax import Array

import jaxclt
from jaxclt.clt.coder import Dictionary, load
from jaxclt.clt.transcoder import StoreDictionary, loaded_params
from jaxclt.graph.agreement import spearman
from jaxclt.graph.effects import solve_total_effect
from jaxclt.graph.graph import Graph
from jaxclt.graph.targets import token_targets
from jaxclt.io.model import Model
from jaxclt.patching.change import Change, batched
from jaxclt.patching.effects import clean_effect
from jaxclt.patching.how import How, Mode
from jaxclt.patching.subject import Subject
from jaxclt.replacement.model import replacement_logits
from jaxclt.train.harvest import harvest
from jaxclt.types import LMParams, Recording, Targets
from jaxclt.validation.stats import wilson

ROWS = 1_000  # sums computed together
EDITS = 64  # patches are filled up to a multiple of so many changes
ATTRIBUTION = {"max_features": 2_000, "tolerance": 0.0}


# -- all sums at once ------------------------------------------------------------------


def batches() -> Iterator[tuple[Array, np.ndarray]]:
    """All prompts [n, 7] with the places of their `=` [n], some at a time."""
    token_NT, last_N = task.all_tokens()
    for start in range(0, len(token_NT), ROWS):
        here = slice(start, start + ROWS)
        yield jnp.asarray(token_NT[here]), last_N[here]


def activations(model: Model, dictionary: StoreDictionary) -> np.ndarray:
    """Activations [L, N², F] of every feature at the `=` of every sum, float32."""
    cfg = dictionary.cfg
    enc = loaded_params(dictionary.params, cfg).weights.enc
    encode = dictionary.coder(model.cfg).encode
    one = jax.jit(
        jax.vmap(lambda enc, read_TD: encode(model.params.blocks, enc, read_TD).a_TF)
    )
    parts = []
    for token_WT, last_W in batches():
        read_LTD, *_ = harvest(
            model.params, token_WT, None, cfg=model.cfg, site=cfg.read
        )
        at = np.arange(len(last_W)) * token_WT.shape[1] + last_W
        parts.append(np.asarray(one(enc, read_LTD[:, at])))
    return np.concatenate(parts, 1)


def right_share(logits: Callable[[Array], Array]) -> float:
    """Share of all sums that a function [T] -> logits [T, V] gets right."""

    def said(token_T: Array, last: Array) -> Array:
        return logits(jnp.maximum(token_T, 0))[last].argmax()

    many = jax.jit(jax.vmap(said))
    found = [np.asarray(many(*batch)) for batch in batches()]
    a, b = task.all_pairs()
    return float((np.concatenate(found) == a + b).mean())


def right_without_errors(model: Model, dictionary: Dictionary) -> float:
    """Share of all sums that the replacement model gets right, nothing kept."""
    loaded = load(dictionary, model.params, model.cfg)
    logits = partial(
        replacement_logits, model.params, loaded, cfg=model.cfg, keep_first=False
    )
    return right_share(logits)


def random_sums(n: int, seed: int) -> list[tuple[int, int]]:
    """Different sums, drawn from all."""
    order = jax.random.permutation(jax.random.key(seed), task.N**2)[:n]
    return [divmod(int(i), task.N) for i in order]


# -- labels ----------------------------------------------------------------------------


def label_features(a_LNF: np.ndarray) -> dict[tuple[int, int], Label]:
    """Labels of the features that are active at the `=`, by (layer, feature)."""
    among = partitions()
    found = {}
    for layer, a_NF in enumerate(a_LNF):
        plot_NF = a_NF.astype(np.float64)
        for feature in np.flatnonzero((plot_NF > 0).any(0)):
            if np.ptp(plot := plot_NF[:, feature]) > 0:
                found[layer, int(feature)] = label(plot, among)
    return found


def label_table(labels: dict[tuple[int, int], Label]) -> list[dict[str, Any]]:
    """How many features are of each family, how well their labels fit."""
    rows = []
    for family in sorted({x.family for x in labels.values()}):
        these = [x for x in labels.values() if x.family == family]
        rows.append(
            {
                "family": family,
                "features": len(these),
                "belong": sum(x.belongs for x in these),
                "clear": sum(x.clear for x in these),
                "fit": float(np.median([x.fit for x in these])),
                "family_fit": float(np.median([x.family_fit for x in these])),
                "example": max(these, key=lambda x: x.fit).text,
            }
        )
    return sorted(rows, key=lambda row: -row["features"])


# -- patches ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Patched:
    """One patch of one sum."""

    a: int
    b: int
    expected: int  # the answer that the labels predict
    said: int
    p_right: float  # of the right answer to the sum, patched
    n_edits: int


def chosen(labels: dict[tuple[int, int], Label], what: str) -> set[tuple[int, int]]:
    """Features of a family or a pathway."""
    return {
        place
        for place, x in labels.items()
        if x.belongs and what in (x.family, x.pathway)
    }


def subject_of(model: Model, dictionary: StoreDictionary, a: int, b: int) -> Subject:
    """The traced sum; its target is the right answer, whatever the model says."""

    def right(params: LMParams, recording: Recording) -> Targets:
        token_K = jnp.array([a + b], jnp.int32)
        return token_targets(params, recording.out_TD[-1], token_K)

    graph = jaxclt.attribute(
        model, dictionary, task.prompt(a, b), targets=right, **ATTRIBUTION
    )
    return Subject.of(model, dictionary, graph)


def donated(
    a_LNF: np.ndarray,
    own: tuple[int, int],
    donor: tuple[int, int],
    features: set[tuple[int, int]],
    last: int,
) -> dict[tuple[int, int, int], float]:
    """Activations that features at the `=` are given: theirs on another sum."""
    at_own, at_donor = (a_LNF[:, a * task.N + b] for a, b in (own, donor))
    return {
        (layer, last, feature): float(at_donor[layer, feature])
        for layer, feature in sorted(features)
        if at_own[layer, feature] != at_donor[layer, feature]
    }


def swap(
    subject: Subject, many: Sequence[dict[tuple[int, int, int], float]], mode: Mode
) -> tuple[list[int], list[float]]:
    """What the model says under each of some patches, and p of the right answer.

    Constrained: MLP outputs are clamped from the first to the last edited layer, and
    the last layer is left alone, so that the model's own MLP answers. Iterative: the
    replacement model, all layers.
    """
    top, layers = subject.model.cfg.n_layers - 1, []
    if mode == "constrained":
        many = [{at: v for at, v in given.items() if at[0] < top} for given in many]
    for given in many:
        edited = [layer for layer, _, _ in given] or [0]
        layers.append((0, top) if mode == "iterative" else (min(edited), max(edited)))
    places = [place for given in many for place in given]
    values = [value for given in many for value in given.values()]
    change = Change.of(subject.gather(places), 0.0, values)
    sizes = [len(given) for given in many]
    change = batched(change, sizes, least=room(max(sizes)))
    done = subject.effects(change, layers, How(mode=mode), subject.ask(n_top=1))
    said = np.asarray(done.top_token_J)[:, 0].tolist()
    return said, np.asarray(done.prob_K)[:, 0].tolist()


def other(x: int, by: int, key: Array) -> int:
    """x with its last digit (by 1) or its tens (by 10) drawn anew, not the same."""
    old = x // by % 10
    new = (old + int(jax.random.randint(key, (), 1, 10))) % 10
    return x + (new - old) * by


def patch_study(
    model: Model,
    dictionary: StoreDictionary,
    a_LNF: np.ndarray,
    labels: dict[tuple[int, int], Label],
    *,
    n: int,
    seed: int,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Do patches do what the labels and the graphs say, on n random sums?

    - swap last digit: the features of the last-digit pathway (lookup tables, and how
      the sum ends) get the activations of a sum whose b ends differently; the answer
      should take the last digit of a + b', and nothing else.
    - swap magnitude: the features of the magnitude pathway, from a sum with other tens
      of a; the answer should keep its last digit and take the tens of a' + b.
    - swap others: as many other features as in the first, with that donor: a control.
    - suppress: last-digit features set to 0 in the replacement model. What each graph
      predicts for the logit of the sum (their total effects, to first order) against
      what happens.
    """
    digit, size = chosen(labels, "last digit"), chosen(labels, "magnitude")
    every = [
        (layer, feature)
        for layer, a_NF in enumerate(a_LNF)
        for feature in np.flatnonzero((a_NF > 0).any(0)).tolist()
    ]
    rest = [place for place in every if place not in digit]
    modes: tuple[Mode, ...] = ("constrained", "iterative")
    swaps: dict[str, list[Patched]] = {
        f"{name}, {mode}": []
        for name in ("last digit", "magnitude", "others")
        for mode in modes
    }
    predicted, happened = [], []
    for i, (a, b) in enumerate(random_sums(n, seed)):
        key = jax.random.fold_in(jax.random.key(seed + 1), i)
        subject = subject_of(model, dictionary, a, b)
        b_new, a_new = other(b, 1, key), other(a, 10, key)
        digit_to = a + b - (a + b) % 10 + (a + b_new) % 10
        tens_to = (a_new + b) - (a_new + b) % 10 + (a + b) % 10
        draw = np.asarray(jax.random.permutation(key, len(rest)))[: len(digit)]
        last = subject.n_tokens - 1
        plan = {
            "last digit": ((a, b_new), digit, digit_to),
            "magnitude": ((a_new, b), size, tens_to),
            "others": ((a, b_new), {rest[j] for j in draw}, digit_to),
        }
        many = [
            donated(a_LNF, (a, b), donor, features, last)
            for donor, features, _ in plan.values()
        ]
        for mode in modes:
            answers = zip(plan.items(), many, *swap(subject, many, mode), strict=True)
            for (name, (_, _, expected)), edits, said, p_right in answers:
                one = Patched(a, b, expected, said, p_right, len(edits))
                swaps[f"{name}, {mode}"].append(one)
        graph = subject.graph
        slots = [
            slot
            for slot in np.flatnonzero(graph.pos_A == graph.n_tokens - 1)
            if (int(graph.layer_A[slot]), int(graph.feature_A[slot])) in digit
        ]
        if slots:
            effect, change = suppressed(subject, slots)
            predicted.append(-effect)
            happened.append(change)
        if (i + 1) % 50 == 0:
            say(f"{dictionary.name}: {i + 1} of {n} sums patched")
    agree = int((np.sign(predicted) == np.sign(happened)).sum())
    return {
        "n": n,
        "features": {"last digit": len(digit), "magnitude": len(size)},
        "swaps": {name: hits(rows) for name, rows in swaps.items()},
        "suppress": {
            "n": len(predicted),
            **share(agree, max(1, len(predicted))),
            "spearman": spearman(np.asarray(predicted), np.asarray(happened)),
            "median_predicted": float(np.median(predicted)),
            "median_happened": float(np.median(happened)),
        },
    }


def share(k: int, n: int) -> dict[str, Any]:
    lo, hi = wilson(k, n)
    return {"share": k / n, "interval": [lo, hi]}


def hits(rows: Sequence[Patched]) -> dict[str, Any]:
    """How often the whole answer, and its last digit, are as expected."""
    n = len(rows)
    whole = sum(r.said == r.expected for r in rows)
    digit = sum(r.said % 10 == r.expected % 10 for r in rows)
    stayed = sum(r.said == r.a + r.b for r in rows)
    return {
        "answer": share(whole, n),
        "last_digit": share(digit, n),
        "unchanged": share(stayed, n),
        "median_edits": float(np.median([r.n_edits for r in rows])),
        "median_p_right": float(np.median([r.p_right for r in rows])),
    }


def suppressed(subject: Subject, slots: Sequence[int]) -> tuple[float, float]:
    """Total effect of some features on the sum's logit, and the change without them.

    The replacement model is patched (all layers, everything downstream responds): that
    is what a total effect is about. Norms stay as they are in the clean pass.
    """
    graph: Graph = subject.graph
    effect = float(solve_total_effect(graph)[0, slots].sum())
    change = Change.of(subject.watch(np.array(slots)))
    change = batched(change, [len(slots)], least=room(len(slots)))
    how, ask = How(mode="iterative", norms="frozen"), subject.ask()
    done = subject.effects(change, [(0, subject.model.cfg.n_layers - 1)], how, ask)
    before = clean_effect(subject.patchable, ask)
    change = float(np.asarray(done.logit_K)[0, 0] - np.asarray(before.logit_K)[0])
    return effect, change


def room(n: int) -> int:
    """Changes that a patch of n is filled up to: one shape for one program."""
    return EDITS * max(1, -(-n // EDITS))


def with_labels(
    dictionary: StoreDictionary, labels: dict[tuple[int, int], Label]
) -> StoreDictionary:
    """The dictionary with its clear labels, as graphs show them."""
    clear = {place: x.text for place, x in labels.items() if x.clear}
    return dataclasses.replace(dictionary, labels=clear)
