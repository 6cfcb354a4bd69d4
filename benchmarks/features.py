"""Feature dashboards: the streaming pass against the model alone, on the same windows.

    python benchmarks/features.py --dictionary neurons --data TEXT \
        --append benchmarks/RESULTS.md
    python benchmarks/features.py --smoke

The model alone is its blocks, in the same batches, without the unembedding. The
streaming pass is `gather_examples` from an empty state, so that the batches counted are
those where nearly every window enters the ranking: later ones cost less. Rounds
alternate, ratios are of neighbours. First the counts and the largest activations are
compared with those of dense activations, window by window.
"""

from __future__ import annotations

import statistics
import tempfile
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


def check(model: Any, encoder: Any, windows: Any) -> None:
    """The streaming pass against a plain one."""
    import jax
    import jax.numpy as jnp

    from jaxclt.dashboards.stream import gather_examples
    from jaxclt.lm.run import record

    @jax.jit
    def dense(params: Any, encoder: Any, token_S: Any) -> Any:
        seen = record(params, token_S, cfg=model.cfg)

        def each(xs: Any) -> Any:
            p, x, mid_SD, scale_S = xs
            return encoder.layer(p, x, mid_SD, scale_S)

        scale_LS = seen.frozen.mlp_scale_LT
        xs = (params.blocks, encoder.weights, seen.mid_LTD, scale_LS)
        return jax.lax.map(each, xs)

    found = gather_examples(model.params, encoder, windows)
    count_LF, high_LF = 0, -np.inf
    for token_S, mask_S in zip(windows.token_WS, windows.mask_WS, strict=True):
        a_LSF = np.asarray(
            dense(model.params, encoder, jnp.asarray(np.maximum(token_S, 0)))
        )[:, mask_S]
        count_LF = count_LF + (a_LSF != 0).sum(1)
        high_LF = np.maximum(high_LF, np.where(a_LSF != 0, a_LSF, -np.inf).max(1))
    apart = np.abs(found.count_U - count_LF.ravel())  # pyright: ignore
    # Pre-activations at a threshold fall to either side with the rounding.
    assert apart.sum() <= 1e-4 * found.count_U.sum(), apart.sum()
    high_U = np.where(np.isfinite(high_LF), high_LF, 0).ravel()
    error = np.abs(found.max_U - high_U).max() / np.abs(high_U).max()
    assert error < 1e-3, error
    print(
        f"checked on {len(windows.token_WS)} windows: {apart.sum()} of "
        f"{found.count_U.sum():,} counts differ, largest activations to {error:.1e}",
        flush=True,
    )


def rows(model: Any, encoder: Any, windows: Any, args: Any) -> list[str]:
    """Rows of the table, and the ratios."""
    import jax
    import jax.numpy as jnp

    from jaxclt.dashboards.stream import ExampleOptions, gather_examples
    from jaxclt.lm.run import embed, native_mlp, run
    from jaxclt.text.windows import batches

    batch_tokens = args.windows * windows.token_WS.shape[1]

    @jax.jit
    def blocks(params: Any, token_WS: Any) -> Any:
        def one(token_S: Any) -> Any:
            policy = native_mlp(model.cfg)
            embed_SD = embed(params, token_S)
            return run(
                params, embed_SD, policy, cfg=model.cfg, keep_patterns=False
            ).out_TD

        return jax.vmap(one)(jnp.maximum(token_WS, 0))

    def bare() -> None:
        for token_WS, _, _ in batches(windows, 0, batch_tokens):
            jax.block_until_ready(blocks(model.params, token_WS))

    def stream() -> None:
        options = ExampleOptions(batch_tokens=batch_tokens)
        gather_examples(model.params, encoder, windows, options)

    calls = {"model alone, its blocks": bare, "streaming pass": stream}
    compile_s = {name: timed(call)[1] for name, call in calls.items()}
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    reset_peak_rss()
    held = rss_gib()
    n = windows.n_tokens
    for _ in range(args.rounds):
        for name, call in calls.items():
            _, wall_s, cpu_s = timed(call)
            wall[name].append(n / wall_s)
            cpu[name].append(n / cpu_s)
    found = [
        f"| {name} | {n:,} | {median(wall[name])} | {median(cpu[name])} | "
        f"{compile_s[name]:.1f} |"
        for name in calls
    ]
    ratios = [
        statistics.median(b / a for a, b in zip(*x.values(), strict=True))
        for x in (wall, cpu)
    ]
    found += [
        "",
        f"The streaming pass runs at {ratios[0]:.0%} of the model alone by wall and "
        f"{ratios[1]:.0%} by CPU seconds (medians of {args.rounds} ratios); the "
        f"process held {held:.2f} GiB before and {peak_rss_gib():.2f} GiB at most.",
    ]
    print("\n".join(found), flush=True)
    return found


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dictionary", default="neurons")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8, help="of a batch")
    parser.add_argument("--batches", type=int, default=4, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.smoke:
        args.model, args.dictionary = str(GOLDEN / "model"), str(GOLDEN / "dictionary")
        args.data = Path(tempfile.mkdtemp()) / "text.txt"
        args.data.write_text(" ".join(f"w{3 + i * i % 90}" for i in range(4000)))
        args.context, args.rounds = 48, 2

    import jaxclt
    from jaxclt.clt.coder import load

    model = jaxclt.load_model(args.model)
    dictionary: Any = jaxclt.load_dictionary(args.dictionary, model)
    encoder = load(dictionary, model.params, model.cfg, decoders=False)
    n = args.windows * args.batches
    windows = jaxclt.read_windows(
        model,
        str(args.data),
        tokens=(n + 1) * args.context,
        context=args.context,
    ).take(slice(0, n))
    hardware, loads = hardware_line(), [load_average()]
    print(hardware, flush=True)
    check(model, encoder, windows.take(slice(0, 3)))
    text = [title("features"), "", "HARDWARE", ""]
    text += [
        f"{Path(args.model).name}, {dictionary.name}: {encoder.n_layers} x "
        f"{encoder.n_features:,} features; {n} windows of {args.context} tokens in "
        f"batches of {args.windows}, from an empty state:",
        "",
        "| | tokens a call | tokens/s | tokens/CPU s | first call, s |",
        "| --- | --- | --- | --- | --- |",
        *rows(model, encoder, windows, args),
        "",
    ]
    loads.append(load_average())
    text[2] = f"{hardware}; during the run {min(loads)} to {max(loads)}."
    publish("\n".join(text), args.append)


if __name__ == "__main__":
    main()
