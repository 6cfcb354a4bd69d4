"""EleutherAI's sparsify, and its fork clt-training for cross-layer transcoders.

layers.N.mlp/cfg.json           d_in, activation, k, transcode, skip_connection, ...
layers.N.mlp/sae.safetensors    encoder.weight [F, D], encoder.bias, W_dec [F, D],
                                b_dec, [W_skip [out, in]]

A coder with `n_targets` (clt-training) has W_decs.J, b_decs.J and W_skips.J for the
layer J after its own in place of the last three, post_encs.J besides, and, where
`normalize_io` is set, in_norm and out_norm. What a layer's MLP is taken to write is the
sum of what all coders say of it, in the units of that layer's own coder: times its
out_norm. `coalesce_topk` gives all decoders to the layer that is written instead: one
for all sources (concat), or one for each, in order (per-layer).

A ReLU is ahead of TopK, and of GroupMax.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxclt.clt.config import CLTConfig
from jaxclt.errors import InputError, shown
from jaxclt.files.json_file import read_json
from jaxclt.io.config_fields import whole
from jaxclt.io.formats.fields import check_fields, contiguous
from jaxclt.io.formats.pieces import (
    FileStore,
    Fold,
    LayerFiles,
    Piece,
    check_tensors,
    stored_shape,
)
from jaxclt.io.tensors import TensorFile, open_tensors

__all__ = ["ACTIVATIONS", "CONFIG", "WEIGHTS", "is_sparsify", "open_sparsify"]

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
ACTIVATIONS: dict[str, str] = {"topk": "topk", "groupmax": "groupmax"}
_MLP = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d{1,4})\.mlp")
_DOES_NOT_MATTER = (
    *("d_in", "k", "expansion_factor", "num_latents", "multi_topk", "skip_connection"),
    *("normalize_decoder", "lookup_max_order", "gram_table_hash", "dtype", "use_fp8"),
    *("tp_output", "n_targets", "n_sources", "normalize_io", "divide_cross_layer"),
    *("train_post_encoder", "post_encoder_scale", "per_source_tied", "matryoshka"),
    *("matryoshka_expansion_factors", "matryoshka_k_values"),
)
_FIELDS: dict[str, tuple[Any, ...] | None] = {
    "activation": tuple(ACTIVATIONS),
    "transcode": (True,),
    "signed": (False,),
    "embed_skip": (False,),  # these two add what is not a function of the MLP's input
    "gram_lookup": (False,),
    "coalesce_topk": ("none", "concat", "per-layer"),
    "topk_coalesced": (False,),  # one choice among all layers' features
    "secondary_target_tied": (False,),
    **dict.fromkeys(_DOES_NOT_MATTER),
}


class _Coder(NamedTuple):
    """One layer's directory."""

    file: TensorFile
    config: Mapping[str, Any]
    where: Path

    @property
    def multi(self) -> bool:
        """Whether it has a list of targets."""
        return bool(self.config.get("n_targets"))

    @property
    def n_targets(self) -> int:
        """Layers it writes."""
        return self.config.get("n_targets") or 1

    @property
    def scaled(self) -> bool:
        """Whether features are scaled after the encoder, for each target."""
        return bool(self.config.get("post_encoder_scale"))

    @property
    def coalesce(self) -> str:
        """Whose the decoders are."""
        return self.config.get("coalesce_topk") or "none"


def is_sparsify(path: Path) -> bool:
    """Whether directories with sparsify's pair of files are here."""
    return any((x.parent / WEIGHTS).is_file() for x in path.glob(f"*/{CONFIG}"))


