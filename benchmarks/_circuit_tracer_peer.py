"""One timed run of circuit-tracer 0.5.0, with its own Python; see vs_circuit_tracer.py.

    python _circuit_tracer_peer.py --model DIR --dictionary DIR --tokens 1,5,7 \
        --batch-size 64 --variant shipped --out answer.npz

Everything is loaded first, then `attribute` alone is timed, then `prune_graph`. Beside
the answer a .json of the same name says how long it took.

The variant `grouped` replaces, at run time, the method that scores features against a
layer's gradients. As shipped it gathers a gradient for every decoder vector, (batch x
vectors x d_model) per layer. Grouped by (write layer, position), the same products are
one matmul per position and gather nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from _timing import load_average, peak_rss_gib, repeat, timed
from circuit_tracer import Graph, ReplacementModel, attribute
from circuit_tracer.attribution.context_nnsight import AttributionContext
from circuit_tracer.graph import prune_graph
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set


def group(context: AttributionContext) -> list[list[tuple[int, slice]]]:
    """Order the decoder vectors by (write layer, position); each layer's slices."""
    layer_V, pos_V = context.decoder_locations
    L, T, _ = context.activation_matrix.shape
    place_V = layer_V * T + pos_V
    order_V = torch.argsort(place_V, stable=True)
    context.decoder_vecs = context.decoder_vecs[order_V].detach()
    context.encoder_to_decoder_map = context.encoder_to_decoder_map[order_V]
    context.decoder_locations = context.decoder_locations[:, order_V]
    start = torch.searchsorted(place_V[order_V], torch.arange(L * T + 1)).tolist()
    return [
        [
            (p, slice(start[i], start[i + 1]))
            for p, i in enumerate(range(layer * T, (layer + 1) * T))
            if start[i] < start[i + 1]
        ]
        for layer in range(L)
    ]


def grouped_scores(self: AttributionContext, layer: int, grads: torch.Tensor) -> None:
    """What compute_feature_attributions does, one matmul per position."""
    if not hasattr(self, "slices_of_layer"):
        self.slices_of_layer = group(self)
    for pos, rows in self.slices_of_layer[layer]:
        vec_VD = self.decoder_vecs[rows]
        score_VB = vec_VD @ grads[:, pos].to(vec_VD.dtype).T
        self._batch_buffer.index_add_(0, self.encoder_to_decoder_map[rows], score_VB)


def load(model: Path, dictionary: Path) -> ReplacementModel:
    """Both, in float32, decoders read from disk when needed as is its default."""
    config = yaml.safe_load((dictionary / "config.yaml").read_text())
    device = torch.device("cpu")
    common: dict[str, Any] = {
        "feature_input_hook": config["feature_input_hook"],
        "feature_output_hook": config["feature_output_hook"],
        "scan": "benchmark",
        "device": device,
        "dtype": torch.float32,
        "lazy_encoder": False,
        "lazy_decoder": True,
    }
    if config["model_kind"] == "cross_layer_transcoder":
        transcoders = load_clt(str(dictionary), **common)
    else:
        n_layers = len(list(dictionary.glob("layer_*.safetensors")))
        files = {l: str(dictionary / f"layer_{l}.safetensors") for l in range(n_layers)}
        transcoders = load_transcoder_set(files, **common)
    return ReplacementModel.from_pretrained_and_transcoders(
        str(model), transcoders, backend="nnsight", device=device, dtype=torch.float32
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dictionary", type=Path, required=True)
    parser.add_argument("--tokens", required=True, help="ids, bos first: 1,5,7")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--variant", choices=("shipped", "grouped"), default="shipped")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--at-most", type=float, default=120.0, help="s, see _timing")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    load_before = load_average()
    if args.variant == "grouped":
        AttributionContext.compute_feature_attributions = grouped_scores
    token_T = torch.tensor([int(i) for i in args.tokens.split(",")])
    model = load(args.model, args.dictionary)
    loaded = peak_rss_gib()
    last: list[Graph] = []

    def run(**limit: int) -> None:
        last.clear()  # never two graphs at once
        gc.collect()
        last.append(attribute(token_T, model, batch_size=args.batch_size, **limit))

    # Two batches of rows, so that nothing is timed for being the first time.
    _, warm_s, _ = timed(lambda: run(max_feature_nodes=args.batch_size))
    times = repeat(run, args.repeats, args.at_most)
    attributed = peak_rss_gib()
    graph = last[0]
    if graph.input_tokens.tolist() != token_T.tolist():
        raise ValueError(f"circuit-tracer traced other tokens: {graph.input_tokens}")
    _, prune_s, _ = timed(lambda: prune_graph(graph, 0.8, 0.98))
    report = {
        "variant": args.variant,
        "batch_size": args.batch_size,
        "attribute": times.summary(),
        "warm_up_s": warm_s,
        "prune_s": prune_s,
        "peak_rss_loaded_gib": loaded,
        "peak_rss_gib": attributed,
        "peak_rss_with_prune_gib": peak_rss_gib(),
        "circuit_tracer": version("circuit-tracer"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": load_before,
    }
    np.savez(
        args.out,
        edge_NN=graph.adjacency_matrix.numpy(),
        active_A3=graph.active_features.numpy().astype(np.int32),
        token_K=graph.logit_token_ids.numpy().astype(np.int32),
        prob_K=graph.logit_probabilities.detach().numpy(),
    )
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
