"""Families of models as data: what a config.json's fields mean for the one decoder.

A family is a row of `FAMILIES`, and everything in it is a switch that any other family
could have. What a config asks for and the decoder cannot compute exactly is refused by
the name of its field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxclt.errors import InputError
from jaxclt.io.names import GEMMA, LLAMA, QWEN, Layout, Row
from jaxclt.lm.config import LMConfig, RopeScaling

__all__ = ["FAMILIES", "Family", "describe_hf", "number", "shape_from_hf", "whole"]

_ACTS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}
_KINDS = {"full_attention": False, "sliding_attention": True}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one model_type's config.json is read.

    `windows` says which layers have the sliding window if `layer_types` does not:
    "all", those "behind" max_window_layers (where use_sliding_window is on), or all
    but "every" `period`-th.
    """

    rows: tuple[Row, ...] = LLAMA
    options: frozenset[str] = frozenset()  # leaves that all its models have
    flags: tuple[str, ...] = ()  # fields that switch options on
    act_field: str = "hidden_act"
    gain_offset: float = 0.0  # gains are stored minus this
    scales_embedding: bool = False  # by the root of the width
    query_scalar: bool = False  # has query_pre_attn_scalar
    cap_fields: Mapping[str, float | None] | None = None  # their defaults; None: none
    tied: bool = False  # unless the config says
    windows: Literal["all", "behind", "every"] | None = None
    period: int = 0
    window: int | None = 4096  # unless the config says
    rope_theta: float = 10_000.0  # unless the config says
    rope_local_theta: float | None = None  # None: one base for all layers


_ATTN_CAP, _LOGIT_CAP = "attn_logit_softcapping", "final_logit_softcapping"
_GEMMA = {
    "rows": GEMMA,
    "flags": ("attention_bias",),
    "act_field": "hidden_activation",
    "gain_offset": 1.0,
    "scales_embedding": True,
    "query_scalar": True,
    "tied": True,
    "windows": "every",
}
FAMILIES: dict[str, Family] = {
    "llama": Family(flags=("attention_bias", "mlp_bias")),
    "mistral": Family(windows="all"),
    "qwen2": Family(rows=QWEN, options=frozenset({"qkv_bias"}), windows="behind"),
    "qwen3": Family(
        rows=QWEN,
        options=frozenset({"qk_norm"}),
        flags=("attention_bias",),
        windows="behind",
    ),
    "gemma2": Family(
        **_GEMMA, period=2, cap_fields={_ATTN_CAP: 50.0, _LOGIT_CAP: 30.0}
    ),
    "gemma3_text": Family(
        **_GEMMA,
        options=frozenset({"qk_norm"}),
        period=6,
        cap_fields={_ATTN_CAP: None, _LOGIT_CAP: None},
        rope_theta=1_000_000.0,
        rope_local_theta=10_000.0,
    ),
}


