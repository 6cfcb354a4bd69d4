"""Families of models as data: what a config.json's fields mean for the one decoder.

A family is a row of `FAMILIES`, and everything in it is a switch that any other family
could have. What a config asks for and the decoder cannot compute exactly is refused by
the name of its field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxclt.io import rows as r
from jaxclt.io.names import Row

__all__ = ["ATTN_CAP", "FAMILIES", "LOGIT_CAP", "REFUSED", "WRAPPERS", "Family"]
__all__ += ["Multiplied", "Wrapper"]

Multiplied = Literal["embed", "residual", "scores", "logits", "1 / logits"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one model_type's config.json is read, or its GGUF file's metadata.

    `names` are fields that it calls otherwise than Llama does, `defaults` what it may
    leave out.

    `windows` says which layers have the sliding window if `layer_types` does not:
    "all", those "after" max_window_layers (where use_sliding_window is on), or all
    but "every" `period`-th; "listed": it must say.

    `turning` says in which layers heads turn, if not in all: those that are "listed"
    (no_rope_layers), the "local" ones, or the "windowed" ones of those that have any.

    `multipliers` are fields whose number multiplies something, see `Multiplied`.
    """

    rows: tuple[Row, ...] = r.LLAMA
    prefixes: tuple[tuple[str, str], ...] = ()  # see `Layout`, like the next
    unread: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    demands: Mapping[str, Any] = field(default_factory=dict)  # a field's only value
    mlp_ratio: int | None = None  # width of the MLP to that of the model, if not said
    positions: bool = False  # learned ones, nothing turns
    partial: bool = False  # a part of the channels may turn
    rotary_field: str | None = None  # says how many
    parallel: bool = False  # attention and MLP read the same
    parallel_field: str | None = None  # says whether they do
    options: frozenset[str] = frozenset()  # leaves that all its models have
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # to options
    multipliers: Mapping[str, Multiplied] = field(default_factory=dict)
    act_field: str = "hidden_act"
    gain_offset: float = 0.0  # gains are stored minus this
    scales_embedding: bool = False  # by the root of the width
    norms_embedding: bool = False  # by an RMSNorm without gains
    query_scalar: bool = False  # has query_pre_attn_scalar
    score_scale: float | None = None  # None: by the root of the channels of a head
    cap_fields: Mapping[str, float | None] | None = None  # their defaults; None: none
    tied: bool = False  # unless the config says
    windows: Literal["all", "listed", "after", "every"] | None = None
    period: int = 0
    window: int | None = 4096  # unless the config says
    rope_theta: float = 10_000.0  # unless the config says
    # None: one base for all layers; "same": one, scaled where layers are not local
    rope_local_theta: float | Literal["same"] | None = None
    rope_alpha: bool = False  # "dynamic" with an alpha means a larger base
    turning: Literal["listed", "local", "windowed"] | None = None
    norm_turned: bool = False  # see `LMConfig`
    gguf: str | None = None  # what llama.cpp calls it
    refused_gguf: tuple[str, ...] = ()  # metadata of what it calls so as well
    # GGUF files do not say that the largest of its models, known by its layers, scales
    # queries by the width per head.
    wide_queries: int = 0


