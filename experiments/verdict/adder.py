"""How far the bundled adder's graphs can be trusted: both lines of 50 sums.

    python experiments/verdict/adder.py --out DIR [--sums N]

Of every sum's whole graph 30 influential features and 30 random ones are ablated as
`jaxclt validate` does it, and predictions stand beside what that did (maths 16.11).
Writes DIR/adder.json: means over sums with 95% intervals, of each line and of what
stands beside it, and every sum's headline numbers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxclt
from jaxclt.cli.common import use_compilation_cache
from jaxclt.clt.coder import Dictionary
from jaxclt.io.model import Model
from jaxclt.patching.how import How
from jaxclt.patching.subject import Subject
from jaxclt.validation.ablations import Bench, Counter
from jaxclt.validation.choice import ValidateOptions, choose
from jaxclt.validation.held_live import held_and_live
from jaxclt.validation.stats import mean_interval

NUMBERS = ("spearman", "pearson", "sign", "slope", "within_2", "slope_on_targets")
BESIDE = ("targets", "top", "random", "value", "last_norm", "derivative")


def lines(model: Model, dictionary: Dictionary, prompt: str) -> dict[str, Any]:
    """The held and live lines of a sum, and what stands beside them, by name."""
    graph = jaxclt.attribute(model, dictionary, prompt, tolerance=0.0)
    options, key = ValidateOptions(n_features=30), jax.random.key(0)
    bench = Bench(
        subject=Subject.of(model, dictionary, graph),
        options=options,
        choice=choose(graph, options, None, key),
        key=key,
        counter=Counter(lambda done, planned: None, 0),
    )
    found = held_and_live(bench, bench.patch(bench.single, How()))
    named = {kind: found[kind] for kind in ("held", "live")}
    return named | {
        f"{kind}, {name}": line[name]
        for kind, line in named.items()
        for name in BESIDE
        if name in line
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over sums with intervals, by line and number."""
    found: dict[str, Any] = {}
    for name in rows[0]:
        for number in NUMBERS:
            known = [x for row in rows if (x := row[name].get(number)) is not None]
            if known:
                ends = mean_interval(np.array(known), jax.random.key(0))
                said = [round(float(x), 3) for x in (np.mean(known), *ends)]
                found.setdefault(name, {})[number] = said
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sums", type=int, default=50)
    flags = parser.parse_args()
    use_compilation_cache()
    model = jaxclt.load_model("addition")
    dictionary = jaxclt.load_dictionary("addition-clt", model)
    order = jax.random.permutation(jax.random.key(1), 100 * 100)[: flags.sums]
    prompts = [f"calc: {i // 100}+{i % 100}=" for i in np.asarray(order).tolist()]
    rows = [lines(model, dictionary, prompt) for prompt in prompts]
    each = [
        {"prompt": prompt}
        | {kind: {x: row[kind][x] for x in NUMBERS[:4]} for kind in ("held", "live")}
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    flags.out.mkdir(parents=True, exist_ok=True)
    result = {"mean": summary(rows), "sums": each}
    (flags.out / "adder.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
