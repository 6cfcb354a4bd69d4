"""Targets as text: every form, how it says no, and the files that come of it."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxclt
from jaxclt.cli import main as cli
from jaxclt.clt.coder import Dictionary
from jaxclt.errors import InputError
from jaxclt.graph.graph import VIRTUAL_TOKEN
from jaxclt.graph.targets import (
    combine_targets,
    difference_targets,
    feature_targets,
    functional_targets,
    probability_targets,
    salient_targets,
    token_targets,
)
from jaxclt.io.graph_file import load_graph
from jaxclt.io.model import Model
from jaxclt.trace.record import prompt_tokens, record_prompt
from jaxclt.trace.target_text import read_targets
from jaxclt.types import LMParams, Recording, Targets
from jaxclt.viewer.graph_json import validate

GOLDEN = Path(__file__).parent / "goldens" / "circuit_tracer_clt"
PROMPT = str(np.load(GOLDEN / "graph.npz")["prompt"])
MIX = ("w7", "-2*diff:w12|w31@2", "feature:1:3:5", "resid", "top:0")


@functools.cache
def model() -> Model:
    return jaxclt.load_model(GOLDEN / "model")


@functools.cache
def dictionary() -> Dictionary:
    return jaxclt.load_dictionary(GOLDEN / "dictionary", model())


@functools.cache
def recording() -> tuple[Recording, int]:
    """Padded, as `trace_prompt` has it."""
    ids = prompt_tokens(model(), PROMPT)
    token_T = jnp.asarray([*ids, 0], jnp.int32)
    return record_prompt(model().params, token_T, model().cfg), len(ids)


def read(*texts: str) -> Targets:
    found, n = recording()
    return read_targets(texts, model(), dictionary(), found, n_tokens=n)


def token(text: str) -> jax.Array:
    return jnp.asarray(model().tokenizer.encode(text, "never"), jnp.int32)


def same(got: Targets, want: Targets) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_plain_tokens_weigh_their_probability() -> None:
    found, n = recording()
    ids = jnp.concatenate([token("w7"), token("w12")])
    want = token_targets(model().params, found.out_TD[n - 1], ids, pos=n - 1)
    same(read("w7", "w12"), want)


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    vec_D = np.arange(model().cfg.d_model, dtype=np.float32)
    np.savez(tmp_path / "a:b@1.npz", vec=vec_D, const=np.float32(3))
    return tmp_path / "a:b@1.npz"


def test_every_form_is_what_its_builder_makes(probe: Path) -> None:
    (found, n), p = recording(), model().params
    args, a, b = (p, found), token("w12"), token("w31")
    vec_D = np.arange(model().cfg.d_model)
    pairs = {
        "w7@1": token_targets(p, found.out_TD[1], token("w7"), pos=1),
        "w7@-2": token_targets(p, found.out_TD[n - 2], token("w7"), pos=n - 2),
        "diff:w12|w31": difference_targets(p, a, b, pos=n - 1),
        "diff:w12|w31@2": difference_targets(p, a, b, pos=2),
        "prob:w12@0": probability_targets(p, found.out_TD[0], a, pos=0),
        "logp:w12": probability_targets(p, found.out_TD[n - 1], a, log=True, pos=n - 1),
        "top:3": salient_targets(p, found.out_TD[3], pos=3),
        "feature:1:-1:5": feature_targets(
            dictionary(), *args, [1, n - 1, 5], cfg=model().cfg
        ),
        f"vector:out:{probe}": functional_targets(
            *args, "out", n - 1, vec_D, cfg=model().cfg, const_K=3.0
        ),
        f"vector:resid_post:1@2:{probe}": functional_targets(
            *args, "resid_post:1", 2, vec_D, cfg=model().cfg, const_K=3.0
        ),
    }
    for text, want in pairs.items():
        same(read(text), combine_targets([want]))
    want = combine_targets(list(pairs.values()), [0.5, -1, *[1.0] * 8])
    texts = list(pairs)
    same(read(f"0.5*{texts[0]}", f"-1*{texts[1]}", *texts[2:]), want)
    assert read("diff:w12|w31", "prob:w12").labels == ("w12 − w31", "p(w12)")


def test_a_text_that_is_one_token_is_that_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever it looks like; and a bar or an @ may be part of a token."""
    words = {"top:1": 5, "diff:a|b": 6, "2*x": 7, "|": 8, "||": 9, "x@1": 10}
    tokenizer = dataclasses.replace(model().tokenizer, backend=Words(words))
    (found, n), odd = recording(), dataclasses.replace(model(), tokenizer=tokenizer)
    for text, i in words.items():
        got = read_targets([text], odd, dictionary(), found, n_tokens=n)
        assert (got.token_K.tolist(), got.pos_K.tolist()) == ([i], [n - 1])
    got = read_targets(["x@1@2"], odd, dictionary(), found, n_tokens=n)
    assert (got.token_K.tolist(), got.pos_K.tolist()) == ([10], [2])
    # "|" minus "||", not "||" minus "|": the first cut that leaves two tokens.
    got = read_targets(["diff:||||"], odd, dictionary(), found, n_tokens=n)
    assert got.labels == ("<8> − <9>",)


