"""What graphs say of circuits that are known: the table of this folder's README.

    python experiments/zoo/run.py [--out DIR] [--only two_hop absolute ...]

Writes DIR/table.md and DIR/results.json (DIR is `out/zoo` unless given), a row as soon
as it is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from learned import learn
from planted import Case, Planted, absolute, induction, true_dictionary, two_hop
from recovery import (
    case_graph,
    hidden,
    record_prompt,
    recover,
    swap_error,
)

from jaxclt.clt.active import active_features
from jaxclt.clt.coder import Dictionary
from jaxclt.clt.neurons import NeuronDictionary

Row = dict[str, Any]
COLUMNS = (
    "member", "dictionary", "prompts", "FVU", "L0", "true", "shortcut", "early",
    "error", "bias", "recall", "precision", "swap",
)  # fmt: skip


def scored(
    planted: Planted,
    name: str,
    dictionary: Dictionary,
    cases: tuple[Case, ...],
    prompts: str = "",
    **more: Any,
) -> Row:
    found = dataclasses.asdict(recover(planted, dictionary, cases))
    row = {"member": planted.name, "dictionary": name, "prompts": prompts}
    return row | more | found


def learned(planted: Planted, **options: Any) -> tuple[str, Dictionary, Row]:
    start = time.perf_counter()
    done = learn(planted, **options)
    kind = "PLT" if options["span"] == 1 else "CLT"
    name = f"{kind}, {options['sparsity']:g}"
    if options.get("jacobian"):
        name += f", Jacobian {options['jacobian']:g}"
    more = {
        "FVU": float(done.fvu_L.max()),
        "L0": " + ".join(f"{x:.1f}" for x in done.l0_L),
        "seconds": time.perf_counter() - start,
    }
    return name, done.dictionary, more


def two_hops() -> Iterator[Row]:
    planted = two_hop()
    cases = planted.cases[::4]
    yield scored(planted, "true", true_dictionary(planted, span=2), cases)
    yield scored(planted, "neurons", NeuronDictionary(), cases)
    for span in (1, 2):
        for sparsity in (1e-4, 1e-3, 1e-2, 1e-1):
            name, dictionary, more = learned(planted, span=span, sparsity=sparsity)
            yield scored(planted, name, dictionary, cases, **more)


def absolutes() -> Iterator[Row]:
    planted = absolute()
    parts = {"memorised": planted.cases[:1], "elsewhere": planted.cases[1:9]}
    kinds: list[tuple[str, Dictionary, Row]] = [
        ("true", true_dictionary(planted), {}),
        ("neurons", NeuronDictionary(), {}),
    ]
    for sparsity, jacobian in ((1e-2, 0.0), (1e-1, 0.0), (1e-1, 10.0)):
        kinds.append(
            learned(planted, span=1, sparsity=sparsity, jacobian=jacobian, batch=256)
        )
    for name, dictionary, more in kinds:
        for prompts, cases in parts.items():
            row = scored(planted, name, dictionary, cases, prompts, **more)
            yield row | memorised(planted, dictionary, cases)


def memorised(planted: Planted, dictionary: Dictionary, cases: tuple[Case, ...]) -> Row:
    """Features on a case, how often those fire elsewhere, and what the graph says.

    `fires` is the share of 200 points on which a feature of the case fires, by the
    features' influence on the case; `linear` the error of the graph's own response to
    the swap, no feature switching on or off.
    """
    fires: dict[int, int] = {}
    cfg, params = planted.cfg, planted.params
    points = planted.cases[1:201]
    for case in points:
        rec = record_prompt(params, case.token_T, cfg)
        for feature in active_features(dictionary, params, rec, cfg).feature_A.tolist():
            fires[feature] = fires.get(feature, 0) + 1
    often, size, linear = [], [], []
    for case in cases:
        graph = case_graph(planted, dictionary, case)
        influence_A = graph.influence_N[graph.feature_cols]
        often_A = np.array([fires.get(f, 0) for f in graph.feature_A.tolist()])
        often.append(float(influence_A @ often_A / influence_A.sum() / len(points)))
        size.append(graph.n_features)
        linear.append(swap_error(planted, dictionary, case, gates="frozen"))
    return {
        "on": float(np.mean(size)),
        "fires": float(np.mean(often)),
        "linear": float(np.mean(linear)),
    }


def inductions(*, soft: bool = False) -> Iterator[Row]:
    planted = induction(soft=soft)
    cases = planted.cases[:6]
    kinds: list[tuple[str, Dictionary, Row]] = [
        ("true", true_dictionary(planted, span=2), {}),
        ("neurons", NeuronDictionary(), {}),
    ]
    for span in (1, 2):
        kinds.append(learned(planted, span=span, sparsity=1e-2, batch=256))
    for name, dictionary, more in kinds:
        row = scored(planted, name, dictionary, cases, **more)
        yield row | dataclasses.asdict(hidden(planted, dictionary, cases))


def shown(value: Any) -> str:
    if isinstance(value, str):
        return value.replace("|", "\\|")
    if value is None or value != value:
        return ""
    return f"{value:.4f}" if 0 < abs(value) < 0.005 else f"{value:.2f}"


def table(rows: list[Row], columns: tuple[str, ...]) -> str:
    lines = [columns, ("---",) * len(columns)]
    lines += [tuple(shown(row.get(c)) for c in columns) for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


MEMBERS = {
    "two_hop": two_hops,
    "absolute": absolutes,
    "induction": inductions,
    "soft_induction": partial(inductions, soft=True),
}
WHY = (
    "dictionary", "key_influence", "query_influence", "key_response", "query_response",
    "key_effect", "query_effect", "key_frozen", "key_live", "query_frozen",
    "query_live", "key_small", "query_small", "query_swap",
)  # fmt: skip
EXTRA = {
    "|x|": ("dictionary", "prompts", "on", "fires", "swap", "linear"),
    "induction": WHY,
    "soft induction": WHY,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("out/zoo"))
    parser.add_argument("--only", nargs="*", choices=MEMBERS, default=list(MEMBERS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in args.only:
        for row in MEMBERS[name]():
            rows.append(row)
            print(json.dumps(row), flush=True)
            text = table(rows, COLUMNS)
            for member, columns in EXTRA.items():
                some = [r for r in rows if r["member"] == member]
                if some:
                    text += f"\n{member}:\n\n" + table(some, columns)
            (args.out / "table.md").write_text(text)
            (args.out / "results.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
