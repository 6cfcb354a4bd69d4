"""Reading what a config.yaml of circuit-tracer describes, lazily.

Opening reads headers only; weights are mapped and copied out layer by layer or decoder
row by decoder row, so a dictionary larger than memory can be traced.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxclt.clt.config import CLTConfig
from jaxclt.errors import InputError, shown
from jaxclt.files.yaml_file import read_yaml
from jaxclt.io.circuit_tracer_format import (
    CLT,
    LAYOUTS,
    READ_OF_HOOK,
    WRITE_OF_HOOK,
    Layout,
)
from jaxclt.io.formats.pieces import (
    FileStore,
    LayerFiles,
    Piece,
    check_tensors,
    stored_shape,
)
from jaxclt.io.hub import fetch_listed
from jaxclt.io.tensors import TensorFile, open_tensors, refuse_pickles

__all__ = ["CONFIG", "is_circuit_tracer", "open_circuit_tracer", "open_described"]

CONFIG = "config.yaml"


def is_circuit_tracer(path: Path) -> bool:
    """Whether a directory has a config.yaml that is not of another format."""
    return (path / CONFIG).is_file()


def open_circuit_tracer(
    path: Path, supplement: Mapping[str, Any] | None = None
) -> FileStore:
    """Open a dictionary that a config.yaml describes without reading its weights.

    Args:
      path: the directory that holds config.yaml.
      supplement: what config.yaml should say but does not.

    Returns:
      A lazy store; its span is what the decoder shapes say.

    Raises:
      InputError: if a file is missing, truncated, a pickle, or of the wrong shape.
    """
    config = {**(supplement or {}), **read_yaml(path / CONFIG)}
    return open_described(path, config, described={CONFIG: path / CONFIG})


def open_described(
    path: Path,
    config: Mapping[str, Any],
    *,
    described: Mapping[str, Path],
    provenance: Mapping[str, Any] | None = None,
) -> FileStore:
    """Open a dictionary that is described in the words of a config.yaml.

    Args:
      path: the directory.
      config: what a config.yaml in it says, or would say.
      described: files that it comes from, by name.
      provenance: what was chosen where the dictionary's name left a choice.

    Raises:
      InputError: as `open_circuit_tracer`.
    """
    _check_config(path, config)
    layout, encoder_files, decoder_files = _open_layers(path, config)
    cfg = _infer_config(path, config, layout, encoder_files, decoder_files)
    _check_layers(cfg, layout, encoder_files, decoder_files)
    layers = [
        _layer(cfg, layout, layer, encoder_files[layer], decoder_files[layer])
        for layer in range(cfg.n_layers)
    ]
    return FileStore(
        path=path,
        cfg=cfg,
        format=layout.format,
        layers=tuple(layers),
        files={**described, **_named(path, (*encoder_files, *decoder_files))},
        write=WRITE_OF_HOOK[config["feature_output_hook"]],
        model_name=_text(path, config, "model_name"),
        scan=_text(path, config, "scan"),
        provenance=provenance or {},
    )


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """The kind and the hooks are known ones."""
    file = path / CONFIG
    for key, known in (
        ("model_kind", tuple(dict.fromkeys(x.model_kind for x in LAYOUTS))),
        ("feature_input_hook", tuple(READ_OF_HOOK)),
        ("feature_output_hook", tuple(WRITE_OF_HOOK)),
        ("activation", ("relu", "jump_relu", "jumprelu", "topk", None)),
    ):
        if config.get(key) not in known:
            names = ", ".join(filter(None, known))
            value = shown(config.get(key))
            raise InputError(f"{file}: {key} is {value}, it must be one of {names}")


def _text(path: Path, config: Mapping[str, Any], key: str) -> str | None:
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{path / CONFIG}: {key} must be a text, not {shown(value)}")
    return value


def _open_layers(
    path: Path, config: Mapping[str, Any]
) -> tuple[Layout, tuple[TensorFile, ...], tuple[TensorFile, ...]]:
    """The layout of the files, and the encoder and decoder file of every layer."""
    candidates = [x for x in LAYOUTS if x.model_kind == config["model_kind"]]
    if config.get("transcoders") is not None:
        entries = config["transcoders"]
        if not isinstance(entries, list) or not entries:
            raise InputError(f"{path / CONFIG}: transcoders must be a list of files")
        files = tuple(open_tensors(_entry(path, entry)) for entry in entries)
        return _recognise(candidates, files[0]), files, files
    native = candidates[0]
    n_layers = _count_layers(path, native.encoder_file)
    encoder = tuple(
        open_tensors(path / native.encoder_file.format(i)) for i in range(n_layers)
    )
    if native.decoder_file == native.encoder_file:
        return native, encoder, encoder
    decoder = tuple(
        open_tensors(path / native.decoder_file.format(i)) for i in range(n_layers)
    )
    return native, encoder, decoder


def _recognise(candidates: list[Layout], file: TensorFile) -> Layout:
    """The layout by what the first file is: its kind, and the name of its encoder.

    A CLT whose layers are in two files each cannot be listed.
    """
    for layout in candidates:
        one_file = layout.encoder_file == layout.decoder_file
        fits = file.path.suffix == layout.suffix and layout.W_enc in file.tensors
        if one_file and fits:
            return layout
    names = dict.fromkeys(x.W_enc.format(0) for x in candidates)
    raise InputError(
        f"{file.path} has no tensor {' or '.join(names)}; convert or replace it"
    )


def _entry(path: Path, entry: Any) -> Path:
    """The file of an entry of `transcoders`: inside the directory, or on the hub."""
    if not isinstance(entry, str):
        raise InputError(
            f"{path / CONFIG}: transcoders must be a list of files, not {shown(entry)}"
        )
    text = entry
    if text.startswith("hf://"):
        return fetch_listed(text)
    file = Path(text)
    if "://" in text or file.is_absolute() or ".." in file.parts or "\0" in text:
        raise InputError(
            f"{path / CONFIG}: transcoders entry {shown(text)} must be a file "
            "inside the directory or hf://organisation/name/file; download it there "
            "and name it by its relative path"
        )
    return path / file


def _named(path: Path, files: tuple[TensorFile, ...]) -> dict[str, Path]:
    """Files by their names inside the directory; of others, by all that names them."""
    return {
        f.path.relative_to(path).as_posix()
        if f.path.is_relative_to(path)
        else "/".join(f.path.parts[-4:]): f.path
        for f in files
    }


def _count_layers(path: Path, template: str) -> int:
    """One more than the highest layer that has a file; missing ones fail on opening."""
    pattern = re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))
    found = [int(m[1]) for p in path.iterdir() if (m := pattern.fullmatch(p.name))]
    if not found:
        refuse_pickles(path)
        raise InputError(f"{path} holds no {template.format('*')}; is it complete?")
    missing = sorted(set(range(len(found))) - set(found))
    if missing:  # said before a stray large number makes us count up to it
        raise InputError(
            f"{path / template.format(missing[0])} is missing; copy or fetch the "
            "dictionary again"
        )
    return len(found)


def _infer_config(
    path: Path,
    config: Mapping[str, Any],
    layout: Layout,
    encoder_files: tuple[TensorFile, ...],
    decoder_files: tuple[TensorFile, ...],
) -> CLTConfig:
    """The shape and conventions, from the first layer's tensors."""
    sizes = stored_shape(encoder_files[0], layout.W_enc.format(0), 2)
    n_features, d_model = sizes if layout.enc_axes == "FD" else sizes[::-1]
    is_clt = layout.model_kind == CLT
    decoder = stored_shape(decoder_files[0], layout.W_dec.format(0), 3 if is_clt else 2)
    span, n_layers = (decoder[1] if is_clt else 1), len(encoder_files)
    if span > n_layers:
        raise InputError(
            f"{path}: features of layer 0 write {span} layers but only {n_layers} are "
            "here; copy or fetch the dictionary again"
        )
    # circuit-tracer decides by the threshold's presence, whatever config.yaml says
    has_theta = layout.theta.format(0) in encoder_files[0].tensors
    topk = config.get("activation") == "topk"
    k = config.get("k") if topk else None
    if k is not None and (not isinstance(k, int) or isinstance(k, bool)):
        raise InputError(f"{path / CONFIG}: k must be a whole number, not {shown(k)}")
    if topk and has_theta:
        raise InputError(
            f"{path / CONFIG}: activation is topk but the files hold thresholds; "
            "remove one of them"
        )
    return CLTConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_features=n_features,
        span=span,
        activation="topk" if topk else "jumprelu" if has_theta else "relu",
        k=k,
        read=READ_OF_HOOK[config["feature_input_hook"]],
    )


