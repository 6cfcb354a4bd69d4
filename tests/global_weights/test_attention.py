"""Global weights through single heads, against graphs' one-hop edges."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import case, close, graph_rows, recorded
from global_cases import (
    HEADS,
    S,
    W,
    actives,
    gather,
    recordings,
    some,
    stored,
    subset,
)

from jaxclt.clt.coder import Bound
from jaxclt.errors import InputError
from jaxclt.global_weights.attention import HeadReads, head_block, head_sums
from jaxclt.global_weights.circuit import head_inputs
from jaxclt.graph import provenance
from jaxclt.types import Held

pytestmark = pytest.mark.usefixtures("x64")

ALL = tuple((layer, head) for layer in range(1, 4) for head in range(4))


def sums(name: str) -> dict:
    t, found = case(name), recordings(name)

    def stack(leaves: list) -> jax.Array:
        return jnp.stack(leaves, axis=1)  # [L, W, S, ...]

    scale_LWS = stack([r.frozen.mlp_scale_LT for r in found])
    post = found[0].frozen.post_attn_scale_LT
    scaled = t.clt_cfg.read != "resid_mid"
    reads = HeadReads(
        stored(name).reshape(-1, W * S),
        Held(
            attn_scale_LT=stack([r.frozen.attn_scale_LT for r in found]),
            clean_LTD=stack([r.resid_LTD for r in found]),
            post_attn_scale_LT=None
            if post is None
            else stack([r.frozen.post_attn_scale_LT for r in found]),
        ),
        scale_LWS.reshape(len(scale_LWS), -1) if scaled else None,
    )
    run = partial(head_sums, cfg=t.cfg, starts=subset(name).starts, heads=ALL)
    return jax.jit(run)(t.params.blocks, reads)


def whole_block(name: str, head: tuple[int, int]) -> np.ndarray:
    """V_h from all features below the head's layer to all from it on."""
    t, L = case(name), case(name).cfg.n_layers
    every = np.arange(t.clt_cfg.n_features)
    return np.block(
        [
            [
                head_block(
                    Bound(t.dictionary, t.params, t.cfg),
                    head,
                    (to, every),
                    (of, every),
                    cfg=t.cfg,
                )
                for of in range(head[0])
            ]
            for to in range(head[0], L)
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plt", "clt", "topk", "gemma3", "gpt2", "neox"])
def test_heads_sum_to_the_one_hop_edges_of_the_graphs(name: str):
    """Maths 17.10: n ERA of all heads together == the edges with exactly one hop."""
    t, found, chosen = case(name), sums(name), subset(name)
    U, F = len(chosen), t.clt_cfg.n_features
    got_UU, want_UU = np.zeros((U, U)), np.zeros((U, U))
    for i, head in enumerate(ALL):
        first = chosen.starts[head[0]]
        part = np.asarray(found["head_ind"][i]) * whole_block(name, head)
        got_UU[first:, :first] += part
    for recording, active in zip(recordings(name), actives(name), strict=True):
        active = dataclasses.replace(active, skip_LDD=None)
        p = recorded(t, active, recording)
        rows = graph_rows(p, t.targets.vec_KD)
        hops = provenance.hop_spectrum(p, rows, max_hops=2)
        A, slot_A = len(active.pos_A), active.layer_A * F + active.feature_A
        np.add.at(want_UU, (slot_A[:, None], slot_A[None]), hops[1][:A, :A])
    assert np.count_nonzero(want_UU) > 100
    close(got_UU, want_UU, 1e-12)


def test_sums_of_one_head_by_a_loop():
    """As gathered with everything else, with positions left out as targets and sources;
    TWERA's sums too."""
    found = gather("clt", some())
    layer, head = HEADS[0]
    first = subset("clt").starts[layer]
    a_UWS = stored("clt") * some()[None]
    ind, act = np.zeros((2, len(a_UWS) - first, first))
    for w, recording in enumerate(recordings("clt")):
        A_TS = np.asarray(recording.frozen.pattern_LHTS)[layer, head]
        scale_S = np.asarray(recording.frozen.attn_scale_LT)[layer]
        for to in range(S):
            moved = sum(
                A_TS[to, of] * scale_S[of] * a_UWS[:first, w, of] for of in range(S)
            )
            target = a_UWS[first:, w, to]
            ind += np.outer(target != 0, moved)
            act += np.outer(target, moved)
    close(found.sums["head_ind"][0], ind)
    close(found.sums["head_act"][0], act)
    t, F = case("clt"), case("clt").clt_cfg.n_features
    V_FN = whole_block("clt", HEADS[0])[F:]  # into layer 3
    total_F = a_UWS.sum((1, 2))[3 * F :]
    feature = int((total_F > 0).argmax())
    era_N = ind[F + feature] * V_FN[feature] / some().sum()
    twera_N = act[F + feature] * V_FN[feature] / total_F[feature]
    model: Any = SimpleNamespace(params=t.params, cfg=t.cfg)
    whole = (model, t.dictionary, found)
    rows = head_inputs(*whole, HEADS[0], 3, feature, k=len(era_N), by="era")
    order = np.argsort(-np.abs(era_N), kind="stable")
    order = order[era_N[order] != 0]
    assert [row["layer"] * F + row["feature"] for row in rows] == order.tolist()
    for name, x_N in (("era", era_N), ("twera", twera_N), ("virtual", V_FN[feature])):
        close(np.asarray([row[name] for row in rows]), x_N[order])
    assert head_inputs(*whole, HEADS[0], 3, feature, k=4, by="era") == rows[:4]
    with pytest.raises(InputError, match="head 1:1 was not gathered"):
        head_inputs(*whole, (1, 1), 3, feature)
    with pytest.raises(InputError, match="lies below head 2:1"):
        head_inputs(*whole, HEADS[0], 1, feature)


def test_block_of_a_head_by_hand():
    t = case("skip")  # reads with the gain of the norm
    p, clt = t.params.blocks, t.clt
    args = (Bound(t.dictionary, t.params, t.cfg), (2, 3))
    got = head_block(*args, (3, np.r_[5, 1]), (0, np.r_[2, 9]), cfg=t.cfg)
    written_ND = np.asarray(clt.W_dec[0])[[2, 9], :2].sum(1)
    read_RD = np.asarray(clt.W_enc_LFD[3])[[5, 1]] * np.asarray(p.norm_mlp_LD[3])
    value_DC = np.asarray(p.norm_attn_LD[2])[:, None] * np.asarray(p.v_LDGC[2, :, 1])
    close(got, read_RD @ (written_ND @ value_DC @ np.asarray(p.o_LHCD[2, 3])).T)
    below = head_block(*args, (1, np.r_[0]), (0, np.r_[0]), cfg=t.cfg)
    assert not below.any()
