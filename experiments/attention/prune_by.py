"""Which reading finds the circuit: graphs pruned by value and by response, measured.

    python experiments/attention/prune_by.py [--prompts FILE] [--out DIR]

Every prompt is traced to the difference of two logits, its features are ranked (see
`RANKINGS`), and the n first are a circuit. With m that difference in the model,

    sufficiency = (m(keep) - m(none)) / (m(all) - m(none))
    necessity   = (m(all) - m(drop)) / (m(all) - m(none))

where keep sets all other active features to their reference, drop the circuit's, none
all of them. References are 0, or the values on a counterfactual prompt; errors and
embeddings stay. Two semantics: `clamped` (nothing but norms answers, maths 15.2) and
`live` (kept features are encoded again, attention and gates live). A ratio says little
where m(all) is near m(none): then the prompt is left out of its means, and counted.

Lines of FILE: {"prompt", "answer", "foil"} and maybe "counterfactual", a prompt of as
many tokens. Writes DIR/results.json after every prompt, and DIR/table.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jaxclt
from jaxclt.cli.common import use_compilation_cache
from jaxclt.graph.attribute import AttributeConfig
from jaxclt.graph.graph import Graph
from jaxclt.patching.change import Change
from jaxclt.patching.effects import Ask, measure_effect
from jaxclt.patching.how import How
from jaxclt.patching.local import Tables
from jaxclt.patching.modes import patched
from jaxclt.patching.patchable import Patchable
from jaxclt.patching.subject import Subject
from jaxclt.trace.prompt import trace_prompt
from jaxclt.trace.target_text import read_targets
from jaxclt.validation.stats import mean_interval

RANKINGS = {
    "value": "influence by value, as every published graph is pruned",
    "response": "influence by response",
    "value total": "size of the total effect by value",
    "response total": "size of the total effect by response",
    "derivative": "size of the model's own derivative",
    "random": "drawn",
}
SEMANTICS = {
    "clamped": How(),
    "live": How(mode="iterative", freeze_pattern=False, gates="live"),
}
SIZES = (32, 128, 512, 2048)
LEAST = 0.5  # logits between m(all) and m(none)


def ranked(graph: Graph, seed: int) -> dict[str, np.ndarray]:
    """Features of the graph, first the strongest, by every ranking that it has."""
    A = graph.n_features
    other = jaxclt.by_response(graph)
    size = {
        "value": graph.influence_N[:A],
        "response": other.influence_N[:A],
        "value total": np.abs(jaxclt.solve_total_effect(graph)[0]),
        "response total": np.abs(jaxclt.solve_total_effect(other)[0]),
        "random": np.asarray(jax.random.uniform(jax.random.key(seed), (A,))),
    }
    if graph.derivative_KN is not None:
        size["derivative"] = np.abs(graph.derivative_KN[0, :A])
    return {name: np.argsort(-x_A, kind="stable") for name, x_A in size.items()}


@partial(jax.jit, static_argnames="how")
def differences(
    model: Patchable,
    change: Change,
    edit_BE: Array,
    tables: Tables | None,
    ask: Ask,
    *,
    how: How,
) -> Array:
    """Differences of the two logits [B], each with some of the changes made."""
    layers_2 = jnp.asarray([0, model.cfg.n_layers - 1], jnp.int32)

    def one(edit_E: Array) -> Array:
        none_E = jnp.full_like(change.features.layer_E, -1)
        layer_E = jnp.where(edit_E, change.features.layer_E, none_E)
        some = Change(
            dataclasses.replace(change.features, layer_E=layer_E),
            jnp.where(edit_E, change.factor_E, jnp.ones_like(change.factor_E)),
            jnp.where(edit_E, change.offset_E, jnp.zeros_like(change.offset_E)),
        )
        done = patched(model, some, layers_2, how=how, tables=tables)
        logit_K = measure_effect(model, done, ask).raw_logit_K
        return logit_K[0] - logit_K[1]

    return jax.lax.map(one, edit_BE)


def of_prompt(
    model: Any, dictionary: Any, line: dict[str, str], config: AttributeConfig
) -> list[dict[str, Any]]:
    """One row for every reference, semantics, ranking and size."""
    target = f"diff:{line['answer']}|{line['foil']}"
    graph = trace_prompt(
        model, dictionary, line["prompt"], targets=(target,), config=config
    ).graph
    subject = Subject.of(model, dictionary, graph)
    a = subject.active
    node_A3 = np.stack([a.layer_A, a.pos_A, a.feature_A], 1)
    # Active features that are no nodes of the graph belong to no circuit.
    place = {tuple(node): i for i, node in enumerate(node_A3.tolist())}
    slot_A = np.array([place[graph.feature(i)] for i in range(graph.n_features)])
    order = {k: slot_A[rank_A] for k, rank_A in ranked(graph, seed=0).items()}
    sizes = [n for n in SIZES if n < len(slot_A)]
    sets = [(name, n) for name in order for n in sizes]
    member_BE = np.zeros((len(sets), len(node_A3)), bool)
    for member_E, (name, n) in zip(member_BE, sets, strict=True):
        member_E[order[name][:n]] = True
    none_E = np.zeros((1, len(node_A3)), bool)
    edit_BE = np.concatenate([none_E, ~none_E, ~member_BE, member_BE])

    features, n_tokens = subject.gather(node_A3), subject.n_tokens
    references = {"zero": np.zeros(len(node_A3))}
    if "counterfactual" in line:
        other = Subject.of(model, dictionary, line["counterfactual"])
        if other.n_tokens != n_tokens:
            raise SystemExit(
                f"{line['counterfactual']!r} has {other.n_tokens} tokens, not "
                f"{n_tokens}: give one of as many"
            )
        references["counterfactual"] = np.asarray(other.gather(node_A3).value_E)
    recording = subject.patchable.recording
    answers = line["answer"], line["foil"]
    targets = read_targets(answers, model, dictionary, recording, n_tokens=n_tokens)
    last = jnp.asarray(n_tokens - 1, jnp.int32)
    ask = Ask(token_K=jnp.asarray(targets.token_K), last=last)
    rows = []
    for reference, value_E in references.items():
        change = subject.local.placed(Change.of(features, 0.0, value_E))
        for semantics, how in SEMANTICS.items():
            tables = subject.local.tables if how.mode == "iterative" else None
            with jax.default_matmul_precision("highest"):
                m_B = differences(
                    subject.patchable, change, edit_BE, tables, ask, how=how
                )
            (all_, none, *rest) = np.asarray(m_B, np.float64).tolist()
            keep, drop = rest[: len(sets)], rest[len(sets) :]
            for (name, n), k, d in zip(sets, keep, drop, strict=True):
                rows.append(
                    {
                        "prompt": line["prompt"],
                        "active": len(node_A3),
                        "nodes": len(slot_A),
                        "reference": reference,
                        "semantics": semantics,
                        "ranking": name,
                        "n": n,
                        "all": all_,
                        "none": none,
                        "sufficiency": (k - none) / (all_ - none),
                        "necessity": (all_ - d) / (all_ - none),
                    }
                )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Means and 95% intervals over prompts; one block for each way to measure.

    The last column is what `off` says, the last lines what the response gains in it.
    """
    text = ""
    for reference in dict.fromkeys(row["reference"] for row in rows):
        for semantics in SEMANTICS:
            here = [
                row
                for row in rows
                if (row["reference"], row["semantics"]) == (reference, semantics)
            ]
            said = [r for r in here if abs(r["all"] - r["none"]) >= LEAST]
            n_prompts = len({r["prompt"] for r in said})
            left_out = len({r["prompt"] for r in here}) - n_prompts
            text += f"\n{reference}, {semantics} ({n_prompts} prompts"
            text += f", {left_out} left out)\n\n" if left_out else ")\n\n"
            sizes = sorted({row["n"] for row in said})
            text += _line("ranking", "measure", *sizes, "off")
            text += _line(*("---",) * (3 + len(sizes)))
            for measure in ("sufficiency", "necessity"):
                for ranking in RANKINGS:
                    mine = [row for row in said if row["ranking"] == ranking]
                    cells = [
                        interval([row[measure] for row in mine if row["n"] == n])
                        for n in sizes
                    ]
                    distance = off(said, ranking, measure)
                    text += _line(ranking, measure, *cells, interval(distance))
                for kind in ("", " total"):
                    value, response = (
                        off(said, reading + kind, measure)
                        for reading in ("value", "response")
                    )
                    gain = [a - b for a, b in zip(value, response, strict=True)]
                    what = f"response{kind} gains", measure, *("",) * len(sizes)
                    text += _line(*what, interval(gain))
    return text


