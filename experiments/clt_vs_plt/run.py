"""Cross-layer against per-layer transcoders, at equal parameters and at equal compute.

    python run.py WORK --model smollm2-135m --data DATA/train --heldout DATA/heldout
    python run.py WORK --only clt plt_params     # a part
    python run.py WORK --smoke                   # the same code, a tiny model

All runs see the same tokens in the same order, from one store of activations, keep the
same number of features a layer and token, and are measured on the same held-out tokens
and prompts. Everything goes through `jaxclt train` and `jaxclt sweep`. Writes
WORK/results.json, WORK/table.md and WORK/plot.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np

from jaxclt.io.model import load_model
from jaxclt.lm.config import LMConfig
from jaxclt.train.config import TrainConfig
from jaxclt.train.dryrun import flop_per_token
from jaxclt.train.params import n_params

matplotlib.use("Agg")
from matplotlib.figure import Figure

HERE = Path(__file__).parent
TINY = HERE.parents[1] / "tests/goldens/circuit_tracer_clt/model"
SPAN, FEATURES, GRAPH_FEATURES = 4, 384, 512
COMMON = TrainConfig(
    activation="topk",
    objective="none",
    l0=16.0,
    read="mlp_in",
    tokens=65_536,
    batch_tokens=512,
    lr=3e-3,
    warmup=12,
    context=128,
    chunk_tokens=16_384,
    reuse=2,
    norm_tokens=30_000,
    heldout_tokens=4096,
    dead_tokens=30_000,
    eval_every=0,
    checkpoint_every=64,
    agreement_windows=16,
    graph_features=0,
)
SMOKE = dataclasses.replace(
    COMMON,
    l0=4.0,
    tokens=64 * 8,
    batch_tokens=64,
    context=32,
    chunk_tokens=512,
    norm_tokens=400,
    heldout_tokens=200,
    agreement_windows=2,
)


def arms(lm: LMConfig, base: TrainConfig, span: int, F: int) -> dict[str, TrainConfig]:
    """What is compared: the base, and others of as many parameters or FLOP."""
    spec = dataclasses.replace(base, features=F, span=span).spec(lm)

    def like(other_span: int, cost) -> TrainConfig:
        def of(F: int) -> TrainConfig:
            return dataclasses.replace(base, features=F, span=other_span)

        least = round(base.l0)  # TopK keeps so many
        aim, one = cost(spec), cost(of(1000 + least).spec(lm)) / (1000 + least)
        near = range(max(least, int(aim / one) - 3), max(least, int(aim / one) + 4) + 1)
        return of(min(near, key=lambda F: abs(cost(of(F).spec(lm)) - aim)))

    return {
        "clt": dataclasses.replace(base, features=F, span=span),
        "plt_params": like(1, n_params),
        "plt_compute": like(1, flop_per_token),
        "clt_full": like(0, n_params),
    }


def flags(config: TrainConfig) -> list[str]:
    """The command line of what differs from the defaults."""
    found = []
    for f in dataclasses.fields(TrainConfig):
        if (value := getattr(config, f.name)) != f.default:
            found += [f"--{f.name.replace('_', '-')}", str(value)]
    return found


def jaxclt(*args: str | Path) -> None:
    command = [sys.executable, "-m", "jaxclt", *map(str, args)]
    print("$ jaxclt", *map(str, args), flush=True)
    subprocess.run(command, check=True)


def measure(work: Path, name: str, config: TrainConfig, model: str, data: list) -> None:
    """Train and trace one arm, if that is not done."""
    out = work / name
    if not (out / "card.json").is_file():
        store = ["--store", work / "store"]
        jaxclt("train", "--model", model, *data, "--out", out, *store, *flags(config))
    done = out / "graphs" / "done"
    if not done.is_file():
        jaxclt(
            "sweep", work / "prompts.txt", "--model", model, "--dictionary", out,
            "--out", out / "graphs", "--max-features", GRAPH_FEATURES,
        )  # fmt: skip
        done.touch()


def collect(work: Path, name: str, config: TrainConfig, lm: LMConfig) -> dict:
    card = json.loads((work / name / "card.json").read_text())
    lines = (work / name / "graphs/index.jsonl").read_text().splitlines()
    graphs = [json.loads(line)["scores"]["full"] for line in lines]
    keys = ("replacement", "completeness", "mean_path_length")
    m, spec = card["metrics"], config.spec(lm)
    return {
        "name": name,
        "span": spec.span,
        "features": config.features,
        "parameters_M": n_params(spec) / 1e6,
        "mflop_per_token": flop_per_token(spec) / 1e6,
        "train_s": card["timing_s"]["step"],
        **{k: m[k] for k in ("fvu", "l0", "dead", "top1", "kl")},
        "fvu_L": m["fvu_L"],
        **{k: [g[k] for g in graphs] for k in keys},
    }


def table(found: list[dict]) -> str:
    """One row a run; graph scores are means over prompts, ± their standard error."""

    def spread(x: list[float]) -> str:
        return f"{np.mean(x):.3f} ± {np.std(x, ddof=1) / np.sqrt(len(x)):.3f}"

    head = (
        "| | span | features | M param. | MFLOP/token | FVU | L0 | silent | top-1 | KL "
        "| replacement | completeness | path length |\n" + "|---" * 13 + "|\n"
    )
    return (
        head
        + "".join(
            f"| {r['name']} | {r['span']} | {r['features']} | {r['parameters_M']:.2f} "
            f"| {r['mflop_per_token']:.1f} | {r['fvu']:.3f} | {r['l0']:.1f} "
            f"| {r['dead']:.1%} | {r['top1']:.1%} | {r['kl']:.2f} "
            f"| {spread(r['replacement'])} | {spread(r['completeness'])} "
            f"| {spread(r['mean_path_length'])} |\n"
            for r in found
        )
        + "".join(paired(found[0], r) for r in found[1:])
    )


def paired(a: dict, b: dict) -> str:
    """Differences on the same prompts."""
    parts = []
    for key in ("replacement", "completeness", "mean_path_length"):
        d = np.subtract(a[key], b[key])
        error = d.std(ddof=1) / np.sqrt(len(d))
        parts.append(f"{key.replace('_', ' ')} {d.mean():+.3f} ± {error:.3f}")
    return f"\n{a['name']} - {b['name']}, same prompts: {', '.join(parts)}."


def plot(found: list[dict], path: Path) -> None:
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    panels = figure.subplots(1, 5)
    measured = {
        "fvu": "unexplained variance\n(lower is better)",
        "top1": "replacement top-1\n(higher is better)",
        "kl": "KL(model, replacement), nats\n(lower is better)",
        "completeness": "completeness of graphs\n(higher is better)",
        "mean_path_length": "mean path length",
    }
    names = [r["name"].replace("_", "\n") for r in found]
    for panel, (key, title) in zip(panels, measured.items(), strict=True):
        panel.bar(names, [np.mean(r[key]) for r in found], color="0.75")
        for x, r in enumerate(found):
            if isinstance(r[key], list):
                panel.plot([x] * len(r[key]), r[key], "k.", markersize=3)
        panel.set_title(title, fontsize=9)
        panel.tick_params(labelsize=7)
    figure.savefig(path, dpi=120)


def smoke_text(work: Path) -> None:
    rng = random.Random(0)
    folder = work / "text"
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"w{3 + int(rng.expovariate(0.05)) % 90}" for _ in range(6000)]
    text = "<|endoftext|>".join(" ".join(words[i::60]) for i in range(60))
    (folder / "text.txt").write_text(text, "utf-8")
    (work / "prompts.txt").write_text("w5 w6 w7\nw9 w4 w11 w3\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data")
    parser.add_argument("--heldout")
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    base, span, F, model = COMMON, SPAN, FEATURES, args.model
    data = ["--data", args.data, "--heldout", args.heldout]
    if args.smoke:
        base, span, F, model = SMOKE, 2, 32, str(TINY)
        smoke_text(args.work)
        data = ["--data", args.work / "text"]
    else:
        (args.work / "prompts.txt").write_text((HERE / "prompts.txt").read_text())
    lm = load_model(model).cfg
    every = arms(lm, base, span, F)
    for name in args.only if args.only is not None else every:
        measure(args.work, name, every[name], model, data)
    there = [n for n in every if (args.work / n / "graphs/done").is_file()]
    if len(there) < 2:
        return
    found = [collect(args.work, n, every[n], lm) for n in there]
    (args.work / "results.json").write_text(json.dumps(found, indent=1))
    (args.work / "table.md").write_text(table(found))
    plot(found, args.work / "plot.png")
    print(table(found))


if __name__ == "__main__":
    main()
