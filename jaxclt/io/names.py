"""Where every leaf of LMParams lies in files, as one table, and how to fill it.

A file stores a matrix as [out, in] and keeps heads and their channels in one axis; ours
are input-first with separate axes. A row of the table says both: `stored` lists the
axes in the file, one word each, where "HC" is one axis of length H * C; the suffix of
the leaf says the order that is wanted.

llama.cpp rotates neighbouring channels (2j, 2j + 1) while Hugging Face and this library
rotate the halves (j, j + C/2), so GGUF files hold the rows of query and key heads
interleaved in the architectures that it runs so; rows marked `rotary` are put back in
the order of halves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp
import numpy as np

from jaxclt.errors import InputError
from jaxclt.lm.config import LMConfig
from jaxclt.types import Block, LMParams

__all__ = ["GEMMA", "LLAMA", "QWEN", "Layout", "Row", "Source", "from_leaf"]
__all__ += ["read_params", "stored_shape", "tensor_name", "to_leaf"]

Source = Literal["hf", "gguf"]


@dataclass(frozen=True)
class Row:
    """One leaf: its name here and in files, and the axes of the stored tensor."""

    leaf: str
    hf: str
    gguf: str
    stored: str
    option: str | None = None  # the leaf exists only where this option is on
    or_option: str | None = None  # or this
    rotary: bool = False  # GGUF interleaves the channels

    @property
    def axes(self) -> str:
        """Axes of one layer of the leaf, in order."""
        return self.leaf.rpartition("_")[2].removeprefix("L")

    def exists(self, options: Collection[str]) -> bool:
        """Whether a model with these options has the leaf."""
        return self.option is None or bool({self.option, self.or_option} & {*options})

    @property
    def is_gain(self) -> bool:
        """Whether it is the gain of a norm."""
        return "norm" in self.leaf or self.leaf.startswith("post_")

    @property
    def per_layer(self) -> bool:
        """Whether the leaf is stacked over layers (a field of Block)."""
        return "{i}" in self.hf


def _layer(leaf: str, hf: str, gguf: str, stored: str, **kw) -> Row:
    return Row(leaf, f"model.layers.{{i}}.{hf}", f"blk.{{i}}.{gguf}", stored, **kw)


_ATTN = {"option": "attention_bias"}
_QKV = _ATTN | {"or_option": "qkv_bias"}
_MLP = {"option": "mlp_bias"}

# fmt: off
LLAMA: tuple[Row, ...] = (
    Row("embed_VD", "model.embed_tokens.weight", "token_embd.weight", "V D"),
    Row("norm_out_D", "model.norm.weight", "output_norm.weight", "D"),
    Row("unembed_DV", "lm_head.weight", "output.weight", "V D", option="untied"),
    _layer("norm_attn_LD", "input_layernorm.weight", "attn_norm.weight", "D"),
    _layer("q_LDHC", "self_attn.q_proj.weight", "attn_q.weight", "HC D", rotary=True),
    _layer("k_LDGC", "self_attn.k_proj.weight", "attn_k.weight", "GC D", rotary=True),
    _layer("v_LDGC", "self_attn.v_proj.weight", "attn_v.weight", "GC D"),
    _layer("o_LHCD", "self_attn.o_proj.weight", "attn_output.weight", "D HC"),
    _layer("norm_mlp_LD", "post_attention_layernorm.weight", "ffn_norm.weight", "D"),
    _layer("gate_LDI", "mlp.gate_proj.weight", "ffn_gate.weight", "I D"),
    _layer("up_LDI", "mlp.up_proj.weight", "ffn_up.weight", "I D"),
    _layer("down_LID", "mlp.down_proj.weight", "ffn_down.weight", "D I"),
    _layer("q_bias_LHC", "self_attn.q_proj.bias", "attn_q.bias", "HC", rotary=True,
           **_QKV),
    _layer("k_bias_LGC", "self_attn.k_proj.bias", "attn_k.bias", "GC", rotary=True,
           **_QKV),
    _layer("v_bias_LGC", "self_attn.v_proj.bias", "attn_v.bias", "GC", **_QKV),
    _layer("o_bias_LD", "self_attn.o_proj.bias", "attn_output.bias", "D", **_ATTN),
    _layer("gate_bias_LI", "mlp.gate_proj.bias", "ffn_gate.bias", "I", **_MLP),
    _layer("up_bias_LI", "mlp.up_proj.bias", "ffn_up.bias", "I", **_MLP),
    _layer("down_bias_LD", "mlp.down_proj.bias", "ffn_down.bias", "D", **_MLP),
)
_QK_NORM: tuple[Row, ...] = (
    _layer("q_norm_LC", "self_attn.q_norm.weight", "attn_q_norm.weight", "C",
           option="qk_norm"),
    _layer("k_norm_LC", "self_attn.k_norm.weight", "attn_k_norm.weight", "C",
           option="qk_norm"),
)
# Gemma's post_attention_layernorm is behind the attention, not ahead of the MLP.
_SANDWICH: tuple[Row, ...] = (
    _layer("norm_mlp_LD", "pre_feedforward_layernorm.weight", "ffn_norm.weight", "D"),
    _layer("post_attn_LD", "post_attention_layernorm.weight",
           "post_attention_norm.weight", "D"),
    _layer("post_mlp_LD", "post_feedforward_layernorm.weight", "post_ffw_norm.weight",
           "D"),
)
# fmt: on
QWEN: tuple[Row, ...] = (*(replace(row, rotary=False) for row in LLAMA), *_QK_NORM)
GEMMA: tuple[Row, ...] = (
    *(row for row in QWEN if row.leaf != "norm_mlp_LD"),
    *_SANDWICH,
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the files of a model hold, and what they do not say of its weights."""

    rows: tuple[Row, ...] = LLAMA
    options: frozenset[str] = frozenset()  # which optional leaves exist
    gain_offset: float = 0.0  # files hold gains minus this
    local: tuple[bool, ...] | None = None  # `Block.local_L`
    embed_scale: float | None = None
    logit_cap: float | None = None


