"""In the model, patterns live: what features do when attention and norms answer too.

Single features are patched in the real model, everything live, and the change of the
graph's contrast is compared with predictions (maths 22.71): of small patches to first
order, by the graph's total effects by response or, where it has none, by the model's
own derivative; of whole ablations by the local replacement model with attention and
norms live and gates held. The graph's effects by value stand beside both.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclt.files.json_text import rounded
from jaxclt.graph.agreement import sign_agreement, slope, spearman
from jaxclt.graph.effects import total_effects
from jaxclt.patching.finite import FINITE
from jaxclt.patching.subject import Subject
from jaxclt.validation.ablations import Ablated, Bench
from jaxclt.validation.choice import Choice, ValidateOptions
from jaxclt.validation.patterns import LIVE, Moved, moved_patterns
from jaxclt.validation.stats import bootstrap, mean_interval

__all__ = ["n_live_patches", "patterns_live"]

CELLS = 100  # of each patch's patterns that are compared
MOST_CELLS = 1 << 24  # of all patterns: more would take too much memory


def n_live_patches(subject: Subject, options: ValidateOptions, choice: Choice) -> int:
    """How many patches `patterns_live` makes."""
    n_moving = len(_moving(subject, options, choice))
    return 3 * len(choice.small(options.n_live)) + n_moving


def patterns_live(bench: Bench) -> dict[str, Any]:
    """Predicted and measured changes of the contrast and of attention patterns.

    Returns:
      ``full`` and ``small``, each ``{predicted_by, spearman, sign, slope, n,
      interval}``, with the same of features after the first position (``after_first``)
      and by other predictions, under their names; and ``patterns``, None where they are
      too many. ``small`` is left out if the graph knows no first-order effects.
    """
    at, factor = bench.choice.small(bench.options.n_live), bench.options.live_factor
    single, node_B = bench.single.where(at), bench.choice.node_B[at]
    full, small = (bench.patch(single, LIVE, factor=x) for x in (0.0, factor))
    finite = bench.patch(single, FINITE, everywhere=True)
    weight_K = bench.weight_K
    every = {**_first_order(bench), "value": bench.effect_KA}
    said = {name: -(weight_K @ effect_KA)[node_B] for name, effect_KA in every.items()}

    def agreed(predicted_B: np.ndarray, done: Ablated) -> dict[str, Any]:
        measured_B = done.change_BK @ weight_K
        fine_B = done.fine_B & np.isfinite(predicted_B)
        later_B = fine_B & (bench.graph.pos_A[node_B] > 0)
        found, later = (
            _agreement(predicted_B[of], measured_B[of], bench.key)
            for of in (fine_B, later_B)
        )
        return {**found, "after_first": later}

    finite_B = np.where(finite.fine_B, finite.change_BK @ weight_K, np.nan)
    ablated = {
        x: agreed(said_B, full) for x, said_B in {"finite": finite_B, **said}.items()
    }
    little = {x: agreed((1 - factor) * said_B, small) for x, said_B in said.items()}
    out: dict[str, Any] = {"full": _first_of(ablated)}
    if len(little) > 1:
        out["small"] = {"factor": factor, **_first_of(little)}
    return {**out, "patterns": _patterns(bench, factor)}


def _first_of(lines: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The first of several predictions, with the others under their names."""
    (name, line), *others = lines.items()
    return {"predicted_by": name, **line, **dict(others)}


def _first_order(bench: Bench) -> dict[str, np.ndarray]:
    """What a small change of each feature does, [K, A], by who says so.

    The graph's response is of its targets: it says nothing of another foil.
    """
    graph, found = bench.graph, {}
    if graph.response is not None and len(bench.token_K) == len(bench.own):
        effect_KA = total_effects(graph, response=True)
        found["response"] = effect_KA[bench.own]
    return found | {"derivative": bench.derivative_KA}


def _agreement(
    predicted: np.ndarray, measured: np.ndarray, key: jax.Array
) -> dict[str, Any]:
    predicted, measured = (np.asarray(x, np.float64) for x in (predicted, measured))
    return {
        "spearman": rounded(spearman(predicted, measured)),
        "sign": rounded(sign_agreement(predicted, measured)),
        "slope": rounded(slope(predicted, measured)),
        "n": len(predicted),
        "interval": [rounded(x) for x in bootstrap(spearman, predicted, measured, key)],
    }


def _moving(subject: Subject, options: ValidateOptions, choice: Choice) -> np.ndarray:
    """Places in the batch of the features whose patterns are compared."""
    pattern_LHTS = subject.patchable.recording.frozen.pattern_LHTS
    if pattern_LHTS is None or pattern_LHTS.size > MOST_CELLS:
        return np.zeros(0, int)
    return np.flatnonzero(~choice.control_B)[: options.n_patterns]


def _patterns(bench: Bench, factor: float) -> dict[str, Any] | None:
    """Changes of attention patterns, of the cells that move most (maths 22.72)."""
    subject, local = bench.subject, bench.subject.local
    at = _moving(subject, bench.options, bench.choice)
    if not len(at):
        return None
    L, H = subject.model.cfg.n_layers, subject.model.cfg.n_heads
    found = moved_patterns(
        subject.patchable,
        local.placed(bench.single.where(at)),
        local.tables,
        jnp.asarray(factor, bench.single.factor_E.dtype),
        n_cells=min(CELLS, L * H * subject.n_tokens**2),
    )
    bench.counter.add(len(at), 0)
    full, small = (_of_patterns(moved, bench.key) for moved in found)
    return {"full": full, "small": small}


def _of_patterns(moved: Moved, key: jax.Array) -> dict[str, Any]:
    predicted_BX, measured_BX, cosine_B = (np.asarray(x, np.float64) for x in moved)
    fine_B = np.isfinite(cosine_B)
    out = _agreement(predicted_BX[fine_B], measured_BX[fine_B], key)
    cosine = cosine_B[fine_B].mean() if fine_B.any() else np.nan
    interval = [rounded(x) for x in mean_interval(cosine_B, key)]
    return {**out, "cosine": rounded(cosine), "cosine_interval": interval}
