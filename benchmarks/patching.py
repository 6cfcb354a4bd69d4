"""200 ablations in one batched call against one-by-one calls.

    JAXCLT_CACHE=... python benchmarks/patching.py --append benchmarks/RESULTS.md
    python benchmarks/patching.py --smoke

Both go through the same function with the same measurement and give the same numbers
(checked before timing), once as calls of `Subject.effects` and once with the rows
gathered beforehand, which leaves only the compiled program. Rounds alternate, so that
other load on the machine hits both; ratios are of medians. CPU seconds are of all
threads. Compilation is not in the times: the calls that are checked come first.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _timing import command_line, hardware_line, publish, timed, title

HERE = Path(__file__).resolve().parent
SMOKE_MODEL = HERE.parent / "tests/goldens/circuit_tracer_clt/model"
PROMPT = "The Eiffel Tower is in the city of"


def compare(
    name: str, batched: Callable[[], Any], single: Callable[[int], Any], args: Any
) -> list[str]:
    """Time both in turn; rows of a table. `single(count)` makes `count` calls."""
    together, alone = batched(), single(args.single)
    for i, one in enumerate(alone):
        np.testing.assert_allclose(
            one.logit_K[0], together.logit_K[i], atol=1e-3, rtol=1e-4
        )
    wall: dict[str, list[float]] = {"batched": [], "single": []}
    cpu: dict[str, list[float]] = {"batched": [], "single": []}
    scale = args.n / args.single
    for _ in range(args.repeats):
        for kind, call, factor in (
            ("batched", batched, 1.0),
            ("single", lambda: single(args.single), scale),
        ):
            _, w, c = timed(call)
            wall[kind].append(w * factor)
            cpu[kind].append(c * factor)
    rows = []
    for unit, found in (("wall", wall), ("CPU", cpu)):
        m = {k: statistics.median(v) for k, v in found.items()}
        rows.append(
            f"| {name} | {unit} s | {m['batched']:.2f} | {m['single']:.2f} | "
            f"{m['single'] / m['batched']:.1f} |"
        )
        print(rows[-1], flush=True)
    return rows


def section(rows: list[str], hardware: str, args: argparse.Namespace) -> str:
    """The results as a section of RESULTS.md."""
    scaled = "" if args.single == args.n else f", scaled from {args.single}"
    lines = [
        title("patching"),
        "",
        f"{hardware}.",
        "",
        f"{args.n} ablations of single features with logits and KL of each, "
        f"{Path(args.model).name}, {args.dictionary}, prompt '{args.prompt}', float32; "
        f"medians of {args.repeats} alternating rounds; one by one: {args.n} calls"
        f"{scaled}. Same logits to 1e-3, checked first.",
        "",
        "| patches | unit | batched | one by one | ratio |",
        "| --- | --- | --- | --- | --- |",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dictionary", default="neurons:32")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--single", type=int, help="one-by-one calls timed, all of n")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=None)
    parser.add_argument(
        "--modes", nargs="*", default=["constrained", "additive", "iterative"]
    )
    args = parser.parse_args()
    if args.smoke:
        args.model, args.dictionary = str(SMOKE_MODEL), "neurons"
        args.prompt, args.n, args.repeats = "Hello world", 8, 1
    args.single = args.single or args.n

    import jax

    import jaxclt
    from jaxclt.patching.change import Change, batched
    from jaxclt.patching.how import How
    from jaxclt.patching.subject import Subject

    model = jaxclt.load_model(args.model)
    dictionary = jaxclt.load_dictionary(args.dictionary, model)
    graph = jaxclt.attribute(model, dictionary, args.prompt, max_features=args.features)
    subject = Subject.of(model, dictionary, graph)
    order = np.argsort(-graph.influence_N[: graph.n_features])
    live = order[graph.value_A[order] != 0]
    node = np.asarray(jax.random.permutation(jax.random.key(0), live))[: args.n]
    node_3 = np.stack([graph.layer_A, graph.pos_A, graph.feature_A], 1)[node]
    ask = subject.ask()

    def ablation(node_E3: Any) -> Change:
        return batched(Change.of(subject.gather(node_E3)), [1] * len(node_E3))

    whole = ablation(node_3)
    hardware = hardware_line()
    print(hardware, flush=True)

    def run(mode: Any) -> list[str]:
        how = How(mode=mode)
        layers = np.array([subject.layer_range(None, x[:1], mode) for x in node_3])

        def call(change: Change, rows: Any, chunk: int | None = None) -> Any:
            return subject.effects(change, rows, how, ask, chunk=chunk)

        return compare(
            f"{mode}, compiled programs",
            lambda: call(whole, layers, args.chunk),
            lambda n: [call(whole.where([i]), layers[[i]]) for i in range(n)],
            args,
        ) + compare(
            f"{mode}, calls",
            lambda: call(ablation(node_3), layers, args.chunk),
            lambda n: [call(ablation(node_3[[i]]), layers[[i]]) for i in range(n)],
            args,
        )

    text = section([row for mode in args.modes for row in run(mode)], hardware, args)
    publish(text, args.append)


if __name__ == "__main__":
    main()