def off(rows: list[dict[str, Any]], ranking: str, measure: str) -> list[float]:
    """How far a measure is from 1, mean of the sizes, of each prompt."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["ranking"] == ranking:
            found.setdefault(row["prompt"], []).append(abs(1 - row[measure]))
    return [float(np.mean(x)) for x in found.values()]


def interval(values: list[float]) -> str:
    if not values:
        return ""
    low, high = mean_interval(np.array(values), jax.random.key(0))
    return f"{np.mean(values):.2f} ({low:.2f} to {high:.2f})"


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |\n"


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dictionary", default="neurons:32")
    parser.add_argument("--prompts", type=Path, default=here / "prune_by.jsonl")
    parser.add_argument("--limit", type=int, default=None, help="of prompts")
    parser.add_argument("--max-features", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=Path("out/prune_by"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    use_compilation_cache()
    model = jaxclt.load_model(args.model)
    dictionary = jaxclt.load_dictionary(args.dictionary, model)
    config = AttributeConfig(response=True, max_features=args.max_features)
    rows: list[dict[str, Any]] = []
    for line in args.prompts.read_text("utf-8").splitlines()[: args.limit]:
        start = time.perf_counter()
        rows += of_prompt(model, dictionary, json.loads(line), config)
        print(f"{time.perf_counter() - start:.0f} s: {line}", flush=True)
        (args.out / "results.json").write_text(json.dumps(rows, indent=1))
        (args.out / "table.md").write_text(table(rows))


if __name__ == "__main__":
    main()
