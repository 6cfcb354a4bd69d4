"""Tokens taken out, groups ablated, and the sentences that say so."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import case

import jaxclt
from jaxclt.lm.run import readout, record, token_vectors
from jaxclt.patching.patch import measure
from jaxclt.patching.plan import plan_patch
from jaxclt.patching.subject import Subject
from jaxclt.story import sentences as words
from jaxclt.story.groups import Group
from jaxclt.story.tell import Story
from jaxclt.story.tokens import TokenEffect, without_tokens

GOLDEN = Path(__file__).parents[1] / "goldens" / "circuit_tracer_clt"
PROMPT = str(np.load(GOLDEN / "graph.npz")["prompt"])


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_without_a_token(name: str) -> None:
    """Maths 23.3; learned positions stay, a scale of embeddings is the mean's too."""
    with jax.enable_x64(True):
        t = case(name)
        pair = 3, 8
        lead_T, prob_T = without_tokens(
            t.params, t.recording.embed_TD, t.token_T, pair, cfg=t.cfg
        )
        V, T = t.params.embed_VD.shape[0], len(t.token_T)
        mean_1D = t.params.embed_VD.mean(0, keepdims=True)
        more = dataclasses.replace(
            t.params,
            embed_VD=jnp.concatenate([t.params.embed_VD, mean_1D]),
            unembed_DV=t.params.embed_VD.T
            if t.params.unembed_DV is None
            else t.params.unembed_DV,
        )
        run = jax.jit(lambda token_T: record(more, token_T, cfg=t.cfg).out_TD[-1])
        for at in range(T + 1):
            gone_T = t.token_T if at == T else t.token_T.at[at].set(V)
            logit_V = np.asarray(readout(more, run(gone_T)))
            want = logit_V[pair[0]] - logit_V[pair[1]]
            assert lead_T[at] == pytest.approx(want, rel=1e-9, abs=1e-11)
            if t.params.logit_cap is None:
                prob_V = np.exp(logit_V - logit_V.max())
                want = prob_V[pair[0]] / prob_V.sum()
                assert prob_T[at] == pytest.approx(want, rel=1e-9)
        assert np.ptp(lead_T) > 1e-3
        assert len(token_vectors(t.params, t.token_T)) == T


@pytest.fixture(scope="module")
def told() -> tuple[Story, Any]:
    model = jaxclt.load_model(GOLDEN / "model")
    dictionary = jaxclt.load_dictionary(GOLDEN / "dictionary", model)
    graph = jaxclt.attribute(model, dictionary, PROMPT, attention=0)
    subject = Subject.of(model, dictionary, graph)
    return jaxclt.story(model, dictionary, graph), subject


def test_groups_are_ablated(told: tuple[Story, Subject]) -> None:
    """Each measured effect is that of the patch of its supernode."""
    found, subject = told
    assert 1 < len(found.groups) <= 7
    for group, supernode in list(zip(found.groups, found.supernodes, strict=True))[:2]:
        edit = jaxclt.Edit(supernode=supernode, scale=0.0)
        done = measure(plan_patch(subject, [edit]))
        assert done.logit_difference is not None
        was, now = (done.logit_difference[when] for when in ("before", "after"))
        assert now is not None
        assert was is not None
        assert group.measured == pytest.approx(now - was, abs=1e-4)
    nodes = [node for group in found.groups for node in group.nodes]
    assert len(nodes) == len(set(nodes))
    assert sum(group.share for group in found.groups) <= 1


def test_it_is_told_with_its_numbers(told: tuple[Story, Subject]) -> None:
    found, _ = told
    said = found.to_json()
    assert [x["position"] for x in said["tokens"]] == list(range(found.graph.n_tokens))
    assert sum(x["share"] for x in said["tokens"]) == pytest.approx(1, abs=1e-5)
    strongest = max(found.tokens, key=lambda x: abs(x.effect))
    assert f"{strongest.effect:+.1f}"[:4] in str(found)
    assert said["story"]["trust"] in str(found)
    effects = jaxclt.token_effects(
        jaxclt.load_model(GOLDEN / "model"),
        jaxclt.load_dictionary("neurons:3", jaxclt.load_model(GOLDEN / "model")),
        PROMPT,
    )
    assert [x.effect for x in effects] == pytest.approx(
        [x.effect for x in found.tokens], abs=1e-4
    )


def token(position: int, effect: float, share: float = 0.1) -> TokenEffect:
    return TokenEffect(
        position=position, token=f"t{position}", effect=effect, probability=0.5,
        share=share,
    )  # fmt: skip


def group(measured: float | None, predicted: float | None = None) -> Group:
    return Group(
        name="g", nodes=(0, 1), share=0.5, measured=measured, predicted=predicted
    )


def of(**parts: Any) -> Story:
    bare = Story(
        text=(), trust="", contrast="", lead=10.0, tokens=(), groups=(),
        sink={"positions": [], "rule": "", "share": 0.0}, graph=None,  # pyright: ignore
    )  # fmt: skip
    return dataclasses.replace(bare, **parts)


SINK = {"positions": [0], "rule": "", "share": 0.5}
ALIKE = tuple(token(i, -float(i), 0.1 * i) for i in range(5))
UNLIKE = tuple(token(i, -float(i), 0.5 - 0.1 * i) for i in range(5))


LOUD, QUIET = (token(1, -6.5),), (token(1, 0.1),)
MOVES, STILL = (group(-2.1, -2.4),), (group(0.1),)
RULES = [
    (words._tokens, {"tokens": LOUD}, {"tokens": QUIET}, '"t1" -6.5'),
    (words._groups, {"groups": MOVES}, {"groups": STILL}, "-2.1, predicted -2.4"),
    (words._silent, {"groups": STILL}, {"groups": MOVES}, "at most 0.10"),
    (words._sink, {"sink": SINK}, {"sink": SINK | {"share": 0.1}}, "50% of the influ"),
    (words._disagree, {"tokens": UNLIKE}, {"tokens": ALIKE}, "Spearman -1.00"),
]


@pytest.mark.parametrize(("rule", "where", "where_not", "said"), RULES)
def test_each_sentence_has_its_rule(
    rule: Any, where: dict[str, Any], where_not: dict[str, Any], said: str
) -> None:
    assert said in rule(of(**where), {})
    assert rule(of(**where_not), {}) == ""


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ((), "nothing here is tested"),
        ((group(-2.0, -1.5), group(1.0, -1.0)), "1 of 2 ablated groups"),
        ((group(None, 1.0),), "nothing here is tested"),
    ],
)
def test_trust(groups: tuple[Group, ...], said: str) -> None:
    assert said in words.trust(of(groups=groups), {})
