"""Where every leaf of LMParams lies in files, as one table.

A file stores a matrix as [out, in] and keeps heads and their channels in one axis; ours
are input-first with separate axes. A row of the table says both: `stored` lists the
axes in the file, one word each, where "HC" is one axis of length H * C; the suffix of
the leaf says the order that is wanted. Queries, keys and values may lie in one tensor:
the axis "3" is then theirs, wherever it stands, and each takes its `part`.

llama.cpp rotates neighbouring channels (2j, 2j + 1) while Hugging Face and this library
rotate the halves (j, j + C/2), so GGUF files hold the rows of query and key heads
interleaved in the architectures that it runs so; rows marked `rotary` are put back in
the order of halves.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from jaxclt.lm.config import LMConfig

__all__ = ["GEMMA", "GPT2", "GPT_NEOX", "LLAMA", "QWEN", "Layout", "Part", "Row"]
__all__ += ["Source", "find_part", "from_leaf", "leaf_sizes", "stored_shape"]
__all__ += ["tensor_name", "to_leaf"]

Source = Literal["hf", "gguf"]


@dataclass(frozen=True)
class Row:
    """One leaf: its name here and in files, and the axes of the stored tensor."""

    leaf: str
    hf: str
    gguf: str
    stored: str
    stored_gguf: str | None = None  # None: as elsewhere
    part: int | None = None  # of the axis "3"
    option: str | None = None  # the leaf exists only where this option is on
    or_option: str | None = None  # or this
    rotary: bool = False  # GGUF interleaves the channels

    @property
    def axes(self) -> str:
        """Axes of one layer of the leaf, in order."""
        return self.leaf.rpartition("_")[2].removeprefix("L")

    def axes_in(self, source: Source) -> str:
        """Axes of the stored tensor of one layer."""
        return (source == "gguf" and self.stored_gguf) or self.stored

    def exists(self, options: Collection[str]) -> bool:
        """Whether a model with these options has the leaf."""
        return self.option is None or bool({self.option, self.or_option} & {*options})

    @property
    def is_gain(self) -> bool:
        """Whether it is the gain of a norm."""
        is_norm = "norm" in self.leaf and "bias" not in self.leaf
        return is_norm or self.leaf.startswith("post_")

    @property
    def per_layer(self) -> bool:
        """Whether the leaf is stacked over layers (a field of Block)."""
        return "{i}" in self.gguf


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
# Gemma's post_attention_layernorm comes after attention, not before the MLP.
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


def _norm(leaf: str, hf: str, gguf: str) -> tuple[Row, Row]:
    """A LayerNorm."""
    name, _, axes = leaf.rpartition("_")
    return (
        Row(leaf, f"{hf}.weight", f"{gguf}.weight", "D"),
        Row(f"{name}_bias_{axes}", f"{hf}.bias", f"{gguf}.bias", "D"),
    )


def _linear(
    leaf: str,
    hf: str,
    gguf: str,
    stored: str,
    *,
    stored_gguf: str | None = None,
    part: int | None = None,
    bias_option: str | None = None,
) -> tuple[Row, Row]:
    """A projection, and its bias over the axes that the projection ends in."""
    name, _, axes = leaf.rpartition("_")
    into = "D" if axes[1] == "D" else axes[1:-1]  # what it reads
    out = axes[1:].removeprefix(into)

    def without(stored: str) -> str:
        return next(word for word in stored.split() if out in word.replace("3", ""))

    names = f"{hf}.weight", f"{gguf}.weight", stored
    weight = Row(leaf, *names, stored_gguf=stored_gguf, part=part)
    names = f"{hf}.bias", f"{gguf}.bias", without(stored)
    plain = Row(
        f"{name}_bias_L{out}",
        *names,
        stored_gguf=stored_gguf and without(stored_gguf),
        part=part,
        option=bias_option,
    )
    return weight, plain


def _fused(
    hf: str,
    gguf: str,
    stored: str,
    stored_gguf: str,
    bias_option: str | None = None,
) -> tuple[Row, ...]:
    """Queries, keys and values, and their biases, in one tensor each."""
    rows: list[Row] = []
    for part, leaf in enumerate(("q_LDHC", "k_LDGC", "v_LDGC")):
        ours, ours_gguf = (x.replace("H", leaf[4]) for x in (stored, stored_gguf))
        rows += _linear(
            leaf,
            hf,
            gguf,
            ours,
            stored_gguf=ours_gguf,
            part=part,
            bias_option=bias_option,
        )
    return tuple(rows)


# fmt: off
GPT2: tuple[Row, ...] = (
    Row("embed_VD", "wte.weight", "token_embd.weight", "V D"),
    Row("position_TD", "wpe.weight", "position_embd.weight", "T D"),
    *_norm("norm_out_D", "ln_f", "output_norm"),
    Row("unembed_DV", "lm_head.weight", "output.weight", "V D", option="untied"),
    *_norm("norm_attn_LD", "h.{i}.ln_1", "blk.{i}.attn_norm"),
    *_fused("h.{i}.attn.c_attn", "blk.{i}.attn_qkv", "D 3HC", "3HC D"),
    *_linear("o_LHCD", "h.{i}.attn.c_proj", "blk.{i}.attn_output", "HC D",
             stored_gguf="D HC"),
    *_norm("norm_mlp_LD", "h.{i}.ln_2", "blk.{i}.ffn_norm"),
    *_linear("up_LDI", "h.{i}.mlp.c_fc", "blk.{i}.ffn_up", "D I", stored_gguf="I D"),
    *_linear("down_LID", "h.{i}.mlp.c_proj", "blk.{i}.ffn_down", "I D",
             stored_gguf="D I"),
)
GPT_NEOX: tuple[Row, ...] = (
    Row("embed_VD", "embed_in.weight", "token_embd.weight", "V D"),
    *_norm("norm_out_D", "final_layer_norm", "output_norm"),
    Row("unembed_DV", "embed_out.weight", "output.weight", "V D", option="untied"),
    *_norm("norm_attn_LD", "layers.{i}.input_layernorm", "blk.{i}.attn_norm"),
    *_fused("layers.{i}.attention.query_key_value", "blk.{i}.attn_qkv", "H3C D",
            "3HC D", bias_option=_ATTN["option"]),
    *_linear("o_LHCD", "layers.{i}.attention.dense", "blk.{i}.attn_output", "D HC",
             bias_option=_ATTN["option"]),
    *_norm("norm_mlp_LD", "layers.{i}.post_attention_layernorm", "blk.{i}.ffn_norm"),
    *_linear("up_LDI", "layers.{i}.mlp.dense_h_to_4h", "blk.{i}.ffn_up", "I D"),
    *_linear("down_LID", "layers.{i}.mlp.dense_4h_to_h", "blk.{i}.ffn_down", "D I"),
)
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the files of a model hold, and what they do not say of its weights."""

    rows: tuple[Row, ...] = LLAMA
    options: frozenset[str] = frozenset()  # which optional leaves exist
    gain_offset: float = 0.0  # files hold gains minus this
    prefixes: tuple[tuple[str, str], ...] = ()  # of names in files, and in our table
    unread: tuple[str, ...] = ()  # patterns of names that hold nothing for us
    local: tuple[bool, ...] | None = None  # `Block.local_L`
    embed_scale: float | None = None
    logit_cap: float | None = None


