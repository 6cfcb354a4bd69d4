"""One ablation away: inactive features that an active one holds below threshold.

Attribution graphs show what is active; what was suppressed is missing (Circuit Tracing
2025, section 7.3). Edges are exact for any change, so which features are suppressed by
a single source is exact too: with pre-activation h_u and threshold theta_u, removing
source s releases u if and only if

    h_u <= theta_u < h_u - A[u, s]

This is the direct effect: all other activations as they were, attention and norms
frozen. Other features between s and u respond as well once they are run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxclt.clt.active import encoded_layers
from jaxclt.clt.coder import Dictionary, picked, stream_rows
from jaxclt.errors import InputError
from jaxclt.graph.bank import RowTargets, writers
from jaxclt.graph.config import AttributeConfig
from jaxclt.graph.layout import Layout
from jaxclt.graph.packing import pack
from jaxclt.graph.plan import make_plan, mean_flops
from jaxclt.graph.prompt import Recorded
from jaxclt.graph.rows import edge_rows, make_puller
from jaxclt.lm.config import LMConfig
from jaxclt.precision import at_precision
from jaxclt.types import LMParams

__all__ = [
    "Candidates",
    "Inhibition",
    "Released",
    "check_thresholds",
    "find_inhibition",
    "near_threshold",
    "released_by",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidates:
    """Inactive features close to their thresholds; host arrays.

    `read_UD` is pulled back to the residual stream, as in `jaxclt.clt.active.Active`.
    """

    layer_U: np.ndarray  # int32
    pos_U: np.ndarray  # int32
    feature_U: np.ndarray  # int32
    preact_U: np.ndarray
    theta_U: np.ndarray  # 0 for a dictionary without thresholds
    read_UD: np.ndarray

    def take(self, index: np.ndarray) -> Candidates:
        """Some of the candidates, in the given order."""
        return Candidates(**{name: x[index] for name, x in vars(self).items()})

    def followed_by(self, more: Candidates) -> Candidates:
        """These candidates, then others."""
        theirs = vars(more)
        joined = {k: np.concatenate([x, theirs[k]]) for k, x in vars(self).items()}
        return Candidates(**joined)

    @property
    def rows(self) -> RowTargets:
        """The candidates as directions to explain."""
        return RowTargets(layer_R=self.layer_U, pos_R=self.pos_U, read_RD=self.read_UD)


class Released(NamedTuple):
    """Pairs of a suppressed feature and the source that suppresses it."""

    u_P: np.ndarray  # row, or candidate
    s_P: np.ndarray  # column: for features, the index among the active ones
    gap_P: np.ndarray  # pre-activation above the threshold once s is gone, > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inhibition:
    """What `find_inhibition` found."""

    candidates: Candidates
    released: Released


def near_threshold(
    p: Recorded, dictionary: Dictionary, *, margin: float, limit: int | None = None
) -> Candidates:
    """Inactive features with a pre-activation at most `margin` below the threshold.

    Ordered by layer, then position, then feature index.

    Args:
      p: a prompt.
      dictionary: one with thresholds.
      margin: in units of the pre-activation; `math.inf` for all inactive features.
      limit: most candidates, the closest ones; None for no limit.

    Raises:
      InputError: if the margin is negative, or the dictionary has no thresholds because
        its features compete or have gates.
    """
    if not margin >= 0:
        raise InputError(f"margin {margin}: give a number that is not negative")
    check_thresholds(dictionary, p.params, p.cfg)
    coder, found = dictionary.coder(p.cfg), None
    encoded = encoded_layers(dictionary, p.params, p.recording, p.cfg)
    for layer, here in enumerate(encoded):
        theta_F = np.asarray(coder.thresholds(here.enc))
        below_TF = theta_F[None, :] - here.pre_TF[: p.n_tokens]
        pos, feature = np.nonzero((below_TF >= 0) & (below_TF <= margin))
        kept = _closest(below_TF[pos, feature], limit)
        pos, feature = pos[kept], feature[kept]
        unique, row = np.unique(feature, return_inverse=True)
        enc = picked(dictionary, p.params, layer, unique, here.enc)
        read_UD, _ = stream_rows(coder, p.params, layer, enc)
        near = Candidates(
            layer_U=np.full(len(pos), layer, np.int32),
            pos_U=pos.astype(np.int32),
            feature_U=feature.astype(np.int32),
            preact_U=here.pre_TF[pos, feature],
            theta_U=theta_F[feature],
            read_UD=read_UD[row] * here.scale_T[pos][:, None],
        )
        # Cut after every layer, so that few read vectors are held.
        found = near if found is None else found.followed_by(near)
        found = found.take(_closest(found.theta_U - found.preact_U, limit))
    assert found is not None
    return found


def check_thresholds(dictionary: Dictionary, params: LMParams, cfg: LMConfig) -> None:
    """Raise InputError for a dictionary whose features have no thresholds."""
    coder = dictionary.coder(cfg)
    if coder.competes:
        raise InputError(
            "a topk dictionary has no thresholds: what is released depends on all of "
            "its features, use a relu or jumprelu dictionary"
        )
    if coder.thresholds(dictionary.encoders(params, 0, np.array([0]))) is None:
        raise InputError(
            f"{dictionary.name} has no thresholds: inhibition takes a transcoder"
        )


def _closest(below_U: np.ndarray, limit: int | None) -> np.ndarray:
    """Indices of the smallest entries, in their old order."""
    if limit is None or len(below_U) <= limit:
        return np.arange(len(below_U))
    return np.sort(np.argsort(below_U, kind="stable")[:limit])


def released_by(
    edge_UN: np.ndarray, preact_U: np.ndarray, theta_U: np.ndarray
) -> Released:
    """Pairs (u, s) where removing s alone lifts u over its threshold.

    Sorted by how far it is lifted over it, furthest first; influence plays no part.

    Args:
      edge_UN: direct effects of sources on candidates.
      preact_U: pre-activations.
      theta_U: thresholds; rows at or below them count, others release nothing.
    """
    gap_UN = (preact_U[:, None] - edge_UN) - theta_U[:, None]
    u, s = np.nonzero((gap_UN > 0) & (preact_U <= theta_U)[:, None])
    return _sorted(Released(u, s, gap_UN[u, s]))


def _sorted(released: Released) -> Released:
    order = np.argsort(-released.gap_P, kind="stable")
    return Released(*(column[order] for column in released))


def find_inhibition(
    p: Recorded,
    dictionary: Dictionary,
    *,
    margin: float,
    limit: int | None = 4096,
    config: AttributeConfig | None = None,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> Inhibition:
    """Every pair of a near-threshold feature and an active feature that suppresses it.

    None is missed among the candidates: what is not listed is not released by removing
    any single active feature.

    Args:
      p: a prompt; its active features are the sources.
      dictionary: theirs, one with thresholds.
      margin: how far below the threshold to look, see `near_threshold`.
      limit: most candidates, the closest ones; None for no limit.
      config: precision, and most rows that are pulled back together (`chunk_size`) and
        whose edges are held (`rows_per_update`, 1024 unless given).
      on_rows: progress, called with (rows done, rows planned).
    """
    config = config or AttributeConfig()
    with at_precision(config.precision):
        found = near_threshold(p, dictionary, margin=margin, limit=limit)
        T, A, U = len(p.recording.token_T), len(p.active.layer_A), len(found.layer_U)
        layout = Layout(n_features=A, n_layers=p.cfg.n_layers, n_tokens=p.n_tokens)
        bank = pack(writers(p.active), T)
        puller = make_puller(
            p,
            plan=make_plan(
                U,
                n_positions=T,
                flops_per_position=mean_flops(p.cfg, bank, T),
                chunk_size=config.chunk_size,
            ),
            mesh=Mesh(np.array(jax.devices()[:1]), ("rows",)),
            bank=bank,
        )
        parts = [Released(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
        # By position, so that the rows of a part share few bands.
        order = np.argsort(found.pos_U, kind="stable")
        at_once = config.rows_per_update or 1024
        for start in range(0, U, at_once):
            index = order[start : start + at_once]
            part = found.take(index)
            edge_UN = np.zeros((len(index), layout.n_columns), p.error_LTD.dtype)
            edge_rows(puller, part.rows, edge_UN)
            pairs = released_by(
                edge_UN[:, layout.nodes["feature"]], part.preact_U, part.theta_U
            )
            parts.append(pairs._replace(u_P=index[pairs.u_P]))
            on_rows(start + len(index), U)
    columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Inhibition(candidates=found, released=_sorted(Released(*columns)))
