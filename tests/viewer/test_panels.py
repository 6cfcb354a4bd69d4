"""Panels of the page: patches, dividers, places of cards, activations below zero."""

from __future__ import annotations

import copy
import itertools
import json
import re
from xml.etree import ElementTree

import pytest
from test_graph_json import make_graph
from test_page import (
    FEATURE,
    REPORT,
    VALIDATION,
    feature_file,
    half_below_zero,
    ids_of,
    patched,
    sides_of,
)

from jaxclt.viewer.graph_json import graph_json, validate
from jaxclt.viewer.page import page


@pytest.fixture(scope="module")
def doc() -> dict:
    doc = graph_json(make_graph(), slug="cat")
    doc["qParams"]["supernodes"] = [["a 'pair'", *ids_of(doc, FEATURE)[:2]]]
    return doc


def open_patch(tab) -> None:
    tab.evaluate("__jaxclt.app.selectGroup(__jaxclt.app.groups[0])")
    tab.click(".actions >> text=Patch")


def test_without_a_server_the_page_says_what_to_run(open_page, doc):
    tab = open_page(page(doc))
    open_patch(tab)
    a, b = (i.split("_") for i in ids_of(doc, FEATURE)[:2])
    command = tab.text_content("#patched .command")
    places = f"{a[0]}:{a[2]}:{a[1]} {b[0]}:{b[2]}:{b[1]}"
    assert command.endswith(f" --feature {places} --scale 0")
    # No path of the machine that the page is read on.
    assert re.fullmatch(r"jaxclt patch [\w.-]+ --feature .*", command)
    tab.fill(".patchform input", "-1.5")
    tab.select_option(".patchform select", "iterative")
    command = tab.text_content("#patched .command")
    assert command.endswith("--scale -1.5 --mode iterative")
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.click("#patched >> text=Copy")
    tab.wait_for_selector("#patched [role=status]:has-text('Copied')")
    assert tab.evaluate("navigator.clipboard.readText()") == command
    assert "Not patched yet" in tab.text_content("#patched")
    tab.click("#patched >> text=Close")
    assert not tab.is_visible("#patched")


FIND = """query => {
  const {app} = __jaxclt;
  app.filter({query});
  return app.model.nodes.filter((n) => app.matches(n)).map((n) => n.id);
}"""


def test_features_are_found_by_the_ways_to_write_them(open_page, doc):
    tab = open_page(page(doc))
    layer, number, pos = ids_of(doc, FEATURE)[0].split("_")
    named = [i for i in ids_of(doc, FEATURE) if i.startswith(f"{layer}_{number}_")]
    assert tab.evaluate(FIND, f"{layer}:{pos}:{number}") == [f"{layer}_{number}_{pos}"]
    assert set(named) <= set(tab.evaluate(FIND, f"{layer}/{number}"))
    found = tab.evaluate(FIND, f"layer {layer}")
    assert len(found) > 1
    assert {i.split("_")[0] for i in found} == {layer}


RING = """([id, r]) => {
  const at = __jaxclt.where(id), host = document.querySelector('#graph');
  const box = host.getBoundingClientRect(), canvas = host.querySelector('.front');
  const x = at.x - box.left, y = at.y - box.top;
  const pen = canvas.getContext('2d'), k = devicePixelRatio;
  return Array.from(pen.getImageData((x + r) * k - 2, y * k, 5, 1).data)
    .filter((v, i) => i % 4 === 3 && v > 200).length;
}"""


def test_the_focused_node_stands_out_also_where_it_is_pinned(open_page, doc):
    tab = open_page(page(doc))
    tab.focus("#graph")
    tab.keyboard.press("ArrowUp")
    node = tab.evaluate("__jaxclt.app.model.logits[0].id")
    tab.wait_for_timeout(50)
    reach = 4 + 7  # the radius of outputs, and of the ring beyond
    assert tab.evaluate(RING, [node, reach]) > 1
    tab.keyboard.press("p")
    tab.wait_for_timeout(50)
    assert tab.evaluate(RING, [node, reach]) > 1
    tab.focus("#search")
    tab.wait_for_timeout(50)
    assert tab.evaluate(RING, [node, reach]) == 0


