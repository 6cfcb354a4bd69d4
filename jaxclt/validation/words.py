"""The validation report in words: how far a graph can be trusted, where it fails."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxclt.errors import on_one_line
from jaxclt.graph.nodes import quoted

__all__ = ["left_out", "markdown", "verdict"]

GOOD, FAIR = 0.7, 0.4  # rank correlations; the paper's pairwise one is 0.72


def _grade(x: float | None) -> str:
    if x is None:
        return "could not be measured"
    return "good" if x >= GOOD else "moderate" if x >= FAIR else "poor"


def _show(x: float | None, digits: int = 2) -> str:
    return "-" if x is None else f"{x:.{digits}f}"


def _with_interval(found: dict[str, Any]) -> str:
    low, high = found.get("interval", [None, None])
    return f"{_show(found['spearman'])} [{_show(low)}, {_show(high)}]"


def _next_layer(found: dict[str, Any], layers: list[int], name: str) -> float | None:
    """Mean one layer behind the perturbation."""
    values = [
        found[name][row][layer + 1]
        for row, layer in enumerate(layers)
        if layer + 1 < len(found[name][row])
    ]
    kept = [v for v in values if v is not None]
    return float(np.mean(kept)) if kept else None


def _reach(found: dict[str, Any], layers: list[int], least: float = 0.5) -> str:
    """How many layers on average the cosine stays above `least`."""
    reach = []
    for row, layer in enumerate(layers):
        after = [v for v in found["cosine"][row][layer + 1 :] if v is not None]
        if after:
            below = [i for i, v in enumerate(after) if v < least]
            reach.append(below[0] if below else len(after))
    return f"{np.mean(reach):.1f}" if reach else "-"


def verdict(report: dict[str, Any]) -> str:
    """A few sentences for the end of a trace."""
    effect = report["total_effect"]
    best = effect["constrained"]
    influence = report["influence_vs_kl"]
    parts = [
        "Ablations by constrained patching rank as the graph's signed total effects "
        f"say with Spearman {_with_interval(best)} ({_grade(best['spearman'])}); "
        f"among the {report['n_top']} most influential features "
        f"{_show(best['top']['spearman'])}, and the sign of the larger effects is "
        f"right for {_percent(best['sign_agreement'])}."
    ]
    beaten = [
        name
        for name in ("activation", "direct")
        if (influence[name] or 0) > (influence["influence"] or 0)
    ]
    parts.append(
        "Influence ranks how much an ablation matters with Spearman "
        f"{_show(influence['influence'])}"
        + (
            f", less than {' and '.join(beaten)}: do not rank features by influence "
            "alone here."
            if beaten
            else f" (activation {_show(influence['activation'])}, direct edge "
            f"{_show(influence['direct'])})."
        )
    )
    pair = report["pairwise"]["spearman"]
    parts.append(
        f"Influence between features is a {_grade(pair)} guide to what moves what "
        f"(Spearman {_show(pair)}; the paper reports 0.72)."
        if pair is not None
        else "Influence between features could not be compared."
    )
    near = _next_layer(
        report["faithfulness"]["encoder"], report["faithfulness_layers"], "cosine"
    )
    parts.append(
        "A perturbation keeps its direction one layer on with cosine "
        f"{_show(near)} (the paper reports about 0.8)."
    )
    if lost := report["diverged"]:
        parts.append(
            f"{lost} of {report['patches']} patches diverged (their numbers left the "
            "range that can be held); they are counted here and ranked nowhere."
        )
    return " ".join(parts)


def _percent(x: float | None) -> str:
    return "-" if x is None else f"{x:.0%}"


def markdown(report: dict[str, Any]) -> str:
    """The whole of validation.md."""
    lines = ["# Validation", ""]
    prompt = str(report["prompt"]).replace("`", "'").replace("\n", " ")
    lines += [f"Prompt: `{prompt}`. Dictionary: `{report['dictionary']}`.", ""]
    lines += [report["verdict"], ""]
    lines += _effects(report) + _influence(report) + _groups(report)
    lines += _faithful(report) + _fails(report) + _method(report)
    return "\n".join(lines) + "\n"


def _effects(report: dict[str, Any]) -> list[str]:
    effect = report["total_effect"]
    lines = [
        "## Predicted and measured effect on the targets",
        "",
        "| patch | Spearman [95%] | Pearson | top | random | small patch | sign | "
        "slope |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for mode in ("constrained", "iterative", "additive"):
        e = effect[mode]
        cells = [
            mode,
            _with_interval(e),
            _show(e["pearson"]),
            _show(e["top"]["spearman"]),
            _show(e["random"]["spearman"]),
            _with_interval(e["small"]),
            _percent(e["sign_agreement"]),
            _show(e["slope"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    inner = effect["replacement"]
    lines += [
        "",
        "Against the local replacement model that the graph describes, Pearson "
        f"{_show(inner['pearson'], 4)} (1 if every active feature is a node).",
        "",
        "![effects](validation_effects.png)",
        "",
    ]
    if report["span"] == 1:
        lines += [
            "The dictionary writes to one layer only: additive and constrained patches "
            "are the same and were run once.",
            "",
        ]
    else:
        lines += [
            "The dictionary writes to several layers: additive patching counts its "
            "effects twice and is shown for comparison with other tools only.",
            "",
        ]
    return lines


def _influence(report: dict[str, Any]) -> list[str]:
    found, pair = report["influence_vs_kl"], report["pairwise"]
    low, high = pair.get("interval", [None, None])
    return [
        "## Influence",
        "",
        f"Spearman with the KL divergence of ablating a feature ({found['n']} "
        f"features): influence {_show(found['influence'])}, activation "
        f"{_show(found['activation'])}, direct edge {_show(found['direct'])}.",
        "",
        f"Influence between features and the relative change of the downstream "
        f"activation, {pair['n']} pairs: {_show(pair['spearman'])} "
        f"[{_show(low)}, {_show(high)}].",
        "",
        "![influence](validation_influence.png)",
        "",
    ]


def _groups(report: dict[str, Any]) -> list[str]:
    found = report["supernodes"]
    if not found["groups"] and not found["left_out"]:
        return []
    lines = [
        "## Supernodes",
        "",
        "Change of the first target's logit when the group is ablated.",
        "",
        "| group | members | predicted | measured | KL |",
        "|---|---|---|---|---|",
    ]
    for g in found["groups"]:
        name = str(g["name"]).replace("|", "/").replace("\n", " ")
        numbers = (_show(g[k], 3) for k in ("predicted", "measured", "kl"))
        lines.append(f"| {name} | {g['members']} | {' | '.join(numbers)} |")
    lines.append("")
    return lines + [f"{said}\n" for said in left_out(report)]


def left_out(report: dict[str, Any]) -> list[str]:
    """A line for each supernode some of whose members were not ablated."""
    return [
        f"Supernode {quoted(name)}, not ablated, as no feature of this graph: "
        f"{on_one_line(', '.join(members))}"
        for name, members in report["supernodes"]["left_out"].items()
    ]


def _faithful(report: dict[str, Any]) -> list[str]:
    layers = report["faithfulness_layers"]
    lines = [
        "## How perturbations spread",
        "",
        "| perturbation | norms | cosine one layer on | NMSE one layer on | layers "
        "until the cosine is below 0.5 |",
        "|---|---|---|---|---|",
    ]
    for kind, found in report["faithfulness"].items():
        name, _, live = kind.partition("_")
        cells = [
            name,
            live or "frozen",
            _show(_next_layer(found, layers, "cosine")),
            _show(_next_layer(found, layers, "nmse")),
            _reach(found, layers),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "![faithfulness](validation_faithfulness.png)", ""]
    lines += _jacobian(report)
    if not report["complete_replacement"]:
        lines += [
            "The replacement model re-encoded the features that are active somewhere "
            "on the prompt (for neurons: the kept ones), not the whole dictionary.",
            "",
        ]
    return lines


def _jacobian(report: dict[str, Any]) -> list[str]:
    lines = [
        "Derivative of each layer's dictionary against its MLP's, along random "
        "directions; 1 is the NMSE of no response at all.",
        "",
        "| norms | cosine, mean | NMSE, mean | worst layer |",
        "|---|---|---|---|",
    ]
    for norms, found in report["jacobian"].items():
        cosine, nmse = (
            np.array([np.nan if x is None else x for x in found[k]])
            for k in ("cosine", "nmse")
        )
        if np.isnan(nmse).all():
            continue
        worst = int(np.nanargmax(nmse))
        lines.append(
            f"| {norms} | {np.nanmean(cosine):.2f} | {np.nanmean(nmse):.2f} | "
            f"{worst} ({nmse[worst]:.2f}) |"
        )
    return [*lines, ""]


def _fails(report: dict[str, Any]) -> list[str]:
    lines = ["## Where it fails", ""]
    effect = report["total_effect"]
    if (slope := effect["constrained"]["slope"]) is not None:
        if slope < 0.5:
            lines.append(
                f"- The model moves {slope:.2f} times as far as predicted: later "
                "layers compensate, or paths that the graph counts are not there."
            )
        elif slope > 2:
            lines.append(f"- The model moves {slope:.2f} times as far as predicted.")
    random = effect["constrained"]["random"]["spearman"]
    if random is not None and random < FAIR:
        lines.append(
            f"- Effects of random features are ranked badly ({random:.2f}): do not "
            "read meaning into weak nodes."
        )
    lines.append("- Influential features whose ablation surprises most:")
    for f in report["failures"]:
        lines.append(
            f"  - layer {f['layer']}, position {f['pos']}, feature {f['feature']}: "
            f"predicted {_show(f['predicted'], 3)}, measured "
            f"{_show(f['measured'], 3)}"
        )
    return [*lines, ""]


def _method(report: dict[str, Any]) -> list[str]:
    o = report["options"]
    return [
        "## Method",
        "",
        f"{report['n_top']} most influential and {report['n_random']} random features "
        "of the graph, one at a time. Patches range from the feature's layer to two "
        "layers behind it (constrained: as far as it writes; additive: all layers); "
        "attention patterns frozen, norms live. Full patches ablate; small ones "
        f"multiply by {o['small']}. Intervals: bootstrap over features. Perturbations "
        f"are {o['size']:.0%} of the feature's activation, {o['n_perturbed']} of each "
        "kind per layer, never at the first position.",
    ]
