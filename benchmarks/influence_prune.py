"""Influence and pruning of a graph of 10,000 nodes, and circuit-tracer's of the same.

    python benchmarks/influence_prune.py --repeats 9 \
        --peer-python peer/bin/python --append benchmarks/RESULTS.md
    python benchmarks/influence_prune.py --smoke [--peer-python peer/bin/python]

The graph is random: strictly layered, causal, with sources of very different strength.
Ours is `solve_influence` and `prune` with all they need (row sums included), in
circuit-tracer's convention; the peer's is `prune_graph`, which does both. Times are
printed only if both find the same influence within 1e-5 of the largest, keep the same
nodes, and keep the same edges but for at most 1 in 1,000: circuit-tracer adds up the
mass of 100 million sorted scores in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from _timing import (
    command_line,
    hardware_line,
    load_average,
    publish,
    repeat,
    title,
)

THRESHOLDS = (0.8, 0.98)  # of nodes and edges


def random_graph(n_nodes: int, n_layers: int, n_tokens: int, n_targets: int) -> Any:
    """A `Graph` of so many nodes, float32, in circuit-tracer's convention."""
    import jax
    import jax.numpy as jnp

    from jaxclt.graph.graph import Graph, GraphMeta, Pruning

    L, T, K = n_layers, n_tokens, n_targets
    A = n_nodes - L * T - T - K
    N, R = A + L * T + T, A + K
    key_size, key_pos, key_edge = jax.random.split(jax.random.key(0), 3)
    layer_A = np.arange(A) * L // A
    pos_A = np.asarray(jax.random.randint(key_pos, (A,), 0, T))
    order = np.lexsort((pos_A, layer_A))
    layer_A, pos_A = layer_A[order], pos_A[order]
    layer_N = np.r_[layer_A, np.repeat(np.arange(L), T), np.full(T, -1)]
    pos_N = np.r_[pos_A, np.tile(np.arange(T), L), np.arange(T)]
    layer_R, pos_R = np.r_[layer_A, np.full(K, L)], np.r_[pos_A, np.full(K, T - 1)]
    strength_N = jnp.exp(1.5 * jax.random.normal(key_size, (N,)))
    edge_RN = np.zeros((R, N), np.float32)
    for start in range(0, R, 512):
        part = slice(start, min(start + 512, R))
        there = layer_N < layer_R[part, None]
        there &= pos_N <= pos_R[part, None]
        key = jax.random.fold_in(key_edge, start)
        edge_RN[part] = jax.random.normal(key, there.shape) * strength_N * there
    prob_K = np.float32(0.5) ** np.arange(1, K + 1, dtype=np.float32)
    tokens = ("t",) * T
    return Graph(
        meta=GraphMeta(
            model="random",
            dictionary="random",
            prompt="",
            tokens=tokens,
            target_tokens=("k",) * K,
            n_layers=L,
            convention="circuit-tracer",
        ),
        token_T=np.zeros(T, np.int32),
        layer_A=layer_A,
        pos_A=pos_A,
        feature_A=np.arange(A),
        value_A=np.ones(A, np.float32),
        preact_A=np.ones(A, np.float32),
        attributed_R=np.ones(R, bool),
        target_token_K=np.arange(K),
        target_prob_K=prob_K,
        edge_RN=edge_RN,
        bias_R=np.zeros(R, np.float32),
        rest_R=np.zeros(R, np.float32),
        rest_abs_R=np.zeros(R, np.float32),
        readout_R=edge_RN.sum(1),
        influence_N=np.zeros(N, np.float32),
        pruning=Pruning(
            keep_N=np.ones(N, bool),
            keep_edge_RN=np.ones((1, 1), bool),
            node_threshold=1.0,
            edge_threshold=1.0,
        ),
    )


def ours(graph: Any, n: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Times of n runs, the first of all runs apart, and what was found."""
    from jaxclt.graph.influence import solve_influence
    from jaxclt.graph.prune import prune
    from jaxclt.graph.scores import shares_total

    split: list[tuple[float, float]] = []
    last: list[Any] = []

    def run() -> None:
        fresh = dataclasses.replace(graph)  # forgets its cached row sums
        start = time.perf_counter()
        total_R = shares_total(fresh)
        found = solve_influence(fresh.edge_RN, total_R, fresh.target_prob_K)
        middle = time.perf_counter()
        fresh = dataclasses.replace(fresh, influence_N=found)
        node, edge = THRESHOLDS
        pruning = prune(fresh, node_threshold=node, edge_threshold=edge)
        split.append((middle - start, time.perf_counter() - middle))
        last[:] = [found, pruning]

    first = repeat(run, 1)
    times = repeat(run, n)
    influence_s, prune_s = zip(*split[1:], strict=True)
    report = times.summary() | {
        "first_s": first.wall_s[0],
        "influence_s": statistics.median(influence_s),
        "prune_s": statistics.median(prune_s),
    }
    found, pruning = last
    row, col = np.nonzero(pruning.keep_edge_RN)
    return report, {
        "influence_N": found,
        "keep_N": pruning.keep_N,
        "edge_E": row.astype(np.int64) * len(found) + col,
    }


def peer_process(args: argparse.Namespace, graph: Any) -> tuple[dict, dict]:
    """The same by circuit-tracer, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("graph.npz", "answer.npz")]
        np.savez(
            files[0],
            edge_RN=graph.edge_RN,
            prob_K=graph.target_prob_K,
            sizes=[graph.n_features, graph.n_tokens, graph.n_targets],
        )
        command = [args.peer_python, __file__, "--worker", *files]
        done = subprocess.run(
            [*command, "--repeats", str(min(args.repeats, 3))],
            check=True,
            text=True,
            stdout=subprocess.PIPE,
        )
        with np.load(files[1]) as answer:
            return json.loads(done.stdout.splitlines()[-1]), dict(answer)


