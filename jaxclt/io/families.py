"""Families of models as data: what a config.json's fields mean for the one decoder.

A family is a row of `FAMILIES`, and everything in it is a switch that any other family
could have. What a config asks for and the decoder cannot compute exactly is refused by
the name of its field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxclt.errors import InputError, shown
from jaxclt.files.json_file import TEXT, check_json, json_schema, record
from jaxclt.io.config_fields import number, whole
from jaxclt.io.names import GEMMA, GPT2, GPT_NEOX, LLAMA, QWEN, Layout, Row
from jaxclt.io.rope import KINDS, read_rope
from jaxclt.lm.config import LMConfig

__all__ = [
    "FAMILIES",
    "Family",
    "describe_hf",
    "family_act",
    "is_tied",
    "shape_from_hf",
]

Act = Literal["silu", "gelu_tanh", "gelu", "relu"]
_ACTS: dict[str, Act] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one model_type's config.json is read, or its GGUF file's metadata.

    `names` are fields that it calls otherwise than Llama does, `defaults` what it may
    leave out.

    `windows` says which layers have the sliding window if `layer_types` does not:
    "all", those "after" max_window_layers (where use_sliding_window is on), or all
    but "every" `period`-th.
    """

    rows: tuple[Row, ...] = LLAMA
    prefixes: tuple[tuple[str, str], ...] = ()  # see `Layout`, like the next
    unread: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    demands: Mapping[str, Any] = field(default_factory=dict)  # a field's only value
    mlp_ratio: int | None = None  # width of the MLP to that of the model, if not said
    positions: bool = False  # learned ones, nothing turns
    partial: bool = False  # a part of the channels may turn
    parallel_field: str | None = None  # says whether attention and MLP read the same
    options: frozenset[str] = frozenset()  # leaves that all its models have
    flags: tuple[str, ...] = ()  # fields that switch options on
    act_field: str = "hidden_act"
    gain_offset: float = 0.0  # gains are stored minus this
    scales_embedding: bool = False  # by the root of the width
    query_scalar: bool = False  # has query_pre_attn_scalar
    cap_fields: Mapping[str, float | None] | None = None  # their defaults; None: none
    tied: bool = False  # unless the config says
    windows: Literal["all", "after", "every"] | None = None
    period: int = 0
    window: int | None = 4096  # unless the config says
    rope_theta: float = 10_000.0  # unless the config says
    rope_local_theta: float | None = None  # None: one base for all layers
    gguf: str | None = None  # what llama.cpp calls it
    # GGUF files do not say that the largest of its models, known by its layers, scales
    # queries by the width per head.
    wide_queries: int = 0


