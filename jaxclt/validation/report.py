"""The validation report of a graph: its predictions against patches of the model.

Four measurements (Circuit Tracing 2025, sections G.1 to G.3 and 5.3), over the most
influential features, a random control set and supernodes:

1. the signed total effect on the targets against small and full patches in each mode;
2. influence against the divergence of an ablation, beside activation and direct edge;
3. influence between features against the change of downstream activations;
4. how a perturbation spreads in the replacement model and in the model, and whether the
   dictionary has the MLPs' derivatives (Jacobian agreement).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxclt.errors import InputError, check_at_least, check_finite, check_positive
from jaxclt.files.atomic import atomic_path
from jaxclt.files.json_text import number, to_json
from jaxclt.graph.effects import solve_total_effect
from jaxclt.graph.supernodes import with_features
from jaxclt.patching.batch import How, chunk_size, default_range
from jaxclt.patching.effects import Effect, clean_effect, diverged, nats
from jaxclt.patching.modes import Mode
from jaxclt.patching.subject import Subject
from jaxclt.runs.pace import logged
from jaxclt.types import Supernode
from jaxclt.validation import plots
from jaxclt.validation.jacobian import jacobian_agreement
from jaxclt.validation.perturb import faithfulness, variants
from jaxclt.validation.predictions import (
    direct_effect,
    group_effects,
    pairwise_influence,
)
from jaxclt.validation.stats import bootstrap, pearson, resampled, spearman
from jaxclt.validation.words import markdown, verdict

__all__ = ["ValidateOptions", "validate_graph", "write_validation"]

CHUNK = 32  # patches run together
MODES: tuple[Mode, ...] = ("constrained", "iterative", "additive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidateOptions:
    """How much to patch.

    Raises:
      InputError: for a value out of its range.
    """

    n_features: int = 100  # most influential ones, and as many at random
    n_small: int = 25  # of each, also patched a little
    small: float = 0.8  # factor of the small patch
    n_replacement: int = 16  # patched in the replacement model alone
    n_watched: int = 60  # features whose activations are watched
    n_groups: int = 8  # features at several positions, if no supernodes are given
    n_layers: int = 8  # perturbed layers
    n_perturbed: int = 3  # perturbations of a kind and layer
    size: float = 0.1  # of a perturbation, share of the feature's activation
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(3, n_features=self.n_features)
        check_at_least(
            1,
            n_small=self.n_small,
            n_layers=self.n_layers,
            n_perturbed=self.n_perturbed,
        )
        check_at_least(
            0,
            n_replacement=self.n_replacement,
            n_watched=self.n_watched,
            n_groups=self.n_groups,
        )
        check_positive(size=self.size)
        check_finite(small=self.small, seed=self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chosen:
    """Which features are patched, and from where to where."""

    node_B: np.ndarray  # slots: the most influential, then the control set
    control_B: np.ndarray  # bool
    group: list[tuple[str, np.ndarray]]
    left_out: dict[str, list[str]]  # members of supernodes that are no features here


def validate_graph(
    subject: Subject,
    options: ValidateOptions | None = None,
    *,
    groups: Sequence[Supernode] | None = None,
    on_done: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure; the content of ``validation.json`` and what the plots need.

    Args:
      subject: the traced prompt, recorded again.
      options: how much to patch.
      groups: supernodes, of which the features that are nodes of the graph are ablated
        together; None or empty takes features that are active at several positions,
        each with all its positions.
      on_done: progress, (patches done, patches planned); to the log if not given.

    Raises:
      InputError: if the graph has fewer than three features.
    """
    options = options or ValidateOptions()
    graph = subject.graph
    if graph.n_features < 3:
        raise InputError(
            f"the graph has {graph.n_features} features, validation needs at least 3: "
            "trace with more features"
        )
    key = jax.random.key(options.seed)
    chosen = _choose(subject, options, groups, key)
    effect_KA = solve_total_effect(graph)[subject.targets]
    told = on_done or partial(logged(), "validating")
    counter = _Counter(told, _planned(subject, options, chosen))
    report: dict[str, Any] = {
        "prompt": graph.meta.prompt,
        "dictionary": graph.meta.dictionary,
        "model": graph.meta.model,
        "span": subject.patchable.coder.shape.span,
        "options": dataclasses.asdict(options),
        "n_top": int((~chosen.control_B).sum()),
        "n_random": int(chosen.control_B.sum()),
    }
    report["total_effect"], scatter, full = _total_effects(
        subject, options, chosen, effect_KA, key, counter
    )
    report["influence_vs_kl"], ranks = _influence(subject, chosen, full, key)
    report["pairwise"] = _pairwise(subject, options, chosen, full, key)
    report["supernodes"] = _supernodes(subject, chosen, effect_KA, counter)
    report["failures"] = _failures(subject, scatter["constrained"])
    report["faithfulness"], report["faithfulness_layers"] = faithfulness(
        subject,
        key,
        n_layers=options.n_layers,
        n_perturbed=options.n_perturbed,
        size=options.size,
        on_batch=counter.add,
    )
    report["patches"], report["diverged"] = counter.done, counter.diverged
    report["jacobian"] = _jacobian(subject, key)
    report["complete_replacement"] = subject.local.complete
    report["_scatter"], report["_ranks"] = scatter, ranks
    report["verdict"] = verdict(report)
    return report


