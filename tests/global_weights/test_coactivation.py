"""Co-activation sums, ERA and TWERA: against stored activations and graph edges."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cases import FEW, case, close, recorded
from global_cases import (
    EVERY,
    INPUT_Y,
    OUTPUT_Y,
    S,
    W,
    actives,
    below,
    brute_virtual,
    gather,
    gathered,
    recordings,
    some,
    square,
    stored,
    subset,
    weights,
    windows,
)

from jaxclt.clt.coder import Bound
from jaxclt.errors import InputError
from jaxclt.global_weights import ranking
from jaxclt.global_weights.build import build, virtual_blocks
from jaxclt.global_weights.statistics import merge_coactivation
from jaxclt.graph import provenance
from jaxclt.graph.bank import RowTargets
from jaxclt.graph.target_reads import target_reads
from jaxclt.lm.run import unembed

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("masked", [False, True])
def test_sums_are_those_of_the_stored_activations(name: str, masked: bool):
    """The sums of maths 17.5; positions that do not count are left out."""
    mask = some() if masked else EVERY
    found = gather(name, mask) if masked else gathered(name)
    a_UN = (stored(name) * mask[None]).reshape(len(subset(name)), -1)
    on_UN = (a_UN != 0) * 1.0
    keep = below(name)
    assert found.n_tokens == mask.sum()
    close(found.sums["sum_U"], a_UN.sum(1))
    close(found.sums["count_U"], on_UN.sum(1))
    close(square(found.sums["ind"]), on_UN @ a_UN.T * keep)
    close(square(found.sums["act"]), a_UN @ a_UN.T * keep)
    close(square(found.sums["both"]), on_UN @ on_UN.T * keep)
    hot_NY = (windows().reshape(-1, 1) == INPUT_Y) * mask.reshape(-1, 1) * 1.0
    close(found.sums["input_ind_UY"], on_UN @ hot_NY)
    close(found.sums["input_act_UY"], a_UN @ hot_NY)
    logit = np.stack(
        [np.asarray(unembed(case(name).params, r.out_TD)) for r in recordings(name)]
    ).reshape(W * S, -1)
    p_NV = np.exp(logit - logit.max(1, keepdims=True))
    p_NV /= p_NV.sum(1, keepdims=True)
    p_NY = p_NV[:, OUTPUT_Y] * mask.reshape(-1, 1)
    close(found.sums["output_act_YU"], p_NY.T @ a_UN.T)
    close(found.sums["output_sum_Y"], p_NY.sum(0))


@pytest.mark.parametrize("name", FEW)
def test_era_and_twera_by_their_formulas(name: str):
    """Maths 17.5, 17.6: TWERA is a weighted mean of the source's activation times V."""
    found, V = weights(name), brute_virtual(name)
    a_UN = stored(name).reshape(len(V), -1)
    mean_act = (a_UN @ a_UN.T) / a_UN.shape[1]
    mean_U = a_UN.mean(1)
    share = mean_act / np.where(mean_U, mean_U, 1)[:, None] * (mean_U != 0)[:, None]
    expected = (a_UN != 0) @ a_UN.T / a_UN.shape[1]

    def tiles(kind: ranking.Kind) -> np.ndarray:
        return square([found.tile(kind, i) for i in range(4)])

    close(tiles("virtual"), V)
    close(tiles("era"), expected * V)
    close(tiles("twera"), share * V, 1e-11)
    if (a_UN >= 0).all():
        assert (np.abs(tiles("twera")) <= a_UN.max(1) * np.abs(V) + 1e-12).all()
        fired = share > 0
        assert (np.sign(tiles("twera")) == np.sign(V))[fired & (V != 0)].all()


