"""The ways to patch; no jax is needed to name one."""

from __future__ import annotations

import dataclasses
from dataclasses import InitVar
from typing import TYPE_CHECKING, Literal, get_args

from jaxclt.errors import check_choice

if TYPE_CHECKING:
    from jaxclt.clt.coder import Coder

__all__ = ["How", "Mode", "Part"]

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
