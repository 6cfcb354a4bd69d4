"""OpenMOSS's cross-layer transcoders (llamascopium, formerly Language-Model-SAEs).

config.json                sae_type clt, act_fn, norm_activation, hook points, ...
sae_weights.safetensors    W_E [L, D, F], b_E [L, F], W_D.M [M + 1, F, D] of all layers
                           that write to layer M, b_D.M [D],
                           [activation_function.log_jumprelu_threshold [L, F]],
                           [dataset_average_activation_norm.HOOK]

With `sparsity_include_decoder_norm` the gate looks at activations times the norm of all
that a feature writes: thresholds are divided by it here, and of a TopK the activations
are given in units of it (what is written stays the same).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxclt.clt.config import CLTConfig, ReadSite
from jaxclt.clt.gates import GATES
from jaxclt.errors import InputError, shown
from jaxclt.files.json_file import read_json
from jaxclt.io.config_fields import whole
from jaxclt.io.formats.fields import READS, WRITES, check_fields, of_layer
from jaxclt.io.formats.pieces import (
    FileStore,
    Fold,
    LayerFiles,
    Piece,
    WriteSite,
    check_tensors,
    stored_shape,
)
from jaxclt.io.tensors import TensorFile, open_tensors, refuse_pickles

__all__ = ["CONFIG", "WEIGHTS", "is_llamascopium", "open_llamascopium"]

CONFIG = "config.json"
WEIGHTS = tuple(
    f"{name}.safetensors"
    for name in ("sae_weights", "checkpoints/pruned", "checkpoints/final")
)
_ACTIVATIONS: dict[str, str] = {
    "relu": "relu",
    "jumprelu": "jumprelu",
    "topk": "topk",
}
_NORM = "dataset_average_activation_norm."
_THETA = "activation_function.log_jumprelu_threshold"
_DOES_NOT_MATTER = (
    *("d_model", "expansion_factor", "top_k", "sparsity_include_decoder_norm"),
    *("hook_points_in", "hook_points_out", "device", "dtype", "decode_with_csr"),
    *("sparsity_threshold_for_csr", "use_triton_kernel", "jumprelu_threshold_window"),
    *("sparsity_threshold_for_triton_spmm_kernel", "init_cross_layer_decoder_all_zero"),
)
_FIELDS: dict[str, tuple[Any, ...] | None] = {
    "sae_type": ("clt",),
    "act_fn": tuple(_ACTIVATIONS),  # the others choose among layers or tokens
    "norm_activation": ("dataset-wise", "inference"),  # not each vector's own norm
    "use_decoder_bias": (True,),
    **dict.fromkeys(_DOES_NOT_MATTER),
}


def is_llamascopium(path: Path) -> bool:
    """Whether a config.json here says what kind of sparse dictionary this is."""
    file = path / CONFIG
    return file.is_file() and "sae_type" in read_json(file)


def open_llamascopium(path: Path) -> FileStore:
    """Open a cross-layer transcoder of llamascopium without reading its weights.

    Raises:
      InputError: if it is incomplete or damaged, of another kind, or normalises every
        vector by its own norm.
    """
    where = path / CONFIG
    config = read_json(where)
    check_fields(where, config, _FIELDS)
    found = [path / name for name in WEIGHTS if (path / name).is_file()]
    if not found:
        refuse_pickles(path)
        raise InputError(f"{path} holds none of {', '.join(WEIGHTS)}; is it complete?")
    file = open_tensors(found[0])
    L, D, F = stored_shape(file, "W_E", 3)
    act = _ACTIVATIONS[config.get("act_fn", "relu")]
    gate = GATES[act]
    sides = {"hook_points_in": READS, "hook_points_out": WRITES}
    hooks = {side: _hooks(where, config, side, L) for side in sides}
    wanted: dict[str, tuple[int, ...]] = {"W_E": (L, D, F), "b_E": (L, F)}
    for layer in range(L):
        wanted |= {f"W_D.{layer}": (layer + 1, F, D), f"b_D.{layer}": (D,)}
    wanted |= {_THETA: (L, F)} if gate.switch == "theta" else {}
    norms = dict.fromkeys(f"{_NORM}{h}" for names in hooks.values() for h in names)
    scaled = config.get("norm_activation", "dataset-wise") == "dataset-wise"
    check_tensors(
        file,
        wanted | (dict.fromkeys(norms, ()) if scaled else {}),
        dict.fromkeys(norms, ()),
    )
    reads, writes = (
        [of_layer(where, side, hook, known) for hook in hooks[side]]
        for side, known in sides.items()
    )
    sites: set[tuple[ReadSite, WriteSite]] = {
        (READS[r], WRITES[w]) for (_, r), (_, w) in zip(reads, writes, strict=True)
    }
    places = [*enumerate(reads), *enumerate(writes)]
    if len(sites) > 1 or any(layer != at for layer, (at, _) in places):
        raise InputError(
            f"{where}: hook points must be the same of layers 0, 1, ..., not "
            f"{config['hook_points_in']}"
        )
    gains = {
        name: [_gain(file, h, D) if scaled else 1.0 for h in names]
        for name, names in hooks.items()
    }
    read, write = sites.pop()
    by_norm = (
        bool(config.get("sparsity_include_decoder_norm", True))
        and gate.switch != "zero"
    )
    return FileStore(
        path=path,
        cfg=CLTConfig(
            n_layers=L,
            d_model=D,
            n_features=F,
            span=L,
            activation=act,
            k=whole(config, "top_k", where=where, least=1) if gate.competes else None,
            read=read,
        ),
        format="llamascopium",
        layers=tuple(
            _layer(file, layer, L, gains=gains, by_norm=by_norm) for layer in range(L)
        ),
        files={CONFIG: where, found[0].relative_to(path).as_posix(): found[0]},
        write=write,
    )


def _hooks(where: Path, config: Mapping[str, Any], field: str, n: int) -> list[str]:
    names = config.get(field)
    if not isinstance(names, list) or len(names) != n:
        raise InputError(f"{where}: {field} must list {n} hook points")
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"{where}: {field} holds {shown(name)}, not a name")
    return names


def _gain(file: TensorFile, hook: str, d_model: int) -> float:
    """What vectors at a hook point are multiplied by: to norm sqrt(D) on average."""
    norm = float(file.read(f"{_NORM}{hook}"))
    if not norm > 0:
        raise InputError(f"{file.path}: {_NORM}{hook} is {norm}, it must be above 0")
    return math.sqrt(d_model) / norm


def _layer(
    file: TensorFile,
    layer: int,
    n_layers: int,
    *,
    gains: Mapping[str, list[float]],
    by_norm: bool,
) -> LayerFiles:
    out = [1 / gain for gain in gains["hook_points_out"]]
    return LayerFiles(
        W_enc=Piece(file, "W_E", (layer,), transposed=True),
        b_enc=Piece(file, "b_E", (layer,)),
        decoder=tuple(
            Piece(file, f"W_D.{m}", (layer,)) for m in range(layer, n_layers)
        ),
        b_dec=((Piece(file, f"b_D.{layer}"), out[layer]),),
        theta=Piece.found(file, _THETA, layer),
        fold=Fold(
            read_gain=gains["hook_points_in"][layer],
            write_gain=tuple(out[layer:]),
            log_theta=True,
            by_norm=by_norm,
        ),
    )
