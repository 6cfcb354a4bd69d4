"""Dictionaries on disk, in circuit-tracer's directory format.

    config.yaml                  model_kind, hooks, optional transcoders, activation, k
    W_enc_{i}.safetensors        CLT: W_enc_i [F, D], b_enc_i, b_dec_i, [threshold_i]
    W_dec_{i}.safetensors        CLT: W_dec_i [F, min(span, L - i), D]
    layer_{i}.safetensors        PLT: W_enc, W_dec [F, D], b_enc, b_dec, [W_skip],
                                 [activation_function.threshold]

Opening reads headers only; weights are mapped and copied out layer by layer or decoder
row by decoder row, so a dictionary larger than memory can be traced. The
headers are parsed here because numpy, unlike safetensors' own reader, then sees
bfloat16 and touches no page that was not asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import yaml

from jaxclt.clt import params as clt_params
from jaxclt.clt.config import CLTConfig, ReadSite
from jaxclt.clt.store import DictionaryStore, EncoderLayer
from jaxclt.errors import InputError
from jaxclt.io.atomic import atomic_directory
from jaxclt.lm.config import LMConfig
from jaxclt.types import CLTParams

__all__ = [
    "CircuitTracerDir",
    "check",
    "dictionary_hash",
    "load_params",
    "open_dictionary",
    "save_dictionary",
]

_READ_OF_HOOK: dict[str, ReadSite] = {
    "hook_resid_mid": "resid_mid",
    "ln2.hook_normalized": "normalized",
    "mlp.hook_in": "mlp_in",
}
_WRITE_HOOKS = ("hook_mlp_out", "mlp.hook_out")
# What is written for each read site: the pairs that circuit-tracer's backends know.
_HOOKS_OF_READ: dict[ReadSite, tuple[str, str]] = {
    "resid_mid": ("hook_resid_mid", "hook_mlp_out"),
    "normalized": ("ln2.hook_normalized", "hook_mlp_out"),
    "mlp_in": ("mlp.hook_in", "mlp.hook_out"),
}


class _Layout(NamedTuple):
    """File and tensor names of one model kind; ``{}`` is the layer."""

    encoder_file: str
    decoder_file: str
    W_enc: str
    b_enc: str
    b_dec: str
    theta: str
    W_dec: str
    W_skip: str | None  # stored as [out, in], the transpose of ours


_CLT, _PLT = "cross_layer_transcoder", "transcoder_set"
_LAYOUTS = {
    _CLT: _Layout(
        "W_enc_{}.safetensors", "W_dec_{}.safetensors",
        "W_enc_{}", "b_enc_{}", "b_dec_{}", "threshold_{}", "W_dec_{}", None,
    ),
    _PLT: _Layout(
        "layer_{}.safetensors", "layer_{}.safetensors",
        "W_enc", "b_enc", "b_dec", "activation_function.threshold", "W_dec", "W_skip",
    ),
}  # fmt: skip
_OWN_FILE = re.compile(r"config\.yaml|(W_enc|W_dec|layer)_\d+\.safetensors")
_PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}


# -- safetensors, read in place -------------------------------------------------------

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype("bfloat16"),
}


class _Tensor(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # from the start of the file


class _TensorFile(NamedTuple):
    path: Path
    tensors: Mapping[str, _Tensor]

    def map(self, name: str) -> np.ndarray:
        """Read-only view of a tensor; only the pages that are used get read."""
        t = self.tensors[name]
        return np.memmap(self.path, t.dtype, "r", t.offset, t.shape)

    def read(self, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        """A finite copy of a tensor, or of some of its rows."""
        view = self.map(name)
        out = np.array(view if rows is None else view[rows])
        _check_finite(out, f"{self.path}: {name}")
        return out


def _check_finite(x: np.ndarray, where: str) -> None:
    # min and max carry NaN and infinity and, unlike isfinite(x), need no mask
    if x.size and not (np.isfinite(x.min()) and np.isfinite(x.max())):
        raise InputError(f"{where} holds NaN or infinity; write the dictionary again")


def _open_tensors(path: Path) -> _TensorFile:
    """Parse a safetensors header and check it against the file's size."""
    if path.suffix in _PICKLES:
        raise InputError(_pickle_message(path))
    if not path.is_file():
        raise InputError(f"{path} is missing; copy or fetch the dictionary again")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise InputError(
                f"{path} is truncated or not a safetensors file ({size} bytes); "
                "copy or fetch it again"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise InputError(
                    f"{path}: {name!r} has dtype {entry['dtype']!r}; convert it to "
                    f"one of {', '.join(_DTYPES)}"
                )
        tensors = {k: _tensor(v, 8 + length) for k, v in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} has a broken safetensors header; copy or fetch it again"
        ) from error
    end = max((_end(t) for t in tensors.values()), default=8 + length)
    if end > size:
        raise InputError(
            f"{path} is truncated: {size} bytes of {end}; copy or fetch it again"
        )
    return _TensorFile(path, tensors)


