"""What a config.json says of the one decoder, by the row of its family.

The rows are in `jaxclt.io.families`. What a config asks for and the decoder cannot
compute exactly is refused by the name of its field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxclt.errors import InputError, did_you_mean, shown
from jaxclt.files.json_file import TEXT, check_json, json_schema, record
from jaxclt.io.config_fields import number, whole
from jaxclt.io.families import (
    ATTN_CAP,
    FAMILIES,
    LOGIT_CAP,
    REFUSED,
    WRAPPERS,
    Family,
    Multiplied,
)
from jaxclt.io.names import Layout
from jaxclt.io.rope import KINDS, read_rope
from jaxclt.lm.config import Act, LMConfig

__all__ = ["describe_hf", "family_act", "multiplied_leaves", "shape_from_hf"]

_ACTS: dict[str, Act] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "xielu": "xielu",
}
_DEMANDS = {"use_bidirectional_attention": False}  # of all
_NAME, _PART = {"type": ["string", "null"]}, {"type": ["object", "null"]}
_TYPES = json_schema(  # of what is looked up; numbers are checked by `whole`
    record(
        {},
        {
            **dict.fromkeys(("model_type", "hidden_act", "hidden_activation"), _NAME),
            "activation_function": _NAME,
            "layer_types": {"items": TEXT},
            "rope_parameters": {"properties": dict.fromkeys(KINDS, _PART)},
        },
    )
)
_TIED = "tie_word_embeddings"
_MOST_LAYERS = 1 << 14  # that are counted up to


def describe_hf(hf: dict[str, Any]) -> tuple[LMConfig, Layout]:
    """Config and layout of a model from the content of its config.json.

    Raises:
      InputError: for another model_type, activation, kind of rotary embedding or of
        attention than the supported ones, or a missing or impossible size.
    """
    wrapper = WRAPPERS.get(str(hf.get("model_type")))
    hf, family = _canonical(hf)
    if family is None:
        raise InputError(_unknown(hf.get("model_type")))
    for name, wanted in (_DEMANDS | {**family.demands}).items():
        if (hf.get(name, wanted) or False) != wanted:
            raise InputError(
                f"config.json: {name} {shown(hf[name])} is not supported; "
                f"supported: {wanted}"
            )
    shape = shape_from_hf(hf)
    rope = read_rope(
        hf,
        d_head=shape.d_head,
        n_ctx=shape.n_ctx,
        theta=family.rope_theta,
        local_theta=family.rope_local_theta,
        partial=family.partial,
        alpha=family.rope_alpha,
    )
    window, local = _windows(hf, family, shape.n_layers)
    caps = {
        name: None if hf.get(name, default) is None else number(hf, name, default)
        for name, default in (family.cap_fields or {}).items()
    }
    options = _options(hf, family)
    times: dict[Multiplied, float] = {
        what: number(hf, name) for name, what in family.multipliers.items()
    }
    scales = multiplied_leaves(times)
    query_scale = times.get("scores", family.score_scale)
    if family.query_scalar:
        query_scale = number(hf, "query_pre_attn_scalar", 256.0) ** -0.5
    if rope.score_factor != 1 and local is not None and rope.local_theta is not None:
        # Scores of other layers than the local ones only: folded into what they are of.
        warm = tuple(1.0 if near else rope.score_factor for near in local)
        gains = {row.leaf for row in family.rows if row.exists(options)} & _QUERY_GAINS
        scales |= dict.fromkeys(gains or _QUERIES, warm)
    elif rope.score_factor != 1:
        query_scale = (query_scale or shape.d_head**-0.5) * rope.score_factor
    turning = _turning(hf, family, local, shape.n_layers)
    d_rotary = 0 if family.positions else rope.d_rotary
    if family.rotary_field:
        d_rotary = whole(hf, family.rotary_field, shape.d_head)
    cfg = dataclasses.replace(
        shape,
        n_ctx=rope.n_ctx,
        norm_eps=number(hf, "rms_norm_eps", 1e-6),
        act=family_act(family, hf),
        parallel="parallel" in options,
        d_rotary=d_rotary,
        rope_theta=rope.theta,
        rope_local_theta=rope.local_theta,
        rope_scaling=rope.scaling,
        window=window,
        query_scale=query_scale,
        attn_cap=caps.get(ATTN_CAP),
        norm_turned=family.norm_turned,
    )
    width = shape.d_model**0.5 if family.scales_embedding else None
    layout = Layout(
        rows=family.rows,
        options=options,
        tied=None if wrapper and _TIED not in hf else "untied" not in options,
        prefixes=(wrapper or family).prefixes,
        unread=(wrapper or family).unread,
        gain_offset=family.gain_offset,
        local=local,
        turning=turning,
        scales=scales,
        embed_scale=times.get("embed", width),
        embed_eps=cfg.norm_eps if family.norms_embedding else None,
        logit_cap=caps.get(LOGIT_CAP),
    )
    return cfg, layout


def _unknown(kind: Any) -> str:
    """Why a model_type is refused."""
    said = f"config.json: model_type {shown(kind)} is not supported"
    if kind in REFUSED:
        return f"{said}: {REFUSED[kind]}"
    known = (*FAMILIES, *WRAPPERS)
    near = did_you_mean(str(kind), known)
    return f"{said}{near}; supported: {', '.join(known)}"


def _options(hf: dict[str, Any], family: Family) -> frozenset[str]:
    """Which leaves there are, and how attention and MLPs follow each other."""
    parallel = family.parallel or bool(
        family.parallel_field and hf.get(family.parallel_field)
    )
    on = {"parallel" if parallel else "serial", *family.options}
    for flag, options in family.flags.items():
        on |= {*options} if hf.get(flag) else set()
    if not hf.get(_TIED, family.tied):
        on |= {"untied"}
    return frozenset(on)


_QUERY_GAINS = {"q_norm_LC", "q_norm_LHC"}
_QUERIES = ("q_LDHC", "q_bias_LHC")
_WRITES = ("o_LHCD", "o_bias_LD", "down_LID", "down_bias_LD")


def multiplied_leaves(
    times: Mapping[Multiplied, float],
) -> dict[str, float | tuple[float, ...]]:
    """What leaves are times, by what a model multiplies."""
    logits = times.get("logits", 1.0) / times.get("1 / logits", 1.0)
    scales: dict[str, float | tuple[float, ...]] = {}
    if times.get("residual", 1.0) != 1:
        scales |= dict.fromkeys(_WRITES, times["residual"])
    if logits != 1:  # the unembedding may be the embedding's, and stays as it is
        scales |= dict.fromkeys(("norm_out_D", "norm_out_bias_D"), logits)
    return scales


def _turning(
    hf: dict[str, Any],
    family: Family,
    local: tuple[bool, ...] | None,
    n_layers: int,
) -> tuple[bool, ...] | None:
    """In which layers heads turn; None: in all."""
    if family.turning == "listed":
        listed = hf.get("no_rope_layers")
        if listed is None:
            every = whole(hf, "no_rope_layer_interval", 4, least=1)
            listed = [(i + 1) % every != 0 for i in range(n_layers)]
        if not isinstance(listed, list) or len(listed) < n_layers:
            raise InputError(
                f"config.json: no_rope_layers must list {n_layers} layers, one number "
                "each"
            )
        return tuple(bool(x) for x in listed[:n_layers])
    if family.turning == "windowed" or (family.turning == "local" and local):
        return local
    return None


def family_act(family: Family, config: Mapping[str, Any]) -> Act:
    """The activation of a model's MLPs; by a family's defaults the usual one."""
    act = config.get(family.act_field) or config.get("hidden_act") or "silu"
    if act not in _ACTS:
        raise InputError(
            f"config.json: {family.act_field} {shown(act)} is not supported; "
            f"supported: {', '.join(_ACTS)}"
        )
    return _ACTS[act]


def _canonical(hf: dict[str, Any]) -> tuple[dict[str, Any], Family | None]:
    """A config with Llama's names of fields and its family's defaults."""
    check_json(hf, _TYPES, "config.json")
    wrapper = WRAPPERS.get(str(hf.get("model_type")))
    if wrapper is not None:
        inner = hf.get(wrapper.field)
        if not isinstance(inner, dict):
            raise InputError(f"config.json: {wrapper.field} must be an object")
        outer = {_TIED: hf[_TIED]} if _TIED in hf else {}
        hf = {"model_type": wrapper.kind, **inner, **outer}
        check_json(hf, _TYPES, "config.json")
    family = FAMILIES.get(str(hf.get("model_type")))
    if family is None:
        return hf, None
    said = {name: hf[own] for name, own in family.names.items() if own in hf} | hf
    # Null is what transformers writes for a default, but for a window it means none.
    defaults = {k: v for k, v in family.defaults.items() if said.get(k) is None}
    return said | defaults, family


def shape_from_hf(hf: dict[str, Any]) -> LMConfig:
    """Sizes alone, of any decoder of a family, or that names them as Llama does.

    Raises:
      InputError: for a missing or impossible size.
    """
    hf, family = _canonical(hf)
    ratio = family.mlp_ratio if family else None
    d_model = whole(hf, "hidden_size")
    n_heads = whole(hf, "num_attention_heads")
    return LMConfig(
        n_layers=whole(hf, "num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=whole(hf, "num_key_value_heads", n_heads),
        d_head=whole(hf, "head_dim", d_model // max(n_heads, 1)),
        d_mlp=whole(hf, "intermediate_size", ratio and ratio * d_model),
        d_vocab=whole(hf, "vocab_size"),
        n_ctx=whole(hf, "max_position_embeddings", 2048),
    )


def _windows(
    hf: dict[str, Any], family: Family, n_layers: int
) -> tuple[int | None, tuple[bool, ...] | None]:
    """The sliding window, and which layers have it; None: all."""
    if family.windows is None:
        return None, None
    if n_layers > _MOST_LAYERS:
        raise InputError(f"config.json: no model has {n_layers} layers")
    window = hf.get("sliding_window", family.window)
    after = family.windows == "after"
    if window is None or (after and not hf.get("use_sliding_window", False)):
        if any(_layer_types(hf, n_layers) or ()) or family.turning == "local":
            raise InputError(
                "config.json: layer_types has sliding_attention but there is no "
                "sliding_window in use"
            )
        return None, None
    window = whole({"sliding_window": window}, "sliding_window")
    if family.windows == "all":
        if hf.get("layer_types"):
            raise InputError(
                "config.json: layer_types is not supported for this model_type, whose "
                "layers all have the sliding_window"
            )
        return window, None
    return window, _layer_types(hf, n_layers) or _local(hf, family, n_layers)


def _local(hf: dict[str, Any], family: Family, n_layers: int) -> tuple[bool, ...]:
    """Which layers have the window if they are not listed."""
    if family.windows == "listed":
        raise InputError("config.json: which layers attend locally is not listed")
    if family.windows == "after":
        first = whole(hf, "max_window_layers", 28)
        return tuple(i >= first for i in range(n_layers))
    period = whole(hf, "sliding_window_pattern", family.period)
    if period < 1:
        raise InputError(
            f"config.json: sliding_window_pattern must be positive, not {period}"
        )
    return tuple((i + 1) % period != 0 for i in range(n_layers))


def _layer_types(hf: dict[str, Any], n_layers: int) -> tuple[bool, ...] | None:
    """Which layers are local; None if the config does not list them."""
    kinds = hf.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list):
        raise InputError("config.json: layer_types must be a list")
    local = {**KINDS, "global": False, "local": True}
    unknown = [kind for kind in kinds if kind not in local]
    if len(kinds) != n_layers or unknown:
        raise InputError(
            f"config.json: layer_types must list {n_layers} of "
            f"{', '.join(KINDS)}, not {len(kinds)} with {unknown[:1]}"
        )
    return tuple(local[kind] for kind in kinds)
