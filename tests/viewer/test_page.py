"""The page: nothing of a token reaches the HTML parser, nothing is loaded, it works."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from test_graph_json import HOSTILE, make_graph

from jaxclt.errors import InputError
from jaxclt.viewer.graph_json import graph_json, validate
from jaxclt.viewer.page import page

REPORT = {
    "scores": {
        "full": {"replacement": 0.62, "completeness": 0.84, "mean_path_length": 3.4},
        "pruned": {"replacement": 0.48, "completeness": 0.79},
    },
    "certificate": {
        "max_relative_row_error": 3e-6,
        "bias_share": 0.08,
        "rest_share": 0.01,
        "error_share": float("nan"),
    },
}
CORRELATION = {"spearman": 0.71, "interval": [0.6, 0.8], "pearson": 0.8, "slope": 0.9}
VALIDATION = {
    "verdict": "Ablations rank as the graph says.",
    "total_effect": {"constrained": {**CORRELATION, "sign_agreement": 0.9}},
    "influence_vs_kl": {"influence": 0.5, "activation": 0.4, "direct": None},
    "patterns_live": {
        "small": {
            "predicted_by": "derivative",
            "factor": 0.9,
            "spearman": 0.98,
            "sign": 1.0,
            "slope": 1.03,
            "n": 50,
            "interval": [0.95, 0.99],
            "value": {"spearman": 0.41, "sign": 0.66, "slope": None, "n": 50},
        },
    },
    "pairwise": {"spearman": 0.72, "interval": [0.7, 0.74]},
    "supernodes": {
        "groups": [
            {"name": "<b>", "members": 2, "predicted": 1.5, "measured": 1.2, "kl": 0.1}
        ]
    },
    "faithfulness": {"encoder": {"cosine": [[1.0, 0.8, None], [None, 1.0, 0.6]]}},
    "faithfulness_layers": [0, 1],
    "failures": [
        {"layer": 99, "pos": 0, "feature": 1, "predicted": 1, "measured": None}
    ],
}
FEATURE = "cross layer transcoder"


@pytest.fixture(scope="module")
def doc() -> dict:
    return graph_json(make_graph(), slug="cat")


@pytest.fixture(scope="module")
def hostile() -> dict:
    return graph_json(make_graph(tokens=HOSTILE, targets=HOSTILE), slug="hostile")


def data_of(html: str) -> dict:
    """What the page embeds, its links as a list again."""
    data = json.loads(html.split('id="data">', 1)[1].split("</script>", 1)[0])
    links = data["graph"]["links"]
    if isinstance(links, dict):
        ids = [n["node_id"] for n in data["graph"]["nodes"]]
        extra = dict(map(tuple, links["extra"]))
        end = f"<u{links['width']}"

        def read(text: str, kind: str) -> np.ndarray:
            return np.frombuffer(base64.b64decode(text), kind)

        numbers = {
            name: read(column["bytes"], "<f4" if column["single"] else "<f8")
            for name, column in links["numbers"].items()
        }
        always = {"weight", "response"}  # also where they are 0
        data["graph"]["links"] = [
            {
                "source": ids[s],
                "target": ids[t],
                **{
                    k: float(str(x[i]))
                    for k, x in numbers.items()
                    if x[i] or k in always
                },
                **extra.get(i, {}),
            }
            for i, (s, t) in enumerate(
                zip(read(links["source"], end), read(links["target"], end), strict=True)
            )
        ]
    return data


def ids_of(doc: dict, kind: str) -> list[str]:
    return [n["node_id"] for n in doc["nodes"] if n["feature_type"] == kind]


def most_read(doc: dict, kind: str) -> str:
    """The node of a kind that most links point to."""
    targets = [link["target"] for link in doc["links"]]
    return max(ids_of(doc, kind), key=targets.count)


# ---- the text of the page ---------------------------------------------------------


def test_a_page_of_too_many_links_holds_the_strongest_and_says_so(doc, monkeypatch):
    monkeypatch.setattr("jaxclt.viewer.page.MAX_LINKS", 3)
    data = data_of(page(doc))
    assert data["graph"]["links"] == doc["links"][:3]
    assert data["allLinks"] == len(doc["links"]) > 3


def test_data_comes_back_whole(doc):
    doc = copy.deepcopy(doc)
    doc["links"][4] |= {"direct": 0.25, "heads": [[1, 2, 0.5]]}
    data = data_of(page(doc, REPORT))
    assert data["graph"] == doc
    assert data["report"]["scores"] == REPORT["scores"]
    assert data["report"]["certificate"]["error_share"] is None


def test_hostile_text_neither_ends_the_block_nor_appears_raw(doc, hostile):
    assert page(hostile).count("<") == page(doc).count("<")
    html = page(hostile)
    assert "onerror" in html
    assert "<img" not in html
    assert "\u2028" not in html
    assert data_of(html)["graph"] == hostile
    html.encode()


def test_the_marker_inside_a_token_is_only_a_token():
    doc = graph_json(make_graph(tokens=("/*DATA*/null", "a", "b", "c")), slug="x")
    assert data_of(page(doc))["graph"] == doc


def test_scores_in_the_document_stand_in_for_a_report():
    doc = graph_json(make_graph(), slug="x", scores=REPORT["scores"])
    assert data_of(page(doc))["report"] == REPORT["scores"]


def test_page_loads_nothing_and_forbids_it(doc):
    html = page(doc, REPORT)
    # The name of SVG is no address.
    assert set(re.findall(r"\w+://[^\"'` ]*", html)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in html
    assert "connect-src 'none'" in html
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write"):
        assert sink not in html


def test_page_has_language_title_heading_and_main(doc):
    html = page(doc)
    for part in ('<html lang="en">', "<title>", "<h1", "<main", "aria-live"):
        assert part in html


def test_a_document_json_cannot_hold_is_refused(doc):
    with pytest.raises(InputError, match="cannot be shown"):
        page({**doc, "extra": float("nan")})


# ---- in a browser -----------------------------------------------------------------


def test_click_shows_inputs_and_outputs(open_page, doc):
    doc = copy.deepcopy(doc)
    node = most_read(doc, FEATURE)
    strongest = max(
        (link for link in doc["links"] if link["target"] == node),
        key=lambda link: abs(link["weight"]),
    )
    strongest |= {"direct": 0.25, "attention": -0.5, "heads": [[5, 3, -0.5]]}
    tab = open_page(page(doc, REPORT))
    assert "62 % of the influence on the output" in tab.text_content("#trust")
    at = tab.evaluate("id => window.__jaxclt.where(id)", node)
    tab.mouse.move(at["x"], at["y"])
    assert tab.is_visible("#tip")
    tab.mouse.click(at["x"], at["y"])
    assert tab.evaluate("window.__jaxclt.state.selected.id") == node
    n_inputs = sum(link["target"] == node for link in doc["links"])
    assert f"Inputs ({n_inputs})" in tab.text_content("#side")
    rows = tab.locator("ul[aria-label=Inputs] li > button")
    assert rows.count() == n_inputs
    said = tab.locator("ul[aria-label=Inputs] li").first.text_content()
    assert said[0] in "+−"
    assert "residual +0.25 · attention −0.5 · L5H3 −0.5" in said
    rows.first.click()
    assert tab.evaluate("window.__jaxclt.state.selected.id") == strongest["source"]
    tab.keyboard.press("Escape")
    assert tab.evaluate("window.__jaxclt.state.selected") is None


def test_targets_of_other_kinds_are_not_called_outputs(open_page) -> None:
    """A weight is no probability, and a feature is nothing the model says next."""
    graph = make_graph(targets=("<b>L1</b> feature 9", " on"), target_token=(-1, 7))
    graph = dataclasses.replace(
        graph,
        target_layer_K=np.array([1, 3], np.int32),
        target_pos_K=np.array([2, 1], np.int32),
    )
    doc = graph_json(graph, slug="cat")
    tab = open_page(page(doc, REPORT))
    assert "What the graph explains" in tab.text_content("#side")
    assert "→" not in tab.text_content("#h1")
    for i, what in ((0, "Target “<b>L1</b> feature 9”"), (1, "Output “ on”")):
        tab.evaluate("id => window.__jaxclt.select(id)", ids_of(doc, "logit")[i])
        side = tab.text_content("#side")
        assert what in side
        assert "Weight" in side
        assert "Probability" not in side
        assert ("layer 1, position 2" if i == 0 else "after position 1") in side
    tab = open_page(page(graph_json(make_graph(), slug="cat"), REPORT))
    assert "What the model says next" in tab.text_content("#side")
    assert "→" in tab.text_content("#h1")


def totals_of(doc: dict) -> dict[str, float]:
    """What shares are of: all that a node reads, or in foreign files what is shown."""
    shown = {n["node_id"]: 0.0 for n in doc["nodes"]}
    for link in doc["links"]:
        shown[link["target"]] += abs(link["weight"])
    known = {n["node_id"]: n.get("abs_input") or 0.0 for n in doc["nodes"]}
    return {i: max(known[i], shown[i]) for i in shown}


def test_shares_are_of_all_that_a_node_reads(open_page, doc):
    for made in (doc, foreign(doc)):
        tab = open_page(page(made))
        found = tab.evaluate(
            "(m => [...m.share].map((s, e) => [m.from(e).id, m.to(e).id, s]))"
            "(__jaxclt.app.model)"
        )
        total = totals_of(made)
        weight = {(x["source"], x["target"]): x["weight"] for x in made["links"]}
        for source, target, share in found:
            want = abs(weight[source, target]) / total[target]
            assert share == pytest.approx(want, rel=1e-5)


def test_keyboard_reaches_every_view(open_page, doc):
    tab = open_page(page(doc))
    tab.focus("#graph")
    for key in ("ArrowUp", "ArrowDown", "ArrowDown", "ArrowRight", "]", "[", "Enter"):
        tab.keyboard.press(key)
    assert tab.evaluate("window.__jaxclt.state.selected.id")
    assert "inputs" in tab.text_content("#live")
    tab.keyboard.press("p")
    assert tab.locator(".card").count() == 1
    tab.keyboard.press("/")
    tab.keyboard.type("sat")
    assert "match" in tab.text_content("#found")
    tab.keyboard.press("Enter")
    assert tab.evaluate("window.__jaxclt.state.selected.pos") == 3
    tab.focus("#view-table")
    tab.keyboard.press("Enter")
    assert tab.is_visible("#rows tr")
    assert not tab.is_visible("#graph")
    tab.focus("#tab-node")
    tab.keyboard.press("ArrowRight")
    assert "--attention 20" in tab.text_content("#sidebody")
    tab.keyboard.press("ArrowRight")
    assert "How far to trust" in tab.text_content("#sidebody")
    tab.keyboard.press("?")
    assert "Keys and pointer" in tab.text_content("#sidebody")


def test_slider_and_errors_say_what_is_shown(open_page, doc):
    tab = open_page(page(doc))
    total, shown = (
        len(ids_of(doc, FEATURE)),
        "__jaxclt.nodes.filter(__jaxclt.app.shows)",
    )
    error = "mlp reconstruction error"
    assert tab.text_content("#count") == f"{total} of {total} features"
    for press, singly in ((tab.uncheck, 0), (tab.check, len(ids_of(doc, error)))):
        press("#errors")
        kinds = tab.evaluate(f"{shown}.map(n => n.kind)")
        assert kinds.count("error") == singly
    tab.uncheck("#errors")
    tab.fill("#slider", "0")
    assert tab.text_content("#count") == f"0 of {total} features"
    tab.fill("#search", "feature")
    assert tab.text_content("#found").startswith("0 of ")


def test_zoom_and_pan_move_nodes_and_hits_follow(open_page, doc):
    tab = open_page(page(doc))
    node = most_read(doc, FEATURE)
    where = "id => window.__jaxclt.where(id)"
    before = tab.evaluate(where, node)
    tab.mouse.move(before["x"], before["y"])
    tab.keyboard.down("Control")
    tab.mouse.wheel(0, -300)
    tab.keyboard.up("Control")
    after = tab.evaluate(where, node)
    assert after["x"] == pytest.approx(before["x"], abs=3)
    tab.mouse.move(400, 300)
    tab.mouse.down()
    tab.mouse.move(420, 310, steps=3)
    tab.mouse.up()
    moved = tab.evaluate(where, node)
    assert moved["x"] - after["x"] == pytest.approx(20, abs=5)
    tab.mouse.click(moved["x"], moved["y"])
    assert tab.evaluate("window.__jaxclt.state.selected.id") == node
    tab.click("#zoomfit")


def test_strongest_paths_are_shown_and_pinned(open_page, doc):
    tab = open_page(page(doc))
    node = most_read(doc, FEATURE)
    tab.evaluate("id => window.__jaxclt.select(id)", node)
    tab.click("details.paths summary")
    for title in ("From tokens and errors", "To the targets"):
        rows = tab.locator(f"ul[aria-label='{title}'] button.path")
        rows.first.wait_for()
        assert 1 <= rows.count() <= 3
        shares = [float(t.split()[0]) for t in rows.locator(".right").all_inner_texts()]
        assert shares == sorted(shares, reverse=True)
    rows.first.click()
    path = tab.evaluate("window.__jaxclt.app.path.length")
    assert path >= 1
    tab.click("text=Pin path")
    tab.locator(".card").nth(path).wait_for()
    assert tab.locator(".card").count() == path + 1


def test_labels_are_edited_in_place_and_kept_as_text(open_page, doc):
    tab = open_page(page(doc))
    node = ids_of(doc, FEATURE)[3]
    tab.evaluate("id => window.__jaxclt.select(id)", node)
    tab.click(".actions >> text=Label")
    tab.keyboard.type("<img src=x onerror=alert(1)>")
    tab.keyboard.press("Enter")
    assert "<img src=x" in tab.text_content("#side h2")
    made = tab.evaluate("window.__jaxclt.document()")
    labels = {n["node_id"]: n["clerp"] for n in made["nodes"]}
    assert labels[node] == "<img src=x onerror=alert(1)>"
    assert tab.locator("img").count() == 0


def test_supernodes_are_grouped_renamed_moved_and_ungrouped(open_page, doc):
    doc = copy.deepcopy(doc)
    a, b, c, d = ids_of(doc, FEATURE)[:4]
    doc["jaxclt"]["suggested_supernodes"] = [["pair <b>", a, b], ["gone", "9_9_9"]]
    tab = open_page(page(doc))
    tab.evaluate(
        "ids => ids.forEach(id => "
        "__jaxclt.app.togglePin(__jaxclt.app.model.byId.get(id)))",
        [c, d],
    )
    tab.click("#suggest")
    cards = tab.locator(".card")
    assert cards.first.locator("b").text_content() == "pair <b>"
    assert cards.count() == 4  # the suggestion, two pins and the first output
    for card in (1, 2):
        cards.nth(card).click(modifiers=["Shift"])
    tab.click("#group")
    assert tab.evaluate("__jaxclt.app.groups.map(g => g.ids)") == [[a, b], [c, d]]
    tab.click("text=Rename")
    tab.keyboard.type("mine")
    tab.keyboard.press("Enter")
    assert tab.text_content("#side h2") == "mine"
    card = tab.locator(".card.chosen")
    before = card.bounding_box()
    x, y = before["x"] + 20, before["y"] + 10
    tab.mouse.move(x, y)
    tab.mouse.down()
    tab.mouse.move(x + 40, y + 15, steps=4)
    tab.mouse.up()
    assert card.bounding_box()["x"] - before["x"] == pytest.approx(40, abs=2)
    card.press("ArrowLeft")
    tab.click("text=Ungroup")
    assert tab.evaluate("__jaxclt.app.groups.length") == 1
    tab.click("#unpinall")
    assert not tab.is_visible("#subgraph")


def half_below_zero(doc: dict) -> dict:
    """The same with every other feature on the other side."""
    doc = copy.deepcopy(doc)
    for node in [n for n in doc["nodes"] if n["feature_type"] == FEATURE][::2]:
        node["activation"] *= -1
    return doc


def sides_of(doc: dict) -> dict[str, int]:
    """-1 of features below zero, 1 of all other nodes."""
    return {n["node_id"]: -1 if (n["activation"] or 0) < 0 else 1 for n in doc["nodes"]}


def merged(doc: dict, groups: list[list[str]]) -> dict[tuple[int, int], float]:
    """Links of supernodes as the paper defines them, written out slowly."""
    size, side = totals_of(doc), sides_of(doc)
    fed = {link["target"] for link in doc["links"]}
    found = {}
    for t, members in enumerate(groups):
        outside = {
            n: 1
            - sum(
                abs(link["weight"])
                for link in doc["links"]
                if link["target"] == n and link["source"] in members
            )
            / size[n]
            for n in members
            if n in fed
        }
        for s, sources in enumerate(groups):
            total = sum(
                outside[link["target"]]
                * side[link["target"]]
                * link["weight"]
                / size[link["target"]]
                for link in doc["links"]
                if link["target"] in outside and link["source"] in sources
            )
            if s != t and total:
                found[s, t] = total / sum(outside.values())
    return found


@pytest.mark.parametrize("make", [copy.deepcopy, half_below_zero])
def test_links_between_supernodes_are_merged_as_in_the_paper(open_page, doc, make):
    features = ids_of(doc, FEATURE)
    groups = [features[:4], features[-5:], ids_of(doc, "logit")[:1]]
    doc = make(doc)
    doc["qParams"]["supernodes"] = json.dumps([["g", *ids] for ids in groups[:2]])
    doc["qParams"]["pinnedIds"] = ",".join(groups[2])
    tab = open_page(page(doc))
    links = tab.evaluate("__jaxclt.cardLinks()")
    found = {(link["source"], link["target"]): link["share"] for link in links}
    expected = merged(doc, groups)
    assert expected
    assert found == pytest.approx(expected, rel=1e-5)


def test_evidence_stands_beside_the_graph(open_page, doc):
    tab = open_page(page(doc, REPORT, validation=VALIDATION))
    tab.click("#trust >> text=Evidence")
    text = tab.text_content("#sidebody")
    for part in (
        "Replacement",
        "0.0003 %",
        "Patches agree0.71",
        "48 % in what is shown",
        "rounding only",
        "Ablations rank as the graph says.",
        "0.71 [0.60, 0.80]",
        "times 0.9the model's derivative0.98 [0.95, 0.99]100 %1.03",
        "times 0.9effects by value0.4166 %–",
        "<b> (2)",
        "Largest surprises",
    ):
        assert part in text
    assert "one layer on: along encoders 0.70" in tab.get_attribute(
        "svg.chart", "aria-label"
    )
    tab = open_page(page(doc, REPORT))
    tab.click("#tab-evidence")
    assert "No patches were run" in tab.text_content("#sidebody")


def test_the_address_holds_the_view(open_page, doc):
    tab = open_page(page(doc))
    a, b, c = ids_of(doc, FEATURE)[:3]
    tab.evaluate(
        """([a, b, c]) => {
          const {app} = __jaxclt;
          app.setPins([c], [{label: "two, & more", ids: [a, b]}]);
          app.setLabel(app.model.byId.get(a), "ünïcode # label");
          app.filter({threshold: 0.5, errors: true});
          app.unfold(2);
          app.showView("table");
          __jaxclt.select(c);
        }""",
        [a, b, c],
    )
    tab.wait_for_function("() => location.hash.length > 10")
    hash = tab.evaluate("location.hash")
    tab = open_page(page(doc), hash=hash)
    state = tab.evaluate(
        "(({app}) => ({pinned: app.pinned, groups: app.groups, view: app.view,"
        "selected: app.selected.id, threshold: app.threshold, errors: app.errors,"
        "unfolded: [...app.unfolded],"
        "label: app.model.label(app.model.byId.get(app.groups[0].ids[0]))}))(__jaxclt)"
    )
    assert sorted(state["pinned"]) == sorted([a, b, c])
    assert state["groups"] == [{"label": "two, & more", "ids": [a, b]}]
    assert (state["view"], state["selected"]) == ("table", c)
    assert (state["threshold"], state["errors"]) == (0.5, True)
    assert state["unfolded"] == [2]
    assert state["label"] == "ünïcode # label"


@pytest.mark.parametrize("kind", ["json", "graph.svg", "graph.png"])
def test_export(open_page, hostile, kind):
    tab = open_page(page(hostile, REPORT))
    tab.evaluate("__jaxclt.app.togglePin(__jaxclt.nodes[0])")
    with tab.expect_download() as download:
        tab.select_option("#export", kind)
    name, data = download.value.suggested_filename, Path(download.value.path())
    kind = kind.rpartition(".")[2]
    assert name == f"hostile.{kind}"
    if kind == "json":
        made = json.loads(data.read_text(encoding="utf-8"))
        validate(made)
        assert made["qParams"]["pinnedIds"] == [hostile["nodes"][0]["node_id"]]
        assert made["links"] == hostile["links"]
        assert made["metadata"] == hostile["metadata"]
        assert made["nodes"] == hostile["nodes"]
    elif kind == "svg":
        root = ElementTree.fromstring(data.read_text(encoding="utf-8"))
        tags = {e.tag.rpartition("}")[2] for e in root.iter()}
        assert {"path", "rect", "text"} <= tags
        assert not tags & {"script", "img", "foreignObject"}
    else:
        assert data.read_bytes().startswith(b"\x89PNG")


def old_ids(doc: dict) -> dict:
    """As circuit-tracer wrote it before 0.5.1: errors named like layer 0 features."""
    doc = copy.deepcopy(doc)
    new = {
        n["node_id"]: f"0_{n['layer']}_{n['ctx_idx']}"
        for n in doc["nodes"]
        if n["feature_type"] == "mlp reconstruction error"
    }
    for node in doc["nodes"]:
        node["node_id"] = new.get(node["node_id"], node["node_id"])
    for link in doc["links"]:
        link["source"] = new.get(link["source"], link["source"])
    # And a feature of layer 0 whose id an error has too.
    clash = next(i for i in new.values() if int(i.split("_")[1]) > 0)
    feature = {**doc["nodes"][0], "node_id": clash, "layer": "0", "ctx_idx": 0}
    doc["nodes"].append({**feature, "feature_type": FEATURE, "clerp": "the feature"})
    return doc


def foreign(doc: dict) -> dict:
    """As others write it: numbers for layers, opaque ids, states saved as strings."""
    doc = copy.deepcopy(doc)
    doc.pop("jaxclt")
    for node in doc["nodes"]:
        node.pop("abs_input", None)
        node["node_id"] = "x-" + node["node_id"]
        if node["layer"] != "E":
            node["layer"] = int(node["layer"])
    for link in doc["links"]:
        link["source"], link["target"] = "x-" + link["source"], "x-" + link["target"]
    doc["qParams"] = {
        "pinnedIds": doc["nodes"][0]["node_id"],
        "supernodes": json.dumps([["s", doc["nodes"][1]["node_id"]]]),
        "clickedId": None,
        "sg_pos": None,
        "linkType": None,
    }
    return doc


def open_file(tab, name: str, value: object, button: str = "#open") -> None:
    with tab.expect_file_chooser() as chooser:
        tab.click(button)
    text = value if isinstance(value, str) else json.dumps(value)
    chooser.value.set_files(
        {"name": name, "mimeType": "application/json", "buffer": text.encode()}
    )


@pytest.mark.parametrize("make", [copy.deepcopy, old_ids, foreign])
def test_files_of_other_tools_open(open_page, hostile, doc, make):
    made = make(doc)
    tab = open_page(page(hostile))
    open_file(tab, "other.json", made)
    tab.wait_for_function(f"() => __jaxclt.nodes.length === {len(made['nodes'])}")
    kinds = tab.evaluate("__jaxclt.nodes.map(n => n.kind)")
    types = [n["feature_type"] for n in made["nodes"]]
    assert kinds.count("error") == types.count("mlp reconstruction error")
    assert kinds.count("feature") == types.count(FEATURE)
    shares = tab.evaluate("__jaxclt.app.model.source.length")
    assert shares == len(made["links"])
    # No link runs down: an id that two nodes share was told apart by the type.
    assert tab.evaluate(
        "(({model: m}) => [...m.source.keys()].every("
        "e => m.from(e).band < m.to(e).band))(__jaxclt.app)"
    )
    if make is old_ids:
        assert "before 0.5.1" in tab.text_content("#notice")
        ids = tab.evaluate(
            "__jaxclt.nodes.filter(n => n.kind === 'error').map(n => n.id)"
        )
        assert all("_-1_" in i for i in ids)
    if make is foreign:
        assert tab.evaluate("__jaxclt.app.pinned.length") == 2
        numbers = tab.evaluate("__jaxclt.nodes.map(n => n.number)")
        assert numbers[0] == doc["nodes"][0]["node_id"].split("_")[1]
    validate(tab.evaluate("__jaxclt.document()"))


def test_a_file_that_is_no_graph_is_refused_in_words(open_page, doc):
    tab = open_page(page(doc))
    for text, why in (("{", "no JSON"), ("{}", "no list"), ("[1]", "no supernodes")):
        open_file(tab, "bad.json", text)
        tab.wait_for_function(
            f"() => document.getElementById('notice').textContent.includes({why!r})"
        )
    open_file(tab, "groups.json", [["g", *ids_of(doc, FEATURE)[:2]]])
    tab.wait_for_function("() => __jaxclt.app.groups.length === 1")


def feature_file(index: int) -> dict:
    example = {
        "tokens": [" a", "<b>", "\n", " c"],
        "tokens_acts_list": [0, 2.5, 0.5, 0],
        "train_token_ind": 1,
        "is_repeated_datapoint": False,
    }
    return {
        "index": index,
        "top_logits": [" Paris", "<script>"],
        "bottom_logits": [" x"],
        "examples_quantiles": [
            {"quantile_name": "Top activations", "examples": [example] * 3}
        ],
        "act_min": 0,
        "act_max": 3,
        "histogram": [5, 3, 1],
    }


def test_the_feature_panel_shows_embedded_and_opened_features(open_page, doc):
    doc = copy.deepcopy(doc)
    first, second = [n for n in doc["nodes"] if n["feature_type"] == FEATURE][:2]
    layer, number, _ = first["node_id"].split("_")
    doc["jaxclt"]["features"] = {f"{layer}_{number}": feature_file(0)}
    tab = open_page(page(doc))
    tab.evaluate("id => __jaxclt.select(id)", first["node_id"])
    panel = tab.text_content(".feature")
    assert "Top logits Paris<script>" in panel
    assert "<b>⏎ c" in panel
    assert tab.locator(".histogram .column").count() == 3
    assert tab.locator(".example .centre").first.text_content() == "<b>"
    tab.evaluate("id => __jaxclt.select(id)", second["node_id"])
    assert tab.locator(".feature").count() == 0
    open_file(tab, f"{second['feature']}.json", feature_file(second["feature"]))
    tab.wait_for_selector(".feature")


def test_two_graphs_are_compared(open_page, doc):
    other = copy.deepcopy(doc)
    gone = ids_of(doc, FEATURE)[0]
    other["nodes"] = [n for n in other["nodes"] if n["node_id"] != gone]
    other["links"] = [
        x for x in other["links"] if gone not in (x["source"], x["target"])
    ]
    added = {**doc["nodes"][1], "node_id": "0_77777_0", "layer": "0", "ctx_idx": 0}
    other["nodes"].append(added)
    tab = open_page(page(doc, other=other))
    tab.click("#view-compare")
    text = tab.text_content("#comparetabs")
    assert f"Shared ({len(doc['nodes']) - 1})" in text
    assert "Only left (1)" in text
    assert "Only right (1)" in text
    tab.click("text=Only left")
    tab.locator("#comparerows button").first.click()
    assert tab.evaluate("__jaxclt.app.selected.id") == gone
    other["jaxclt"]["dictionary"] = "another"
    open_file(tab, "b.json", other, "#compare .openother")
    tab.wait_for_function(
        "() => document.getElementById('comparenote').textContent !== ''"
    )
    assert "dictionaries differ" in tab.text_content("#comparenote")


def test_a_chat_shows_who_says_what(open_page):
    """Roles in the heading, as text whatever they are; of a long chat the end."""
    graph = make_graph()
    said = [
        {"role": "system", "content": "x" * 300},
        {"role": "<b>user</b>", "content": HOSTILE[0]},
        {"role": "model", "content": "Two\nlines"},
    ]
    meta = dataclasses.replace(graph.meta, messages=said)
    doc = graph_json(dataclasses.replace(graph, meta=meta), slug="chat")
    validate(doc)
    tab = open_page(page(doc))
    roles = tab.locator("#h1 .role").all_inner_texts()
    assert roles == ["system", "<b>user</b>", "model"]
    heading = tab.text_content("#h1")
    assert f"<b>user</b> {HOSTILE[0]} model Two⏎lines  → " in heading
    assert re.search(r"system …x{50,120} <b>", heading)
    assert tab.locator("#h1 b, #h1 img").count() == 0
    assert tab.get_attribute("#h1", "title") == graph.meta.prompt
    # what was saved from the page is still that chat
    assert tab.evaluate("__jaxclt.document().jaxclt.messages") == said
    plain = graph_json(graph, slug="plain")
    assert "messages" not in plain["jaxclt"]
    for wrong in ("x", [3], [{"role": "user"}], [{"role": 1, "content": "x"}]):
        with pytest.raises(InputError, match=r"\$.jaxclt.messages"):
            validate(plain | {"jaxclt": {"messages": wrong}})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_hostile_tokens_stay_text(open_page, hostile, scheme):
    doc = copy.deepcopy(hostile)
    texts = ["", "x" * 5000, "👩‍👩‍👧 עברית ‮rtl", "<script>alert(1)</script>"]
    for node, text in zip(doc["nodes"], texts, strict=False):
        node["clerp"] = text
    doc["qParams"]["supernodes"] = [[HOSTILE[0], doc["nodes"][0]["node_id"]]]
    doc["qParams"]["pinnedIds"] = [n["node_id"] for n in doc["nodes"][:4]]
    doc["jaxclt"]["model"] = HOSTILE[0]
    tab = open_page(page(doc, other=doc), scheme=scheme)
    tab.evaluate("__jaxclt.nodes.forEach(n => __jaxclt.select(n.id))")
    tab.evaluate("__jaxclt.app.selectGroup(__jaxclt.app.groups[0])")
    for view in ("table", "compare", "graph"):
        tab.click(f"#view-{view}")
    assert tab.locator("img, #side script").count() == 0
    assert HOSTILE[0] in tab.text_content("#side h2")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_one_layer_and_no_links_still_draw(open_page):
    graph = make_graph(n_layers=1, n_features=3, tokens=("a",), n_links=0)
    tab = open_page(page(graph_json(graph, slug="x")))
    assert "features" in tab.text_content("#count")


def patched(doc: dict, ids: list[str] | None = None) -> dict:
    """What `jaxclt.patching.log` keeps of a patch."""
    return {
        "name": "two <b>",
        "change": {"scale": 0.0},
        "nodes": ids or ids_of(doc, FEATURE)[:2],
        "mode": "constrained",
        "layers": [0, 2],
        "kl": 0.25,
        "targets": [{"token": " on<i>", "p_before": 0.75, "p_after": 0.125}],
        "top_before": [[" on<i>", 0.75], [" at", 0.1]],
        "top_after": [[" at", 0.5], [" on<i>", 0.125]],
        "warning": None,
    }


AXE = Path(__file__).parents[2] / "jaxclt/viewer/web/node_modules/axe-core/axe.min.js"


def violations(tab) -> list[str]:
    """What axe finds serious in a page as it is now."""
    if not AXE.is_file():
        pytest.skip("axe-core is not there: npm ci in jaxclt/viewer/web")
    if not tab.evaluate("'axe' in window"):
        tab.add_script_tag(content=AXE.read_text(encoding="utf-8"))
    return tab.evaluate(
        "axe.run({resultTypes: ['violations']}).then(r => r.violations.filter("
        "v => ['serious', 'critical'].includes(v.impact))"
        ".map(v => v.id + ': ' + v.nodes.map(n => n.html).slice(0, 3).join(' ')))"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(open_page, doc, scheme):
    doc = copy.deepcopy(doc)
    doc["qParams"]["supernodes"] = [["two", *ids_of(doc, FEATURE)[:2]]]
    layer, number, _ = ids_of(doc, FEATURE)[4].split("_")
    doc["jaxclt"]["features"] = {f"{layer}_{number}": feature_file(0)}
    parts = {"validation": VALIDATION, "patches": [patched(doc)], "other": doc}
    tab = open_page(page(doc, REPORT, **parts), scheme=scheme)
    for state in (
        "0",
        f"__jaxclt.select({ids_of(doc, FEATURE)[4]!r})",
        "__jaxclt.app.selectGroup(__jaxclt.app.groups[0])",
        "__jaxclt.app.openPatch({name: 'g', ids: __jaxclt.app.groups[0].ids})",
        "__jaxclt.app.showTab('evidence')",
        "(__jaxclt.app.showTab('help'), __jaxclt.app.showView('table'))",
        "__jaxclt.app.showView('compare')",
    ):
        tab.evaluate(f"void {state}")
        assert violations(tab) == [], state
