"""A recorded prompt that is ready to be patched, and the ways to patch it."""

from __future__ import annotations

import dataclasses
from dataclasses import InitVar
from typing import Literal, get_args

import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxclt.clt.coder import Coder, Dictionary
from jaxclt.clt.sites import read_site
from jaxclt.errors import check_choice
from jaxclt.lm.config import LMConfig
from jaxclt.lm.layers import mlp_norm
from jaxclt.types import Block, Held, LMParams, Recording

__all__ = [
    "How",
    "Mode",
    "Part",
    "Patchable",
    "hold_of",
    "make_patchable",
    "read",
]

Mode = Literal["constrained", "iterative", "additive"]
Part = Literal["live", "frozen"]  # of the model: computed, or as on the clean prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """How a patch is made; hashable, a static argument of jit.

    `freeze_pattern` and `freeze_norm`, true or false, are older names of `patterns` and
    `norms`.

    Raises:
      InputError: for a mode that does not exist, or a part that is neither live nor
        frozen.
    """

    mode: Mode = "constrained"  # see `jaxclt.patching.modes`
    patterns: Part = "frozen"  # of attention
    norms: Part = "live"  # their denominators
    # Of the local replacement model; None: live, but frozen where features have gates
    # of their own (neurons), as in graphs.
    gates: Part | None = None
    freeze_pattern: InitVar[bool | None] = None
    freeze_norm: InitVar[bool | None] = None

    def __post_init__(
        self, freeze_pattern: bool | None, freeze_norm: bool | None
    ) -> None:
        for name, freeze in (("patterns", freeze_pattern), ("norms", freeze_norm)):
            if freeze is not None:
                object.__setattr__(self, name, "frozen" if freeze else "live")
        check_choice("mode", self.mode, get_args(Mode))
        for name in ("patterns", "norms", "gates"):
            check_choice(name, getattr(self, name) or "live", get_args(Part))

    def of(self, coder: Coder) -> How:
        """The same with the gates of a dictionary decided."""
        gates = self.gates or ("frozen" if coder.gated else "live")
        return dataclasses.replace(self, gates=gates)


@struct.dataclass
class Patchable:
    """A recording, the model that made it, and how the dictionary computes."""

    params: LMParams
    recording: Recording
    skip_LDD: Array | None  # linear path of the dictionary
    cfg: LMConfig = struct.field(pytree_node=False)
    coder: Coder = struct.field(pytree_node=False)


def make_patchable(
    dictionary: Dictionary, params: LMParams, recording: Recording, cfg: LMConfig
) -> Patchable:
    """Put a recording and the conventions of a dictionary together."""
    coder = dictionary.coder(cfg)
    skips = [
        coder.skip(dictionary.fixed(params, layer)) for layer in range(cfg.n_layers)
    ]
    skip_LDD = None
    if skips[0] is not None:
        dtype = recording.mid_LTD.dtype
        skip_LDD = jnp.stack([jnp.asarray(W, dtype) for W in skips])
    return Patchable(
        params=params, recording=recording, skip_LDD=skip_LDD, cfg=cfg, coder=coder
    )


def hold_of(recording: Recording, how: How) -> Held:
    """What a patch holds at its clean values."""
    f = recording.frozen
    pattern, norm = how.patterns == "frozen", how.norms == "frozen"
    return Held(
        pattern_LHTS=f.pattern_LHTS if pattern else None,
        clean_LTD=f.clean_LTD if pattern else None,
        attn_scale_LT=f.attn_scale_LT if norm else None,
        mlp_scale_LT=f.mlp_scale_LT if norm else None,
        out_scale_T=f.out_scale_T if norm else None,
        post_attn_scale_LT=f.post_attn_scale_LT if norm else None,
        post_mlp_scale_LT=f.post_mlp_scale_LT if norm else None,
    )


def read(model: Patchable, mid_TD: Array, scale_T: Array, p: Block) -> Array:
    """What the dictionary reads of the stream at one layer, [T, D]."""
    return read_site(model.coder.site, mlp_norm(p), mid_TD, scale_T)
