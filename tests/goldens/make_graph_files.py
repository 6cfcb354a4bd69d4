"""Graph files of circuit-tracer 0.5.0 for the viewer; run with its environment.

    pip install torch==2.13.0 nnsight==0.6.1 circuit-tracer==0.5.0
    python tests/goldens/make_graph_files.py

Traces the model and dictionary of `circuit_tracer_clt` and lets circuit-tracer's own
`create_graph_files` write the graph, twice, into `circuit_tracer_files`:

    shipped.json   as 0.5.0 is: errors are named 0_{layer}_{pos}, as features of layer 0
    newer.json     the same graph with the ids that its next version gives errors,
                   {layer}_-1_{pos}: the one line of that change (its pull request 102)
                   is made here at run time

The shipped file must hold an id that two nodes share; otherwise nothing is written.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from circuit_tracer import ReplacementModel, attribute
from circuit_tracer.frontend.graph_models import Node
from circuit_tracer.utils.create_graph_files import create_graph_files
from make_circuit_tracer import CLT, HERE, PROMPT, load_dictionary

OUT = HERE / "circuit_tracer_files"
MOST_FEATURES = 60  # keeps the files small


def newer_error_node(layer: int, pos: int, **rest: Any) -> Node:
    """An error's node with the ids of circuit-tracer after 0.5.0."""
    node = shipped_error_node(layer, pos, **rest)
    node.node_id, node.jsNodeId = f"{layer}_-1_{pos}", f"{layer}_-1-{pos}"
    return node


shipped_error_node = Node.error_node


def write(graph: Any, slug: str) -> dict[str, Any]:
    """The file that circuit-tracer makes, without white space between values."""
    with tempfile.TemporaryDirectory() as folder:
        create_graph_files(graph, slug, folder, node_threshold=0.9, edge_threshold=0.9)
        doc = json.loads((Path(folder) / f"{slug}.json").read_text())
    OUT.mkdir(exist_ok=True)
    text = json.dumps(doc, separators=(",", ":"))
    (OUT / f"{slug}.json").write_text(text)
    return doc


def main() -> None:
    model = ReplacementModel.from_pretrained_and_transcoders(
        str(CLT.root / "model"),
        load_dictionary(CLT),
        backend="nnsight",
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    graph = attribute(PROMPT, model, batch_size=64, max_feature_nodes=MOST_FEATURES)
    graph.cfg.tokenizer_name = str(CLT.root / "model")
    doc = write(graph, "shipped")
    same = Counter(node["node_id"] for node in doc["nodes"])
    shared = [i for i, n in same.items() if n > 1]
    if not shared:
        raise ValueError("no id is shared: choose other thresholds")
    Node.error_node = staticmethod(newer_error_node)
    other = write(graph, "newer")
    assert len(other["links"]) == len(doc["links"])
    sys.stdout.write(
        f"{len(doc['nodes'])} nodes, {len(doc['links'])} links, shared {shared}\n"
    )


if __name__ == "__main__":
    main()