def _tensor(entry: Mapping[str, Any], base: int) -> _Tensor:
    begin, end = entry["data_offsets"]
    dtype, shape = _DTYPES[entry["dtype"]], tuple(map(int, entry["shape"]))
    t = _Tensor(dtype, shape, base + int(begin))
    if min(shape, default=1) < 1 or begin < 0 or _end(t) != base + end:
        raise ValueError(entry)
    return t


def _end(t: _Tensor) -> int:
    return t.offset + math.prod(t.shape) * t.dtype.itemsize


def _pickle_message(path: Path) -> str:
    return f"{path} is a pickle, which is never loaded; convert it to safetensors"


# -- opening --------------------------------------------------------------------------


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
    layout: _Layout
    encoder_files: tuple[_TensorFile, ...]
    decoder_files: tuple[_TensorFile, ...]

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
    layout = _LAYOUTS[config["model_kind"]]
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
    layers = range(store.cfg.n_layers)
    encoders = [store.encoder(layer) for layer in layers]
    theta = [e.theta_F for e in encoders if e.theta_F is not None]
    skip = [W for layer in layers if (W := store.skip(layer)) is not None]
    params = CLTParams(
        W_enc_LFD=jnp.asarray(np.stack([e.W_enc_FD for e in encoders])),
        b_enc_LF=jnp.asarray(np.stack([e.b_enc_F for e in encoders])),
        W_dec=tuple(jnp.asarray(store.decoder(layer)) for layer in layers),
        b_dec_LD=jnp.asarray(store.b_dec()),
        theta_LF=jnp.asarray(np.stack(theta)) if theta else None,
        W_skip_LDD=jnp.asarray(np.stack(skip)) if skip else None,
    )
    return params, store.cfg


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
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(store.path).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()


def _read_config(path: Path) -> dict[str, Any]:
    """config.yaml as a mapping whose kind and hooks are known."""
    if path.suffix in _PICKLES:
        raise InputError(_pickle_message(path))
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
        ("model_kind", tuple(_LAYOUTS)),
        ("feature_input_hook", tuple(_READ_OF_HOOK)),
        ("feature_output_hook", _WRITE_HOOKS),
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
        if file.suffix in _PICKLES:
            raise InputError(_pickle_message(file))


def _open_layers(
    path: Path, layout: _Layout, config: Mapping[str, Any]
) -> tuple[tuple[_TensorFile, ...], tuple[_TensorFile, ...]]:
    """Open the encoder and decoder file of every layer."""
    if config.get("transcoders") is not None:
        if config["model_kind"] == _CLT:
            raise InputError(
                f"{path}/config.yaml: a `transcoders` list needs model_kind {_PLT}"
            )
        entries = config["transcoders"]
        if not isinstance(entries, list) or not entries:
            raise InputError(f"{path}/config.yaml: transcoders must be a list of files")
        files = tuple(_open_tensors(_local(path, entry)) for entry in entries)
        return files, files
    n_layers = _count_layers(path, layout.encoder_file)
    encoder = tuple(
        _open_tensors(path / layout.encoder_file.format(i)) for i in range(n_layers)
    )
    if layout.decoder_file == layout.encoder_file:
        return encoder, encoder
    return encoder, tuple(
        _open_tensors(path / layout.decoder_file.format(i)) for i in range(n_layers)
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
    layout: _Layout,
    encoder_files: tuple[_TensorFile, ...],
    decoder_files: tuple[_TensorFile, ...],
) -> CLTConfig:
    """The shape and conventions, from the first layer's tensors."""
    n_features, d_model = _shape(encoder_files[0], layout.W_enc.format(0), 2)
    is_clt = config["model_kind"] == _CLT
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
        read=_READ_OF_HOOK[config["feature_input_hook"]],
    )


def _shape(file: _TensorFile, name: str, ndim: int) -> tuple[int, ...]:
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
    decoder: _Shapes = {names.W_dec: (F, D) if names is _LAYOUTS[_PLT] else (F, M, D)}
    return (
        {k.format(layer): v for k, v in encoder.items()},
        {k.format(layer): v for k, v in decoder.items()},
    )


def _check_file(file: _TensorFile, wanted: Mapping[str, tuple[int, ...]]) -> None:
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


# -- saving ---------------------------------------------------------------------------