def write_validation(report: dict[str, Any], directory: str | Path) -> None:
    """Write validation.json, validation.md and three plots; drops the plots' data."""
    folder = Path(directory)
    scatter, ranks = report.pop("_scatter"), report.pop("_ranks")
    plots.draw_effects(folder / "validation_effects.png", scatter)
    plots.draw_ranks(folder / "validation_influence.png", ranks)
    plots.draw_faithfulness(
        folder / "validation_faithfulness.png",
        report["faithfulness"],
        report["faithfulness_layers"],
    )
    for name, text in {
        "validation.json": to_json(report, ensure_ascii=False),
        "validation.md": markdown(report),
    }.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


class _Counter:
    """Patches done of patches planned, and how many of them diverged."""

    def __init__(self, on_done: Callable[[int, int], None], planned: int) -> None:
        self.on_done, self.planned, self.done = on_done, planned, 0
        self.diverged = 0
        on_done(0, planned)

    def within(self, done: int, total: int) -> None:
        """Progress of one batch, as `patch_many` reports it."""
        self.on_done(min(self.done + done, self.planned), self.planned)
        if done == total:
            self.done += total

    def add(self, n: int, n_diverged: int) -> None:
        """A batch that is done, and how many of it diverged."""
        self.within(n, n)
        self.diverged += n_diverged


def _planned(subject: Subject, options: ValidateOptions, chosen: _Chosen) -> int:
    B = len(chosen.node_B)
    small = len(_small(options, chosen))
    n_modes = len(MODES) - (subject.patchable.coder.shape.span == 1)
    n = n_modes * (B + small) + min(options.n_replacement, B) + len(chosen.group)
    return n + 6 * options.n_layers * options.n_perturbed


def _choose(
    subject: Subject,
    options: ValidateOptions,
    groups: Sequence[Supernode] | None,
    key: jax.Array,
) -> _Chosen:
    graph = subject.graph
    score_A = graph.influence_N[graph.feature_cols]
    order = np.argsort(-score_A, kind="stable")
    order = order[graph.value_A[order] != 0]
    top, rest = order[: options.n_features], order[options.n_features :]
    shuffled = np.asarray(jax.random.permutation(key, len(rest)))
    control = rest[shuffled[: options.n_features]]
    node_B = np.concatenate([top, control])
    group, left_out = _groups(subject, options, groups)
    return _Chosen(
        node_B=node_B,
        control_B=np.arange(len(node_B)) >= len(top),
        group=group,
        left_out=left_out,
    )


