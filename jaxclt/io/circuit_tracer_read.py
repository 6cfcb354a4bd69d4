"""Reading a dictionary in circuit-tracer's format, lazily.

Opening reads headers only; weights are mapped and copied out layer by layer or decoder
row by decoder row, so a dictionary larger than memory can be traced.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jaxclt.clt.config import CLTConfig
from jaxclt.clt.store import DictionaryStore, EncoderLayer, materialise
from jaxclt.errors import InputError
from jaxclt.io.circuit_tracer_format import (
    CLT,
    LAYOUTS,
    PICKLES,
    PLT,
    READ_OF_HOOK,
    WRITE_HOOKS,
    Layout,
)
from jaxclt.io.digest import digest_ends
from jaxclt.io.tensors import TensorFile, open_tensors, pickle_message
from jaxclt.lm.config import LMConfig
from jaxclt.types import CLTParams

__all__ = [
    "CircuitTracerDir",
    "check",
    "dictionary_hash",
    "load_params",
    "open_dictionary",
]


@dataclasses.dataclass(frozen=True)
class CircuitTracerDir:
    """A dictionary directory, opened but not read: a `DictionaryStore`.

    Weights come in the dtype they are stored in. Every read raises InputError on values
    that are not finite.
    """

    path: Path
    cfg: CLTConfig
    model_name: str | None  # the model it was trained on, as its config says
    scan: str | None  # the name of its feature examples in circuit-tracer's interface
    layout: Layout
    encoder_files: tuple[TensorFile, ...]
    decoder_files: tuple[TensorFile, ...]

    def encoder(self, layer: int) -> EncoderLayer:
        """All encoder rows of one layer: [F, D], [F] and thresholds [F] or None."""
        file, names = self.encoder_files[layer], self.layout
        has_theta = self.cfg.activation == "jumprelu"
        return EncoderLayer(
            file.read(names.W_enc.format(layer)),
            file.read(names.b_enc.format(layer)),
            file.read(names.theta.format(layer)) if has_theta else None,
        )

    def decoder_rows(self, layer: int, feature_A: np.ndarray) -> np.ndarray:
        """Decoder rows [A, n_writes(layer), D] of the given features."""
        return self._decoder(layer, np.asarray(feature_A))

    def decoder(self, layer: int) -> np.ndarray:
        """The whole decoder [F, n_writes(layer), D] of one layer."""
        return self._decoder(layer, None)

    def _decoder(self, layer: int, rows: np.ndarray | None) -> np.ndarray:
        W = self.decoder_files[layer].read(self.layout.W_dec.format(layer), rows)
        shape = (len(W), self.cfg.n_writes(layer), self.cfg.d_model)
        return W.reshape(shape)  # a PLT stores [F, D]

    def b_dec(self) -> np.ndarray:
        """Decoder biases [L, D]."""
        name = self.layout.b_dec
        return np.stack(
            [f.read(name.format(i)) for i, f in enumerate(self.encoder_files)]
        )

    def skip(self, layer: int) -> np.ndarray | None:
        """Linear path [D, D], used as ``read @ skip``, or None."""
        file, name = self.encoder_files[layer], self.layout.W_skip
        if name is None or name not in file.tensors:
            return None
        return file.read(name).T


def open_dictionary(path: str | Path) -> CircuitTracerDir:
    """Open a dictionary in circuit-tracer's format without reading its weights.

    Args:
      path: the directory that holds config.yaml.

    Returns:
      A lazy store; its span is what the decoder shapes say.

    Raises:
      InputError: if a file is missing, truncated, a pickle, or of the wrong shape.
    """
    path = Path(path)
    config = _read_config(path)
    layout = LAYOUTS[config["model_kind"]]
    encoder_files, decoder_files = _open_layers(path, layout, config)
    cfg = _infer_config(path, config, layout, encoder_files, decoder_files)
    store = CircuitTracerDir(
        path=path,
        cfg=cfg,
        model_name=config.get("model_name"),
        scan=config.get("scan"),
        layout=layout,
        encoder_files=encoder_files,
        decoder_files=decoder_files,
    )
    _check_tensors(store)
    return store


def load_params(path: str | Path) -> tuple[CLTParams, CLTConfig]:
    """Read a whole dictionary into memory.

    Raises:
      InputError: as `open_dictionary`, and if a weight is not finite.
    """
    store = open_dictionary(path)
    return materialise(store), store.cfg


def check(store: DictionaryStore, lm_cfg: LMConfig) -> None:
    """Raise InputError unless the dictionary fits the model."""
    cfg = store.cfg
    trained_on = getattr(store, "model_name", None)
    hint = f" (it names {trained_on})" if trained_on else ""
    for what, ours, theirs in (
        ("layers", cfg.n_layers, lm_cfg.n_layers),
        ("residual dimensions", cfg.d_model, lm_cfg.d_model),
    ):
        if ours != theirs:
            raise InputError(
                f"the dictionary has {ours} {what}, the model {theirs}; give the model "
                f"the dictionary was trained on{hint} or another dictionary"
            )


def dictionary_hash(store: CircuitTracerDir) -> str:
    """Hex hash of names, sizes and the first and last megabyte of every file.

    Cheap for dictionaries of many gigabytes; it tells dictionaries apart but does not
    prove that all bytes are the same.
    """
    paths = {f.path for f in (*store.encoder_files, *store.decoder_files)}
    paths.add(store.path / "config.yaml")
    return digest_ends({p.relative_to(store.path).as_posix(): p for p in paths})


def _read_config(path: Path) -> dict[str, Any]:
    """config.yaml as a mapping whose kind and hooks are known."""
    if path.suffix in PICKLES:
        raise InputError(pickle_message(path))
    file = path / "config.yaml"
    if not file.is_file():
        _refuse_pickles(path)
        raise InputError(
            f"{path} is not a dictionary: a directory with config.yaml is needed"
        )
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid YAML; correct or replace it") from error
    if not isinstance(config, dict):
        raise InputError(f"{file} must be a mapping of names to values")
    for key, known in (
        ("model_kind", tuple(LAYOUTS)),
        ("feature_input_hook", tuple(READ_OF_HOOK)),
        ("feature_output_hook", WRITE_HOOKS),
        ("activation", ("relu", "topk", None)),
    ):
        if config.get(key) not in known:
            names = ", ".join(filter(None, known))
            value = config.get(key)
            raise InputError(f"{file}: {key} is {value!r}, it must be one of {names}")
    return config


def _refuse_pickles(path: Path) -> None:
    """Say so if pickles are what a directory offers in place of safetensors."""
    for file in sorted(path.iterdir()) if path.is_dir() else []:
        if file.suffix in PICKLES:
            raise InputError(pickle_message(file))


def _open_layers(
    path: Path, layout: Layout, config: Mapping[str, Any]
) -> tuple[tuple[TensorFile, ...], tuple[TensorFile, ...]]:
    """Open the encoder and decoder file of every layer."""
    if config.get("transcoders") is not None:
        if config["model_kind"] == CLT:
            raise InputError(
                f"{path}/config.yaml: a `transcoders` list needs model_kind {PLT}"
            )
        entries = config["transcoders"]
        if not isinstance(entries, list) or not entries:
            raise InputError(f"{path}/config.yaml: transcoders must be a list of files")
        files = tuple(open_tensors(_local(path, entry)) for entry in entries)
        return files, files
    n_layers = _count_layers(path, layout.encoder_file)
    encoder = tuple(
        open_tensors(path / layout.encoder_file.format(i)) for i in range(n_layers)
    )
    if layout.decoder_file == layout.encoder_file:
        return encoder, encoder
    return encoder, tuple(
        open_tensors(path / layout.decoder_file.format(i)) for i in range(n_layers)
    )


def _local(path: Path, entry: Any) -> Path:
    """Resolve an entry of `transcoders`, which must lie inside the dictionary."""
    file = Path(str(entry))
    if "://" in str(entry) or file.is_absolute() or ".." in file.parts:
        raise InputError(
            f"{path}/config.yaml: transcoders entry {entry} must be a file inside the "
            "directory; download it there and name it by its relative path"
        )
    return path / file


def _count_layers(path: Path, template: str) -> int:
    """One more than the highest layer that has a file; missing ones fail on opening."""
    pattern = re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))
    found = [int(m[1]) for p in path.iterdir() if (m := pattern.fullmatch(p.name))]
    if not found:
        _refuse_pickles(path)
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
    n_features, d_model = _shape(encoder_files[0], layout.W_enc.format(0), 2)
    is_clt = config["model_kind"] == CLT
    decoder = _shape(decoder_files[0], layout.W_dec.format(0), 3 if is_clt else 2)
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
    if k is not None and not isinstance(k, int):
        raise InputError(f"{path}/config.yaml: k must be a whole number, not {k!r}")
    return CLTConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_features=n_features,
        span=span,
        activation="topk" if topk else "jumprelu" if has_theta else "relu",
        k=k,
        read=READ_OF_HOOK[config["feature_input_hook"]],
    )


def _shape(file: TensorFile, name: str, ndim: int) -> tuple[int, ...]:
    if name not in file.tensors:
        raise InputError(f"{file.path} has no tensor {name}; convert or replace it")
    shape = file.tensors[name].shape
    if len(shape) != ndim:
        raise InputError(
            f"{file.path}: {name} has shape {shape}, but {ndim} axes are needed; "
            "convert or replace it"
        )
    return shape


def _check_tensors(store: CircuitTracerDir) -> None:
    """Every layer has exactly the tensors of the format, with the config's shapes."""
    for layer in range(store.cfg.n_layers):
        encoder, decoder = _wanted_shapes(store, layer)
        if store.layout.decoder_file == store.layout.encoder_file:
            _check_file(store.encoder_files[layer], encoder | decoder)
        else:
            _check_file(store.encoder_files[layer], encoder)
            _check_file(store.decoder_files[layer], decoder)


