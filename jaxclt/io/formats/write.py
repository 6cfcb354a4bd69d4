"""Writing dictionaries, layer by layer, in the formats that can be written.

What a format has no place for is said by name: `Target.losses`. Nothing is dropped that
was not named.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import yaml

from jaxclt.clt.config import CLTConfig
from jaxclt.clt.store import DictionaryStore, EncoderLayer
from jaxclt.errors import InputError
from jaxclt.io.circuit_tracer_format import (
    CLT,
    HOOKS_OF_READ,
    LAYOUTS,
    PLT,
    WRITE_OF_HOOK,
    Layout,
)
from jaxclt.io.formats.pieces import WriteSite
from jaxclt.io.tensors import check_finite

__all__ = ["LAYOUT_TARGETS", "About", "Layer", "Target", "Tensors", "write_files"]

Tensors = dict[str, np.ndarray]  # by name


class About(NamedTuple):
    """What a dictionary's files say besides its weights and its config."""

    write: WriteSite
    skip: bool  # it has a linear path
    model_name: str | None = None
    scan: str | None = None


class Layer(NamedTuple):
    """One layer's weights, and its place."""

    place: int
    encoder: EncoderLayer
    W_dec_FMD: np.ndarray
    b_dec_D: np.ndarray
    W_skip_DD: np.ndarray | None


class Target(NamedTuple):
    """A format that can be written.

    `losses` says, by name, what would be lost, and raises InputError for a dictionary
    that the format cannot express at all. `texts` are the small files, `tensors` the
    arrays of one layer, by file and name.
    """

    losses: Callable[[CLTConfig, About], dict[str, str]]
    texts: Callable[[CLTConfig, About], dict[str, str]]
    tensors: Callable[[Layer, CLTConfig], dict[str, Tensors]]
    float32: bool = False  # half precision is widened


