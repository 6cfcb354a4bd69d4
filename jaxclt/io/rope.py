"""Rotary embeddings as a config.json says them: bases, scalings, how much turns.

transformers 5 nests them in `rope_parameters`, older releases do not.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxclt.errors import InputError, shown
from jaxclt.io.config_fields import number, whole
from jaxclt.lm.config import RopeScaling
from jaxclt.lm.rotary import rotary_frequencies

__all__ = ["KINDS", "Rope", "read_rope", "yarn", "yarn_warmth"]

_MOST_CHANNELS = 1 << 16  # of a head
_ORIGINAL = "original_max_position_embeddings"
KINDS = {"full_attention": False, "sliding_attention": True}  # is it local?


class Rope(NamedTuple):
    """Fields of `LMConfig`."""

    theta: float
    local_theta: float | None
    scaling: RopeScaling | None
    d_rotary: int | None
    score_factor: float  # what attention scores are times
    n_ctx: int  # positions up to which they are so


def read_rope(
    hf: dict[str, Any],
    *,
    d_head: int,
    n_ctx: int,
    theta: float,
    local_theta: float | Literal["same"] | None,
    partial: bool,
    alpha: bool = False,
) -> Rope:
    """Rotary embeddings of a model.

    Args:
      hf: the config.
      d_head: channels of a head.
      n_ctx: longest prompt.
      theta: base, unless the config says.
      local_theta: that of local layers; None: they have no other; "same": nor have
        they, but they are not scaled.
      partial: whether the family can turn a part of the channels only.
      alpha: whether an alpha beside the type "dynamic" enlarges the base.

    Raises:
      InputError: for another type than the supported ones, or an impossible number.
    """
    new, old = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
    for rope in (new, old):
        if not isinstance(rope, dict):
            raise InputError("config.json: rope parameters must be an object")
    new, local_theta = _by_kind(hf, new, theta, local_theta)
    for rope in (new, old):
        if any(isinstance(value, dict) for value in rope.values()):
            raise InputError(
                "config.json: rotary embeddings of type one per kind of layer are not "
                "supported for this model_type"
            )
    d_rotary = None
    share = _share(hf, old, new)
    if partial:
        d_rotary = int(d_head * share)
    elif share != 1:
        raise InputError(
            "config.json: partial_rotary_factor is not supported for this model_type; "
            "supported: rotary embeddings over the whole head"
        )
    theta = number({**hf, **new}, "rope_theta", theta)
    turning = d_head if d_rotary is None else d_rotary
    said = {_ORIGINAL: hf.get(_ORIGINAL), **(old or new)}
    if alpha and _kind(said) == "dynamic" and said.get("alpha") and turning > 2:
        theta *= number(said, "alpha") ** (turning / (turning - 2))
        said = {}
    scaling, factor = _scaling(said, theta, turning, n_ctx)
    # Past the context it was trained with, a model like these has other frequencies, or
    # attention that is warmer at later positions: longer prompts are refused.
    if said.get("llama_4_scaling_beta") or said.get("short_factor"):
        n_ctx = min(n_ctx, whole(said, _ORIGINAL, n_ctx, least=1))
    return Rope(theta, local_theta, scaling, d_rotary, factor, n_ctx)


def _by_kind(
    hf: dict[str, Any],
    rope: dict[str, Any],
    theta: float,
    local_theta: float | Literal["same"] | None,
) -> tuple[dict[str, Any], float | None]:
    """What is said of layers that are not local, and the base of local ones."""
    if local_theta is None:
        return rope, None
    nested = any(kind in rope for kind in KINDS)
    local = (rope.get("sliding_attention") or {}) if nested else {}
    rope = (rope.get("full_attention") or {}) if nested else rope
    if _kind(local) != "default":
        raise InputError(
            "config.json: rope_parameters of sliding_attention must be of type "
            f"'default', not {shown(_kind(local))}"
        )
    if local_theta == "same":
        local_theta = number({**hf, **rope}, "rope_theta", theta)
    local_theta = number({**hf, **local}, "rope_local_base_freq", local_theta)
    return rope, number(local, "rope_theta", local_theta)


def _share(*said: dict[str, Any]) -> float:
    """Share of a head's channels that turn; what is said last counts."""
    share = 1.0
    for rope in said:
        share = number(rope, "partial_rotary_factor", share)
    if share > 1:
        raise InputError(f"config.json: partial_rotary_factor={share} is above 1")
    return share


