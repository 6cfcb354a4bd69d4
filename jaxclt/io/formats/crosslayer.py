"""crosslayer-transcoder: a config of class names, and one file of weights.

config.yaml               model: class_path, init_args of encoder, decoder,
                          nonlinearity, input_standardizer, output_standardizer
checkpoint.safetensors    encoder.W [L, D, F], [encoder.b [L, F]],
                          decoder.W_M [M + 1, F, D] of all layers that write to layer M,
                          decoder.b [L, D] (or, for one layer each, decoder.W
                          [L, F, D]), [nonlinearity.theta [1, L, F]],
                          [{in,out}put_standardizer.{mean,std} [L, D] or [L]]

It does not say where its activations were taken: add `feature_input_hook` and
`feature_output_hook` to config.yaml as for circuit-tracer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxclt.clt.config import CLTConfig
from jaxclt.clt.gates import GATES
from jaxclt.errors import InputError, shown
from jaxclt.files.yaml_file import read_yaml
from jaxclt.io.config_fields import whole
from jaxclt.io.formats.circuit_tracer import CONFIG
from jaxclt.io.formats.fields import READ_OF_HOOK, WRITE_OF_HOOK
from jaxclt.io.formats.pieces import (
    FileStore,
    Fold,
    LayerFiles,
    Piece,
    check_tensors,
    stored_shape,
)
from jaxclt.io.tensors import TensorFile, open_tensors

__all__ = ["WEIGHTS", "is_crosslayer", "open_crosslayer"]

WEIGHTS = "checkpoint.safetensors"
_STANDARDIZERS = {  # axes of mean and std; None: nothing is done
    "Standardizer": None,
    "DimensionwiseInputStandardizer": "LD",
    "DimensionwiseOutputStandardizer": "LD",
    "LayerwiseInputStandardizer": "L",
    "LayerwiseOutputStandardizer": "L",
}
_NONLINEARITIES = {
    "JumpReLU": "jumprelu", "ReLU": "relu", "PerLayerTopK": "topk",
}  # fmt: skip


def is_crosslayer(path: Path) -> bool:
    """Whether a config.yaml here describes a model by its classes."""
    file = path / CONFIG
    return file.is_file() and isinstance(read_yaml(file).get("model"), dict)


def open_crosslayer(path: Path) -> FileStore:
    """Open a model of crosslayer-transcoder without reading its weights.

    Raises:
      InputError: if it is incomplete or damaged, or has a part that is not known.
    """
    where = path / CONFIG
    config = read_yaml(where)
    for name, known in (
        ("feature_input_hook", READ_OF_HOOK),
        ("feature_output_hook", WRITE_OF_HOOK),
    ):
        if not isinstance(config.get(name), str) or config[name] not in known:
            raise InputError(
                f"{where}: {name} is {shown(config.get(name))}; this format does not "
                f"say where it reads and writes, so add one of {', '.join(known)}"
            )
    file = open_tensors(path / WEIGHTS)
    model = config["model"]
    parts = model.get("init_args")
    if not isinstance(parts, dict):
        raise InputError(f"{where}: model has no init_args")
    folded = bool(model.get("is_folded"))
    _class(where, model, ("CrossLayerTranscoder",))
    kind, args = _class(where, parts.get("nonlinearity"), tuple(_NONLINEARITIES))
    act = _NONLINEARITIES[kind]
    gate = GATES[act]
    L, D, F = stored_shape(file, "encoder.W", 3)
    plt = "decoder.W" in file.tensors
    wanted: dict[str, tuple[int, ...]] = {"encoder.W": (L, D, F)}
    wanted |= {"decoder.W": (L, F, D)} if plt else {"decoder.b": (L, D)}
    wanted |= {} if plt else {f"decoder.W_{m}": (m + 1, F, D) for m in range(L)}
    wanted |= {"nonlinearity.theta": (1, L, F)} if gate.switch == "theta" else {}
    optional = {"encoder.b": (L, F), "nonlinearity.bandwidth": ()}
    standard = {}
    for side in ("input_standardizer", "output_standardizer"):
        kind, _ = _class(where, parts.get(side), tuple(_STANDARDIZERS))
        axes = _STANDARDIZERS[kind]
        shapes: dict[str, tuple[int, ...]] = {"L": (L,), "LD": (L, D)}
        names = [] if axes is None else [f"{side}.mean", f"{side}.std"]
        wanted |= {name: shapes[axes or ""] for name in names}
        standard[side] = bool(names) and not folded
    check_tensors(file, wanted, optional)
    return FileStore(
        path=path,
        cfg=CLTConfig(
            n_layers=L,
            d_model=D,
            n_features=F,
            span=1 if plt else L,
            activation=act,
            k=whole(args, "k", where=where, least=1) if gate.competes else None,
            read=READ_OF_HOOK[config["feature_input_hook"]],
        ),
        format="crosslayer-transcoder",
        layers=tuple(
            _layer(file, layer, L, plt=plt, standard=standard) for layer in range(L)
        ),
        files={CONFIG: where, WEIGHTS: path / WEIGHTS},
        write=WRITE_OF_HOOK[config["feature_output_hook"]],
    )


def _class(
    where: Path, part: Any, known: tuple[str, ...]
) -> tuple[str, Mapping[str, Any]]:
    """Name of a part's class, and its arguments."""
    path = part.get("class_path") if isinstance(part, dict) else None
    name = path.rpartition(".")[2] if isinstance(path, str) else None
    if name not in known or not isinstance(part, dict):
        raise InputError(
            f"{where}: class_path {shown(path)} cannot be represented here; it must "
            f"end in one of {', '.join(known)}"
        )
    args = part.get("init_args")
    return name, args if isinstance(args, dict) else {}


def _layer(
    file: TensorFile,
    layer: int,
    n_layers: int,
    *,
    plt: bool,
    standard: Mapping[str, bool],
) -> LayerFiles:
    def part(name: str, at: int = layer) -> Piece:
        return Piece(file, name, (at,))

    def of(side: str, name: str, at: int = layer) -> Piece:
        return part(f"{side}_standardizer.{name}", at)

    targets = range(layer, layer + 1 if plt else n_layers)
    reads, writes = standard["input_standardizer"], standard["output_standardizer"]
    std = of("output", "std") if writes else 1.0
    b_dec = [] if plt else [(part("decoder.b"), std)]
    return LayerFiles(
        W_enc=Piece(file, "encoder.W", (layer,), transposed=True),
        b_enc=Piece.found(file, "encoder.b", layer),
        decoder=tuple(
            part("decoder.W") if plt else part(f"decoder.W_{m}") for m in targets
        ),
        b_dec=(*b_dec, *([(of("output", "mean"), 1.0)] if writes else [])),
        theta=Piece.found(file, "nonlinearity.theta", 0, layer),
        fold=Fold(
            read_mean=of("input", "mean") if reads else None,
            read_std=of("input", "std") if reads else None,
            write_gain=tuple(of("output", "std", m) for m in targets) if writes else (),
            theta_floor=0.0,
        ),
    )
