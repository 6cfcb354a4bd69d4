"""The first picture and what stands above it: few features, all tokens, no overlaps."""

from __future__ import annotations

import copy
import json
import re
from graphlib import TopologicalSorter

import numpy as np
import pytest
from test_graph_json import HOSTILE, make_graph, noise
from test_layout import MEASURE, TARGETS, WORDS
from test_page import FEATURE, REPORT, ids_of, violations

from jaxclt.viewer.graph_json import graph_json
from jaxclt.viewer.page import page

ERROR = "mlp reconstruction error"
FIRST = 80
SIZES = {"laptop": (1280, 720), "desk": (1440, 900)}


def told(doc: dict, word: str = " capital") -> dict:
    """The document with what a trace says of it: labels, story, effects, a sink."""
    doc = copy.deepcopy(doc)
    tokens = doc["metadata"]["prompt_tokens"]
    for i, node in enumerate(doc["nodes"]):
        if node["feature_type"] != FEATURE:
            continue
        pairs = [[f"{word}{k}", 9.0 - k] for k in range(1 + i % 5)]
        node["clerp"] = f"{word.strip()}{i}, cities, towns"[: 8 + i % 24]
        node["label_source"] = "automatic"
        node["writes"] = {"raises": pairs, "lowers": pairs, "share": 0.12}
        at = node["ctx_idx"]
        node["reads"] = [[at, tokens[at], 0.75]]
    outside = [n for n in ids_of(doc, FEATURE) if not n.endswith("_0")]
    groups = [
        {
            "name": f"{word.strip()} and towns {g}",
            "members": outside[3 * g : 3 * g + 3],
            "predicted": 2.4,
            "measured": -0.5,
            "share": 0.1,
        }
        for g in range(4)
    ]
    effects = (6.5 * (noise(len(tokens), seed=7.0) - 0.8)).round(2).tolist()
    doc["jaxclt"] |= {
        "tokens": [
            {"position": t, "token": token, "effect": effect, "share": 1 / len(tokens)}
            for t, (token, effect) in enumerate(zip(tokens, effects, strict=True))
        ],
        "story": {
            "text": [
                f"“{tokens[-1]}” and “{tokens[1]}” matter most: without them the lead "
                "of “ Paris” over “ Rome” falls by 6.5 and 3.9 of 9.1.",
                *(f"{g['name']} (3 features) raise it by 2.1." for g in groups),
                "Errors hold 43% of the influence.",
            ],
            "trust": "Small patches do what the graph says (Spearman 0.98, n = 50).",
            "groups": groups,
        },
        "sink": {"positions": [0], "rule": "most heads attend to it", "share": 0.41},
    }
    doc["qParams"]["supernodes"] = [[g["name"], *g["members"]] for g in groups]
    doc["qParams"]["pinnedIds"] = ids_of(doc, "logit")[:1]
    return doc


def prompt(n: int, **parts) -> dict:
    tokens = tuple(f" {WORDS[i % len(WORDS)]}" for i in range(n))
    shape = {"n_layers": 30, "n_features": 500, "targets": TARGETS, "n_links": 4000}
    return graph_json(make_graph(tokens=tokens, **shape | parts), slug="x")


@pytest.fixture(scope="module")
def doc() -> dict:
    return told(prompt(9))


def shown(tab, kind: str) -> list[str]:
    return tab.evaluate(
        "kind => __jaxclt.nodes.filter(n => n.kind === kind && __jaxclt.app.shows(n))"
        ".map(n => n.id)",
        kind,
    )


def test_the_first_picture_has_few_features_and_the_slider_reaches_all(open_page, doc):
    tab = open_page(page(doc, REPORT), size=SIZES["desk"])
    nodes = {n["node_id"]: n for n in doc["nodes"]}
    features = [n for n in ids_of(doc, FEATURE)]
    outside = [n for n in features if nodes[n]["ctx_idx"] != 0]
    outside.sort(key=lambda n: nodes[n]["influence"])
    pinned = {n for g in doc["qParams"]["supernodes"] for n in g[1:]}
    assert set(shown(tab, "feature")) == {*outside[:FIRST], *pinned}
    assert shown(tab, "error") == []
    n = len(shown(tab, "feature"))
    assert tab.text_content("#count") == f"{n} of {len(features)} features"
    tab.evaluate("(s => { s.value = s.max; s.dispatchEvent(new Event('input')); })"
                 "(document.getElementById('slider'))")  # fmt: skip
    assert set(shown(tab, "feature")) == set(outside)
    tab.evaluate("__jaxclt.app.unfold(0)")
    assert set(shown(tab, "feature")) == set(features)
    assert tab.text_content("#count") == f"{len(features)} of {len(features)} features"