_Shapes = dict[str, tuple[int, ...]]


def _check_layers(
    cfg: CLTConfig,
    layout: Layout,
    encoder_files: tuple[TensorFile, ...],
    decoder_files: tuple[TensorFile, ...],
) -> None:
    """Every layer has exactly the tensors of the format, with the config's shapes."""
    first = encoder_files[0].tensors  # all layers have the optional ones, or none
    for layer in range(cfg.n_layers):
        encoder, decoder = _wanted(cfg, layout, layer, first)
        if layout.decoder_file == layout.encoder_file:
            check_tensors(encoder_files[layer], encoder | decoder)
        else:
            check_tensors(encoder_files[layer], encoder)
            check_tensors(decoder_files[layer], decoder)


def _wanted(
    cfg: CLTConfig, layout: Layout, layer: int, first: Mapping[str, Any]
) -> tuple[_Shapes, _Shapes]:
    """Shapes by tensor name: what belongs to the encoder, and the decoder."""
    F, D = cfg.n_features, cfg.d_model
    encoder: _Shapes = {
        layout.W_enc: (F, D) if layout.enc_axes == "FD" else (D, F),
        layout.b_enc: (F,),
        layout.b_dec: (D,),
    }
    optional: _Shapes = {layout.theta: (F,)}
    if layout.W_skip is not None:
        optional[layout.W_skip] = (D, D)
    encoder |= {k: v for k, v in optional.items() if k.format(0) in first}
    decoder: tuple[int, ...] = {
        "own": (F, D),
        "later": (F, cfg.n_writes(layer), D),
        "all": (F, cfg.n_layers, D),
    }[layout.writes]
    return (
        {k.format(layer): v for k, v in encoder.items()},
        {layout.W_dec.format(layer): decoder},
    )


def _layer(
    cfg: CLTConfig,
    layout: Layout,
    layer: int,
    encoder: TensorFile,
    decoder: TensorFile,
) -> LayerFiles:
    def piece(name: str | None, **how: Any) -> Piece | None:
        stored = (name or "").format(layer)
        return Piece(encoder, stored, **how) if stored in encoder.tensors else None

    W_enc = piece(layout.W_enc, transposed=layout.enc_axes == "DF")
    b_dec = piece(layout.b_dec)
    assert W_enc is not None
    assert b_dec is not None
    skip = piece(layout.W_skip, transposed=layout.skip_axes == "oi")
    pick = (slice(None), slice(layer, None)) if layout.writes == "all" else ()
    return LayerFiles(
        W_enc=W_enc,
        b_enc=piece(layout.b_enc),
        decoder=(Piece(decoder, layout.W_dec.format(layer), pick),),
        b_dec=((b_dec, 1.0),),
        theta=piece(layout.theta),
        skip=None if skip is None else (skip, 1.0),
    )
