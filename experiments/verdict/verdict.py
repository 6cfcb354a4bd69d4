"""How far graphs can be trusted, over many prompts: one line a prompt, then a table.

    python experiments/verdict/verdict.py --model M --dictionary D --out DIR \
        [--prompts FILE] [--limit N] [--features N] [--max-features N]

FILE has one prompt a line; without it, sums of the bundled adder. Appends to
DIR/verdict.jsonl after every prompt and goes on where it stopped; DIR/verdict.md has
means over prompts, with 95% intervals over prompts: ablations predicted and measured
with one assumption of the graph let go after the other (attribution of the miss), and
necessity and sufficiency of the shown graph.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxclt
from jaxclt.cli.common import use_compilation_cache
from jaxclt.lm.massive import massive_positions
from jaxclt.patching.how import How
from jaxclt.patching.subject import Subject
from jaxclt.validation.ablations import Bench, Counter
from jaxclt.validation.choice import ValidateOptions, choose
from jaxclt.validation.lines import line
from jaxclt.validation.patterns import LIVE
from jaxclt.validation.shown import Measure, shown
from jaxclt.validation.stats import mean_interval, ratio_interval

# Patches over all layers after the feature, each letting one more thing go; the
# graph's total effect is exact for the first (but for features that are no nodes).
STEPS = {
    "all held": How(mode="iterative", norms="frozen", gates="frozen"),
    "gates live": How(mode="iterative", norms="frozen", gates="live"),
    "norms live": How(mode="iterative", norms="live", gates="frozen"),
    "patterns live": How(
        mode="iterative", norms="frozen", gates="frozen", patterns="live"
    ),
    "MLPs live (errors answer)": How(mode="additive", norms="frozen"),
    "MLPs and norms live": How(mode="additive"),
    "everything live": LIVE,
}
NUMBERS = ("spearman", "sign", "slope")
TRUTH = "everything live"


def of_prompt(model: Any, dictionary: Any, prompt: str, args: Any) -> dict[str, Any]:
    """The numbers of one prompt."""
    start, key = time.perf_counter(), jax.random.key(0)
    some = {"max_features": args.max_features} if args.max_features else {}
    graph = jaxclt.attribute(model, dictionary, prompt, **some)
    options = ValidateOptions(n_features=args.features)
    subject = Subject.of(model, dictionary, graph)
    bench = Bench(
        subject=subject,
        options=options,
        choice=choose(graph, options, None, key),
        key=key,
        counter=Counter(lambda done, planned: None, 0),
    )
    node_B = bench.choice.node_B
    massive = massive_positions(subject.patchable.recording, graph.n_tokens)
    use_B = ~np.isin(graph.pos_A[node_B], massive)
    effect = {}
    for name, how in STEPS.items():
        if how.mode == "additive" and bench.span > 1:  # it would count writes twice
            how = dataclasses.replace(how, mode="constrained")
        inside = how.mode != "constrained"
        done = bench.patch(bench.single, how, everywhere=inside)
        effect[name] = done.change_BK @ bench.weight_K
        use_B = use_B & done.fine_B
    said = {
        "total effect": -(bench.weight_K @ bench.effect_KA)[node_B],
        "derivative": -(bench.weight_K @ bench.derivative_KA)[node_B],
    }
    true_B = effect[TRUTH][use_B, None]

    def against(x_B: np.ndarray, y_B1: np.ndarray) -> dict[str, Any]:
        found = line(x_B[use_B, None], y_B1, key)
        return {k: found[k] for k in NUMBERS}

    return {
        "prompt": prompt,
        "n": int(use_B.sum()),
        "massive": int(np.isin(graph.pos_A[node_B], massive).sum()),
        "total effect against": {
            name: against(said["total effect"], x_B[use_B, None])
            for name, x_B in effect.items()
        },
        f"against {TRUTH}": {
            name: against(x_B, true_B)
            for name, x_B in {**said, **effect}.items()
            if name != TRUTH
        },
        "shown": shown(subject, Measure(bench.ask(), bench.weight_K), key),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _parts(found: list[dict[str, Any]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tops and bottoms of shares by prompt: single ones may divide by next to nothing.

    Of sufficiency, necessity, and sufficiency of random sets.
    """
    known = [x for x in found if x["sufficiency"] is not None]
    m = {k: np.array([x["m"][k] for x in known]) for k in ("all", "none")}
    made = m["all"] - m["none"]
    shares = [[x[k] for x in known] for k in ("sufficiency", "necessity")]
    shares.append([x["random"]["sufficiency"]["mean"] for x in known])
    return [(np.array(x, float) * made, made) for x in shares]


def table(lines: list[dict[str, Any]]) -> str:
    """Means over prompts, intervals over prompts."""
    key = jax.random.key(1)

    def say(values: list[float | None]) -> str:
        x = np.array(values, float)
        x = x[np.isfinite(x)]
        if not len(x):
            return "-"
        low, high = mean_interval(x, key)
        return f"{x.mean():.2f} ({low:.2f} to {high:.2f})"

    def share_of(pair: Any) -> str:
        low, high = ratio_interval(*pair, key)
        return f"{pair[0].sum() / pair[1].sum():.2f} ({low:.2f} to {high:.2f})"

    out = [f"{len(lines)} prompts; means (95% over prompts).", ""]
    for what in ("total effect against", f"against {TRUTH}"):
        out += [f"| {what} | {' | '.join(NUMBERS)} |", "|---|---|---|---|"]
        for name in lines[0][what]:
            cells = (say([x[what][name][k] for x in lines]) for k in NUMBERS)
            out.append(f"| {name} | {' | '.join(cells)} |")
        out.append("")
    out += ["| shown graph | sufficiency | necessity | random: sufficiency |"]
    out += ["|---|---|---|---|"]
    for name in ("clamped", "live"):
        cells = map(share_of, _parts([x["shown"][name] for x in lines]))
        out.append(f"| {name} | {' | '.join(cells)} |")
    share = [x["shown"]["n"] / x["shown"]["n_active"] for x in lines]
    seconds = sum(x["seconds"] for x in lines)
    out += ["", f"Shown: {say(share)} of the active features. {seconds:.0f} s in all."]
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="addition")
    parser.add_argument("--dictionary", default="addition-clt")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--features", type=int, default=30)
    parser.add_argument("--max-features", type=int)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    use_compilation_cache()
    # 37 and 61 have no factor in common with 100: sums of all sizes.
    prompts = [f"calc: {37 * i % 100}+{61 * i % 100}=" for i in range(1, 100)]
    if args.prompts:
        prompts = args.prompts.read_text("utf-8").splitlines()
    model = jaxclt.load_model(args.model)
    dictionary = jaxclt.load_dictionary(args.dictionary, model)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "verdict.jsonl"
    lines = []
    if path.exists():
        lines = [json.loads(x) for x in path.read_text("utf-8").splitlines()]
    seen = {x["prompt"] for x in lines}
    for i, prompt in enumerate(prompts[: args.limit]):
        if prompt in seen:
            continue
        lines.append(of_prompt(model, dictionary, prompt, args))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        print(f"{i + 1} {prompt!r}: {lines[-1]['seconds']} s", flush=True)
        (args.out / "verdict.md").write_text(table(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
