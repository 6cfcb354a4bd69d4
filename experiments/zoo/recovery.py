"""How much of a planted circuit a dictionary's graphs say.

A feature *is* a true node if its activation correlates, by at least `MATCH` in absolute
value, with a unit of that node (or an alias) over all positions of the cases, each
prompt once; of several it takes the best. The graph of a case is contracted to the true
nodes (`jaxclt.graph.supernodes`), a feature belonging to a node if it is at the node's
place. Then, in the backward walk of `jaxclt.graph.influence` on the small graph:

- true: the probability that the walk reaches the right token by true edges alone;
- shortcut, early: the expected number of such edges it takes after true ones: features
  that already write what a later node should, and ones that read past the node before;
- recall: the share of true nodes with a feature on the case; precision: the share of
  all features' influence that belongs to features that are true nodes;
- swap: one variable of the circuit is given another value in the running model and in
  the local replacement model: |response' - response| / |response|, over the logits of
  all possible answers (0: the dictionary responds as the model; 1: not at all, or as
  wrongly). Patterns are frozen in both, a neuron's gate as in graphs.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from planted import Case, Planted

from jaxclt.clt.active import active_features
from jaxclt.clt.coder import Dictionary, load
from jaxclt.graph.attribute import AttributeConfig, attribute_recording
from jaxclt.graph.effects import solve_total_effect
from jaxclt.graph.graph import Graph, GraphMeta
from jaxclt.graph.prompt import Prompt
from jaxclt.graph.response import by_response
from jaxclt.graph.scores import scores
from jaxclt.graph.supernodes import supernode_graph
from jaxclt.graph.targets import functional_targets
from jaxclt.lm.config import LMConfig
from jaxclt.lm.run import Run, embed, native_mlp, record, run, unembed
from jaxclt.patching.change import Change, batched
from jaxclt.patching.features import gather_features
from jaxclt.patching.how import How, Part
from jaxclt.patching.local import Tables, make_local
from jaxclt.patching.modes import patched, underlying
from jaxclt.patching.patchable import Patchable, hold_of, make_patchable
from jaxclt.types import Held, LMParams, Recording, Supernode
from jaxclt.validation.perturb import Perturbation, nudged

__all__ = [
    "MATCH",
    "Hidden",
    "Recovery",
    "case_graph",
    "hidden",
    "match",
    "record_prompt",
    "recover",
    "swap_error",
]

MATCH = 0.7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recovery:
    """One dictionary on some cases: means, all in 0..1 but `swap`."""

    true: float
    shortcut: float
    early: float
    error: float  # of the walk's endings on the full graph: error nodes
    bias: float  # the same: biases
    recall: float
    precision: float
    swap: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hidden:
    """What decides where a head attends, in a graph and by patches (means of cases).

    Changes of the answer's logit are as a share of it, 1 being all of it. Errors are
    |predicted - measured| / |measured|, nan where nothing was measured.
    """

    key_influence: float  # of the key's features, in the graph
    query_influence: float
    key_response: float  # the same in the graph by response
    query_response: float
    key_effect: float  # their total effect on the answer by response, as a share of it
    query_effect: float
    key_frozen: float  # change when the key's features are ablated, patterns held
    key_live: float  # the same with patterns computed anew
    query_frozen: float  # change when the last token is replaced, patterns held
    query_live: float
    key_small: float  # error of the response for a tenth less of the key's features
    query_small: float
    query_swap: (
        float  # error of the replacement model, patterns live, for another query
    )


@partial(jax.jit, static_argnames="cfg")
def _record(params: LMParams, token_T: Array, cfg: LMConfig) -> Recording:
    return record(params, token_T, cfg=cfg)


def record_prompt(params: LMParams, token_T: np.ndarray, cfg: LMConfig) -> Recording:
    """The clean pass of a prompt, compiled once for each length."""
    return _record(params, jnp.asarray(token_T), cfg)


@partial(jax.jit, static_argnames="cfg")
def _record_many(params: LMParams, token_PT: np.ndarray, cfg: LMConfig) -> Recording:
    return jax.vmap(lambda token_T: record(params, token_T, cfg=cfg))(token_PT)


def match(planted: Planted, dictionary: Dictionary) -> dict[tuple[int, int], str]:
    """Node of every feature that is one, by (layer, feature)."""
    cfg, params = planted.cfg, planted.params
    token_PT = np.stack([case.token_T for case in planted.cases])
    rec_P = _record_many(params, token_PT, cfg)
    mid_PLTD = np.asarray(rec_P.mid_LTD)
    a_PLTF = np.asarray(_activations(dictionary, params, rec_P, cfg))
    found = {}
    for layer in range(cfg.n_layers):
        units = [u for u in (*planted.units, *planted.aliases) if u.layer == layer]
        pre_XU = mid_PLTD[:, layer] @ np.stack([u.read_D for u in units]).T
        unit_XU = pre_XU * (pre_XU > np.array([u.theta for u in units]))
        unit_XU = unit_XU.reshape(-1, len(units))
        a_XF = a_PLTF[:, layer].reshape(len(unit_XU), -1)
        size_FU = np.abs(_standard(a_XF).T @ _standard(unit_XU)) / len(unit_XU)
        for feature in np.flatnonzero(size_FU.max(1) >= MATCH):
            found[layer, int(feature)] = units[int(size_FU[feature].argmax())].node
    return found


def _standard(x_XF: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and variance 1; constant ones are zero."""
    x_XF = x_XF.astype(np.float64) - x_XF.mean(0)
    size_F = x_XF.std(0)
    return x_XF / np.where(size_F > 1e-9, size_F, np.inf)


