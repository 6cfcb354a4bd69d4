"""The same attribution graph by jaxclt and by circuit-tracer 0.5.0, and how long.

    python benchmarks/vs_circuit_tracer.py --peer-python peer/bin/python \
        --model smollm2-135m --kinds clt plt --features 256 \
        --prompt "The Eiffel Tower is in the city of" --repeats 3 \
        --variants shipped grouped --out /tmp/vs --append benchmarks/RESULTS.md
    python benchmarks/vs_circuit_tracer.py --smoke [--peer-python peer/bin/python]

The peer's environment: pip install torch==2.13.0 nnsight==0.6.1 circuit-tracer==0.5.0.
Both tools read the same float32 weights and the same dictionary from files and get the
same token ids, each in a process of its own. Times are printed only for graphs that are
equal: the same active features and targets, edges within 1e-5 of the largest one.

What is compared: circuit-tracer's `attribute` (tokens to adjacency, all features) with
the record and attribute stages of our `trace_prompt`; its `prune_graph` with our
influence + prune. Our times are of repeated calls in one process; the first call, which
compiles, has a row of its own. `grouped` is circuit-tracer with its slowest spot
repaired, see _circuit_tracer_peer.py; a variant may name its batch size: `grouped:256`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import gc
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _timing import (
    Times,
    command_line,
    git_sha,
    hardware_line,
    library_root,
    load_average,
    matmul_peak,
    peak_rss_gib,
    publish,
)
from make_synthetic_dictionary import TEXTS, synthetic_dictionary

import jaxclt.trace.prompt as trace_module
from jaxclt.graph.attribute import AttributeConfig, Timing
from jaxclt.io.dictionary import load_dictionary, save_dictionary
from jaxclt.io.model import Model, load_model, save_hf
from jaxclt.trace.prompt import Traced, trace_prompt
from jaxclt.trace.record import record_prompt
from jaxclt.types import CLTParams

HERE = Path(__file__).resolve().parent
SMOKE_MODEL = HERE.parent / "tests/goldens/circuit_tracer_clt/model"
SMOKE_TEXTS = ("w7 w31 w8 w55 w12 w90 w41", "w3 w14 w15 w92 w65 w35", "w27 w18 w28 w9")
CONFIG = AttributeConfig(convention="circuit-tracer", max_features=None, tolerance=0.0)
TOLERANCE = 1e-5  # of the largest edge
GAP = 1e-3  # no pre-activation is closer to its threshold, so both see the same ones
STAGES = ("record", "attribute", "influence", "prune")


# -- what both tools read --------------------------------------------------------------


class Files(NamedTuple):
    """One traced prompt, as files and numbers."""

    model: Path
    dictionary: Path
    token_T: list[int]


def write_model(model: Model, path: Path) -> None:
    """A Hugging Face directory in float32, for transformers 4 and 5 alike."""
    if (path / "config.json").is_file():  # written last
        return
    path.mkdir(parents=True, exist_ok=True)
    fast = model.tokenizer.backend
    fast.backend_tokenizer.save(str(path / "tokenizer.json"))
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    special = {name: getattr(fast, name) for name in names if getattr(fast, name)}
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special})
    (path / "tokenizer_config.json").write_text(text)
    save_hf(model.params, model.cfg, path)


def reads_and_writes(model: Model, texts: tuple[str, ...]) -> tuple[Any, Any]:
    """Both [L, T, D], every text with bos first, that position left out."""
    reads, writes = [], []
    for text in texts:
        token_T = jnp.asarray(model.tokenizer.encode(text, "always"), jnp.int32)
        done = record_prompt(model.params, token_T, model.cfg)
        reads.append(done.mid_LTD[:, 1:])
        writes.append(done.write_LTD[:, 1:])
    return jnp.concatenate(reads, 1), jnp.concatenate(writes, 1)


def separate(params: CLTParams, read_LTD: Any) -> CLTParams:
    """Raise thresholds a little until none is within GAP of a pre-activation."""
    pre_LTF = jnp.einsum("LTD,LFD->LTF", read_LTD, params.W_enc_LFD)
    pre_LTF = np.asarray(pre_LTF + params.b_enc_LF[:, None])
    theta_LF = np.array(params.theta_LF)
    while True:
        close_LF = (np.abs(pre_LTF - theta_LF[:, None]) < GAP).any(1)
        if not close_LF.any():
            return params.replace(theta_LF=jnp.asarray(theta_LF))
        theta_LF[close_LF] += GAP


def write_dictionary(args: argparse.Namespace, model: Model, kind: str) -> Path:
    """A synthetic dictionary for the prompt, at a place that says what it is."""
    key = [model.hash, args.prompt, kind, args.features, args.active, args.seed]
    digest = hashlib.sha256(json.dumps([*key, args.texts]).encode()).hexdigest()[:8]
    path = args.work / f"{kind}-{args.features}-{digest}"
    if path.exists():  # appears whole or not at all
        return path
    params, cfg = synthetic_dictionary(
        *reads_and_writes(model, args.texts),
        n_features=args.features,
        kind=kind,  # pyright: ignore[reportArgumentType]
        active_per_token=args.active,
        seed=args.seed,
    )
    params = separate(params, reads_and_writes(model, (args.prompt,))[0])
    save_dictionary(params, cfg, path, model_name=args.model)
    return path


def prepare(args: argparse.Namespace) -> dict[str, Files]:
    """Files of every kind of dictionary; what is there already is used again."""
    model = load_model(args.model)
    path = args.work / f"model-{model.hash[:8]}"
    write_model(model, path)
    ids = model.tokenizer.encode(args.prompt, "always")
    return {
        kind: Files(path, write_dictionary(args, model, kind), ids)
        for kind in args.kinds
    }


# -- our side, in a process of its own -------------------------------------------------


class Clock(Timing):
    """The library's own stage clock, noting CPU seconds as each stage ends."""

    cpu: ClassVar[dict[str, float]] = {}

    @contextlib.contextmanager
    def of(self, stage: str) -> Iterator[None]:
        Clock.cpu.setdefault("start", time.process_time())
        with super().of(stage):
            yield
        Clock.cpu[stage] = time.process_time()


