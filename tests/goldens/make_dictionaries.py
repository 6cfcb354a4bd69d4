"""Tiny dictionaries in other tools' formats, and what those tools make of them.

    python tests/goldens/make_dictionaries.py [NAME ...]

writes ``tests/goldens/formats/NAME/``: the files as the tool writes them, and
``expected.npz`` with random inputs ``read_LTD`` and what the tool itself answers,
``a_LTF`` (its activations) and ``y_LTD`` (its reconstruction in the model's own units).

Written and evaluated by the tools themselves (from the package registry, with
torch 2.13.0): circuit-tracer 0.5.0 (gemma_scope, gemma_scope_2, gemma_scope_2_clt: it
has loaders of these but no writers, so the files follow what they load), sae-lens
6.54.12, eai-sparsify 1.3.3, llamascopium 2.0.0b34, decode-clt 0.0.1.
For formats of tools that do not install, see make_dictionaries_by_layout.py.
"""

from __future__ import annotations

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


CASES: dict[str, Callable[[Path], None]] = {
    "gemma_scope": gemma_scope,
    "gemma_scope_2": gemma_scope_2,
    "gemma_scope_2_clt": gemma_scope_2_clt,
    "saelens": saelens,
    "saelens_relu": lambda folder: saelens(folder, "transcoder"),
    "sparsify": eai_sparsify,
    "sparsify_groupmax": lambda folder: eai_sparsify(folder, "groupmax"),
    "llamascopium": llamascopium,
    "llamascopium_topk": lambda folder: llamascopium(folder, "topk"),
    "decode_clt": decode_clt,
    "decode_clt_source": lambda folder: decode_clt(folder, "per_source"),
    "decode_clt_target": lambda folder: decode_clt(folder, "per_target"),
}


def main(cases: dict[str, Callable[[Path], None]]) -> None:
    for name in sys.argv[1:] or cases:
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        cases[name](folder)
        size = sum(x.stat().st_size for x in folder.rglob("*") if x.is_file())
        sys.stdout.write(f"{name}: {size} bytes\n")


if __name__ == "__main__":
    main(CASES)