def tensor_name(row: Row, source: Source, layer: int = 0) -> str:
    """Name of the stored tensor of one layer."""
    return getattr(row, source).format(i=layer)


def stored_shape(row: Row, cfg: LMConfig, source: Source = "hf") -> tuple[int, ...]:
    """Shape that the tensor of one layer has in files."""
    size, words = leaf_sizes(cfg), row.axes_in(source).split()
    return tuple(math.prod(size[x] for x in word) for word in words)


class Part(NamedTuple):
    """Where a part of a leaf lies in its stored tensor."""

    stored: tuple[slice, ...]  # what to read of the tensor
    shape: tuple[int, ...]  # that, one axis for each letter
    inside: tuple[slice, ...]  # and what of it is wanted


def find_part(
    row: Row, cfg: LMConfig, source: Source, wanted: Mapping[str, slice]
) -> Part:
    """Where a part of one layer's leaf lies, the least that one slice an axis can read.

    Args:
      row: the leaf.
      cfg: sizes of the model.
      source: which layout.
      wanted: what of an axis is wanted, by its letter; the others are whole.
    """
    size = leaf_sizes(cfg)
    one_of_three = {} if row.part is None else {"3": slice(row.part, row.part + 1)}
    wanted = {**wanted, **one_of_three}
    stored: list[slice] = []
    shape: list[int] = []
    inside: list[slice] = []
    for word in row.axes_in(source).split():
        start, step = 0, math.prod(size[x] for x in word)
        stop, single = step, True
        for x in word:
            step //= size[x]
            here = wanted.get(x, slice(0, size[x]))
            if single:  # so far one index of each letter: what follows is in one piece
                start += here.start * step
                stop = start + (here.stop - here.start) * step
                shape.append(here.stop - here.start)
                inside.append(slice(None))
                single = shape[-1] == 1
            else:
                shape.append(size[x])
                inside.append(here)
        stored.append(slice(start, stop))
    return Part(tuple(stored), tuple(shape), tuple(inside))


def to_leaf(w: np.ndarray, row: Row, source: Source, part: Part) -> np.ndarray:
    """What was read of a stored tensor -> that part of one layer's leaf.

    Axes as `row.axes`; a view if it can. `w` is the tensor at `part.stored`.
    """
    letters = row.axes_in(source).replace(" ", "")
    w = w.reshape(part.shape)[part.inside]
    if row.part is not None:
        w = w.squeeze(letters.index("3"))
        letters = letters.replace("3", "")
    if source == "gguf" and row.rotary:
        w = _halves(w, letters.index("C"))
    return w.transpose([letters.index(x) for x in row.axes])


def from_leaf(leaf: np.ndarray, row: Row, cfg: LMConfig) -> np.ndarray:
    """Inverse of `to_leaf` for Hugging Face files."""
    order = [row.axes.index(x) for x in row.stored.replace(" ", "")]
    return leaf.transpose(order).reshape(stored_shape(row, cfg))


def leaf_sizes(cfg: LMConfig) -> dict[str, int]:
    """Sizes of the axes by their letters."""
    return {
        "D": cfg.d_model,
        "H": cfg.n_heads,
        "G": cfg.n_kv_heads,
        "C": cfg.d_head,
        "I": cfg.d_mlp,
        "V": cfg.d_vocab,
        "T": cfg.n_ctx,
        "3": 3,
    }


def _halves(w: np.ndarray, axis: int) -> np.ndarray:
    """Reorder channels x0 y0 x1 y1 ... -> x0 x1 ... y0 y1 ... along `axis`."""
    before, C, after = w.shape[:axis], w.shape[axis], w.shape[axis + 1 :]
    pairs = w.reshape(*before, C // 2, 2, *after)
    return pairs.swapaxes(axis, axis + 1).reshape(w.shape)
