"""Models in a GGUF file: what its metadata and tensors mean for the one decoder."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from jax.sharding import Mesh

from jaxclt.errors import InputError, shown
from jaxclt.io.gguf_file import GGUFFile, open_gguf
from jaxclt.io.names import (
    GEMMA,
    GPT2,
    GPT_NEOX,
    LLAMA,
    QWEN,
    Layout,
    Row,
    tensor_name,
)
from jaxclt.io.read_params import read_params
from jaxclt.io.rope import yarn, yarn_warmth
from jaxclt.lm.config import LMConfig, RopeScaling
from jaxclt.types import LMParams

__all__ = ["config_from_gguf", "load_gguf", "params_from_gguf"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What llama.cpp knows of an architecture and does not write into its files."""

    rows: tuple[Row, ...] = LLAMA
    options: frozenset[str] = frozenset()  # leaves that all its models have
    act: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    layer_norm: bool = False
    positions: bool = False  # learned ones, nothing turns
    partial: bool = False  # a part of the channels may turn
    parallel: bool = False  # unless the file says
    scales_embedding: bool = False  # by the root of the width
    capped: bool = False  # attention scores and logits
    period: int = 0  # all but every so manieth layer are local; 0: all alike
    rope_local_theta: float | None = None
    # Its largest model, told by its layers, scales queries by the width per head.
    wide_queries: int = 0


ARCHITECTURES = {
    "llama": Architecture(),
    "qwen2": Architecture(rows=QWEN, options=frozenset({"qkv_bias"})),
    "qwen3": Architecture(rows=QWEN, options=frozenset({"qk_norm"})),
    "gemma2": Architecture(
        rows=GEMMA,
        act="gelu_tanh",
        scales_embedding=True,
        capped=True,
        period=2,
        wide_queries=46,
    ),
    "gemma3": Architecture(
        rows=GEMMA,
        options=frozenset({"qk_norm"}),
        act="gelu_tanh",
        scales_embedding=True,
        period=6,
        rope_local_theta=10_000.0,
        wide_queries=62,
    ),
    "gpt2": Architecture(rows=GPT2, act="gelu_tanh", layer_norm=True, positions=True),
    # llama.cpp runs the tanh form; the models were trained with this one.
    "gptneox": Architecture(
        rows=GPT_NEOX, act="gelu", layer_norm=True, partial=True, parallel=True
    ),
}
_ROPE_FACTORS = "rope_freqs.weight"


def config_from_gguf(file: GGUFFile) -> LMConfig:
    """Config of a model from GGUF metadata.

    Raises:
      InputError: for another architecture, rotary embeddings that are scaled in
        another way than linearly, by YaRN or by factors, experts, or a missing or
        impossible size.
    """
    name, arch = _architecture(file)
    if file.meta.get(f"{name}.expert_count", 0):
        raise InputError(f"{file.path}: mixtures of experts are not supported")
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{file.path}: tensor token_embd.weight is missing")

    get = _getter(file, name)
    d_model, n_layers = get("embedding_length", int), get("block_count", int)
    n_heads = get("attention.head_count", int)
    d_head = get("attention.key_length", int, d_model // max(n_heads, 1))
    d_rotary = 0 if arch.positions else None
    whole_head = ["attention.value_length"]
    if arch.partial:
        d_rotary = get("rope.dimension_count", int, d_head)
    else:
        whole_head.append("rope.dimension_count")
    for key in whole_head:
        if get(key, int, d_head) != d_head:
            raise InputError(
                f"{file.path}: {name}.{key} differs from the head size {d_head}, "
                "which is not supported"
            )
    window, local_theta = None, arch.rope_local_theta
    if arch.period or f"{name}.attention.sliding_window" in file.meta:
        window = get("attention.sliding_window", int)
    if local_theta is not None:
        local_theta = get("rope.freq_base_swa", float, local_theta)
    theta = get("rope.freq_base", float, 10_000.0)
    n_ctx = get("context_length", int)
    turning = d_head if d_rotary is None else d_rotary
    scaling, warmer = _scaling(file, name, theta, turning, n_ctx)
    query_scale = None
    if n_layers == arch.wide_queries:
        query_scale = (d_model / n_heads) ** -0.5
    if warmer != 1:
        query_scale = (query_scale or d_head**-0.5) * warmer
    norm = "layer_norm" if arch.layer_norm else "layer_norm_rms"
    parallel = file.meta.get(f"{name}.use_parallel_residual", arch.parallel)
    return LMConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=get("attention.head_count_kv", int, n_heads),
        d_head=d_head,
        d_mlp=get("feed_forward_length", int),
        d_vocab=file.tensors["token_embd.weight"].shape[0],
        n_ctx=n_ctx,
        norm_eps=get(f"attention.{norm}_epsilon", float, 1e-5),
        parallel=bool(parallel),
        d_rotary=d_rotary,
        rope_theta=theta,
        rope_local_theta=local_theta,
        rope_scaling=scaling,
        act=arch.act,
        window=window,
        query_scale=query_scale,
        attn_cap=get("attn_logit_softcapping", float) if arch.capped else None,
    )


