"""Many prompts: `sweep_prompts`, against tracing them one by one; and a second start.

    JAXCLT_CACHE=... python benchmarks/sweep.py --append benchmarks/RESULTS.md
    python benchmarks/sweep.py --smoke

Every variant is a process of its own with an empty compilation cache, so that what it
compiles is in its time:

- `sweep`: `sweep_prompts`, lengths and capacities in buckets;
- `one by one`: `trace_prompt` and `write_trace` for each, which share those buckets;
- `exact shapes`: the same with the buckets taken out, which is what one gets by jitting
  a trace by itself.

Graphs must be equal before a time is printed. The second table is `jaxclt trace` from
the shell, twice with one cache: start to exit of a graph with few rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _timing import command_line, hardware_line, peak_rss_gib, publish, title

HERE = Path(__file__).resolve().parent
SMOKE_MODEL = HERE.parent / "tests/goldens/circuit_tracer_clt/model"
VARIANTS = ("sweep", "one by one", "exact shapes")


def worker(job: dict[str, Any]) -> None:
    """Trace all prompts in one way; seconds as JSON on stdout."""
    import jax

    import jaxclt
    from jaxclt import shapes
    from jaxclt.graph.attribute import AttributeConfig
    from jaxclt.trace.files import write_trace
    from jaxclt.trace.prompt import trace_prompt
    from jaxclt.trace.sweep import sweep_prompts

    if job["variant"] == "exact shapes":
        bucket = shapes.bucket
        for module in list(sys.modules.values()):
            if getattr(module, "bucket", None) is bucket:
                module.bucket = lambda n, smallest=8: max(n, 1)  # pyright: ignore
    compiled = 0.0

    def listen(event: str, seconds: float, **_: Any) -> None:
        nonlocal compiled
        if event.endswith("backend_compile_duration"):
            compiled += seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    model = jaxclt.load_model(job["model"])
    dictionary = jaxclt.load_dictionary(job["dictionary"], model)
    config = AttributeConfig(max_features=job["features"], tolerance=0.0)
    out = Path(job["out"])
    started = time.perf_counter()
    if job["variant"] == "sweep":
        index = sweep_prompts(model, dictionary, job["prompts"], out, config=config)
        folders = [out / line["directory"] for line in index]
    else:
        folders = []
        for i, prompt in enumerate(job["prompts"]):
            folders.append(out / f"{i:05d}")
            traced = trace_prompt(model, dictionary, prompt, config=config)
            write_trace(traced, folders[-1], save="pruned")
    seconds = time.perf_counter() - started
    result = {
        "seconds": seconds,
        "compiled": compiled,
        "peak_gib": peak_rss_gib(),
        "lengths": [len(model.tokenizer.encode(p, "auto")) for p in job["prompts"]],
        "folders": [str(folder) for folder in folders],
    }
    print(json.dumps(result))


def check_equal(found: dict[str, dict[str, Any]]) -> float:
    """Largest difference of an edge between variants, of the largest edge."""
    from jaxclt.io.graph_file import load_graph

    worst = 0.0
    first, *others = found.values()
    for i, folder in enumerate(first["folders"]):
        want = load_graph(Path(folder) / "graph.npz")
        for other in others:
            got = load_graph(Path(other["folders"][i]) / "graph.npz")
            if got.edge_RN.shape != want.edge_RN.shape:
                sys.exit(f"{folder}: other nodes than {other['folders'][i]}")
            gap = np.abs(got.edge_RN - want.edge_RN).max()
            worst = max(worst, float(gap / np.abs(want.edge_RN).max()))
    if worst > 1e-4:
        sys.exit(f"edges differ by {worst:.1e} of the largest: no times are printed")
    return worst


def starts(job: dict[str, Any], cache: Path) -> list[dict[str, float]]:
    """`jaxclt trace` from the shell, three times with one compilation cache."""
    found = []
    for i in range(3):
        out = Path(job["out"]) / f"start{i}"
        command = [
            sys.executable, "-m", "jaxclt", "trace", job["prompts"][0],
            "--model", job["model"], "--dictionary", job["dictionary"],
            "--max-features", "128", "--out", str(out),
        ]  # fmt: skip
        began = time.perf_counter()
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment
        )
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        wall = time.perf_counter() - began
        report = json.loads((out / "report.json").read_text())
        found.append({"wall": wall, **report["timing_s"]})
    return found


def section(
    found: dict[str, dict[str, Any]],
    again: list[dict[str, float]],
    same: float,
    job: dict[str, Any],
    hardware: str,
) -> str:
    lengths = found["sweep"]["lengths"]
    n = len(lengths)
    lines = [
        title("sweep"),
        "",
        f"{hardware}.",
        "",
        f"{n} prompts of {min(lengths)} to {max(lengths)} tokens ({len(set(lengths))} "
        f"lengths), {Path(job['model']).name}, {job['dictionary']}, {job['features']} "
        "features each, float32, files written; an empty compilation cache each; edges "
        f"equal to {same:.0e} of the largest.",
        "",
        "| | seconds | of it compiling | prompts a minute | against exact shapes | "
        "peak GiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    slowest = found["exact shapes"]["seconds"]
    for name, f in found.items():
        lines.append(
            f"| {name} | {f['seconds']:.1f} | {f['compiled']:.1f} | "
            f"{60 * n / f['seconds']:.1f} | {slowest / f['seconds']:.2f} | "
            f"{f['peak_gib']:.2f} |"
        )
    lines += [
        "",
        "`jaxclt trace` from the shell with 128 features, one compilation cache:",
        "",
        "| call | start to exit s | loading | compiling or reading the cache | "
        "all stages of the trace |",
        "| --- | --- | --- | --- | --- |",
    ]
    for i, t in enumerate(again, start=1):
        lines.append(
            f"| {i} | {t['wall']:.1f} | {t['load']:.1f} | {t['compile']:.1f} | "
            f"{t['total']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dictionary", default="neurons:32")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts.txt")
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(json.loads(args.worker))
        return
    prompts = [p for p in args.prompts.read_text().splitlines() if p.strip()]
    if args.smoke:
        args.model, args.dictionary = str(SMOKE_MODEL), "neurons"
        args.features, prompts = 64, ["Hello", "Hello world", "Hello you world"]
    hardware = hardware_line()
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "model": args.model,
            "dictionary": args.dictionary,
            "features": args.features,
            "prompts": prompts,
            "out": folder,
        }
        found: dict[str, dict[str, Any]] = {}
        for variant in VARIANTS:
            mine = job | {"variant": variant, "out": f"{folder}/{variant}"}
            command = [sys.executable, __file__, "--worker", json.dumps(mine)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{variant}\n{done.stderr[-2000:]}")
            found[variant] = json.loads(done.stdout.splitlines()[-1])
            print(variant, round(found[variant]["seconds"], 1), "s", flush=True)
        same = check_equal(found)
        again = starts(job, Path(folder) / "cache")
    text = section(found, again, same, job, hardware)
    publish(text, args.append)


if __name__ == "__main__":
    main()
