"""What a graph predicts against what patches did: the numbers of a validation report.

Circuit Tracing (2025), sections G.1 and G.2; maths 16.1 to 16.3.
"""

from __future__ import annotations

from typing import Any, get_args

import jax
import numpy as np

from jaxclt.files.json_text import rounded
from jaxclt.graph.agreement import pearson, sign_agreement, slope, spearman
from jaxclt.patching.effects import nats
from jaxclt.patching.how import How, Mode
from jaxclt.validation.ablations import Ablated, Bench
from jaxclt.validation.predictions import (
    direct_effect,
    group_effects,
    pairwise_influence,
)
from jaxclt.validation.stats import bootstrap, resampled

__all__ = [
    "MODES",
    "failures",
    "influence_against_kl",
    "pairwise",
    "supernodes",
    "total_effects",
]

MODES: tuple[Mode, ...] = get_args(Mode)


def _both(interval: tuple[float, float]) -> list[float | None]:
    return [rounded(x) for x in interval]


def _correlations(
    x: np.ndarray, y: np.ndarray, key: jax.Array | None = None
) -> dict[str, Any]:
    """Spearman and Pearson, with intervals if there is a key."""
    out: dict[str, Any] = {
        "spearman": rounded(spearman(x, y)),
        "pearson": rounded(pearson(x, y)),
        "n": len(x),
    }
    if key is not None:
        out["interval"] = _both(bootstrap(spearman, x, y, key))
        out["pearson_interval"] = _both(bootstrap(pearson, x, y, key))
    return out


def total_effects(bench: Bench) -> tuple[dict[str, Any], dict[str, Any], Ablated]:
    """Total effects against small and full patches in each mode (maths 16.1).

    Returns:
      Numbers and points of a plot by mode, and the constrained ablations.
    """
    out, scatter, done = {}, {}, {}
    for mode in MODES:
        if mode == "additive" and bench.span == 1:
            # The same patch (maths 15.12): a feature writes in its own layer only.
            out[mode], scatter[mode] = out["constrained"], scatter["constrained"]
        else:
            out[mode], scatter[mode], done[mode] = _in_mode(bench, mode)
    # The graph against the replacement model it describes: what is lost here is lost
    # to features that are not nodes of the graph.
    exact = How(mode="iterative", norms="frozen", gates="frozen")
    few = slice(bench.options.n_replacement)
    inside = bench.patch(bench.single.where(few), exact, everywhere=True)
    out["replacement"] = _correlations(
        _predicted(bench, inside, bench.choice.node_B[few]),
        _measured(bench, inside),
        bench.key,
    )
    return out, scatter, done["constrained"]


def _predicted(bench: Bench, done: Ablated, node_B: np.ndarray) -> np.ndarray:
    """Change of the targets by ablation, of the patches that have an answer."""
    effect_BK = bench.effect_KA[:, node_B[done.fine_B]].T.astype(np.float64)
    return -bench.measure(effect_BK, "targets")


def _measured(bench: Bench, done: Ablated) -> np.ndarray:
    return bench.measure(done.change_BK[done.fine_B], "targets")


def _in_mode(
    bench: Bench, mode: Mode
) -> tuple[dict[str, Any], dict[str, Any], Ablated]:
    choice, options, how = bench.choice, bench.options, How(mode=mode)
    watch = mode == "constrained"
    done = bench.patch(bench.single, how, watch=watch)
    control_B, measured_BK = choice.control_B[done.fine_B], _measured(bench, done)
    predicted_BK, top = _predicted(bench, done, choice.node_B), ~control_B
    out = _correlations(predicted_BK, measured_BK, bench.key)
    for name, mine in (("top", top), ("random", control_B)):
        out[name] = _correlations(predicted_BK[mine], measured_BK[mine])
    out["sign_agreement"] = rounded(sign_agreement(predicted_BK[top], measured_BK[top]))
    out["slope"] = rounded(slope(predicted_BK, measured_BK))
    at = choice.small(options.n_small)
    little = bench.patch(bench.single.where(at), how, factor=options.small, watch=watch)
    out["small"] = _correlations(
        (1 - options.small) * _predicted(bench, little, choice.node_B[at]),
        _measured(bench, little),
        bench.key,
    )
    points = {
        "predicted": predicted_BK,
        "measured": measured_BK,
        "control": control_B,
        "node": choice.node_B[done.fine_B],
    }
    return out, {name: x.tolist() for name, x in points.items()}, done


