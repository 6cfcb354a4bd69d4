"""What a graph and two slopes say of features before any set is tried (maths 24.5)."""

from __future__ import annotations

import numpy as np

from jaxclt.circuits.ablation import Stage
from jaxclt.validation.ablations import Bench

__all__ = ["BASELINES", "rankings"]

# Rankings that a set is set beside.
BASELINES = {
    "influence": "top by influence",
    "gradient": "top by activation x gradient",
    "derivative": "top by derivative x change",
}


def rankings(
    bench: Bench, stage: Stage, node_A: np.ndarray, other_A: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Scores of candidates, [A]; the highest are tried first.

    Args:
      bench: of the graph, with its answer and foil.
      stage: whose reference is the ablation's.
      node_A: the candidates' slots in the graph.
      other_A: their values on a counterfactual prompt, None without one.

    Returns:
      By name: ``influence``; ``gradient`` (activation x gradient, by size);
      ``effect`` and ``derivative``, signed, times the change to the reference;
      ``change`` (influence x relative change), where there is a counterfactual;
      ``slopes``, the mean of the derivatives with all features and with none.
    """
    graph = bench.graph
    value_A = graph.value_A[node_A].astype(np.float64)
    reference_A = stage.value_LTU[tuple(stage.place_A3.T)].astype(np.float64)
    safe_A = np.where(value_A != 0, value_A, 1.0)
    less_A = (value_A - reference_A) / safe_A
    influence_A = graph.influence_N[graph.feature_cols][node_A].astype(np.float64)
    derivative_A = (bench.weight_K @ bench.derivative_KA)[node_A]
    none_A = np.zeros(len(node_A), bool)
    keep, drop = stage.slopes(none_A), stage.slopes(~none_A)
    # Kept alone from nothing, and dropped from all: nothing else is held in the latter.
    ends = keep.sufficiency, keep.necessity, drop.sufficiency, drop.necessity
    found = {
        "slopes": np.nansum(ends, axis=0),
        "derivative": derivative_A * less_A,
        "effect": (bench.weight_K @ bench.effect_KA)[node_A] * less_A,
        "gradient": np.abs(derivative_A),
        "influence": influence_A,
    }
    if other_A is not None:
        found["change"] = influence_A * np.abs(value_A - other_A) / np.abs(safe_A)
    return {
        name: np.where(np.isfinite(x_A), x_A, -np.inf) for name, x_A in found.items()
    }
