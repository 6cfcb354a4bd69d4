"""Vectors on their way through the frozen stream: pushed up, or pulled down.

Both directions are one loop over layers that takes `jaxclt.lm.step` and adds attention.
What is done with the vectors on the way is the caller's (`visit`): rows dot cotangents
with what sources write, columns dot streams with what targets read, heads keep what
each head has gathered. One program serves all layers.

Left apart, with reasons. The two directions have a loop each: their vectors join and
leave at opposite ends of a step, and a pull starts at the highest layer of its targets,
a push at the lowest of its sources. `Stream` is laid out for one of them, so that every
matmul has its contracted axis first. `jaxclt.lm.block` is the live model, with biases
and whatever stands at the MLP's place; the bias path is one run of it. The
residual-direct part (`jaxclt.graph.provenance`) passes no attention, hence is sparse
and made on the host. `jaxclt.global_weights.attention` is a closed form for one head,
summed over prompts. All share the step, or the folded maps of `jaxclt.lm.frozen`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxclt.graph.stream import Stream
from jaxclt.lm.config import LMConfig
from jaxclt.lm.step import down, up

__all__ = ["Frozen", "Hops", "Reads", "Way", "Writes", "descend", "pull", "push"]


class Writes(NamedTuple):
    """Sources that travel together; site 0 is the embedding, m + 1 MLP output m."""

    write_MBD: Any  # what they write at every site
    pos_B: Any
    first: Any  # lowest site with a write
    start: Any  # first position of the window


class Reads(NamedTuple):
    """Targets that travel together; layer L is the output, -1 none."""

    layer_B: Any
    pos_B: Any
    read_SBD: Any  # of the first S states of a way


def push(
    stream: Stream,
    writes: Writes,
    visit: Callable[[Array, Array, Array, Array, Any], Any],
    state: Any,
    *,
    n_positions: int,
    end: Array | int,
) -> tuple[Array, Any]:
    """Push sources up through the layers before `end`.

    Args:
      stream: laid out for pushing.
      writes: of the sources.
      visit: (layer, streams that enter it, what heads gathered, streams where the MLP
        reads, state) -> state.
      state: to begin with.
      n_positions: of the window.
      end: the first layer that is not passed.

    Returns:
      The streams [P, B, D] that enter layer `end`, and the state.
    """
    write_MBD, start = jnp.asarray(writes.write_MBD), writes.start
    row_B = jnp.arange(write_MBD.shape[1])
    # Only the window from the first source on is held: nothing reaches back before it.
    near_B = writes.pos_B - start

    def level(layer: Array, carried: tuple[Array, Any]) -> tuple[Array, Any]:
        x_PBD, state = carried
        with jax.named_scope("push_attention"):
            mixed_PBGJC = stream.mix(layer, x_PBD, start=start)
            moved_PBD = stream.leave_heads(layer, mixed_PBGJC)
        skip = stream.skip_at(layer, start, n_positions)
        mid_PBD, after_PBD = up(x_PBD, moved_PBD, skip, cfg=stream.cfg)
        state = visit(layer, x_PBD, mixed_PBGJC, mid_PBD, state)
        # What is written at a layer is read from the next one on.
        return after_PBD.at[near_B, row_B].add(write_MBD[layer + 1]), state

    # Below the first write every stream is zero, so that the loop starts there; its
    # bounds are traced, which keeps one program for all chunks.
    x_PBD = jnp.zeros((n_positions, *write_MBD.shape[1:]), write_MBD.dtype)
    x_PBD = x_PBD.at[near_B, row_B].add(write_MBD[writes.first])
    return jax.lax.fori_loop(writes.first, end, level, (x_PBD, state))


class Way:
    """How cotangents pass a layer downwards: which derivative of it is taken.

    States keep parts of a cotangent apart on their way; where there are Q of them, the
    vectors are Q * B, by state.
    """

    n_states = 1  # Q

    @property
    def cfg(self) -> LMConfig:
        """Model shape."""
        raise NotImplementedError

    def past_mlp(
        self, layer: Array, g_PXD: Array, add_reads: Callable[[Array], Array]
    ) -> tuple[Array, Array]:
        """Cotangents of the stream and of what attention adds, as `lm.step.down`.

        Args:
          layer: which layer.
          g_PXD: cotangents of the stream that leaves it, at the first positions.
          add_reads: adds what is read where the MLP reads.
        """
        raise NotImplementedError

    def past_attention(self, layer: Array, moved_PXD: Array) -> Array:
        """Cotangents of what attention adds, as those of the stream that it reads."""
        raise NotImplementedError

    def below(
        self, layer: Array, g_PXD: Array, add_reads: Callable[[Array], Array]
    ) -> Array:
        """Cotangents of the stream that enters a layer; arguments as of `past_mlp`."""
        below_PXD, moved_PXD = self.past_mlp(layer, g_PXD, add_reads)
        return below_PXD + self.past_attention(layer, moved_PXD)


@struct.dataclass
class Frozen(Way):
    """Past the frozen attention maps and the skip: the graph's edges."""

    stream: Stream  # laid out for pulling

    @property
    def cfg(self) -> LMConfig:
        """Model shape."""
        return self.stream.cfg

    def past_mlp(
        self, layer: Array, g_PXD: Array, add_reads: Callable[[Array], Array]
    ) -> tuple[Array, Array]:
        """See `Way`."""
        skip = self.stream.skip_at(layer, 0, len(g_PXD))
        return down(g_PXD, skip, add_reads, cfg=self.cfg)

    def past_attention(self, layer: Array, moved_PXD: Array) -> Array:
        """See `Way`."""

        def attend(x_PXD: Array) -> Array:
            return self.stream.attend(layer, x_PXD, start=0)

        with jax.named_scope("pull_attention"):
            # It is linear: where it is transposed does not matter.
            _, back = jax.vjp(attend, moved_PXD)
            return back(moved_PXD)[0]


