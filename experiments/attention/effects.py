"""What single features do to the answer, against what is predicted of it.

    python experiments/attention/effects.py --model M --dictionary D --out DIR \
        [--prompts FILE] [--limit N]

Of every prompt's graph the most influential features and as many at random are changed
in the model, one at a time: ablated, and lowered by a tenth. Measured is the answer's
logit minus its runner-up's, in two ways (`WAYS`), and each is compared with what says
what will happen (`PREDICTED`). FILE has one prompt a line. Appends a line to
DIR/effects.jsonl after every prompt, and goes on where it stopped; DIR/effects.md and
DIR/effects.json have means over prompts with 95% intervals.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jaxclt
from jaxclt.cli.common import use_compilation_cache
from jaxclt.clt.coder import Dictionary
from jaxclt.graph.agreement import sign_agreement, slope, spearman
from jaxclt.graph.attribute import AttributeConfig
from jaxclt.graph.contrast import contrast
from jaxclt.graph.graph import Graph
from jaxclt.graph.yardstick import contrast_derivative, total_effect
from jaxclt.io.model import Model
from jaxclt.lm.run import Policy, readout, run
from jaxclt.patching.finite import FINITE
from jaxclt.patching.how import How
from jaxclt.patching.patchable import Patchable, hold_of
from jaxclt.patching.subject import Subject
from jaxclt.trace.prompt import trace_prompt
from jaxclt.types import Block
from jaxclt.validation.ablations import Bench, Counter
from jaxclt.validation.choice import ValidateOptions, choose
from jaxclt.validation.patterns import LIVE, moved_patterns
from jaxclt.validation.stats import resampled

WAYS = {
    # The real MLPs, what the feature writes changed: what the derivative is a slope of.
    "live": LIVE,
    # Nothing but attention and norms answers: what edges to the targets are.
    "clamped": How(mode="constrained", patterns="live"),
}
# Derivatives of the answer with all other MLP writes held, and what else is held.
HELD = {
    "OV": How(patterns="frozen", norms="frozen"),  # edges by value
    "OV + QK": How(patterns="live", norms="frozen"),
    "OV + QK + norm": How(patterns="live"),  # edges by response
}
PREDICTED = {
    "live": {
        "value": "total effect by value, as every published graph has it",
        "response": "total effect by response",
        "finite": "the patch in the replacement model, attention and norms live",
        "derivative": "the model's own derivative",
    },
    "clamped": HELD,
}
FACTORS = {"ablated": 0.0, "10% less": 0.9}
N_PATTERNS = 6  # features of a prompt whose patches' patterns are compared
MEASURES = {
    "spearman": (spearman, np.nanmean),
    "sign": (lambda said, found: sign_agreement(found, said), np.nanmean),
    "slope": (slope, np.nanmedian),  # of measured on predicted
}


def predictions(graph: Graph, subject: Subject, node_B: np.ndarray) -> dict[str, Any]:
    """What features' activations add to the contrast, by what says so, [B]."""
    derivative_N = contrast_derivative(graph)
    assert derivative_N is not None
    found_A = {"value": total_effect(graph), "derivative": derivative_N}
    if graph.response is not None:
        found_A["response"] = total_effect(graph, response=True)
    found = {name: x_A[node_B] for name, x_A in found_A.items()}
    f, weight_K = subject.watch(node_B), subject.contrast_K
    for name, how in HELD.items():
        with jax.default_matmul_precision("highest"):
            g_LTD = write_gradient(
                subject.patchable, subject.answers[0], weight_K, how=how
            )
        at = np.asarray(g_LTD)[f.layer_E, f.pos_E]
        found[name] = f.value_E * (at * f.decoder_EMD[:, 0]).sum(1)  # span 1: neurons
    return found


@partial(jax.jit, static_argnames="how")
def write_gradient(
    model: Patchable, token_K: Array, weight_K: Array, *, how: How
) -> Array:
    """Of the contrast with respect to all MLP writes, each held where it is."""
    r = model.recording

    def given(carry: None, mid: Array, scale: Array, p: Block, x_TD: Array) -> Any:
        del mid, scale, p
        return carry, x_TD

    def answer(write_LTD: Array) -> Array:
        policy, held = Policy(given, per_layer=write_LTD), hold_of(r, how)
        done = run(model.params, r.embed_TD, policy, cfg=model.cfg, frozen=held)
        logit_V = readout(model.params, done.out_TD[-1])
        return weight_K @ (logit_V[token_K] - logit_V.mean())

    return jax.grad(answer)(r.write_LTD)


