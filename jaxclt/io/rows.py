"""Where every leaf lies in the files of each family: the tables of `jaxclt.io.names`.

A table is another one with some rows left out, renamed or put in. Names in GGUF files
count only for the families that `jaxclt.io.families` gives an architecture.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from jaxclt.io.names import Row, Source

_GGUF: tuple[Source, ...] = ("gguf",)


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
    _layer("q_LDHC", "self_attn.q_proj.weight", "attn_q.weight", "HC D", rotary=_GGUF),
    _layer("k_LDGC", "self_attn.k_proj.weight", "attn_k.weight", "GC D", rotary=_GGUF),
    _layer("v_LDGC", "self_attn.v_proj.weight", "attn_v.weight", "GC D"),
    _layer("o_LHCD", "self_attn.o_proj.weight", "attn_output.weight", "D HC"),
    _layer("norm_mlp_LD", "post_attention_layernorm.weight", "ffn_norm.weight", "D"),
    _layer("gate_LDI", "mlp.gate_proj.weight", "ffn_gate.weight", "I D"),
    _layer("up_LDI", "mlp.up_proj.weight", "ffn_up.weight", "I D"),
    _layer("down_LID", "mlp.down_proj.weight", "ffn_down.weight", "D I"),
    _layer("q_bias_LHC", "self_attn.q_proj.bias", "attn_q.bias", "HC", rotary=_GGUF,
           **_QKV),
    _layer("k_bias_LGC", "self_attn.k_proj.bias", "attn_k.bias", "GC", rotary=_GGUF,
           **_QKV),
    _layer("v_bias_LGC", "self_attn.v_proj.bias", "attn_v.bias", "GC", **_QKV),
    _layer("o_bias_LD", "self_attn.o_proj.bias", "attn_output.bias", "D", **_ATTN,
           or_option="o_bias"),
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


def _without(rows: Iterable[Row], *leaves: str) -> tuple[Row, ...]:
    return tuple(row for row in rows if row.leaf not in leaves)


def _named(rows: Iterable[Row], **names: str) -> tuple[Row, ...]:
    """The same with other names in Hugging Face's files, each ``{i}``'s rest."""

    def one(row: Row) -> Row:
        name = names.get(row.leaf)
        if name is None:
            return row
        before = row.hf.partition("{i}.")[0] + "{i}." if row.per_layer else "model."
        return replace(row, hf=before + name)

    return tuple(map(one, rows))


_TURNING = ("q_LDHC", "k_LDGC", "q_bias_LHC", "k_bias_LGC")


def _interleaved(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Hugging Face too turns neighbouring channels."""
    both: tuple[Source, ...] = ("hf", "gguf")
    return tuple(replace(r, rotary=both) if r.leaf in _TURNING else r for r in rows)


def _ungated(rows: Iterable[Row]) -> tuple[Row, ...]:
    return _without(rows, "gate_LDI", "gate_bias_LI")


_BEFORE = ("norm_attn_LD", "norm_mlp_LD")


def _layer_norms(rows: Iterable[Row], fill: float | None = None) -> tuple[Row, ...]:
    """Norms are LayerNorms; those whose biases no file has get zeros."""
    out: list[Row] = []
    for row in rows:
        out.append(row)
        if row.leaf in (*_BEFORE, "norm_out_D"):
            name, _, axes = row.leaf.rpartition("_")
            hf, gguf = (x.replace(".weight", ".bias") for x in (row.hf, row.gguf))
            out.append(Row(f"{name}_bias_{axes}", hf, gguf, "D", fill=fill))
    return tuple(out)


def _filled(rows: Iterable[Row], fill: float, *leaves: str) -> tuple[Row, ...]:
    """Some leaves that no file has."""
    return tuple(replace(r, fill=fill) if r.leaf in leaves else r for r in rows)


def _in_one(
    rows: Iterable[Row], name: str, stored: str, *leaves: str
) -> tuple[Row, ...]:
    """Some projections lie in one tensor, one after the other."""

    def one(row: Row) -> Row:
        if row.leaf not in leaves:
            return row
        part = leaves.index(row.leaf)
        whole = f"model.layers.{{i}}.{name}.weight"
        return replace(row, hf=whole, stored=stored, part=part)

    return tuple(map(one, rows))


