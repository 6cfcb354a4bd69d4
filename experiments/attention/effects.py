"""What single features do to the answer, against what is predicted of it.

    python experiments/attention/effects.py --model M --dictionary D --out DIR \
        [--prompts FILE] [--response] [--finite]

Of every prompt's graph the most influential features and as many at random are changed
in the model, one at a time, with attention, norms and MLPs live: ablated, and lowered
by a tenth. Measured is the answer's logit minus its runner-up's. Predicted are the
graph's total effect by value, the same by response (`--response`), the model's own
derivative, and what each ablation does in the local replacement model with attention
and norms live, with gates held and live (`--finite`). FILE has one prompt a line;
without it, three prompts of the package's own report. Writes DIR/results.json and
DIR/table.md after every prompt.
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
from jaxclt.graph.agreement import sign_agreement, slope, spearman
from jaxclt.graph.attribute import AttributeConfig
from jaxclt.graph.contrast import contrast
from jaxclt.graph.graph import Graph
from jaxclt.graph.yardstick import contrast_derivative, total_effect
from jaxclt.io.model import Model
from jaxclt.patching.finite import finite_effects
from jaxclt.patching.patchable import How, Part
from jaxclt.patching.subject import Subject
from jaxclt.trace.prompt import trace_prompt
from jaxclt.validation.ablations import Bench, Counter
from jaxclt.validation.choice import ValidateOptions, choose
from jaxclt.validation.stats import mean_interval

PROMPTS = (
    "The Eiffel Tower is in the city of",
    "When Mary and John went to the store, John gave a drink to",
    "table river stone green cloud table river stone green",
)
# The real MLPs, what the feature writes changed: what the derivative is the slope of.
LIVE = How(mode="additive", patterns="live", norms="live")
FACTORS = {"ablated": 0.0, "10% less": 0.9}
MEASURES = {
    "spearman": spearman,
    "sign": lambda predicted, measured: sign_agreement(measured, predicted),
    "slope": slope,
}


def predictions(graph: Graph) -> dict[str, np.ndarray]:
    """What a feature's activation adds to the contrast, by what says so, [A]."""
    derivative_N = contrast_derivative(graph)
    assert derivative_N is not None
    found = {"by value": total_effect(graph)}
    if graph.response is not None:
        found["by response"] = total_effect(graph, response=True)
    return found | {"derivative": derivative_N[graph.feature_cols]}


def measured(
    model: Model,
    dictionary: Dictionary,
    graph: Graph,
    options: ValidateOptions,
    *,
    finite: bool,
) -> dict[str, Any]:
    """Features, what is predicted of them and what each patch did, as JSON."""
    key = jax.random.key(options.seed)
    bench = Bench(
        subject=Subject.of(model, dictionary, graph),
        options=options,
        choice=choose(graph, options, None, key),
        key=key,
        counter=Counter(lambda done, planned: None, 0),
    )
    node_B, weight_K = bench.choice.node_B, contrast(graph).weight_K
    found: dict[str, Any] = {
        "feature": [graph.feature(a) for a in node_B],
        "random": bench.choice.control_B.tolist(),
        "predicted": {k: x[node_B].tolist() for k, x in predictions(graph).items()},
    }
    parts: tuple[Part, ...] = ("frozen", "live") if finite else ()
    for part in parts:
        done = finite_effects(bench.subject, node_B, gates=part)
        found["predicted"][f"finite, gates {part}"] = (-done.contrast_B).tolist()
    for name, factor in FACTORS.items():
        done = bench.patch(bench.single, LIVE, factor=factor)
        change_B = done.change_BK @ weight_K[bench.subject.targets]
        # As an effect of the activation: what went, by the part of it that went.
        found[name] = (-change_B / (1 - factor)).tolist()
    return found


def compared(line: dict[str, Any], patch: str, what: str, *, after: bool) -> list:
    """Each measure of one prompt."""
    here = np.array([pos > 0 or not after for _, pos, _ in line["feature"]])
    x, y = np.array(line["predicted"][what])[here], np.array(line[patch])[here]
    fine = np.isfinite(x + y)
    return [measure(x[fine], y[fine]) for measure in MEASURES.values()]


def table(lines: list[dict[str, Any]]) -> str:
    """Means over prompts, with 95% intervals where there are two or more."""
    rows = [
        f"{len(lines)} prompts; Spearman, right signs of the larger half, slope of "
        "measured on predicted\n",
        "| patch | features | predicted by | Spearman | sign | slope |",
        "|---|---|---|---|---|---|",
    ]
    for patch in FACTORS:
        for after in (False, True):
            for what in lines[0]["predicted"]:
                value_PX = np.array(
                    [compared(line, patch, what, after=after) for line in lines]
                )
                cells = [said(value_P) for value_P in value_PX.T]
                where = "after position 0" if after else "all"
                rows.append(f"| {patch} | {where} | {what} | {' | '.join(cells)} |")
    rows += ["", "| prompt | patch | " + " | ".join(lines[0]["predicted"]) + " |"]
    rows.append("|---|---|" + "---|" * len(lines[0]["predicted"]))
    for line in lines:
        for patch in FACTORS:
            cells = [
                "{:.2f}, {:.0%}, {:.2f}".format(
                    *compared(line, patch, what, after=False)
                )
                for what in line["predicted"]
            ]
            prompt = line["prompt"].replace("|", "\\|").replace("\n", " ")
            rows.append(f"| {prompt} | {patch} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def said(value_P: np.ndarray) -> str:
    low, high = mean_interval(value_P, jax.random.key(0))
    mean = f"{np.nanmean(value_P):.2f}"
    return mean if np.isnan(low) else f"{mean} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dictionary", default="neurons:32")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--features", type=int, default=100, help="of each kind")
    parser.add_argument("--max-features", type=int, default=1024)
    parser.add_argument("--response", action="store_true")
    parser.add_argument("--finite", action="store_true")
    args = parser.parse_args()
    use_compilation_cache()
    prompts = PROMPTS
    if args.prompts:
        prompts = args.prompts.read_text("utf-8").splitlines()
    model = jaxclt.load_model(args.model)
    dictionary = jaxclt.load_dictionary(args.dictionary, model)
    config = AttributeConfig(max_features=args.max_features)
    options = ValidateOptions(n_features=args.features)
    args.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for prompt in filter(None, prompts):
        graph = trace_prompt(model, dictionary, prompt, config=config).graph
        said = {"prompt": prompt, "contrast": contrast(graph).text}
        found = measured(model, dictionary, graph, options, finite=args.finite)
        lines.append(said | found)
        text = json.dumps({"prompts": lines}, ensure_ascii=False)
        (args.out / "results.json").write_text(text, "utf-8")
        (args.out / "table.md").write_text(table(lines), "utf-8")
        print(table(lines), flush=True)


if __name__ == "__main__":
    main()
