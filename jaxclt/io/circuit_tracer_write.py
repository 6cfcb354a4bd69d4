"""Writing a dictionary in circuit-tracer's format, bit-exactly in float32."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import yaml

from jaxclt.clt import params as clt_params
from jaxclt.clt.config import CLTConfig
from jaxclt.errors import InputError
from jaxclt.io.atomic import atomic_directory
from jaxclt.io.circuit_tracer_format import CLT, HOOKS_OF_READ, LAYOUTS, OWN_FILE, PLT
from jaxclt.io.tensors import check_finite
from jaxclt.types import CLTParams

__all__ = ["save_dictionary"]


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
    foreign = [name for name in names if not OWN_FILE.fullmatch(name)]
    if foreign or (names and "config.yaml" not in names):
        raise InputError(
            f"{path} exists and is not only a dictionary (it holds "
            f"{(foreign or names)[0]}); choose another output directory"
        )


def _yaml(cfg: CLTConfig, model_name: str, scan: str | None) -> str:
    read, write = HOOKS_OF_READ[cfg.read]
    config: dict[str, Any] = {
        "model_kind": PLT if cfg.span == 1 else CLT,
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
                check_finite(x, f"dictionary: {tensor} of layer {layer}")
            safetensors.numpy.save_file(tensors, path / name)
            (path / name).chmod(mode)  # safetensors leaves it to the owner alone


def _layer_files(
    params: CLTParams, cfg: CLTConfig, layer: int
) -> dict[str, dict[str, np.ndarray]]:
    """Tensors of one layer by file name and tensor name."""
    names = LAYOUTS[PLT if cfg.span == 1 else CLT]
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