@struct.dataclass
class Hops(Frozen):
    """As `Frozen`, with paths kept apart by the number of heads that they passed.

    The last state has all with Q - 1 or more.
    """

    n_states: int = struct.field(pytree_node=False)

    def past_attention(self, layer: Array, moved_PXD: Array) -> Array:
        """See `Way`."""
        back_PXD = super().past_attention(layer, moved_PXD)
        P, X, D = back_PXD.shape
        back_PQBD = back_PXD.reshape(P, self.n_states, -1, D)
        first_P1BD, last_PBD = jnp.zeros_like(back_PQBD[:, :1]), back_PQBD[:, -1]
        back_PQBD = jnp.concatenate([first_P1BD, back_PQBD[:, :-1]], axis=1)
        return back_PQBD.at[:, -1].add(last_PBD).reshape(P, X, D)


def descend(
    way: Way,
    g_PXD: Array,
    top: Array | int,
    add_reads: Callable[[Array, Array], Array],
    visit: Callable[[Array, Array, Any], Any],
    state: Any,
) -> tuple[Array, Any]:
    """Pull cotangents of the stream down to the embeddings.

    Args:
      way: past each layer.
      g_PXD: cotangents of the stream that leaves layer `top`, at the first P positions:
        nothing flows back in time.
      top: the first layer that is passed.
      add_reads: (cotangents, layer) -> the same with what is read where its MLP reads.
      visit: (layer, cotangents of its MLP output, state) -> state.
      state: to begin with.

    Returns:
      The cotangents [P, X, D] of the embeddings, and the state.
    """

    def level(step: Array, carried: tuple[Array, Any]) -> tuple[Array, Any]:
        g_PXD, state = carried
        layer = top - step
        # Before the layer's own reads are added: what it writes comes after them.
        state = visit(layer, g_PXD, state)
        return way.below(layer, g_PXD, lambda g_PXD: add_reads(g_PXD, layer)), state

    return jax.lax.fori_loop(0, top + 1, level, (g_PXD, state))


def pull(
    way: Way,
    reads: Reads,
    visit: Callable[[Array, Array, Any, Array], Any],
    state: Any,
    *,
    n_positions: int,
) -> tuple[Array, Any]:
    """`descend` from targets, each of which reads one layer at one position.

    The positions are the first ones: no target needs more than those up to its own.

    Args:
      way: past each layer.
      reads: of the targets; they enter in the first of the states.
      visit: (layer, cotangents of its MLP output, state, nothing) -> state; where
        `nothing` is true the cotangents are zero.
      state: to begin with.
      n_positions: P.

    Returns:
      The cotangents [P, Q B, D] of the embeddings, and the state.
    """
    layer_B, pos_B, read_SBD = reads
    (S, B, D), L = read_SBD.shape, way.cfg.n_layers
    row_SB = jnp.arange(S * B).reshape(S, B)

    def add_reads(g_PXD: Array, layer: Array | int) -> Array:
        # A mask instead of a gather: which targets read here differs by layer, and
        # shapes may not.
        here_SBD = jnp.where((layer_B == layer)[None, :, None], read_SBD, 0)
        return g_PXD.at[pos_B[None], row_SB].add(here_SBD)

    # A chunk of features starts at the highest of their layers, not at the output.
    top_read = jnp.max(layer_B)
    from_mid = top_read < L  # nothing has been read above the first visit
    top = jnp.minimum(top_read, L - 1)

    def visited(layer: Array, g_PXD: Array, state: Any) -> Any:
        return visit(layer, g_PXD, state, (layer == top) & from_mid)

    g_PXD = jnp.zeros((n_positions, way.n_states * B, D), read_SBD.dtype)
    return descend(way, add_reads(g_PXD, L), top, add_reads, visited, state)