def influence_against_kl(
    bench: Bench, done: Ablated
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Influence against the divergence of an ablation (maths 16.2), and its points."""
    graph, key, node_B = bench.graph, bench.key, bench.choice.node_B[done.fine_B]
    kl_B = np.maximum(done.kl_B[done.fine_B], 0)
    score = {
        "influence": graph.influence_N[graph.feature_cols][node_B],
        "activation": np.abs(graph.value_A[node_B]),
        "direct": direct_effect(graph)[node_B],
    }
    out: dict[str, Any] = {k: rounded(spearman(v, kl_B)) for k, v in score.items()}
    out["n"] = len(node_B)
    out["intervals"] = {
        k: _both(bootstrap(spearman, v, kl_B, key)) for k, v in score.items()
    }
    # The paper's text says log-log Pearson where its caption says Spearman.
    log_kl = np.log(np.maximum(kl_B, 1e-12))
    out["log_pearson"] = {
        k: rounded(pearson(np.log(np.maximum(v, 1e-12)), log_kl))
        for k, v in score.items()
    }
    points = {k: v.tolist() for k, v in score.items()} | {"kl": kl_B.tolist()}
    return out, points


def pairwise(bench: Bench, done: Ablated) -> dict[str, Any]:
    """Influence between features against their relative change (maths 16.3)."""
    graph, fine_B = bench.graph, done.fine_B
    node_B, watch_W = bench.choice.node_B[fine_B], bench.choice.watch_W
    clean_W = np.asarray(bench.watch.value_E, np.float64)
    assert done.watch_BW is not None
    change_BW = np.abs(done.watch_BW[fine_B] - clean_W)
    change_BW = change_BW / np.maximum(np.abs(clean_W), 1e-12)
    influence_BW = pairwise_influence(graph, watch_W)[:, node_B].T
    later = graph.layer_A[watch_W][None] > graph.layer_A[node_B][:, None]
    later &= graph.pos_A[watch_W][None] >= graph.pos_A[node_B][:, None]
    x, y = influence_BW[later], change_BW[later]
    out = {"spearman": rounded(spearman(x, y)), "n": int(later.sum())}
    if len(x) >= 3:
        # Whole sources are drawn, with all their pairs.
        def of(draw_NB: np.ndarray) -> np.ndarray:
            pairs = ((influence_BW[i], change_BW[i], later[i]) for i in draw_NB)
            return np.array([spearman(x[ok], y[ok]) for x, y, ok in pairs])

        out["interval"] = _both(resampled(of, len(node_B), bench.key, n=200))
    return out


def supernodes(bench: Bench) -> dict[str, Any]:
    """Predicted and measured change of the first target when groups are ablated."""
    groups, left_out = bench.choice.groups, {"left_out": bench.choice.left_out}
    if not groups:
        return {"spearman": None, "n": 0, "groups": []} | left_out
    members = [group for _, group in groups]
    predicted_GK = -bench.measure(
        group_effects(bench.graph, members, bench.effect_KA), "targets"
    )
    done = bench.patch(bench.together(members), How())
    rows = [
        {
            "name": name,
            "members": len(group),
            "predicted": rounded(float(predicted_GK[i, 0])),
            "measured": rounded(float(done.change_BK[i, 0])),
            "kl": rounded(nats(float(done.kl_B[i]))),
        }
        for i, (name, group) in enumerate(groups)
    ]
    fine, measured_GK = done.fine_B, _measured(bench, done)
    rank = rounded(spearman(predicted_GK[fine], measured_GK))
    return {"spearman": rank, "n": int(fine.sum()), "groups": rows} | left_out


def failures(bench: Bench, points: dict[str, Any], n: int = 5) -> list[dict[str, Any]]:
    """The influential features whose ablation surprises most."""
    graph = bench.graph
    top = np.flatnonzero(~np.asarray(points["control"], bool))
    predicted, measured = (
        np.array([points[name][i][0] for i in top])
        for name in ("predicted", "measured")
    )
    worst = np.argsort(-np.abs(predicted - measured), kind="stable")[:n]
    return [
        {
            "layer": int(graph.layer_A[a]),
            "pos": int(graph.pos_A[a]),
            "feature": int(graph.feature_A[a]),
            "predicted": rounded(float(predicted[i])),
            "measured": rounded(float(measured[i])),
        }
        for i in worst
        for a in [points["node"][top[i]]]
    ]