def cpu_stages() -> dict[str, float]:
    """CPU seconds of the last trace: tokens to adjacency, then what reduces it."""
    cpu = Clock.cpu
    return {
        "graph": cpu["attribute"] - cpu["start"],
        "reduce": cpu["prune"] - cpu["attribute"],
        "total": cpu["prune"] - cpu["start"],
    }


def worker(job: dict[str, Any]) -> None:
    """Trace `repeats` + 1 times, write the graph as npz and the times as json."""
    jax.config.update("jax_enable_compilation_cache", False)  # the first call is first
    load_before = load_average()
    model = load_model(job["model"])
    dictionary = load_dictionary(job["dictionary"], model)
    trace_module.Timing = Clock  # changes nothing of what is computed

    def run() -> Traced:
        gc.collect()
        Clock.cpu.clear()
        return trace_prompt(model, dictionary, job["prompt"], config=CONFIG)

    traced = run()
    first = traced.timing
    report: dict[str, Any] = {"compile_s": first["compile"], "first_s": first}
    runs = []
    for _ in range(job["repeats"]):
        del traced
        traced = run()
        runs.append((traced.timing, cpu_stages()))
    report["peak_rss_gib"] = peak_rss_gib()
    # zero if nothing compiles twice
    report["steady_compile_s"] = [wall["compile"] for wall, _ in runs]
    for stage in STAGES:
        wall_s = [wall[stage] for wall, _ in runs]
        report[stage] = {"wall_median_s": statistics.median(wall_s), "wall_s": wall_s}
    for name, of in (("graph", STAGES[:2]), ("reduce", STAGES[2:]), ("total", STAGES)):
        wall_s = [sum(wall[stage] for stage in of) for wall, _ in runs]
        report[name] = Times(wall_s, [cpu[name] for _, cpu in runs]).summary()
    graph = traced.graph
    if graph.token_T.tolist() != job["token_T"]:
        raise ValueError(f"other tokens than the peer's: {graph.token_T}")
    plan = traced.work | {"flops": traced.work["tflop"] * 1e12}
    sizes = (256, 512) if job["smoke"] else (512, 1024, 2048)
    peak = matmul_peak(sizes=sizes)
    seconds = report["attribute"]["wall_median_s"]
    R, N = graph.edge_RN.shape
    report |= plan | {
        "rows_per_s": R / seconds,
        "gflops": plan["flops"] / seconds / 1e9,
        "peak_matmul_gflops": peak,
        "share_of_peak": plan["flops"] / seconds / 1e9 / peak,
        "load_average": load_before,
        "shapes": {
            "layers": graph.n_layers,
            "d_model": model.cfg.d_model,
            "tokens": graph.n_tokens,
            "features_active": graph.n_features,
            "targets": graph.n_targets,
            "rows": R,
            "nodes": N + graph.n_targets,
        },
    }
    np.savez(
        job["out"],
        edge_RN=graph.edge_RN,
        active_A3=np.stack([graph.layer_A, graph.pos_A, graph.feature_A], 1),
        token_K=graph.target_token_K,
        prob_K=graph.target_prob_K,
    )
    Path(job["out"]).with_suffix(".json").write_text(json.dumps(report, indent=1))