def _groups(
    subject: Subject, options: ValidateOptions, groups: Sequence[Supernode] | None
) -> tuple[list[tuple[str, np.ndarray]], dict[str, list[str]]]:
    """Names and slots of what is ablated together; members of groups left out."""
    graph = subject.graph
    place = zip(graph.layer_A, graph.pos_A, graph.feature_A, strict=True)
    slot = {tuple(map(int, p)): a for a, p in enumerate(place)}
    if groups:
        found, left_out = [], {}
        for group in groups:
            nodes = with_features(graph, group).nodes
            members = np.unique([slot[n] for n in nodes if n in slot]).astype(int)
            if len(members):
                found.append((group.name, members))
            if rest := [n for n in nodes if n not in slot]:
                left_out[group.name] = [
                    n if isinstance(n, str) else ":".join(map(str, n)) for n in rest
                ]
        return found, left_out
    score_A = graph.influence_N[graph.feature_cols]
    same: dict[tuple[int, int], list[int]] = {}
    for (layer, _, feature), a in slot.items():
        if graph.value_A[a] != 0:
            same.setdefault((layer, feature), []).append(a)
    several = [(score_A[a].sum(), name, a) for name, a in same.items() if len(a) > 1]
    several.sort(key=lambda item: (-item[0], item[1]))
    found = [
        (f"feature {feature} of layer {layer} at all positions", np.array(a))
        for _, (layer, feature), a in several[: options.n_groups]
    ]
    return found, {}


def _small(options: ValidateOptions, chosen: _Chosen) -> np.ndarray:
    """Places in the batch of the features that are also patched a little."""
    top, control = (np.flatnonzero(chosen.control_B == c) for c in (False, True))
    return np.concatenate([top[: options.n_small], control[: options.n_small]])


def _ablate(
    subject: Subject,
    nodes: Sequence[np.ndarray],
    how: How,
    counter: _Counter,
    *,
    factor: float = 0.0,
    watch: np.ndarray | None = None,
    everywhere: bool = False,
) -> Effect:
    """Patches of groups of the graph's features by one factor."""
    g, L = subject.graph, subject.model.cfg.n_layers
    many, ranges = [], []
    for node in nodes:
        own = zip(g.layer_A[node], g.pos_A[node], g.feature_A[node], strict=True)
        many.append([(*map(int, place), factor, 0.0) for place in own])
        layers = default_range(
            g.layer_A[node],
            span=subject.patchable.coder.shape.span,
            n_layers=L,
            mode=how.mode,
        )
        ranges.append((0, L - 1) if everywhere else layers)
    features = None if watch is None else subject.watch(watch)
    # One chunk size, so that full and small patches share a program.
    size = chunk_size(subject.patchable, 1, subject.patchable.coder.shape.span)
    done = subject.effects(
        many,
        ranges,
        how,
        subject.ask(features),
        chunk=min(CHUNK, size),
        on_done=counter.within,
    )
    counter.diverged += int(diverged(done).sum())
    return done


def _fine(done: Effect, *arrays_B: np.ndarray) -> list[np.ndarray]:
    """Arrays of the patches that have an answer: what diverged is not ranked."""
    return [x_B[~diverged(done)] for x_B in arrays_B]


def _correlations(
    x: np.ndarray, y: np.ndarray, key: jax.Array, *, intervals: bool = True
) -> dict[str, Any]:
    out: dict[str, Any] = {
        "spearman": _number(spearman(x, y)),
        "pearson": _number(pearson(x, y)),
        "n": len(x),
    }
    if intervals:
        out["interval"] = [_number(v) for v in bootstrap(spearman, x, y, key)]
        out["pearson_interval"] = [_number(v) for v in bootstrap(pearson, x, y, key)]
    return out


def _number(x: float | None) -> float | None:
    """For JSON, which has no nan."""
    return None if x is None or number(x) is None else round(float(x), 6)