_Shapes = dict[str, tuple[int, ...]]


def _wanted_shapes(store: CircuitTracerDir, layer: int) -> tuple[_Shapes, _Shapes]:
    """Shapes by tensor name: what belongs to the encoder, and the decoder."""
    cfg, names = store.cfg, store.layout
    F, D, M = cfg.n_features, cfg.d_model, cfg.n_writes(layer)
    encoder: _Shapes = {names.W_enc: (F, D), names.b_enc: (F,), names.b_dec: (D,)}
    optional: _Shapes = {names.theta: (F,)}
    if names.W_skip is not None:
        optional[names.W_skip] = (D, D)
    first = store.encoder_files[0].tensors  # all layers have them, or none
    encoder |= {k: v for k, v in optional.items() if k.format(0) in first}
    decoder: _Shapes = {names.W_dec: (F, D) if names is LAYOUTS[PLT] else (F, M, D)}
    return (
        {k.format(layer): v for k, v in encoder.items()},
        {k.format(layer): v for k, v in decoder.items()},
    )


def _check_file(file: TensorFile, wanted: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in wanted.items():
        if name not in file.tensors:
            raise InputError(
                f"{file.path} has no tensor {name}; copy or fetch the dictionary again"
            )
        if file.tensors[name].shape != shape:
            raise InputError(
                f"{file.path}: {name} has shape {file.tensors[name].shape}, the rest "
                f"of the dictionary needs {shape}; fetch or convert it again"
            )
    # a tensor we do not know may change what the dictionary means: never ignore it
    unknown = sorted(set(file.tensors) - set(wanted))
    if unknown:
        raise InputError(
            f"{file.path} holds {unknown[0]!r}, which this format does not have or "
            "layer 0 lacks; remove or convert it"
        )
