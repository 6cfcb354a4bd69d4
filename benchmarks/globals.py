"""Global weights: V against the matmul peak, statistics against the model alone.

    python benchmarks/make_synthetic_dictionary.py --model smollm2-135m --kind clt \
        --features 1024 --out /tmp/clt
    python benchmarks/globals.py --dictionary /tmp/clt --data TEXT \
        --out /tmp/globals --append benchmarks/RESULTS.md
    python benchmarks/globals.py --smoke

- Virtual weights between all features: the blocks alone (what is multiplied already on
  the device), with the dictionary read from disk, and with the strongest inputs and
  outputs of every feature kept. Share of the best square matmul, measured before each
  round.
- Co-activation sums of a subset, a batch of windows at a time, against the same windows
  through the model alone, without and with the unembedding; rounds alternate, so that
  other load hits all three.
- The command's own loop over --tokens tokens, with peak memory; resumed once.
"""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from _timing import (
    command_line,
    hardware_line,
    load_average,
    peak_rss_gib,
    publish,
    reset_peak_rss,
    rss_gib,
    timed,
    title,
)

GOLDEN = Path(__file__).resolve().parents[1] / "tests/goldens/circuit_tracer_clt"


def median(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} (best {max(values):.3g})"


def virtual_rows(
    model: Any, dictionary: Any, rounds: int, top: int, layers: int
) -> list[str]:
    """Rows of the table of virtual weights, among the last `layers` layers."""
    import jax
    import jax.numpy as jnp

    from jaxclt.clt.coder import Bound
    from jaxclt.clt.subset import Subset
    from jaxclt.global_weights import weights

    on = Bound(dictionary, model.params, model.cfg)
    cfg = on.shape
    layer_LF, feature_LF = np.indices((cfg.n_layers, cfg.n_features))
    place = np.stack([layer_LF.ravel(), feature_LF.ravel()], 1)
    everything = Subset.of(place[layer_LF.ravel() >= cfg.n_layers - layers], cfg)
    pairs = layers * (layers - 1) // 2
    gflop = pairs * 2 * cfg.n_features**2 * cfg.d_model / 1e9
    one, two = (
        jax.random.normal(jax.random.key(i), (cfg.n_features, cfg.d_model))
        for i in range(2)
    )

    def blocks() -> None:
        for _ in range(pairs):
            jax.block_until_ready(weights.block(one, two))

    def tiles() -> None:
        for tile in weights.virtual_tiles(on, everything):
            jax.block_until_ready(tile.value_RN)

    def strongest() -> None:
        weights.strongest_virtual(on, everything, top)

    square = jax.random.normal(jax.random.key(2), (2048, 2048))
    product = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))
    jax.block_until_ready(product(square))

    def peak_of() -> tuple[float, float]:
        """GFLOP by wall and by CPU second of the best of some square matmuls."""
        runs = [timed(lambda: product(square)) for _ in range(6)]
        work = 2 * 2048**3 / 1e9
        return work / min(r[1] for r in runs), work / min(r[2] for r in runs)

    rows = []
    for name, run in (
        ("blocks alone", blocks),
        ("dictionary read, blocks", tiles),
        (f"dictionary read, {top} strongest in and out kept", strongest),
    ):
        run()
        found = []
        for _ in range(rounds):
            before = peak_of()
            _, wall, cpu = timed(run)
            peak = [max(pair) for pair in zip(before, peak_of(), strict=True)]
            speed = (gflop / wall, gflop / cpu)
            share = [100 * x / y for x, y in zip(speed, peak, strict=True)]
            found.append([*speed, *share])
        by_wall, by_cpu, wall_share, cpu_share = (
            median(list(column)) for column in zip(*found, strict=True)
        )
        rows.append(
            f"| {name} | {gflop:,.4g} | {by_wall} | {wall_share}% | {by_cpu} | "
            f"{cpu_share}% |"
        )
        print(rows[-1], flush=True)
    assert jnp.isfinite(weights.block(one, two)).all()
    return rows


