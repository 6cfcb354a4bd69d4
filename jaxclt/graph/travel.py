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
from jax import Array

from jaxclt.graph.stream import Stream
from jaxclt.lm.step import down, up

__all__ = ["Reads", "Writes", "pull", "push"]


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
    read_BD: Any


def push(
    stream: Stream,
    writes: Writes,
    visit: Callable[[Array, Array, Array, Any], Any],
    state: Any,
    *,
    n_positions: int,
    end: Array | int,
) -> tuple[Array, Any]:
    """Push sources up through the layers before `end`.

    Args:
      stream: laid out for pushing.
      writes: of the sources.
      visit: (layer, what heads gathered, stream where the MLP reads, state) -> state.
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
        mid_PBD, x_PBD = up(x_PBD, moved_PBD, skip, cfg=stream.cfg)
        state = visit(layer, mixed_PBGJC, mid_PBD, state)
        # What is written at a layer is read from the next one on.
        return x_PBD.at[near_B, row_B].add(write_MBD[layer + 1]), state

    # Below the first write every stream is zero, so that the loop starts there; its
    # bounds are traced, which keeps one program for all chunks.
    x_PBD = jnp.zeros((n_positions, *write_MBD.shape[1:]), write_MBD.dtype)
    x_PBD = x_PBD.at[near_B, row_B].add(write_MBD[writes.first])
    return jax.lax.fori_loop(writes.first, end, level, (x_PBD, state))


def pull(
    stream: Stream,
    reads: Reads,
    visit: Callable[[Array, Array, Any, Array], Any],
    state: Any,
    *,
    n_positions: int,
    n_states: int = 1,
) -> tuple[Array, Any]:
    """Pull targets down to the embeddings.

    The positions are the first ones: nothing flows back in time, so that no target
    needs more than those up to its own.

    Args:
      stream: laid out for pulling.
      reads: of the targets.
      visit: (layer, cotangents of its MLP output, state, nothing) -> state; where
        `nothing` is true the cotangents are zero.
      state: to begin with.
      n_positions: P.
      n_states: Q > 1 keeps paths apart by the number of heads that they passed, the
        last one having all with Q - 1 or more; the vectors are then Q · B, by state.

    Returns:
      The cotangents [P, Q B, D] of the embeddings, and the state.
    """
    layer_B, pos_B, read_BD = reads
    (B, D), L, P = read_BD.shape, stream.cfg.n_layers, n_positions
    row_B = jnp.arange(B)

    def add_reads(g_PXD: Array, layer: Array | int) -> Array:
        # A mask instead of a gather: which targets read here differs by layer, and
        # shapes may not.
        here_BD = jnp.where((layer_B == layer)[:, None], read_BD, 0)
        return g_PXD.at[pos_B, row_B].add(here_BD)

    def one_more_hop(g_PXD: Array) -> Array:
        if n_states == 1:
            return g_PXD
        g_PQBD = g_PXD.reshape(P, n_states, B, D)
        first_P1BD, last_PBD = jnp.zeros_like(g_PQBD[:, :1]), g_PQBD[:, -1]
        g_PQBD = jnp.concatenate([first_P1BD, g_PQBD[:, :-1]], axis=1)
        return g_PQBD.at[:, -1].add(last_PBD).reshape(g_PXD.shape)

    def level(step: Array, carried: tuple[Array, Any]) -> tuple[Array, Any]:
        g_PXD, state = carried
        layer = top - step
        # Before the layer's own reads are added: what it writes comes after them.
        state = visit(layer, g_PXD, state, (step == 0) & from_mid)
        below_PXD, moved_PXD = down(
            g_PXD,
            stream.skip_at(layer, 0, P),
            lambda g_PXD: add_reads(g_PXD, layer),
            cfg=stream.cfg,
        )
        with jax.named_scope("pull_attention"):
            # Attention is linear: where it is transposed does not matter.
            _, back = jax.vjp(lambda x_PXD: stream.attend(layer, x_PXD, start=0), g_PXD)
            return below_PXD + one_more_hop(back(moved_PXD)[0]), state

    # A chunk of features starts at the highest of their layers, not at the output.
    top_read = jnp.max(layer_B)
    from_mid = top_read < L  # nothing has been read above the first visit
    top = jnp.minimum(top_read, L - 1)
    g_PXD = add_reads(jnp.zeros((P, n_states * B, D), read_BD.dtype), L)
    return jax.lax.fori_loop(0, top + 1, level, (g_PXD, state))
