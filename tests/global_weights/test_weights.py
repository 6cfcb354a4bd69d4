"""Virtual weights: against loops, and against what graphs call residual-direct."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FEW, case, case_active, close, graph_rows, recorded
from global_cases import brute_virtual, subset

from jaxclt.clt.coder import Bound
from jaxclt.clt.store import ParamsStore
from jaxclt.clt.subset import Subset
from jaxclt.clt.transcoder import StoreDictionary
from jaxclt.errors import InputError
from jaxclt.global_weights import weights
from jaxclt.graph import provenance
from jaxclt.naming.vocabulary import highest

pytestmark = pytest.mark.usefixtures("x64")


def tiled(name: str, chosen: Subset) -> np.ndarray:
    t, starts = case(name), chosen.starts
    V = np.zeros((len(chosen), len(chosen)))
    for tile in weights.virtual_tiles(Bound(t.dictionary, t.params, t.cfg), chosen):
        rows = slice(starts[tile.target], starts[tile.target + 1])
        columns = slice(starts[tile.source], starts[tile.source + 1])
        value = np.asarray(tile.value_RN)
        V[rows, columns] = value[
            : rows.stop - rows.start, : columns.stop - columns.start
        ]
    return V


@pytest.mark.parametrize("name", FEW)
def test_blocks_are_the_loop_over_pairs_and_layers(name: str):
    """Maths 17.1: all pairs, a ragged subset, and one sub-block on request."""
    want = brute_virtual(name)
    close(tiled(name, subset(name)), want)
    few = subset(name, part=True)
    slot = [subset(name).slot(*x) for x in zip(few.layer_U, few.feature_U, strict=True)]
    close(tiled(name, few), want[np.ix_(slot, slot)])
    t, F = case(name), case(name).clt_cfg.n_features
    got = weights.virtual_block(
        Bound(t.dictionary, t.params, t.cfg), (3, np.r_[4, 2]), (1, np.r_[19, 0, 7])
    )
    close(got, want[np.ix_([3 * F + 4, 3 * F + 2], [F + 19, F, F + 7])])
    same = weights.virtual_block(
        Bound(t.dictionary, t.params, t.cfg), (1, np.r_[4, 2]), (1, np.r_[3])
    )
    assert not same.any()


@pytest.mark.parametrize("name", ["plt", pytest.param("clt", marks=pytest.mark.slow)])
def test_weights_are_linear_in_the_decoders(name: str):
    """Maths 17.2; and a PLT's weight is one dot product."""
    t = case(name)
    other = tuple(W[::-1] for W in t.clt.W_dec)
    mixed = tuple(2 * a - 3 * b for a, b in zip(t.clt.W_dec, other, strict=True))

    def weigh(decoders: tuple[jax.Array, ...]) -> np.ndarray:
        store = ParamsStore(dataclasses.replace(t.clt, W_dec=decoders), t.clt_cfg)
        on = Bound(StoreDictionary(store), t.params, t.cfg)
        every = np.arange(t.clt_cfg.n_features)
        return weights.virtual_block(on, (3, every), (1, every))

    close(weigh(mixed), 2 * weigh(t.clt.W_dec) - 3 * weigh(other))
    if name == "plt":
        close(
            weigh(t.clt.W_dec), np.asarray(t.clt.W_enc_LFD[3] @ t.clt.W_dec[1][:, 0].T)
        )


@pytest.mark.parametrize("name", [*FEW, "gpt2", "neox"])
def test_local_direct_edges_are_value_times_weight_times_norm(name: str):
    """Maths 17.3, 7.6: what `provenance` calls residual-direct, the skip left out."""
    t = case(name)
    no_skip = {"skip_LDD": None}
    active = dataclasses.replace(case_active(name), **no_skip)
    p = recorded(t, active)
    A, F = len(active.pos_A), t.clt_cfg.n_features
    found = provenance.direct_edges(p, graph_rows(p, t.targets.vec_KD))
    found = found.toarray()[:A, :A]
    slot_A = active.layer_A * F + active.feature_A
    V = tiled(name, subset(name))[np.ix_(slot_A, slot_A)]
    scale_LT = np.asarray(t.recording.frozen.mlp_scale_LT)
    scale_A = np.ones(A) if t.clt_cfg.read == "resid_mid" else (
        scale_LT[active.layer_A, active.pos_A]
    )  # fmt: skip
    same = active.pos_A[:, None] == active.pos_A[None]
    assert np.count_nonzero(found) > 10
    close(found, active.value_A[None] * V * scale_A[:, None] * same, 1e-13)