def test_what_a_difference_weighs_is_not_said(open_page):
    targets = {"targets": (" Paris - London",), "target_token": (-1,)}
    doc = graph_json(make_graph(**targets), slug="x")
    for node in doc["nodes"]:
        if node["feature_type"] == "logit":
            node["token_prob"] = 1.0
    tab = open_page(page(doc))
    tab.evaluate("__jaxclt.select(__jaxclt.app.model.logits[0].id)")
    for part in ("#side", "#h1", "#subgraph"):
        assert "100 %" not in (tab.text_content(part) or "")
    assert ">100 %" not in tab.evaluate("__jaxclt.svg()")


def test_what_patches_did_stands_beside_the_subgraph(open_page, doc):
    validation = copy.deepcopy(VALIDATION)
    validation["supernodes"]["groups"][0]["name"] = "a 'pair'"
    records = [patched(doc), patched(doc, ids_of(doc, FEATURE)[4:5])]
    tab = open_page(page(doc, validation=validation, patches=records))
    open_patch(tab)
    assert tab.is_visible("#subgraph .card")
    result = tab.locator("#patched .result")
    assert result.count() == 1
    text = result.text_content()
    for part in ("× 0, constrained, layers 0–2", "0.25 nats", "·on<i> target", "·at"):
        assert part in text
    rows = result.locator("tbody tr").all_inner_texts()
    assert re.findall(r"\d+ %", rows[0]) == ["75 %", "13 %"]
    assert re.findall(r"\d+ %", rows[1]) == ["10 %", "50 %"]
    assert "was to change by 1.5 and changed by 1.2" in tab.text_content("#patched")
    tab.click("#tab-evidence")
    listed = tab.locator("ul[aria-label=Patches] button")
    assert listed.count() == 2
    listed.nth(1).click()
    assert tab.evaluate("__jaxclt.app.patchOf.ids") == ids_of(doc, FEATURE)[4:5]
    assert tab.locator("#patched .result").count() == 1


@pytest.mark.parametrize("which", ["side", "lower"])
def test_dividers_move_by_pointer_and_keys_and_stay(open_page, doc, which):
    tab = open_page(page(doc))
    line, panel = tab.locator(f"#divide-{which}"), tab.locator(f"#{which}")
    key = "width" if which == "side" else "height"
    grow = ["ArrowLeft", "ArrowUp"][which == "lower"]
    before = panel.bounding_box()[key]
    assert line.get_attribute("role") == "separator"
    line.focus()
    tab.keyboard.press(grow)
    assert 10 < panel.bounding_box()[key] - before < 40
    box = line.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(x, y)
    tab.mouse.down()
    tab.mouse.move(x - 60, y - 60, steps=3)
    tab.mouse.up()
    size = panel.bounding_box()[key]
    assert 60 < size - before < 110
    now = float(line.get_attribute("aria-valuenow"))
    least, most = (float(line.get_attribute(f"aria-value{e}")) for e in ("min", "max"))
    assert least < now < most
    tab.wait_for_function(
        "w => location.hash.includes(w + '=' + __jaxclt.app.panels[w].toFixed(1))",
        arg=which,
    )
    tab = open_page(page(doc), hash=tab.evaluate("location.hash"))
    assert tab.locator(f"#{which}").bounding_box()[key] == pytest.approx(size, abs=2)
    tab.locator(f"#divide-{which}").dblclick()
    assert tab.locator(f"#{which}").bounding_box()[key] == pytest.approx(before, abs=1)
    for key_ in ("Home", "End", "Enter"):
        tab.locator(f"#divide-{which}").press(key_)
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def places(tab) -> dict:
    return tab.evaluate("Object.fromEntries(__jaxclt.app.placed)")