def test_a_foil_stands_second_and_can_be_subtracted() -> None:
    found, n = recording()
    p, out_D = model().params, found.out_TD[n - 1]
    logit_V = np.asarray(
        out_D @ (p.embed_VD.T if p.unembed_DV is None else p.unembed_DV)
    )
    top, runner_up = np.argsort(-logit_V, kind="stable")[:2].tolist()
    foil = int(token("w7")[0])
    assert foil not in (top, runner_up)
    usual = salient_targets(p, out_D, pos=n - 1).token_K.tolist()
    want = [top, foil, *(x for x in usual[1:] if x != foil)]
    same(read("foil:w7"), token_targets(p, out_D, jnp.asarray(want), pos=n - 1))
    assert read("w12", "w31", "foil:w7").token_K.tolist() == [
        *token("w12"), foil, *token("w31"),
    ]  # fmt: skip
    pairs = {
        ("diff:",): (top, runner_up),
        ("diff:", "foil:w7"): (top, foil),
        ("diff:", "w12", "foil:w7"): (int(token("w12")[0]), foil),
    }
    for texts, (a, b) in pairs.items():
        at = (jnp.asarray([x]) for x in (a, b))
        want = difference_targets(p, *at, pos=n - 1)
        np.testing.assert_array_equal(read(*texts).vec_KD, want.vec_KD)
    for texts, said in {
        ("w7", "foil:w7"): "is the answer itself",
        ("foil:w7", "foil:w12"): "one foil:, and no others",
        ("foil:w7", "prob:w12"): "a contrast is of tokens",
        ("foil:no such token",): "is not one token of this model",
    }.items():
        with pytest.raises(InputError, match=said):
            read(*texts)


@functools.cache
def sums() -> tuple[Model, Recording]:
    """The bundled model, whose sums are tokens that its tokenizer cuts into digits."""
    found = jaxclt.load_model("addition")
    ids = prompt_tokens(found, "36+59=")
    return found, record_prompt(found.params, jnp.asarray(ids), found.cfg)


@pytest.mark.parametrize(
    ("texts", "labels", "tokens"),
    [
        (["95"], ("",), [95]),
        ([" 95", "id:94"], ("", ""), [95, 94]),
        (["diff: 95|94"], ("95 − 94",), [-1]),
        (["diff:id:95| id:94@2"], ("95 − 94",), [-1]),
        (["logp: 95", "prob:id:95"], ("log p(95)", "p(95)"), [-1, -1]),
        (["2*95", "id:94@-1"], ("", ""), [95, 94]),
        (["+"], ("",), [200]),
    ],
)
def test_the_vocabulary_comes_before_the_tokenizer(
    texts: list[str], labels: tuple[str, ...], tokens: list[int]
) -> None:
    found, recording = sums()
    assert found.tokenizer.encode("95", "never") == [9, 5]
    got = read_targets(texts, found, dictionary(), recording, n_tokens=6)
    assert got.token_K.tolist() == tokens
    assert got.labels == labels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id:203", "the model's tokens are id:0 to id:202"),
        ("diff:95|id:999", "the model's tokens are id:0 to id:202"),
        ("999", "it is 3 tokens, not one"),
        ("id:x", "tokens, not one"),
        (" ", "it is not a token of this model"),
    ],
)
def test_what_is_not_in_the_vocabulary_is_refused(text: str, message: str) -> None:
    found, recording = sums()
    with pytest.raises(InputError, match=message):
        read_targets([text], found, dictionary(), recording, n_tokens=6)


