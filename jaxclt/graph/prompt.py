"""What the edges of one prompt are computed from, and what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxclt.clt.active import Active
from jaxclt.clt.coder import Dictionary
from jaxclt.errors import InputError
from jaxclt.graph.bank import RowTargets
from jaxclt.graph.blocks import submatrix
from jaxclt.graph.config import AttributeConfig
from jaxclt.graph.layout import Layout
from jaxclt.graph.target_reads import target_rows, written_edges
from jaxclt.graph.targets import place_targets
from jaxclt.lm.config import LMConfig
from jaxclt.replacement.errors import error_nodes
from jaxclt.types import LMParams, Recording, Targets

__all__ = [
    "Chooser",
    "Computed",
    "Prompt",
    "Recorded",
    "add_written",
    "check_exact",
    "counted",
    "cut_columns",
    "row_totals",
]


# Slots of the features to look at, ascending, from the active ones and the influence
# that arrives at them from the targets directly.
Chooser = Callable[[Active, np.ndarray], np.ndarray]


def check_exact(dtype: np.dtype) -> None:
    """Raise InputError if a model of these weights is too coarse for edges.

    Rows of bfloat16 are wrong by a hundredth: what is read of a recording has three
    digits.
    """
    if dtype.itemsize < 4:
        raise InputError(
            f"attribution needs float32, the model is {dtype}: load it with "
            "--dtype float32, whatever its files hold"
        )


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A recorded prompt with the features active on it: the sources of its edges.

    Raises:
      InputError: if the model is in half precision, or an error node is not finite (NaN
        weights).
    """

    params: LMParams
    recording: Recording  # the clean pass; may be padded
    active: Active  # those on the prompt itself are kept
    _: dataclasses.KW_ONLY
    cfg: LMConfig
    n_tokens: int = 0  # without the padding; 0: there is none
    # Errors of all features that were active; made if not given.
    error_LTD: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        check_exact(self.params.embed_VD.dtype)
        n_tokens = self.n_tokens or len(self.recording.token_T)
        self._set(n_tokens=n_tokens, active=self._nodes(n_tokens))
        if self.error_LTD.size == 0:
            self._set(error_LTD=error_nodes(self.active, self.recording))
        if not np.isfinite(self.error_LTD).all():
            raise InputError(
                "the dictionary's reconstruction is not finite on this prompt: check "
                "its weights for NaN or overflow"
            )

    def _set(self, **fields: Any) -> None:
        vars(self).update(fields)

    def _nodes(self, n_tokens: int) -> Active:
        """The features that may be nodes."""
        on_prompt_A = self.active.pos_A < n_tokens
        return self.active if on_prompt_A.all() else self.active.where(on_prompt_A)