def _kind(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _scaling(
    rope: dict[str, Any], theta: float, turning: int, n_ctx: int
) -> tuple[RopeScaling | None, float]:
    """How frequencies are scaled, and what attention scores are times."""
    kind = _kind({k: v for k, v in rope.items() if v is not None})
    if kind == "default":
        return None, 1.0
    if kind not in ("linear", "llama3", "yarn", "longrope", "su"):
        raise InputError(
            f"config.json: rotary embeddings of type {shown(kind)} are not supported; "
            "supported: 'default', 'linear', 'llama3', 'yarn', 'longrope'"
        )
    if kind in ("longrope", "su") or rope.get("short_factor"):
        return _longrope(rope, n_ctx)
    if kind == "yarn":
        return _yarn(rope, theta, turning, n_ctx)
    factor = number(rope, "factor")
    if kind == "linear":
        return RopeScaling(kind=kind, factor=factor), 1.0
    llama3 = RopeScaling(
        kind=kind,
        factor=factor,
        low_freq_factor=number(rope, "low_freq_factor", 1.0),
        high_freq_factor=number(rope, "high_freq_factor", 4.0),
        n_ctx=whole(rope, _ORIGINAL, n_ctx),
    )
    return llama3, 1.0


def _longrope(rope: dict[str, Any], n_ctx: int) -> tuple[RopeScaling, float]:
    """Divisors of every pair of channels, in the context that a model started with."""
    each = rope.get("short_factor")
    if not isinstance(each, list):
        raise InputError("config.json: short_factor must be a list of numbers")
    factors = tuple(number({"short_factor": x}, "short_factor") for x in each)
    original = whole(rope, _ORIGINAL, n_ctx, least=2)
    factor = number(rope, "factor", n_ctx / original)
    default = 1.0
    if factor > 1:
        default = math.sqrt(1 + math.log(factor) / math.log(original))
    times = number(rope, "attention_factor", default)
    return RopeScaling(kind="factors", factors=factors), times**2


def _yarn(
    rope: dict[str, Any], theta: float, turning: int, n_ctx: int
) -> tuple[RopeScaling, float]:
    """`yarn` as a config.json has it, and warmer attention.

    Cosines and sines of queries and of keys are times one number, and scores therefore
    times its square.
    """
    original = whole(rope, _ORIGINAL, n_ctx, least=1)
    factor = number(rope, "factor", n_ctx / original)
    scaling = yarn(
        theta,
        turning,
        original,
        factor,
        beta_fast=number(rope, "beta_fast", 32.0),
        beta_slow=number(rope, "beta_slow", 1.0),
        truncate=bool(rope.get("truncate", True)),
        where="config.json",
    )
    default = yarn_warmth(factor)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        all_dim = number(rope, "mscale_all_dim")
        default = yarn_warmth(factor, number(rope, "mscale"))
        default /= yarn_warmth(factor, all_dim)
    return scaling, number(rope, "attention_factor", default) ** 2


def yarn(
    theta: float,
    turning: int,
    original: int,
    factor: float,
    *,
    beta_fast: float,
    beta_slow: float,
    truncate: bool = True,
    where: str,
) -> RopeScaling:
    """The divisors of YaRN (arXiv 2309.00071), one for every pair of channels.

    Pairs that turn often in the original context keep their frequency, those that turn
    seldom are divided by the factor, along a ramp between.

    Args:
      theta: base.
      turning: channels of a head that turn.
      original: the context it was trained with.
      factor: how much longer the context is now.
      beta_fast: turns in the original context from which on a pair is kept.
      beta_slow: turns up to which it is divided.
      truncate: the ramp goes from pair to pair, not between them.
      where: the file, for messages.

    Raises:
      InputError: if nothing turns, or the context gets shorter.
    """
    if not 2 <= turning <= _MOST_CHANNELS or theta <= 1:
        raise InputError(f"{where}: rope type 'yarn' needs channels that turn")
    if factor < 1:
        raise InputError(f"{where}: rope factor={factor} is below 1")

    def pair(turns: float) -> float:
        """Twice the index of the pair that turns so often, a real number."""
        times = math.log(original / (turns * 2 * math.pi))
        return turning * times / (2 * math.log(theta))

    low, high = pair(beta_fast), pair(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, turning - 1)
    high += 0.001 * (low == high)
    ramp_J = np.clip((np.arange(turning // 2) - low) / (high - low), 0, 1)
    plain_J = rotary_frequencies(turning, theta)
    scaled_J = plain_J / factor * ramp_J + plain_J * (1 - ramp_J)
    return RopeScaling(kind="factors", factors=tuple((plain_J / scaled_J).tolist()))


def yarn_warmth(factor: float, mscale: float = 1.0) -> float:
    """What cosines and sines are times, of queries and of keys."""
    return 0.1 * mscale * math.log(factor) + 1
