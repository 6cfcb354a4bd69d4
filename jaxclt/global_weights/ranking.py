"""ERA and TWERA: how much a virtual weight is used, and the strongest links by each.

    ERA[t, s]   = E[a_s 1(a_t)] V[t, s]            expected residual attribution
    TWERA[t, s] = E[a_s a_t] / E[a_t] V[t, s]      target-weighted

Circuit Tracing (2025), section 4; expectations over tokens, source and target at the
same one. With ``_norm`` every term holds the reciprocal norm denominator at the target,
where the encoder reads after the norm: then n ERA is exactly the sum of the
residual-direct edges of the tokens' attribution graphs (maths 17.8). Where the
encoder reads the stream itself both are the same.

TWERA is blind to inhibition: a source that keeps its target from firing is never active
with it. `jaxclt.global_weights.inhibition` looks for those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from scipy.sparse import csr_array

from jaxclt.clt.subset import Subset
from jaxclt.errors import InputError, check_choice
from jaxclt.global_weights.statistics import Coactivation, Matrix

__all__ = [
    "KINDS",
    "GlobalWeights",
    "Kind",
    "Links",
    "TokenLinks",
    "interference",
    "largest",
    "largest_pairs",
]

Kind = Literal["virtual", "era", "twera", "era_norm", "twera_norm", "coactivation"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Links(NamedTuple):
    """Pairs of features with every number there is, strongest first.

    `coactivation_P` is the share of tokens on which both fire. The ``_norm`` forms are
    those of `GlobalWeights`; equal to the plain ones where encoders read the stream.
    """

    source_layer_P: np.ndarray  # int32
    source_feature_P: np.ndarray
    target_layer_P: np.ndarray
    target_feature_P: np.ndarray
    virtual_P: np.ndarray
    era_P: np.ndarray
    twera_P: np.ndarray
    era_norm_P: np.ndarray
    twera_norm_P: np.ndarray
    coactivation_P: np.ndarray

    def __len__(self) -> int:
        return len(self.source_layer_P)

    def rows(self) -> list[dict[str, Any]]:
        """One dict a link, for JSON and tables."""
        names = [name.removesuffix("_P") for name in self._fields]
        columns = [column.tolist() for column in tuple(self)]
        return [
            dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)
        ]


class TokenLinks(NamedTuple):
    """Tracked tokens of one feature, strongest first."""

    token_P: np.ndarray
    virtual_P: np.ndarray
    era_P: np.ndarray
    twera_P: np.ndarray
    coactivation_P: np.ndarray  # share of tokens; for outputs E[p]

    def strongest(self, kind: str, k: int) -> TokenLinks:
        """The k largest by size of one of the numbers."""
        kind = kind.removesuffix("_norm")
        check_choice("kind", kind, ("virtual", "era", "twera", "coactivation"))
        order = largest(getattr(self, f"{kind}_P"), k)
        return TokenLinks(*(column[order] for column in self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlobalWeights:
    """Virtual weights of a subset with the statistics that say how they are used.

    Attributes:
      statistics: co-activation sums.
      virtual: one matrix per target layer, [targets, sources of the layers below];
        sparse statistics have sparse ones, at the pairs that fire together.
      kind: what links are ranked by unless a call says otherwise.
      input_virtual_UY: embedding weights of the tracked input tokens, or None.
      output_virtual_YU: logit weights of the tracked output tokens, or None.
    """

    statistics: Coactivation
    virtual: tuple[Matrix, ...]
    kind: Kind = "twera"
    input_virtual_UY: np.ndarray | None = None
    output_virtual_YU: np.ndarray | None = None

    @property
    def subset(self) -> Subset:
        """The features."""
        return self.statistics.subset

    def _use(self, kind: Kind, layer: int) -> tuple[Matrix | None, np.ndarray]:
        """How text uses one target layer's weights: sums, and a factor of each row.

        V is multiplied by their product to give `kind`; for ``coactivation`` that is
        the value itself. Without sums, for ``virtual``, V stays as it is.
        """
        check_choice("kind", kind, KINDS)
        sums, n = self.statistics.sums, max(self.statistics.n_tokens, 1)
        here = self.subset.of_layer(layer)
        mean_R = np.full(here.stop - here.start, 1 / n)
        if kind == "virtual":
            return None, mean_R
        if kind == "coactivation":
            return sums["both"][layer], mean_R
        if not self.statistics.scaled:
            kind = {"era_norm": "era", "twera_norm": "twera"}.get(kind, kind)  # pyright: ignore
        if kind.startswith("era"):
            return sums[kind.replace("era", "ind")][layer], mean_R
        total_R = sums["sum_U"][here]
        share_R = np.divide(1, total_R, out=np.zeros_like(total_R), where=total_R != 0)
        return sums[kind.replace("twera", "act")][layer], share_R

    def tile(self, kind: Kind, layer: int, row: slice = slice(None)) -> Matrix:
        """Weights of one kind into a layer's features, [targets, sources below]."""
        V, (sums, factor_R) = self.virtual[layer][row], self._use(kind, layer)
        if sums is None:
            return V
        used, factor_R = sums[row], factor_R[row]
        if isinstance(used, csr_array):
            used = used.copy()
            used.data *= np.repeat(factor_R, np.diff(used.indptr))
            return used if kind == "coactivation" else csr_array(used.multiply(V))
        used = used * factor_R[:, None]
        return used if kind == "coactivation" else used * V

    def inputs(
        self, layer: int, feature: int, k: int = 10, *, by: Kind | None = None
    ) -> Links:
        """The strongest sources of a feature, by size.

        Args:
          layer: of the target.
          feature: its index.
          k: how many at most; links of weight 0 are none.
          by: what to rank by, None for `kind`.

        Raises:
          InputError: if the feature is not in the subset, or for an unknown `by`.
        """
        slot = self.subset.slot(layer, feature)
        row = slot - self.subset.of_layer(layer).start
        value_N = _dense(self.tile(by or self.kind, layer, slice(row, row + 1)))[0]
        source = largest(value_N, k)
        return self.links(np.full_like(source, slot), source)

    def outputs(
        self, layer: int, feature: int, k: int = 10, *, by: Kind | None = None
    ) -> Links:
        """The strongest targets of a feature; arguments as for `inputs`."""
        slot = self.subset.slot(layer, feature)
        value_U = np.zeros(len(self.subset))
        for above in range(layer + 1, self.subset.n_layers):
            here = self.subset.of_layer(above)
            if here.stop > here.start:
                row = np.arange(here.stop - here.start)
                column = np.full_like(row, slot)
                value_U[here] = self._entries(by or self.kind, above, row, column)
        target = largest(value_U, k)
        return self.links(target, np.full_like(target, slot))

    def links(self, target_P: np.ndarray, source_P: np.ndarray) -> Links:
        """All numbers of given pairs of slots."""
        subset, P = self.subset, len(target_P)
        value = {kind: np.zeros(P) for kind in KINDS}
        layer_P = subset.layer_U[target_P]
        for layer in np.unique(layer_P):
            at = np.flatnonzero(layer_P == layer)
            row = target_P[at] - subset.of_layer(int(layer)).start
            for kind in KINDS:
                value[kind][at] = self._entries(kind, int(layer), row, source_P[at])
        return Links(
            source_layer_P=subset.layer_U[source_P],
            source_feature_P=subset.feature_U[source_P],
            target_layer_P=layer_P,
            target_feature_P=subset.feature_U[target_P],
            **{f"{kind}_P": value[kind] for kind in KINDS},
        )

    def _entries(
        self, kind: Kind, layer: int, row: np.ndarray, column: np.ndarray
    ) -> np.ndarray:
        """Some entries of `tile`, float64."""
        sums, factor_R = self._use(kind, layer)
        if sums is None:
            return _at(self.virtual[layer], row, column)
        used = _at(sums, row, column) * factor_R[row]
        if kind == "coactivation":
            return used
        return used * _at(self.virtual[layer], row, column)

    def strongest(
        self, k: int, kinds: Sequence[Kind] = ("virtual", "era", "twera")
    ) -> Links:
        """The k strongest inputs and outputs of every feature by any of some kinds.

        Ordered by size of `kind`.
        """
        U = len(self.subset)
        pairs = [
            pair
            for kind in kinds
            for pair in _strongest_pairs(
                [self.tile(kind, layer) for layer in range(self.subset.n_layers)],
                self.subset,
                k,
            )
        ]
        code = np.unique(np.concatenate([t * np.int64(U) + s for t, s in pairs]))
        found = self.links(code // U, code % U)
        size_P = np.abs(getattr(found, f"{self.kind}_P"))
        order = np.argsort(-size_P, kind="stable")
        return Links(*(column[order] for column in found))

    def token_inputs(
        self, layer: int, feature: int, k: int = 10, *, by: Kind | None = None
    ) -> TokenLinks:
        """The tracked input tokens whose embeddings feed a feature most.

        ERA is P(token = v, a_t fires) V, TWERA E[a_t 1(token = v)] / E[a_t] V.

        Raises:
          InputError: if no input tokens are tracked, or there is no such feature.
        """
        V_UY, stats = self.input_virtual_UY, self.statistics
        if V_UY is None:
            raise InputError("no input tokens were tracked: give `input_tokens`")
        slot, kind = self.subset.slot(layer, feature), by or self.kind
        norm = "_norm" if stats.scaled and kind.endswith("_norm") else ""

        def sums(name: str) -> np.ndarray:
            return stats.sums[f"input_{name}_UY"][slot]

        act_Y, total = sums(f"act{norm}"), stats.sums["sum_U"][slot]
        n = max(stats.n_tokens, 1)
        return _token_links(
            stats.input_Y,
            V_UY[slot],
            sums(f"ind{norm}") / n,
            act_Y / total if total else np.zeros_like(act_Y),
            sums("ind") / n,
        ).strongest(kind, k)

    def token_outputs(
        self, layer: int, feature: int, k: int = 10, *, by: Kind | None = None
    ) -> TokenLinks:
        """The tracked output tokens that a feature raises or lowers most.

        A logit's probability p_v stands for the target's activation: ERA is
        E[a_s p_v] V, TWERA sum a_s p_v / sum p_v V. With ``_norm`` the reciprocal
        denominator of the final norm is in each term.

        Raises:
          InputError: if no output tokens are tracked, or there is no such feature.
        """
        V_YU, stats = self.output_virtual_YU, self.statistics
        if V_YU is None:
            raise InputError("no output tokens were tracked: give `output_tokens`")
        slot, kind = self.subset.slot(layer, feature), by or self.kind
        norm, n = "_norm" if kind.endswith("_norm") else "", max(stats.n_tokens, 1)
        act_Y = stats.sums[f"output_act{norm}_YU"][:, slot]
        sum_Y = stats.sums["output_sum_Y"]
        return _token_links(
            stats.output_Y,
            V_YU[:, slot],
            act_Y / n,
            np.divide(act_Y, sum_Y, out=np.zeros_like(act_Y), where=sum_Y != 0),
            sum_Y / n,
        ).strongest(kind, k)


def _token_links(
    token_Y: np.ndarray,
    virtual_Y: np.ndarray,
    era_Y: np.ndarray,
    twera_Y: np.ndarray,
    share_Y: np.ndarray,
) -> TokenLinks:
    """Links of virtual weights, and of what text multiplies them by."""
    return TokenLinks(
        token_Y, virtual_Y, era_Y * virtual_Y, twera_Y * virtual_Y, share_Y
    )


def _dense(x: Matrix) -> np.ndarray:
    return x.toarray() if isinstance(x, csr_array) else np.asarray(x)


def _at(x: Matrix, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Entries as float64."""
    if not len(row):  # which sparse matrices have no answer to
        return np.zeros(0)
    return np.asarray(x[row, column], np.float64).ravel()


def largest(value_N: np.ndarray, k: int) -> np.ndarray:
    """Where the k largest sizes of a vector are, descending; zeros are left out.

    Raises:
      InputError: if `k` is below 1.
    """
    if k < 1:
        raise InputError(f"k={k}: ask for at least one link")
    size_N = np.abs(value_N)
    if k < len(size_N):
        some = np.argpartition(-size_N, k)[:k]
    else:
        some = np.arange(len(size_N))
    order = some[np.lexsort((some, -size_N[some]))]
    return order[size_N[order] > 0]


def _strongest_pairs(
    tiles: list[Matrix], subset: Subset, k: int
) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """(target, source) slots of each row's and each column's k largest entries."""
    if isinstance(tiles[-1], csr_array):
        target, source, size = _coordinates(tiles, subset)
        for key in (target, source):
            order = np.lexsort((-size, key))
            start = np.searchsorted(key[order], key[order])
            kept = order[np.arange(len(order)) - start < k]
            yield target[kept], source[kept]
        return
    starts = subset.starts
    size = [np.abs(np.asarray(tile)) for tile in tiles]
    for layer, tile_RN in enumerate(size):
        row, column = _top_of_rows(tile_RN, k)
        yield row + starts[layer], column
    for layer in range(subset.n_layers - 1):
        below = slice(starts[layer], starts[layer + 1])
        above = [tile[:, below] for tile in size[layer + 1 :]]
        column, row = _top_of_rows(np.concatenate(above).T, k)
        yield row + starts[layer + 1], column + starts[layer]


def _top_of_rows(size_RN: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    R, N = size_RN.shape
    if not R or not N:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    k = min(k, N)
    column_RK = np.argpartition(-size_RN, k - 1, axis=1)[:, :k]
    row_RK = np.broadcast_to(np.arange(R)[:, None], column_RK.shape)
    kept = np.take_along_axis(size_RN, column_RK, 1) > 0
    return row_RK[kept], column_RK[kept]


def _coordinates(
    tiles: list[Matrix], subset: Subset
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slots and sizes of all entries of sparse tiles."""
    target, source, size = [], [], []
    for layer, tile in enumerate(tiles):
        assert isinstance(tile, csr_array)
        found = tile.tocoo()
        target.append(found.row.astype(np.int64) + subset.starts[layer])
        source.append(found.col.astype(np.int64))
        size.append(np.abs(found.data))
    parts = [np.concatenate(x) for x in (target, source, size)]
    kept = parts[2] > 0
    return parts[0][kept], parts[1][kept], parts[2][kept]


# -- interference ----------------------------------------------------------------------


def largest_pairs(
    blocks: Iterable[tuple[int, int, np.ndarray]], n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The n largest sizes of a matrix that comes in blocks: (size, row, column).

    Args:
      blocks: (first row, first column, values) of each.
      n: how many; fewer if there are fewer that are not zero.
    """
    size, row, column = np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64)
    least = 0.0
    for first_row, first_column, value_RN in blocks:
        new_RN = np.abs(value_RN)
        at = np.nonzero(new_RN > least)
        size = np.concatenate([size, new_RN[at]])
        row = np.concatenate([row, at[0] + first_row])
        column = np.concatenate([column, at[1] + first_column])
        if len(size) > n:
            kept = np.argpartition(-size, n - 1)[:n]
            size, row, column = size[kept], row[kept], column[kept]
            least = float(size.min())
    order = np.argsort(-size, kind="stable")
    return size[order], row[order], column[order]


def interference(
    statistics: Coactivation,
    blocks: Iterable[tuple[int, int, np.ndarray]],
    shares: Sequence[float] = (1e-4, 1e-3, 1e-2),
) -> dict[str, Any]:
    """How many of the largest virtual weights join features that never fire together.

    Such weights are interference: they change nothing on any token seen. Ranking by ERA
    or TWERA, which are zero for them, leaves none. Circuit Tracing (2025), section 4
    and appendix O.

    Args:
      statistics: co-activation sums.
      blocks: virtual weights as (first target slot, first source slot, values).
      shares: of all pairs of layers in order, the largest of which are looked at.

    Returns:
      ``pairs`` in all, the share ``never`` of them that never fires together, the same
      ``never_alive`` among features that fire at all; ``largest``: for each share the
      number of pairs, ``smallest`` size among them, ``never`` and ``never_alive``.
    """
    subset, both = statistics.subset, statistics.sums["both"]
    starts = subset.starts
    alive_U = np.asarray(statistics.sums["count_U"]) > 0
    alive_L = [alive_U[subset.of_layer(layer)].sum() for layer in range(len(both))]
    total = sum((starts[i + 1] - starts[i]) * starts[i] for i in range(len(both)))
    total_alive = sum(
        int(n) * int(sum(alive_L[:layer])) for layer, n in enumerate(alive_L)
    )
    fired = sum(
        tile.count_nonzero() if isinstance(tile, csr_array) else np.count_nonzero(tile)
        for tile in both
    )
    most = max(1, round(max(shares) * total))
    size, target, source = largest_pairs(blocks, most)
    together = np.zeros(len(size), bool)
    layer_P = subset.layer_U[target]
    for layer in np.unique(layer_P):
        at = np.flatnonzero(layer_P == layer)
        together[at] = _at(both[layer], target[at] - starts[layer], source[at]) > 0
    alive = alive_U[target] & alive_U[source]

    def row(share: float) -> dict[str, Any]:
        n = min(max(1, round(share * total)), len(size))
        never, live = ~together[:n], alive[:n]
        return {
            "share": share,
            "pairs": n,
            "smallest": float(size[n - 1]) if n else 0.0,
            "never": float(never.mean()) if n else 0.0,
            "never_alive": float(never[live].mean()) if live.any() else 0.0,
        }

    return {
        "tokens": statistics.n_tokens,
        "pairs": total,
        "never": 1 - fired / total if total else 0.0,
        "never_alive": 1 - fired / total_alive if total_alive else 0.0,
        "largest": [row(share) for share in shares],
    }