def statistics_rows(
    model: Any, dictionary: Any, windows: Any, n_features: int, rounds: int
) -> list[str]:
    """Rows of the table of tokens/s."""
    import jax
    import jax.numpy as jnp

    from jaxclt.clt.coder import Bound
    from jaxclt.global_weights.statistics import Plan, add_sums, encoders, sums_of
    from jaxclt.lm.run import embed, native_mlp, run, unembed
    from jaxclt.text import features as global_text
    from jaxclt.text.windows import BATCH_TOKENS, batches

    params, on = model.params, Bound(dictionary, model.params, model.cfg)
    features = f"top:{n_features}"
    subset = global_text.choose_features(model, dictionary, features, windows)
    plan = Plan(lm=model.cfg, coder=on.coder, starts=subset.starts)
    enc = encoders(on, subset)
    token_WS, mask_WS, _ = next(batches(windows, 0, BATCH_TOKENS))
    n = int(mask_WS.sum())

    def through(params: Any, token_WS: Any) -> Any:
        def one(token_S: Any) -> Any:
            embed_SD = embed(params, token_S)
            policy = native_mlp(model.cfg)
            return run(
                params, embed_SD, policy, cfg=model.cfg, keep_patterns=False
            ).out_TD

        return jax.vmap(one)(jnp.maximum(token_WS, 0))

    bare = jax.jit(through)
    logits = jax.jit(lambda p, token_WS: unembed(p, through(p, token_WS)))
    sums = sums_of(params, enc, token_WS, mask_WS, None, None, plan=plan)

    def gather() -> Any:
        nonlocal sums
        more = sums_of(params, enc, token_WS, mask_WS, None, None, plan=plan)
        sums = add_sums(sums, more)
        return sums

    calls = {
        "model alone, to the last layer's output": lambda: bare(params, token_WS),
        "model with logits": lambda: logits(params, token_WS),
        f"model and sums of {len(subset):,} features": gather,
    }
    speed: dict[str, list[float]] = {name: [] for name in calls}
    by_cpu: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(rounds):
        for name, call in calls.items():
            _, wall, cpu = timed(call)
            speed[name].append(n / wall)
            by_cpu[name].append(n / cpu)
    rows = [
        f"| {name} | {n:,} | {median(speed[name])} | {median(by_cpu[name])} |"
        for name in calls
    ]
    rows.append("")
    for what, found in (("wall", speed), ("CPU", by_cpu)):
        first, second, last = (statistics.median(x) for x in found.values())
        rows.append(
            f"By {what} seconds the sums run at {last / first:.0%} of the bare pass "
            f"and {last / second:.0%} of the pass with logits (medians)."
        )
    print("\n".join(rows), flush=True)
    return rows