def test_a_counterfactual_prompt_ranks_by_what_changes(open_page, doc):
    doc = copy.deepcopy(doc)
    doc["jaxclt"]["changes"] = "counterfactual prompt"
    doc["qParams"] = {}
    change = noise(len(doc["nodes"]), seed=11.0) - 0.5
    for node, x in zip(doc["nodes"], change.tolist(), strict=True):
        node["change"] = x
    tab = open_page(page(doc))
    outside = [n for n in doc["nodes"] if n["feature_type"] == FEATURE and n["ctx_idx"]]
    outside.sort(key=lambda n: -abs(n["change"]))
    assert set(shown(tab, "feature")) == {n["node_id"] for n in outside[:FIRST]}
    assert tab.text_content("#measure") == "Change"


def test_rails_hold_the_errors_share_of_what_the_output_rests_on(open_page):
    """By the influence of every node, not the sums in the file."""
    graph = make_graph(tokens=("a", " b", " c"), n_features=60, n_links=10**6)
    doc = graph_json(graph, slug="x")
    tab = open_page(page(doc))
    tab.evaluate("__jaxclt.app.unfold(1)")
    errors = {n["node_id"] for n in doc["nodes"] if n["feature_type"] == ERROR}
    at = {t: {e for e in errors if e.endswith(f"_{t}")} for t in range(3)}
    assert set(shown(tab, "error")) == at[1]
    where = graph.layout.nodes
    ends = {kind: graph.influence_N[where[kind]] for kind in ("error", "embed")}
    share_LT = ends["error"].reshape(-1, 3) / sum(x.sum() for x in ends.values())
    got = tab.evaluate("__jaxclt.rails()")
    assert got == pytest.approx(share_LT.sum(0).tolist(), abs=2e-3)


def test_rails_and_sinks_unfold_by_pointer_and_key(open_page, doc):
    tab = open_page(page({**doc, "qParams": {}}), size=SIZES["desk"])
    error = ids_of(doc, ERROR)
    last = next(n for n in error if n.endswith("_5"))
    at = tab.evaluate("id => __jaxclt.where(id)", last)
    tab.mouse.move(at["x"], at["y"])
    assert "of what the influence rests on" in tab.text_content("#tip")
    tab.mouse.click(at["x"], at["y"])
    assert tab.evaluate("[...__jaxclt.app.unfolded]") == [5]
    feature = next(n for n in ids_of(doc, FEATURE) if n.endswith("_0"))
    stub = tab.evaluate("id => __jaxclt.where(id)", feature)
    tab.mouse.move(stub["x"], stub["y"])
    assert "attention sink\n41 % of the influence" in tab.text_content("#tip")
    tab.focus("#graph")
    tab.evaluate("__jaxclt.select(__jaxclt.nodes.find(n => n.kind === 'embedding').id)")
    tab.keyboard.press("e")
    assert tab.evaluate("__jaxclt.app.unfolded.has(0)")
    tab.wait_for_function("() => location.hash.includes('unfolded=5.0')")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["short", "long", "difference", "old"])
def test_all_tokens_are_in_sight_and_nothing_overlaps(open_page, doc, kind, size):
    if kind == "long":
        doc = told(prompt(60))
    elif kind == "difference":
        doc = told(prompt(9, targets=(" Paris - London",), target_token=(-1,)))
    elif kind == "old":
        doc = prompt(9)
    tab = open_page(page(doc, REPORT), size=SIZES[size])
    feature = shown(tab, "feature")[0]
    wrong = {}
    for state in ("0", f"__jaxclt.select({feature!r})", "__jaxclt.app.unfold(3)"):
        tab.evaluate(f"void {state}")
        tab.wait_for_timeout(30)
        if found := tab.evaluate(MEASURE):
            wrong[state] = found[:5]
    assert wrong == {}, json.dumps(wrong, indent=1)
    box = tab.locator("#graph").bounding_box()
    tokens = tab.evaluate(
        "__jaxclt.nodes.filter(n => n.kind === 'embedding')"
        ".map(n => __jaxclt.where(n.id).x)"
    )
    assert box["x"] + 50 < min(tokens)
    assert max(tokens) < box["x"] + box["width"]
    if kind != "old":
        for part in ("#storytext", "#trust"):
            low = tab.locator(part).bounding_box()
            assert low["y"] + low["height"] <= SIZES[size][1]
        tab.evaluate("__jaxclt.app.select(null)")
        named = tab.evaluate("__jaxclt.svg()").count(">capital")
        assert named > 20  # names have found room
    assert np.diff(sorted(tokens)).min() > 10  # wide enough for a turned token


