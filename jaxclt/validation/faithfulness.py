"""Does the replacement model respond to a perturbation as the model does?

Circuit Tracing (2025), sections 5.3 and G.3. A vector is added to the stream where
the MLP of a layer reads, at one position, in the local replacement model and in the
model; with delta the perturbed minus the clean stream at a later layer,

    cosine = <delta, delta'> / (|delta| |delta'|)
    nmse   = |delta - delta'|^2 / |delta'|^2

primes are the model's, over all positions from the perturbed one on. Attention patterns
are frozen in both, errors are constant, silent features may fire. The model's norms are
live; the replacement model's are frozen (as in the paper) or live. For neurons the
frozen variant also keeps their gates, as graphs do, and the live one computes them:
with all neurons it is the model itself.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxclt.lm.run import Run
from jaxclt.patching.batch import Local
from jaxclt.patching.edits import Edits
from jaxclt.patching.modes import (
    Gates,
    Nudge,
    Patchable,
    Tables,
    hold_of,
    iterative,
    underlying,
)

__all__ = ["Agreement", "Perturbation", "agreement", "compare", "perturb_many"]


@struct.dataclass
class Perturbation:
    """One perturbation: a nudge at `nudge.layer`, or an edit of an earlier feature.

    An upstream perturbation has an edit with an effect and a zero nudge; the others a
    nudge and an edit that changes nothing.
    """

    nudge: Nudge
    edits: Edits
    slot_E: Array
    start: Array  # int32, layer from which the replacement model runs
    pos: Array  # int32, first position that is compared


@struct.dataclass
class Agreement:
    """Per measured layer; nan before the perturbation."""

    cosine_L: Array
    nmse_L: Array
    ratio_L: Array  # |delta| / |delta'|
    finite: Array  # bool, of both responses: a perturbation may diverge


def compare(local_LTD: Array, real_LTD: Array) -> Agreement:
    """Cosine, normalised squared error and size ratio of two responses, by layer.

    ``nmse = 1 + ratio^2 - 2 ratio cosine`` (maths 16.7).
    """
    inner_L = (local_LTD * real_LTD).sum((1, 2))
    local_L, real_L = ((x * x).sum((1, 2)) for x in (local_LTD, real_LTD))
    error_L = jnp.square(local_LTD - real_LTD).sum((1, 2))
    return Agreement(
        cosine_L=inner_L / jnp.sqrt(local_L * real_L),
        nmse_L=error_L / real_L,
        ratio_L=jnp.sqrt(local_L / real_L),
        finite=jnp.isfinite(local_L + real_L).all(),
    )


def agreement(
    model: Patchable,
    tables: Tables,
    perturbation: Perturbation,
    *,
    norms: Literal["frozen", "live"],
    gates: Gates,
    local_L: Array | None = None,
) -> Agreement:
    """How one perturbation spreads in both models.

    Args:
      model: the recording.
      tables: of the replacement model.
      perturbation: what is changed.
      norms: of the replacement model.
      gates: of the replacement model.
      local_L: bool, layers that the replacement model computes for some member of a
        batch.
    """
    rec, nudge, L = model.recording, perturbation.nudge, model.cfg.n_layers
    index_L = jnp.arange(L, dtype=jnp.int32)
    at_L = (index_L == nudge.layer)[:, None, None]
    done = iterative(
        model,
        perturbation.edits,
        perturbation.slot_E,
        tables,
        perturbation.start,
        jnp.asarray(L - 1, jnp.int32),
        hold=hold_of(rec, norm=norms == "frozen"),
        gates=gates,
        live_L=jnp.zeros(L, bool),
        local_L=index_L >= perturbation.start if local_L is None else local_L,
        nudge=nudge,
    )
    zero = jnp.zeros((), rec.mid_LTD.dtype)

    def change(run: Run, nudge: Nudge) -> Array:
        """Of the stream where MLPs read; after attention taps are ahead of a nudge."""
        moved_LTD = run.taps.mid_TD - rec.mid_LTD
        if model.cfg.parallel:
            return moved_LTD
        return moved_LTD + jnp.where(at_L, nudge.delta_TD[None], zero)

    local_LTD = change(done, nudge)
    # The model gets what the replacement model's stream holds at the layer.
    given = Nudge(layer=nudge.layer, delta_TD=local_LTD[nudge.layer])
    real = underlying(model, given, hold=hold_of(rec))
    real_LTD = change(real, given)
    behind_T = jnp.arange(len(rec.token_T), dtype=jnp.int32) >= perturbation.pos
    found = compare(
        jnp.where(behind_T[None, :, None], local_LTD, zero),
        jnp.where(behind_T[None, :, None], real_LTD, zero),
    )
    before_L = index_L < nudge.layer
    cosine_L, nmse_L, ratio_L = (
        jnp.where(before_L, jnp.full((), jnp.nan, x_L.dtype), x_L)
        for x_L in (found.cosine_L, found.nmse_L, found.ratio_L)
    )
    return Agreement(cosine_L, nmse_L, ratio_L, found.finite)


@partial(jax.jit, static_argnames=("norms", "gates"))
def _chunk(
    model: Patchable,
    tables: Tables,
    perturbations: Perturbation,
    *,
    norms: Literal["frozen", "live"],
    gates: Gates,
) -> Agreement:
    local_L = (
        jnp.arange(model.cfg.n_layers, dtype=jnp.int32) >= perturbations.start.min()
    )
    return jax.vmap(
        lambda one: agreement(
            model, tables, one, norms=norms, gates=gates, local_L=local_L
        )
    )(perturbations)


def perturb_many(
    model: Patchable,
    local: Local,
    perturbations: Perturbation,
    *,
    norms: Literal["frozen", "live"],
    gates: Gates,
    chunk: int = 16,
) -> Agreement:
    """Many perturbations, leaves with a leading B; numpy. Chunks are padded up to."""
    B = len(perturbations.start)
    order = np.argsort(np.asarray(perturbations.start), kind="stable")
    parts = []
    for start in range(0, B, chunk):
        index = order[start : start + chunk]
        full = np.concatenate([index, np.repeat(index[-1:], chunk - len(index))])
        part = jax.tree.map(lambda x, i=full: np.asarray(x)[i], perturbations)
        done = _chunk(model, local.tables, part, norms=norms, gates=gates)
        kept = slice(len(index))
        parts.append(jax.tree.map(lambda x, i=kept: np.asarray(x)[i], done))
    back = np.argsort(order)
    return jax.tree.map(lambda *x: np.concatenate(x)[back], *parts)


def stack(perturbations: list[Perturbation]) -> Perturbation:
    """A batch of perturbations."""
    return jax.tree.map(lambda *x: np.stack([np.asarray(y) for y in x]), *perturbations)


def upstream(edits: Edits, layer: int, zero_TD: np.ndarray, slot: int) -> Perturbation:
    """The perturbation that an edit of an earlier feature causes at `layer`."""
    start = int(np.asarray(edits.features.layer_E)[0])
    return Perturbation(
        nudge=Nudge(layer=np.int32(layer), delta_TD=zero_TD),  # pyright: ignore
        edits=edits,
        slot_E=np.array([slot], np.int32),  # pyright: ignore
        start=np.int32(start),  # pyright: ignore
        pos=np.int32(np.asarray(edits.features.pos_E)[0]),  # pyright: ignore
    )


def nudged(
    edits: Edits, layer: int, pos: int, vector_D: np.ndarray, n_tokens: int, slot: int
) -> Perturbation:
    """A vector added to the stream; `edits` only lends its shape."""
    delta_TD = np.zeros((n_tokens, len(vector_D)), vector_D.dtype)
    delta_TD[pos] = vector_D
    layer_E = np.full(np.shape(edits.factor_E), -1, np.int32)
    idle = dataclasses.replace(
        edits, features=dataclasses.replace(edits.features, layer_E=layer_E)
    )
    return Perturbation(
        nudge=Nudge(layer=np.int32(layer), delta_TD=delta_TD),  # pyright: ignore
        edits=idle,
        slot_E=np.array([slot], np.int32),  # pyright: ignore
        start=np.int32(layer),  # pyright: ignore
        pos=np.int32(pos),  # pyright: ignore
    )