class Words:
    """A tokenizer of given words; any other text is two tokens."""

    def __init__(self, words: dict[str, int]) -> None:
        self.words = words

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        del add_special_tokens
        return [self.words[text]] if text in self.words else [1, 2]

    def decode(self, ids: list[int], **options: bool) -> str:
        del options
        return "".join(f"<{i}>" for i in ids)

    def convert_ids_to_tokens(self, i: int) -> str:
        return f"<{i}>"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["w7 w7"], "'w7 w7': it is 2 tokens, not one"),
        (["w7 w7@1"], "'w7 w7' is 2 tokens, not one"),
        ([""], "it is 0 tokens, not one"),
        (["nothing"], "it is not a token of this model"),
        (["w7", "w7"], "given twice"),
        (["w7", "w7@-1"], "given twice"),
        (["w90", "top:5"], "given twice"),
        (["w7@99"], "give a position from 0 to 5, or -1"),
        (["w7@-7"], "give a position from 0 to 5, or -1"),
        (["top:x"], "write top:position"),
        (["top:-1"], "write top:position, a whole number from 0 to 5"),
        (["feature:99999999999999999999:0:0"], "write feature:layer:position:index"),
        (["feature:0:0:99999999999999999999"], "write feature:layer:position:index"),
        (["dif:w7|w8"], 'did you mean "diff"?'),
        (["vector:resid_mi:1:{probe}"], 'did you mean "resid_mid"?'),
        (["diff:w7"], "write diff:A|B"),
        (["diff:w7|w7"], "so their difference is zero"),
        (["diff:w7|w8 w9"], "write diff:A|B"),
        (["logp:w7 w8"], "'w7 w8' is 2 tokens, not one"),
        (["feature:1:2"], "write feature:layer:position:index"),
        (["feature:9:0:0"], "no layer 9: give one from 0 to"),
        (["feature:0:6:0"], "give a position from 0 to 5"),
        (["feature:0:0:9999"], "no feature 9999: give one from 0 to"),
        (["vector:resid_mid:1"], "write vector:site@position:file.npz"),
        (["vector:out:no.npz"], "no.npz is not an npz file"),
        (["vector:nowhere:1:{probe}"], "unknown: write out, or one of"),
        (["vector:out@9:{probe}"], "give a position from 0 to 5"),
        (["0*w7"], "other than 0"),
    ],
)
def test_a_text_that_does_not_fit_is_refused(
    texts: list[str], message: str, probe: Path
) -> None:
    with pytest.raises(InputError) as refused:
        read(*(text.format(probe=probe) for text in texts))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_files_that_hold_no_vector_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "plain.npy", np.ones(3))
    np.savez(tmp_path / "other.npz", direction=np.ones(3))
    np.savez(tmp_path / "whole.npz", vec=np.arange(3))
    (tmp_path / "text.npz").write_text("no")
    for name in ("plain.npy", "other.npz", "text.npz"):
        with pytest.raises(InputError, match="not an npz file with an array `vec`"):
            read(f"vector:out:{tmp_path / name}")
    with pytest.raises(InputError, match="no floating-point"):
        read(f"vector:out:{tmp_path / 'whole.npz'}")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A traced mixture, by the command line."""
    folder = tmp_path_factory.mktemp("mixed")
    np.savez(folder / "v.npz", vec=np.ones(model().cfg.d_model, np.float32))
    vector = f"vector:resid_post:1@2:{folder / 'v.npz'}"
    texts = [vector if text == "resid" else text for text in MIX]
    files = ["--model", GOLDEN / "model", "--dictionary", GOLDEN / "dictionary"]
    args = ["trace", PROMPT, *files, "--out", folder / "out", "--targets", *texts]
    cli.main([str(arg) for arg in args])
    return folder / "out"


def test_a_mixture_through_all_files(mixed: Path) -> None:
    report = json.loads((mixed / "report.json").read_text())
    graph = load_graph(mixed / "graph.npz")
    listed = report["targets"]
    K = graph.n_targets
    assert len(listed) == K == 4 + 10
    assert report["certificate"]["max_relative_row_error"] < 1e-5
    assert [x["label"] for x in listed[:4]] == [
        "w7", "−(w12 − w31)", "L1 feature 5", "resid_post:1",
    ]  # fmt: skip
    assert [x["layer"] for x in listed[:4]] == [None, None, 1, 1]
    assert [x["pos"] for x in listed] == [5, 2, 3, 2] + [0] * 10
    weight_K = [x["weight"] for x in listed]
    np.testing.assert_allclose(weight_K[:4], np.array([1, 2, 1, 1]) / 6, atol=1e-6)
    assert sum(weight_K) == pytest.approx(1, abs=1e-5)
    assert [text for text, _ in report["top_tokens"]] != [x["label"] for x in listed]
    assert report["identity"]["targets"][0] == "w7"
    # The same targets, the same functions, through Python.
    found, n = recording()
    chosen = read_targets(
        report["identity"]["targets"], model(), dictionary(), found, n_tokens=n
    )
    np.testing.assert_array_equal(graph.target_token_K, chosen.token_K)
    np.testing.assert_array_equal(graph.target_pos_K, chosen.pos_K)
    np.testing.assert_array_equal(graph.target_layer_K, chosen.layer_K)
    readout_K = [x["readout"] for x in listed]
    np.testing.assert_allclose(readout_K, graph.readout_R[graph.target_rows])
    assert readout_K[2] == pytest.approx(preactivation(1, 3, 5), rel=1e-4)


def preactivation(layer: int, pos: int, feature: int) -> float:
    """By the dictionary's weights alone; this one reads the stream after attention."""
    store = dictionary().store  # pyright: ignore[reportAttributeAccessIssue]
    assert store.cfg.read == "resid_mid"
    enc = store.encoder(layer)
    mid_D = np.asarray(recording()[0].mid_LTD)[layer, pos]
    return float(enc.W_enc_FD[feature] @ mid_D + enc.b_enc_F[feature])


