"""The validation report in words: how far a graph can be trusted, where it fails."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxclt.errors import on_one_line
from jaxclt.graph.nodes import quoted

__all__ = ["left_out", "markdown", "verdict"]

GOOD, FAIR = 0.7, 0.4  # rank correlations; the paper's pairwise one is 0.72

# By whether the dictionary writes to one layer only.
ADDITIVE = {
    True: "The dictionary writes to one layer only: additive and constrained patches "
    "are the same and were run once.",
    False: "The dictionary writes to several layers: additive patching counts its "
    "effects twice and is shown for comparison with other tools only.",
}
# Who predicts what features do where patterns are live.
BY = {
    "response": "the graph's total effects by response",
    "derivative": "the model's own derivative",
    "finite": "the local replacement model (attention and norms live, gates held)",
    "value": "the graph's total effects by value",
}
INCOMPLETE = (
    "The replacement model re-encoded the features that are active somewhere on the "
    "prompt (for neurons: the kept ones), not the whole dictionary."
)


def _grade(x: float | None) -> str:
    if x is None:
        return "could not be measured"
    return "good" if x >= GOOD else "moderate" if x >= FAIR else "poor"


def _show(x: float | None, digits: int = 2) -> str:
    return "-" if x is None else f"{x:.{digits}f}"


def _percent(x: float | None) -> str:
    return "-" if x is None else f"{x:.0%}"


def _with_interval(found: dict[str, Any]) -> str:
    low, high = found.get("interval", [None, None])
    return f"{_show(found['spearman'])} [{_show(low)}, {_show(high)}]"


def _next_layer(found: dict[str, Any], layers: list[int], name: str) -> float | None:
    """Mean one layer after the perturbation."""
    rows = zip(found[name], layers, strict=True)
    values = [v for row, layer in rows for v in row[layer + 1 : layer + 2]]
    kept = [v for v in values if v is not None]
    return float(np.mean(kept)) if kept else None


def _reach(found: dict[str, Any], layers: list[int], least: float = 0.5) -> str:
    """How many layers on average the cosine stays above `least`."""
    reach = []
    for row, layer in zip(found["cosine"], layers, strict=True):
        after = [v for v in row[layer + 1 :] if v is not None]
        if after:
            below = (i for i, v in enumerate(after) if v < least)
            reach.append(next(below, len(after)))
    return f"{np.mean(reach):.1f}" if reach else "-"


def verdict(report: dict[str, Any]) -> str:
    """A few sentences for the end of a trace."""
    best, influence = report["total_effect"]["constrained"], report["influence_vs_kl"]
    score, pair = influence["influence"], report["pairwise"]["spearman"]
    beaten = [x for x in ("activation", "direct") if (influence[x] or 0) > (score or 0)]
    spread = report["faithfulness"]["encoder"]
    near = _next_layer(spread, report["faithfulness_layers"], "cosine")
    parts = [
        "Ablations by constrained patching rank as the graph's signed total effects "
        f"say with Spearman {_with_interval(best)} ({_grade(best['spearman'])}); "
        f"among the {report['n_top']} most influential features "
        f"{_show(best['top']['spearman'])}, and the sign of the larger effects is "
        f"right for {_percent(best['sign_agreement'])}.",
        _live_in_short(report["patterns_live"]),
        f"Influence ranks how much an ablation matters with Spearman {_show(score)}"
        + (
            f", less than {' and '.join(beaten)}: do not rank features by influence "
            "alone here."
            if beaten
            else f" (activation {_show(influence['activation'])}, direct edge "
            f"{_show(influence['direct'])})."
        ),
        f"Influence between features is a {_grade(pair)} guide to what moves what "
        f"(Spearman {_show(pair)}; the paper reports 0.72)."
        if pair is not None
        else "Influence between features could not be compared.",
        "A perturbation keeps its direction one layer on with cosine "
        f"{_show(near)} (the paper reports about 0.8).",
    ]
    if lost := report["diverged"]:
        parts.append(
            f"{lost} of {report['patches']} patches diverged (their numbers left the "
            "range that can be held); they are counted here and ranked nowhere."
        )
    return " ".join(parts)


def _live_in_short(found: dict[str, Any]) -> str:
    """What holds in the model when attention answers too."""
    small, full, start = found.get("small"), found["full"], ""
    if small is not None:
        start = (
            f"small changes follow {BY[small['predicted_by']]} with Spearman "
            f"{_with_interval(small)}, "
        )
    others = (
        f"{BY[name]} {_show(full[name]['spearman'])}" for name in BY if name in full
    )
    return (
        f"In the model, patterns live, {start}ablations follow {BY['finite']} with "
        f"{_with_interval(full)} ({'; '.join(others)})."
    )


def markdown(report: dict[str, Any]) -> str:
    """The whole of validation.md."""
    prompt = str(report["prompt"]).replace("`", "'").replace("\n", " ")
    head = f"Prompt: `{prompt}`. Dictionary: `{report['dictionary']}`."
    lines = ["# Validation", "", head, "", report["verdict"], ""]
    for section in (_effects, _live, _influence, _groups, _faithful, _fails, _method):
        lines += section(report)
    return "\n".join(lines) + "\n"


def _table(head: str, rows: Iterable[Iterable[Any]]) -> list[str]:
    """A table and a blank line; columns of the head are split at ``|``."""
    names = head.split("|")
    cells = [names, *rows]
    lines = [f"| {' | '.join(map(str, row))} |" for row in cells]
    return [lines[0], "|" + "---|" * len(names), *lines[1:], ""]


def _effects(report: dict[str, Any]) -> list[str]:
    effect = report["total_effect"]
    rows = (
        (
            mode,
            _with_interval(e),
            _show(e["pearson"]),
            _show(e["top"]["spearman"]),
            _show(e["random"]["spearman"]),
            _with_interval(e["small"]),
            _percent(e["sign_agreement"]),
            _show(e["slope"]),
        )
        for mode in ("constrained", "iterative", "additive")
        for e in [effect[mode]]
    )
    head = "patch|Spearman [95%]|Pearson|top|random|small patch|sign|slope"
    return [
        "## Predicted and measured effect on the targets",
        "",
        *_table(head, rows),
        "Against the local replacement model that the graph describes, Pearson "
        f"{_show(effect['replacement']['pearson'], 4)} (1 if every active feature is "
        "a node).",
        "",
        "![effects](validation_effects.png)",
        "",
        ADDITIVE[report["span"] == 1],
        "",
    ]


def _live(report: dict[str, Any]) -> list[str]:
    found, rows = report["patterns_live"], []
    for kind in ("small", "full"):
        line = found.get(kind)
        if line is None:
            continue
        said = "ablated" if kind == "full" else f"times {line['factor']}"
        others = [(name, line[name]) for name in BY if name in line]
        rows += [
            (
                said,
                BY[name],
                _with_interval(one),
                _percent(one["sign"]),
                _show(one["slope"]),
                _show(one["after_first"]["spearman"]),
            )
            for name, one in [(line["predicted_by"], line), *others]
        ]
    head = "patch|predicted by|Spearman [95%]|sign|slope|after the first position"
    return [
        "## In the model, patterns live",
        "",
        "Change of the graph's contrast (answer against runner-up) when single "
        "features are patched in the model with attention patterns, norms and MLPs "
        f"live; {found['full']['n']} features, and without those of the first "
        "position.",
        "",
        *_table(head, rows),
        *_moved(found["patterns"]),
    ]


def _moved(patterns: dict[str, Any] | None) -> list[str]:
    if patterns is None:
        return ["The patterns are too large to compare.", ""]
    small, full = (
        f"Spearman {_with_interval(one)} over the cells that move most, cosine "
        f"{_show(one['cosine'])} over all"
        for one in (patterns["small"], patterns["full"])
    )
    return [
        f"Attention patterns themselves, predicted and measured: small patches by the "
        f"derivative {small}; ablations by {BY['finite']} {full}.",
        "",
    ]


def _influence(report: dict[str, Any]) -> list[str]:
    found, pair = report["influence_vs_kl"], report["pairwise"]
    return [
        "## Influence",
        "",
        f"Spearman with the KL divergence of ablating a feature ({found['n']} "
        f"features): influence {_show(found['influence'])}, activation "
        f"{_show(found['activation'])}, direct edge {_show(found['direct'])}.",
        "",
        f"Influence between features and the relative change of the downstream "
        f"activation, {pair['n']} pairs: {_with_interval(pair)}.",
        "",
        "![influence](validation_influence.png)",
        "",
    ]


def _groups(report: dict[str, Any]) -> list[str]:
    found = report["supernodes"]
    if not found["groups"] and not found["left_out"]:
        return []
    rows = (
        (
            str(g["name"]).replace("|", "/").replace("\n", " "),
            g["members"],
            *(_show(g[k], 3) for k in ("predicted", "measured", "kl")),
        )
        for g in found["groups"]
    )
    return [
        "## Supernodes",
        "",
        "Change of the first target's logit when the group is ablated.",
        "",
        *_table("group|members|predicted|measured|KL", rows),
        *(f"{said}\n" for said in left_out(report)),
    ]


def left_out(report: dict[str, Any]) -> list[str]:
    """A line for each supernode some of whose members were not ablated."""
    return [
        f"Supernode {quoted(name)}, not ablated, as no feature of this graph: "
        f"{on_one_line(', '.join(members))}"
        for name, members in report["supernodes"]["left_out"].items()
    ]


def _faithful(report: dict[str, Any]) -> list[str]:
    layers = report["faithfulness_layers"]
    rows = (
        (
            name,
            live or "frozen",
            _show(_next_layer(found, layers, "cosine")),
            _show(_next_layer(found, layers, "nmse")),
            _reach(found, layers),
        )
        for kind, found in report["faithfulness"].items()
        for name, _, live in [kind.partition("_")]
    )
    head = "perturbation|norms|cosine one layer on|NMSE one layer on|layers until "
    return [
        "## How perturbations spread",
        "",
        *_table(head + "the cosine is below 0.5", rows),
        "![faithfulness](validation_faithfulness.png)",
        "",
        "Derivative of each layer's dictionary against its MLP's, along random "
        "directions; 1 is the NMSE of no response at all.",
        "",
        *_table("norms|cosine, mean|NMSE, mean|worst layer", _jacobian(report)),
        *([] if report["complete_replacement"] else [INCOMPLETE, ""]),
    ]


def _jacobian(report: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    for norms, found in report["jacobian"].items():
        cosine, nmse = (np.array(found[k], float) for k in ("cosine", "nmse"))
        if not np.isnan(nmse).all():
            worst = int(np.nanargmax(nmse))
            means = (f"{np.nanmean(x):.2f}" for x in (cosine, nmse))
            yield norms, *means, f"{worst} ({nmse[worst]:.2f})"


def _fails(report: dict[str, Any]) -> list[str]:
    lines, found = ["## Where it fails", ""], report["total_effect"]["constrained"]
    slope, random = found["slope"], found["random"]["spearman"]
    if slope is not None and not 0.5 <= slope <= 2:
        why = ": later layers compensate, or paths that the graph counts are not there."
        lines.append(
            f"- The model moves {slope:.2f} times as far as predicted"
            + (why if slope < 0.5 else ".")
        )
    if random is not None and random < FAIR:
        lines.append(
            f"- Effects of random features are ranked badly ({random:.2f}): do not "
            "read meaning into weak nodes."
        )
    lines.append("- Influential features whose ablation surprises most:")
    return (
        lines
        + [
            f"  - layer {f['layer']}, position {f['pos']}, feature {f['feature']}: "
            f"predicted {_show(f['predicted'], 3)}, measured {_show(f['measured'], 3)}"
            for f in report["failures"]
        ]
        + [""]
    )


def _method(report: dict[str, Any]) -> list[str]:
    o = report["options"]
    return [
        "## Method",
        "",
        f"{report['n_top']} most influential and {report['n_random']} random features "
        "of the graph, one at a time. Patches range from the feature's layer to two "
        "layers after it (constrained: as far as it writes; additive: all layers); "
        "attention patterns frozen unless said to be live, norms live. Full patches "
        f"ablate; small ones multiply by {o['small']}. Intervals: bootstrap over "
        f"features. Perturbations are {o['size']:.0%} of the feature's activation, "
        f"{o['n_perturbed']} of each kind per layer, never at the first position.",
    ]
