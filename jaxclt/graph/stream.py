"""The frozen stream on the device, laid out for one direction of travel.

Edges need the frozen attention maps many times, and nothing else of the model. Gains
and norm denominators are folded into the value maps and the patterns once, and the
projections are stored so that every product has its contracted axis first on the right,
which is what matmul kernels want: a pull-back multiplies by the transposes.

Attention patterns are kept, or, where they would not fit, computed again in each layer
from what entered it; next to moving a chunk of vectors that costs little.

Axes besides the usual: B vectors that travel together, J query heads of a group.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxclt.graph.prompt import Recorded
from jaxclt.lm.config import LMConfig
from jaxclt.lm.frozen import attention_maps, scaled_pattern
from jaxclt.lm.layers import pattern_weights
from jaxclt.lm.step import Skip
from jaxclt.precision import jit
from jaxclt.types import Block, Held

__all__ = ["Stream", "causal_share", "make_stream", "on_mesh"]


@struct.dataclass
class Stream:
    """What moves vectors through all layers: frozen attention, and a skip."""

    value: Array  # push: [L, D, G, C]; pull: [L, G, C, D]
    output: Array  # push: [L, G, J, C, D]; pull: [L, D, G, J, C]
    pattern_LHTS: Array | None  # see `scaled_pattern`
    again: tuple[Block, Held] | None  # what computes a pattern that is not kept
    skip: Skip | None
    cfg: LMConfig = struct.field(pytree_node=False)
    pull: bool = struct.field(pytree_node=False)  # the layout; the maps are the same

    def attend(self, layer: Array, x_PBD: Array, *, start: Array | int) -> Array:
        """What attention of one layer adds to streams; linear in them.

        Args:
          layer: which layer.
          x_PBD: streams at positions from `start` on.
          start: first position; nothing before it is read.
        """
        return self.leave_heads(layer, self.mix(layer, x_PBD, start=start))

    def mix(self, layer: Array, x_PBD: Array, *, start: Array | int) -> Array:
        """What each head gathers before its output map, [P, B, G, J, C]."""
        pattern_GJTS = self._pattern(layer, start, len(x_PBD))
        to_value = "SBD,GCD->SBGC" if self.pull else "SBD,DGC->SBGC"
        v_SBGC = jnp.einsum(to_value, x_PBD, self.value[layer])
        # One plain matmul per group: a batched one first moves its operands to G-major.
        groups = jnp.split(v_SBGC, self.cfg.n_kv_heads, axis=2)
        mixed = [
            _moved(pattern_JTS, v_SB1C[:, :, 0])
            for pattern_JTS, v_SB1C in zip(pattern_GJTS, groups, strict=True)
        ]
        return jnp.stack(mixed, axis=2)

    def leave_heads(self, layer: Array, mixed_PBGJC: Array) -> Array:
        """What heads write to the stream of what they gathered, [P, B, D]."""
        from_heads = "TBGJC,DGJC->TBD" if self.pull else "TBGJC,GJCD->TBD"
        return jnp.einsum(from_heads, mixed_PBGJC, self.output[layer])

    def skip_at(self, layer: Array, start: Array | int, P: int) -> Skip | None:
        """The linear path of one layer at positions from `start` on."""
        if self.skip is None:
            return None
        scale_T, map_DD = self.skip.scale_T[layer], self.skip.map_DD[layer]
        return Skip(jax.lax.dynamic_slice_in_dim(scale_T, start, P), map_DD)

    def _pattern(self, layer: Array, start: Array | int, P: int) -> Array:
        """Pattern times scales [G, J, P, P] of positions from `start` on."""
        if self.again is None:
            assert self.pattern_LHTS is not None
            zero, first = jnp.zeros((), layer.dtype), jnp.asarray(start, layer.dtype)
            size = (1, self.cfg.n_heads, P, P)
            at = (layer, zero, first, first)
            pattern_HTS = jax.lax.dynamic_slice(self.pattern_LHTS, at, size)[0]
        else:
            p, held = jax.tree.map(lambda leaf: leaf[layer], self.again)
            if isinstance(start, int):  # later positions change nothing of earlier ones
                held = jax.tree.map(lambda leaf: leaf[: start + P], held)
            pattern_HTS = scaled_pattern(p, held, cfg=self.cfg)
            for axis in (1, 2):
                pattern_HTS = jax.lax.dynamic_slice_in_dim(pattern_HTS, start, P, axis)
        return pattern_HTS.reshape(self.cfg.n_kv_heads, -1, P, P)


def make_stream(p: Recorded, *, pull: bool, other: Stream | None = None) -> Stream:
    """Put what moves vectors between positions on the device, once per prompt.

    Args:
      p: the prompt.
      pull: laid out for pulling targets back, else for pushing sources forward.
      other: the prompt's other one, whose patterns are taken.
    """
    value, output = _laid_out(p.params.blocks, pull=pull)
    if other is not None:
        return dataclasses.replace(other, value=value, output=output, pull=pull)
    frozen, blocks = p.recording.frozen, p.params.blocks
    held = Held(
        pattern_LHTS=frozen.pattern_LHTS,
        clean_LTD=frozen.clean_LTD if frozen.pattern_LHTS is None else None,
        attn_scale_LT=frozen.attn_scale_LT,
        post_attn_scale_LT=frozen.post_attn_scale_LT,
    )
    again = None if held.clean_LTD is None else (pattern_weights(blocks), held)
    scaled_LHTS = None if again else _patterns(pattern_weights(blocks), held, cfg=p.cfg)
    return Stream(
        value=value,
        output=output,
        pattern_LHTS=scaled_LHTS,
        again=again,
        skip=jax.tree.map(jnp.asarray, p.active.skip),
        cfg=p.cfg,
        pull=pull,
    )


@partial(jit, static_argnames="cfg")
def _patterns(blocks: Block, held: Held, *, cfg: LMConfig) -> Array:
    return jax.vmap(partial(scaled_pattern, cfg=cfg))(blocks, held)


@partial(jit, static_argnames="pull")
def _laid_out(blocks: Block, *, pull: bool) -> tuple[Array, Array]:
    value_LGCD, output_LHCD = jax.vmap(attention_maps)(blocks)
    L, G, C, D = value_LGCD.shape
    output_LGJCD = output_LHCD.reshape(L, G, -1, C, D)
    if pull:
        return value_LGCD, output_LGJCD.transpose(0, 4, 1, 2, 3)
    return value_LGCD.transpose(0, 3, 1, 2), output_LGJCD


def on_mesh(held: Any, mesh: Mesh) -> Any:
    """A pytree whole on every device of a mesh, wherever its arrays were.

    Edges need little of a model's weights (attention's values and outputs), so that a
    model that is split over devices need not be split for them.
    """
    there = set(mesh.devices.flat)
    leaves = jax.tree.leaves(held)
    if mesh.size == 1 and all(leaf.devices() == there for leaf in leaves):
        return held
    return jax.device_put(held, NamedSharding(mesh, PartitionSpec()))


_BLOCK = 256  # positions; smaller matmuls would run slower than they save


def _ends(P: int) -> list[int]:
    """Where blocks of at least `_BLOCK` positions end."""
    n = max(P // _BLOCK, 1)
    return [P * (i + 1) // n for i in range(n)]


def causal_share(P: int) -> float:
    """Share of a full pattern of P positions that `Stream.mix` multiplies with."""
    ends = _ends(P)
    starts = [0, *ends[:-1]]
    return sum((b - a) * b for a, b in zip(starts, ends, strict=True)) / P**2


def _moved(pattern_JTS: Array, v_SBC: Array) -> Array:
    """Values through a causal pattern [T, B, J, C], mostly without its zero half."""
    ends = _ends(len(v_SBC))
    # The upper triangle is zero: a block of queries sees keys up to its own end only.
    blocks = [
        jnp.einsum("JTS,SBC->TBJC", pattern_JTS[:, a:b, :b], v_SBC[:b])
        for a, b in zip([0, *ends[:-1]], ends, strict=True)
    ]
    return jnp.concatenate(blocks)