@pytest.mark.parametrize("name", [*FEW, "neox"])
def test_norm_aware_era_is_the_sum_of_the_graphs_direct_edges(name: str):
    """Maths 17.8: n ERA_norm == residual-direct edges summed over all prompts' graphs.

    Feature to feature, token to feature, and feature to logit weighted by probability.
    """
    t, found = case(name), weights(name)
    F, U, n = t.clt_cfg.n_features, len(subset(name)), W * S
    total_UU, embed_UY = np.zeros((U, U)), np.zeros((U, len(INPUT_Y)))
    logit_YU = np.zeros((len(OUTPUT_Y), U))
    unembed_DV = np.asarray(
        t.params.embed_VD.T if t.params.unembed_DV is None else t.params.unembed_DV
    )
    vec_YD = (unembed_DV - unembed_DV.mean(1, keepdims=True)).T[OUTPUT_Y]
    for token_S, recording, active in zip(
        windows(), recordings(name), actives(name), strict=True
    ):
        active = dataclasses.replace(active, skip_LDD=None)
        slot_A = active.layer_A * F + active.feature_A
        A, L = len(slot_A), t.cfg.n_layers
        logits = np.asarray(unembed(t.params, recording.out_TD))
        p_SV = np.exp(logits - logits.max(1, keepdims=True))
        p_SV /= p_SV.sum(1, keepdims=True)
        p = recorded(t, active, recording)
        logit_reads = [
            target_reads(t.params, recording, vec_YD, pos) for pos in range(S)
        ]
        rows = RowTargets(
            layer_R=np.r_[active.layer_A, np.full(S * len(OUTPUT_Y), L)],
            pos_R=np.r_[active.pos_A, np.repeat(np.arange(S), len(OUTPUT_Y))],
            read_RD=np.concatenate([active.reads(), *map(np.asarray, logit_reads)]),
        )
        edge_RN = provenance.direct_edges(p, rows).toarray()
        np.add.at(total_UU, (slot_A[:, None], slot_A[None]), edge_RN[:A, :A])
        token_AS = edge_RN[:A, A + L * S :]
        hot_SY = (token_S[:, None] == INPUT_Y) * 1.0
        np.add.at(embed_UY, slot_A, token_AS @ hot_SY)
        for pos in range(S):
            part = slice(A + pos * len(OUTPUT_Y), A + (pos + 1) * len(OUTPUT_Y))
            weighted = edge_RN[part, :A] * p_SV[pos, OUTPUT_Y, None]
            np.add.at(logit_YU.T, slot_A, weighted.T)
    era_UU = square([found.tile("era_norm", i) for i in range(4)])
    assert np.count_nonzero(total_UU) > 100
    close(n * era_UU, total_UU, 1e-12)
    sums = found.statistics.sums
    scaled = "_norm" if found.statistics.scaled else ""
    assert found.input_virtual_UY is not None
    assert found.output_virtual_YU is not None
    close(sums[f"input_ind{scaled}_UY"] * found.input_virtual_UY, embed_UY, 1e-12)
    close(sums["output_act_norm_YU"] * found.output_virtual_YU, logit_YU, 1e-12)


@pytest.mark.parametrize("name", ["clt", pytest.param("skip", marks=pytest.mark.slow)])
def test_streams_merge_and_sparse_sums_are_the_dense_ones(name: str):
    """Maths 17.7, dense and sparse."""
    whole = gathered(name)
    streams = [EVERY * (np.arange(W) == i)[:, None] for i in range(W)]
    parts = [gather(name, mask) for mask in streams]
    for key, value in merge_coactivation(*parts).sums.items():
        for got, want in zip(
            value if isinstance(value, tuple) else (value,),
            whole.sums[key] if isinstance(value, tuple) else (whole.sums[key],),
            strict=True,
        ):
            close(got, want, 1e-13)
    thin = merge_coactivation(*(gather(name, mask, sparse=True) for mask in streams))
    assert thin.sparse
    for key in [k for k in whole.sums if k.split("_")[0] in ("ind", "act", "both")]:
        close(square(thin.sums[key]), square(whole.sums[key]), 1e-13)
    with pytest.raises(InputError, match="cannot be merged"):
        merge_coactivation(whole, thin)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["skip", "topk"])
def test_a_subset_has_the_entries_of_all_features(name: str):
    few = gather(name, EVERY, part=True)
    slot = [
        subset(name).slot(*x)
        for x in zip(few.subset.layer_U, few.subset.feature_U, strict=True)
    ]
    for key in ("ind", "act", "both", "act_norm"):
        whole = square(gathered(name).sums[key])
        close(square(few.sums[key]), whole[np.ix_(slot, slot)])


def test_constant_targets_have_the_mean_activation():
    """Maths 17.9: a_j constant makes TWERA = E[a_i] V."""
    found = weights("clt")
    tiles = list(found.statistics.sums["act"])
    total_U = np.array(found.statistics.sums["sum_U"])
    n, here = W * S, subset("clt").of_layer(3)
    # As if the features of layer 3 were 1.7 on every token.
    tiles[3] = np.broadcast_to(1.7 * total_U[: here.start], tiles[3].shape)
    total_U[here] = 1.7 * n
    sums = found.statistics.sums | {"act": tuple(tiles), "sum_U": total_U}
    changed = dataclasses.replace(
        found, statistics=dataclasses.replace(found.statistics, sums=sums)
    )
    mean_U = found.statistics.mean[: here.start]
    close(
        changed.tile("twera", 3),
        mean_U[None] * brute_virtual("clt")[here, : here.start],
    )


