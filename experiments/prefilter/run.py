"""How much of a full graph's influence do shortlisted nodes hold?

    python experiments/prefilter/run.py --model M --dictionary D --globals DIR \
        --prompts FILE --out DIR

Every prompt is traced in full. What a choice of nodes keeps is the share of the full
graph's influence (of features) that they have there, see `CHOICES`. Writes
DIR/results.json and DIR/table.md after every prompt.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np

import jaxclt
from jaxclt.cli.common import use_compilation_cache
from jaxclt.clt.active import Active
from jaxclt.global_weights.files import load_globals
from jaxclt.global_weights.ranking import Links
from jaxclt.global_weights.shortlist import Shortlist
from jaxclt.graph.attribute import AttributeConfig
from jaxclt.graph.graph import Graph
from jaxclt.graph.scores import shares_total
from jaxclt.trace.prompt import trace_prompt
from jaxclt.validation.stats import mean_interval

CHOICES = {
    "globals": "the shortlist of `trace --prefilter`",
    "direct": "the same without links: influence that targets pass on directly",
    "activation": "the largest activations",
    "rows": "`trace --max-features`: by the influence found so far, no shortlist",
    "best": "the most influential ones of the full graph (no choice can keep more)",
}
SHARES = (0.1, 0.25, 0.5, 0.6, 0.75)


def guesses(graph: Graph, links: Links) -> dict[str, np.ndarray]:
    """What each choice ranks features by, [A]."""
    A = graph.n_features
    share_RN = np.abs(graph.edge_RN) / shares_total(graph)[:, None]
    visit_A = graph.target_prob_K @ share_RN[A:, :A]
    # all that the guess looks at
    active = SimpleNamespace(
        layer_A=graph.layer_A,
        pos_A=graph.pos_A,
        feature_A=graph.feature_A,
        value_A=graph.value_A,
        n_layers=graph.meta.n_layers,
    )
    return {
        "globals": Shortlist(links, 1).guess(cast(Active, active), visit_A),
        "direct": visit_A,
        "activation": graph.value_A,
        "best": graph.influence_N[:A],
    }


def of_prompt(
    model: Any, dictionary: Any, links: Links, prompt: str
) -> list[dict[str, Any]]:
    """One row for every share and choice."""

    def run(size: int | None) -> Graph:
        config = AttributeConfig(max_features=size, tolerance=0.0)
        return trace_prompt(model, dictionary, prompt, config=config).graph

    full = run(None)
    A = full.n_features
    influence_A = full.influence_N[:A]
    place = {node: i for i, node in enumerate(nodes(full))}
    ranked = {k: np.argsort(-x, kind="stable") for k, x in guesses(full, links).items()}
    rows = []
    for share in SHARES:
        size = max(1, round(share * A))
        for choice in CHOICES:
            if choice == "rows":
                chosen = [place[node] for node in nodes(run(size))]
            else:
                chosen = ranked[choice][:size]
            kept = float(influence_A[chosen].sum() / influence_A.sum())
            rows.append({"share": share, "choice": choice, "kept": kept, "active": A})
    return rows


def nodes(graph: Graph) -> list[tuple[int, ...]]:
    rows = np.stack([graph.layer_A, graph.pos_A, graph.feature_A], 1)
    return [tuple(row) for row in rows.tolist()]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| nodes | {' | '.join(CHOICES)} |",
        f"| --- |{' --- |' * len(CHOICES)}",
    ]
    for share in SHARES:
        cells = []
        for choice in CHOICES:
            these = [r for r in rows if (r["share"], r["choice"]) == (share, choice)]
            value = np.array([r["kept"] for r in these])
            low, high = mean_interval(value, jax.random.key(0))
            cells.append(f"{value.mean():.1%} ({low:.1%} to {high:.1%})")
        lines.append(f"| {share:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dictionary", required=True)
    parser.add_argument("--globals", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="one a line")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    use_compilation_cache()
    model = jaxclt.load_model(args.model)
    dictionary = jaxclt.load_dictionary(args.dictionary, model)
    links = load_globals(args.globals).links
    prompts = [line for line in args.prompts.read_text().splitlines() if line.strip()]
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for i, prompt in enumerate(prompts):
        started = time.perf_counter()
        found = of_prompt(model, dictionary, links, prompt)
        rows += [{"prompt": prompt, **row} for row in found]
        told = {"model": args.model, "links": len(links), "rows": rows}
        (args.out / "results.json").write_text(json.dumps(told, indent=1))
        (args.out / "table.md").write_text(table(rows) + "\n")
        seconds = time.perf_counter() - started
        print(f"{i + 1}/{len(prompts)} {seconds:.0f} s {prompt!r}", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
