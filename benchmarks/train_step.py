"""The training step: against a PyTorch trainer, the matmul peak, F, L and its own plan.

    python benchmarks/train_step.py --peer-python trainpeer/bin/python \
        --out /tmp/train_step --append benchmarks/RESULTS.md
    python benchmarks/train_step.py --smoke [--peer-python trainpeer/bin/python]

The peer's environment is in README.md. Random activations; the model's forward pass is
not part of it. Four parts (`--parts`):

- peer: the same weights, batch, Adam and clipping in both tools, each in a process of
  its own. First the loss and every gradient are compared; where they are not equal,
  nothing is timed. Then the tools take turns, one step each.
- peak: tokens/s, FLOP per token, share of the machine's own matmul peak, measured in
  the same process before and after; bytes that XLA counts as read and written.
- growth: step time against features and against layers, with the exponents and a plot.
- memory: what `jaxclt train --dry-run` predicts against what a process grew by.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _timing import (
    Steps,
    StepsOf,
    command_line,
    git_sha,
    hardware_line,
    library_root,
    load_average,
    peak_rss_gib,
    publish,
    release_freed,
    reset_peak_rss,
    rss_gib,
    timed,
    title,
)

from jaxclt.train import dryrun
from jaxclt.train.config import TrainConfig
from jaxclt.train.objectives import Batch, Standard, Terms
from jaxclt.train.params import LayerParams, Spec, TrainParams, init
from jaxclt.train.schedules import Weights, values
from jaxclt.train.step import Recipe, gradients, init_state, make_step, optimiser

HERE = Path(__file__).resolve().parent
PARTS = ("peer", "peak", "growth", "memory")
TOLERANCE = 1e-4  # of the loss, and of the largest entry of each gradient
GAP = 1e-5  # no pre-activation is nearer its threshold: float32 errs by less
LR, SPARSITY, N_STEPS, AT_STEP, CLIP, C, THETA = 1e-4, 5e-3, 100, 50, 1.0, 4.0, 0.03


# -- one step, ours --------------------------------------------------------------------


def spec_of(job: dict[str, Any]) -> Spec:
    return Spec(
        n_layers=job["L"],
        d_model=job["D"],
        n_features=job["F"],
        span=job["L"],
        activation=job["activation"],
        compute=job.get("compute", "float32"),
        # decode-clt's estimator does not reach the pre-activation
        ste_to_input=False,
    )


def recipe_of(memory: str = "full") -> Recipe:
    weights = Weights(sparsity=SPARSITY)
    return Recipe(n_steps=N_STEPS, weights=weights, clip=CLIP, memory=memory)


def objective() -> Standard:
    return Standard(Terms(sparsity="tanh", c=C))


def batch_of(read_LTD: jax.Array, write_LTD: jax.Array, F: int) -> Batch:
    dead_LF = jnp.zeros((len(read_LTD), F), bool)
    return Batch(read_LTD=read_LTD, write_LTD=write_LTD, dead_LF=dead_LF)


def matmul_peak(dtype: str, smoke: bool) -> float:
    """GFLOP/s of the fastest square matmul, summed in float32 as the step's are."""
    sizes = (128,) if smoke else (1024, 2048)
    return max(dryrun.matmul_peak(dtype, n, runs=4) for n in sizes) / 1e9


# -- part: peer ------------------------------------------------------------------------


def as_arrays(params: TrainParams) -> dict[str, np.ndarray]:
    """Weights or gradients by name and layer: the layout that tools exchange."""
    found = {}
    for l, p in enumerate(params):
        found[f"W_enc_{l}"] = np.asarray(p.W_enc_FD)
        found[f"b_enc_{l}"] = np.asarray(p.b_enc_F)
        found[f"W_dec_{l}"] = np.asarray(p.W_dec_FMD)
        found[f"b_dec_{l}"] = np.asarray(p.b_dec_D)
        if p.theta_F is not None:
            found[f"theta_{l}"] = np.asarray(p.theta_F)
    return found


