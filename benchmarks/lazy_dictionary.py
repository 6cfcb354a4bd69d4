"""A dictionary three times larger than the memory allowed, traced through lazy rows.

    python benchmarks/make_synthetic_dictionary.py --model smollm2-135m --kind clt \
        --features 6144 --active 16 --blind-first --out /tmp/large
    python benchmarks/lazy_dictionary.py --dictionary /tmp/large \
        --append benchmarks/RESULTS.md
    python benchmarks/lazy_dictionary.py --smoke

Two processes trace the same prompt three times each: one reads the dictionary row by
row from disk and may hold a third of the dictionary's size (`RLIMIT_DATA`, as by
`ulimit -d`: all that is not a mapped file), the other loads it into memory first. Both
must make the same graph. The first call of each compiles, and the lazy one's finds
what the system's file cache happens to hold.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _timing import (
    command_line,
    hardware_line,
    peak_rss_gib,
    publish,
    rss_gib,
    title,
)

GOLDEN = Path(__file__).resolve().parents[1] / "tests/goldens/circuit_tracer_clt"
PROMPT = "The Eiffel Tower is in the city of"


def size_of(dictionary: Path) -> int:
    return sum(file.stat().st_size for file in dictionary.glob("*.safetensors"))


def child(args: argparse.Namespace) -> None:
    """Trace in this process, and print what it took as JSON."""
    if args.limit:
        resource.setrlimit(resource.RLIMIT_DATA, (args.limit, args.limit))
    import jaxclt
    from jaxclt.clt.store import ParamsStore
    from jaxclt.clt.transcoder import StoreDictionary
    from jaxclt.graph.attribute import AttributeConfig
    from jaxclt.io.dictionary import load_params
    from jaxclt.trace.prompt import trace_prompt

    model = jaxclt.load_model(args.model)
    dictionary: Any = jaxclt.load_dictionary(args.dictionary, model)
    load = 0.0
    if not args.lazy:
        started = time.perf_counter()
        params, _ = load_params(args.dictionary)
        load = time.perf_counter() - started
        dictionary = StoreDictionary(
            ParamsStore(params, dictionary.cfg),
            name=dictionary.name,
            hash=dictionary.hash,
        )
    seconds = []
    for _ in range(args.repeats):
        started = time.perf_counter()
        traced = trace_prompt(
            model,
            dictionary,
            PROMPT if not args.smoke else "w3 w4 w7 w19 w28",
            config=AttributeConfig(
                max_features=args.max_features, memory_gb=args.memory, tolerance=0.0
            ),
        )
        seconds.append(round(time.perf_counter() - started, 2))
    graph = traced.graph
    told = {
        "seconds": seconds,
        "load": load,
        "active": traced.n_active,
        "nodes": graph.n_features,
        "peak_gib": peak_rss_gib(),
        "held_gib": rss_gib(),
        "hardware": hardware_line(),
        "edges": [float(abs(graph.edge_RN).sum()), float(graph.edge_RN.sum())],
    }
    sys.stdout.write(json.dumps(told) + "\n")


def run(args: argparse.Namespace, *more: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", *more]
    # glibc's arena per thread would be counted though nothing is in it
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        sys.exit(f"{' '.join(more)}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dictionary", type=Path)
    parser.add_argument("--max-features", type=int, default=2048)
    parser.add_argument("--memory", type=float, help="GB the trace may plan with")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--lazy", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.model, args.dictionary = str(GOLDEN / "model"), GOLDEN / "dictionary"
    if args.child:
        child(args)
        return
    size = size_of(args.dictionary)
    limit = 0 if args.smoke else size // 3
    lazy = run(args, "--lazy", *(["--limit", str(limit)] if limit else []))
    memory = run(args)
    for a, b in zip(lazy["edges"], memory["edges"], strict=True):
        assert abs(a - b) <= 1e-5 * abs(memory["edges"][0]), (a, b)
    lines = [
        title("lazy_dictionary"),
        "",
        f"{lazy['hardware']}.",
        "",
        f"{Path(args.model).name}, a dictionary of {size / 1e9:.2f} GB, "
        f"{lazy['active']:,} active features, {lazy['nodes']:,} attributed; equal "
        f"graphs. Lazy rows under `ulimit -d` of {limit / 1e9:.2f} GB:",
        "",
        "| | loading, s | first, compiles, s | then, s | most held, GiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, found in (("lazy rows", lazy), ("in memory", memory)):
        first, *then = found["seconds"]
        lines.append(
            f"| {name} | {found['load']:.1f} | {first:.1f} | "
            f"{', '.join(f'{s:.1f}' for s in then)} | {found['peak_gib']:.2f} |"
        )
    ratio = min(lazy["seconds"][1:]) / min(memory["seconds"][1:])
    lines += [
        "",
        f"Lazy rows take {ratio:.2f} times as long, loading not counted. What is held "
        "includes pages of mapped files, which the system takes back when it must.",
    ]
    section = "\n".join(lines) + "\n"
    publish(section, args.append)


if __name__ == "__main__":
    main()