@pytest.mark.parametrize("sparse", [False, True])
def test_links_are_ranked_by_any_kind(sparse: bool):
    t = case("skip")  # reads after the norm
    stats = gather("skip", EVERY, sparse=True) if sparse else gathered("skip")
    found = build(Bound(t.dictionary, t.params, t.cfg), stats)
    F = t.clt_cfg.n_features
    kinds = [k for k in ranking.KINDS if not (sparse and k == "virtual")]
    for kind in kinds:
        matrix = square([found.tile(kind, i) for i in range(4)])
        links = found.inputs(3, 7, 5, by=kind)
        order = np.argsort(-np.abs(matrix[3 * F + 7]), kind="stable")[:5]
        order = order[matrix[3 * F + 7, order] != 0]
        np.testing.assert_array_equal(
            links.source_layer_P * F + links.source_feature_P, order
        )
        close(getattr(links, f"{kind}_P"), matrix[3 * F + 7, order])
        assert set(links.target_layer_P) <= {3}
        out = found.outputs(0, 4, 5, by=kind)
        order = np.argsort(-np.abs(matrix[:, 4]), kind="stable")[:5]
        order = order[matrix[order, 4] != 0]
        np.testing.assert_array_equal(
            out.target_layer_P * F + out.target_feature_P, order
        )
        close(getattr(out, f"{kind}_P"), matrix[order, 4])
    links = found.strongest(2, ("era", "twera"))
    code = set(zip(
        (links.target_layer_P * F + links.target_feature_P).tolist(),
        (links.source_layer_P * F + links.source_feature_P).tolist(), strict=True,
    ))  # fmt: skip
    want = set()
    for kind in ("era", "twera"):
        matrix = square([found.tile(kind, i) for i in range(4)])
        for x, flip in ((matrix, False), (matrix.T, True)):
            for i, row in enumerate(x):
                for j in np.argsort(-np.abs(row), kind="stable")[:2]:
                    if row[j]:
                        want.add((int(j), i) if flip else (i, int(j)))
    assert code == want
    assert (np.diff(np.abs(links.twera_P)) <= 0).all()
    with pytest.raises(InputError, match="kind 'x': choose one of virtual"):
        found.inputs(3, 7, by="x")  # pyright: ignore[reportArgumentType]


def test_tracked_tokens_are_ranked():
    found, name = weights("clt"), "clt"
    F = case(name).clt_cfg.n_features
    links = found.token_inputs(2, 3, 4, by="era")
    stats, slot = found.statistics, 2 * F + 3
    assert found.input_virtual_UY is not None
    era_Y = stats.sums["input_ind_UY"][slot] * found.input_virtual_UY[slot] / (W * S)
    order = np.argsort(-np.abs(era_Y), kind="stable")[:4]
    order = order[era_Y[order] != 0]
    np.testing.assert_array_equal(links.token_P, INPUT_Y[order])
    close(links.era_P, era_Y[order])
    assert len(found.token_outputs(2, 3, 2).token_P) <= 2
    bare = dataclasses.replace(found, input_virtual_UY=None)
    with pytest.raises(InputError, match="give `input_tokens`"):
        bare.token_inputs(2, 3)


@pytest.mark.parametrize("sparse", [False, True])
def test_interference_is_the_share_that_never_fires_together(sparse: bool):
    t, V, keep = case("clt"), brute_virtual("clt"), below("clt")
    stats = gather("clt", EVERY, sparse=True) if sparse else gathered("clt")
    blocks = virtual_blocks(Bound(t.dictionary, t.params, t.cfg), stats)
    found = ranking.interference(stats, blocks, (0.01, 0.2))
    on_UN = (stored("clt").reshape(len(V), -1) != 0) * 1.0
    both, alive_U = on_UN @ on_UN.T, on_UN.any(1)
    pairs = np.argwhere(keep)
    order = np.argsort(-np.abs(V[keep]), kind="stable")
    assert found["pairs"] == keep.sum()
    assert found["never"] == pytest.approx((both[keep] == 0).mean())
    for share, line in zip((0.01, 0.2), found["largest"], strict=True):
        n = round(share * keep.sum())
        chosen = tuple(pairs[order[:n]].T)
        assert line["pairs"] == n
        assert line["never"] == pytest.approx((both[chosen] == 0).mean())
        live = alive_U[chosen[0]] & alive_U[chosen[1]]
        assert line["never_alive"] == pytest.approx((both[chosen][live] == 0).mean())
    assert 0 < found["largest"][1]["never"] < 1