@dataclasses.dataclass(frozen=True)
class Prompt(Recorded):
    """A recorded prompt and what is asked of it.

    Raises:
      InputError: as `Recorded`, or if a target does not fit the model or the prompt.
    """

    targets: Targets  # what to explain, see `jaxclt.graph.targets`
    _: dataclasses.KW_ONLY
    config: AttributeConfig = dataclasses.field(default_factory=AttributeConfig)
    dictionary: Dictionary | None = None  # of the features: response needs it
    shortlist: Chooser | None = None  # of the features that may be nodes; None: all
    # Asked before each chunk of rows. Once true, the graph is of the features that were
    # attributed until then, everything else counted as unexplored.
    stop: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        super().__post_init__()
        placed = place_targets(self.targets, cfg=self.cfg, n_tokens=self.n_tokens)
        self._set(targets=placed)
        if self.config.response and self.dictionary is None:
            raise InputError(
                "edges by response need the dictionary of the features: give it to the "
                "prompt, or leave response off"
            )

    def _nodes(self, n_tokens: int) -> Active:
        active = super()._nodes(n_tokens)
        if self.config.convention == "paper":
            return active
        # circuit-tracer gives the first position (BOS) no features; what they wrote
        # stays, as part of the error there, which is no node either.
        return active.where(active.pos_A > 0)

    @property
    def n_selected(self) -> int:
        """Most features that get a row."""
        A, cap = len(self.active.layer_A), self.config.max_features
        return A if cap is None else min(A, cap)

    @property
    def n_targets(self) -> int:
        """K."""
        return len(self.targets.token_K)

    def layout(self, n_features: int) -> Layout:
        """Of a graph of this prompt with so many features."""
        return Layout(
            n_features=n_features,
            n_layers=self.cfg.n_layers,
            n_tokens=self.n_tokens,
            n_targets=self.n_targets,
        )

    @property
    def is_node_LT(self) -> np.ndarray:  # noqa: N802  an axis, as in the fields
        """Which errors are nodes: in circuit-tracer, none of the first position."""
        is_node_LT = np.ones((self.cfg.n_layers, self.n_tokens), bool)
        is_node_LT[:, 0] = self.config.convention != "circuit-tracer"
        return is_node_LT

    def ignored_columns(self, n_features: int) -> np.ndarray:
        """Columns of errors that are no nodes, in a graph with so many features."""
        layer, pos = np.nonzero(~self.is_node_LT)
        return self.layout(n_features).at("error", layer, pos)

    def target_weights(self) -> np.ndarray:
        """What influence starts with at each target; sums to 1."""
        weight_K = np.asarray(self.targets.weight_K, np.float64)
        return weight_K / weight_K.sum()

    def target_rows(self) -> RowTargets:
        """Directions of the targets."""
        return target_rows(self.params, self.recording, self.active, self.targets)

    def written(self) -> Iterator[tuple[int, np.ndarray]]:
        """Targets that read an MLP's output, with the edges to what writes it."""
        for k in np.flatnonzero(np.asarray(self.targets.write_KD).any(1)).tolist():
            edge_N = written_edges(
                self.active, self.error_LTD, self.targets, k, n_tokens=self.n_tokens
            )
            yield k, edge_N

    def feature_rows(self, feature: np.ndarray) -> RowTargets:
        """Directions of some features."""
        a = self.active
        return RowTargets(
            layer_R=a.layer_A[feature],
            pos_R=a.pos_A[feature],
            read_RD=a.reads(feature),
        )

    def all_rows(self) -> RowTargets:
        """Directions of all features, then of the targets."""
        features = self.feature_rows(np.arange(len(self.active.layer_A)))
        return features.followed_by(self.target_rows())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computed:
    """Rows of selected features, then of the targets."""

    selected: np.ndarray  # active features, ascending
    edge_RN: np.ndarray  # columns: selected features, errors, embeddings
    rest_R: np.ndarray  # sources without a column, summed
    rest_abs_R: np.ndarray
    work: dict[str, Any]


def counted(report: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """A progress callback for parts, from one for the whole."""
    done = 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        report(done, total)

    return count


def add_written(
    p: Prompt,
    pool_A: np.ndarray,
    edge_KN: np.ndarray,
    rest_K: np.ndarray,
    rest_abs_K: np.ndarray,
) -> None:
    """Add what targets read of an MLP's output themselves, in place.

    Args:
      p: the prompt.
      pool_A: features with columns; what the others write goes to the rests.
      edge_KN: rows of the targets.
      rest_K: their sums of what is not among the columns.
      rest_abs_K: the same without sign.
    """
    A, width = len(p.active.layer_A), len(pool_A)
    for k, edge_N in p.written():
        edge_KN[k, :width] += edge_N[pool_A]
        edge_KN[k, width:] += edge_N[A:]
        outside = np.delete(edge_N[:A], pool_A)
        rest_K[k] += outside.sum()
        rest_abs_K[k] += np.abs(outside).sum()


def row_totals(edge_RN: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """Sum of the absolute edges of every row, without some columns."""
    # In blocks: the matrix may be large, and so would its absolute value.
    blocks = np.array_split(edge_RN, max(1, len(edge_RN) // 256))
    total_R = np.concatenate([np.abs(block).sum(1) for block in blocks])
    return total_R - np.abs(edge_RN[:, ignored]).sum(1)


def cut_columns(
    edge_RN: np.ndarray,
    n_features: int,
    selected: np.ndarray,
    ignored: np.ndarray,
    rest_R: np.ndarray,
    rest_abs_R: np.ndarray,
) -> np.ndarray:
    """Columns of the selected features; those left out are added to the rests.

    Ignored errors stay columns of the layout, empty, so that offsets are plain.
    """
    out = np.ones(n_features, bool)
    out[selected] = False
    for left_out in (np.flatnonzero(out), ignored):
        dropped = edge_RN[:, left_out]
        rest_R += dropped.sum(1)
        rest_abs_R += np.abs(dropped).sum(1)
    edge_RN[:, ignored] = 0
    if len(selected) == n_features:
        return edge_RN
    other = np.arange(n_features, edge_RN.shape[1])
    columns = np.concatenate([selected, other])
    return submatrix(edge_RN, np.arange(len(edge_RN)), columns)