def test_places_of_cards_are_kept_in_the_address_and_the_file(open_page, doc):
    doc = copy.deepcopy(doc)
    doc["qParams"]["pinnedIds"] = ids_of(doc, FEATURE)[2:4]
    tab = open_page(page(doc))
    made = tab.evaluate("__jaxclt.document()")["qParams"]
    assert made["sg_pos"] == ""
    assert "cards" not in made
    card = tab.locator(".card").nth(1)
    card.focus()
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    moved = places(tab)
    tab.wait_for_function(
        "() => new URLSearchParams(location.hash.slice(1)).get('cards') === "
        "JSON.stringify(__jaxclt.document().qParams.cards)"
    )
    hash = tab.evaluate("location.hash")
    exported = tab.evaluate("__jaxclt.document()")
    validate(exported)
    # x y of every card for other viewers, from 0 to 1000 of their panel.
    numbers = [int(x) for x in exported["qParams"]["sg_pos"].split(" ")]
    assert len(numbers) == 2 * 3
    assert min(numbers) == 0
    assert max(numbers) < 1000
    tab = open_page(page(doc), hash=hash)
    again = places(tab)
    assert again == {k: pytest.approx(v, abs=1) for k, v in moved.items()}
    tab = open_page(page(exported))
    assert places(tab) == {k: pytest.approx(v, abs=1) for k, v in moved.items()}
    tab.click("#arrange")
    assert "cards" not in tab.evaluate("__jaxclt.document()")["qParams"]


def test_places_of_another_viewer_are_read_in_its_order(open_page, doc):
    """By the letters of the members' feature numbers, as circuit-tracer sorts them."""
    doc = copy.deepcopy(doc)
    a, b, c = ids_of(doc, FEATURE)[:3]
    number = {n["node_id"]: n["feature"] for n in doc["nodes"]}
    doc["qParams"]["supernodes"] = json.dumps([["pair", a, b]])
    doc["qParams"]["pinnedIds"] = c
    order = sorted(
        [(f"+{a}", f"{number[a]} {number[b]}"), (c, f"{number[c]}")],
        key=lambda card: ",".join(sorted(card[1])),
    )
    doc["qParams"]["sg_pos"] = "0 0 500 250"
    tab = open_page(page(doc))
    found = places(tab)
    first, second = (found[card] for card, _ in order)
    assert second[0] - first[0] == pytest.approx(700)
    assert second[1] - first[1] == pytest.approx(175)


def test_activations_below_zero_are_shaded_otherwise(open_page, doc):
    doc = copy.deepcopy(doc)
    node = next(n for n in doc["nodes"] if n["feature_type"] == FEATURE)
    layer, number, _ = node["node_id"].split("_")
    feature = feature_file(0)
    feature["act_min"] = -4
    example = feature["examples_quantiles"][0]["examples"][0]
    example["tokens_acts_list"] = [0, 2.5, -4, 0]
    doc["jaxclt"]["features"] = {f"{layer}_{number}": feature}
    tab = open_page(page(doc))
    tab.evaluate("id => __jaxclt.select(id)", node["node_id"])
    spans = tab.locator(".example").first.locator("span")
    styles = spans.evaluate_all(
        "list => list.map(e => { const s = getComputedStyle(e);"
        "return [e.className, s.backgroundColor, s.textDecorationLine, e.title]; })"
    )
    assert [s[0] for s in styles] == ["", "centre up much", "down much", ""]
    assert styles[1][1] != styles[2][1] != styles[0][1]
    assert styles[2][2] == "underline"
    assert styles[2][3] == "activation −4"
    assert "below zero" in tab.text_content(".shades")
    assert tab.locator(".histogram .zero").count() == 1


def product(doc: dict, sides: dict[str, int], nodes: list[str]) -> float:
    """What a path does to its last node: edges, each as its target's side takes it."""
    weight = {(x["source"], x["target"]): x["weight"] for x in doc["links"]}
    sign = 1.0
    for source, target in itertools.pairwise(nodes):
        sign *= weight[source, target] * sides[target]
    return sign


