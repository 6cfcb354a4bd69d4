"""Tiny dictionaries in other tools' formats, and what those tools make of them.

    python tests/goldens/make_dictionaries.py [NAME ...]

writes ``tests/goldens/formats/NAME/``: the files as the tool writes them, and
``expected.npz`` with random inputs ``read_LTD`` and what the tool itself answers,
``a_LTF`` (its activations) and ``y_LTD`` (its reconstruction in the model's own units).

Written and evaluated by the tools themselves (from the package registry, with
torch 2.13.0): circuit-tracer 0.5.0 (gemma_scope, gemma_scope_2, gemma_scope_2_clt: it
has loaders of these but no writers, so the files follow what they load), sae-lens
6.54.12, eai-sparsify 1.3.3, llamascopium 2.0.0b34, decode-clt 0.0.1.

Three do not install from there: clt_training*, crosslayer and topk are written here by
the layout of their sources, and what is expected is computed by plain numpy loops below
that restate those sources' formulas (EleutherAI/clt-training sparsify/runner.py and
sparse_coder.py; Goreg12345/crosslayer-transcoder model/; TopK of circuit-tracer's
repository, which keeps signs).
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.numpy
import yaml

HERE = Path(__file__).parent / "formats"
L, D, F, T = 3, 6, 10, 5


class Random:
    """Numbers that are the same everywhere."""

    def __init__(self, seed: int) -> None:
        self.bits = np.random.default_rng(seed)  # noqa: TID251

    def __call__(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return (self.bits.standard_normal(shape) * scale).astype(np.float32)

    def positive(self, *shape: int) -> np.ndarray:
        return (0.5 + self.bits.random(shape)).astype(np.float32)


def save(folder: Path, read_LTD, a_LTF, y_LTD) -> None:
    """What the tool answered, and files as readable as any."""
    arrays = {"read_LTD": read_LTD, "a_LTF": a_LTF, "y_LTD": y_LTD}
    np.savez(folder / "expected.npz", **{k: np.asarray(x) for k, x in arrays.items()})
    for file in folder.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    assert (np.asarray(a_LTF) != 0).mean() not in (0.0, 1.0), "all or none active"


# -- circuit-tracer's loaders of GemmaScope's files ------------------------------------


def scope_tensors(r: Random, prefix: str, *, writes: tuple[int, ...] = ()) -> dict:
    return {
        f"{prefix}_enc": r(D, F),
        f"{prefix}_dec": r(F, *writes, D),
        "b_enc": r(F, scale=0.1),
        "b_dec": r(D),
        "threshold": 0.3 * r.positive(F),
    }


def scope_config(folder: Path, kind: str, read: str, files: list[str]) -> None:
    config = {
        "model_kind": kind,
        "model_name": "tests/tiny",
        "feature_input_hook": read,
        "feature_output_hook": "hook_mlp_out",
        "transcoders": files,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def gemma_scope(folder: Path) -> None:
    import torch
    from circuit_tracer.transcoder import single_layer_transcoder as lib

    r = Random(1)
    files = [f"layer_{i}/params.npz" for i in range(L)]
    for file in files:
        (folder / file).parent.mkdir()
        np.savez(folder / file, **scope_tensors(r, "W"))
    scope_config(folder, "transcoder_set", "ln2.hook_normalized", files)
    x, cpu = torch.tensor(r(L, T, D)), torch.device("cpu")
    coders = [
        lib.load_gemma_scope_transcoder(str(folder / f), i, device=cpu)
        for i, f in enumerate(files)
    ]
    a = [coder.encode(x[i]) for i, coder in enumerate(coders)]
    y = [coder.decode(a[i], x[i]) for i, coder in enumerate(coders)]
    save(folder, x, torch.stack(a).detach(), torch.stack(y).detach())


def gemma_scope_2(folder: Path) -> None:
    import torch
    from circuit_tracer.transcoder import single_layer_transcoder as lib

    r = Random(2)
    files = [f"layer_{i}/params.safetensors" for i in range(L)]
    for file in files:
        (folder / file).parent.mkdir()
        tensors = scope_tensors(r, "w") | {"affine_skip_connection": r(D, D)}
        safetensors.numpy.save_file(tensors, folder / file)
    scope_config(folder, "transcoder_set", "mlp.hook_in", files)
    x, cpu = torch.tensor(r(L, T, D)), torch.device("cpu")
    coders = [
        lib.load_gemma_scope_2_transcoder(str(folder / f), i, device=cpu)
        for i, f in enumerate(files)
    ]
    a = [coder.encode(x[i]) for i, coder in enumerate(coders)]
    y = [coder.decode(a[i], x[i]) for i, coder in enumerate(coders)]
    save(folder, x, torch.stack(a).detach(), torch.stack(y).detach())


def gemma_scope_2_clt(folder: Path) -> None:
    import torch
    from circuit_tracer.transcoder import cross_layer_transcoder as lib

    r = Random(3)
    files = [f"params_layer_{i}.safetensors" for i in range(L)]
    for file in files:
        tensors = scope_tensors(r, "w", writes=(L,))
        tensors["affine_skip_connection"] = r(D, D)
        safetensors.numpy.save_file(tensors, folder / file)
    scope_config(folder, "cross_layer_transcoder", "mlp.hook_in", files)
    x = torch.tensor(r(L, T, D))
    paths = {i: str(folder / file) for i, file in enumerate(files)}
    coder = lib.load_gemma_scope_2_clt(
        paths | {L: ""},  # this version leaves out the last of what it is given
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    a = coder.encode(x)
    save(folder, x, a.detach(), coder.decode(a.to_sparse(), x).detach())


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


# -- SAELens ---------------------------------------------------------------------------


def saelens(folder: Path, architecture: str = "jumprelu_skip_transcoder") -> None:
    import torch
    from sae_lens import SAE

    r = Random(5)
    x, a, y = torch.tensor(r(L, T, D)), [], []
    for i in range(L):
        config = {
            "architecture": architecture,
            "d_in": D,
            "d_sae": F,
            "d_out": D,
            "apply_b_dec_to_input": False,
            "metadata": {
                "model_name": "tests/tiny",
                "hook_name": f"blocks.{i}.ln2.hook_normalized",
                "hook_name_out": f"blocks.{i}.hook_mlp_out",
            },
        }
        coder = SAE.from_dict(config)
        values = {"W_enc": r(D, F), "W_dec": r(F, D), "b_enc": r(F), "b_dec": r(D)}
        if "jumprelu" in architecture:
            # some below zero: its ReLU then decides
            values["threshold"] = r(F, scale=0.5)
        if "skip" in architecture:
            values["W_skip"] = r(D, D)
        coder.load_state_dict({k: torch.tensor(v) for k, v in values.items()})
        coder.save_model(folder / f"blocks.{i}.mlp")
        a.append(coder.encode(x[i]))
        y.append(coder(x[i]))
    save(folder, x, torch.stack(a).detach(), torch.stack(y).detach())


# -- sparsify --------------------------------------------------------------------------


def eai_sparsify(folder: Path, activation: str = "topk") -> None:
    import torch
    from sparsify import SparseCoder, SparseCoderConfig

    torch.compiler.set_stance("force_eager")
    r = Random(6)
    x, a, y = torch.tensor(r(L, T, D)), torch.zeros(L, T, F), []
    for i in range(L):
        cfg = SparseCoderConfig(
            activation=activation, num_latents=F, k=5, transcode=True,
            skip_connection=True,
        )  # fmt: skip
        coder = SparseCoder(D, cfg)
        values = {
            "encoder.weight": r(F, D), "encoder.bias": r(F, scale=0.5) - 1.0,
            "W_dec": r(F, D), "b_dec": r(D), "W_skip": r(D, D),
        }  # fmt: skip
        coder.load_state_dict({k: torch.tensor(v) for k, v in values.items()})
        coder.save_to_disk(folder / f"layers.{i}.mlp")
        found = coder.encode(x[i])
        a[i].scatter_(1, found.top_indices, found.top_acts.detach())
        y.append(coder(x[i], y=x[i]).sae_out)
    save(folder, x, a, torch.stack(y).detach())


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


# -- llamascopium ----------------------------------------------------------------------


def llamascopium(folder: Path, act: str = "jumprelu") -> None:
    import torch
    from llamascopium.models.clt import CLTConfig, CrossLayerTranscoder

    r = Random(8)
    cfg = CLTConfig(
        d_model=D, expansion_factor=F / D, act_fn=act, top_k=3, device="cpu",
        dtype=torch.float32, norm_activation="dataset-wise",
        sparsity_include_decoder_norm=True,
        hook_points_in=[f"blocks.{i}.hook_resid_mid" for i in range(L)],
        hook_points_out=[f"blocks.{i}.hook_mlp_out" for i in range(L)],
    )  # fmt: skip
    coder = CrossLayerTranscoder(cfg)
    with torch.no_grad():
        coder.W_E.copy_(torch.tensor(r(L, D, F)))
        coder.b_E.copy_(torch.tensor(r(L, F)))
        for m in range(L):
            coder.W_D[m].copy_(torch.tensor(r(m + 1, F, D)))
            coder.b_D[m].copy_(torch.tensor(r(D)))
        if act == "jumprelu":
            coder.activation_function.log_jumprelu_threshold.copy_(
                torch.tensor(r(L, F, scale=0.5) + 1)
            )
    hooks = [*cfg.hook_points_in, *cfg.hook_points_out]
    norms = {hook: float(3 * r.positive(1)[0]) for hook in hooks}
    coder.set_dataset_average_activation_norm(norms)
    coder.save_pretrained(folder)
    coder.cfg.save_hyperparameters(folder)
    x = torch.tensor(r(L, T, D))
    batch = {hook: x[i] for i, hook in enumerate(cfg.hook_points_in)}
    scaled = coder.normalize_activations(batch)
    a = coder.encode(coder.prepare_input(scaled)[0])  # [T, L, F]
    y = coder.decode(a)
    out = [y[i] / (D**0.5 / norms[hook]) for i, hook in enumerate(cfg.hook_points_out)]
    save(folder, x, a.detach().permute(1, 0, 2), torch.stack(out).detach())


# -- decode-clt ------------------------------------------------------------------------


def decode_clt(folder: Path, tying: str = "none") -> None:
    import torch
    from clt.config import CLTConfig
    from clt.models.clt import CrossLayerTranscoder
    from safetensors.torch import save_file

    r = Random(10)
    cfg = CLTConfig(
        num_features=F, num_layers=L, d_model=D, model_name="tests/tiny",
        activation_fn="jumprelu", decoder_tying=tying,
        tl_input_template="blocks.{}.ln2.hook_normalized",
        tl_output_template="blocks.{}.hook_mlp_out",
    )  # fmt: skip
    coder = CrossLayerTranscoder(cfg, None, device=torch.device("cpu"))
    state = {
        k: torch.tensor(r(*x.shape, scale=0.5 if "threshold" in k else 1.0))
        for k, x in coder.state_dict().items()
    }
    coder.load_state_dict(state)
    # as CheckpointManager and the trainer do
    save_file(coder.state_dict(), folder / "clt_checkpoint_latest.safetensors")
    cfg.to_json(str(folder / "cfg.json"))
    x = torch.tensor(r(L, T, D))
    a = {i: coder.encode(x[i], i) for i in range(L)}
    y = [coder.decode(a, i) for i in range(L)]
    stacked = torch.stack([a[i] for i in range(L)])
    save(folder, x, stacked.detach(), torch.stack(y).detach())


# -- crosslayer-transcoder -------------------------------------------------------------


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
    "gemma_scope": gemma_scope,
    "gemma_scope_2": gemma_scope_2,
    "gemma_scope_2_clt": gemma_scope_2_clt,
    "topk": topk,
    "saelens": saelens,
    "saelens_relu": lambda folder: saelens(folder, "transcoder"),
    "sparsify": eai_sparsify,
    "sparsify_groupmax": lambda folder: eai_sparsify(folder, "groupmax"),
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
    "llamascopium": llamascopium,
    "llamascopium_topk": lambda folder: llamascopium(folder, "topk"),
    "decode_clt": decode_clt,
    "decode_clt_source": lambda folder: decode_clt(folder, "per_source"),
    "decode_clt_target": lambda folder: decode_clt(folder, "per_target"),
    "crosslayer": crosslayer,
}


def main() -> None:
    for name in sys.argv[1:] or CASES:
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        CASES[name](folder)
        size = sum(x.stat().st_size for x in folder.rglob("*") if x.is_file())
        sys.stdout.write(f"{name}: {size} bytes\n")


if __name__ == "__main__":
    main()