def _total_effects(
    subject: Subject,
    options: ValidateOptions,
    chosen: _Chosen,
    effect_KA: np.ndarray,
    key: jax.Array,
    counter: _Counter,
) -> tuple[dict[str, Any], dict[str, Any], Effect]:
    """Measurement 1, and the constrained ablations that 2 and 3 use."""
    clean_K = _clean(subject)
    watched = _watched(subject, options)
    out, scatter, kept = {}, {}, None
    own = [np.array([a]) for a in chosen.node_B]
    small = _small(options, chosen)
    for mode in MODES:
        if mode == "additive" and subject.patchable.coder.shape.span == 1:
            # The same patch (maths 15.12): a feature writes in its own layer only.
            out[mode], scatter[mode] = out["constrained"], scatter["constrained"]
            continue
        how = subject.how(mode)
        watch = watched if mode == "constrained" else None
        done = _ablate(subject, own, how, counter, watch=watch)
        kept = done if mode == "constrained" else kept
        measured_BK, predicted_BK, node_B, control_B = _fine(
            done,
            np.asarray(done.logit_K, np.float64) - clean_K,
            -effect_KA[:, chosen.node_B].T.astype(np.float64),
            chosen.node_B,
            chosen.control_B,
        )
        out[mode] = _correlations(predicted_BK, measured_BK, key)
        for name, mine in (("top", ~control_B), ("random", control_B)):
            out[mode][name] = _correlations(
                predicted_BK[mine], measured_BK[mine], key, intervals=False
            )
        out[mode]["sign_agreement"] = _number(
            _sign_agreement(predicted_BK[~control_B], measured_BK[~control_B])
        )
        out[mode]["slope"] = _number(_slope(predicted_BK, measured_BK))
        little = _ablate(
            subject,
            [own[i] for i in small],
            how,
            counter,
            factor=options.small,
            watch=watch,
        )
        small_BK, effect_BK = _fine(
            little,
            np.asarray(little.logit_K, np.float64) - clean_K,
            effect_KA[:, chosen.node_B[small]].T.astype(np.float64),
        )
        out[mode]["small"] = _correlations(
            (options.small - 1) * effect_BK, small_BK, key
        )
        scatter[mode] = {
            "predicted": predicted_BK.tolist(),
            "measured": measured_BK.tolist(),
            "control": control_B.tolist(),
            "node": node_B.tolist(),
        }
    # The graph against the replacement model it describes: what is lost here is lost
    # to features that are not nodes of the graph.
    how = dataclasses.replace(
        subject.how("iterative", freeze_norm=True), gates="frozen"
    )
    few = slice(options.n_replacement)
    done = _ablate(subject, own[few], how, counter, everywhere=True)
    predicted_BK, measured_BK = _fine(
        done,
        -effect_KA[:, chosen.node_B[few]].T.astype(np.float64),
        np.asarray(done.logit_K, np.float64) - clean_K,
    )
    out["replacement"] = _correlations(predicted_BK, measured_BK, key)
    assert kept is not None
    return out, scatter, kept


def _clean(subject: Subject) -> np.ndarray:
    """Demeaned logits of the targets, of the recording that is patched."""
    with jax.default_matmul_precision("highest"):
        clean = clean_effect(subject.patchable, subject.ask())
    return np.asarray(clean.logit_K, np.float64)


def _sign_agreement(predicted_BK: np.ndarray, measured_BK: np.ndarray) -> float:
    """Share of the larger predicted effects whose sign is right."""
    if not len(predicted_BK):
        return math.nan
    large = np.abs(predicted_BK) >= np.median(np.abs(predicted_BK))
    return float((np.sign(predicted_BK) == np.sign(measured_BK))[large].mean())


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """Measured change for one unit of predicted change, least squares."""
    size = float((x * x).sum())
    return float((x * y).sum() / size) if size > 0 else math.nan


def _watched(subject: Subject, options: ValidateOptions) -> np.ndarray:
    graph = subject.graph
    order = np.argsort(-graph.influence_N[graph.feature_cols], kind="stable")
    order = order[(graph.layer_A[order] > 0) & (graph.value_A[order] != 0)]
    return order[: options.n_watched]