def open_sparsify(path: Path) -> FileStore:
    """Open the coders of a sparsify or clt-training run without reading their weights.

    Raises:
      InputError: if it is incomplete or damaged, or its coders are not of MLPs.
    """
    coders = _coders(path)
    F, D = stored_shape(coders[0].file, "encoder.weight", 2)
    first = coders[0].config
    for layer, coder in enumerate(coders):
        targets = coder.config.get("n_targets") or 1
        if type(targets) is not int or not 1 <= targets <= len(coders) - layer:
            raise InputError(
                f"{coder.where}: n_targets is {shown(targets)}, but there are "
                f"{len(coders) - layer} layers from this one on"
            )
        _check_coder(coder, first, F, D)
    cfg = CLTConfig(
        n_layers=len(coders),
        d_model=D,
        n_features=F,
        span=min(coders[0].n_targets, len(coders)),
        activation=ACTIVATIONS[first.get("activation", "topk")],
        k=whole(first, "k", where=coders[0].where, least=1),
        read="mlp_in",
    )
    for layer, coder in enumerate(coders):
        if coder.n_targets != cfg.n_writes(layer):
            raise InputError(
                f"{coder.where}: n_targets is {coder.n_targets}, but layer {layer} "
                f"should write {cfg.n_writes(layer)}; copy or fetch it again"
            )
    folders = [coder.where.parent for coder in coders]
    return FileStore(
        path=path,
        cfg=cfg,
        format="sparsify",
        layers=tuple(_layer(coders, layer, cfg) for layer in range(cfg.n_layers)),
        files={
            f"{x.name}/{name}": x / name for x in folders for name in (CONFIG, WEIGHTS)
        },
        write="mlp",
    )


def _coders(path: Path) -> list[_Coder]:
    found = {}
    for where in sorted(path.glob(f"*/{CONFIG}")):
        layer = _MLP.fullmatch(where.parent.name)
        if layer is None:
            raise InputError(
                f"{where.parent}: a coder of an MLP is in a directory layers.N.mlp; "
                "give a run that was trained on MLPs alone"
            )
        config = read_json(where)
        check_fields(where, config, _FIELDS)
        if "transcode" not in config:
            raise InputError(f"{where} does not say that it transcodes: it is an SAE")
        file = open_tensors(where.parent / WEIGHTS)
        found[int(layer[1])] = _Coder(file, config, where)
    contiguous(path, found)
    return [found[layer] for layer in range(len(found))]


def _check_coder(
    coder: _Coder, first: Mapping[str, Any], n_features: int, d_model: int
) -> None:
    """Tensors and options agree with the first layer's."""
    F, D, config = n_features, d_model, coder.config
    for name in ("activation", "k", "coalesce_topk", "normalize_io"):
        if config.get(name) != first.get(name):
            raise InputError(
                f"{coder.where}: {name} is {shown(config.get(name))}, in layer 0 it is "
                f"{shown(first.get(name))}; layers must agree"
            )
    wanted, optional = _shapes(coder, F, D)
    check_tensors(coder.file, wanted, optional)
    # Added to whatever is active: no linear decoder does that.
    post = re.compile(r"post_enc(s\.\d+)?")
    zero = [name for name in coder.file.tensors if post.fullmatch(name)]
    # Of a lower layer's input: a skip here is of the own layer's only.
    zero += [x for x in wanted if x.startswith("W_skips.") and x != "W_skips.0"]
    for name in zero:
        if np.any(coder.file.read(name)):
            raise InputError(
                f"{coder.file.path}: {name} is not zero, which cannot be represented "
                "here; use a run without it"
            )