def write_files(
    target: Target,
    store: DictionaryStore,
    about: About,
    folder: Path,
    *,
    float32: bool = False,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write all files of a dictionary; holds one layer at a time.

    Args:
      target: the format.
      store: where the weights come from.
      about: what else the files say.
      folder: an empty directory.
      float32: in place of the dtype that the store gives.
      on_layer: called with layers done and their number.

    Raises:
      InputError: if a value is not finite.
    """
    cfg = store.cfg
    for name, text in target.texts(cfg, about).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    some = next(x for x in folder.rglob("*") if x.is_file())
    mode, every = stat.S_IMODE(some.stat().st_mode), np.arange(cfg.n_features)
    b_dec_LD = np.asarray(store.b_dec())
    for i in range(cfg.n_layers):
        layer = Layer(
            i,
            store.encoder(i),
            np.asarray(store.decoder_rows(i, every)),
            b_dec_LD[i],
            store.skip(i) if about.skip else None,
        )
        for name, tensors in target.tensors(layer, cfg).items():
            kept = {}
            for key, x in tensors.items():
                check_finite(x, f"dictionary: {key} of layer {i}")
                wide = float32 or (target.float32 and x.dtype.itemsize < 4)
                # contiguous: safetensors writes the memory, whatever the strides say
                kept[key] = np.ascontiguousarray(x, np.float32 if wide else x.dtype)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".npz"):
                np.savez(folder / name, **kept)
            else:
                safetensors.numpy.save_file(kept, folder / name)
            (folder / name).chmod(mode)  # safetensors leaves it to the owner alone
        on_layer(i + 1, cfg.n_layers)


# -- what circuit-tracer's config.yaml can describe ------------------------------------


def _layout_of(format: str, cfg: CLTConfig) -> Layout:
    """The layout of a format for a dictionary's kind.

    Raises:
      InputError: if the format has none.
    """
    kind = PLT if cfg.span == 1 else CLT
    for layout in LAYOUTS:
        if (layout.format, layout.model_kind) == (format, kind):
            return layout
    raise InputError(
        f"{format} has only per-layer transcoders, but features here write {cfg.span} "
        "layers; choose another format"
    )


def _layout_texts(format: str) -> Callable[[CLTConfig, About], dict[str, str]]:
    def texts(cfg: CLTConfig, about: About) -> dict[str, str]:
        layout, hooks = (
            _layout_of(format, cfg),
            {v: k for k, v in WRITE_OF_HOOK.items()},
        )
        config: dict[str, Any] = {
            "model_kind": layout.model_kind,
            "model_name": about.model_name,
            "feature_input_hook": HOOKS_OF_READ[cfg.read][0],
            "feature_output_hook": hooks[about.write],
        }
        if cfg.competes:
            config |= {"activation": "topk", "k": cfg.k}
        if about.scan is not None:
            config["scan"] = about.scan
        if format != "circuit-tracer":
            files = [layout.encoder_file.format(i) for i in range(cfg.n_layers)]
            config["transcoders"] = files
        config = {k: v for k, v in config.items() if v is not None}
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        return {"config.yaml": text}

    return texts


def _layout_tensors(
    format: str,
) -> Callable[[Layer, CLTConfig], dict[str, Tensors]]:
    return lambda layer, cfg: _layout_layer(_layout_of(format, cfg), layer, cfg)


def _layout_layer(layout: Layout, layer: Layer, cfg: CLTConfig) -> dict[str, Tensors]:
    enc, W_dec, i = layer.encoder, layer.W_dec_FMD, layer.place
    theta_F = enc.theta_F
    if theta_F is None and layout.format != "circuit-tracer":
        theta_F = np.zeros_like(enc.b_enc_F)  # a ReLU
    encoder = {
        layout.W_enc: enc.W_enc_FD if layout.enc_axes == "FD" else enc.W_enc_FD.T,
        layout.b_enc: enc.b_enc_F,
        layout.b_dec: layer.b_dec_D,
    }
    if theta_F is not None:
        encoder[layout.theta] = theta_F
    if layer.W_skip_DD is not None and layout.W_skip is not None:
        W = layer.W_skip_DD
        encoder[layout.W_skip] = W if layout.skip_axes == "io" else W.T
    if layout.writes == "own":
        W_dec = W_dec[:, 0]
    elif layout.writes == "all":
        W_dec = np.zeros((len(W_dec), cfg.n_layers, cfg.d_model), W_dec.dtype)
        W_dec[:, i : i + cfg.n_writes(i)] = layer.W_dec_FMD
    files = {
        layout.encoder_file.format(i): {k.format(i): x for k, x in encoder.items()}
    }
    files.setdefault(layout.decoder_file.format(i), {})[layout.W_dec.format(i)] = W_dec
    return files


def _of_circuit_tracer(cfg: CLTConfig, about: About) -> dict[str, str]:
    if cfg.activation == "groupmax":
        raise InputError("circuit-tracer has no groupmax; choose --to sparsify")
    lost = {}
    if cfg.activation == "relu_topk":
        lost["relu"] = (
            "its TopK has no ReLU: where fewer than k features are positive, negative "
            "ones would be active"
        )
    if about.skip and cfg.span > 1:
        lost["skip"] = (
            "it has no place for the linear skip of a CLT (gemma-scope-2 has)"
        )
    if 1 < cfg.span < cfg.n_layers:
        lost["span"] = (
            f"circuit-tracer itself reads only 1 or all layers, not {cfg.span}; jaxclt "
            "reads it (gemma-scope-2 fills up with zeros)"
        )
    return lost


def _of_scope(format: str) -> Callable[[CLTConfig, About], dict[str, str]]:
    def losses(cfg: CLTConfig, about: About) -> dict[str, str]:
        if cfg.competes:
            raise InputError(f"{format} is JumpReLU, it has no {cfg.activation}")
        layout = _layout_of(format, cfg)
        if about.skip and layout.W_skip is None:
            return {"skip": f"{format} has no place for a linear skip"}
        return {}

    return losses


LAYOUT_TARGETS = {
    "circuit-tracer": Target(
        _of_circuit_tracer,
        _layout_texts("circuit-tracer"),
        _layout_tensors("circuit-tracer"),
    ),
    "gemma-scope": Target(
        _of_scope("gemma-scope"),
        _layout_texts("gemma-scope"),
        _layout_tensors("gemma-scope"),
        float32=True,  # numpy's files have no bfloat16
    ),
    "gemma-scope-2": Target(
        _of_scope("gemma-scope-2"),
        _layout_texts("gemma-scope-2"),
        _layout_tensors("gemma-scope-2"),
    ),
}