@pytest.mark.parametrize("name", ["clt", pytest.param("span2", marks=pytest.mark.slow)])
def test_vocabulary_weights(name: str):
    """Embeddings by hand; maths 17.4: logit weights of a feature sum to zero."""
    t, params = case(name), case(name).params
    on = Bound(t.dictionary, params, t.cfg)
    embed = np.asarray(params.embed_VD)
    got = weights.embedding_weights(on, 2, np.r_[3, 5], np.r_[8, 0])
    close(got, np.asarray(t.clt.W_enc_LFD)[2][[3, 5]] @ embed[[8, 0]].T)
    all_NV = weights.logit_weights(on, 1)
    assert np.abs(all_NV.sum(1)).max() < 1e-13
    unembed_DV = embed.T if params.unembed_DV is None else np.asarray(params.unembed_DV)
    written_FD = np.asarray(t.clt.W_dec[1]).sum(1) * np.asarray(params.norm_out_D)
    want = written_FD @ (unembed_DV - unembed_DV.mean(1, keepdims=True))
    close(all_NV, want)
    close(weights.logit_weights(on, 1, np.r_[6], np.r_[3]), want[[6]][:, [3]])


@pytest.mark.parametrize(("part", "k"), [(True, 1), (False, 3)])
def test_streamed_strongest_are_those_of_the_square(part: bool, k: int):
    t, chosen = case("clt"), subset("clt", part)
    V = tiled("clt", chosen)
    found = weights.strongest_virtual(Bound(t.dictionary, t.params, t.cfg), chosen, k)
    for matrix, slot_UK, weight_UK in (
        (V, found.input_UK, found.input_weight_UK),
        (V.T, found.output_UK, found.output_weight_UK),
    ):
        for row, slot_K, weight_K in zip(matrix, slot_UK, weight_UK, strict=True):
            order = np.argsort(-np.abs(row), kind="stable")[:k]
            order = order[row[order] != 0]
            np.testing.assert_array_equal(slot_K[: len(order)], order)
            close(weight_K[: len(order)], row[order])
            assert (slot_K[len(order) :] == -1).all()


@pytest.mark.parametrize(("N", "k", "group"), [(160, 4, 8), (2000, 7, 64)])
def test_grouped_selection_is_exact(N: int, k: int, group: int):
    normal_RN = jax.random.normal(jax.random.key(3), (5, N))
    for x_RN in (normal_RN, jnp.round(normal_RN, 1)):  # the second with many equals
        found = jax.jit(lambda x: highest(x, k, group))(x_RN)
        for got, want in zip(found, jax.lax.top_k(x_RN, k), strict=True):
            np.testing.assert_array_equal(got, want)


def test_subsets_say_what_is_wrong():
    cfg = case("clt").clt_cfg
    few = Subset.of(np.asarray([[2, 5], [0, 1], [2, 5]]), cfg)
    assert few.starts == (0, 1, 1, 2, 2)
    assert few.slot(2, 5) == 1
    with pytest.raises(InputError, match="there is no layer 4: the dictionary has 0"):
        Subset.of(np.asarray([[4, 0]]), cfg)
    with pytest.raises(InputError, match="there is no feature 20"):
        Subset.of(np.asarray([[0, 20]]), cfg)
    with pytest.raises(InputError, match="feature 2:6 is not among the 2"):
        few.slot(2, 6)
    with pytest.raises(InputError, match="no features"):
        Subset.of(np.zeros((0, 2)), cfg)
    assert isinstance(case("clt").dictionary, StoreDictionary)