def describe_hf(hf: dict[str, Any]) -> tuple[LMConfig, Layout]:
    """Config and layout of a model from the content of its config.json.

    Raises:
      InputError: for another model_type, activation, kind of rotary embedding or of
        attention than the supported ones, or a missing or impossible size.
    """
    kind = hf.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise InputError(
            f"config.json: model_type {kind!r} is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    act = hf.get(family.act_field) or hf.get("hidden_act") or "silu"
    if act not in _ACTS:
        raise InputError(
            f"config.json: {family.act_field} {act!r} is not supported; "
            f"supported: {', '.join(_ACTS)}"
        )
    if hf.get("use_bidirectional_attention"):
        raise InputError("config.json: use_bidirectional_attention is not supported")
    shape = shape_from_hf(hf)
    theta, local_theta, scaling = _rope(hf, family, shape.n_ctx)
    window, local = _windows(hf, family, shape.n_layers)
    caps = {
        name: None if hf.get(name, default) is None else number(hf, name, default)
        for name, default in (family.cap_fields or {}).items()
    }
    query_scale = None
    if family.query_scalar:
        query_scale = number(hf, "query_pre_attn_scalar", 256.0) ** -0.5
    cfg = dataclasses.replace(
        shape,
        norm_eps=number(hf, "rms_norm_eps", 1e-6),
        act=_ACTS[act],
        rope_theta=theta,
        rope_local_theta=local_theta,
        rope_scaling=scaling,
        window=window,
        query_scale=query_scale,
        attn_cap=caps.get(_ATTN_CAP),
    )
    options = family.options | {flag for flag in family.flags if hf.get(flag)}
    if not hf.get("tie_word_embeddings", family.tied):
        options |= {"untied"}
    layout = Layout(
        rows=family.rows,
        options=options,
        gain_offset=family.gain_offset,
        local=local,
        embed_scale=shape.d_model**0.5 if family.scales_embedding else None,
        logit_cap=caps.get(_LOGIT_CAP),
    )
    return cfg, layout


def shape_from_hf(hf: dict[str, Any]) -> LMConfig:
    """Sizes alone, of any decoder whose config.json names them as Llama's does.

    Raises:
      InputError: for a missing or impossible size.
    """
    d_model = whole(hf, "hidden_size")
    n_heads = whole(hf, "num_attention_heads")
    return LMConfig(
        n_layers=whole(hf, "num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=whole(hf, "num_key_value_heads", n_heads),
        d_head=whole(hf, "head_dim", d_model // max(n_heads, 1)),
        d_mlp=whole(hf, "intermediate_size"),
        d_vocab=whole(hf, "vocab_size"),
        n_ctx=whole(hf, "max_position_embeddings", 2048),
    )


def _windows(
    hf: dict[str, Any], family: Family, n_layers: int
) -> tuple[int | None, tuple[bool, ...] | None]:
    """The sliding window, and which layers have it; None: all."""
    if family.windows is None:
        return None, None
    window = hf.get("sliding_window", family.window)
    behind = family.windows == "behind"
    if window is None or (behind and not hf.get("use_sliding_window", False)):
        local = _layer_types(hf, n_layers) or (False,) * n_layers
        if any(local):
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
    local = _layer_types(hf, n_layers)
    if local is None and behind:
        first = whole(hf, "max_window_layers", 28)
        local = tuple(i >= first for i in range(n_layers))
    elif local is None:
        period = whole(hf, "sliding_window_pattern", family.period)
        if period < 1:
            raise InputError(
                f"config.json: sliding_window_pattern must be positive, not {period}"
            )
        local = tuple((i + 1) % period != 0 for i in range(n_layers))
    return window, local


def _layer_types(hf: dict[str, Any], n_layers: int) -> tuple[bool, ...] | None:
    """Which layers are local; None if the config does not list them."""
    kinds = hf.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list):
        raise InputError("config.json: layer_types must be a list")
    unknown = [kind for kind in kinds if kind not in _KINDS]
    if len(kinds) != n_layers or unknown:
        raise InputError(
            f"config.json: layer_types must list {n_layers} of "
            f"{', '.join(_KINDS)}, not {len(kinds)} with {unknown[:1]}"
        )
    return tuple(_KINDS[kind] for kind in kinds)


def _rope(
    hf: dict[str, Any], family: Family, n_ctx: int
) -> tuple[float, float | None, RopeScaling | None]:
    """Bases of the rotary frequencies, for all and for local layers, and the scaling.

    transformers 5 nests them in `rope_parameters`, older releases do not.
    """
    new, old = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
    for rope in (new, old):
        if not isinstance(rope, dict):
            raise InputError("config.json: rope parameters must be an object")
    local_theta = family.rope_local_theta
    if local_theta is not None:
        nested = any(kind in new for kind in _KINDS)
        local = (new.get("sliding_attention") or {}) if nested else {}
        new = (new.get("full_attention") or {}) if nested else new
        if _kind(local) != "default":
            raise InputError(
                "config.json: rope_parameters of sliding_attention must be of type "
                f"'default', not {_kind(local)!r}"
            )
        local_theta = number({**hf, **local}, "rope_local_base_freq", local_theta)
        local_theta = number(local, "rope_theta", local_theta)
    for rope in (new, old):
        if any(isinstance(value, dict) for value in rope.values()):
            raise InputError(
                "config.json: rotary embeddings of type one per kind of layer are not "
                "supported for this model_type"
            )
    for rope in (new, old, hf):
        if rope.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
            raise InputError(
                "config.json: partial_rotary_factor is not supported; "
                "supported: rotary embeddings over the whole head"
            )
    theta = number({**hf, **new}, "rope_theta", family.rope_theta)
    scaling = _scaling(old or new, n_ctx)
    return theta, local_theta, scaling


def _kind(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _scaling(rope: dict[str, Any], n_ctx: int) -> RopeScaling | None:
    kind = _kind({k: v for k, v in rope.items() if v is not None})
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise InputError(
            f"config.json: rotary embeddings of type {kind!r} are not supported; "
            "supported: 'default', 'linear', 'llama3'"
        )
    factor = number(rope, "factor")
    if kind == "linear":
        return RopeScaling(kind=kind, factor=factor)
    return RopeScaling(
        kind=kind,
        factor=factor,
        low_freq_factor=number(rope, "low_freq_factor", 1.0),
        high_freq_factor=number(rope, "high_freq_factor", 4.0),
        n_ctx=whole(rope, "original_max_position_embeddings", n_ctx),
    )


def whole(hf: dict[str, Any], key: str, default: int | None = None) -> int:
    """An integer field.

    Raises:
      InputError: if it is none, or missing without a default.
    """
    value = hf.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"config.json: {key} must be an integer, not {value!r}")
    return value


def number(hf: dict[str, Any], key: str, default: float | None = None) -> float:
    """A positive number, or the default where the field is missing or null.

    Raises:
      InputError: if it is something else.
    """
    value = hf.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise InputError(f"config.json: {key} must be a positive number, not {value!r}")
    return float(value)
