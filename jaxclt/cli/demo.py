"""`jaxclt demo`: the whole method on the bundled model, whose circuit is known.

A transformer that adds is asked for 36 + 59, the case study of Circuit Tracing (2025,
"addition"). Its graph is made, pruned, read as supernodes, patched, validated and
written as a page. Nothing is fetched.

``demo.json`` beside the dictionary (written by ``experiments/addition/run.py``) names
the prompt, a donor prompt whose last digit differs, and the features of each family.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import RenderableType
from rich.text import Text

from jaxclt.cli.common import answer, load, page_line, table
from jaxclt.cli.flags import AsJson, Debug
from jaxclt.cli.progress import Run
from jaxclt.graph.attribute import AttributeConfig
from jaxclt.graph.graph import Graph
from jaxclt.graph.supernodes import SupernodeGraph, describe_supernodes, supernode_graph
from jaxclt.patching.edits import Edit
from jaxclt.patching.patch import PatchResult, measure
from jaxclt.patching.plan import plan_patch
from jaxclt.patching.subject import Subject
from jaxclt.types import Supernode

if TYPE_CHECKING:
    from jaxclt.clt.coder import Dictionary
    from jaxclt.io.model import Model

__all__ = ["Case", "DemoFlags", "family_supernodes", "load_case", "run_demo"]
__all__ += ["swap_edits"]

MODEL, DICTIONARY = "addition", "addition-clt"
NEXT = """next, on a real model (98 MB, Apache-2.0):
  jaxclt trace "The Eiffel Tower is in the city of" --model smollm2-135m \\
      --dictionary neurons:32 --out out/eiffel
and here:
  jaxclt trace "calc: 8+7=" --model addition --dictionary addition-clt --out out/15
  jaxclt patch {out} --group "{group}" --scale 0"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoFlags:
    """The whole method on a bundled model that adds: no download, under a minute."""

    out: Path = Path("out/demo")
    """Directory to write to."""
    json: AsJson = False
    debug: Debug = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is known about the prompt beforehand."""

    prompt: str
    donor: str  # the same sum with another last digit of b
    expected: str  # what the patched model should answer
    # What features at the last position stand for: (layer, feature) by family.
    families: dict[str, list[tuple[int, int]]]
    swap: tuple[str, ...]  # the families that say how the sum ends


def load_case(name: str = DICTIONARY) -> Case:
    """The case study that comes with a bundled dictionary."""
    from jaxclt.files.json_file import read_json
    from jaxclt.io.bundled import bundled

    folder = bundled(name)
    assert folder is not None
    raw = read_json(folder / "demo.json")
    families = {
        family: [(int(layer), int(feature)) for layer, feature in features]
        for family, features in raw["families"].items()
    }
    return Case(**raw | {"families": families, "swap": tuple(raw["swap"])})


def swap_edits(model: Model, dictionary: Dictionary, case: Case) -> list[Edit]:
    """Give the last-digit features the activations that they have on the donor prompt.

    Not those of the last layer: its MLP is left to answer by itself.

    Args:
      model: the bundled model.
      dictionary: whose features the case names.
      case: prompt, donor and families.
    """
    from jaxclt.trace.record import prompt_tokens

    clean, donor = (
        _last_values(model, dictionary, prompt) for prompt in (case.prompt, case.donor)
    )
    last = len(prompt_tokens(model, case.prompt)) - 1
    return [
        Edit(layer=layer, pos=last, feature=feature, set=donor.get(place, 0.0))
        for family in case.swap
        for place in case.families[family]
        for layer, feature in [place]
        if layer < model.cfg.n_layers - 1
        and clean.get(place, 0.0) != donor.get(place, 0.0)
    ]


def _last_values(
    model: Model, dictionary: Dictionary, prompt: str
) -> dict[tuple[int, int], float]:
    """Activations at the last position, by (layer, feature)."""
    from jaxclt.clt.active import active_features
    from jaxclt.graph.memory import available_bytes
    from jaxclt.trace.record import prompt_tokens, record_text

    ids = prompt_tokens(model, prompt)
    recording = record_text(model, ids, available_bytes(), pad=False)
    active = active_features(dictionary, model.params, recording, model.cfg)
    here = active.pos_A == len(ids) - 1
    columns = active.layer_A, active.feature_A, active.value_A
    rows = zip(*(column[here].tolist() for column in columns), strict=True)
    return {(layer, feature): value for layer, feature, value in rows}


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


def run_demo(flags: DemoFlags, run: Run) -> None:
    """Trace, group, patch, validate, write; show what came out."""
    from jaxclt.trace.files import write_trace
    from jaxclt.trace.prompt import trace_prompt
    from jaxclt.validation import report as validation

    started = time.perf_counter()
    run.own(flags.out, makes="trace")
    model, dictionary = load(MODEL, DICTIONARY, run)
    case = load_case()
    run.line(f"{MODEL}: {model.cfg.n_layers} layers that add; {case.prompt!r}")
    with run.progress("attributing", "rows/s") as on_rows:
        config = AttributeConfig(tolerance=0.0)
        traced = trace_prompt(
            model, dictionary, case.prompt, config=config, on_rows=on_rows
        )
    groups = family_supernodes(traced.graph, case.families)
    edits = swap_edits(model, dictionary, case)
    subject = Subject.of(model, dictionary, traced.graph)
    layer_E = [edit.layer or 0 for edit in edits]
    layers = min(layer_E), max(layer_E)  # the model's own MLPs answer after them
    swapped = measure(plan_patch(subject, edits, layers=layers), predict=True)
    single = measure(plan_patch(subject, [_strongest(traced.graph)]), predict=True)
    # Small graphs: fewer patches say the same, in a third of the time.
    options = validation.ValidateOptions(n_features=30, n_small=10, n_layers=3)
    with run.progress("validating", "patches/s") as on_done:
        checked = validation.validate_graph(subject, options, on_done=on_done)
    validation.write_validation(checked, flags.out)
    # last: its page shows what lies beside it
    report = write_trace(traced, flags.out, supernodes=groups)
    seconds = time.perf_counter() - started
    result = {
        "report": report,
        "patch": swapped.to_json(),
        "ablation": single.to_json(),
        "validation": {"verdict": checked["verdict"]},
        "page": str(flags.out / "index.html"),
        "seconds": round(seconds, 2),
    }
    small = supernode_graph(traced.graph, groups)
    shown = _shown(flags.out, report, small, (swapped, single), checked)
    answer(flags.json, result, *shown, f"\n{seconds:.0f} s in all")


def _strongest(graph: Graph) -> Edit:
    """The ablation of the most influential feature."""
    a = int(graph.influence_N[graph.feature_cols].argmax())
    place = (int(x[a]) for x in (graph.layer_A, graph.pos_A, graph.feature_A))
    layer, pos, feature = place
    return Edit(layer=layer, pos=pos, feature=feature, scale=0.0)


def _swap_said(swapped: PatchResult) -> str:
    before, after = swapped.top_before[0], swapped.top_after[0]
    return (
        f"{len(swapped.edits)} features changed: {before[0]} (p {before[1]:.2f}) -> "
        f"{after[0]} (p {after[1]:.2f}); logit of {_predicted_said(swapped)}"
    )


def _predicted_said(done: PatchResult) -> str:
    """The first target's prediction and measurement."""
    from jaxclt.patching.predicted import told

    assert done.predicted is not None
    row = done.predicted[0]
    names = {"graph": "graph", "replacement": "replacement model"}
    # A graph says nothing of features that are silent on its prompt.
    known = {said: row[key] for key, said in names.items() if row[key] is not None}
    numbers = [f"{said} {x:+.2f}" for said, x in known.items()]
    return (
        f"{row['token']}: {', '.join(numbers)}, measured {row['measured']:+.2f}: "
        f"{told(row)}"
    )