def tensor_name(row: Row, source: Source, layer: int = 0) -> str:
    """Name of the stored tensor of one layer."""
    return getattr(row, source).format(i=layer)


def stored_shape(row: Row, cfg: LMConfig) -> tuple[int, ...]:
    """Shape that the tensor of one layer has in files."""
    size = _sizes(cfg)
    return tuple(math.prod(size[x] for x in word) for word in row.stored.split())


def to_leaf(w: np.ndarray, row: Row, cfg: LMConfig, source: Source) -> np.ndarray:
    """One stored tensor -> the leaf of one layer, axes as `row.axes`; a view if it can.

    The shape of `w` is `stored_shape(row, cfg)`.
    """
    size, letters = _sizes(cfg), row.stored.replace(" ", "")
    w = w.reshape([size[x] for x in letters])
    if source == "gguf" and row.rotary:
        w = _halves(w, letters.index("C"))
    return w.transpose([letters.index(x) for x in row.axes])


def from_leaf(leaf: np.ndarray, row: Row, cfg: LMConfig) -> np.ndarray:
    """Inverse of `to_leaf` for Hugging Face files."""
    order = [row.axes.index(x) for x in row.stored.replace(" ", "")]
    return leaf.transpose(order).reshape(stored_shape(row, cfg))


def read_params(
    get: Callable[[str], np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    cfg: LMConfig,
    *,
    layout: Layout,
    source: Source,
    where: str,
    ignore: Callable[[str], bool] = lambda name: False,
) -> LMParams:
    """Fill LMParams (float32) from named tensors.

    Args:
      get: name -> float32 array in the stored shape; called from several threads.
      shapes: stored shape of every tensor that the file holds.
      cfg: sizes of the model.
      layout: which leaves there are, and where.
      source: whose names and channel order the file uses.
      where: the file or directory, for messages.
      ignore: tensors that may be left unread.

    Raises:
      InputError: for a missing, unknown, wrongly shaped or not finite tensor.
    """
    if cfg.n_layers > len(shapes):
        raise InputError(
            f"{where}: the config has {cfg.n_layers} layers but the weights only "
            f"{len(shapes)} tensors"
        )
    rows = [row for row in layout.rows if row.exists(layout.options)]
    jobs = [
        (row, i, tensor_name(row, source, i))
        for row in rows
        for i in range(cfg.n_layers if row.per_layer else 1)
    ]
    _check_names({name for _, _, name in jobs}, shapes, where, ignore)
    # Before anything is allocated: a damaged config may ask for any amount.
    for row, _, name in jobs:
        wanted = stored_shape(row, cfg)
        if shapes[name] != wanted:
            raise InputError(
                f"{where}: tensor {name} has shape {shapes[name]} instead of "
                f"{wanted}, which the config asks for"
            )

    size = _sizes(cfg)
    leaves = {
        row.leaf: np.empty(
            [cfg.n_layers] * row.per_layer + [size[x] for x in row.axes], np.float32
        )
        for row in rows
    }

    def fill(job: tuple[Row, int, str]) -> None:
        row, i, name = job
        w = get(name)
        if not np.isfinite(w).all():
            raise InputError(f"{where}: tensor {name} contains NaN or infinity")
        leaf = to_leaf(w, row, cfg, source)
        if layout.gain_offset and row.is_gain:
            leaf = leaf + np.float32(layout.gain_offset)
        leaves[row.leaf][i if row.per_layer else ...] = leaf

    # Most of the time is numpy on large arrays, which releases the interpreter lock.
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(fill, jobs):
            pass

    # Popped as they go: two copies of a large model may not fit.
    arrays = {name: jnp.asarray(leaves.pop(name)) for name in list(leaves)}
    local_L = None if layout.local is None else jnp.asarray(layout.local, bool)
    blocks = Block(
        **{r.leaf: arrays.pop(r.leaf) for r in rows if r.per_layer}, local_L=local_L
    )
    for name in ("embed_scale", "logit_cap"):
        value = getattr(layout, name)
        if value is not None:
            arrays[name] = jnp.asarray(value, jnp.float32)
    return LMParams(blocks=blocks, **arrays)


def _check_names(
    wanted: set[str],
    names: Collection[str],
    where: str,
    ignore: Callable[[str], bool],
) -> None:
    present = set(names)
    for name in sorted(wanted - present):
        raise InputError(f"{where}: tensor {name} is missing from the weights")
    # An unread tensor means the model computes something that this library does not.
    for name in sorted(present - wanted):
        if not ignore(name):
            raise InputError(
                f"{where}: tensor {name} does not belong to a model of this "
                "config; its weights and its config disagree"
            )


def _sizes(cfg: LMConfig) -> dict[str, int]:
    return {
        "D": cfg.d_model,
        "H": cfg.n_heads,
        "G": cfg.n_kv_heads,
        "C": cfg.d_head,
        "I": cfg.d_mlp,
        "V": cfg.d_vocab,
    }


def _halves(w: np.ndarray, axis: int) -> np.ndarray:
    """Reorder channels x0 y0 x1 y1 ... -> x0 x1 ... y0 y1 ... along `axis`."""
    before, C, after = w.shape[:axis], w.shape[axis], w.shape[axis + 1 :]
    pairs = w.reshape(*before, C // 2, 2, *after)
    return pairs.swapaxes(axis, axis + 1).reshape(w.shape)