# -- running and comparing -------------------------------------------------------------


def start(command: list[str], out: Path, library: Path | None) -> dict[str, Any]:
    """Run a worker; its report. Exits with its last lines if it fails.

    Our worker imports the library from the same tree as this process does.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
    environment.pop("PYTHONPATH", None)
    if library:
        environment["PYTHONPATH"] = str(library)
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}\nfailed: see above")
    return json.loads(out.with_suffix(".json").read_text())


def run_ours(args: argparse.Namespace, kind: str, files: Files) -> dict[str, Any]:
    out = args.work / f"ours-{kind}.npz"
    job = {
        "model": str(files.model),
        "dictionary": str(files.dictionary),
        "prompt": args.prompt,
        "token_T": files.token_T,
        "repeats": args.repeats,
        "smoke": args.smoke,
        "out": str(out),
    }
    script = str(HERE / "vs_circuit_tracer.py")
    return start(
        [sys.executable, script, "--worker", json.dumps(job)], out, library_root()
    )


def run_peer(
    args: argparse.Namespace, kind: str, files: Files, variant: str
) -> dict[str, Any]:
    name, _, batch = variant.partition(":")
    out = peer_answer(args, kind, variant)
    command = [
        args.peer_python,
        str(HERE / "_circuit_tracer_peer.py"),
        *("--model", str(files.model)),
        *("--dictionary", str(files.dictionary)),
        *("--tokens", ",".join(map(str, files.token_T))),
        *("--batch-size", batch or str(args.batch_size)),
        *("--variant", name),
        *("--repeats", str(args.repeats)),
        *("--at-most", str(args.peer_seconds)),
        *("--out", str(out)),
    ]
    return start(command, out, None)


def peer_answer(args: argparse.Namespace, kind: str, variant: str) -> Path:
    return args.work / f"peer-{kind}-{variant.replace(':', '-')}.npz"


def difference(ours: Path, peer: Path) -> dict[str, Any]:
    """How far apart two answers are; `equal` says whether they count as one."""
    with np.load(ours) as file:
        a = dict(file)
    with np.load(peer) as file:
        b = dict(file)
    mine, its = ({tuple(x) for x in one["active_A3"].tolist()} for one in (a, b))
    found: dict[str, Any] = {
        "features_only_ours": len(mine - its),
        "features_only_peer": len(its - mine),
        "same_order": np.array_equal(a["active_A3"], b["active_A3"]),
        "same_targets": np.array_equal(a["token_K"], b["token_K"]),
    }
    if not (found["same_order"] and found["same_targets"]):
        return found | {"equal": False}
    edge_NN, edge_RN = b["edge_NN"], a["edge_RN"]
    A, K, N = len(a["active_A3"]), len(a["token_K"]), edge_RN.shape[1]
    largest = float(np.abs(edge_NN).max())
    worst = max(
        float(np.abs(edge_NN[:A, :N] - edge_RN[:A]).max()),
        float(np.abs(edge_NN[N:, :N] - edge_RN[A:]).max()),
    )
    elsewhere = np.count_nonzero(edge_NN[A:N]) + np.count_nonzero(edge_NN[:, N:])
    found |= {
        "largest_edge": largest,
        "relative_difference": worst / largest,
        "nonzero_elsewhere": int(elsewhere),
        "prob_difference": float(np.abs(a["prob_K"] - b["prob_K"]).max()),
    }
    assert edge_NN.shape == (N + K, N + K)
    equal = worst <= TOLERANCE * largest and not elsewhere
    return found | {"equal": bool(equal)}


def between_variants(args: argparse.Namespace, kind: str) -> float:
    """Largest relative difference of the peer's variants from its first one."""
    first, *others = (peer_answer(args, kind, v) for v in args.variants)
    with np.load(first) as file:
        want = file["edge_NN"]
    scale, worst = np.abs(want).max(), 0.0
    for other in others:
        with np.load(other) as file:
            worst = max(worst, float(np.abs(file["edge_NN"] - want).max() / scale))
    return worst


