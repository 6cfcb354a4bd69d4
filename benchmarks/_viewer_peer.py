"""circuit-tracer's own viewer on the graph of viewer.py, for comparison.

Its server and its page come from the PyPI package, run with that package's Python. The
page loads six scripts from other hosts; here these requests are answered from npm
packages of the same libraries (`PEER_SCRIPTS`), and all other requests to the network
are refused, as on a machine without one.
"""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SERVE = """
import sys, time
from circuit_tracer.frontend.local_server import serve
serve(sys.argv[1], port=int(sys.argv[2]))
print("serving", flush=True)
time.sleep(3600)
"""

# What the page asks other hosts for, by the end of the address, and what answers.
PEER_SCRIPTS = {
    "/d3.js": ("d3/dist/d3.min.js", "d3-collection/dist/d3-collection.min.js"),
    "/jetpack_2024-07-20.js": ("d3-jetpack/build/d3-jetpack.cjs",),
    "/dagre.min.js": ("dagre/dist/dagre.min.js",),
    "/pako.min.js": ("pako/dist/pako.min.js",),
    "/hotserver-client-ws.js": (),  # reloads the page while it is developed
    "/npy_v0.js": (),  # reads numpy files, of which there are none
}


@contextmanager
def peer_server(python: Path, data: Path) -> Iterator[str]:
    """Its server on a folder of graphs; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [python, "-c", SERVE, str(data), str(port)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "serving":
            raise RuntimeError("circuit-tracer's server did not start")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def write_peer_data(folder: Path, doc: dict[str, Any]) -> None:
    """The graph and the list of graphs, as create_graph_files leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    slug = doc["metadata"]["slug"]
    (folder / f"{slug}.json").write_text(json.dumps(doc, indent=2))
    text = json.dumps({"graphs": [doc["metadata"]]})
    (folder / "graph-metadata.json").write_text(text)


def answer_from(tab: Any, modules: Path, origin: str) -> None:
    """Answer the page's scripts from npm packages; refuse all else off the server."""

    def handle(route: Any) -> None:
        url = route.request.url
        if url.startswith((origin, "data:", "blob:")):
            route.continue_()
            return
        for end, files in PEER_SCRIPTS.items():
            if url.endswith(end):
                text = "\n".join((modules / f).read_text() for f in files)
                # npm's build makes a d3 of its own; the page wants it added to d3.
                text = text.replace("factory(global.d3 = {}", "factory(global.d3")
                text += AXIS if "jetpack" in end else ""
                route.fulfill(body=text, content_type="text/javascript")
                return
        route.abort()

    tab.route("**/*", handle)


# A method that the page's own version of jetpack gives what conventions returns.
AXIS = """
{ const plain = d3.conventions;
  d3.conventions = (...a) => {
    const c = plain(...a);
    c.drawAxis ??= () => d3.drawAxis(c);
    return c;
  }; }
"""

# Resolves when the page holds as many glyphs as the graph has nodes, two frames later.
DRAWN = """n => new Promise((done) => {
  const look = () => (document.querySelectorAll(".link-graph text.node").length >= n
    ? requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now())))
    : requestAnimationFrame(look));
  look();
})"""

# As viewer.py's POINT, on its glyphs, which are told to by their own events; the median
# over five of the most connected nodes in sight.
PEER_POINT = """async (event) => {
  const seen = [...document.querySelectorAll(".link-graph text.node")].map((e) =>
    [e, e.__data__, e.getBoundingClientRect()]).filter(([, , r]) =>
    r.left > 0 && r.right < innerWidth && r.top > 0 && r.bottom < innerHeight);
  const size = (n) => n.sourceLinks.length + n.targetLinks.length;
  seen.sort((a, b) => size(b[1]) - size(a[1]));
  const times = [];
  for (const [, , r] of seen.slice(0, 5)) {
    const at = {clientX: (r.left + r.right) / 2, clientY: (r.top + r.bottom) / 2};
    const on = document.elementFromPoint(at.clientX, at.clientY);
    await new Promise((r) => requestAnimationFrame(() => setTimeout(r)));
    const start = performance.now();
    on.dispatchEvent(new MouseEvent(event, {...at, bubbles: true}));
    const script = performance.now() - start;
    await new Promise((r) => requestAnimationFrame(() => setTimeout(r)));
    times.push([script, performance.now() - start]);
  }
  return times.sort((a, b) => a[1] - b[1])[2];
}"""