def save_dictionary(
    params: CLTParams,
    cfg: CLTConfig,
    path: str | Path,
    *,
    model_name: str,
    scan: str | None = None,
) -> None:
    """Write a dictionary in circuit-tracer's format, in float32.

    Span 1 is written as a PLT, anything else as a CLT. A span between 1 and L is
    written with the decoders it has; circuit-tracer itself reads only 1 and L. A
    dictionary that is already there is replaced at the end, or left as it was if
    anything fails.

    Args:
      params: weights.
      cfg: their shape.
      path: directory to create or replace.
      model_name: the model it was trained on, for config.yaml.
      scan: name of the feature examples in circuit-tracer's interface.

    Raises:
      InputError: if the weights do not fit `cfg` or the format or are not finite, or if
        `path` holds anything else than a dictionary.
    """
    path = Path(path).resolve()
    clt_params.check(params, cfg)
    _check_expressible(params, cfg)
    _check_replaceable(path)
    with atomic_directory(path) as partial:
        _write_files(params, cfg, partial, _yaml(cfg, model_name, scan))


def _check_expressible(params: CLTParams, cfg: CLTConfig) -> None:
    if params.W_skip_LDD is not None and cfg.span > 1:
        raise InputError(
            "circuit-tracer's format has no place for the linear skip of a CLT; save a "
            "PLT or a dictionary without a skip"
        )
    if (params.theta_LF is None) == (cfg.activation == "jumprelu"):
        raise InputError(
            f"dictionary: activation {cfg.activation} and "
            f"{'no ' if params.theta_LF is None else ''}thresholds do not go together"
        )


def _check_replaceable(path: Path) -> None:
    """Only a dictionary, and nothing else, may be overwritten."""
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise InputError(f"{path} exists and is not a directory; choose another output")
    names = sorted(p.name for p in path.iterdir())
    foreign = [name for name in names if not _OWN_FILE.fullmatch(name)]
    if foreign or (names and "config.yaml" not in names):
        raise InputError(
            f"{path} exists and is not only a dictionary (it holds "
            f"{(foreign or names)[0]}); choose another output directory"
        )


def _yaml(cfg: CLTConfig, model_name: str, scan: str | None) -> str:
    read, write = _HOOKS_OF_READ[cfg.read]
    config: dict[str, Any] = {
        "model_kind": _PLT if cfg.span == 1 else _CLT,
        "model_name": model_name,
        "feature_input_hook": read,
        "feature_output_hook": write,
    }
    if cfg.activation == "topk":
        config |= {"activation": "topk", "k": cfg.k}
    if scan is not None:
        config["scan"] = scan
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def _write_files(params: CLTParams, cfg: CLTConfig, path: Path, config: str) -> None:
    (path / "config.yaml").write_text(config, encoding="utf-8")
    mode = stat.S_IMODE((path / "config.yaml").stat().st_mode)
    for layer in range(cfg.n_layers):
        for name, tensors in _layer_files(params, cfg, layer).items():
            for tensor, x in tensors.items():
                _check_finite(x, f"dictionary: {tensor} of layer {layer}")
            safetensors.numpy.save_file(tensors, path / name)
            (path / name).chmod(mode)  # safetensors leaves it to the owner alone


def _layer_files(
    params: CLTParams, cfg: CLTConfig, layer: int
) -> dict[str, dict[str, np.ndarray]]:
    """Tensors of one layer by file name and tensor name."""
    names = _LAYOUTS[_PLT if cfg.span == 1 else _CLT]
    W_dec = np.asarray(params.W_dec[layer])
    stacked = {
        names.W_enc: params.W_enc_LFD,
        names.b_enc: params.b_enc_LF,
        names.b_dec: params.b_dec_LD,
        names.theta: params.theta_LF,
    }
    encoder = {k: np.asarray(x)[layer] for k, x in stacked.items() if x is not None}
    if params.W_skip_LDD is not None and names.W_skip is not None:
        encoder[names.W_skip] = np.asarray(params.W_skip_LDD)[layer].T
    decoder = {names.W_dec: W_dec[:, 0] if cfg.span == 1 else W_dec}
    files = {names.encoder_file.format(layer): _float32(encoder, layer)}
    files.setdefault(names.decoder_file.format(layer), {}).update(
        _float32(decoder, layer)
    )
    return files


def _float32(tensors: Mapping[str, np.ndarray], layer: int) -> dict[str, np.ndarray]:
    # contiguous, because safetensors writes the memory, whatever the strides say
    return {
        k.format(layer): np.ascontiguousarray(x, np.float32) for k, x in tensors.items()
    }
