"""How the time and memory of a graph grow with tokens, features and layers.

    python benchmarks/growth.py --out /tmp/growth --append benchmarks/RESULTS.md
    python benchmarks/growth.py --smoke

Random models of SmolLM2-135M's width; the features are their own strongest neurons, so
that each axis changes one number only: tokens (K features a layer and position, a fixed
number of rows), features (rows and columns both), layers. Every point is a process of
its own, traced twice, once if that takes over a minute; the last time counts, peak
memory is of both. Points in OUT/growth.json are not run again. Writes one plot and a
table with the exponent of each curve, fitted to its upper half on a log scale.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from _timing import (
    command_line,
    hardware_line,
    load_average,
    peak_rss_gib,
    publish,
    title,
)

AXES = {
    "tokens": [8, 16, 32, 64, 128, 256, 512, 1024, 2048],
    "features": [1024, 2048, 4096, 8192, 16384],
    "layers": [4, 8, 16, 30],
}
SMOKE = {"tokens": [8, 16], "features": [128, 256], "layers": [2, 4]}


def shape(axis: str, size: int, smoke: bool) -> dict[str, Any]:
    """What to trace at one point: tokens, features of a layer and position, layers."""
    layers = 3 if smoke else 30
    match axis:
        case "tokens":
            rows = 32 if smoke else 256
            return {"tokens": size, "k": 8, "layers": layers, "rows": rows}
        case "features":
            k = max(1, round(size / (layers * 8)))
            return {"tokens": 8, "k": k, "layers": layers, "rows": None}
    return {"tokens": 8, "k": 8, "layers": size, "rows": None}


def worker(point: dict[str, Any]) -> None:
    """Trace one random prompt twice; the second run as JSON on stdout."""
    import jax
    import jax.numpy as jnp

    from jaxclt.clt.active import active_features
    from jaxclt.clt.neurons import NeuronDictionary
    from jaxclt.graph.attribute import AttributeConfig, Timing, attribute_recording
    from jaxclt.graph.graph import GraphMeta
    from jaxclt.graph.memory import available_bytes, patterns_kept
    from jaxclt.graph.prompt import Prompt
    from jaxclt.graph.targets import salient_targets
    from jaxclt.lm.config import LMConfig
    from jaxclt.testing.random_lm import random_lm
    from jaxclt.trace.record import record_prompt

    T, L = point["tokens"], point["layers"]
    cfg = LMConfig(
        n_layers=L,
        d_model=576,
        n_heads=9,
        n_kv_heads=3,
        d_head=64,
        d_mlp=1536,
        d_vocab=1024,
        n_ctx=8192,
    )
    params = random_lm(jax.random.key(0), cfg)
    token_T = jax.random.randint(jax.random.key(1), (T,), 0, cfg.d_vocab, jnp.int32)
    config = AttributeConfig(max_features=point["rows"], tolerance=0.0)
    meta = GraphMeta(
        model="random",
        dictionary="neurons",
        prompt="",
        tokens=("t",) * T,
        target_tokens=("t",) * 10,
        n_layers=L,
    )
    keep = patterns_kept(cfg, T, available_bytes())
    timing = Timing()
    for _ in range(2):
        timing = Timing()
        recording = record_prompt(params, token_T, cfg, keep_patterns=keep)
        active = active_features(NeuronDictionary(point["k"]), params, recording, cfg)
        targets = salient_targets(params, recording.out_TD[-1])
        prompt = Prompt(params, recording, active, targets, cfg=cfg, config=config)
        attribute_recording(prompt, meta, timing=timing)
        if timing.seconds["attribute"] > 60:
            break
    result = {
        "seconds": timing.seconds["attribute"],
        "reduce": timing.seconds["influence"] + timing.seconds["prune"],
        "peak_gib": peak_rss_gib(),
        "active": len(active.layer_A),
        **{k: timing.work[k] for k in ("direction", "tflop", "patterns")},
    }
    print(json.dumps(result))


def exponent(size: list[int], value: list[float]) -> float:
    """Slope on a log-log scale over the upper half of a curve."""
    half = len(size) // 2 if len(size) > 2 else 0
    return float(np.polyfit(np.log(size[half:]), np.log(value[half:]), 1)[0])


def plot(points: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(points), figsize=(11, 6), sharey="row")
    for column, (axis, found) in zip(axes.T, points.items(), strict=True):
        size = [p["size"] for p in found]
        for ax, key, name in (
            (column[0], "seconds", "edges, s"),
            (column[1], "peak_gib", "peak memory, GiB"),
        ):
            value = [p[key] for p in found]
            ax.loglog(size, value, "o-")
            ax.set_title(f"{axis}: exponent {exponent(size, value):.2f}")
            ax.set_xlabel(axis)
            ax.set_ylabel(name)
            ax.grid(visible=True, which="both", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def section(points: dict[str, list[dict[str, Any]]], loads: list[float]) -> str:
    lines = [
        title("growth"),
        "",
        f"{hardware_line()}; during the run {min(loads)} to {max(loads)}.",
        "",
        "Random models of SmolLM2-135M's width, their own neurons as features, "
        "float32, compiled. tokens: 8 features a layer and position, 256 rows; "
        "features: 8 tokens, all rows; layers: 8 tokens, 8 features a layer and "
        "position, all rows.",
        "",
        "| axis | size | active | from | TFLOP | edges s | influence, prune s "
        "| peak GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for axis, found in points.items():
        for p in found:
            lines.append(
                f"| {axis} | {p['size']:,} | {p['active']:,} | {p['direction']}, "
                f"{p['patterns']} patterns | {p['tflop']:.3g} | {p['seconds']:.2f} | "
                f"{p['reduce']:.2f} | {p['peak_gib']:.2f} |"
            )
    lines.append("")
    for axis, found in points.items():
        size = [p["size"] for p in found]
        time = exponent(size, [p["seconds"] for p in found])
        memory = exponent(size, [p["peak_gib"] for p in found])
        lines.append(
            f"- {axis}: time grows with exponent {time:.2f}, peak memory {memory:.2f}."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path, default=Path("growth"))
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--at-most", type=float, default=np.inf, help="largest size")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(json.loads(args.worker))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / "growth.json"
    points: dict[str, list[dict[str, Any]]] = {}
    if kept.exists():
        points = json.loads(kept.read_text())
    loads = [load_average()]
    for axis in args.axes:
        found = points.setdefault(axis, [])
        for size in (SMOKE if args.smoke else AXES)[axis]:
            if size > args.at_most or size in [p["size"] for p in found]:
                continue
            loads.append(load_average())
            what = json.dumps(shape(axis, size, args.smoke))
            command = [sys.executable, __file__, "--worker", what]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{axis} {size}\n{done.stderr[-2000:]}")
            found.append({"size": size, **json.loads(done.stdout.splitlines()[-1])})
            print(axis, found[-1], flush=True)
            kept.write_text(json.dumps(points, indent=1))
    plot(points, args.out / "growth.png")
    text = section(points, loads)
    publish(text, args.append)


if __name__ == "__main__":
    main()
