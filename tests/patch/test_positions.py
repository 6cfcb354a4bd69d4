"""Edits over several positions act where a feature is active, on new tokens too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_shell import L, generated, greedy, parts, patched, subject

import jaxclt
from jaxclt.lm.run import unembed
from jaxclt.patching import patch as intervene
from jaxclt.patching.change import batched
from jaxclt.patching.edits import Edit
from jaxclt.patching.how import How, Mode
from jaxclt.patching.plan import plan_patch
from jaxclt.types import Supernode

LAYER, FEATURE, T = 1, 39, 6
ACTIVE = [0, 2, 4, 5]  # where it is, of 0 to 5


def at(pos: int | slice, feature: int = FEATURE, **op: float) -> Edit:
    return Edit(layer=LAYER, pos=pos, feature=feature, **(op or {"scale": 0.0}))


def kl(*edits: Edit, **how: Any) -> float:
    found = patched(edits, **how).kl
    assert found is not None
    return found


def silent_feature() -> int:
    """One that is active nowhere on the prompt."""
    graph = parts()[2]
    return min(set(range(40)) - set(graph.feature_A[graph.layer_A == LAYER].tolist()))


def test_the_feature_of_these_tests_is_silent_at_some_positions():
    graph = parts()[2]
    here = (graph.layer_A == LAYER) & (graph.feature_A == FEATURE)
    assert sorted(graph.pos_A[here].tolist()) == ACTIVE


MODES = [
    "constrained",
    pytest.param("iterative", marks=pytest.mark.slow),
    pytest.param("additive", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("mode", ["constrained", "iterative", "additive"])
@pytest.mark.parametrize(
    "op",
    [
        {"scale": 0.0},
        pytest.param({"scale": 2.0}, marks=pytest.mark.slow),
        pytest.param({"set": 0.0}, marks=pytest.mark.slow),
    ],
)
def test_a_range_is_its_active_positions_one_by_one(mode: Mode, op: dict[str, float]):
    for slice_, covered in (
        (slice(0, None), ACTIVE),
        (slice(None), ACTIVE),
        (slice(0, 2), [0]),
        (slice(-3, None), [4, 5]),
        (slice(1, 6, 2), [5]),
    ):
        alone = [at(pos, **op) for pos in covered]
        result = patched([at(slice_, **op)], mode=mode)
        assert [e["pos"] for e in result.edits] == covered
        assert result.kl == pytest.approx(kl(*alone, mode=mode), rel=1e-5)
        assert result.kl is not None
        assert result.kl > 1e-6


def test_a_range_moves_the_logits_by_the_edges_of_the_graph():
    """Maths 15.9 over positions, all MLPs clamped and norms held: numpy, the graph."""
    s, graph = subject(), parts()[2]
    here = (graph.layer_A == LAYER) & (graph.feature_A == FEATURE)
    edge_K = graph.edge_RN[graph.target_rows, : graph.n_features][:, here].sum(1)
    change = s.change([at(slice(0, None), scale=-2.0)])
    both = batched(change, [len(ACTIVE), 0])
    done = s.effects(both, [(0, L - 1)] * 2, How(norms="frozen"), s.ask())
    change_K = np.asarray(done.logit_K[0] - done.logit_K[1])
    np.testing.assert_allclose(change_K, -3 * edge_K, atol=1e-4)
    assert np.abs(edge_K).max() > 1e-2


def test_other_values_are_set_and_added_wherever_they_are_said_to():
    """A feature can be turned on at a position where it is silent, one or many."""
    for op in ({"set": 3.0}, {"add": 3.0}):
        want = kl(*(at(pos, **op) for pos in (1, 2, 3)))
        assert kl(at(slice(1, 4), **op)) == pytest.approx(want, rel=1e-5)
        assert kl(at(slice(3, 4), **op)) > 1e-6


def test_only_an_edit_without_any_effect_is_refused():
    off = silent_feature()
    for edit, why in (
        (at(1), "feature 39 of layer 1 is not active at position 1"),
        (at(slice(1, 2), scale=2.0), "not active at position 1, so scaling does"),
        (at(slice(1, 4, 2)), "not active at positions 1 to 3"),
        (at(slice(0, None), off), "not active at positions 0 to 5"),
        (at(slice(0, None), off, set=0.0), "there is nothing to ablate"),
        (at(slice(T, None)), "are empty"),
        (
            Edit(supernode=Supernode("g", ((1, 1, FEATURE), (1, 3, FEATURE))), scale=0),
            "no feature of supernode 'g' is active",
        ),
    ):
        with pytest.raises(jaxclt.InputError, match=why):
            patched([edit])
    # One that does nothing is not hidden by another that does something.
    with pytest.raises(jaxclt.InputError, match="not active at position 3"):
        patched([at(0), at(3)])
    with pytest.raises(jaxclt.InputError, match="edited twice"):
        patched([at(slice(0, 3)), at(2)])


def test_a_supernode_acts_where_its_members_are_active():
    group = Supernode("g", ((1, 0, FEATURE), (1, 1, FEATURE), (1, -1, FEATURE)))
    result = patched([Edit(supernode=group, scale=-1.0)])
    assert result.kl == pytest.approx(kl(at(0, scale=-1.0), at(-1, scale=-1.0)))
    assert [(e["pos"], e["before"] != 0) for e in result.edits] == [
        (0, True),
        (1, False),
        (5, True),
    ]


@pytest.mark.parametrize("mode", MODES)
def test_what_is_still_to_come_is_not_refused(mode: Mode):
    """A feature that is silent on the prompt may fire on generated tokens."""
    s, off = subject(), silent_feature()
    for edit in (at(slice(0, None), off), at(slice(T, None))):
        result = patched([edit], mode=mode, n_later=3)
        assert result.edits == []
        assert result.kl == pytest.approx(0, abs=1e-6)
        patch = plan_patch(s, [edit], How(mode=mode), n_later=3)
        out = intervene.generate(patch)
        assert out["tokens_before"] == greedy(s.model, s.graph.token_T.tolist(), 3)
        curve = intervene.scale_curve(patch)
        assert max(curve["kl"]) < 1e-6
        sweep = intervene.sweep_end(patch)
        assert max(sweep["kl"]) < 1e-6


def test_an_open_range_scales_new_tokens_where_the_feature_fires():
    """Against the model run on the whole text, edited by hand token by token."""
    model, clt, _ = parts()
    s, n, how = subject(), 4, How(mode="additive", patterns="live")
    # Any feature that fires on what is generated, strongly changed.
    for feature in range(40):
        one = at(slice(0, None), feature, scale=-60.0)
        out = generated(s, [one], n, how)
        text = s.graph.token_T.tolist() + out["tokens_after"]
        whole = type(s).of(model, clt, text)
        change = whole.change([one])
        pos_E = change.features.pos_E
        if ((pos_E >= T) & (pos_E < T + n - 1)).any():
            break
    else:
        pytest.fail("no feature fires on generated tokens")
    done = whole.run(change, (0, L - 1), how)
    logit_TV = np.asarray(unembed(model.params, done.out_TD))
    assert logit_TV[T - 1 : -1].argmax(-1).tolist() == out["tokens_after"]
    # The new tokens' part matters.
    done = whole.run(change.where(pos_E < T), (0, L - 1), how)
    other_TV = np.asarray(unembed(model.params, done.out_TD))
    assert np.abs(other_TV[T:] - logit_TV[T:]).max() > 1e-2
