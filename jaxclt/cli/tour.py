"""The whole method on the bundled model, whose circuit is known: `jaxclt demo`.

A transformer that adds is asked for 36 + 59, the case study of Circuit Tracing (2025,
"addition"). Its graph is made, pruned, read as supernodes, patched, validated and
written as a page. Nothing is fetched.

``demo.json`` beside the dictionary (written by ``experiments/addition/run.py``) names
the prompt, a donor prompt whose last digit differs, and the features of each family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxclt.clt.active import Active, active_features
from jaxclt.clt.coder import Dictionary
from jaxclt.files.json_file import read_json
from jaxclt.graph.attribute import AttributeConfig
from jaxclt.graph.graph import Graph
from jaxclt.graph.memory import available_bytes
from jaxclt.graph.supernodes import SupernodeGraph, supernode_graph
from jaxclt.io.bundled import bundled
from jaxclt.io.dictionary import load_dictionary
from jaxclt.io.model import Model, load_model
from jaxclt.patching.edits import Edit
from jaxclt.patching.patch import PatchResult, patch
from jaxclt.patching.subject import Subject
from jaxclt.runs.kept import check_writable
from jaxclt.trace.files import write_trace
from jaxclt.trace.prompt import prompt_tokens, record_text, trace_prompt
from jaxclt.types import Supernode
from jaxclt.validation.report import ValidateOptions, validate_graph, write_validation

__all__ = ["Case", "DemoResult", "family_supernodes", "load_case", "run_demo"]
__all__ += ["swap_edits"]

MODEL, DICTIONARY = "addition", "addition-clt"
# Small graphs: fewer patches say the same, in a third of the time.
VALIDATION = ValidateOptions(n_features=30, n_small=10, n_layers=3)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is known of the prompt beforehand."""

    prompt: str
    donor: str  # the same sum with another last digit of b
    expected: str  # what the patched model should answer
    # What features at the last position stand for: (layer, feature) by family.
    families: dict[str, list[tuple[int, int]]]
    swap: tuple[str, ...]  # the families that say how the sum ends


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo found; its files are in the directory."""

    report: dict[str, Any]
    supernodes: SupernodeGraph
    swapped: PatchResult
    validation: dict[str, Any]


def load_case(name: str = DICTIONARY) -> Case:
    """The case study that comes with a bundled dictionary."""
    folder = bundled(name)
    assert folder is not None
    raw = read_json(folder / "demo.json")
    families = {
        family: [(int(layer), int(feature)) for layer, feature in features]
        for family, features in raw["families"].items()
    }
    return Case(
        prompt=raw["prompt"],
        donor=raw["donor"],
        expected=raw["expected"],
        families=families,
        swap=tuple(raw["swap"]),
    )


def swap_edits(model: Model, dictionary: Dictionary, case: Case) -> list[Edit]:
    """Give the last-digit features the activations that they have on the donor prompt.

    Not those of the last layer: its MLP is left to answer by itself.

    Args:
      model: the bundled model.
      dictionary: whose features the case names.
      case: prompt, donor and families.
    """
    own, donor = (
        _last_values(model, dictionary, prompt) for prompt in (case.prompt, case.donor)
    )
    last = len(prompt_tokens(model, case.prompt)) - 1
    return [
        Edit(layer=layer, pos=last, feature=feature, set=donor.get(place, 0.0))
        for family in case.swap
        for place in case.families[family]
        for layer, feature in [place]
        if layer < model.cfg.n_layers - 1
        and own.get(place, 0.0) != donor.get(place, 0.0)
    ]


def _last_values(
    model: Model, dictionary: Dictionary, prompt: str
) -> dict[tuple[int, int], float]:
    """Activations at the last position, by (layer, feature)."""
    ids = prompt_tokens(model, prompt)
    recording = record_text(model, ids, available_bytes(), pad=False)
    active: Active = active_features(dictionary, model.params, recording, model.cfg)
    here = active.pos_A == len(ids) - 1
    places = zip(active.layer_A[here], active.feature_A[here], strict=True)
    values = active.value_A[here]
    return {
        (int(layer), int(feature)): float(value)
        for (layer, feature), value in zip(places, values, strict=True)
    }


def family_supernodes(
    graph: Graph, families: Mapping[str, Sequence[tuple[int, int]]]
) -> list[Supernode]:
    """Features at the last position by family; tokens and targets as groups of one.

    Args:
      graph: attributed.
      families: (layer, feature) of the features of each.
    """
    family_of = {place: name for name, places in families.items() for place in places}
    groups: dict[str, list[Any]] = {name: [] for name in families}
    last = graph.n_tokens - 1
    for a in np.flatnonzero(graph.pos_A == last):
        place = int(graph.layer_A[a]), int(graph.feature_A[a])
        if place in family_of:
            groups[family_of[place]].append((place[0], last, place[1]))
    for pos, token in enumerate(graph.meta.tokens):
        groups[f"token {token} at {pos}"] = [f"embed {pos}"]
    for k, token in enumerate(graph.meta.target_tokens):
        groups[f"output {token}"] = [f"target {k}"]
    return [Supernode(name, tuple(nodes)) for name, nodes in groups.items() if nodes]


Progress = Callable[[str, str], AbstractContextManager[Callable[[int, int], None]]]


def run_demo(
    out: Path, *, say: Callable[[str], None], progress: Progress
) -> DemoResult:
    """Run it and write the directory.

    Args:
      out: where graph, report, page, validation and supernodes go.
      say: told what happens, a line each.
      progress: a bar for (what, unit).

    Raises:
      InputError: if `out` cannot be written.
    """
    check_writable(out, makes="trace")
    model = load_model(MODEL)
    dictionary = load_dictionary(DICTIONARY, model)
    case = load_case()
    say(f"{MODEL}: {model.cfg.n_layers} layers that add; {case.prompt!r}")
    with progress("attributing", "rows/s") as on_rows:
        traced = trace_prompt(
            model,
            dictionary,
            case.prompt,
            config=AttributeConfig(tolerance=0.0),
            on_rows=on_rows,
        )
    graph = traced.graph
    groups = family_supernodes(graph, case.families)
    small = supernode_graph(graph, groups)
    edits = swap_edits(model, dictionary, case)
    subject = Subject.of(model, dictionary, graph)
    layer_E = [edit.layer or 0 for edit in edits]
    # Behind the edited layers the model's own MLPs answer.
    layers = (min(layer_E), max(layer_E))
    swapped = patch(model, dictionary, graph, edits, layers=layers, subject=subject)
    with progress("validating", "patches/s") as on_done:
        validation = validate_graph(subject, VALIDATION, on_done=on_done)
    write_validation(validation, out)
    # last: its page shows what lies beside it
    report = write_trace(traced, out, supernodes=groups)
    return DemoResult(
        report=report, supernodes=small, swapped=swapped, validation=validation
    )
