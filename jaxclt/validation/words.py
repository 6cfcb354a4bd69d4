"""The validation report in words: how far a graph can be trusted, where it fails."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxclt.errors import on_one_line
from jaxclt.graph.nodes import quoted
from jaxclt.validation.say import BY, next_layer, percent, show, with_interval

__all__ = ["left_out", "markdown"]

# By whether the dictionary writes to one layer only.
ADDITIVE = {
    True: "The dictionary writes to one layer only: additive and constrained patches "
    "are the same and were run once.",
    False: "The dictionary writes to several layers: additive patching counts its "
    "effects twice and is shown for comparison with other tools only.",
}
HELD = {  # of the replacement model, by what ends the name of a kind
    "": "norms held",
    "live": "norms and gates live",
    "held": "norms live, gates held",
}
INCOMPLETE = (
    "The replacement model re-encoded the features that are active somewhere on the "
    "prompt (for neurons: the kept ones), not the whole dictionary."
)


def _reach(found: dict[str, Any], layers: list[int], least: float = 0.5) -> str:
    """How many layers on average the cosine stays above `least`."""
    reach = []
    for row, layer in zip(found["cosine"], layers, strict=True):
        after = [v for v in row[layer + 1 :] if v is not None]
        if after:
            below = (i for i, v in enumerate(after) if v < least)
            reach.append(next(below, len(after)))
    return f"{np.mean(reach):.1f}" if reach else "-"


def markdown(report: dict[str, Any]) -> str:
    """The whole of validation.md."""
    prompt = str(report["prompt"]).replace("`", "'").replace("\n", " ")
    head = f"Prompt: `{prompt}`. Dictionary: `{report['dictionary']}`."
    lines = ["# Validation", "", head, "", report["verdict"], ""]
    for section in SECTIONS:
        lines += section(report)
    return "\n".join(lines) + "\n"


def _table(head: str, rows: Iterable[Iterable[Any]]) -> list[str]:
    """A table and a blank line; columns of the head are split at ``|``."""
    names = head.split("|")
    cells = [names, *rows]
    lines = [f"| {' | '.join(map(str, row))} |" for row in cells]
    return [lines[0], "|" + "---|" * len(names), *lines[1:], ""]


def _held_and_live(report: dict[str, Any]) -> list[str]:
    rows = []
    for kind, said in (("held", "norms held"), ("live", "norms live")):
        found = report[kind]
        by = found["predicted_by"]
        rows.append((said, BY[by], *_numbers(found)))
        rows += [
            (said, f"the same, {name} only", *_numbers(found[name]))
            for name in ("top", "random")
        ]
        rows += [
            (said, BY[name], *_numbers(found[name]))
            for name in BY
            if name != by and name in found
        ]
    if apart := report.get("first_position"):
        where = f"positions {', '.join(map(str, apart['positions']))}"
        rows += [
            (said, where, *_numbers(apart[kind]))
            for kind, said in (("held", "norms held"), ("live", "norms live"))
        ]
    head = "measured|predicted by|Spearman [95%]|Pearson|sign|slope|within 2|n"
    what = "the graph's targets"
    if report["held"]["on"] == "contrast":
        what = str(report["contrast"]).replace("|", "/").replace("\n", " ")
    return [
        "## Predicted and measured, like with like",
        "",
        f"Effects of ablating single features on {what}; without features at massive "
        "positions, which have rows of their own.",
        "",
        *_table(head, rows),
    ]


def _numbers(found: dict[str, Any]) -> tuple[Any, ...]:
    return (
        with_interval(found),
        show(found["pearson"]),
        percent(found["sign"]),
        show(found["slope"]),
        percent(found["within_2"]),
        found["n"],
    )


def _effects(report: dict[str, Any]) -> list[str]:
    effect = report["total_effect"]
    rows = (
        (
            mode,
            with_interval(e),
            show(e["pearson"]),
            show(e["top"]["spearman"]),
            show(e["random"]["spearman"]),
            with_interval(e["small"]),
            percent(e["sign_agreement"]),
            show(e["slope"]),
        )
        for mode in ("constrained", "iterative", "additive")
        for e in [effect[mode]]
    )
    head = "patch|Spearman [95%]|Pearson|top|random|small patch|sign|slope"
    return [
        "## Total effects on the targets, by mode",
        "",
        *_table(head, rows),
        "Against the local replacement model that the graph describes, Pearson "
        f"{show(effect['replacement']['pearson'], 4)} (1 if every active feature is "
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
                with_interval(one),
                percent(one["sign"]),
                show(one["slope"]),
                show(one["after_first"]["spearman"]),
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
        f"Spearman {with_interval(one)} over the cells that move most, cosine "
        f"{show(one['cosine'])} over all"
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
        f"features): influence {show(found['influence'])}, activation "
        f"{show(found['activation'])}, direct edge {show(found['direct'])}.",
        "",
        f"Influence between features and the relative change of the downstream "
        f"activation, {pair['n']} pairs: {with_interval(pair)}.",
        "",
        "![influence](validation_influence.png)",
        "",
    ]


def _shown(report: dict[str, Any]) -> list[str]:
    found, rows = report["shown"], []
    for name in ("clamped", "live"):
        one = found[name]
        random = one["random"]
        rows.append(
            (
                name,
                *(show(one[x]) for x in ("sufficiency", "necessity")),
                *(
                    f"{show(r['mean'])} [{', '.join(map(show, r['interval']))}]"
                    for r in (random["sufficiency"], random["necessity"])
                ),
                *(show(one["m"][x]) for x in ("all", "none", "keep", "drop")),
            )
        )
    head = "semantics|sufficiency|necessity|random: sufficiency [95%]|necessity [95%]"
    n = found["live"]["random"]["sufficiency"]["n"]
    return [
        "## Is the shown graph enough, and is it needed",
        "",
        f"The {found['n']} features shown, of {found['n_active']} active ones, kept "
        "alone (sufficiency) and dropped alone (necessity): the share of what all "
        "features add to the answer's lead. What is not kept is held at "
        f"{found['reference']}; error nodes, embeddings and attention patterns are "
        f"{found['errors']}. Clamped: the graph's own linear claim, norms held, where "
        "both are one number; live: other features and norms respond.",
        "",
        *_table(head + "|m(all)|m(none)|m(keep)|m(drop)", rows),
        f"Random: as many active features, mean of {n} sets and its interval over "
        "sets; a single prompt has no interval of its own. Replacement and "
        "completeness are shares of influence without sign, errors among them: they "
        "ask how much passes through features, this asks whether those shown suffice.",
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
            *(show(g[k], 3) for k in ("predicted", "measured", "kl")),
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
            HELD[variant],
            show(found["next_layer"]["mean"]),
            f"[{', '.join(map(show, found['next_layer']['interval']))}]",
            found["next_layer"]["n"],
            show(next_layer(found, layers, "nmse")),
            _reach(found, layers),
            show(found["flipped"]["mean"], 1),
        )
        for kind, found in report["faithfulness"].items()
        for name, _, variant in [kind.partition("_")]
    )
    head = (
        "perturbation|replacement model|cosine one layer on|95%|n|NMSE one layer on|"
        "layers until the cosine is below 0.5|features flipped"
    )
    return [
        "## How perturbations spread",
        "",
        "Of the same length: along a feature's encoder, so that it rises by "
        f"{report['options']['size']:.0%}; at random; and towards the stream of "
        f"another position (data). Absolute: along the encoder by "
        f"{report['options']['rise']}, as in the "
        "paper. Upstream: an earlier feature is raised.",
        "",
        *_table(head, rows),
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
    lines = ["## Where it fails", ""]
    lines.append("Influential features whose ablation surprises most:\n")
    return (
        lines
        + [
            f"- layer {f['layer']}, position {f['pos']}, feature {f['feature']}: "
            f"predicted {show(f['predicted'], 3)}, measured {show(f['measured'], 3)}"
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
        f"{o['n_perturbed']} of each kind per layer where there are as many, never at "
        "the first position.",
    ]


SECTIONS = (_shown, _held_and_live, _effects, _live, _influence, _groups)
SECTIONS += (_faithful, _fails, _method)
