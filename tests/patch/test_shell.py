"""Edits as users give them, batches, generation, and the calls of the front door."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxclt
from jaxclt.graph.graph import Graph
from jaxclt.io.model import Model
from jaxclt.lm.run import forward
from jaxclt.patching import patch as intervene
from jaxclt.patching.batch import default_range
from jaxclt.patching.change import Change, batched
from jaxclt.patching.edits import Edit, expand_edits
from jaxclt.patching.how import How, Mode
from jaxclt.patching.patch import PatchResult, measure
from jaxclt.patching.plan import plan_patch
from jaxclt.patching.subject import Subject
from jaxclt.types import Supernode
from jaxclt.validation.choice import named_groups

GOLDEN = Path(__file__).parents[1] / "goldens" / "circuit_tracer_clt"
MODEL, DICTIONARY = GOLDEN / "model", GOLDEN / "dictionary"
PROMPT = str(np.load(GOLDEN / "graph.npz")["prompt"])
T, L = 7, 4


@functools.cache
def parts(dictionary: str = "clt") -> tuple[Model, Any, Graph]:
    model = jaxclt.load_model(GOLDEN / "model")
    name = GOLDEN / "dictionary" if dictionary == "clt" else dictionary
    clt = jaxclt.load_dictionary(name, model)
    return model, clt, jaxclt.attribute(model, clt, PROMPT)


@functools.cache
def subject(dictionary: str = "clt") -> Subject:
    return Subject.of(*parts(dictionary))


def strongest(n: int = 1, dictionary: str = "clt") -> list[tuple[int, int, int]]:
    graph = parts(dictionary)[2]
    order = np.argsort(-graph.influence_N[: graph.n_features])
    order = order[(graph.layer_A[order] < 2) & (graph.pos_A[order] > 0)]
    place = np.stack([graph.layer_A, graph.pos_A, graph.feature_A], 1)
    return [tuple(map(int, place[a])) for a in order[:n]]  # pyright: ignore


def patched(
    edits: Any,
    s: Subject | None = None,
    *,
    layers: tuple[int, int] | None = None,
    n_later: int = 0,
    **how: Any,
) -> PatchResult:
    """`jaxclt.patch` of a prompt that is recorded already."""
    patch = plan_patch(
        s or subject(), edits, How(**how), layers=layers, n_later=n_later
    )
    return measure(patch)


def edit(node: tuple[int, int, int], **op: float) -> Edit:
    layer, pos, feature = node
    return Edit(layer=layer, pos=pos, feature=feature, **(op or {"scale": 0.0}))


def test_slices_supernodes_and_negative_positions_become_single_changes():
    edits = [
        Edit(layer=1, pos=slice(2, 4), feature=7, scale=2.0),
        Edit(layer=0, pos=-1, feature=3, set=1.5),
        Edit(supernode=Supernode("g", ((2, 1, 4), (3, -2, 5))), add=0.5),
    ]
    assert expand_edits(edits, n_tokens=T) == [
        [(1, 2, 7), (1, 3, 7)],
        [(0, 6, 3)],
        [(2, 1, 4), (3, 5, 5)],
    ]
    assert [e.affine for e in edits] == [(2.0, 0.0), (0.0, 1.5), (1.0, 0.5)]
    change = subject().change(edits[1:])
    assert change.node_E3.tolist() == [[0, 5, 3], [2, 1, 4], [3, 4, 5]]
    assert change.factor_E.tolist() == [0, 1, 1]
    assert change.offset_E.tolist() == [1.5, 0.5, 0.5]
    later = [Edit(layer=1, pos=slice(5, None), feature=7, scale=0.0)]
    (places,) = expand_edits(later, n_tokens=T, n_later=2)
    assert [pos for _, pos, _ in places] == [5, 6, 7, 8]
    (places,) = expand_edits(later, n_tokens=T)
    assert [pos for _, pos, _ in places] == [5, 6]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Edit(layer=1, pos=2, feature=3, scale=math.nan), "finite number"),
        (lambda: Edit(layer=1, pos=2, feature=3), "exactly one of scale"),
        (lambda: Edit(layer=1, pos=2, feature=3, scale=1, add=1), "exactly one of"),
        (lambda: Edit(layer=1, feature=3, scale=1), "needs layer, pos and feature"),
        (lambda: expand_edits([], n_tokens=T), "no edit"),
        (lambda: expand_edits([edit((1, 7, 3))], n_tokens=T), "position 7 is not"),
        (
            lambda: expand_edits(
                [Edit(layer=1, pos=slice(9, 12), feature=3, scale=0)], n_tokens=T
            ),
            "are empty",
        ),
        (lambda: expand_edits([edit((1, 2, 3))] * 2, n_tokens=T), "edited twice"),
        (lambda: subject().gather([(9, 1, 0)]), "layer 9 is unknown"),
        (lambda: subject().gather([(1, 1, 40)]), "feature 40 is unknown"),
        (lambda: How(mode="constraint"), 'choose one of .* did you mean "constrained"'),  # pyright: ignore
        (lambda: subject().layer_range((3, 2), np.array([1]), "iterative"), "empty"),
        (lambda: subject().layer_range((0, 4), np.array([1]), "iterative"), "layers 0"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(make: Any, message: str):
    with pytest.raises(jaxclt.InputError, match=message) as stop:
        make()
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize(
    ("layers", "span", "mode", "found"),
    [
        ([2], 30, "constrained", (2, 4)),
        ([2], 2, "constrained", (2, 3)),
        ([2], 1, "constrained", (2, 2)),
        ([2, 27], 30, "constrained", (2, 28)),  # of 0 to 29: the last one answers
        ([28], 30, "constrained", (28, 28)),
        ([29], 30, "constrained", (29, 29)),
        ([2, 28], 30, "iterative", (2, 29)),
        ([2], 30, "additive", (0, 29)),
    ],
)
def test_the_range_of_a_patch_that_names_none(
    layers: list[int], span: int, mode: Mode, found: tuple[int, int]
) -> None:
    layer_E = np.array(layers)
    assert default_range(layer_E, span=span, n_layers=30, mode=mode) == found


def test_scaling_a_silent_feature_is_refused_and_setting_it_is_not():
    graph = parts()[2]
    active = set(zip(graph.layer_A, graph.pos_A, graph.feature_A, strict=True))
    node = next((1, 3, f) for f in range(40) if (1, 3, f) not in active)
    with pytest.raises(jaxclt.InputError, match="is not active at position 3"):
        jaxclt.patch(*parts(), [edit(node, scale=2.0)])
    assert jaxclt.patch(*parts(), [edit(node, set=2.0)]).kl > 0


@pytest.mark.parametrize(
    ("dictionary", "mode"),
    [
        ("clt", "iterative"),
        ("neurons:5", "constrained"),
        ("neurons:5", "additive"),
        pytest.param("clt", "constrained", marks=pytest.mark.slow),
        pytest.param("clt", "additive", marks=pytest.mark.slow),
        pytest.param("neurons:5", "iterative", marks=pytest.mark.slow),
    ],
)
def test_a_batch_is_its_members_one_by_one(mode: str, dictionary: str):
    """Also when members have different numbers of edits, in any chunk size."""
    s, nodes = subject(dictionary), strongest(4, dictionary)
    how = How(mode=mode)  # pyright: ignore[reportArgumentType]
    sizes, factors = [1, 1, 1, 1, 3], [0.0] * 4 + [-1.0] * 3
    every = Change.of(s.gather(nodes + nodes[:3]), factors)
    many = batched(every, sizes)
    layers = [(min(l for l in one if l >= 0), 3) for one in many.features.layer_E]
    together = s.effects(many, layers, how, s.ask(), chunk=2)
    for i, (end, layer) in enumerate(zip(np.cumsum(sizes), layers, strict=True)):
        one = every.where(slice(end - sizes[i], end))
        alone = s.effects(batched(one, [sizes[i]]), [layer], how, s.ask())
        np.testing.assert_allclose(together.logit_K[i], alone.logit_K[0], atol=2e-5)
        assert abs(together.kl[i] - alone.kl[0]) < 1e-5
    assert (np.asarray(together.kl) > 1e-6).all()


def test_the_result_says_what_changed():
    node = strongest()[0]
    result = jaxclt.patch(*parts(), [edit(node, scale=-1.0)], layers=(node[0], 3))
    graph = parts()[2]
    out = result.to_json()
    assert out["mode"] == "constrained"
    assert out["layers"] == [node[0], 3]
    assert out["kl"] > 0
    assert out["edits"][0]["after"] == -out["edits"][0]["before"]
    assert [t["token"] for t in out["targets"]] == list(graph.meta.target_tokens)
    for t, p in zip(out["targets"], graph.target_prob_K, strict=True):
        assert t["p_before"] == pytest.approx(float(p), abs=1e-5)
    assert out["top_before"][0][0] == graph.meta.target_tokens[0]
    first = out["features"][0]
    assert first["layer"] > node[0]
    assert first["share"] == pytest.approx(first["after"] / first["before"])
    assert result.warning is None
    loud = jaxclt.patch(*parts(), [edit(node)], mode="additive")
    assert loud.warning is not None
    assert "twice" in loud.warning


def test_a_supernode_may_name_its_features():
    """As (layer, pos, feature) or by name; what has no activation is told."""
    node = strongest()[0]
    named = Supernode("g", (":".join(map(str, node)), "embed 1"))
    one, other = (
        Edit(supernode=g, scale=0.0) for g in (Supernode("g", (node,)), named)
    )
    plain, found = (patched([e]) for e in (one, other))
    assert found.kl == plain.kl > 0
    assert plain.warning is None
    assert "'g': only features are patched, embed 1 stay" in (found.warning or "")
    curve = intervene.scale_curve(plan_patch(subject(), [other]), [0.0])
    assert curve["kl"][0] == pytest.approx(plain.kl, rel=1e-4)
    with pytest.raises(jaxclt.InputError, match="no node"):
        jaxclt.patch(*parts(), [Edit(supernode=Supernode("g", ("1:1:9999",)), scale=0)])


def test_validation_says_which_members_it_leaves_out():
    node = strongest()[0]
    groups = [
        Supernode("g", (node, "embed 1", (1, 1, 39))),
        Supernode("e", ("embed 2",)),
    ]
    found, left_out = named_groups(parts()[2], groups)
    assert [name for name, _ in found] == ["g"]
    assert len(found[0][1]) == 1
    assert left_out == {"g": ["embed 1", "1:1:39"], "e": ["embed 2"]}


def test_a_factor_of_one_and_the_curve_pass_through_the_clean_model():
    """Maths 15.7 in float32."""
    node = strongest()[0]
    for mode in ("constrained", "iterative", "additive"):
        result = jaxclt.patch(*parts(), [edit(node, scale=1.0)], mode=mode)  # pyright: ignore
        assert result.kl < 1e-6
    curve = intervene.scale_curve(plan_patch(subject(), [edit(node)]))
    one = curve["scale"].index(1.0)
    assert curve["kl"][one] < 1e-6
    assert max(curve["kl"]) > 1e-3


def test_every_end_layer_is_the_patch_of_that_range():
    node = strongest()[0]
    sweep = intervene.sweep_end(plan_patch(subject(), [edit(node)]))
    assert sweep["last_layers"] == list(range(node[0], L))
    for end, kl, p in zip(
        sweep["last_layers"], sweep["kl"], sweep["probability"], strict=True
    ):
        one = jaxclt.patch(*parts(), [edit(node)], layers=(node[0], end))
        assert one.kl == pytest.approx(kl, abs=1e-6)
        assert one.targets[0]["p_after"] == pytest.approx(p[0], abs=1e-5)


def test_another_model_is_refused():
    model, clt, graph = parts()
    other = dataclasses.replace(model, hash="0" * 64)
    with pytest.raises(jaxclt.InputError, match="not the one that was traced"):
        Subject.of(other, clt, graph)


def greedy(model: Model, tokens: list[int], n: int) -> list[int]:
    """Generation without any of our patching code; what comes later is not seen."""
    run = jax.jit(forward, static_argnames="cfg")
    known = tokens + [0] * n
    for t in range(len(tokens), len(known)):
        logit_TV = run(model.params, np.array(known, np.int32), cfg=model.cfg)
        known[t] = int(np.argmax(np.asarray(logit_TV)[t - 1]))
    return known[len(tokens) :]


def generated(
    s: Subject, edits: Any, n_new: int, how: How | None = None, **sampled: Any
) -> dict[str, Any]:
    return intervene.generate(plan_patch(s, edits, how, n_later=n_new), **sampled)


def test_generation_without_an_effect_is_the_models_own():
    """And ablating a feature for good is the live additive patch of every position."""
    s, node = subject(), strongest()[0]
    out = generated(s, [edit(node, scale=1.0)], 3)
    want = greedy(s.model, s.graph.token_T.tolist(), 3)
    assert out["tokens_before"] == want
    assert out["tokens_after"] == want


@pytest.mark.parametrize("mode", ["constrained", "iterative", "additive"])
def test_generation_starts_with_the_patched_prediction(mode: str):
    s, node = subject(), strongest()[0]
    edits = [edit(node, scale=-4.0)]
    out = generated(s, edits, 3, How(mode=mode))  # pyright: ignore
    result = jaxclt.patch(*parts(), edits, mode=mode)  # pyright: ignore
    token = s.model.tokenizer.token_strings(out["tokens_after"][:1])[0]
    assert token == result.top_after[0][0]


def test_open_slices_act_on_generated_tokens_too():
    """Setting a huge activation on new tokens only changes what follows them."""
    s, (layer, _, feature) = subject(), strongest()[0]
    edits = [Edit(layer=layer, pos=slice(T, None), feature=feature, set=300.0)]
    out = generated(s, edits, 4)
    assert out["tokens_before"][0] == out["tokens_after"][0]
    assert out["tokens_before"][1:] != out["tokens_after"][1:]


def test_positions_from_the_end_are_the_prompts_also_when_text_follows():
    """Maths 15.18: a position means one token, counted from either side."""
    s, (layer, pos, feature) = subject(), strongest()[0]
    change: dict[str, Any] = {"layer": layer, "feature": feature, "scale": -4.0}
    found = [
        generated(s, [Edit(pos=p, **change)], 4)
        for p in (pos, pos - s.n_tokens, slice(pos, pos + 1))
    ]
    assert found[0] == found[1] == found[2]
    assert found[0]["tokens_after"] != found[0]["tokens_before"]


def test_sampling_follows_the_seed():
    s, edits = subject(), [edit(strongest()[0])]

    def sample(seed: int, temperature: float) -> list[int]:
        found = generated(s, edits, 3, temperature=temperature, seed=seed)
        return found["tokens_after"]

    assert sample(1, 5.0) == sample(1, 5.0)
    assert len({tuple(sample(seed, 5.0)) for seed in range(4)}) > 1
    with pytest.raises(jaxclt.InputError, match="temperature"):
        sample(1, float("nan"))
    with pytest.raises(jaxclt.InputError, match="cannot generate"):
        generated(s, edits, 100)


def test_patches_are_compiled_once_for_a_shape():
    from jaxclt.patching.batch import patch_chunk

    s, nodes = subject(), strongest(3)

    def go(node: tuple[int, int, int], scale: float, layers: tuple[int, int]) -> None:
        change = batched(Change.of(s.gather([node]), scale), [1])
        s.effects(change, [layers], How(), s.ask())

    go(nodes[0], 0.0, (0, 3))
    before = patch_chunk._cache_size()  # pyright: ignore
    for node in nodes:
        go(node, 2.0, (0, 2))
    assert patch_chunk._cache_size() == before  # pyright: ignore
    assert jax.devices()
