"""Tiny dictionaries in the formats of tools that do not install from the registry.

    python tests/goldens/make_dictionaries_by_layout.py [NAME ...]

writes what make_dictionaries.py does, by the layout of the tools' sources; what is
expected is computed by the plain numpy loops below, which restate their formulas:
EleutherAI/clt-training sparsify/runner.py and sparse_coder.py,
Goreg12345/crosslayer-transcoder model/, and the TopK of circuit-tracer's repository,
which keeps signs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.numpy
import yaml
from make_dictionaries import D, F, L, Random, T, main, save


def topk(folder: Path) -> None:
    r = Random(4)
    k, x, a, y = 3, r(L, T, D), [], []
    for i in range(L):
        t = {"W_enc": r(F, D), "W_dec": r(F, D), "b_enc": r(F) - 1.5, "b_dec": r(D)}
        safetensors.numpy.save_file(t, folder / f"layer_{i}.safetensors")
        pre = x[i] @ t["W_enc"].T + t["b_enc"]
        kept = pre >= np.sort(pre, 1)[:, -k, None]
        a.append(np.where(kept, pre, 0))
        y.append(a[i] @ t["W_dec"] + t["b_dec"])
    config = {
        "model_kind": "transcoder_set",
        "model_name": "tests/tiny",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
        "activation": "topk",
        "k": k,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert (np.stack(a) < 0).any(), "signs would not be told apart"
    save(folder, x, np.stack(a), np.stack(y))


def clt_training(folder: Path, **options: object) -> None:  # noqa: C901, PLR0915
    """By the formulas of CrossLayerRunner, MidDecoder and SparseCoder."""
    r = Random(7)
    cfg = {"coalesce_topk": "none", "normalize_io": True, "post_encoder_scale": True,
           "divide_cross_layer": True, "per_source_tied": False,
           "skip_connection": True, "transcode": True, "activation": "topk", "k": 4,
           "num_latents": F, "expansion_factor": 32, "topk_coalesced": False,
           "secondary_target_tied": False, "train_post_encoder": True,
           "matryoshka": False, "multi_topk": False, "normalize_decoder": True,
           "dtype": "float32", "tp_output": True, "use_fp8": False}  # fmt: skip
    cfg |= options
    x, coders = r(L, T, D), []
    for i in range(L):
        n, own = L - i, cfg["coalesce_topk"] == "none"
        t = {"encoder.weight": r(F, D), "encoder.bias": r(F, scale=0.5)}
        rows = F * (i + 1) if cfg["coalesce_topk"] == "per-layer" else F
        many = own and not cfg["per_source_tied"]
        t |= (
            {f"W_decs.{j}": r(F, D) for j in range(n)}
            if many
            else {"W_dec": r(rows, D)}
        )
        t |= {f"b_decs.{j}": r(D) for j in range(n)} if own else {"b_dec": r(D)}
        if cfg["skip_connection"]:
            zero = np.zeros((D, D), np.float32)
            skips = {f"W_skips.{j}": zero if j else r(D, D) for j in range(n)}
            t |= skips if own else {"W_skip": r(D, D)}
        t |= {f"post_encs.{j}": np.zeros(F, np.float32) for j in range(n)}
        if cfg["post_encoder_scale"]:
            t |= {f"post_enc_scales.{j}": r.positive(F) for j in range(n)}
        if cfg["normalize_io"]:
            t |= {"in_norm": 3 * r.positive(1), "out_norm": 2 * r.positive(1)}
        where = folder / f"layers.{i}.mlp"
        where.mkdir()
        safetensors.numpy.save_file(t, where / "sae.safetensors")
        config = {**cfg, "n_targets": n, "n_sources": i + 1, "d_in": D}
        (where / "cfg.json").write_text(json.dumps(config))
        coders.append(t)
    root = D**0.5
    seen, a = [], np.zeros((L, T, F), np.float32)
    for i, t in enumerate(coders):
        seen.append(x[i] * (root / t["in_norm"] if cfg["normalize_io"] else 1))
        pre = np.maximum(seen[i] @ t["encoder.weight"].T + t["encoder.bias"], 0)
        a[i] = np.where(pre >= np.sort(pre, 1)[:, -cfg["k"], None], pre, 0)
    y = []
    for m, own in enumerate(coders):
        total, others = np.zeros((T, D), np.float32), np.zeros((T, D), np.float32)
        for s in range(m + 1):
            t, j = coders[s], m - s
            scale = t[f"post_enc_scales.{j}"] if cfg["post_encoder_scale"] else 1.0
            acts = a[s] * scale
            if cfg["coalesce_topk"] == "concat":
                total += acts @ own["W_dec"]
                continue
            if cfg["coalesce_topk"] == "per-layer":
                total += acts @ own["W_dec"][s * F : (s + 1) * F]
                continue
            W = t["W_dec"] if cfg["per_source_tied"] else t[f"W_decs.{j}"]
            out = acts @ W + t[f"b_decs.{j}"]
            if s == m:
                total += out
            else:
                others += out
        divide = max(1, m) if cfg["divide_cross_layer"] else 1
        total += others / divide
        total += 0 if cfg["coalesce_topk"] == "none" else own["b_dec"]
        if cfg["skip_connection"]:
            total += seen[m] @ own.get("W_skips.0", own.get("W_skip")).T
        y.append(total * (own["out_norm"] / root if cfg["normalize_io"] else 1))
    save(folder, x, a, np.stack(y))


def crosslayer(folder: Path) -> None:
    """By the formulas of CrossLayerTranscoder, JumpReLU and Dimensionwise*."""
    r = Random(9)
    package = "crosslayer_transcoder.model"
    size = {"n_layers": L, "activation_dim": D}
    coder = {"d_acts": D, "d_features": F, "n_layers": L}
    parts = {
        "encoder": ("clt.Encoder", coder),
        "decoder": ("clt.CrosslayerDecoder", coder),
        "nonlinearity": ("jumprelu.JumpReLU", {"theta": 0.03, "bandwidth": 1.0}),
        "input_standardizer": ("standardize.DimensionwiseInputStandardizer", size),
        "output_standardizer": ("standardize.DimensionwiseOutputStandardizer", size),
    }
    config = {
        "model": {
            "class_path": f"{package}.clt.CrossLayerTranscoder",
            "init_args": {
                name: {"class_path": f"{package}.{path}", "init_args": args}
                for name, (path, args) in parts.items()
            },
        },
        "feature_input_hook": "hook_resid_mid",
        "feature_output_hook": "hook_mlp_out",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    t = {"encoder.W": r(L, D, F), "encoder.b": r(L, F), "decoder.b": r(L, D)}
    t |= {f"decoder.W_{m}": r(m + 1, F, D) for m in range(L)}
    t |= {"nonlinearity.theta": r(1, L, F, scale=0.5)}
    t |= {"nonlinearity.bandwidth": np.array(1.0, np.float32)}
    for side in ("input", "output"):
        t |= {f"{side}_standardizer.mean": r(L, D)}
        t |= {f"{side}_standardizer.std": r.positive(L, D)}
    safetensors.numpy.save_file(t, folder / "checkpoint.safetensors")
    x, y = r(L, T, D), []
    seen = (x - t["input_standardizer.mean"][:, None]) / t["input_standardizer.std"][
        :, None
    ]
    pre = np.einsum("ltd,ldf->ltf", seen, t["encoder.W"]) + t["encoder.b"][:, None]
    a = pre * ((pre > t["nonlinearity.theta"][0][:, None]) & (pre > 0))
    for m in range(L):
        out = (
            sum(a[s] @ t[f"decoder.W_{m}"][s] for s in range(m + 1)) + t["decoder.b"][m]
        )
        mean, std = (t[f"output_standardizer.{n}"][m] for n in ("mean", "std"))
        y.append(out * std + mean)
    save(folder, x, a, np.stack(y))


CASES: dict[str, Callable[[Path], None]] = {
    "topk": topk,
    "clt_training": clt_training,
    "clt_training_tied": lambda folder: clt_training(
        folder, per_source_tied=True, normalize_io=False, divide_cross_layer=False
    ),
    "clt_training_concat": lambda folder: clt_training(
        folder, coalesce_topk="concat", skip_connection=False
    ),
    "clt_training_per_layer": lambda folder: clt_training(
        folder, coalesce_topk="per-layer", post_encoder_scale=False
    ),
    "crosslayer": crosslayer,
}


if __name__ == "__main__":
    main(CASES)