def whole(model: Any, dictionary: Any, args: Any, features: str) -> list[str]:
    """The command's loop, its memory, and a resumed run."""
    from jaxclt.global_weights import (
        circuit as global_circuit,
    )
    from jaxclt.global_weights import (
        gather as global_gather,
    )
    from jaxclt.global_weights import (
        views as global_views,
    )

    state = args.out / "state"
    shutil.rmtree(state, ignore_errors=True)
    reset_peak_rss()
    held = rss_gib()
    seen: list[tuple[float, int]] = []

    def heard(what: str, done: int, total: int) -> None:
        if what == "statistics":
            seen.append((time.perf_counter(), done))

    started = time.perf_counter()
    found = global_gather.coactivation(
        model,
        dictionary,
        str(args.data),
        features=features,
        tokens=args.tokens,
        context=args.context,
        state=state,
        on_stage=heard,
    )
    seconds = time.perf_counter() - started
    peak = peak_rss_gib()
    again, resumed, _ = timed(
        lambda: global_gather.coactivation(
            model,
            dictionary,
            str(args.data),
            features=features,
            tokens=args.tokens,
            context=args.context,
            state=state,
        )
    )
    np.testing.assert_array_equal(again.sums["act"][-1], found.sums["act"][-1])
    size = (state / "statistics.npz").stat().st_size / 2**20
    one, wall, _ = timed(
        lambda: global_views.write_globals(
            model,
            dictionary,
            global_circuit.global_weights(model, dictionary, found),
            args.out,
        )
    )
    largest = ", ".join(
        f"{x['never']:.1%} of the largest {x['share']:.2%}"
        for x in one.meta["interference"]["largest"]
    )
    (start, first), (end, last) = seen[0], seen[-1]
    rate = (last - first) / max(end - start, 1e-9)
    lines = [
        f"`jaxclt globals`: {found.n_tokens:,} tokens in {seconds:.0f} s, tokenizer, "
        "choice of features, compilation and checkpoints included "
        f"({rate:,.0f} tokens/s after the first batch); "
        f"the process held {held:.2f} GiB before and {peak:.2f} GiB at most; "
        f"statistics.npz {size:.0f} MiB; called again on the finished directory "
        f"{resumed:.1f} s. Weights, vocabulary and files {wall:.1f} s, "
        f"{len(one.links):,} links. Pairs of features that never fire together: "
        f"{one.meta['interference']['never']:.1%} of all, {largest} of |V|.",
    ]
    print("\n".join(lines), flush=True)
    return lines


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dictionary", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("globals"))
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--top", type=int, default=16)
    parser.add_argument("--layers", type=int, help="of the virtual weights; the last")
    parser.add_argument(
        "--parts", nargs="+", default=["virtual", "statistics", "command"]
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.smoke:
        args.model, args.dictionary = str(GOLDEN / "model"), GOLDEN / "dictionary"
        args.data = args.out / "text.txt"
        words = [f"w{3 + i * i % 90}" for i in range(4000)]
        args.data.write_text(" ".join(words))
        args.features, args.tokens, args.context = 100, 1500, 48
        args.rounds, args.top = 2, 4

    import jaxclt

    model = jaxclt.load_model(args.model)
    dictionary: Any = jaxclt.load_dictionary(args.dictionary, model)
    cfg = dictionary.cfg
    layers = args.layers or cfg.n_layers
    hardware, loads = hardware_line(), [load_average()]
    print(hardware, flush=True)
    text = [title("globals"), "", "HARDWARE", ""]
    text += [
        f"{Path(args.model).name}, a synthetic dictionary of {cfg.n_layers} x "
        f"{cfg.n_features:,} features that reads {cfg.read}, float32.",
        "",
    ]
    if "virtual" in args.parts:
        text += [
            f"Virtual weights between all features of {layers} layers, blocks of "
            f"{cfg.n_features:,} x {cfg.n_features:,} with D {cfg.d_model}; the share "
            "is of the best square matmul of 2,048 just before or after, by wall and "
            f"by CPU seconds of all threads (medians of {args.rounds} rounds); a busy "
            "machine takes more wall time from a long run than from one matmul:",
            "",
            "| | GFLOP | GFLOP/s | of the peak | GFLOP/CPU s | of the peak |",
            "| --- | --- | --- | --- | --- | --- |",
            *virtual_rows(model, dictionary, args.rounds, args.top, layers),
            "",
        ]
        loads.append(load_average())
    features = f"top:{args.features}"
    if "statistics" in args.parts:
        windows = jaxclt.read_windows(
            model, str(args.data), tokens=max(args.features, 16_384)
        ) if not args.smoke else jaxclt.read_windows(
            model, str(args.data), tokens=args.tokens, context=args.context
        )  # fmt: skip
        text += [
            f"Co-activation sums, windows of {windows.token_WS.shape[1]} tokens, "
            f"alternating rounds, medians of {args.rounds}:",
            "",
            "| | tokens a call | tokens/s | tokens/CPU s |",
            "| --- | --- | --- | --- |",
            *statistics_rows(model, dictionary, windows, args.features, args.rounds),
            "",
        ]
        loads.append(load_average())
    if "command" in args.parts:
        text += [*whole(model, dictionary, args, features), ""]
        loads.append(load_average())
    text[2] = f"{hardware}; during the run {min(loads)} to {max(loads)}."
    section = "\n".join(text)
    publish(section, args.append)


if __name__ == "__main__":
    main()
