"""Models in the Hugging Face layout: config.json and safetensors.

The weights are one `model.safetensors`, or shards with `model.safetensors.index.json`.
Of a tensor only the slices that are asked for are read; pickles are never opened.
Reading accepts what transformers 4 and 5 write, of the families of
`jaxclt.io.families`; writing is for models that are like Llama.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file

from jaxclt.errors import InputError, shown
from jaxclt.files.atomic import atomic_path, write_text
from jaxclt.files.json_file import read_json
from jaxclt.files.json_text import to_json
from jaxclt.io.config_hf import describe_hf
from jaxclt.io.names import Layout, from_leaf, tensor_name
from jaxclt.io.read_params import Stored, read_params
from jaxclt.io.rows import LLAMA
from jaxclt.io.tensors import TensorFile, open_tensors, refuse_pickles
from jaxclt.lm.config import LMConfig
from jaxclt.types import LMParams

__all__ = ["config_to_hf", "load_hf", "save_hf"]


_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def config_to_hf(cfg: LMConfig, params: LMParams) -> dict[str, Any]:
    """Content of a config.json that transformers reads as the same model.

    Raises:
      InputError: if only some of the projections of a block have a bias, or for a part
        that llama models do not have: the llama layout cannot say it.
    """
    _demand_llama(cfg, params)
    has = _options(params)
    acts = {"gelu_tanh": "gelu_pytorch_tanh"}
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
        "hidden_act": acts.get(cfg.act, cfg.act),
        # transformers 5 reads the first, older releases the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "rope_theta": cfg.rope_theta,
        "attention_bias": "attention_bias" in has,
        "mlp_bias": "mlp_bias" in has,
        "tie_word_embeddings": "untied" not in has,
        "dtype": str(params.embed_VD.dtype),
    }


def load_hf(
    directory: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
) -> tuple[LMParams, LMConfig]:
    """Read config.json and the safetensors of a directory.

    Args:
      directory: where they are.
      dtype: of the weights, whatever the files hold.
      mesh: devices to split them over.

    Raises:
      InputError: for whatever is wrong with the files, in one line.
    """
    root = Path(directory)
    hf = read_json(root / "config.json")
    try:
        cfg, layout = describe_hf(hf)
    except InputError as error:
        raise InputError(f"{root}: {error}") from error
    files = _locate_tensors(root)
    theirs = {_our_name(name, layout): name for name in files}
    layout = _tied_or_not(layout, theirs)
    if len(theirs) < len(files):
        raise InputError(f"{root}: a tensor is there twice, under two names")

    def get(ours: str, part: tuple[slice, ...], /) -> np.ndarray:
        return _read_part(files[theirs[ours]], theirs[ours], part)

    shapes = {ours: files[name].tensors[name].shape for ours, name in theirs.items()}
    stored = Stored(str(root), "hf", shapes, get)
    return read_params(stored, cfg, _all_unread(layout), dtype=dtype, mesh=mesh), cfg


def _locate_tensors(directory: Path) -> dict[str, TensorFile]:
    """The file that each tensor of a directory lies in; reads no data yet.

    Raises:
      InputError: when there are only pickled weights or none, or when a file is
        truncated, damaged or missing.
    """
    if (directory / _SINGLE).is_file():
        file = open_tensors(directory / _SINGLE, others=True)
        return dict.fromkeys(file.tensors, file)
    if not (directory / _INDEX).is_file():
        refuse_pickles(directory)
        raise InputError(f"{directory} holds no {_SINGLE} and no {_INDEX}")
    wanted, where = _read_index(directory / _INDEX), {}
    for shard in sorted(set(wanted.values())):
        path = directory / shard
        if not os.path.isfile(path):  # which knows no impossible names
            raise InputError(f"shard {path} is missing; fetch the model again")
        file = open_tensors(path, others=True)
        listed = {name for name, place in wanted.items() if place == shard}
        for name in sorted(listed - set(file.tensors)):
            raise InputError(
                f"{path}: tensor {name} is missing although {_INDEX} lists it; "
                "fetch the model again"
            )
        where |= dict.fromkeys(listed, file)
    return where


def _read_part(file: TensorFile, name: str, part: tuple[slice, ...]) -> np.ndarray:
    """A slice of each axis of a tensor, float32.

    Raises:
      InputError: for a tensor that is not of a floating point type, or unreadable.
    """
    if file.tensors[name].other:
        raise InputError(
            f"{file.path}: cannot read tensor {name} (its type is "
            f"{file.tensors[name].other.strip(chr(39))}, not floating point)"
        )
    try:
        return np.asarray(file.map(name)[part]).astype(np.float32, copy=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{file.path}: cannot read tensor {name} ({error})") from error


def _read_index(path: Path) -> dict[str, str]:
    wanted = read_json(path).get("weight_map")
    if not isinstance(wanted, dict) or not wanted:
        raise InputError(f"{path} has no weight_map; fetch the model again")
    for shard in wanted.values():
        # A shard lies beside its index: an index must not reach elsewhere.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(
                f"{path} names a shard outside its directory: {shown(shard)}"
            )
    return wanted


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
    write_text(root / "config.json", to_json(config, indent=2) + "\n")


def _our_name(name: str, layout: Layout) -> str:
    """A tensor's name as our table has it."""
    for theirs, ours in layout.prefixes:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _tied_or_not(layout: Layout, names: Collection[str]) -> Layout:
    """Whether the unembedding is the embedding, if the config leaves it open."""
    if layout.tied is not None:
        return layout
    (unembed,) = (row.hf for row in layout.rows if row.leaf == "unembed_DV")
    own = {"untied"} if unembed in names else set()
    return dataclasses.replace(layout, options=layout.options - {"untied"} | own)


def _all_unread(layout: Layout) -> Layout:
    """With what carries nothing: a second copy of the embedding, and constants."""
    tied = [
        row.hf
        for row in layout.rows
        if row.leaf == "unembed_DV" and not row.exists(layout.options)
    ]
    unread = ("*rotary_emb.inv_freq", *tied, *layout.unread)
    return dataclasses.replace(layout, unread=unread)


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


def _demand_llama(cfg: LMConfig, params: LMParams) -> None:
    """Refuse what would be lost in a llama config.json."""
    known = {row.leaf for row in LLAMA} | {"blocks"}
    odd = [
        name
        for part in (params, params.blocks)
        for name, leaf in vars(part).items()
        if leaf is not None and name not in known
    ]
    odd += [
        field.name
        for field in dataclasses.fields(cfg)
        if field.name in _NOT_LLAMA and getattr(cfg, field.name) != field.default
    ]
    if params.blocks.gate_LDI is None:
        odd.append("an MLP without a gate")
    if params.blocks.norm_attn_LD is None or params.blocks.norm_mlp_LD is None:
        odd.append("layers without a norm before them")
    if odd:
        raise InputError(
            f"the llama layout cannot say {', '.join(odd)}; only models like Llama "
            "can be saved"
        )


_NOT_LLAMA = {"rope_scaling", "rope_local_theta", "window", "query_scale", "attn_cap"}
_NOT_LLAMA |= {"d_rotary", "parallel", "norm_turned"}