def _one_norm(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Attention and the MLP beside it read through one norm, whose tensor both get."""
    rows = tuple(rows)
    by_leaf = {row.leaf: row for row in rows}

    def one(row: Row) -> Row:
        if not row.leaf.startswith("norm_mlp"):
            return row
        same = by_leaf[row.leaf.replace("mlp", "attn")]
        return replace(row, hf=same.hf, gguf=same.gguf)

    return tuple(map(one, rows))


_HALVES = tuple(replace(row, rotary=()) for row in LLAMA)
QWEN: tuple[Row, ...] = (*_HALVES, *_QK_NORM)
GEMMA: tuple[Row, ...] = (*_without(QWEN, "norm_mlp_LD"), *_SANDWICH)
VAULTGEMMA = _named(QWEN, norm_mlp_LD="pre_feedforward_layernorm.weight")
HELIUM = _interleaved(LLAMA)
ARCEE = _ungated(LLAMA)
STARCODER2 = _ungated(
    _named(
        _layer_norms(_HALVES),
        up_LDI="mlp.c_fc.weight",
        up_bias_LI="mlp.c_fc.bias",
        down_LID="mlp.c_proj.weight",
        down_bias_LD="mlp.c_proj.bias",
    )
)
NEMOTRON = _ungated(_layer_norms(_HALVES))
STABLELM = (
    *(
        replace(row, option="serial") if row.leaf.startswith("norm_mlp") else row
        for row in _layer_norms(LLAMA)
    ),
    *(
        replace(row, option="parallel")
        for row in _one_norm(_layer_norms(LLAMA))
        if row.leaf.startswith("norm_mlp")
    ),
)
COHERE = _one_norm(_layer_norms(_interleaved(LLAMA), fill=0.0))
PHI3 = _in_one(
    _in_one(LLAMA, "self_attn.qkv_proj", "HC+GC+GC D", "q_LDHC", "k_LDGC", "v_LDGC"),
    *("mlp.gate_up_proj", "I+I D", "gate_LDI", "up_LDI"),
)
_LOGIT_BIAS = Row("unembed_bias_V", "lm_head.bias", "", "V")
PHI = (
    *_one_norm(
        _layer_norms(
            _named(
                _ungated(LLAMA),
                norm_out_D="final_layernorm.weight",
                o_LHCD="self_attn.dense.weight",
                o_bias_LD="self_attn.dense.bias",
                up_LDI="mlp.fc1.weight",
                up_bias_LI="mlp.fc1.bias",
                down_LID="mlp.fc2.weight",
                down_bias_LD="mlp.fc2.bias",
            )
        )
    ),
    _LOGIT_BIAS,
)
GLM = _in_one(_interleaved(LLAMA), "mlp.gate_up_proj", "I+I D", "gate_LDI", "up_LDI")
GLM4 = (
    *GLM,
    *_named(
        _SANDWICH[1:],
        post_attn_LD="post_self_attn_layernorm.weight",
        post_mlp_LD="post_mlp_layernorm.weight",
    ),
)
EXAONE4 = (*_without(QWEN, *_BEFORE), *_SANDWICH[1:])
OLMO2 = (
    *_without(EXAONE4, "q_norm_LC", "k_norm_LC"),
    _layer("q_norm_LHC", "self_attn.q_norm.weight", "attn_q_norm.weight", "HC"),
    _layer("k_norm_LGC", "self_attn.k_norm.weight", "attn_k_norm.weight", "GC"),
)
OLMO = _layer_norms(_filled(LLAMA, 1.0, *_BEFORE, "norm_out_D"), fill=0.0)
NANOCHAT = _ungated(
    replace(row, flipped=row.leaf in _TURNING)
    for row in _named(
        _filled(QWEN, 1.0, *_BEFORE, "norm_out_D", "q_norm_LC", "k_norm_LC"),
        up_LDI="mlp.fc1.weight",
        down_LID="mlp.fc2.weight",
    )
)
APERTUS = (
    *_named(
        _ungated(QWEN),
        norm_attn_LD="attention_layernorm.weight",
        norm_mlp_LD="feedforward_layernorm.weight",
    ),
    _layer("bend_up_L1", "mlp.act_fn.alpha_p", "", "1"),
    _layer("bend_down_L1", "mlp.act_fn.alpha_n", "", "1"),
)
HUNYUAN = _named(
    QWEN,
    q_norm_LC="self_attn.query_layernorm.weight",
    k_norm_LC="self_attn.key_layernorm.weight",
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
GPT_NEO: tuple[Row, ...] = (
    Row("embed_VD", "wte.weight", "", "V D"),
    Row("position_TD", "wpe.weight", "", "T D"),
    *_norm("norm_out_D", "ln_f", ""),
    Row("unembed_DV", "lm_head.weight", "", "V D", option="untied"),
    *_norm("norm_attn_LD", "h.{i}.ln_1", ""),
    Row("q_LDHC", "h.{i}.attn.attention.q_proj.weight", "", "HC D"),
    Row("k_LDGC", "h.{i}.attn.attention.k_proj.weight", "", "GC D"),
    Row("v_LDGC", "h.{i}.attn.attention.v_proj.weight", "", "GC D"),
    *_linear("o_LHCD", "h.{i}.attn.attention.out_proj", "", "D HC"),
    *_norm("norm_mlp_LD", "h.{i}.ln_2", ""),
    *_linear("up_LDI", "h.{i}.mlp.c_fc", "", "I D"),
    *_linear("down_LID", "h.{i}.mlp.c_proj", "", "D I"),
)
GPT_J: tuple[Row, ...] = _interleaved((
    Row("embed_VD", "wte.weight", "", "V D"),
    *_norm("norm_out_D", "ln_f", ""),
    Row("unembed_DV", "lm_head.weight", "", "V D", option="untied"),
    _LOGIT_BIAS,
    *_norm("norm_attn_LD", "h.{i}.ln_1", ""),
    *_norm("norm_mlp_LD", "h.{i}.ln_1", ""),
    Row("q_LDHC", "h.{i}.attn.q_proj.weight", "", "HC D"),
    Row("k_LDGC", "h.{i}.attn.k_proj.weight", "", "GC D"),
    Row("v_LDGC", "h.{i}.attn.v_proj.weight", "", "GC D"),
    Row("o_LHCD", "h.{i}.attn.out_proj.weight", "", "D HC"),
    *_linear("up_LDI", "h.{i}.mlp.fc_in", "", "I D"),
    *_linear("down_LID", "h.{i}.mlp.fc_out", "", "D I"),
))
OPT: tuple[Row, ...] = (
    Row("embed_VD", "embed_tokens.weight", "", "V D"),
    Row("position_TD", "embed_positions.weight", "", "T D", first=2),
    *_norm("norm_out_D", "final_layer_norm", ""),
    Row("unembed_DV", "lm_head.weight", "", "V D", option="untied"),
    *_norm("norm_attn_LD", "layers.{i}.self_attn_layer_norm", ""),
    *_linear("q_LDHC", "layers.{i}.self_attn.q_proj", "", "HC D"),
    *_linear("k_LDGC", "layers.{i}.self_attn.k_proj", "", "GC D"),
    *_linear("v_LDGC", "layers.{i}.self_attn.v_proj", "", "GC D"),
    *_linear("o_LHCD", "layers.{i}.self_attn.out_proj", "", "D HC"),
    *_norm("norm_mlp_LD", "layers.{i}.final_layer_norm", ""),
    *_linear("up_LDI", "layers.{i}.fc1", "", "I D"),
    *_linear("down_LID", "layers.{i}.fc2", "", "D I"),
)
_QKV_NAME = "h.{i}.self_attention.query_key_value"
FALCON: tuple[Row, ...] = (
    Row("embed_VD", "word_embeddings.weight", "", "V D"),
    *_norm("norm_out_D", "ln_f", ""),
    Row("unembed_DV", "lm_head.weight", "", "V D", option="untied"),
    *_norm("norm_attn_LD", "h.{i}.input_layernorm", ""),
    *_norm("norm_mlp_LD", "h.{i}.input_layernorm", ""),
    *_linear("q_LDHC", _QKV_NAME, "", "HC+GC+GC D", part=0, bias_option="bias"),
    *_linear("k_LDGC", _QKV_NAME, "", "HC+GC+GC D", part=1, bias_option="bias"),
    *_linear("v_LDGC", _QKV_NAME, "", "HC+GC+GC D", part=2, bias_option="bias"),
    *_linear("o_LHCD", "h.{i}.self_attention.dense", "", "D HC", bias_option="bias"),
    *_linear("up_LDI", "h.{i}.mlp.dense_h_to_4h", "", "I D", bias_option="bias"),
    *_linear("down_LID", "h.{i}.mlp.dense_4h_to_h", "", "D I", bias_option="bias"),
)
# fmt: on