def _ablation_said(single: PatchResult, checked: dict[str, Any]) -> str:
    """Why ablating one feature moves a probability near 1 so little."""
    first, edit = single.targets[0], single.edits[0]
    slope = checked["live"]["value"]["slope_on_targets"]
    return (
        f"without layer {edit['layer']} feature {edit['feature']}, the most "
        f"influential: p({first['token']}) {first['p_before']:.4f} -> "
        f"{first['p_after']:.4f}; logit of {_predicted_said(single)}\n"
        f"so little because the answer is most of the final stream at p "
        f"{first['p_before']:.3f}: the last norm, which graphs hold, leaves "
        f"{slope:.0%} of what a feature does to it"
    )


def _shown(
    out: Path,
    report: dict[str, Any],
    supernodes: SupernodeGraph,
    patches: tuple[PatchResult, PatchResult],
    checked: dict[str, Any],
) -> list[RenderableType]:
    graph, full = report["graph"], report["scores"]["full"]
    token, probability = report["top_tokens"][0]
    rows = {
        "answer": f"{token} (p {probability:.3f})",
        "graph": f"{graph['features_active']} features, all of them; shown "
        f"{graph['kept_nodes']} nodes",
        "replacement score": f"{full['replacement']:.3f}",
        "completeness": f"{full['completeness']:.3f}",
        "row error (max)": f"{report['certificate']['max_relative_row_error']:.1e}",
    }
    swapped, single = patches
    sections = {
        "a swap: the last-digit features get what they have at another last digit": (
            _swap_said(swapped)
        ),
        "an ablation: one feature alone": _ablation_said(single, checked),
        "strongest paths": "\n".join(report["paths"]),
        "features of one family as one node "
        "(share of influence, sign, share of input)": describe_supernodes(
            supernodes, k=8
        ),
        "what the graph predicted, against patches": checked["verdict"],
    }
    shown: list[RenderableType] = [table(None, rows)]
    for title, text in sections.items():
        shown.append(Text(f"\n{title}", style="bold"))
        shown += [f"  {line}" for line in text.splitlines()]
    families = [
        name for name in supernodes.names if not name.startswith(("token", "output"))
    ]
    following = NEXT.format(out=out, group=families[0] if families else "")
    return [*shown, f"\n{page_line(out / 'index.html')}", f"\n{following}"]
