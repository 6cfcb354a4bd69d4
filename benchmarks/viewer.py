"""Does the page stay quick on a graph of 10,000 nodes and 200,000 links?

Makes such a graph, opens its page in headless Chromium without a GPU (software
rendering) and measures, as the median of several tries:

- interactive: from the start of the navigation to the graph drawn and the main thread
  free again (two animation frames after the page's script ended), and the CPU time the
  main thread took for it, which other work on the machine does not change;
- hover: from moving the pointer onto a node until the frame that shows it;
- select: the same for a click on the most connected node.

The aim is less than 1.5 s and 50 ms. Run:

    python benchmarks/viewer.py [--nodes 10000] [--links 200000] [--tries 5]

Needs playwright and a chromium; takes about a minute. Beside it circuit-tracer's own
viewer on the same graph, from its own server (see `_viewer_peer`), with its Python and
a folder where npm installed ``d3@7.9.0 d3-jetpack@2.3.0 d3-collection@1.0.7
dagre@0.8.5 pako@2.1.0``:

    python benchmarks/viewer.py --peer-python ct/bin/python --peer-libs node_modules
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _viewer_peer import DRAWN, PEER_POINT, answer_from, peer_server, write_peer_data

from jaxclt.viewer.page import page

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FRAMES = "new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))"


def synthetic(n_nodes: int, n_links: int, n_layers: int = 26, n_tokens: int = 40):
    """A layered graph whose links run up and never to the left."""
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def uniform(*shape: int) -> np.ndarray:
        return np.asarray(jax.random.uniform(next(keys), shape), np.float64)

    n_logits = 10
    n_features = n_nodes - n_logits - n_tokens
    layer = np.sort((uniform(n_features) * n_layers).astype(int))
    pos = (uniform(n_features) ** 0.6 * n_tokens).astype(int)
    influence = np.round(np.sort(uniform(n_features)), 6)
    tokens = [f" token{t}" for t in range(n_tokens)]
    common = {"token_prob": 0.0, "is_target_logit": False, "clerp": ""}
    nodes = [
        {
            **common,
            "node_id": f"E_{t}_{t}",
            "jsNodeId": f"E_{t}-{t}",
            "feature": t,
            "layer": "E",
            "ctx_idx": t,
            "feature_type": "embedding",
            "influence": 0.1,
        }
        for t in range(n_tokens)
    ]
    nodes += [
        {
            **common,
            "node_id": f"{layer[i]}_{i}_{pos[i]}",
            "jsNodeId": f"{layer[i]}_{i}-0",
            "feature": int((layer[i] + i) * (layer[i] + i + 1) // 2 + i),
            "layer": str(layer[i]),
            "ctx_idx": int(pos[i]),
            "feature_type": "cross layer transcoder",
            "influence": float(influence[i]),
            "activation": 1.5,
        }
        for i in np.argsort(uniform(n_features)).tolist()
    ]
    nodes += [
        {
            **common,
            "node_id": f"{n_layers + 1}_{k}_{n_tokens - 1}",
            "jsNodeId": f"L_{k}-{n_tokens - 1}",
            "feature": k,
            "layer": str(n_layers + 1),
            "ctx_idx": n_tokens - 1,
            "feature_type": "logit",
            "token_prob": 0.5 / 2**k,
            "clerp": f'Output " word{k}" (p={0.5 / 2**k:.3f})',
            "influence": None,
        }
        for k in range(n_logits)
    ]
    height = np.array([-1 if n["layer"] == "E" else int(n["layer"]) for n in nodes])
    place = np.array([n["ctx_idx"] for n in nodes])
    a, b = (uniform(2, 8 * n_links) * n_nodes).astype(int)
    fits = (height[a] < height[b]) & (place[a] <= place[b])
    a, b = a[fits][:n_links], b[fits][:n_links]
    weight = np.round((uniform(len(a)) - 0.4) * uniform(len(a)) ** 3, 6)
    links = [
        {"source": nodes[s]["node_id"], "target": nodes[t]["node_id"], "weight": w}
        for s, t, w in zip(a, b, weight.tolist(), strict=True)
    ]
    meta = {"slug": "big", "scan": "m", "prompt": "".join(tokens)}
    meta["prompt_tokens"] = tokens
    return {"metadata": meta, "qParams": {}, "nodes": nodes, "links": links}


# Hover over, or click on, the five most connected nodes in sight; the median of each
# event's script time and of the time until the frame after it.
POINT = """async (event) => {
  const {app} = __jaxclt, {model} = app, box = document.getElementById("graph");
  const size = (n) => model.insOf(n).length + model.outsOf(n).length;
  const rect = box.getBoundingClientRect(), times = [];
  const seen = model.nodes.map((n) => [n, __jaxclt.where(n.id)]).filter(([, p]) =>
    p.x > rect.left + 60 && p.x < rect.right && p.y < rect.bottom - 40);
  seen.sort((a, b) => size(b[0]) - size(a[0]));
  for (const [, p] of seen.slice(0, 5)) {
    await new Promise((r) => requestAnimationFrame(() => setTimeout(r)));
    const start = performance.now();
    const Kind = event === "click" ? MouseEvent : PointerEvent;
    box.dispatchEvent(new Kind(event, {clientX: p.x, clientY: p.y, bubbles: true}));
    const script = performance.now() - start;
    await new Promise((r) => requestAnimationFrame(() => setTimeout(r)));
    times.push([script, performance.now() - start]);
  }
  return times.sort((a, b) => a[1] - b[1])[2];
}"""


def clock(
    tab: Any,
    address: str,
    free: str,
    argument: Any,
    hover: tuple[str, str],
    found: dict[str, list[float]],
) -> None:
    """Open a page, then hover and select; milliseconds are added to `found`.

    Args:
      tab: a new one.
      address: of the page.
      free: script that says when it was interactive.
      argument: of that script.
      hover: script that points at nodes, and the event it hovers with.
      found: times by what they are of.
    """
    devtools = tab.context.new_cdp_session(tab)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})
    tab.goto(address)
    found.setdefault("interactive", []).append(tab.evaluate(free, argument))
    metrics = devtools.send("Performance.getMetrics")["metrics"]
    busy = next(m["value"] for m in metrics if m["name"] == "TaskDuration")
    found.setdefault("interactive, main thread's CPU", []).append(1e3 * busy)
    point, over = hover
    for name, event in (("hover", over), ("select", "click")):
        script, frame = tab.evaluate(point, event)
        found.setdefault(f"{name}, script", []).append(script)
        found.setdefault(f"{name}, frame shown", []).append(frame)


def measure(html: str, tries: int) -> dict[str, float]:
    """Medians in milliseconds."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        path = Path(folder) / "index.html"
        path.write_text(html, encoding="utf-8")
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        for _ in range(tries):
            tab = browser.new_page(viewport={"width": 1280, "height": 800})
            free = f"{FRAMES}.then(() => performance.now())"
            clock(tab, path.as_uri(), free, None, (POINT, "pointermove"), found)
            tab.close()
        browser.close()
    return {name: round(statistics.median(times), 1) for name, times in found.items()}