def measured(
    model: Model, dictionary: Dictionary, graph: Graph, options: ValidateOptions
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
    node_B, weight_K = bench.choice.node_B, bench.subject.contrast_K

    def patched(how: How, factor: float) -> list[float]:
        """As effects of the activation: what went, by the part of it that went."""
        done = bench.patch(bench.single, how, factor=factor, everywhere=True)
        change_B = done.change_BK @ weight_K
        return listed(-change_B / (1 - factor))

    found: dict[str, Any] = {
        "feature": [graph.feature(a) for a in node_B],
        "predicted": {
            k: listed(x_B)
            for k, x_B in predictions(graph, bench.subject, node_B).items()
        },
    }
    found["finite"] = {name: patched(FINITE, x) for name, x in FACTORS.items()}
    for way, how in WAYS.items():
        found[way] = {name: patched(how, factor) for name, factor in FACTORS.items()}
    return found | {"patterns": patterns(bench)}


def patterns(bench: Bench) -> dict[str, Any]:
    """Changes of attention patterns by the most influential features, foretold.

    Of the 100 cells of all heads that move most in each patch, and the cosine of all.
    """
    subject, at = bench.subject, np.arange(N_PATTERNS)
    change, small = bench.single.where(at), FACTORS["10% less"]
    with jax.default_matmul_precision("highest"):
        found = moved_patterns(
            subject.patchable,
            subject.local.placed(change),
            subject.local.tables,
            jnp.asarray(small, change.factor_E.dtype),
            n_cells=100,
        )
    return {
        name: {
            "spearman": spearman(moved.predicted_BX, moved.measured_BX),
            "sign": sign_agreement(
                *map(np.ravel, (moved.measured_BX, moved.predicted_BX))
            ),
            "cosine": float(np.nanmean(moved.cosine_B)),
        }
        for name, moved in zip(FACTORS, found, strict=True)
    }


def listed(x_B: np.ndarray) -> list[float]:
    return [float(f"{x:.5g}") for x in x_B]


def of_prompt(
    model: Model, dictionary: Dictionary, prompt: str, args: argparse.Namespace
) -> dict[str, Any]:
    """The line of a prompt."""
    start = time.perf_counter()
    config = AttributeConfig(response=args.response, max_features=args.max_features)
    traced = trace_prompt(model, dictionary, prompt, config=config)
    options = ValidateOptions(n_features=args.features)
    found = measured(model, dictionary, traced.graph, options)
    return {
        "prompt": prompt,
        "contrast": contrast(traced.graph).text,
        "tokens": traced.graph.n_tokens,
        "features": traced.graph.n_features,
        "active": traced.n_active,
        "seconds": round(time.perf_counter() - start, 1),
        **found,
    }


def compared(line: dict[str, Any], way: str, patch: str, what: str, after: bool) -> Any:
    """Each measure of one prompt."""
    here = np.array([pos > 0 or not after for _, pos, _ in line["feature"]])
    said = line["finite"][patch] if what == "finite" else line["predicted"][what]
    x = np.array(said)[here]
    y = np.array(line[way][patch])[here]
    fine = np.isfinite(x) & np.isfinite(y)
    return [measure(x[fine], y[fine]) for measure, _ in MEASURES.values()]


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over prompts, of slopes medians, each with its interval."""
    rows = []
    for way, names in PREDICTED.items():
        for patch in FACTORS:
            for after in (False, True):
                for what in names:
                    if what not in lines[0]["predicted"] and what != "finite":
                        continue
                    value_PX = np.array(
                        [compared(line, way, patch, what, after) for line in lines]
                    )
                    of = {
                        name: interval(value_P, middle)
                        for (name, (_, middle)), value_P in zip(
                            MEASURES.items(), value_PX.T, strict=True
                        )
                    }
                    where = "after position 0" if after else "all"
                    place = {"measured": way, "patch": patch, "features": where}
                    rows.append(place | {"predicted by": what} | of)
    return rows


def of_patterns(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same of attention patterns."""
    rows = []
    for patch in FACTORS:
        by = [line["patterns"][patch] for line in lines]
        of = {k: interval(np.array([x[k] for x in by]), np.nanmean) for k in by[0]}
        rows.append({"patterns": patch} | of)
    return rows


def interval(value_P: np.ndarray, middle: Any) -> list[float]:
    """A mean or median, and the ends of its interval over prompts."""
    P, key = len(value_P), jax.random.key(0)
    ends = resampled(lambda draw_NC: middle(value_P[draw_NC], axis=1), P, key, n=2000)
    return [round(float(x), 3) for x in (middle(value_P), *ends)]


def table(rows: list[dict[str, Any]]) -> str:
    text = "| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|\n"
    for row in rows:
        cells = [
            x if isinstance(x, str) else "{:.2f} ({:.2f} to {:.2f})".format(*x)
            for x in row.values()
        ]
        text += "| " + " | ".join(cells) + " |\n"
    return text


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dictionary", default="neurons:32")
    parser.add_argument("--prompts", type=Path, default=here / "prompts.txt")
    parser.add_argument("--limit", type=int, default=None, help="of prompts")
    parser.add_argument("--features", type=int, default=16, help="of each kind")
    parser.add_argument("--max-features", type=int, default=1024)
    parser.add_argument("--response", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    use_compilation_cache()
    model = jaxclt.load_model(args.model)
    dictionary = jaxclt.load_dictionary(args.dictionary, model)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "effects.jsonl"
    lines = [json.loads(x) for x in path.open()] if path.exists() else []
    prompts = args.prompts.read_text("utf-8").splitlines()[: args.limit]
    for prompt in prompts[len(lines) :]:
        lines.append(of_prompt(model, dictionary, prompt, args))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(lines[-1], ensure_ascii=False) + "\n")
        print(f"{len(lines)}/{len(prompts)} {lines[-1]['seconds']} s {prompt!r}")
    found = {"effects": summary(lines), "patterns": of_patterns(lines)}
    n = sum(len(line["feature"]) for line in lines)
    said = f"{len(lines)} prompts, {n} features; slopes are medians, the rest means\n\n"
    told = {"prompts": len(lines), "features": n} | found
    (args.out / "effects.json").write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    text = said + "\n".join(table(rows) for rows in found.values())
    (args.out / "effects.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