def peer_worker(args: argparse.Namespace) -> None:
    """Runs with the peer's Python."""
    import torch
    from circuit_tracer.graph import compute_node_influence, prune_graph

    with np.load(args.worker[0]) as file:
        edge_RN, prob_K = torch.from_numpy(file["edge_RN"]), file["prob_K"]
        A, T, K = file["sizes"].tolist()
    N = edge_RN.shape[1]
    matrix = torch.zeros(N + K, N + K)
    matrix[:A, :N], matrix[N:, :N] = edge_RN[:A], edge_RN[A:]
    graph: Any = SimpleNamespace(
        input_tokens=range(T),
        logit_targets=range(K),
        selected_features=range(A),
        adjacency_matrix=matrix,
        logit_probabilities=torch.from_numpy(prob_K),
    )
    weight = torch.zeros(N + K)
    weight[N:] = graph.logit_probabilities
    last: list[Any] = []
    load = load_average()

    def run() -> None:
        last[:] = [prune_graph(graph, *THRESHOLDS)]

    run()
    times = repeat(run, args.repeats)
    node, edge, _ = last[0]
    row, col = (x.numpy() for x in torch.nonzero(edge, as_tuple=True))
    row = np.where(row >= N, row - N + A, row)
    np.savez(
        args.worker[1],
        influence_N=compute_node_influence(matrix, weight).numpy()[:N],
        keep_N=node.numpy()[:N],
        edge_E=row.astype(np.int64) * N + col,
    )
    print(json.dumps(times.summary() | {"load_average": load}))


def exact_influence(graph: Any) -> np.ndarray:
    """Influence in float64, path length by path length, [N]."""
    A, N = graph.n_features, graph.edge_RN.shape[1]
    share_RN = np.abs(graph.edge_RN.astype(np.float64))
    share_RN /= np.maximum(share_RN.sum(1, keepdims=True), 1e-300)
    step_N = graph.target_prob_K.astype(np.float64) @ share_RN[A:]
    total_N = np.zeros(N)
    while step_N.any():
        total_N += step_N
        step_N = step_N[:A] @ share_RN[:A]
    return total_N


def differences(
    graph: Any, ours: dict[str, np.ndarray], peer: dict[str, np.ndarray]
) -> str:
    """How far both are from float64, and from each other in what is kept.

    Exits with 1 if ours is off, or if they did not keep the same graph.
    """
    exact_N = exact_influence(graph)
    off, theirs = (
        float(np.abs(x["influence_N"] - exact_N).max() / exact_N.max())
        for x in (ours, peer)
    )
    nodes = int((ours["keep_N"] != peer["keep_N"]).sum())
    edges = len(np.setxor1d(ours["edge_E"], peer["edge_E"]))
    text = (
        f"influence off by {off:.1e} of the largest (circuit-tracer's by {theirs:.1e}) "
        f"against float64, {nodes} nodes and {edges:,} of {len(peer['edge_E']):,} kept "
        "edges differ"
    )
    if off > 1e-5 or theirs > 1e-4 or nodes or edges > len(peer["edge_E"]) / 1000:
        sys.exit(f"not the same graph: {text}")
    return text


def section(graph: Any, our: dict, found: dict, peer: dict | None, same: str) -> str:
    """What goes into RESULTS.md."""
    lines = [
        title("influence_prune"),
        "",
        f"{hardware_line()}.",
        "",
        f"{graph.edge_RN.shape[1] + graph.n_targets:,} nodes "
        f"({graph.n_features:,} features in {graph.n_layers} layers), random strictly "
        f"layered graph, float32; {int(found['keep_N'].sum()):,} nodes and "
        f"{len(found['edge_E']):,} edges kept at {THRESHOLDS[0]:g} and "
        f"{THRESHOLDS[1]:g}.",
        "",
        "| tool | influence + prune wall s, median (min) | CPU s | peer / ours |",
        "| --- | --- | --- | --- |",
        f"| jaxclt, first call (compiles) | {our['first_s']:.3f} |  |  |",
        f"| jaxclt, n={len(our['wall_s'])} (influence {our['influence_s']:.3f}, "
        f"prune {our['prune_s']:.3f}) | {our['wall_median_s']:.3f} "
        f"({our['wall_min_s']:.3f}) | {our['cpu_median_s']:.3f} |  |",
    ]
    if peer:
        wall, cpu = (
            peer[name] / our[name] for name in ("wall_median_s", "cpu_median_s")
        )
        lines += [
            f"| circuit-tracer 0.5.0, n={len(peer['wall_s'])} | "
            f"{peer['wall_median_s']:.2f} ({peer['wall_min_s']:.2f}) | "
            f"{peer['cpu_median_s']:.2f} | {wall:.0f} wall, {cpu:.0f} CPU |",
            "",
            f"Load average {peer['load_average']} at the peer's start. Same graph: "
            f"{same}.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--peer-python", help="python that has circuit-tracer")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        peer_worker(args)
        return
    if args.smoke:
        args.nodes, args.repeats = 600, 2
    shape = (8, 5, 4) if args.smoke else (30, 10, 10)
    graph = random_graph(args.nodes, *shape)
    our, found = ours(graph, args.repeats)
    peer, same = None, ""
    if args.peer_python:
        peer, answer = peer_process(args, graph)
        same = differences(graph, found, answer)
    text = section(graph, our, found, peer, same)
    publish(text, args.append)


if __name__ == "__main__":
    main()
