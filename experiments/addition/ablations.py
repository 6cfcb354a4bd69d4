"""Do V, ERA or TWERA say which features matter to a feature? Against ablations.

For target features of layers 1 and 2, every feature that is active at the `=` of a sum
is set to 0 there, MLP outputs clamped from its layer to the one before the last
(constrained patching, so that what is measured is its direct effect), and the change of
the target's activation is summed over sums. The ten sources that change it most are
set against the ten that each ranking names (precision at 10).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import study
import task
from global_circuit import weights_at_equals

from jaxclt.clt.transcoder import StoreDictionary
from jaxclt.graph.agreement import spearman
from jaxclt.io.model import Model
from jaxclt.patching.change import Change, batched
from jaxclt.patching.how import How
from jaxclt.validation.stats import mean_interval

KINDS = ("virtual", "era", "twera")
K = 10
OFTEN = 100  # of the 10,000 sums on which a feature must be active
TARGETS = 60  # of each layer


def measured(
    model: Model,
    dictionary: StoreDictionary,
    a_LNF: np.ndarray,
    target_U2: np.ndarray,
    *,
    n: int,
    seed: int,
    say: Callable[[str], None],
) -> dict[tuple[int, int], np.ndarray]:
    """Summed |change| of each target [U] by ablated source (layer, feature)."""
    change: dict[tuple[int, int], np.ndarray] = {}
    top = model.cfg.n_layers - 1
    for i, (a, b) in enumerate(study.random_sums(n, seed)):
        subject = study.subject_of(model, dictionary, a, b)
        last = subject.n_tokens - 1
        at_LF = a_LNF[:top, a * task.N + b]
        places = np.argwhere(at_LF > 0)
        layer_U, feature_U = target_U2.T
        watch = subject.gather(
            np.stack([layer_U, np.full_like(layer_U, last), feature_U], 1)
        )
        clean_U = a_LNF[layer_U, a * task.N + b, feature_U]
        sources = subject.gather([(l, last, f) for l, f in places.tolist()])
        done = subject.effects(
            batched(Change.of(sources), [1] * len(places)),
            [(int(l), top - 1) for l, _ in places],
            How(),
            subject.ask(watch),
        )
        assert done.watch_W is not None
        for (l, f), value_U in zip(places.tolist(), done.watch_W, strict=True):
            # features of the source's layer and below do not respond
            moved_U = np.where(layer_U > l, np.abs(value_U - clean_U), 0)
            change[l, f] = change.get((l, f), 0) + moved_U
        if (i + 1) % 100 == 0:
            say(f"{dictionary.name}: ablations on {i + 1} of {n} sums")
    return change


def precision(
    model: Model,
    dictionary: StoreDictionary,
    a_LNF: np.ndarray,
    *,
    n: int,
    seed: int,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Precision at 10 and rank correlation of each ranking, by layer of the target."""
    count_LF = (a_LNF > 0).sum(1)
    rows = np.argwhere(count_LF >= OFTEN)
    weights = weights_at_equals(model, dictionary, rows)
    key = jax.random.key(seed)
    target_U2 = np.concatenate(
        [
            of[np.asarray(jax.random.permutation(key, len(of)))[:TARGETS]]
            for layer in range(1, model.cfg.n_layers)
            for of in [rows[rows[:, 0] == layer]]
        ]
    )
    change = measured(model, dictionary, a_LNF, target_U2, n=n, seed=seed, say=say)
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    chance: dict[int, list[float]] = {}
    for u, (layer, feature) in enumerate(target_U2.tolist()):
        sources = [tuple(x) for x in rows[rows[:, 0] < layer].tolist()]
        truth = np.array([change[s][u] if s in change else 0.0 for s in sources])
        if (truth > 0).sum() < K:
            continue
        best = set(np.argsort(-truth, kind="stable")[:K].tolist())
        chance.setdefault(layer, []).append(K / len(sources))
        for kind in KINDS:
            links = weights.inputs(layer, feature, len(sources), by=kind).rows()
            size = dict.fromkeys(sources, 0.0)
            for r in links:
                size[r["source_layer"], r["source_feature"]] = abs(r[kind])
            said = np.array([size[s] for s in sources])
            hits = best & set(np.argsort(-said, kind="stable")[:K].tolist())
            found.setdefault((layer, kind), []).append(
                (len(hits) / K, spearman(said, truth))
            )
    return [
        {
            "layer": layer,
            "by": kind,
            "targets": len(values),
            "precision": float(np.mean([p for p, _ in values])),
            "interval": list(mean_interval(np.array([p for p, _ in values]), key)),
            "spearman": float(np.nanmean([s for _, s in values])),
            "chance": float(np.mean(chance[layer])),
        }
        for (layer, kind), values in sorted(found.items())
    ]


def table(found: list[dict[str, Any]]) -> str:
    head = "| target's layer | by | targets | precision at 10 | by chance "
    head += "| rank correlation |\n" + "|---" * 6 + "|\n"
    return head + "".join(
        f"| {r['layer']} | {r['by']} | {r['targets']} | {r['precision']:.2f} "
        f"({r['interval'][0]:.2f} to {r['interval'][1]:.2f}) | {r['chance']:.2f} "
        f"| {r['spearman']:.2f} |\n"
        for r in found
    )