def ratios(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, float]:
    """How many times longer (or more) the peer takes."""
    its, own = peer["attribute"], ours["graph"]
    first = sum(ours["first_s"][stage] for stage in ("record", "attribute"))
    return {
        "wall": its["wall_median_s"] / own["wall_median_s"],
        "cpu": its["cpu_median_s"] / own["cpu_median_s"],
        "wall_to_our_first_call": its["wall_median_s"] / first,
        "prune": peer["prune_s"] / ours["reduce"]["wall_median_s"],
        "peak_rss": peer["peak_rss_gib"] / ours["peak_rss_gib"],
    }


def run_kind(
    args: argparse.Namespace, kind: str, files: Files, common: dict[str, Any]
) -> list[dict[str, Any]]:
    """All cases of one kind of dictionary, one for every variant of the peer."""
    common = common | {"kind": kind}
    print(f"{kind}: ours ...", flush=True)
    ours = run_ours(args, kind, files)
    common |= {"shapes": ours.pop("shapes"), "ours": ours}
    if not args.peer_python:
        return [common | {"peer": None}]
    cases = []
    for variant in args.variants:
        print(f"{kind}: circuit-tracer {variant} ...", flush=True)
        peer = run_peer(args, kind, files, variant)
        agreement = difference(
            args.work / f"ours-{kind}.npz", peer_answer(args, kind, variant)
        )
        print(f"{kind}: {variant} {_agreement(agreement)}", flush=True)
        if not agreement["equal"]:
            sys.exit(
                f"{kind}: not the same graph as circuit-tracer {variant}, so no times\n"
                f"{json.dumps(agreement, indent=1)}"
            )
        ratio = ratios(ours, peer)
        cases.append(common | {"peer": peer, "agreement": agreement, "ratio": ratio})
    if len(args.variants) > 1:
        worst = between_variants(args, kind)
        print(f"{kind}: the variants differ among themselves by {worst:.1e}")
        cases = [case | {"variants_differ": worst} for case in cases]
    return cases


def _agreement(found: dict[str, Any]) -> str:
    if "relative_difference" not in found:
        return "has other features or targets"
    return (
        f"edges differ by {found['relative_difference']:.1e} of the largest, "
        f"{found['largest_edge']:.3g}"
    )