def _shapes(
    coder: _Coder, n_features: int, d_model: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Tensors that must be there, and tensors that may be."""
    F, D, config = n_features, d_model, coder.config
    listed = coder.multi and coder.coalesce == "none"
    rows = F
    if coder.coalesce == "per-layer":
        rows *= whole(config, "n_sources", where=coder.where, least=1)
    wanted: dict[str, tuple[int, ...]] = {
        "encoder.weight": (F, D),
        "encoder.bias": (F,),
    }
    optional: dict[str, tuple[int, ...]] = {}
    # the first of a list may be there under the name of an only one too
    single = [("W_dec", listed and not config.get("per_source_tied"), (rows, D))]
    single += [("b_dec", listed, (D,))]
    if config.get("skip_connection"):
        single += [("W_skip", listed, (D, D))]
    single += [("post_enc", coder.multi, (F,)), ("post_enc_scale", coder.multi, (F,))]
    for name, many, shape in single:
        names = [f"{name}s.{j}" for j in range(coder.n_targets)] if many else [name]
        may = name == "post_enc" or (name == "post_enc_scale" and not coder.scaled)
        (optional if may else wanted).update(dict.fromkeys(names, shape))
        optional |= {name: shape} if many and not may else {}
    if config.get("normalize_io"):
        wanted |= {"in_norm": (1,), "out_norm": (1,)}
    return wanted, optional


def _layer(coders: list[_Coder], layer: int, cfg: CLTConfig) -> LayerFiles:
    coder, root = coders[layer], cfg.d_model**0.5
    targets = range(layer, layer + cfg.n_writes(layer))
    scales = [
        Piece(coder.file, _listed(coder, "post_enc_scale", j))
        for j in range(cfg.n_writes(layer) if coder.scaled else 0)
    ]
    sources = range(max(0, layer - cfg.span + 1), layer + 1)
    own = coder.multi and coder.coalesce == "none"
    b_dec = [
        (Piece(coders[s].file, _listed(coders[s], "b_dec", layer - s)),
         _gain(coders, s, layer, cfg))
        for s in (sources if own else [layer])
    ]  # fmt: skip
    skip = None
    if coder.config.get("skip_connection"):
        name = "W_skips.0" if own else "W_skip"
        piece = Piece(coder.file, name, transposed=True)
        skip = piece, _gain(coders, layer, layer, cfg)
    read_gain = 1.0
    if coder.config.get("normalize_io"):
        read_gain = root / _positive(coder, "in_norm")
    return LayerFiles(
        W_enc=Piece(coder.file, "encoder.weight"),
        b_enc=Piece(coder.file, "encoder.bias"),
        decoder=tuple(_decoder(coders, layer, target, cfg) for target in targets),
        b_dec=tuple(b_dec),
        skip=skip,
        fold=Fold(
            read_gain=read_gain,
            write_gain=tuple(_gain(coders, layer, target, cfg) for target in targets),
            row_gain=tuple(scales),
        ),
    )


def _listed(coder: _Coder, name: str, j: int) -> str:
    """Name of the j-th of a list, or of the only one."""
    return f"{name}s.{j}" if f"{name}s.{j}" in coder.file.tensors else name


def _decoder(coders: list[_Coder], source: int, target: int, cfg: CLTConfig) -> Piece:
    F, coder = cfg.n_features, coders[source]
    if coder.coalesce == "none":
        return Piece(coder.file, _listed(coder, "W_dec", target - source))
    owner = coders[target].file
    if coder.coalesce == "concat":
        return Piece(owner, "W_dec")
    place = source - max(0, target - cfg.span + 1)  # among those that write there
    if owner.tensors["W_dec"].shape[0] < (place + 1) * F:
        raise InputError(
            f"{owner.path}: W_dec has no rows for layer {source}; n_sources is wrong"
        )
    return Piece(owner, "W_dec", (slice(place * F, (place + 1) * F),))


def _gain(coders: list[_Coder], source: int, target: int, cfg: CLTConfig) -> float:
    """What the sum of a target's coders multiplies one of its terms by."""
    owner, gain = coders[target], 1.0
    if owner.config.get("normalize_io"):
        gain = _positive(owner, "out_norm") / cfg.d_model**0.5
    divides = owner.config.get("divide_cross_layer") and owner.coalesce == "none"
    if divides and source != target:
        gain /= max(1, min(target + 1, cfg.span) - 1)
    return gain


def _positive(coder: _Coder, name: str) -> float:
    """A tensor of one value."""
    value = float(coder.file.read(name).reshape(-1)[0])
    if not value > 0:
        raise InputError(f"{coder.file.path}: {name} is {value}, it must be above 0")
    return value
