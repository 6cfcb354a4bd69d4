"""Circuits against as many features by influence, over prompts of the tasks.

    python experiments/circuits/circuits.py --model M --dictionary D --out DIR \
        --tasks addition [...] [--n N] [--max-features N] [--share S]

Each prompt is traced to its answer and foil, a circuit is searched with the features
outside of it at the counterfactual prompt's values, and stands beside sets of equal
size. Prompts on which the model does not prefer the answer are passed over, and so are
those of which no share can be told (`Leads.astray`); both are counted. Tasks take
turns, so that a run that is stopped has some of each. Appends to DIR/circuits.jsonl and
goes on where it stopped; DIR/circuits.md has means with 95% intervals over prompts.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxclt
from jaxclt import tasks
from jaxclt.circuits.rankings import BASELINES
from jaxclt.circuits.search import Shares, fit
from jaxclt.cli.common import use_compilation_cache
from jaxclt.graph.config import AttributeConfig
from jaxclt.trace.prompt import trace_prompt
from jaxclt.validation.stats import mean_interval, wilson

SETS = ("circuit", *BASELINES.values(), "random")


def of_prompt(
    model: Any, dictionary: Any, example: tasks.Example, args: Any
) -> dict[str, Any]:
    """The numbers of one prompt."""
    start, cpu = time.perf_counter(), time.process_time()
    config = AttributeConfig(max_features=args.max_features, attention=0)
    targets = (example.answer, f"foil:{example.foil}")
    traced = trace_prompt(
        model, dictionary, example.prompt, targets=targets, config=config
    )
    between, between_cpu = time.perf_counter(), time.process_time()
    found = jaxclt.circuit(
        model,
        dictionary,
        traced.graph,
        counterfactual=example.counterfactual,
        foil=example.foil,
        share=args.share,
        on_done=lambda done, planned: None,
    )
    said = found.to_json()
    return {
        "task": example.task,
        "prompt": example.prompt,
        "tokens": traced.graph.n_tokens,
        "features": len(found.nodes),
        "candidates": found.candidates,
        "leads": said["leads"],
        "astray": said["shares_mislead"],
        "reached": found.reached,
        "measured": {name: said["measured"][name] for name in SETS},
        "all": said["measured"]["all candidates"],
        "passes": found.passes,
        "seconds": round(time.perf_counter() - between, 1),
        "cpu": round(time.process_time() - between_cpu, 1),
        "trace": [round(between - start, 1), round(between_cpu - cpu, 1)],
    }


def won(row: dict[str, Any], by: str) -> bool:
    """Whether the circuit is nearer to 1 than another set in both."""
    own, other = row["measured"]["circuit"], row["measured"][by]
    return all(fit(own[x]) > fit(other[x]) for x in Shares._fields)


def table(rows: list[dict[str, Any]]) -> str:
    """Means over prompts of each task and of all."""
    key = jax.random.key(0)

    def say(values: list[float]) -> str:
        low, high = mean_interval(np.array(values), key)
        return f"{np.mean(values):.2f} ({low:.2f} to {high:.2f})"

    asked = [row for row in rows if row["leads"]["all"] > 0]
    good = [row for row in asked if not row["astray"]]
    head = "| task | prompts | features | set | sufficiency | necessity | won |"
    out = [
        f"{len(rows)} prompts; on {len(rows) - len(asked)} the model does not prefer "
        f"the answer, on {len(asked) - len(good)} features make too little of the "
        "lead. Means (95% over prompts).",
        "",
        head,
        "|---|---|---|---|---|---|---|",
    ]
    names = list(dict.fromkeys(row["task"] for row in good))
    for name in names + (["all"] if len(names) > 1 else []):
        mine = [row for row in good if name in ("all", row["task"])]
        for by in SETS:
            shares = [say([r["measured"][by][x] for r in mine]) for x in Shares._fields]
            first = (
                f"{name} | {len(mine)} | {np.median([r['features'] for r in mine]):g}"
            )
            against = ""
            if by != "circuit":
                n = sum(won(row, by) for row in mine)
                low, high = wilson(n, len(mine))
                against = f"{n / len(mine):.0%} ({low:.0%} to {high:.0%})"
            out.append(
                f"| {first if by == 'circuit' else ' | | '} | {by} | "
                f"{' | '.join(shares)} | {against} |"
            )
    reached = sum(row["reached"] for row in good)
    whole = [say([row["all"][x] for row in good]) for x in Shares._fields]
    cpu = [row["cpu"] for row in good]
    out += [
        "",
        f"Both reached the share that was asked for on {reached} of {len(good)}. All "
        f"candidates together: sufficiency {whole[0]}, necessity {whole[1]}. "
        f"{np.median([row['passes'] for row in good]):.0f} passes and "
        f"{np.median(cpu):.1f} CPU seconds a prompt after the trace (medians).",
    ]
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="addition")
    parser.add_argument("--dictionary", default="addition-clt")
    parser.add_argument("--tasks", nargs="+", default=["addition"])
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--max-features", type=int, default=None)
    parser.add_argument("--share", type=float, default=0.8)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    use_compilation_cache()
    model = jaxclt.load_model(args.model)
    dictionary = jaxclt.load_dictionary(args.dictionary, model)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "circuits.jsonl"
    rows = []
    if path.exists():
        rows = [json.loads(x) for x in path.read_text("utf-8").splitlines()]
    seen = {(row["task"], row["prompt"]) for row in rows}
    made = [tasks.make(x, args.n, tokenizer=model.tokenizer) for x in args.tasks]
    for example in (one for turn in zip(*made, strict=True) for one in turn):
        if (example.task, example.prompt) in seen:
            continue
        rows.append(of_prompt(model, dictionary, example, args))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        last = rows[-1]
        print(f"{len(rows)} {example.prompt!r}: {last['seconds']} s", flush=True)
        (args.out / "circuits.md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