_ATTN_CAP, _LOGIT_CAP = "attn_logit_softcapping", "final_logit_softcapping"
_GEMMA: dict[str, Any] = {
    "rows": GEMMA,
    "flags": ("attention_bias",),
    "act_field": "hidden_activation",
    "gain_offset": 1.0,
    "scales_embedding": True,
    "query_scalar": True,
    "tied": True,
    "windows": "every",
}
_GELU = {"hidden_activation": "gelu_pytorch_tanh"}
# transformers' defaults, which the text_config of a wrapper leaves out.
_GEMMA3 = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
}
FAMILIES: dict[str, Family] = {
    "llama": Family(gguf="llama", flags=("attention_bias", "mlp_bias")),
    "mistral": Family(windows="all"),
    "qwen2": Family(
        gguf="qwen2", rows=QWEN, options=frozenset({"qkv_bias"}), windows="after"
    ),
    "qwen3": Family(
        gguf="qwen3",
        rows=QWEN,
        options=frozenset({"qk_norm"}),
        flags=("attention_bias",),
        windows="after",
    ),
    "gemma2": Family(
        **_GEMMA,
        gguf="gemma2",
        wide_queries=46,
        defaults=_GELU,
        period=2,
        cap_fields={_ATTN_CAP: 50.0, _LOGIT_CAP: 30.0},
    ),
    "gemma3_text": Family(
        **_GEMMA,
        gguf="gemma3",
        wide_queries=62,
        defaults=_GELU | _GEMMA3,
        options=frozenset({"qk_norm"}),
        period=6,
        cap_fields={_ATTN_CAP: None, _LOGIT_CAP: None},
        rope_theta=1_000_000.0,
        rope_local_theta=10_000.0,
    ),
    "gpt2": Family(
        gguf="gpt2",
        rows=GPT2,
        prefixes=(("transformer.", ""),),
        unread=("*.attn.bias", "*.attn.masked_bias"),  # causal masks
        names={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "hidden_act": "activation_function",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        defaults={"hidden_act": "gelu_new", "rms_norm_eps": 1e-5},
        demands={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        mlp_ratio=4,
        positions=True,
        tied=True,
    ),
    "gpt_neox": Family(
        gguf="gptneox",
        rows=GPT_NEOX,
        prefixes=(("gpt_neox.", ""),),
        unread=("*.attention.bias", "*.attention.masked_bias"),
        names={
            "rms_norm_eps": "layer_norm_eps",
            "partial_rotary_factor": "rotary_pct",
            "rope_theta": "rotary_emb_base",
        },
        defaults={
            "hidden_act": "gelu",  # llama.cpp runs the tanh form
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.25,
            "attention_bias": True,
            "use_parallel_residual": True,
        },
        partial=True,
        parallel_field="use_parallel_residual",
        flags=("attention_bias",),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """A model for more than text around one of a family: its text part is read."""

    kind: str  # the family, unless the text's config says
    prefixes: tuple[tuple[str, str], ...]
    unread: tuple[str, ...]  # what is for other input than text
    field: str = "text_config"


WRAPPERS = {
    "gemma3": Wrapper(
        kind="gemma3_text",
        prefixes=(
            ("language_model.model.", "model."),
            ("language_model.lm_head.", "lm_head."),
            ("model.language_model.", "model."),
        ),
        unread=(
            *("vision_tower.*", "model.vision_tower.*"),
            *("multi_modal_projector.*", "model.multi_modal_projector.*"),
        ),
    ),
}
_EXPERTS = (
    "its MLPs are mixtures of experts and its attention has sinks; a local replacement "
    "model would have to freeze the router, which no graph could then explain"
)
_REFUSED = {"gpt_oss": _EXPERTS}
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
        kind = hf.get("model_type")
        if kind in _REFUSED:
            raise InputError(
                f"config.json: model_type {shown(kind)} is not supported: "
                f"{_REFUSED[kind]}"
            )
        raise InputError(
            f"config.json: model_type {shown(kind)} is not supported; "
            f"supported: {', '.join((*FAMILIES, *WRAPPERS))}"
        )
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
    )
    window, local = _windows(hf, family, shape.n_layers)
    caps = {
        name: None if hf.get(name, default) is None else number(hf, name, default)
        for name, default in (family.cap_fields or {}).items()
    }
    query_scale = None
    if family.query_scalar:
        query_scale = number(hf, "query_pre_attn_scalar", 256.0) ** -0.5
    if rope.score_factor != 1:
        query_scale = (query_scale or shape.d_head**-0.5) * rope.score_factor
    cfg = dataclasses.replace(
        shape,
        norm_eps=number(hf, "rms_norm_eps", 1e-6),
        act=family_act(family, hf),
        parallel=bool(family.parallel_field and hf.get(family.parallel_field)),
        d_rotary=0 if family.positions else rope.d_rotary,
        rope_theta=rope.theta,
        rope_local_theta=rope.local_theta,
        rope_scaling=rope.scaling,
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
        prefixes=(wrapper or family).prefixes,
        unread=(wrapper or family).unread,
        gain_offset=family.gain_offset,
        local=local,
        embed_scale=shape.d_model**0.5 if family.scales_embedding else None,
        logit_cap=caps.get(_LOGIT_CAP),
    )
    return cfg, layout


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
        hf = {"model_type": wrapper.kind, **inner}
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


def is_tied(hf: dict[str, Any]) -> bool:
    """Whether the model reads tokens out by what it embeds them by."""
    hf, family = _canonical(hf)
    return bool(hf.get("tie_word_embeddings", family.tied if family else True))


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
    if local is None and after:
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
    unknown = [kind for kind in kinds if kind not in KINDS]
    if len(kinds) != n_layers or unknown:
        raise InputError(
            f"config.json: layer_types must list {n_layers} of "
            f"{', '.join(KINDS)}, not {len(kinds)} with {unknown[:1]}"
        )
    return tuple(KINDS[kind] for kind in kinds)
