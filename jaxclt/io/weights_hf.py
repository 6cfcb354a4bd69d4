"""Llama models in the Hugging Face layout: config.json and safetensors.

Reading accepts what transformers 4 and 5 write. What cannot be computed exactly by this
library's language model (scaled rotary embeddings, other families) is refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxclt.errors import InputError
from jaxclt.io.atomic import atomic_path
from jaxclt.io.names import LLAMA, from_leaf, read_params, tensor_name
from jaxclt.io.weights_safetensors import open_weights, read_json
from jaxclt.lm.config import LMConfig
from jaxclt.types import LMParams

__all__ = ["config_from_hf", "config_to_hf", "load_hf", "save_hf", "shape_from_hf"]

_MODEL_TYPES = ("llama",)
_ACTS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}


def config_from_hf(hf: dict[str, Any]) -> LMConfig:
    """Config of a model from the content of its config.json.

    Raises:
      InputError: for another model_type, activation or kind of rotary embedding than
        the supported ones, or a missing or impossible size.
    """
    kind = hf.get("model_type")
    if kind not in _MODEL_TYPES:
        raise InputError(
            f"config.json: model_type {kind!r} is not supported; "
            f"supported: {', '.join(_MODEL_TYPES)}"
        )
    act = hf.get("hidden_act", "silu")
    if act not in _ACTS:
        raise InputError(
            f"config.json: hidden_act {act!r} is not supported; "
            f"supported: {', '.join(_ACTS)}"
        )
    return dataclasses.replace(
        shape_from_hf(hf),
        norm_eps=_float(hf, "rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(hf),
        act=_ACTS[act],
    )


def shape_from_hf(hf: dict[str, Any]) -> LMConfig:
    """Sizes alone, of any decoder whose config.json names them as Llama's does.

    Raises:
      InputError: for a missing or impossible size.
    """
    d_model = _int(hf, "hidden_size")
    n_heads = _int(hf, "num_attention_heads")
    return LMConfig(
        n_layers=_int(hf, "num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=_int(hf, "num_key_value_heads", n_heads),
        d_head=_int(hf, "head_dim", d_model // max(n_heads, 1)),
        d_mlp=_int(hf, "intermediate_size"),
        d_vocab=_int(hf, "vocab_size"),
        n_ctx=_int(hf, "max_position_embeddings", 2048),
    )


def config_to_hf(cfg: LMConfig, params: LMParams) -> dict[str, Any]:
    """Content of a config.json that transformers reads as the same model.

    Raises:
      InputError: if only some of the projections of a block have a bias, which the
        llama layout cannot say.
    """
    has = _options(params)
    acts = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_mlp,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.d_head,
        "vocab_size": cfg.d_vocab,
        "max_position_embeddings": cfg.n_ctx,
        "rms_norm_eps": cfg.norm_eps,
        "hidden_act": acts[cfg.act],
        # transformers 5 reads the first, older releases the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "rope_theta": cfg.rope_theta,
        "attention_bias": "attention_bias" in has,
        "mlp_bias": "mlp_bias" in has,
        "tie_word_embeddings": "untied" not in has,
        "dtype": str(params.embed_VD.dtype),
    }


def load_hf(directory: str | os.PathLike[str]) -> tuple[LMParams, LMConfig]:
    """Read config.json and the safetensors of a directory; weights become float32.

    Raises:
      InputError: for whatever is wrong with the files, in one line.
    """
    root = Path(directory)
    hf = read_json(root / "config.json")
    try:
        cfg = config_from_hf(hf)
    except InputError as error:
        raise InputError(f"{root}: {error}") from error
    options = {name for name in ("attention_bias", "mlp_bias") if hf.get(name)}
    if not hf.get("tie_word_embeddings", False):
        options.add("untied")
    weights = open_weights(root)
    params = read_params(
        weights.get,
        weights.shapes,
        cfg,
        source="hf",
        where=str(root),
        options=options,
        ignore=lambda name: _redundant(name, tied="untied" not in options),
    )
    return params, cfg


def save_hf(params: LMParams, cfg: LMConfig, directory: str | os.PathLike[str]) -> None:
    """Write config.json and model.safetensors, in the dtype that `params` has.

    Each file appears whole or not at all, the weights first; other files of the
    directory (a tokenizer) stay.

    Raises:
      InputError: if the directory cannot be written, or only some biases exist.
    """
    root = Path(directory)
    config = config_to_hf(cfg, params)
    tensors = {}
    for row in LLAMA:
        leaf = getattr(params.blocks if row.per_layer else params, row.leaf)
        if leaf is None:
            continue
        whole = np.asarray(jax.device_get(leaf))
        for i, one in enumerate(whole if row.per_layer else whole[None]):
            name = tensor_name(row, "hf", i)
            tensors[name] = np.ascontiguousarray(from_leaf(one, row, cfg))
    with atomic_path(root / "model.safetensors") as path:
        save_file(tensors, path, metadata={"format": "pt"})
    with atomic_path(root / "config.json") as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _redundant(name: str, *, tied: bool) -> bool:
    """Tensors that carry nothing: a second copy of the embedding, or constants."""
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _options(params: LMParams) -> set[str]:
    """Which optional leaves exist; all of an option's leaves or none."""
    found: dict[str, set[bool]] = {}
    for row in LLAMA:
        if row.option:
            leaf = getattr(params.blocks if row.per_layer else params, row.leaf)
            found.setdefault(row.option, set()).add(leaf is not None)
    for option, exists in found.items():
        if len(exists) > 1:
            raise InputError(
                f"{option}: the llama layout has all of these biases or none; "
                "fill the absent ones with zeros"
            )
    return {option for option, exists in found.items() if exists == {True}}


def _rope_theta(hf: dict[str, Any]) -> float:
    """Base of the rotary frequencies; transformers 5 nests it, older ones do not."""
    new = hf.get("rope_parameters") or {}
    old = hf.get("rope_scaling") or {}
    for rope in (new, old):
        if not isinstance(rope, dict):
            raise InputError("config.json: rope parameters must be an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        nested = any(isinstance(value, dict) for value in rope.values())
        if kind != "default" or nested:
            shown = "one per kind of layer" if nested else repr(kind)
            raise InputError(
                f"config.json: rotary embeddings of type {shown} are not supported; "
                "supported: 'default'"
            )
    for rope in (new, old, hf):
        if rope.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
            raise InputError(
                "config.json: partial_rotary_factor is not supported; "
                "supported: rotary embeddings over the whole head"
            )
    return _float({**hf, **new}, "rope_theta", 10_000.0)


def _int(hf: dict[str, Any], key: str, default: int | None = None) -> int:
    value = hf.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"config.json: {key} must be an integer, not {value!r}")
    return value


def _float(hf: dict[str, Any], key: str, default: float) -> float:
    value = hf.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise InputError(f"config.json: {key} must be a positive number, not {value!r}")
    return float(value)