def _activations(
    dictionary: Dictionary, params: LMParams, rec_P: Recording, cfg: LMConfig
) -> Array:
    """Dense activations [P, L, T, F] on recordings with a leading P."""
    loaded = load(dictionary, params, cfg, decoders=False)
    dense = partial(jax.vmap(loaded.layer), params.blocks, loaded.weights)
    return jax.jit(jax.vmap(dense))(rec_P.mid_LTD, rec_P.frozen.mlp_scale_LT)


def case_graph(
    planted: Planted, dictionary: Dictionary, case: Case, *, response: bool = False
) -> Graph:
    """The full graph of a case; its targets are the answers' logits, not demeaned."""
    cfg, params = planted.cfg, planted.params
    rec = record_prompt(params, case.token_T, cfg)
    assert params.unembed_DV is not None
    targets = functional_targets(
        params,
        rec,
        "out",
        -1,
        np.asarray(params.unembed_DV)[:, list(case.answer.values())].T,
        cfg=cfg,
        labels=list(case.answer),
    )
    tokens = tuple(f"t{i}" for i in case.token_T)
    return attribute_recording(
        Prompt(
            params,
            rec,
            active_features(dictionary, params, rec, cfg),
            targets,
            cfg=cfg,
            config=AttributeConfig(
                max_features=None, tolerance=0.0, devices=1, response=response
            ),
            dictionary=dictionary,
        ),
        GraphMeta(
            model=planted.name,
            dictionary=dictionary.name,
            prompt=" ".join(tokens),
            tokens=tokens,
            target_tokens=tuple(case.answer),
            n_layers=cfg.n_layers,
        ),
    )


def _nodes(
    graph: Graph, case: Case, matched: dict[tuple[int, int], str]
) -> dict[str, list[tuple[int, int, int]]]:
    """Features of every true node on a case; a node that has none is left out."""
    found: dict[str, list[tuple[int, int, int]]] = {}
    # Of all neurons, most hold what a shut gate lets through.
    for a in np.flatnonzero(np.abs(graph.value_A) > 1e-6).tolist():
        layer, pos, feature = (
            int(x[a]) for x in (graph.layer_A, graph.pos_A, graph.feature_A)
        )
        node = matched.get((layer, feature))
        if node is not None and case.place.get(node) == (layer, pos):
            found.setdefault(node, []).append((layer, pos, feature))
    return found


def recover(
    planted: Planted, dictionary: Dictionary, cases: tuple[Case, ...]
) -> Recovery:
    """The scores of this module's docstring, averaged over cases."""
    matched = match(planted, dictionary)
    found = [_recover(planted, dictionary, case, matched) for case in cases]
    return Recovery(
        **{
            field.name: float(np.mean([getattr(one, field.name) for one in found]))
            for field in dataclasses.fields(Recovery)
        }
    )


