"""The second reading of a graph: what a small change of a source does.

An edge by *value* says what a row is made of: attention patterns and norm denominators
are held, and the row sums. An edge by *response* is the source's value times the
derivative of the row with both live, other features held: what a small change of the
source does before they answer (maths 22.1). Influence, pruning, paths, supernodes and
total effects work on either.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxclt.errors import InputError
from jaxclt.graph.graph import Graph
from jaxclt.graph.influence import solve_influence
from jaxclt.graph.prune import prune
from jaxclt.graph.shares import shares_total

__all__ = ["by_response"]


def by_response(graph: Graph) -> Graph:
    """The same nodes with edges by response, their influence, and what it keeps.

    Rows sum to no readout: no bias takes part in a change. How edges travelled is known
    by value only and left out. Pruned anew at the graph's own thresholds.

    Raises:
      InputError: if the graph has no edges by response.
    """
    found = graph.response
    if found is None:
        raise InputError(
            "this graph has no edges by response: trace the prompt with --response "
            "(in Python AttributeConfig(response=True))"
        )
    other = dataclasses.replace(
        graph,
        meta=dataclasses.replace(graph.meta, reading="response"),
        edge_RN=found.edge_RN,
        rest_R=found.rest_R,
        rest_abs_R=found.rest_abs_R,
        bias_R=np.zeros_like(graph.bias_R),
        direct_RN=None,
        heads=None,
        response=None,
        total_effect_KA=found.total_effect_KA,
    )
    total_R, weight_K = shares_total(other), other.target_prob_K
    influence_N = solve_influence(other.edge_RN, total_R, weight_K)
    other = dataclasses.replace(other, influence_N=influence_N)
    pruning = prune(
        other,
        node_threshold=graph.pruning.node_threshold,
        edge_threshold=graph.pruning.edge_threshold,
    )
    return dataclasses.replace(other, pruning=pruning)