def _architecture(file: GGUFFile) -> tuple[str, Architecture]:
    name = file.meta.get("general.architecture")
    if name not in ARCHITECTURES:
        raise InputError(
            f"{file.path}: architecture {shown(name)} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    return name, ARCHITECTURES[name]


def _scaling(
    file: GGUFFile, name: str, theta: float, turning: int, n_ctx: int
) -> tuple[RopeScaling | None, float]:
    """How frequencies are scaled, and what attention scores are times."""
    kind = file.meta.get(f"{name}.rope.scaling.type", "none")
    each = _ROPE_FACTORS in file.tensors  # Llama 3's, written out
    if kind not in ("none", "linear", "yarn") or (each and kind != "none"):
        raise InputError(
            f"{file.path}: scaled rotary embeddings of type {shown(kind)} are not "
            "supported; supported: 'linear', 'yarn', and factors of their own"
        )
    if each:
        factors = file.get(_ROPE_FACTORS).ravel().tolist()
        return RopeScaling(kind="factors", factors=tuple(factors)), 1.0
    if kind == "none":
        return None, 1.0
    get = _getter(file, name)
    factor = get("rope.scaling.factor", float)
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor), 1.0
    # Releases of llama.cpp do different things with these.
    for key, plain in _YARN_PLAIN.items():
        value = file.meta.get(f"{name}.rope.scaling.{key}")
        if value not in (None, *plain):
            raise InputError(
                f"{file.path}: metadata {name}.rope.scaling.{key} is {shown(value)}, "
                f"which is not supported; supported: {plain[0]}"
            )
    scaling = yarn(
        theta,
        turning,
        get("rope.scaling.original_context_length", int, n_ctx),
        factor,
        beta_fast=get("rope.scaling.yarn_beta_fast", float, 32.0),
        beta_slow=get("rope.scaling.yarn_beta_slow", float, 1.0),
        where=str(file.path),
    )
    times = get("rope.scaling.attn_factor", float, 1.0) * yarn_warmth(factor)
    return scaling, times**2


_YARN_PLAIN = {
    "yarn_ext_factor": (1.0, -1.0),  # below 0 is not set
    "yarn_attn_factor": (1.0,),
    "yarn_log_multiplier": (0.0,),
}


def params_from_gguf(
    file: GGUFFile,
    cfg: LMConfig,
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
) -> LMParams:
    """Dequantise all weights, with query and key rows put back in halves.

    Args:
      file: the file.
      cfg: its config.
      dtype: of the weights.
      mesh: devices to split them over.

    Raises:
      InputError: for a missing, unknown, wrongly shaped or not finite tensor.
    """
    name, arch = _architecture(file)
    # An option is on where the last of its leaves is there: q, k and v may have biases
    # of their own, but o only with them.
    last = {row.option: row for row in arch.rows if row.option}
    options = {
        option
        for option, row in last.items()
        if tensor_name(row, "gguf") in file.tensors
    }
    local = None
    if arch.period and cfg.n_layers <= len(file.tensors):  # else it is refused below
        local = tuple((i + 1) % arch.period != 0 for i in range(cfg.n_layers))
    cap = None
    if arch.capped:
        cap = _getter(file, name)("final_logit_softcapping", float)
    return read_params(
        file.get,
        {name: tensor.shape for name, tensor in file.tensors.items()},
        cfg,
        layout=Layout(
            rows=arch.rows,
            options=arch.options | options,
            local=local,
            embed_scale=cfg.d_model**0.5 if arch.scales_embedding else None,
            logit_cap=cap,
        ),
        source="gguf",
        where=str(file.path),
        ignore=lambda name: name == _ROPE_FACTORS,  # in the config
        dtype=dtype,
        mesh=mesh,
    )


def load_gguf(path: str | os.PathLike[str]) -> tuple[LMParams, LMConfig]:
    """Read a GGUF file: `open_gguf`, `config_from_gguf` and `params_from_gguf`."""
    file = open_gguf(path)
    cfg = config_from_gguf(file)
    return params_from_gguf(file, cfg), cfg


def _getter(file: GGUFFile, name: str) -> Callable[..., Any]:
    """Typed access to the keys of the architecture."""

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = file.meta.get(f"{name}.{key}", default)
        if value is None:
            raise InputError(f"{file.path}: metadata {name}.{key} is missing")
        if type(value) is not kind or not 0 < value < math.inf:
            raise InputError(
                f"{file.path}: metadata {name}.{key} must be one positive "
                f"{kind.__name__}, not {shown(value)}"
            )
        return value

    return get