def test_signs_say_what_strengthens_a_feature_on_either_side(open_page, doc):
    """In the lists, read aloud, in the paths and in the picture."""
    doc = half_below_zero(doc)
    sides = sides_of(doc)
    tab = open_page(page(doc, REPORT))
    seen = set()
    for node in [n["node_id"] for n in doc["nodes"]][::3]:
        tab.evaluate("id => __jaxclt.select(id)", node)
        note = "Below zero: what strengthens it (+) makes it more negative"
        assert (note in tab.text_content("#sidebody")) == (sides[node] < 0)
        links = [x for x in doc["links"] if node in (x["source"], x["target"])]
        pushes = [x["weight"] * sides[x["target"]] for x in links]
        root = ElementTree.fromstring(tab.evaluate("__jaxclt.svg()"))
        dashed = [e for e in root.iter() if e.get("stroke-dasharray") == "5 3"]
        assert len(dashed) == sum(push < 0 for push in pushes)
        said = tab.locator("#sidebody .links:not(.out) .sign").all_text_contents()
        output = ("+ raises", "− lowers")
        feature = ("+ strengthens", "− weakens")
        want = [
            (output if x["target"] in ids_of(doc, "logit") else feature)[push < 0]
            for x, push in zip(links, pushes, strict=True)
        ]
        assert sorted(said) == sorted(want)
        seen.update(want)
        if tab.locator("details.paths").count():
            tab.click("details.paths summary")
            rows = tab.locator("button.path")
            rows.first.wait_for()
            for i in range(rows.count()):
                rows.nth(i).click()
                nodes = tab.evaluate(
                    "(({app: {model: m, path: p}}) =>"
                    "[m.from(p[0]).id, ...p.map(e => m.to(e).id)])(__jaxclt)"
                )
                sign = rows.nth(i).locator(".sign").text_content()
                assert (sign[0] == "+") == (product(doc, sides, nodes) > 0)
                seen.add(sign[2:])
    assert len(seen) == 8


def test_a_feature_below_zero_shows_what_that_side_writes(open_page, doc):
    """Tokens turned round, its own examples first; said so where there are none."""
    doc = copy.deepcopy(doc)
    node = next(n for n in doc["nodes"] if n["feature_type"] == FEATURE)
    layer, number, _ = node["node_id"].split("_")
    feature = feature_file(0)
    (above,) = feature["examples_quantiles"]
    below = copy.deepcopy(above)
    below["quantile_name"] = "Top activations below zero"
    for example in below["examples"]:
        example["tokens_acts_list"] = [0, -4, 0.5, 0]
    doc["jaxclt"]["features"] = {f"{layer}_{number}": feature}

    def shown() -> tuple[str, list[str]]:
        tab = open_page(page(doc))
        tab.evaluate("id => __jaxclt.select(id)", node["node_id"])
        names = tab.locator(".feature details summary").all_text_contents()
        assert tab.locator(".feature details[open]").count() == 1
        return tab.text_content(".feature"), names

    other = "All examples are of the other side"
    for activation, quantiles, first, says in (
        (2.0, [above], above, False),
        (2.0, [below, above], above, False),
        (-2.0, [above, below], below, False),
        (-2.0, [above], above, True),
    ):
        node["activation"], feature["examples_quantiles"] = activation, quantiles
        text, names = shown()
        assert names[0].startswith(first["quantile_name"] + " (")
        assert (other in text) == says
        if activation > 0:
            assert "Top logits Paris<script>Bottom logits x" in text
        else:
            assert "Raises here, below zero xLowers here Paris<script>" in text


def test_evidence_holds_the_edges_into_the_output(open_page, doc):
    report = copy.deepcopy(REPORT)
    report["scores"]["full"]["completeness_logit_edges"] = 0.976
    report["scores"]["pruned"]["completeness_logit_edges"] = 0.77
    tab = open_page(page(doc, report))
    tab.click("#tab-evidence")
    text = tab.text_content("#sidebody")
    assert "Output edges98 %" in text
    assert "comes from features and tokens; 77 % in what is shown" in text


def test_a_browser_without_base64_of_its_own_reads_the_links(open_page, doc):
    tab = open_page(page(doc))
    weights = "[...__jaxclt.app.model.weight]"
    other = tab.context.new_page()
    try:
        other.add_init_script("delete Uint8Array.fromBase64")
        other.goto(tab.url)
        assert other.evaluate("Uint8Array.fromBase64") is None
        assert other.evaluate(weights) == tab.evaluate(weights)
    finally:
        other.close()
