"""Models in a GGUF file: what its metadata and tensors mean for the one decoder."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from jaxclt.errors import InputError, shown
from jaxclt.io.config_hf import family_act, multiplied_leaves
from jaxclt.io.families import FAMILIES, Family, Multiplied
from jaxclt.io.gguf_file import GGUFFile, open_gguf
from jaxclt.io.names import Layout, tensor_name
from jaxclt.io.read_params import Stored, read_params
from jaxclt.io.rope import yarn, yarn_warmth
from jaxclt.lm.config import LMConfig, RopeScaling
from jaxclt.types import LMParams

__all__ = ["load_gguf"]


_FAMILIES = {family.gguf: family for family in FAMILIES.values() if family.gguf}
_TURNING_BUT = 4  # every such layer has no rotary embeddings, which no file says
_ROPE_FACTORS = "rope_freqs.weight"


def load_gguf(
    source: str | os.PathLike[str] | GGUFFile,
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
) -> tuple[LMParams, LMConfig]:
    """Read a GGUF file: weights dequantised, query and key rows put back in halves.

    Args:
      source: the file, opened or not.
      dtype: of the weights.
      mesh: devices to split them over.

    Raises:
      InputError: for another architecture, rotary embeddings that are scaled in
        another way than linearly, by YaRN or by factors, experts, a missing or
        impossible size, or a missing, unknown, wrongly shaped or not finite tensor.
    """
    file = source if isinstance(source, GGUFFile) else open_gguf(source)
    cfg = _config(file)
    stored = Stored(
        where=str(file.path),
        source="gguf",
        shapes={name: tensor.shape for name, tensor in file.tensors.items()},
        get=file.get,
    )
    return read_params(stored, cfg, _layout(file, cfg), dtype=dtype, mesh=mesh), cfg


def _config(file: GGUFFile) -> LMConfig:
    name, family = _family(file)
    _check_parts(file, name, family)
    get = _getter(file, name)
    d_model, n_layers = get("embedding_length", int), get("block_count", int)
    n_heads = get("attention.head_count", int)
    d_head = get("attention.key_length", int, d_model // max(n_heads, 1))
    d_rotary = 0 if family.positions else None
    whole_head = ["attention.value_length"]
    if family.partial:
        d_rotary = get("rope.dimension_count", int, d_head)
    else:
        whole_head.append("rope.dimension_count")
    for key in whole_head:
        if get(key, int, d_head) != d_head:
            raise InputError(
                f"{file.path}: {name}.{key} differs from the head size {d_head}, "
                "which is not supported"
            )
    window, local_theta = None, None
    if family.period or f"{name}.attention.sliding_window" in file.meta:
        window = get("attention.sliding_window", int)
    theta = get("rope.freq_base", float, 10_000.0)
    if family.rope_local_theta is not None:
        same = family.rope_local_theta == "same"
        local_theta = theta if same else family.rope_local_theta
        local_theta = get("rope.freq_base_swa", float, local_theta)
    n_ctx = get("context_length", int)
    turning = d_head if d_rotary is None else d_rotary
    scaling, warmer = _scaling(file, name, theta, turning, n_ctx)
    query_scale = _multipliers(file, name, family).get("scores", family.score_scale)
    if n_layers == family.wide_queries:
        query_scale = (d_model / n_heads) ** -0.5
    if warmer != 1:
        query_scale = (query_scale or d_head**-0.5) * warmer
    biased = any(row.leaf == "norm_out_bias_D" for row in family.rows)
    norm = "layer_norm" if biased else "layer_norm_rms"
    parallel = file.meta.get(
        f"{name}.use_parallel_residual",
        family.parallel or bool(family.parallel_field),
    )
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
        act=family_act(family, family.defaults),
        window=window,
        query_scale=query_scale,
        attn_cap=get("attn_logit_softcapping", float) if _capped(family) else None,
    )


def _check_parts(file: GGUFFile, name: str, family: Family) -> None:
    """Refuse what its tensors and sizes would not show."""
    if file.meta.get(f"{name}.expert_count", 0):
        raise InputError(f"{file.path}: mixtures of experts are not supported")
    for key in family.refused_gguf:
        if f"{name}.{key}" in file.meta:
            raise InputError(
                f"{file.path}: metadata {name}.{key} is not supported; the model may "
                "open from its Hugging Face files"
            )
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{file.path}: tensor token_embd.weight is missing")


def _family(file: GGUFFile) -> tuple[str, Family]:
    name = file.meta.get("general.architecture")
    if name not in _FAMILIES:
        raise InputError(
            f"{file.path}: architecture {shown(name)} is not supported; "
            f"supported: {', '.join(_FAMILIES)}"
        )
    return name, _FAMILIES[name]


_TIMES: dict[Multiplied, str] = {
    "embed": "embedding_scale",
    "residual": "residual_scale",
    "scores": "attention.scale",
    "logits": "logit_scale",
    "1 / logits": "logit_scale",
}


def _multipliers(file: GGUFFile, name: str, family: Family) -> dict[Multiplied, float]:
    """What a model of the family multiplies by what."""
    get = _getter(file, name)
    return {what: get(_TIMES[what], float) for what in family.multipliers.values()}


def _capped(family: Family) -> bool:
    """Whether attention scores and logits are."""
    return any((family.cap_fields or {}).values())


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


def _layout(file: GGUFFile, cfg: LMConfig) -> Layout:
    name, family = _family(file)
    # An option is on where the last of its leaves is there: q, k and v may have biases
    # of their own, but o only with them.
    last = {row.option: row for row in family.rows if row.option}
    options = {
        option
        for option, row in last.items()
        if tensor_name(row, "gguf") in file.tensors
    }
    local = None
    if family.period and cfg.n_layers <= len(file.tensors):  # else it is refused below
        local = tuple((i + 1) % family.period != 0 for i in range(cfg.n_layers))
    turning = local if family.turning == "local" else None
    if family.turning == "listed" and cfg.n_layers <= len(file.tensors):
        turning = tuple((i + 1) % _TURNING_BUT != 0 for i in range(cfg.n_layers))
    times = _multipliers(file, name, family)
    width = cfg.d_model**0.5 if family.scales_embedding else None
    cap = None
    if _capped(family):
        cap = _getter(file, name)("final_logit_softcapping", float)
    return Layout(
        rows=family.rows,
        options=family.options | options,
        unread=(_ROPE_FACTORS,),  # in the config
        local=local,
        turning=turning,
        scales=multiplied_leaves(times),
        embed_scale=times.get("embed", width),
        logit_cap=cap,
    )


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
