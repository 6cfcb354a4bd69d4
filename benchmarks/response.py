"""What `--attention 20` and `--response` cost beside a plain trace.

    python benchmarks/response.py --append benchmarks/RESULTS.md
    python benchmarks/response.py --smoke

The three take turns on one prompt in one process. In the first turn each compiles all
that it needs, with nothing kept from the others; the second is not counted. Edges by
value are equal before any time is printed, and those by response sum to their parts. A
trace is from the prompt's tokens to the graph; loading the model and writing files are
in none of the three.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
from _timing import Times, command_line, hardware_line, publish, timed, title
from long_prompt import HERE, SMOKE_MODEL, prompt_of

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "`--attention 20`": {"attention": 20},
    "`--response`": {"response": True},
}
GOALS = {"`--attention 20`": 1.3, "`--response`": 3.0}


def wrong(plain: Any, other: Any) -> str | None:
    """What differs between graphs that have to be alike."""
    if not np.array_equal(plain.edge_RN, other.edge_RN):
        return "edges by value differ"
    if other.response is None:
        return None
    parts, edge_RN = other.response.parts, other.response.edge_RN
    value_E = other.edge_RN[parts.row_E, parts.col_E]
    want_E = edge_RN[parts.row_E, parts.col_E]
    off = np.abs(value_E + parts.beside_value - want_E).max(initial=0)
    if off > 1e-4 * np.abs(want_E).max(initial=0):
        return f"parts do not sum to the response: off by {off:.1e}"
    return None


def measure(trace: Any, repeats: int) -> tuple[dict[str, list[Times]], Any]:
    """Times of the first and of further turns of every kind, and the last graph."""
    import jax

    turns: list[dict[str, tuple[float, float]]] = []
    graph = None
    for i in range(2 + repeats):
        graphs, turn = {}, {}
        for kind, asked in KINDS.items():
            if i == 0:
                jax.clear_caches()
            traced, wall, cpu = timed(lambda asked=asked: trace(asked))
            graphs[kind], turn[kind] = traced.graph, (wall, cpu)
            print(f"{kind}: {wall:.1f} s, {cpu:.1f} CPU s", file=sys.stderr)
        for kind, graph in graphs.items():
            if said := wrong(graphs["plain"], graph):
                sys.exit(f"{kind}: {said}")
        turns.append(turn)
    found = {
        kind: [
            Times(*map(list, zip(*(turn[kind] for turn in some), strict=True)))
            for some in (turns[:1], turns[2:])
        ]
        for kind in KINDS
    }
    return found, graph


def table(found: dict[str, list[Times]], graph: Any, max_features: int) -> list[str]:
    """Times, and ratios to the plain trace of the same turn."""
    lines = [
        f"{len(graph.token_T)} tokens, {graph.n_features:,} features "
        f"(`--max-features {max_features}`), {len(graph.response.parts.row_E):,} edges "
        "in parts:",
        "",
        "| trace | first CPU s | ratio | CPU s | ratio | wall s | ratio | goal |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    first, warm = found["plain"]
    for kind, (cold, times) in found.items():
        cpu = np.median(np.divide(times.cpu_s, warm.cpu_s))
        wall = np.median(np.divide(times.wall_s, warm.wall_s))
        lines.append(
            f"| {kind} | {cold.cpu_s[0]:.1f} | {cold.cpu_s[0] / first.cpu_s[0]:.2f} | "
            f"{np.median(times.cpu_s):.1f} | {cpu:.2f} | {np.median(times.wall_s):.1f} "
            f"| {wall:.2f} | {GOALS.get(kind, '')} |"
        )
    return [*lines, ""]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dictionary", default="neurons:32")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=["10:8192", "200:256"],
        metavar="TOKENS:FEATURES",
        help="longest prompt, and --max-features",
    )
    args: argparse.Namespace = parser.parse_args()
    if args.smoke:
        args.model, args.dictionary, args.repeats = str(SMOKE_MODEL), "neurons", 1
        args.sizes = ["10:64"]

    import jax

    import jaxclt
    from jaxclt.graph.attribute import AttributeConfig
    from jaxclt.trace.prompt import trace_prompt

    jax.config.update("jax_enable_compilation_cache", False)
    model = jaxclt.load_model(args.model)
    dictionary = jaxclt.load_dictionary(args.dictionary, model)
    readme = (HERE.parent / "README.md").read_text(encoding="utf-8")
    lines = [title("response"), "", f"{hardware_line()}.", ""]
    lines += [f"{Path(args.model).name}, {args.dictionary}.", ""]
    for n_tokens, features in (map(int, size.split(":")) for size in args.sizes):
        text = " ".join(itertools.repeat(readme, 1 + n_tokens // 400))
        if n_tokens <= 10:
            text = "The Eiffel Tower is in the city of"
        prompt = prompt_of(model.tokenizer, n_tokens, text)

        def trace(
            asked: dict[str, Any], prompt: str = prompt, features: int = features
        ) -> Any:
            config = AttributeConfig(max_features=features, **asked)
            return trace_prompt(model, dictionary, prompt, config=config)

        lines += table(*measure(trace, args.repeats), features)
    publish("\n".join(lines), args.append)


if __name__ == "__main__":
    main()