def separate(p: LayerParams, read_TD: jax.Array, edge: float) -> LayerParams:
    """Raise biases until no pre-activation is so near its threshold that tools differ.

    At the edge rounding decides whether a token counts, with all of its gradient.
    """
    pre_TF = np.asarray(read_TD, np.float64) @ np.asarray(p.W_enc_FD, np.float64).T
    b_F = np.asarray(p.b_enc_F, np.float64)
    while True:
        close_F = (np.abs(pre_TF + b_F - edge) < GAP).any(0)
        if not close_F.any():
            return p.replace(b_enc_F=jnp.asarray(b_F, jnp.float32))  # pyright: ignore
        b_F = b_F + GAP * close_F


def write_weights(job: dict[str, Any]) -> None:
    """Random weights and a random batch of unit variance, for both tools."""
    params = init(jax.random.key(0), spec_of(job), theta=THETA)
    shape = (2, job["L"], job["T"], job["D"])
    read_LTD, write_LTD = jax.random.normal(jax.random.key(1), shape)
    edge = THETA if job["activation"] == "jumprelu" else 0.0
    params = tuple(
        separate(p, x, edge) for p, x in zip(params, read_LTD, strict=True)
    )  # fmt: skip
    np.savez(
        job["weights"],
        read_LTD=np.asarray(read_LTD),
        write_LTD=np.asarray(write_LTD),
        **as_arrays(params),
    )


def take_turns(job: dict[str, Any]) -> None:
    """Worker: our gradients as npz, then steps as they are asked for."""
    spec = spec_of(job)
    with np.load(job["weights"]) as file:
        found = {name: jnp.asarray(file[name]) for name in file.files}
    params = tuple(
        LayerParams(
            W_enc_FD=found[f"W_enc_{l}"],
            b_enc_F=found[f"b_enc_{l}"],
            W_dec_FMD=found[f"W_dec_{l}"],
            b_dec_D=found[f"b_dec_{l}"],
            theta_F=found.get(f"theta_{l}"),
        )
        for l in range(spec.n_layers)
    )
    batch = batch_of(found["read_LTD"], found["write_LTD"], spec.n_features)
    tx = optimiser(LR)
    state = init_state(params, tx, jax.random.key(0))
    recipe = recipe_of()
    now = values(recipe.weights, jnp.int32(AT_STEP), N_STEPS, state.control)
    grads, metrics = jax.jit(
        lambda p: gradients(objective(), p, batch, now, spec)
    )(params)  # fmt: skip
    np.savez(job["out"], loss=np.float64(metrics["loss"]), **as_arrays(grads))
    del grads, metrics, params, found
    step = make_step(objective(), spec, tx, recipe).lower(state, batch).compile()  # pyright: ignore
    gc.collect()
    losses = []
    steps = Steps()
    steps.ready()
    try:
        while True:
            steps.wait()
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            jax.block_until_ready(state)
            steps.done()
    except SystemExit:
        memory = peak_rss_gib()
        report = {"losses": losses, "load_average": load_average()}
        del state
        peak = matmul_peak("float32", job["smoke"])
        steps.report(report | {"rss_gib": memory, "peak_gflops": peak})


def largest_difference(ours: Path, theirs: Path) -> dict[str, float]:
    """Of the loss, relative; of gradients, over the largest entry of their kind."""
    with np.load(ours) as a, np.load(theirs) as b:
        loss = float(a["loss"])
        found = {"loss": abs(float(b["loss"]) / loss - 1)}
        for kind in ("W_enc", "b_enc", "W_dec", "b_dec"):
            names = [n for n in b.files if n.startswith(kind)]
            scale = max(float(np.abs(a[n]).max()) for n in names)
            off = max(float(np.abs(a[n] - b[n]).max()) for n in names)
            found[kind] = off / scale
    return found | {"loss_value": loss}


