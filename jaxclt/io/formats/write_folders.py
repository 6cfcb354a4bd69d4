"""Writing formats that have a directory for each layer: SAELens and sparsify."""

from __future__ import annotations

import numpy as np

from jaxclt.clt.config import CLTConfig
from jaxclt.errors import InputError
from jaxclt.files.json_text import to_json
from jaxclt.io.formats import saelens, sparsify
from jaxclt.io.formats.write import LAYOUT_TARGETS, About, Layer, Target, Tensors

__all__ = ["TARGETS"]

_SAELENS_READS = {
    "resid_mid": "hook_resid_mid",
    "normalized": "ln2.hook_normalized",
    "mlp_in": "mlp.hook_in",
}
_SAELENS_WRITES = {"stream": "hook_mlp_out", "mlp": "mlp.hook_out"}


def _refuse_spans(format: str, cfg: CLTConfig) -> None:
    if cfg.span > 1:
        raise InputError(
            f"{format} has only per-layer transcoders, but features here write "
            f"{cfg.span} layers; choose another format"
        )


def _of_saelens(cfg: CLTConfig, about: About) -> dict[str, str]:
    _refuse_spans("saelens", cfg)
    if cfg.competes:
        raise InputError(f"saelens has no transcoders with {cfg.activation}")
    return {} if about.scan is None else {"scan": "saelens has no place for `scan`"}


def _saelens_texts(cfg: CLTConfig, about: About) -> dict[str, str]:
    kinds = {(x.theta, x.skip): name for name, x in saelens.ARCHITECTURES.items()}
    texts = {}
    for i in range(cfg.n_layers):
        config = {
            "architecture": kinds[cfg.activation == "jumprelu", about.skip],
            "d_in": cfg.d_model,
            "d_sae": cfg.n_features,
            "d_out": cfg.d_model,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {
                "model_name": about.model_name,
                "hook_name": f"blocks.{i}.{_SAELENS_READS[cfg.read]}",
                "hook_name_out": f"blocks.{i}.{_SAELENS_WRITES[about.write]}",
            },
        }
        texts[f"layer_{i}/{saelens.CONFIG}"] = to_json(config, indent=2) + "\n"
    return texts


def _saelens_layer(layer: Layer, cfg: CLTConfig) -> dict[str, Tensors]:
    del cfg
    theta_F = layer.encoder.theta_F
    if theta_F is not None and (np.asarray(theta_F) < 0).any():
        raise InputError(
            f"layer {layer.place} has thresholds below 0, but saelens has a ReLU in "
            "front of them; choose another format"
        )
    tensors = {
        "W_enc": layer.encoder.W_enc_FD.T,
        "b_enc": layer.encoder.b_enc_F,
        "W_dec": layer.W_dec_FMD[:, 0],
        "b_dec": layer.b_dec_D,
    }
    if theta_F is not None:
        tensors["threshold"] = theta_F
    if layer.W_skip_DD is not None:
        tensors["W_skip"] = layer.W_skip_DD.T
    return {f"layer_{layer.place}/{saelens.WEIGHTS}": tensors}


def _of_sparsify(cfg: CLTConfig, about: About) -> dict[str, str]:
    _refuse_spans("sparsify", cfg)
    if cfg.activation not in ("relu", *sparsify.ACTIVATIONS.values()):
        raise InputError(
            f"sparsify has TopK behind a ReLU and groupmax, it has no {cfg.activation}"
        )
    if cfg.read != "mlp_in":
        raise InputError(
            f"sparsify's coders read what an MLP reads, but this one reads {cfg.read}"
        )
    lost = {}
    if about.write == "stream":
        lost["write"] = (
            "its coders write ahead of a norm behind the MLP; in a model that has none "
            "nothing is lost"
        )
    for name in ("model_name", "scan"):
        if getattr(about, name) is not None:
            lost[name] = f"sparsify has no place for `{name}`"
    return lost


def _sparsify_texts(cfg: CLTConfig, about: About) -> dict[str, str]:
    names = {v: k for k, v in sparsify.ACTIVATIONS.items()}
    config = {
        "activation": names.get(cfg.activation, "topk"),
        "num_latents": cfg.n_features,
        "k": cfg.n_features if cfg.activation == "relu" else cfg.k,
        "multi_topk": False,
        "normalize_decoder": False,
        "skip_connection": about.skip,
        "transcode": True,
        "d_in": cfg.d_model,
    }
    text = to_json(config, indent=2) + "\n"
    return {f"layers.{i}.mlp/{sparsify.CONFIG}": text for i in range(cfg.n_layers)}


def _sparsify_layer(layer: Layer, cfg: CLTConfig) -> dict[str, Tensors]:
    del cfg
    tensors = {
        "encoder.weight": layer.encoder.W_enc_FD,
        "encoder.bias": layer.encoder.b_enc_F,
        "W_dec": layer.W_dec_FMD[:, 0],
        "b_dec": layer.b_dec_D,
    }
    if layer.W_skip_DD is not None:
        tensors["W_skip"] = layer.W_skip_DD.T
    return {f"layers.{layer.place}.mlp/{sparsify.WEIGHTS}": tensors}


TARGETS: dict[str, Target] = {
    **LAYOUT_TARGETS,
    "saelens": Target(_of_saelens, _saelens_texts, _saelens_layer, float32=True),
    "sparsify": Target(_of_sparsify, _sparsify_texts, _sparsify_layer),
}
