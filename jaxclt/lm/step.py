"""One step through the frozen stream: how a layer joins what it is made of.

Whatever moves a vector through frozen layers takes this step, up or, transposed, down:
attribution from either side, hops, heads, the residual stream alone. Two things about a
layer are decided here and nowhere else: whether the MLP reads what attention has added
(`LMConfig.parallel`), and what a dictionary's linear path adds to what it writes.

What attention adds is the caller's: any linear map of the stream. With patterns and
norm denominators held that is `jaxclt.graph.stream.attend`; the derivative of live
attention at the clean stream would be another one, and the step would not notice.
Nothing here depends on how the axes before the last are used, nor on JAX: host arrays
take the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from jaxclt.lm.config import LMConfig

__all__ = ["Skip", "down", "up"]


class Skip(NamedTuple):
    """A dictionary's linear path of one layer, ``(mid * scale) @ map``.

    Of all layers if the leaves have a leading L. Positions are the first axis of what
    it is applied to.
    """

    scale_T: Any
    map_DD: Any

    def at(self, layer: Any, pos: Any) -> Skip:
        """That of one layer at some positions, cut out of all."""
        return Skip(self.scale_T[layer, pos], self.map_DD[layer])

    def write(self, mid_TxD: Any) -> Any:
        """What it writes where the stream is `mid`."""
        return (mid_TxD * self._scale(mid_TxD)) @ self.map_DD

    def read(self, write_TxD: Any) -> Any:
        """The transpose: what readers of its output read of the stream."""
        return (write_TxD @ self.map_DD.T) * self._scale(write_TxD)

    def _scale(self, like_TxD: Any) -> Any:
        return self.scale_T.reshape(-1, *(1,) * (like_TxD.ndim - 1))


def up(
    x_TxD: Array, moved_TxD: Array, skip: Skip | None, *, cfg: LMConfig
) -> tuple[Array, Array]:
    """Streams past one layer: where its MLP reads, and leaving it.

    Args:
      x_TxD: streams entering the layer.
      moved_TxD: what attention adds to them.
      skip: the layer's linear path.
      cfg: model shape.
    """
    # Side by side with attention, an MLP does not see what that adds.
    after_TxD = x_TxD + moved_TxD
    mid_TxD = x_TxD if cfg.parallel else after_TxD
    return mid_TxD, after_TxD if skip is None else after_TxD + skip.write(mid_TxD)


def down(
    g_TxD: Array,
    skip: Skip | None,
    add_reads: Callable[[Array], Array],
    *,
    cfg: LMConfig,
) -> tuple[Array, Array]:
    """The transpose of `up`: cotangents of the stream and of what attention adds.

    The former lacks what is pulled back through attention.

    Args:
      g_TxD: cotangents of the stream leaving the layer.
      skip: the layer's linear path.
      add_reads: adds what is read where the MLP reads.
      cfg: model shape.
    """
    # The skip reads where the MLP reads, so that its share joins the reads there.
    x_TxD = add_reads(g_TxD if skip is None else g_TxD + skip.read(g_TxD))
    return x_TxD, g_TxD if cfg.parallel else x_TxD