# -- tables ----------------------------------------------------------------------------

HEADER = (
    "dictionary",
    "tool",
    "rows",
    "graph wall s, median (min)",
    "CPU s",
    "rows/s",
    "prune s",
    "peak RSS GiB",
    "peer / ours",
)


def table(cases: list[dict[str, Any]]) -> str:
    """Markdown: our row of every dictionary, then the peer's variants."""
    lines = [HEADER, ("---",) * len(HEADER)]
    seen = set()
    for case in cases:
        rows = case["shapes"]["rows"]
        if case["kind"] not in seen:
            seen.add(case["kind"])
            lines += [_first_row(case), _our_row(case)]
        if not case["peer"]:
            continue
        peer, time_ = case["peer"], case["peer"]["attribute"]
        lines.append(
            (
                case["kind"],
                f"circuit-tracer {peer['variant']}, batch {peer['batch_size']}, "
                f"n={len(time_['wall_s'])}",
                f"{rows:,}",
                _median_min(time_),
                f"{time_['cpu_median_s']:.4g}",
                f"{rows / time_['wall_median_s']:,.0f}",
                f"{peer['prune_s']:.3g}",
                f"{peer['peak_rss_gib']:.2f} "
                f"({peer['peak_rss_with_prune_gib']:.2f} with pruning)",
                f"{case['ratio']['wall']:.2f} wall, {case['ratio']['cpu']:.2f} CPU",
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _our_row(case: dict[str, Any]) -> tuple[str, ...]:
    ours, rows = case["ours"], case["shapes"]["rows"]
    return (
        case["kind"],
        f"jaxclt, steady, n={len(ours['graph']['wall_s'])}",
        f"{rows:,}",
        _median_min(ours["graph"]),
        f"{ours['graph']['cpu_median_s']:.4g}",
        f"{rows / ours['graph']['wall_median_s']:,.0f}",
        f"{ours['reduce']['wall_median_s']:.3g}",
        f"{ours['peak_rss_gib']:.2f} (all stages)",
        "",
    )


def _first_row(case: dict[str, Any]) -> tuple[str, ...]:
    ours, rows = case["ours"], case["shapes"]["rows"]
    first = ours["first_s"]
    graph = first["record"] + first["attribute"]
    return (
        case["kind"],
        f"jaxclt, first call (compiling {ours['compile_s']:.1f} s in all)",
        f"{rows:,}",
        f"{graph:.4g}",
        "",
        f"{rows / graph:,.0f}",
        f"{first['influence'] + first['prune']:.3g}",
        "",
        "",
    )


def _median_min(times: dict[str, Any]) -> str:
    return f"{times['wall_median_s']:.4g} ({times['wall_min_s']:.4g})"


def stages(cases: list[dict[str, Any]]) -> str:
    """One line per dictionary: our stages, operations and share of the peak."""
    lines = []
    for kind in dict.fromkeys(case["kind"] for case in cases):
        case = next(case for case in cases if case["kind"] == kind)
        ours, shapes = case["ours"], case["shapes"]
        wall = ", ".join(f"{s} {ours[s]['wall_median_s']:.3g}" for s in STAGES)
        lines.append(
            f"- {kind}: {shapes['features_active']:,} active features, "
            f"{shapes['targets']} targets, {shapes['tokens']} tokens, "
            f"{shapes['nodes']:,} nodes. Stages (s): {wall}. Edge rows: "
            f"{ours['flops'] / 1e9:,.3g} GFLOP in chunks of {ours['chunk_size']} by "
            f"{ours['direction']}, {ours['gflops']:.3g} GFLOP/s = "
            f"{100 * ours['share_of_peak']:.0f} % of the measured matmul peak "
            f"({ours['peak_matmul_gflops']:.3g}). Each steady call still compiles for "
            f"{max(ours['steady_compile_s']):.2f} s, which its times include."
        )
    for case in cases:
        if case["peer"]:
            lines.append(
                f"- {case['kind']}, {case['peer']['variant']}, batch "
                f"{case['peer']['batch_size']}: same features, "
                f"{_agreement(case['agreement'])}."
            )
    return "\n".join(lines)


def section(cases: list[dict[str, Any]]) -> str:
    """A dated Markdown section, the hardware line on top."""
    case = cases[0]
    peer = next((c["peer"] for c in cases if c["peer"]), None)
    versus = (
        f"circuit-tracer {peer['circuit_tracer']}, torch {peer['torch']}, "
        f"{peer['threads']} threads."
        if peer
        else "No peer was run."
    )
    loads = [c["ours"]["load_average"] for c in cases]
    loads += [c["peer"]["load_average"] for c in cases if c["peer"]]
    return (
        f"## vs_circuit_tracer, {case['date']}, {case['git']}\n\n"
        f"{case['hardware']}; at the start of the workers "
        f"{min(loads)} to {max(loads)}. {versus}\n\n"
        f"{case['model']}, float32, prompt {case['prompt']!r} with bos first; "
        f"synthetic dictionaries of {case['features']} features per layer, about "
        f"{case['active']:g} active per token and layer.\n\n"
        f"{table(cases)}\n\n{stages(cases)}\n"
    )


# -- command line ----------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--peer-python", help="python that has circuit-tracer")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kinds", nargs="+", choices=("clt", "plt"))
    parser.add_argument("--features", type=int, default=256, help="per layer")
    parser.add_argument("--active", type=float, default=31.0, help="per token, layer")
    parser.add_argument("--prompt", default="The Eiffel Tower is in the city of")
    parser.add_argument("--seed", type=int, default=0, help="of the dictionary")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--peer-seconds",
        type=float,
        default=120.0,
        help="begin no further repeat of the peer after this long",
    )
    parser.add_argument("--variants", nargs="+", default=["shipped", "grouped"])
    parser.add_argument("--batch-size", type=int, default=64, help="of the peer")
    parser.add_argument("--out", type=Path, default=Path("out/vs_circuit_tracer"))
    parser.add_argument("--work", type=Path, help="weights and answers; OUT/work")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.kinds = args.kinds or ["clt", "plt"]
    args.texts = TEXTS
    if args.smoke:
        args.model, args.texts = str(SMOKE_MODEL), SMOKE_TEXTS
        args.prompt, args.features, args.active = "w7 w31 w7 w55 w12 w90", 40, 6.0
    if args.peer_python and not Path(args.peer_python).is_file():
        parser.error(f"--peer-python {args.peer_python}: no such file")
    for variant in args.variants:
        name, _, batch = variant.partition(":")
        if name not in ("shipped", "grouped") or not (batch or "1").isdigit():
            parser.error(f"--variants {variant}: shipped or grouped, or grouped:256")
    args.work = args.work or args.out / "work"
    return args


def main() -> None:
    args = arguments()
    if args.worker:
        worker(args.worker)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    common = {
        "benchmark": "vs_circuit_tracer",
        "date": datetime.date.today().isoformat(),
        "git": git_sha(),
        "hardware": hardware_line(),
        "jax": jax.__version__,
        "model": "golden (tiny)" if args.smoke else args.model,
        "prompt": args.prompt,
        "features": args.features,
        "active": args.active,
        "config": dataclasses.asdict(CONFIG),
    }
    if not args.peer_python:
        print("no --peer-python: only our side runs, and nothing is compared")
    files = prepare(args)
    gc.collect()
    cases: list[dict[str, Any]] = []
    for kind in args.kinds:
        cases += run_kind(args, kind, files[kind], common)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "results.json").write_text(json.dumps(cases, indent=1))
    text = section(cases)
    same = git_sha() == common["git"]
    publish(text, args.append if same else None)
    if not same:
        print("the code changed during the run: these times are of no one version")
        sys.exit(0 if args.smoke else 1)


if __name__ == "__main__":
    main()