def _recover(
    planted: Planted,
    dictionary: Dictionary,
    case: Case,
    matched: dict[tuple[int, int], str],
) -> Recovery:
    graph = case_graph(planted, dictionary, case)
    nodes = _nodes(graph, case, matched)
    groups = [Supernode("token", (f"embed {case.source}",))]
    groups += [Supernode(name, tuple(places)) for name, places in nodes.items()]
    groups += [Supernode(y, (f"target {k}",)) for k, y in enumerate(case.answer)]
    small = supernode_graph(graph, groups)

    def only(edges: frozenset[tuple[str, str]]) -> np.ndarray:
        keep_GG = [[(s, t) in edges for s in small.names] for t in small.names]
        return np.where(keep_GG, small.size_GG, 0)

    true_GG = only(planted.edges)
    wrong_G2 = np.stack([only(e).sum(1) for e in (planted.shortcuts, planted.early)], 1)
    step_G = np.array([name in case.answer for name in small.names], float)
    step_G /= step_G.sum()
    true, wrong_2 = 0.0, np.zeros(2)
    for _ in range(graph.n_layers + 1):
        wrong_2 += step_G @ wrong_G2
        step_G = step_G @ true_GG
        true += step_G[0]
    influence_A = graph.influence_N[graph.feature_cols]
    own = sum(
        small.influence_G[g] for g, name in enumerate(small.names) if name in nodes
    )
    full = scores(graph)
    total = float(influence_A.sum())
    return Recovery(
        true=float(true),
        shortcut=float(wrong_2[0]),
        early=float(wrong_2[1]),
        error=full.error_share,
        bias=full.bias_share,
        recall=len(nodes) / len(case.place),
        precision=min(1.0, float(own) / total) if total > 0 else 0.0,
        swap=swap_error(planted, dictionary, case),
    )


# -- patches ---------------------------------------------------------------------------


def swap_error(
    planted: Planted,
    dictionary: Dictionary,
    case: Case,
    *,
    gates: Part | None = None,
    query: bool = False,
) -> float:
    """How far the replacement model's response to the swap is from the model's.

    Args:
      planted: the model.
      dictionary: what replaces its MLPs; the errors of the case are kept.
      case: the prompt and its swap.
      gates: "live" lets features switch on and off, "frozen" is what the graph of the
        case says; None takes live for transcoders and frozen for neurons, whose live
        gates are the model itself.
      query: swap what is asked for, with patterns live in both.
    """
    params, cfg = planted.params, planted.cfg
    rec = record_prompt(params, case.token_T, cfg)
    model = make_patchable(dictionary, params, rec, cfg)
    local = make_local(dictionary, model, active_features(dictionary, params, rec, cfg))
    idle = Change.of(gather_features(dictionary, model, [(0, 0, 0)]), 1.0)
    layer, pos, delta_D = case.swap_layer, case.swap_pos, case.swap_D
    if query:
        assert case.query_D is not None, "the circuit asks for nothing"
        layer, pos, delta_D = 0, len(case.token_T) - 1, case.query_D
    swaps = nudged(
        local.placed(batched(idle, [1])),
        np.array([layer]),
        np.array([pos]),
        np.asarray(delta_D, rec.mid_LTD.dtype)[None],
        len(case.token_T),
    )
    swap = jax.tree.map(lambda leaf_B: leaf_B[0], swaps)
    patterns = "live" if query else "frozen"
    how = How(mode="iterative", patterns=patterns, norms="frozen", gates=gates)
    readout_K = jnp.asarray(planted.readout_K)
    said_K, real_K = _responses(model, local.tables, swap, readout_K, how=how)
    return float(jnp.linalg.norm(said_K - real_K) / jnp.linalg.norm(real_K))


@partial(jax.jit, static_argnames="how")
def _responses(
    model: Patchable, tables: Tables, swap: Perturbation, token_K: Array, *, how: How
) -> tuple[Array, Array]:
    """Changes of the logits [K], of the local replacement model and of the model."""
    rec, last = model.recording, model.cfg.n_layers - 1

    def moved(done: Run) -> Array:
        return unembed(model.params, done.out_TD[-1] - rec.out_TD[-1])[token_K]

    layers_2 = jnp.stack([swap.start, jnp.asarray(last, jnp.int32)])
    said = patched(
        model, swap.change, layers_2, how=how, tables=tables, nudge=swap.nudge
    )
    hold, nudge = hold_of(rec, How(patterns=how.patterns)), swap.nudge
    real = underlying(model, nudge.layer, hold, nudge=nudge)
    return moved(said), moved(real)