def compare(args: argparse.Namespace, activation: str) -> dict[str, Any]:
    """Both tools on one recipe; exits with 1 if they do not compute the same."""
    L, F, D, T = args.shape
    job: dict[str, Any] = {
        **{"L": L, "F": F, "D": D, "T": T, "activation": activation},
        **{"lr": LR, "sparsity": SPARSITY, "n_steps": N_STEPS, "at_step": AT_STEP},
        **{"clip": CLIP, "c": C, "theta": THETA, "smoke": args.smoke},
        "weights": str(args.work / f"weights-{activation}.npz"),
    }
    write_weights(job)
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    ours = [sys.executable, __file__, "--worker", "take_turns"]
    theirs = [args.peer_python, str(HERE / "_decode_clt_peer.py")]
    tools: dict[str, StepsOf] = {}
    differs: dict[str, dict[str, float]] = {}
    for tool in ("jaxclt", *args.variants):
        out = args.work / f"{tool}-{activation}.npz"
        mine = json.dumps(job | {"variant": tool, "out": str(out)})
        if tool == "jaxclt":
            library = environment | {"PYTHONPATH": str(library_root())}
            tools[tool] = StepsOf([*ours, mine], library)
            continue
        tools[tool] = StepsOf([*theirs, mine], environment)
        differs[tool] = largest_difference(args.work / f"jaxclt-{activation}.npz", out)
        worst = {k: v for k, v in differs[tool].items() if k != "loss_value"}
        print(f"{activation}, {tool}: differs by", worst, flush=True)
        if not max(worst.values()) < TOLERANCE:  # nan too
            sys.exit("not the same loss or gradients: nothing is timed")
    times: dict[str, list[tuple[float, float]]] = {tool: [] for tool in tools}
    for turn in range(args.runs + 2):
        for tool, process in tools.items():
            found = process.step()
            if turn >= 2:  # the first two warm up
                times[tool].append(found)
    reports = {tool: process.end() for tool, process in tools.items()}
    flop = dryrun.flop_per_token(spec_of(job)) * T
    rows = {}
    for tool, found in times.items():
        wall = statistics.median(w for w, _ in found)
        rows[tool] = {
            "wall_median_s": wall,
            "wall_min_s": min(w for w, _ in found),
            "cpu_median_s": statistics.median(c for _, c in found),
            "tokens_per_s": T / wall,
            "useful_gflops": flop / wall / 1e9,
            **reports[tool],
        }
    # Same weights and batch: how far apart the runs are after the last step.
    ends = {tool: row["losses"][-1] for tool, row in rows.items()}
    return {
        "part": "peer",
        "activation": activation,
        "shape": args.shape,
        "differs": differs,
        "rows": rows,
        "loss_after": ends,
        "steps": args.runs + 2,
    }


# -- parts: peak, growth, memory -------------------------------------------------------