def test_other_viewers_see_outputs_with_weights(mixed: Path) -> None:
    """Nodes of the known kind, at their positions, that score as the graph does."""
    doc = json.loads((mixed / "graph.json").read_text())
    validate(doc)
    graph = load_graph(mixed / "graph.npz")
    nodes = [node for node in doc["nodes"] if node["feature_type"] == "logit"]
    assert [n["ctx_idx"] for n in nodes] == graph.target_pos_K.tolist()
    assert {n["layer"] for n in nodes} == {str(graph.n_layers + 1)}
    np.testing.assert_allclose([n["token_prob"] for n in nodes], graph.target_prob_K)
    assert [n["feature"] for n in nodes[1:4]] == [VIRTUAL_TOKEN + k for k in (1, 2, 3)]
    assert nodes[2]["clerp"] == 'Output "L1 feature 5" (p=0.167)'
    assert [n["target"]["layer"] for n in nodes[:4]] == [None, None, 1, 1]
    assert [n["target"]["token"] for n in nodes[:5]] == [True, *[False] * 3, True]
    assert nodes[2]["target"]["readout"] == pytest.approx(
        graph.readout_R[graph.n_features + 2], rel=1e-5
    )
    assert {link["target"] for link in doc["links"]} >= {n["node_id"] for n in nodes}


def test_plain_logits_are_written_as_before(tmp_path: Path) -> None:
    """No extra key; older files, which do not say where targets read, still load."""
    traced = jaxclt.trace_prompt(model(), dictionary(), PROMPT)
    report = jaxclt.write_trace(traced, tmp_path)
    assert "targets" not in report
    assert "targets" not in report["identity"]
    doc = json.loads((tmp_path / "graph.json").read_text())
    assert not any("target" in node for node in doc["nodes"])
    with np.load(tmp_path / "graph.npz") as file:
        old = {k: v for k, v in file.items() if k not in NEW_ARRAYS}
        assert set(file.files) > NEW_ARRAYS
    np.savez(tmp_path / "old.npz", **old)
    graph = load_graph(tmp_path / "old.npz")
    for name in NEW_ARRAYS:
        np.testing.assert_array_equal(
            getattr(graph, name), getattr(traced.graph, name), strict=True
        )


NEW_ARRAYS = {"target_layer_K", "target_pos_K"}


def test_python_takes_a_text_targets_or_a_function() -> None:
    """The same graph each time; a function gets the recording without padding."""

    def made(params: LMParams, found: Recording) -> Targets:
        assert len(found.token_T) == recording()[1]
        difference = difference_targets(params, token("w12"), token("w31"))
        return combine_targets([difference], [3])

    graphs = [
        jaxclt.attribute(model(), dictionary(), PROMPT, targets=targets)
        for targets in ("diff:w12|w31", ["diff:w12|w31"], read("diff:w12|w31"), made)
    ]
    for graph in graphs:
        assert graph.meta.weights == "chosen"
        np.testing.assert_allclose(graph.edge_RN, graphs[0].edge_RN, atol=1e-5)
        np.testing.assert_allclose(graph.influence_N, graphs[0].influence_N, atol=1e-5)
    assert graphs[0].meta.target_tokens == ("w12 − w31",)
    with pytest.raises(InputError, match="did not return Targets"):
        jaxclt.attribute(model(), dictionary(), PROMPT, targets=lambda p, r: 3)  # pyright: ignore


def test_tokens_with_chosen_weights_say_so() -> None:
    """A weight is not shown as a probability, though the tokens are next tokens."""
    graph = jaxclt.attribute(model(), dictionary(), PROMPT, targets=["2*w7", "w12"])
    np.testing.assert_allclose(graph.target_prob_K, [2 / 3, 1 / 3], rtol=1e-6)
    assert graph.is_next_token.all()
    assert graph.meta.weights == "chosen"
    plain = jaxclt.attribute(model(), dictionary(), PROMPT, targets=["w7", "w12"])
    assert plain.meta.weights == "probability"
    np.testing.assert_array_equal(
        plain.edge_RN[plain.target_rows], graph.edge_RN[graph.target_rows]
    )