def hidden(planted: Planted, dictionary: Dictionary, cases: tuple[Case, ...]) -> Hidden:
    """What a graph and what patches say of a head's key and query, averaged over cases.

    The key's features are ablated by a constrained patch of their layer, behind which
    the model runs by itself; the query is the last token, replaced by one that is not
    in the prompt. Norms are held throughout, so that only patterns make a difference.
    What small changes do is told by total effects by response, and measured on a tenth.

    Args:
      planted: with nodes ``key`` and ``query``.
      dictionary: whose features.
      cases: prompts.
    """
    matched = match(planted, dictionary)
    found = [_hidden(planted, dictionary, case, matched) for case in cases]
    return Hidden(
        **{
            field.name: float(np.mean([getattr(one, field.name) for one in found]))
            for field in dataclasses.fields(Hidden)
        }
    )


@partial(jax.jit, static_argnames="cfg")
def _replaced(params: LMParams, token_T: Array, hold: Held, cfg: LMConfig) -> Array:
    """Logits at the last position of other tokens, what is held from the recording."""
    embed_TD = embed(params, token_T)
    done = run(params, embed_TD, native_mlp(cfg), cfg=cfg, frozen=hold)
    return unembed(params, done.out_TD[-1])


@partial(jax.jit, static_argnames="how")
def _ablated(model: Patchable, change: Change, layer: Array, *, how: How) -> Array:
    """Logits at the last position with one layer's output clamped, as changed."""
    done = patched(model, change, jnp.stack([layer, layer]), how=how)
    return unembed(model.params, done.out_TD[-1])


def _hidden(
    planted: Planted,
    dictionary: Dictionary,
    case: Case,
    matched: dict[tuple[int, int], str],
) -> Hidden:
    params, cfg = planted.params, planted.cfg
    graph = case_graph(planted, dictionary, case, response=True)
    rec = record_prompt(params, case.token_T, cfg)
    model = make_patchable(dictionary, params, rec, cfg)
    answer = case.answer["answer"]
    clean = float(unembed(params, rec.out_TD[-1])[answer])
    frozen, live = (How(patterns=part, norms="frozen") for part in get_args(Part)[::-1])

    def loss(logit_V: Array) -> float:
        return 1 - float(logit_V[answer]) / clean

    other = min(set(range(cfg.d_vocab)) - set(case.token_T.tolist()))
    new_T = jnp.asarray(case.token_T).at[-1].set(other)
    response = by_response(graph)
    nodes = {k: v for k, v in _nodes(graph, case, matched).items() if k != "copy"}
    found = {
        f"query_{name}": loss(_replaced(params, new_T, hold_of(rec, how), cfg))
        for name, how in (("frozen", frozen), ("live", live))
    }
    effect_A = solve_total_effect(response)[0]
    for node in ("key", "query"):
        places = nodes.get(node, [])
        own_A = [graph.feature(a) in places for a in range(graph.n_features)]
        for name, of in (("influence", graph), ("response", response)):
            influence_A = of.influence_N[graph.feature_cols]
            found[f"{node}_{name}"] = float(influence_A[own_A].sum())
        features = gather_features(dictionary, model, places or [(0, 0, 0)])
        layer = jnp.asarray(0, jnp.int32)
        small = loss(_ablated(model, Change.of(features, 0.9), layer, how=live))
        found[f"{node}_effect"] = said = float(effect_A[own_A].sum()) / clean
        known = bool(places) and abs(small) > 1e-3
        found[f"{node}_small"] = abs(0.1 * said / small - 1) if known else float("nan")
        if node == "key":
            for name, how in (("frozen", frozen), ("live", live)):
                ablated = _ablated(model, Change.of(features), layer, how=how)
                found[f"key_{name}"] = loss(ablated) if places else 0.0
    found["query_swap"] = swap_error(planted, dictionary, case, query=True)
    return Hidden(**found)
