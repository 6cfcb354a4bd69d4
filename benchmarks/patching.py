"""200 ablations in one batched call against one-by-one calls.

    JAXCLT_CACHE=... python benchmarks/patching.py [--model smollm2-135m]
        [--dictionary neurons:32] [--n 200] [--single 20] [--repeats 3]

Both go through the same function with the same measurement and give the same numbers
(checked before timing), once as calls of `Subject.effects` and once with the edits
prepared beforehand, which leaves only the compiled program. Rounds alternate, so that
other load on the machine hits both; ratios are of medians. CPU seconds are of all
threads.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from _timing import hardware_line, timed

PROMPT = "The Eiffel Tower is in the city of"


def compare(
    name: str, batched: Callable[[], Any], single: Callable[[int], Any], args: Any
) -> None:
    """Time both in turn and print the ratio; `single(count)` makes `count` calls."""
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
    w, c = ({k: statistics.median(v) for k, v in x.items()} for x in (wall, cpu))
    print(
        f"{name}: {args.n} ablations batched {w['batched']:.2f} s (CPU "
        f"{c['batched']:.2f}), one by one {w['single']:.2f} s (CPU {c['single']:.2f}, "
        f"scaled from {args.single}): {w['single'] / w['batched']:.1f} times wall, "
        f"{c['single'] / c['batched']:.1f} times CPU; rounds {wall}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dictionary", default="neurons:32")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--single", type=int, default=20, help="one-by-one calls timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=None)
    parser.add_argument("--modes", nargs="*", default=["constrained", "additive"])
    args = parser.parse_args()

    import jax

    import jaxclt
    from jaxclt.intervene import Subject
    from jaxclt.patching.batch import default_range, patch_many
    from jaxclt.patching.edits import batch_edits
    from jaxclt.patching.effects import measure_effect

    model = jaxclt.load_model(args.model)
    dictionary = jaxclt.load_dictionary(args.dictionary, model)
    graph = jaxclt.attribute(model, dictionary, args.prompt, max_features=args.features)
    subject = Subject.of(model, dictionary, graph)
    order = np.argsort(-graph.influence_N[: graph.n_features])
    live = order[graph.value_A[order] != 0]
    node = np.asarray(jax.random.permutation(jax.random.key(0), live))[: args.n]
    node_3 = np.stack([graph.layer_A, graph.pos_A, graph.feature_A], 1)[node]
    many = [[(*map(int, place), 0.0, 0.0)] for place in node_3]
    span, ask = subject.patchable.clt_cfg.span, subject.ask()
    prepared = [
        jax.tree.map(np.asarray, batch_edits([subject.edits(one)])) for one in many
    ]
    whole = jax.tree.map(lambda *x: np.concatenate(x), *prepared)
    print(hardware_line(), flush=True)

    def run(mode: Any) -> None:
        how = subject.how(mode)
        layers = np.array(
            [
                default_range(
                    place[:1], span=span, n_layers=model.cfg.n_layers, mode=mode
                )
                for place in node_3
            ]
        )

        def call(edits: Any, rows: Any) -> Any:
            with jax.default_matmul_precision("highest"):
                return patch_many(
                    subject.patchable,
                    edits,
                    rows,
                    how=how,
                    measure=measure_effect,
                    ask=ask,
                    chunk=args.chunk,
                )

        compare(
            f"{mode}, programs",
            lambda: call(whole, layers),
            lambda count: [call(prepared[i], layers[i : i + 1]) for i in range(count)],
            args,
        )
        compare(
            f"{mode}, calls",
            lambda: subject.effects(many, layers.tolist(), how, ask, chunk=args.chunk),
            lambda count: [
                subject.effects([many[i]], [layers[i]], how, ask) for i in range(count)
            ],
            args,
        )

    for mode in args.modes:
        run(mode)


if __name__ == "__main__":
    main()
