"""Sets of features on a recorded prompt, all others at a reference (maths 24.2)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jaxclt.circuits.search import Shares
from jaxclt.files.json_file import json_schema, record
from jaxclt.patching.circuit import held_slopes
from jaxclt.patching.how import How
from jaxclt.patching.subject import Subject
from jaxclt.runs.kept import Answers
from jaxclt.validation.shown import Measure, held_leads

__all__ = ["MEASURED", "Leads", "Places", "Stage", "places_of"]

TOGETHER = 32  # passes side by side
CHUNK_BYTES = 1 << 28  # of their activations
SMALL = 0.1  # of the lead: what features make below it is nothing to have a share of
_NUMBER = {"type": ["number", "null"]}
MEASURED = json_schema(record({"key": {"type": "string"}, "leads": {}}))

Places = np.ndarray  # int [A, 3]: layer, position, slot in the tables


class Leads(dict[str, float]):
    """m of all features, and of none: what tokens, errors and attention alone make."""

    @property
    def made(self) -> float:
        """What features make."""
        return self["all"] - self["none"]

    @property
    def astray(self) -> bool:
        """Whether shares of that mislead: it is next to nothing, or against the answer.

        What is said without any feature is then near what is said with all, or above.
        """
        return not self.made > SMALL * abs(self["all"])

    @property
    def unit(self) -> float:
        """What shares are of: where those of `made` mislead, the lead itself."""
        return (self["all"] or 1.0) if self.astray else self.made

    def shares(self, keep_B: np.ndarray, drop_B: np.ndarray) -> Shares:
        """Of sets that are kept alone, and dropped alone."""
        none = 0.0 if self.astray else self["none"]
        return Shares((keep_B - none) / self.unit, (self["all"] - drop_B) / self.unit)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """A recorded prompt whose features are kept and dropped; a `Game` of the search.

    Attributes:
      subject: the prompt.
      measure: m, the answer's lead over its foil.
      value_LTU: the reference.
      held_LTU: bool, which features are ever held: those that are active.
      place_A3: the candidates.
      kept: leads that are known, by set; see `jaxclt.runs.kept`.
      on_pass: told how many passes were made, whenever some were.
    """

    subject: Subject
    measure_of: Measure
    value_LTU: np.ndarray
    held_LTU: np.ndarray
    place_A3: Places
    kept: Answers
    salt: str = ""
    on_pass: Callable[[int], None] = lambda n: None

    @property
    def how(self) -> How:
        """Attention, norms and gates live; so are MLPs if their writes stay put."""
        coder = self.subject.patchable.coder
        mode = "additive" if coder.shape.span == 1 else "iterative"
        return How(mode=mode, patterns="live", gates="live").of(coder)

    @functools.cached_property
    def leads(self) -> Leads:
        """m of all and of none."""
        none_LTU = np.zeros_like(self.held_LTU)
        all_, none = self._run(np.stack([none_LTU, self.held_LTU]), ["all", "none"])
        return Leads(all=all_, none=none)

    def keep_and_drop(self, set_BA: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """m of sets kept alone [B], and of all but these [B]; nan: one diverged."""
        keys = [
            hashlib.sha256(np.packbits(x).tobytes()).hexdigest()[:24] for x in set_BA
        ]
        held_BLTU = np.concatenate(
            [self._held(set_BA, keep=True), self._held(set_BA, keep=False)]
        )
        names = [f"keep {k}" for k in keys] + [f"drop {k}" for k in keys]
        keep_B, drop_B = self._run(held_BLTU, names).reshape(2, -1)
        return keep_B, drop_B

    def measure(self, set_BA: np.ndarray) -> Shares:
        """Shares of sets, measured."""
        return self.leads.shares(*self.keep_and_drop(set_BA))

    def slopes(self, set_A: np.ndarray) -> Shares:
        """What membership of each candidate adds to both shares, predicted [A]."""
        keep_1, drop_1 = (self._held(set_A[None], keep=x) for x in (True, False))
        model, tables = self.subject.patchable, self.subject.local.tables
        weight_K = jnp.asarray(self.measure_of.weight_K, self.value_LTU.dtype)
        slope_2LTU = held_slopes(
            model,
            tables,
            np.concatenate([keep_1, drop_1]),
            self.value_LTU,
            self.measure_of.ask,
            weight_K,
            how=self.how,
        )
        self.on_pass(2)
        keep_A, drop_A = np.asarray(slope_2LTU)[:, *self.place_A3.T].astype(float)
        # Members are not held where they are kept, and are where they are dropped.
        return Shares(-keep_A / self.leads.unit, -drop_A / self.leads.unit)

    def _held(self, set_BA: np.ndarray, *, keep: bool) -> np.ndarray:
        """What is held to keep sets alone, or to drop them, bool [B, L, T, U]."""
        shape = (len(set_BA), *self.held_LTU.shape)
        held_BLTU = np.zeros(shape, bool)
        if keep:
            held_BLTU |= self.held_LTU[None]
        held_BLTU[:, *self.place_A3.T] = ~set_BA if keep else set_BA
        return held_BLTU

    def _run(self, held_BLTU: np.ndarray, names: list[str]) -> np.ndarray:
        """m of passes, those that are known from before not made again."""
        names = [f"{self.salt} {name}" for name in names]
        size = max(1, CHUNK_BYTES // (8 * self.held_LTU.size))
        size = int(min(TOGETHER, 1 << (size.bit_length() - 1)))
        new = [b for b, name in enumerate(names) if name not in self.kept]
        for start in range(0, len(new), size):
            part = new[start : start + size]
            # A few passes have a program of their own: most steps are long.
            chunk = size if len(part) > size // 4 else max(1, size // 4)
            m_B = held_leads(
                self.subject,
                self.measure_of,
                held_BLTU[part],
                self.value_LTU,
                self.how,
                together=True,
                chunk=chunk,
            )
            for b, m in zip(part, m_B.tolist(), strict=True):
                self.kept.add(names[b], {"key": names[b], "leads": m})
            self.on_pass(len(part))
        found = (self.kept[name]["leads"] for name in names)
        return np.array([np.nan if m is None else m for m in found])


def places_of(subject: Subject, place_A3: np.ndarray) -> tuple[Places, np.ndarray]:
    """Slots of features in the tables of a prompt.

    Args:
      subject: the prompt.
      place_A3: layer, position and feature of each.

    Returns:
      Their places, and which of them the tables hold (bool [A]); the others' slots
      are 0.
    """
    slots = subject.local.feature_LU
    slot_A = np.zeros(len(place_A3), int)
    there_A = np.zeros(len(place_A3), bool)
    for layer in np.unique(place_A3[:, 0]).tolist():
        own = np.asarray(slots[layer])
        here_A = np.flatnonzero(place_A3[:, 0] == layer)
        at = np.searchsorted(own, place_A3[here_A, 2]).clip(max=len(own) - 1)
        there_A[here_A] = own[at] == place_A3[here_A, 2]
        slot_A[here_A] = np.where(there_A[here_A], at, 0)
    return np.stack([place_A3[:, 0], place_A3[:, 1], slot_A], 1), there_A