def config_of(job: dict[str, Any]) -> TrainConfig:
    """What `jaxclt train --dry-run` would be told."""
    return TrainConfig(
        features=job["F"],
        activation=job["activation"],
        batch_tokens=job["T"],
        memory=job["memory"],
        compute=job["compute"],
        buffer="float32",
    )


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Worker: time and memory of one shape, alone in its process."""
    spec, T = spec_of(job), job["T"]
    step = make_step(objective(), spec, optimiser(LR), recipe_of(job["memory"]))

    def start() -> tuple[Any, Batch]:
        params = init(jax.random.key(0), spec, theta=THETA)
        state = init_state(params, optimiser(LR), jax.random.key(1))
        shape = (2, spec.n_layers, T, spec.d_model)
        read_LTD, write_LTD = jax.random.normal(jax.random.key(2), shape)
        batch = batch_of(read_LTD, write_LTD, spec.n_features)
        return jax.block_until_ready((state, batch))

    state, batch = start()
    counted = None
    if job["memory"] != "per_source":  # which is several programs
        step = step.lower(state, batch).compile()  # pyright: ignore
        counted = step.cost_analysis()["bytes accessed"]
    _, first_s, _ = timed(lambda: step(state, batch))
    # Everything is compiled now: what a process holds without a state is not counted.
    del state, batch
    gc.collect()
    release_freed()
    base = rss_gib()
    state, batch = start()
    reset_peak_rss()
    for _ in range(2):
        state, _ = step(state, batch)
    jax.block_until_ready(state)
    grown = peak_rss_gib() - base
    wall, cpu, peaks = [], [], []
    for _ in range(job["runs"]):
        # Each step against the peak just before it: the host serves others as well.
        peaks.append(matmul_peak(spec.compute, job["smoke"]))
        (state, _), w, c = timed(lambda state=state: step(state, batch))
        wall.append(w)
        cpu.append(c)
    flop = dryrun.flop_per_token(spec, recompute=dryrun.recomputes(job["memory"]))
    rates = [flop * T / w / 1e9 for w in wall]
    sizes = {"data": 1, "feature": 1}
    planned = dryrun.device_bytes(spec, config_of(job), sizes)
    return {
        "parameters": dryrun.n_params(spec),
        "mflop_per_token": flop / 1e6,
        "wall_s": wall,
        "step_s": statistics.median(wall),
        "cpu_s": statistics.median(cpu),
        "first_s": first_s,
        "tokens_per_s": T / statistics.median(wall),
        "gflops": statistics.median(rates),
        "peak_gflops": statistics.median(peaks),
        "peaks_gflops": peaks,
        "share": statistics.median(r / p for r, p in zip(rates, peaks, strict=True)),
        "share_of_best": max(rates) / max(peaks),
        "gib_moved": None if counted is None else counted / 2**30,
        "planned": planned,
        "planned_gib": sum(planned.values()) / 2**30,
        "grown_gib": grown,
        "base_gib": base,
        "load_average": load_average(),
    }


def alone(job: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(library_root())}
    command = [sys.executable, __file__, "--worker", "measure", json.dumps(job)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{done.stderr[-3000:]}\nfailed: {command}")
    found = job | json.loads(done.stdout.splitlines()[-1])
    short = ("L", "F", "memory", "compute", "step_s", "share", "planned_gib")
    print({k: found[k] for k in (*short, "grown_gib")}, flush=True)
    return found


def exponent(size: list[float], value: list[float]) -> float:
    """Slope on a log-log scale."""
    return float(np.polyfit(np.log(size), np.log(value), 1)[0])


def plot(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(9, 4), sharey=True)
    for ax, (axis, found) in zip(axes, curves.items(), strict=True):
        size = [x[axis] for x in found]
        ax.loglog(size, [x["step_s"] for x in found], "o-", label="step")
        at_peak = [
            x["mflop_per_token"] * x["T"] / x["peak_gflops"] / 1e3 for x in found
        ]
        ax.loglog(size, at_peak, "k--", label="its FLOP at the matmul peak")
        name = {"F": "features a layer", "L": "layers"}[axis]
        slope = exponent(size, [x["step_s"] for x in found])
        ax.set_title(f"{name}: exponent {slope:.2f}")
        ax.set_xlabel(name)
        ax.set_ylabel("step, s")
        ax.grid(visible=True, which="both", alpha=0.3)
        ax.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=90)


# -- tables ----------------------------------------------------------------------------


def table(rows: list[tuple[Any, ...]]) -> str:
    lines = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def peer_lines(cases: list[dict[str, Any]]) -> list[str]:
    rows: list[tuple[Any, ...]] = [
        ("gate", "tool", "step wall s, median (min)", "CPU s", "tokens/s",
         "useful GFLOP/s", "peak RSS GiB", "its wall / ours, CPU / ours")
    ]  # fmt: skip
    notes = []
    for case in cases:
        ours = case["rows"]["jaxclt"]
        for tool, row in case["rows"].items():
            wall = row["wall_median_s"] / ours["wall_median_s"]
            cpu = row["cpu_median_s"] / ours["cpu_median_s"]
            name = {
                "shipped": f"decode-clt {row.get('decode_clt')}, as shipped",
                "reference": "reference: plain PyTorch, same formulas (no peer)",
            }.get(tool, tool)
            rows.append(
                (case["activation"], name,
                 f"{row['wall_median_s']:.3f} ({row['wall_min_s']:.3f})",
                 f"{row['cpu_median_s']:.2f}", f"{row['tokens_per_s']:,.0f}",
                 f"{row['useful_gflops']:.0f}",
                 f"{row.get('rss_gib', row['peak_rss_gib']):.2f}",
                 "" if tool == "jaxclt" else f"{wall:.2f}, {cpu:.2f}")
            )  # fmt: skip
        for tool, d in case["differs"].items():
            parts = ", ".join(
                f"{k} {v:.1e}" for k, v in d.items() if k not in ("loss", "loss_value")
            )
            after = case["loss_after"]
            notes.append(
                f"- {case['activation']}, {tool}: loss {d['loss_value']:.6f}, relative "
                f"difference {d['loss']:.1e}; gradients differ by {parts} of their "
                f"largest entry. After {case['steps']} steps the losses are "
                f"{after['jaxclt']:.6f} (jaxclt) and {after[tool]:.6f}."
            )
    L, F, D, T = cases[0]["shape"]
    ours, one = cases[0]["rows"]["jaxclt"], next(iter(cases[0]["rows"].items()))[1]
    peer = next((r for t, r in cases[0]["rows"].items() if t != "jaxclt"), one)
    return [
        f"Against decode-clt, both float32, {peer.get('threads')} threads, torch "
        f"{peer.get('torch')}: a full CLT of {L} layers, {F:,} features a layer, "
        f"D {D}, {T:,} tokens a step, tanh sparsity, clipping, Adam; random weights "
        "and batch, the same in all. The tools take turns, one step each, in the order "
        f"of the rows; medians of {cases[0]['steps'] - 2}. Matmul peak afterwards "
        f"{ours['peak_gflops']:.0f} GFLOP/s.",
        "",
        table(rows),
        "",
        *notes,
        "",
    ]


def peak_lines(cases: list[dict[str, Any]]) -> list[str]:
    rows: list[tuple[Any, ...]] = [
        ("L", "F", "tokens", "memory", "compute", "MFLOP/token", "step s", "tokens/s",
         "GFLOP/s", "peak", "share", "best / best", "GiB moved")
    ]  # fmt: skip
    for c in cases:
        moved = "" if c["gib_moved"] is None else f"{c['gib_moved']:.1f}"
        rows.append(
            (c["L"], f"{c['F']:,}", f"{c['T']:,}", c["memory"], c["compute"],
             f"{c['mflop_per_token']:.1f}", f"{c['step_s']:.3f}",
             f"{c['tokens_per_s']:,.0f}", f"{c['gflops']:.0f}",
             f"{c['peak_gflops']:.0f}", f"{c['share']:.0%}",
             f"{c['share_of_best']:.0%}", moved)
        )  # fmt: skip
    return [
        f"Share of the matmul peak of the same dtype (D {cases[0]['D']}, JumpReLU, "
        "tanh). The peak is the best square matmul of 1,024 or 2,048, measured before "
        "each step; medians, and the best step against the best peak. GiB moved is "
        "XLA's count of bytes read and written by all of its operations:",
        "",
        table(rows),
        "",
    ]


def growth_lines(curves: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = []
    for axis, found in curves.items():
        fixed = "L" if axis == "F" else "F"
        steps = ", ".join(
            f"{x[axis]:,}: {x['step_s']:.3f} s ({x['share']:.0%})" for x in found
        )
        size = [x[axis] for x in found]
        slope = exponent(size, [x["step_s"] for x in found])
        flop = exponent(size, [x["mflop_per_token"] for x in found])
        lines.append(
            f"- {axis} ({fixed} {found[0][fixed]:,}, {found[0]['T']:,} tokens, share "
            f"of the peak in brackets): {steps}. Exponent {slope:.2f}; of the FLOP "
            f"{flop:.2f}."
        )
    return ["Growth of the step, float32, `memory=full` (plot: `OUT/train_step.png`):",
            "", *lines, ""]  # fmt: skip


def memory_lines(cases: list[dict[str, Any]]) -> list[str]:
    rows: list[tuple[Any, ...]] = [
        (
            "L",
            "F",
            "tokens",
            "memory",
            "dry run MiB",
            "measured MiB",
            "dry run / measured",
        )
    ]
    for c in cases:
        rows.append(
            (c["L"], f"{c['F']:,}", f"{c['T']:,}", c["memory"],
             f"{c['planned_gib'] * 1024:,.0f}", f"{c['grown_gib'] * 1024:,.0f}",
             f"{c['planned_gib'] / c['grown_gib']:.2f}")
        )  # fmt: skip
    base = [c["base_gib"] for c in cases]
    return [
        "Memory as `jaxclt train --dry-run` predicts it (`dryrun.device_bytes`), "
        "against the peak resident size of a process during its steps, less what it "
        f"held with everything compiled and no state ({min(base):.2f} to "
        f"{max(base):.2f} GiB):",
        "",
        table(rows),
        "",
    ]


def section(found: dict[str, Any], args: argparse.Namespace) -> str:
    loads = found["loads"]
    lines = [
        title("train_step"),
        "",
        f"{hardware_line()}; during the run {min(loads)} to {max(loads)}, and "
        f"{found['stolen']:.0%} of the CPU time went to other machines of the host.",
        "",
    ]
    if found.get("peer"):
        lines += peer_lines(found["peer"])
    elif "peer" in args.parts:
        lines += ["No peer was run.", ""]
    if found.get("peak"):
        lines += peak_lines(found["peak"])
    if found.get("growth"):
        lines += growth_lines(found["growth"])
    if found.get("memory"):
        lines += memory_lines(found["memory"])
    return "\n".join(lines)


# -- command line ----------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--peer-python", help="python that has decode-clt")
    parser.add_argument("--variants", nargs="+", default=["shipped", "reference"],
                        choices=("shipped", "reference"))  # fmt: skip
    parser.add_argument("--activations", nargs="+", default=["jumprelu", "relu"],
                        choices=("jumprelu", "relu"))  # fmt: skip
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--shape", type=int, nargs=4, default=[8, 1024, 576, 1024],
                        metavar=("L", "F", "D", "T"))  # fmt: skip
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("out/train_step"))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.shape, args.runs = [3, 32, 16, 32], 2
    if args.peer_python and not Path(args.peer_python).is_file():
        parser.error(f"--peer-python {args.peer_python}: no such file")
    args.work = args.out / "work"
    return args


def jobs(args: argparse.Namespace) -> dict[str, Any]:
    """Shapes of the parts that need no peer."""
    L, F, D, T = args.shape
    common = {"activation": "jumprelu", "compute": "float32", "memory": "full"}
    base = common | {"L": L, "F": F, "D": D, "T": T, "runs": args.runs}
    base["smoke"] = args.smoke
    modes = [base | {"memory": m} for m in ("full", "remat", "per_source")]
    if args.smoke:
        return {
            "peak": [base],
            "growth": {
                "F": [base | {"F": 16}, base],
                "L": [base | {"L": 2}, base],
            },
            "memory": [modes[0], modes[2]],
        }
    large = base | {"F": 2 * F, "T": 2 * T, "runs": 5}
    few = base | {"runs": 5}
    return {
        "peak": [*modes, large, base | {"compute": "bfloat16"}],
        "growth": {
            "F": [few | {"F": f} for f in (F // 4, F // 2, F, 2 * F, 4 * F)],
            "L": [few | {"L": l} for l in (L // 4, L // 2, L, 3 * L // 2)],
        },
        "memory": [job | {"F": 2 * F, "runs": 5} for job in modes],
    }


def stolen() -> tuple[int, int]:
    """Jiffies that the hypervisor gave to others, and all of them (Linux)."""
    words = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    return int(words[7]), sum(map(int, words))


def run_parts(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, and the load while it ran."""
    found: dict[str, Any] = {"git": git_sha(), "loads": [load_average()]}
    stolen_before, all_before = stolen()
    if "peer" in args.parts and args.peer_python:
        found["peer"] = [compare(args, activation) for activation in args.activations]
        found["loads"].append(load_average())
    done: dict[str, dict[str, Any]] = {}

    def once(job: dict[str, Any]) -> dict[str, Any]:
        key = json.dumps({k: v for k, v in job.items() if k != "runs"})
        if key not in done:
            done[key] = alone(job)
            found["loads"].append(load_average())
        return done[key]

    todo = jobs(args)
    for part in ("peak", "memory"):
        if part in args.parts:
            found[part] = [once(job) for job in todo[part]]
    if "growth" in args.parts:
        found["growth"] = {
            axis: [once(job) for job in cases] for axis, cases in todo["growth"].items()
        }
        plot(found["growth"], args.out / "train_step.png")
    stolen_after, all_after = stolen()
    found["stolen"] = (stolen_after - stolen_before) / (all_after - all_before)
    return found


def main() -> None:
    args = arguments()
    if args.worker:
        what, job = args.worker[0], json.loads(args.worker[1])
        if what == "take_turns":
            take_turns(job)
        else:
            print(json.dumps(measure(job)))
        return
    if "peer" in args.parts and not args.peer_python:
        print("no --peer-python: only our side runs, and nothing is compared")
    args.work.mkdir(parents=True, exist_ok=True)
    found = run_parts(args)
    (args.out / "results.json").write_text(json.dumps(found, indent=1))
    text = section(found, args)
    same = git_sha() == found["git"]
    publish(text, args.append if same else None)
    if not same:
        print("the code changed during the run: these times are of no one version")
        sys.exit(0 if args.smoke else 1)


if __name__ == "__main__":
    main()
