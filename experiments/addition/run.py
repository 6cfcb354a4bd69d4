"""The addition case study: model, dictionaries, study and bundle, by one command.

    python experiments/addition/run.py [WORK] [--bundle jaxclt/bundled]

Each stage is skipped where its result is there already; a stopped training goes on.
Writes into WORK (out/addition): model/, clt/, plt/ (runs of `jaxclt train`),
results.json, table.md and the pictures. With --bundle also what the package ships.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import ablations
import dictionaries
import global_circuit
import jax
import numpy as np
import plots
import study
import task
import train_model
from families import Label

import jaxclt
from jaxclt.cli.demo import family_supernodes
from jaxclt.clt.transcoder import StoreDictionary
from jaxclt.evaluation.claims import check_claims
from jaxclt.evaluation.evaluate import EvalOptions, evaluate
from jaxclt.evaluation.judges import BaselineJudge
from jaxclt.evaluation.prompts import read_eval_text
from jaxclt.evaluation.report import markdown, write_evaluation
from jaxclt.files.atomic import atomic_path
from jaxclt.graph.supernodes import SupernodeGraph, describe_supernodes
from jaxclt.io.bundled import MODELS
from jaxclt.io.dictionary import LABELS
from jaxclt.io.model import Model
from jaxclt.types import Supernode

CASE, DONOR = (36, 59), (36, 58)
N_GRAPHS, N_PATCHES, N_ABLATED, SEED = 40, 200, 150, 7


def timed(clock: dict[str, float], name: str, work: Any) -> Any:
    start = time.perf_counter()
    found = work()
    clock[name] = round(time.perf_counter() - start, 1)
    print(f"== {name}: {clock[name]} s", flush=True)
    return found


def the_model(work: Path) -> Model:
    if not (work / "model/curve.json").is_file():
        params, curve = train_model.train()
        train_model.save(params, curve, work / "model")
    found = jaxclt.load_model(work / "model")
    return dataclasses.replace(found, name=MODELS[0])  # as it is bundled


def the_dictionary(model: Model, work: Path, name: str) -> StoreDictionary:
    config = {"clt": dictionaries.CLT, "plt": dictionaries.PLT}[name]
    if not (work / name / "card.json").is_file():
        dictionaries.make(model, config, work / name)
    found = jaxclt.load_dictionary(work / name, model)
    assert isinstance(found, StoreDictionary)
    return found


def percent(found: dict[str, Any]) -> str:
    lo, hi = found["interval"]
    return f"{found['share']:.1%} ({lo:.1%} to {hi:.1%})"


def patch_table(found: dict[str, dict[str, Any]]) -> str:
    head = "| dictionary | swapped | features changed, median | answer as predicted "
    head += "| last digit as predicted | answer unchanged |\n" + "|---" * 6 + "|\n"
    return head + "".join(
        f"| {dictionary} | {name} | {r['median_edits']:.0f} | {percent(r['answer'])} "
        f"| {percent(r['last_digit'])} | {percent(r['unchanged'])} |\n"
        for dictionary, one in found.items()
        for name, r in one["swaps"].items()
    )


def suppress_lines(found: dict[str, dict[str, Any]]) -> str:
    return "".join(
        f"- {dictionary}: {r['n']} sums have a clear last-digit feature; sign of the "
        f"change as predicted {percent(r)}, rank correlation {r['spearman']:.2f}, "
        f"median predicted {r['median_predicted']:.2f}, happened "
        f"{r['median_happened']:.2f}\n"
        for dictionary, one in found.items()
        for r in [one["suppress"]]
    )


def label_lines(rows: list[dict[str, Any]]) -> str:
    head = "| family | features | it explains half of | label explains half of "
    head += "| R² of the family, median | of the label | best example |\n"
    return (
        head
        + "|---" * 7
        + "|\n"
        + "".join(
            f"| {r['family']} | {r['features']} | {r['belong']} | {r['clear']} "
            f"| {r['family_fit']:.2f} | {r['fit']:.2f} | {r['example']} |\n"
            for r in rows
        )
    )


def picture(
    model: Model,
    dictionary: StoreDictionary,
    labels: dict[tuple[int, int], Label],
    work: Path,
    name: str,
) -> str:
    """The supernode graph of the case, drawn and in words."""
    graph = jaxclt.attribute(model, dictionary, task.prompt(*CASE), tolerance=0.0)
    groups = family_supernodes(graph, families_of(labels))
    small = jaxclt.supernode_graph(graph, groups)
    pathway = {x.family: x.pathway for x in labels.values()}
    plots.supernode_picture(
        small, layout(small, groups, pathway), work / f"supernodes_{name}.png"
    )
    return describe_supernodes(small, k=16)


def families_of(
    labels: dict[tuple[int, int], Label],
) -> dict[str, list[tuple[int, int]]]:
    """Features (layer, feature) of each family, as the bundle lists them."""
    names = sorted({x.family for x in labels.values()})
    return {name: sorted(study.chosen(labels, name)) for name in names}


def layout(
    small: SupernodeGraph, groups: list[Supernode], pathway: dict[str, str]
) -> dict[str, tuple[float, float, str]]:
    """Place (x, y) and pathway of tokens, families and output."""
    wide = 2.6
    tokens = [name for name in small.names if name.startswith("token ")]
    place = {name: (wide * i, 0.0, "") for i, name in enumerate(tokens)}
    middle = wide * (len(tokens) - 1) / 2
    column = {"last digit": 0.15, "sum": 1.0, "magnitude": 1.85}
    for group in groups:
        if group.features:
            kind = pathway.get(group.name, "sum")
            layer = float(np.mean([node[0] for node in group.features]))
            place[group.name] = (column.get(kind, 1.0) * middle, 1 + 2 * layer, kind)
    top = 1 + max(y for _, y, _ in place.values())
    for name in small.names:
        if name.startswith("output "):
            place[name] = (middle, top, "")
    return place


def bundle(
    work: Path, folder: Path, labels: dict[str, dict[tuple[int, int], Label]]
) -> None:
    """What the package ships: model, dictionaries with labels, and the demo's case."""
    shutil.copytree(work / "model", folder / MODELS[0], dirs_exist_ok=True)
    write(folder / MODELS[0] / "heldout.jsonl", task.held_out_lines())
    (a, b), (a_new, b_new) = CASE, DONOR
    answer = a + b - (a + b) % 10 + (a_new + b_new) % 10
    for name, found in labels.items():
        target = folder / f"{MODELS[0]}-{name}"
        shutil.copytree(work / name / "dictionary", target, dirs_exist_ok=True)
        shutil.copy(work / name / "README.md", target / "README.md")
        clear = {f"{l}:{f}": x.text for (l, f), x in sorted(found.items()) if x.clear}
        write(target / LABELS, json.dumps(clear, indent=0, ensure_ascii=False))
        case = {
            "prompt": task.prompt(*CASE),
            "donor": task.prompt(*DONOR),
            "expected": str(answer),
            "swap": ["lookup table", "ends in"],
            "families": families_of(found),
        }
        write(target / "demo.json", json.dumps(case))