def _influence(
    subject: Subject, chosen: _Chosen, full: Effect, key: jax.Array
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measurement 2."""
    graph = subject.graph
    node_B, kl_B = _fine(full, chosen.node_B, np.asarray(full.kl, np.float64))
    kl_B = np.maximum(kl_B, 0)
    score = {
        "influence": graph.influence_N[graph.feature_cols][node_B],
        "activation": np.abs(graph.value_A[node_B]),
        "direct": direct_effect(graph)[node_B],
    }
    out: dict[str, Any] = {k: _number(spearman(v, kl_B)) for k, v in score.items()}
    out["n"] = len(node_B)
    out["intervals"] = {
        k: [_number(x) for x in bootstrap(spearman, v, kl_B, key)]
        for k, v in score.items()
    }
    # The paper's text says log-log Pearson where its caption says Spearman.
    log_kl = np.log(np.maximum(kl_B, 1e-12))
    out["log_pearson"] = {
        k: _number(pearson(np.log(np.maximum(v, 1e-12)), log_kl))
        for k, v in score.items()
    }
    points = {k: v.tolist() for k, v in score.items()} | {"kl": kl_B.tolist()}
    return out, points


def _pairwise(
    subject: Subject,
    options: ValidateOptions,
    chosen: _Chosen,
    full: Effect,
    key: jax.Array,
) -> dict[str, Any]:
    """Measurement 3."""
    graph, node_B = subject.graph, chosen.node_B
    watch_W = _watched(subject, options)
    clean_W = np.asarray(subject.watch(watch_W).value_E, np.float64)
    assert full.watch_W is not None
    node_B, watch_BW = _fine(full, node_B, np.asarray(full.watch_W, np.float64))
    change_BW = np.abs(watch_BW - clean_W)
    change_BW = change_BW / np.maximum(np.abs(clean_W), 1e-12)
    influence_BW = pairwise_influence(graph, watch_W)[:, node_B].T
    later = graph.layer_A[watch_W][None] > graph.layer_A[node_B][:, None]
    later &= graph.pos_A[watch_W][None] >= graph.pos_A[node_B][:, None]
    x, y = influence_BW[later], change_BW[later]
    out = {"spearman": _number(spearman(x, y)), "n": int(later.sum())}
    if len(x) >= 3:
        # Whole sources are drawn, with all their pairs.
        def of(draw_NB: np.ndarray) -> np.ndarray:
            pairs = ((influence_BW[i], change_BW[i], later[i]) for i in draw_NB)
            return np.array([spearman(x[ok], y[ok]) for x, y, ok in pairs])

        interval = resampled(of, len(node_B), key, n=200)
        out["interval"] = [_number(x) for x in interval]
    return out


def _supernodes(
    subject: Subject, chosen: _Chosen, effect_KA: np.ndarray, counter: _Counter
) -> dict[str, Any]:
    """Supernodes: predicted and measured change of the first target under ablation."""
    left_out = {"left_out": chosen.left_out}
    if not chosen.group:
        return {"spearman": None, "n": 0, "groups": []} | left_out
    graph = subject.graph
    clean_K = _clean(subject)
    members = [group for _, group in chosen.group]
    predicted = -group_effects(graph, members)[:, subject.targets]
    done = _ablate(subject, members, subject.how("constrained"), counter)
    measured = np.asarray(done.logit_K, np.float64) - clean_K
    groups = [
        {
            "name": name,
            "members": len(group),
            "predicted": _number(float(predicted[i, 0])),
            "measured": _number(float(measured[i, 0])),
            "kl": _number(nats(float(done.kl[i]))),
        }
        for i, (name, group) in enumerate(chosen.group)
    ]
    del effect_KA
    said, found = _fine(done, predicted, measured)
    return {
        "spearman": _number(spearman(said, found)),
        "n": int((~diverged(done)).sum()),
        "groups": groups,
    } | left_out


def _failures(
    subject: Subject, points: dict[str, Any], n: int = 5
) -> list[dict[str, Any]]:
    """The influential features whose ablation surprises most."""
    graph = subject.graph
    top = np.flatnonzero(~np.asarray(points["control"], bool))
    predicted, measured = (
        np.array([values[i][0] for i in top])
        for values in (points["predicted"], points["measured"])
    )
    gap = np.abs(predicted - measured)
    return [
        {
            "layer": int(graph.layer_A[a]),
            "pos": int(graph.pos_A[a]),
            "feature": int(graph.feature_A[a]),
            "predicted": _number(float(predicted[i])),
            "measured": _number(float(measured[i])),
        }
        for i in np.argsort(-gap, kind="stable")[:n]
        for a in [points["node"][top[i]]]
    ]


def _jacobian(subject: Subject, key: jax.Array) -> dict[str, Any]:
    """Agreement of derivatives by layer, norms frozen and live."""
    out = {}
    for norms, gates in variants(subject):
        with jax.default_matmul_precision("highest"):
            found = jacobian_agreement(
                subject.patchable, subject.local.tables, key, norms=norms, gates=gates
            )
        out[norms] = {
            "cosine": [_number(x) for x in np.asarray(found.cosine_L)],
            "nmse": [_number(x) for x in np.asarray(found.nmse_L)],
        }
    return out