ATTN_CAP, LOGIT_CAP = "attn_logit_softcapping", "final_logit_softcapping"
_ATTENTION = {"attention_bias": ("attention_bias",)}
_QKV = {"attention_bias": ("qkv_bias",)}
_MLP = {"mlp_bias": ("mlp_bias",)}
_BIASES = _ATTENTION | _MLP
_EPS_5 = {"rms_norm_eps": 1e-5}
_GEMMA: dict[str, Any] = {
    "rows": r.GEMMA,
    "flags": _ATTENTION,
    "act_field": "hidden_activation",
    "gain_offset": 1.0,
    "scales_embedding": True,
    "query_scalar": True,
    "tied": True,
    "windows": "every",
}
_VAULTGEMMA: dict[str, Any] = _GEMMA | {"rows": r.VAULTGEMMA}
_GELU = {"hidden_activation": "gelu_pytorch_tanh"}
# transformers' defaults, which the text_config of a wrapper leaves out.
_GEMMA3 = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
}
_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
    "rms_norm_eps": "layer_norm_epsilon",
}
_LAYER_NORM_EPS = {"rms_norm_eps": "layer_norm_eps"}
_GLM: dict[str, Any] = {
    "flags": _QKV,
    "defaults": {
        "attention_bias": True,
        "head_dim": 128,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1.5625e-7,
    },
    "partial": True,
}
_COHERE: dict[str, Any] = {
    "rows": r.COHERE,
    "names": _LAYER_NORM_EPS,
    "flags": _ATTENTION,
    "defaults": {"logit_scale": 0.0625, **_EPS_5},
    "multipliers": {"logit_scale": "logits"},
    "parallel": True,
    "tied": True,
}
FAMILIES: dict[str, Family] = {
    "llama": Family(gguf="llama", flags=_BIASES),
    "mistral": Family(windows="all"),
    "ministral3": Family(windows="all", window=None, defaults=_EPS_5),
    "helium": Family(
        rows=r.HELIUM,
        flags=_QKV | _MLP,
        defaults={"rms_norm_eps": 1e-8, "head_dim": 128},
        rope_theta=100_000.0,
    ),
    "seed_oss": Family(
        flags=_QKV | _MLP | {"attention_out_bias": ("o_bias",)},
        defaults={"attention_bias": True, "head_dim": 128},
    ),
    "arcee": Family(
        gguf="arcee",
        rows=r.ARCEE,
        flags=_BIASES,
        defaults={"hidden_act": "relu2", **_EPS_5},
    ),
    "apertus": Family(
        rows=r.APERTUS,
        unread=("*.act_fn.beta", "*.act_fn.eps"),  # 0.5 and almost zero
        options=frozenset({"qk_norm"}),
        flags=_ATTENTION,
        defaults={"hidden_act": "xielu", **_EPS_5},
        demands={"hidden_act": "xielu"},
        rope_theta=12_000_000.0,
    ),
    "smollm3": Family(
        gguf="smollm3",
        flags=_BIASES,
        demands={"use_sliding_window": False},
        tied=True,
        rope_theta=2_000_000.0,
        turning="listed",
    ),
    "hunyuan_v1_dense": Family(
        rows=r.HUNYUAN,
        options=frozenset({"qk_norm"}),
        flags=_ATTENTION,
        defaults=_EPS_5,
        rope_alpha=True,
        norm_turned=True,
    ),
    "starcoder2": Family(
        gguf="starcoder2",
        rows=r.STARCODER2,
        names={"rms_norm_eps": "norm_epsilon"},
        flags={"use_bias": ("attention_bias", "mlp_bias")},
        defaults={
            "use_bias": True,
            "hidden_act": "gelu_pytorch_tanh",
            **_EPS_5,
        },
        tied=True,
        windows="all",
        window=None,
    ),
    "stablelm": Family(
        rows=r.STABLELM,
        names=_LAYER_NORM_EPS,
        flags={"use_qkv_bias": ("qkv_bias",)},
        defaults={"partial_rotary_factor": 0.25, **_EPS_5},
        demands={"qk_layernorm": False},
        partial=True,
        parallel_field="use_parallel_residual",
    ),
    "olmo": Family(
        rows=r.OLMO,
        flags=_ATTENTION,
        defaults=_EPS_5,
        demands={"clip_qkv": False},
    ),
    "olmo2": Family(
        gguf="olmo2",
        # OLMo 3's files are called so too: windows, and YaRN in other layers only.
        refused_gguf=("attention.sliding_window",),
        rows=r.OLMO2,
        flags=_ATTENTION,
        defaults=_EPS_5,
    ),
    "olmo3": Family(
        rows=r.OLMO2,
        flags=_ATTENTION,
        defaults=_EPS_5,
        windows="every",
        period=4,
        rope_theta=500_000.0,
        rope_local_theta="same",
    ),
    "exaone4": Family(
        rows=r.EXAONE4,
        options=frozenset({"qk_norm"}),
        defaults=_EPS_5,
        windows="every",
        period=4,
        turning="windowed",
    ),
    "phi": Family(
        rows=r.PHI,
        names=_LAYER_NORM_EPS,
        options=frozenset({"attention_bias", "mlp_bias"}),
        defaults={"hidden_act": "gelu_new", "partial_rotary_factor": 0.5, **_EPS_5},
        demands={"qk_layernorm": False},
        partial=True,
        parallel=True,
    ),
    "phi3": Family(
        rows=r.PHI3, defaults=_EPS_5, partial=True, windows="all", window=None
    ),
    "glm": Family(rows=r.GLM, **_GLM),
    "glm4": Family(rows=r.GLM4, **_GLM),
    "granite": Family(
        gguf="granite",
        flags=_BIASES,
        defaults={
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        multipliers={
            "embedding_multiplier": "embed",
            "residual_multiplier": "residual",
            "attention_multiplier": "scores",
            "logits_scaling": "1 / logits",
        },
    ),
    "cohere": Family(
        **_COHERE,
        gguf="command-r",
        demands={"use_qk_norm": False},
        rope_theta=500_000.0,
    ),
    "cohere2": Family(
        **_COHERE, gguf="cohere2", windows="every", period=4, turning="local"
    ),
    "nemotron": Family(
        gguf="nemotron",
        rows=r.NEMOTRON,
        names={"rms_norm_eps": "norm_eps"},
        flags=_BIASES,
        defaults={"hidden_act": "relu2", "partial_rotary_factor": 0.5, **_EPS_5},
        partial=True,
        gain_offset=1.0,
    ),
    "nanochat": Family(
        rows=r.NANOCHAT,
        options=frozenset({"qk_norm"}),
        flags=_ATTENTION,
        defaults={"hidden_act": "relu2"},
        cap_fields={LOGIT_CAP: 15.0},
        norms_embedding=True,
    ),
    "gptj": Family(
        rows=r.GPT_J,
        prefixes=(("transformer.", ""),),
        unread=("*.attn.bias", "*.attn.masked_bias"),
        names=_GPT2_NAMES,
        defaults={"hidden_act": "gelu_new", **_EPS_5},
        mlp_ratio=4,
        rotary_field="rotary_dim",
        parallel=True,
    ),
    "gpt_neo": Family(
        rows=r.GPT_NEO,
        prefixes=(("transformer.", ""),),
        unread=("*.attention.bias", "*.attention.masked_bias"),
        names={
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_heads",
            "hidden_act": "activation_function",
            "rms_norm_eps": "layer_norm_epsilon",
            "layer_types": "attention_layers",
            "sliding_window": "window_size",
        },
        defaults={"hidden_act": "gelu_new", **_EPS_5},
        mlp_ratio=4,
        positions=True,
        score_scale=1.0,
        tied=True,
        windows="listed",
        window=256,
    ),
    "opt": Family(
        rows=r.OPT,
        prefixes=(("model.decoder.", ""), ("decoder.", "")),
        names={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
        defaults={"hidden_act": "relu", **_EPS_5},
        demands={
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
        },
        positions=True,
        tied=True,
    ),
    "falcon": Family(
        rows=r.FALCON,
        prefixes=(("transformer.", ""),),
        names={
            "intermediate_size": "ffn_hidden_size",
            "hidden_act": "activation",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        flags={"bias": ("bias",)},
        defaults={"hidden_act": "gelu", "num_key_value_heads": 1, **_EPS_5},
        demands={
            "alibi": False,
            "multi_query": True,
            "new_decoder_architecture": False,
            "parallel_attn": True,
        },
        mlp_ratio=4,
        parallel=True,
        tied=True,
    ),
    "qwen2": Family(
        gguf="qwen2", rows=r.QWEN, options=frozenset({"qkv_bias"}), windows="after"
    ),
    "qwen3": Family(
        gguf="qwen3",
        rows=r.QWEN,
        options=frozenset({"qk_norm"}),
        flags=_ATTENTION,
        windows="after",
    ),
    "gemma2": Family(
        **_GEMMA,
        gguf="gemma2",
        wide_queries=46,
        defaults=_GELU,
        period=2,
        cap_fields={ATTN_CAP: 50.0, LOGIT_CAP: 30.0},
    ),
    "vaultgemma": Family(
        **_VAULTGEMMA,
        defaults=_GELU,
        period=2,
        cap_fields={ATTN_CAP: 50.0, LOGIT_CAP: 30.0},
    ),
    "gemma3_text": Family(
        **_GEMMA,
        gguf="gemma3",
        wide_queries=62,
        defaults=_GELU | _GEMMA3,
        options=frozenset({"qk_norm"}),
        period=6,
        cap_fields={ATTN_CAP: None, LOGIT_CAP: None},
        rope_theta=1_000_000.0,
        rope_local_theta=10_000.0,
    ),
    "gpt2": Family(
        gguf="gpt2",
        rows=r.GPT2,
        prefixes=(("transformer.", ""),),
        unread=("*.attn.bias", "*.attn.masked_bias"),  # causal masks
        names=_GPT2_NAMES,
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
        rows=r.GPT_NEOX,
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
        flags=_ATTENTION,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """A model for more than text around one of a family: its text part is read."""

    kind: str  # the family, unless the text's config says
    prefixes: tuple[tuple[str, str], ...]
    unread: tuple[str, ...]  # what is for other input than text
    field: str = "text_config"


_SEES: dict[str, Any] = {
    "prefixes": (
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.language_model.", "model."),
    ),
    "unread": (
        *("vision_tower.*", "model.vision_tower.*"),
        *("multi_modal_projector.*", "model.multi_modal_projector.*"),
    ),
}
WRAPPERS = {
    "gemma3": Wrapper(kind="gemma3_text", **_SEES),
    "mistral3": Wrapper(kind="mistral", **_SEES),
}
_EXPERTS = (
    "its MLPs are mixtures of experts and its attention has sinks; a local replacement "
    "model would have to freeze the router, which no graph could then explain"
)
REFUSED = {"gpt_oss": _EXPERTS}