@pytest.mark.parametrize("size", SIZES)
def test_the_subgraph_runs_from_tokens_to_the_output_inside_its_panel(open_page, size):
    doc = told(prompt(6, n_layers=6, n_features=80, n_links=10**6))
    outside = [n for n in ids_of(doc, FEATURE) if not n.endswith("_0")]
    groups = doc["jaxclt"]["story"]["groups"]
    for g, group in enumerate(groups):  # members of many layers: circles
        group["members"] = outside[g::9]
    doc["qParams"]["supernodes"] = [[g["name"], *g["members"]] for g in groups]
    doc["qParams"]["pinnedIds"] += ids_of(doc, "embedding")[1:5]
    tab = open_page(page(doc), size=SIZES[size])
    for press in ("#count", "#arrange"):
        tab.click(press)
        box = tab.locator("#subgraph").bounding_box()
        cards = [card.bounding_box() for card in tab.locator(".card").all()]
        assert len(cards) == 9
        for card in cards:
            for side, length in (("x", "width"), ("y", "height")):
                low, high = box[side], box[side] + box[length]
                assert low <= card[side] <= card[side] + card[length] <= high
    said = tab.locator("#cards li").all_text_contents()
    links = [re.split(r" (?:raises|lowers|strengthens|weakens) |: ", s) for s in said]
    assert len(links) > 3
    assert tab.locator(".lines > path").count() == len(links)
    assert tab.locator(".lines > text").count() > len(links) / 2
    graph = {}
    for source, target, _ in links:
        graph.setdefault(target, set()).add(source)
    both = {(x["source"], x["target"]) for x in tab.evaluate("__jaxclt.cardLinks()")}
    assert any((b, a) in both for a, b in both)
    tuple(TopologicalSorter(graph).static_order())  # raises on a circle
    text = tab.text_content(".card.group small")
    assert text == "ablated −0.5, predicted +2.4"


def test_a_node_says_what_it_writes_and_reads(open_page, doc):
    tab = open_page(page(doc), size=SIZES["desk"])
    node = next(n for n in ids_of(doc, FEATURE) if n.endswith("_4"))
    tab.evaluate("id => __jaxclt.select(id)", node)
    said = " ".join(tab.text_content("#sidebody").split())
    assert "automatic label" in said
    assert "Raises·capital0 9" in said
    assert "@4 75 %" in said
    assert "hold 12 % of what it writes" in said
    tab.evaluate("__jaxclt.app.setLabel(__jaxclt.app.selected, 'mine')")
    assert "your label" in tab.text_content("#sidebody")
    tab.evaluate("__jaxclt.app.selectGroup(__jaxclt.app.groups[0])")
    said = tab.text_content("#sidebody")
    assert "Ablated, predicted+2.4Ablated, measured−0.5" in said
    effect = doc["jaxclt"]["tokens"][3]["effect"]
    embedding = ids_of(doc, "embedding")[3]
    tab.evaluate("id => __jaxclt.select(id)", embedding)
    assert f"{abs(effect):.3g}" in tab.text_content("#sidebody")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_hostile_labels_and_stories_stay_text(open_page, scheme):
    doc = told(graph_json(make_graph(tokens=HOSTILE), slug="x"), HOSTILE[0])
    doc["jaxclt"]["story"]["trust"] = doc["jaxclt"]["sink"]["rule"] = HOSTILE[0]
    tab = open_page(page(doc, REPORT), scheme=scheme)
    node = next(n for n in ids_of(doc, FEATURE) if n.endswith("_2"))
    tab.evaluate("id => __jaxclt.select(id)", node)
    assert tab.locator("img").count() == 0
    assert HOSTILE[0] in tab.text_content("#trust")
    assert tab.locator("#effects li").count() == len(HOSTILE)
    assert violations(tab) == []


@pytest.mark.parametrize(
    "wrong", [{"story": 3, "tokens": {"a": 1}}, {"tokens": [{"position": 99}, None]}]
)
def test_what_is_no_story_is_left_out(open_page, doc, wrong):
    doc = {**doc, "jaxclt": {**doc["jaxclt"], "sink": {"positions": "0"}, **wrong}}
    tab = open_page(page(doc, REPORT))
    assert tab.locator("#effects li").count() == 0
    assert tab.is_visible("#trust")
