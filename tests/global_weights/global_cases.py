"""Statistics of the shared tiny cases over a few windows, and oracles for them."""

from __future__ import annotations

import functools
from functools import partial

import jax
import numpy as np
from cases import case

from jaxclt.clt.active import Active, active_features
from jaxclt.clt.coder import Bound
from jaxclt.clt.subset import Subset
from jaxclt.global_weights.build import build
from jaxclt.global_weights.ranking import GlobalWeights
from jaxclt.global_weights.sparse import sparse_sums
from jaxclt.global_weights.statistics import (
    Coactivation,
    Encoders,
    Plan,
    encoders,
    sums_of,
)
from jaxclt.lm.run import record
from jaxclt.types import Recording

W, S = 3, 6
INPUT_Y = np.arange(0, 40, 3, dtype=np.int32)
OUTPUT_Y = np.asarray([1, 7, 30], np.int32)
HEADS = ((2, 1),)  # in the sums; tests/global_weights/test_attention.py has all


@functools.cache
def windows() -> np.ndarray:
    key = jax.random.key(7)
    return np.asarray(jax.random.randint(key, (W, S), 0, 40, np.int32))


@functools.cache
def some() -> np.ndarray:
    """Not the first positions, and not one other."""
    mask = np.ones((W, S), bool)
    mask[:, 0] = mask[1, 3] = False
    return mask


EVERY = np.ones((W, S), bool)


@functools.cache
def subset(name: str, part: bool = False) -> Subset:
    everything = Subset.everything(case(name).clt_cfg)
    if not part:
        return everything
    place_U2 = np.stack([everything.layer_U, everything.feature_U], 1)
    return Subset.of(
        place_U2[[70, 1, 3, 22, 23, 24, 61, 66, 72, 79, 2]], case(name).clt_cfg
    )


@functools.cache
def parts(name: str, part: bool = False) -> tuple[Encoders, Plan]:
    t, chosen = case(name), subset(name, part)
    plan = Plan(
        lm=t.cfg, coder=t.dictionary.coder(t.cfg), starts=chosen.starts, heads=HEADS
    )
    with jax.enable_x64(True):
        return encoders(Bound(t.dictionary, t.params, t.cfg), chosen), plan


def gather(
    name: str,
    mask: np.ndarray,
    part: bool = False,
    sparse: bool = False,
) -> Coactivation:
    enc, plan = parts(name, part)
    args = (case(name).params, enc, windows(), mask)
    if sparse:
        sums = sparse_sums(*args, plan=plan)
    else:
        sums = sums_of(*args, INPUT_Y, OUTPUT_Y, plan=plan)
    return Coactivation(
        subset=subset(name, part),
        scaled=plan.scaled,
        sums=jax.tree.map(
            lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, sums
        ),
        heads=() if sparse else HEADS,
        input_Y=np.zeros(0, np.int32) if sparse else INPUT_Y,
        output_Y=np.zeros(0, np.int32) if sparse else OUTPUT_Y,
    )


@functools.cache
def gathered(name: str) -> Coactivation:
    """All positions of all windows."""
    with jax.enable_x64(True):
        return gather(name, EVERY)


@functools.cache
def weights(name: str) -> GlobalWeights:
    t = case(name)
    with jax.enable_x64(True):
        return build(Bound(t.dictionary, t.params, t.cfg), gathered(name))


@functools.cache
def recordings(name: str) -> tuple[Recording, ...]:
    t = case(name)
    with jax.enable_x64(True):
        run = jax.jit(partial(record, cfg=t.cfg))
        return tuple(run(t.params, token_S) for token_S in windows())


@functools.cache
def actives(name: str) -> tuple[Active, ...]:
    t = case(name)
    with jax.enable_x64(True):
        return tuple(
            active_features(t.dictionary, t.params, r, t.cfg) for r in recordings(name)
        )


@functools.cache
def stored(name: str) -> np.ndarray:
    """Activations [U, W, S] of all features, from the tracing code."""
    cfg = case(name).clt_cfg
    a_LFWS = np.zeros((cfg.n_layers, cfg.n_features, W, S))
    for w, active in enumerate(actives(name)):
        at = (active.layer_A, active.feature_A, w, active.pos_A)
        a_LFWS[at] = active.value_A
    return a_LFWS.reshape(-1, W, S)


def square(tiles: tuple) -> np.ndarray:
    """Tiles as one [U, U] matrix, zero on and above the diagonal blocks."""
    U = sum(tile.shape[0] for tile in tiles)
    found, row = np.zeros((U, U)), 0
    for tile in tiles:
        dense = tile if isinstance(tile, np.ndarray) else tile.toarray()
        found[row : row + dense.shape[0], : dense.shape[1]] = dense
        row += dense.shape[0]
    return found


def below(name: str) -> np.ndarray:
    """Which [target, source] pairs can have a weight."""
    layer_U = subset(name).layer_U
    return layer_U[:, None] > layer_U[None]


def brute_virtual(name: str) -> np.ndarray:
    """V [U, U] by a loop over pairs and written layers, gains folded by hand."""
    t = case(name)
    cfg = t.clt_cfg
    W_enc_LFD = np.array(t.clt.W_enc_LFD)
    if cfg.read == "mlp_in":
        W_enc_LFD *= np.asarray(t.params.blocks.norm_mlp_LD)[:, None]
    F = cfg.n_features
    V = np.zeros((cfg.n_layers * F,) * 2)
    for to in range(cfg.n_layers):
        for of in range(to):
            W_dec_FMD = np.asarray(t.clt.W_dec[of])
            for written in range(of, to):
                if written - of < W_dec_FMD.shape[1]:
                    V[to * F : (to + 1) * F, of * F : (of + 1) * F] += (
                        W_enc_LFD[to] @ W_dec_FMD[:, written - of].T
                    )
    return V
