"""How many rows a tolerance needs, and what the graph of those rows is off by.

    JAXCLT_CACHE=... python benchmarks/tolerance_rows.py --out out/tolerance \
        --model smollm2-135m --dictionary neurons:32 --append benchmarks/RESULTS.md
    python benchmarks/tolerance_rows.py --smoke

Every prompt is traced once with all rows. Rows do not depend on each other, so that
what `attribute` would compute at a tolerance is replayed on them: influence that has
arrived, the strongest open features next, stop when what is open is below. That is done
in small steps, which is close to the fewest rows such an order needs, and in the steps
of `AttributeConfig`. The graph of 2% is then pruned and held against the exact one:
every node's influence, both scores and the node sets must be within the bounds that are
proved in `jaxclt.graph.scores`, or the script exits with 1.

Prompts already in OUT/rows.jsonl are not traced again.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from _timing import command_line, hardware_line, publish, title

from jaxclt.graph.attribute import AttributeConfig
from jaxclt.graph.explore import next_features
from jaxclt.graph.graph import Graph
from jaxclt.graph.influence import solve_influence
from jaxclt.graph.prune import kept_by_mass, prune, restrict
from jaxclt.graph.scores import scores, shares_total
from jaxclt.io.dictionary import load_dictionary
from jaxclt.io.model import load_model
from jaxclt.trace.prompt import trace_prompt

HERE = Path(__file__).resolve().parent
SMOKE_MODEL = HERE.parent / "tests/goldens/circuit_tracer_clt/model"
TOLERANCES = (0.05, 0.02, 0.01)
EXACT = AttributeConfig(max_features=None, tolerance=0.0)
EPS = 1e-5  # rounding of float32 influence


class Replay:
    """Exploration on rows that are all known already."""

    def __init__(self, graph: Graph) -> None:
        A = self.A = graph.n_features
        # As `attribute` ranks: shares of the edges alone.
        total_R = np.where(graph.row_strength > 0, graph.row_strength, 1)
        weight_K = graph.target_prob_K / graph.target_prob_K.sum()
        self.direct_A = (weight_K / total_R[A:]) @ np.abs(graph.edge_RN[A:, :A])
        self.share_AA = np.abs(graph.edge_RN[:A, :A])
        self.share_AA /= total_R[:A, None]
        self.start_L = np.searchsorted(graph.layer_A, np.arange(graph.n_layers + 1))

    def arrived(self, explored_A: np.ndarray) -> np.ndarray:
        """`arrived_influence`, without copying the known rows."""
        visit_A = self.direct_A.astype(np.float32)
        for lo, hi in reversed(list(zip(self.start_L, self.start_L[1:], strict=False))):
            step = visit_A[lo:hi] * explored_A[lo:hi]
            visit_A[:lo] += step @ self.share_AA[lo:hi, :lo]
        return visit_A

    def explore(self, tolerances: tuple[float, ...], at_once: int) -> list[np.ndarray]:
        """Explored features at each tolerance, descending ones, [A] of bool each."""
        explored_A, found = np.zeros(self.A, bool), []
        while len(found) < len(tolerances):
            visit_A = self.arrived(explored_A)
            chosen, unexplored = next_features(visit_A, ~explored_A, at_once)
            while len(found) < len(tolerances) and (
                unexplored <= tolerances[len(found)] or explored_A.all()
            ):
                found.append(explored_A.copy())
            explored_A[chosen] = True
        return found


def truncated(graph: Graph, explored_A: np.ndarray) -> Graph:
    """The graph of some rows; everything else is its rest."""
    keep_N = np.ones(graph.edge_RN.shape[1], bool)
    keep_N[graph.feature_cols] = explored_A
    pruning = dataclasses.replace(graph.pruning, keep_N=keep_N)
    part = restrict(dataclasses.replace(graph, pruning=pruning))
    found = solve_influence(part.edge_RN, shares_total(part), part.target_prob_K)
    return dataclasses.replace(part, influence_N=found)


def compare(exact: Graph, explored_A: np.ndarray) -> dict[str, Any]:
    """The truncated graph against the exact one, and whether all bounds hold."""
    part = truncated(exact, explored_A)
    true, known = scores(exact), scores(part)
    W = float(exact.target_prob_K.sum())
    U = known.unexplored_share
    N = exact.edge_RN.shape[1]
    col = np.r_[np.flatnonzero(explored_A), np.arange(exact.n_features, N)]
    influence_N = np.zeros(N)  # none for what is left out
    influence_N[col] = part.influence_N
    gain_N = exact.influence_N - influence_N
    holds = gain_N.min() > -EPS and gain_N.max() <= U * W + EPS
    for name in ("replacement", "completeness"):
        low, high = getattr(known, name), getattr(known, f"{name}_at_most")
        holds &= low - EPS <= getattr(true, name) <= high + EPS
    threshold = EXACT.node_threshold
    one, other = (
        kept_by_mass(x, threshold, ties=False) for x in (exact.influence_N, influence_N)
    )
    holds &= near_threshold(one & ~other, influence_N, exact, U * W)
    holds &= near_threshold(other & ~one, exact.influence_N, exact, U * W)
    edges = {"exact": prune(exact), "part": prune(part)}
    row = np.r_[np.flatnonzero(explored_A), np.arange(exact.n_features, N)]
    row = row[: part.n_features].tolist()
    row += list(range(exact.n_features, len(exact.edge_RN)))
    at = np.flatnonzero(edges["exact"].keep_edge_RN)
    row_E, col_E = np.nonzero(edges["part"].keep_edge_RN)
    same = np.intersect1d(at, np.asarray(row)[row_E] * N + col[col_E])
    return {
        "bound": U,
        "holds": bool(holds),
        "largest_gain": float(gain_N.max()) / W,
        "replacement": [known.replacement, true.replacement, known.replacement_at_most],
        "completeness": [
            known.completeness,
            true.completeness,
            known.completeness_at_most,
        ],
        "kept": [int(one.sum()), int(other.sum()), int((one & other).sum())],
        "edges": [len(at), len(row_E), len(same)],
    }


def near_threshold(
    node_N: np.ndarray, influence_N: np.ndarray, exact: Graph, slack: float
) -> bool:
    """Whether nodes that only the other graph keeps are next to the threshold."""
    off = (exact.n_layers + 1) * slack + EPS
    total = influence_N.sum()
    order = np.sort(influence_N)[::-1]
    mass = np.r_[0, np.cumsum(order)]
    ahead = mass[np.searchsorted(-order, -(influence_N[node_N] + slack + EPS))]
    return bool((ahead <= EXACT.node_threshold * total + off).all())


def measure(model: Any, dictionary: Any, prompt: str) -> dict[str, Any]:
    """Rows of every tolerance for one prompt, and the comparison at 2%."""
    start = time.perf_counter()
    graph = trace_prompt(model, dictionary, prompt, config=EXACT).graph
    traced_s = time.perf_counter() - start
    replay, A = Replay(graph), graph.n_features
    steps = max(512, -(-min(A, AttributeConfig.max_features or A) // 4))
    fine = replay.explore(TOLERANCES, 128)
    coarse = replay.explore(TOLERANCES, steps)
    del replay
    return {
        "prompt": prompt,
        "tokens": graph.n_tokens,
        "features": A,
        "rows": {f"{t:g}": int(x.sum()) for t, x in zip(TOLERANCES, fine, strict=True)},
        "rows_in_steps": {
            f"{t:g}": int(x.sum()) for t, x in zip(TOLERANCES, coarse, strict=True)
        },
        "at_2%": compare(graph, fine[TOLERANCES.index(0.02)]),
        "exact_s": traced_s,
    }


def spread(values: list[float]) -> str:
    """Median and range, in percent."""
    middle = statistics.median(values)
    return f"{100 * middle:.0f}% ({100 * min(values):.0f} to {100 * max(values):.0f})"


def section(lines: list[dict[str, Any]], model: str, dictionary: str) -> str:
    """What goes into RESULTS.md."""
    at = [line["at_2%"] for line in lines]
    tokens = [line["tokens"] for line in lines]
    features = [line["features"] for line in lines]
    text = [
        title("tolerance_rows"),
        "",
        f"{hardware_line()}. No time is measured here.",
        "",
        f"{model}, {dictionary}, float32; {len(lines)} prompts of {min(tokens)} to "
        f"{max(tokens)} tokens, {min(features):,} to {max(features):,} active "
        "features. Share of the active features whose rows are needed, median (range):",
        "",
        "| tolerance | in steps of 128 rows | in the steps of `attribute` |",
        "| --- | --- | --- |",
    ]
    for t in TOLERANCES:
        shares = [
            spread([line[key][f"{t:g}"] / line["features"] for line in lines])
            for key in ("rows", "rows_in_steps")
        ]
        text.append(f"| {t:.0%} | {shares[0]} | {shares[1]} |")
    held = sum(x["holds"] for x in at)

    def common(key: str) -> str:
        values = [x[key][2] / max(1, *x[key][:2]) for x in at]
        return spread(values)

    def off(name: str) -> str:
        low = max(x[name][1] - x[name][0] for x in at)
        room = max(x[name][2] - x[name][0] for x in at)
        return f"{name} by {low:.4f} at most (bound: up to {room:.4f})"

    gain = max(x["largest_gain"] for x in at)
    bound = max(x["bound"] for x in at)
    text += [
        "",
        f"At 2% every bound holds on {held} of {len(at)} prompts. The exact graph "
        f"differs from the truncated one in a node's influence by {gain:.4f} at most "
        f"(bound: up to {bound:.4f}), in {off('replacement')}, in "
        f"{off('completeness')}. Pruned at 0.8 and 0.98, of what the larger of the two "
        f"keeps {common('kept')} of the nodes and {common('edges')} of the edges are "
        "in both.",
    ]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dictionary", default="neurons:32")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts.txt")
    parser.add_argument("--out", type=Path, default=Path("out/tolerance_rows"))
    args = parser.parse_args()
    prompts = args.prompts.read_text(encoding="utf-8").split("\n")[:-1]
    if args.smoke:
        args.model, args.dictionary = str(SMOKE_MODEL), "neurons:12"
        prompts = ["w7 w31 w7 w55 w12 w90", "w3 w14 w15 w92 w65 w35"]
    args.out.mkdir(parents=True, exist_ok=True)
    cache = args.out / "rows.jsonl"
    key = [args.model, args.dictionary]
    old = cache.read_text().splitlines() if cache.is_file() else []
    done = {x["prompt"]: x for x in map(json.loads, old) if x["key"] == key}
    model = load_model(args.model)
    dictionary = load_dictionary(args.dictionary, model)
    for prompt in prompts:
        if prompt not in done:
            done[prompt] = measure(model, dictionary, prompt) | {"key": key}
            with cache.open("a") as stream:
                stream.write(json.dumps(done[prompt]) + "\n")
            line = done[prompt]
            print(f"{prompt!r}: {line['rows']} of {line['features']} rows", flush=True)
    lines = [done[prompt] for prompt in prompts]
    text = section(lines, args.model, args.dictionary)
    good = all(line["at_2%"]["holds"] for line in lines)
    publish(text, args.append if good else None)
    if not good:
        sys.exit("a bound does not hold")


if __name__ == "__main__":
    main()