def write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def study_one(
    model: Model, work: Path, name: str, n_patches: int, clock: dict[str, float]
) -> dict[str, Any]:
    """Everything about one trained dictionary."""
    found = timed(clock, name, lambda: the_dictionary(model, work, name))
    right = timed(
        clock, f"{name} alone", lambda: study.right_without_errors(model, found)
    )
    a_LNF = study.activations(model, found)
    labels = timed(clock, f"{name} labels", lambda: study.label_features(a_LNF))
    patches = timed(
        clock,
        f"{name} patches",
        lambda: study.patch_study(model, found, a_LNF, labels, n=n_patches, seed=SEED),
    )
    plots.operand_plots(a_LNF, labels, work / f"operand_plots_{name}.png")
    circuit = timed(
        clock,
        f"{name} global circuit",
        lambda: global_circuit.links(model, found, a_LNF, labels),
    )
    ranked = timed(
        clock,
        f"{name} rankings against ablations",
        lambda: ablations.precision(model, found, a_LNF, n=N_ABLATED, seed=SEED),
    )
    return {
        "circuit": circuit,
        "ranked": ranked,
        "dictionary": dataclasses.replace(found, name=f"addition-{name}"),
        "right": right,
        "labels": labels,
        "patches": patches,
        "links": picture(model, study.with_labels(found, labels), labels, work, name),
    }


def evaluated(model: Model, found: list[StoreDictionary], work: Path) -> str:
    """What `jaxclt eval` says of the dictionaries on sums nothing was trained on."""
    folder = work / "eval"
    options = EvalOptions(graphs=N_GRAPHS, seed=SEED)
    write(work / "heldout.jsonl", task.held_out_lines())
    text = read_eval_text(
        model, work / "heldout.jsonl", tokens=options.tokens, context=task.LONGEST
    )
    rows, raw = evaluate(
        model, found, text, options=options, judge=BaselineJudge(), out=folder
    )
    claims = check_claims(rows, raw, jax.random.key(SEED))
    write_evaluation(rows, raw, claims, folder, meta={"model": model.name})
    return markdown(rows, claims)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, nargs="?", default=Path("out/addition"))
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--patches", type=int, default=N_PATCHES)
    args = parser.parse_args()
    work, clock = args.work, {}
    work.mkdir(parents=True, exist_ok=True)
    model = timed(clock, "model", lambda: the_model(work))
    found = {
        name: study_one(model, work, name, args.patches, clock)
        for name in ("clt", "plt")
    }
    patches = {name.upper(): one["patches"] for name, one in found.items()}
    families = {
        name.upper(): study.label_table(one["labels"]) for name, one in found.items()
    }
    plots.swap_bars(patches, work / "swaps.png")
    text = timed(
        clock,
        "eval",
        lambda: evaluated(model, [x["dictionary"] for x in found.values()], work),
    )
    right = {name.upper(): one["right"] for name, one in found.items()}
    for name, share in right.items():
        text += f"\n{name} alone, no error node: right on {share:.2%} of all sums\n"
    for name, one in found.items():
        text += f"\n{name.upper()}:\n\n{label_lines(families[name.upper()])}"
        text += f"\n```\n{one['links']}\n```\n\n{global_circuit.lines(one['circuit'])}"
        text += f"\n{ablations.table(one['ranked'])}"
    text += f"\n{patch_table(patches)}\n{suppress_lines(patches)}"
    write(work / "table.md", text)
    result = {"right": right, "labels": families, "patches": patches, "seconds": clock}
    write(work / "results.json", json.dumps(result, indent=1))
    if args.bundle:
        bundle(work, args.bundle, {name: one["labels"] for name, one in found.items()})
    print(text)


if __name__ == "__main__":
    main()