def measure_peer(
    doc: dict, python: Path, modules: Path, tries: int
) -> dict[str, float]:
    """The same of circuit-tracer's viewer; medians in milliseconds."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        write_peer_data(Path(folder), doc)
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        with peer_server(python, Path(folder)) as origin:
            for _ in range(tries):
                tab = browser.new_page(viewport={"width": 1280, "height": 800})
                tab.set_default_timeout(180_000)
                answer_from(tab, modules, origin)
                address, n = f"{origin}/index.html", len(doc["nodes"])
                clock(tab, address, DRAWN, n, (PEER_POINT, "mousemove"), found)
                tab.close()
        browser.close()
    return {name: round(statistics.median(times), 1) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--links", type=int, default=200_000)
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--peer-python", type=Path, help="that has circuit-tracer")
    parser.add_argument("--peer-libs", type=Path, help="node_modules, see above")
    config = parser.parse_args()
    doc = synthetic(config.nodes, config.links)
    html = page(doc)
    peer = None
    if config.peer_python and config.peer_libs:
        peer = measure_peer(doc, config.peer_python, config.peer_libs, config.tries)
    result = {
        "nodes": config.nodes,
        "links": config.links,
        "page_mb": round(len(html) / 1e6, 1),
        "ms": measure(html, config.tries),
        "circuit_tracer_ms": peer,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "load": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
