"""Per-layer normalisation of reads and writes, and folding it into the weights.

    x' = (x - mean) / scale,   scale = root of the mean variance over the D dimensions

Circuit Tracing (2025), appendix D.2. The statistics come from many batches, merged as
in Chan et al. (1979), in float64; a dictionary trained in normalised units becomes one
in raw units exactly (`fold`).

Activations are harvested before all statistics are known, so chunks are held in
units of their own, from the first few windows, which only have to be near enough for
bfloat16; `between` says how to get from there to the final normalisation.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxclt.precision import precise
from jaxclt.types import CLTParams

__all__ = [
    "Moments",
    "Scales",
    "between",
    "fold",
    "merge_moments",
    "normalise",
    "scales_of",
]


@struct.dataclass
class Scales:
    """What is subtracted and divided, per layer, float32."""

    read_mean_LD: Array
    read_scale_L: Array
    write_mean_LD: Array
    write_scale_L: Array
    bound_L: Array  # tokens whose raw write norm is above this anywhere are left out


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations so far, float64 on the host."""

    n: int
    mean_LD: np.ndarray
    m2_LD: np.ndarray

    @classmethod
    def of(cls, x_LTD: np.ndarray) -> Moments:
        """Of one batch; the sums are float64, whatever the batch is."""
        dtype = np.float64 if x_LTD.dtype == np.float64 else np.float32
        x_LTD = np.asarray(x_LTD, dtype)
        mean_LD = x_LTD.mean(1, dtype=np.float64)
        deviation_LTD = x_LTD - mean_LD.astype(dtype)[:, None]
        m2_LD = np.square(deviation_LTD).sum(1, dtype=np.float64)
        return cls(x_LTD.shape[1], mean_LD, m2_LD)


def merge_moments(a: Moments | None, b: Moments) -> Moments:
    """Of the union of two batches."""
    if a is None:
        return b
    n = a.n + b.n
    delta_LD = b.mean_LD - a.mean_LD
    return Moments(
        n,
        a.mean_LD + delta_LD * (b.n / n),
        a.m2_LD + b.m2_LD + np.square(delta_LD) * (a.n * b.n / n),
    )


def scales_of(
    read: Moments, write: Moments, bound_L: np.ndarray, units: Scales | None = None
) -> Scales:
    """Means per dimension and one scale per layer; a constant layer keeps scale 1.

    Args:
      read: moments of the reads.
      write: moments of the writes.
      bound_L: largest write norm of a token that counts, raw units.
      units: what the moments are measured in; None is raw units. The result is in raw
        units.
    """
    found: dict[str, Array] = {}
    for site, m in (("read", read), ("write", write)):
        size_L, centre_LD = np.sqrt((m.m2_LD / m.n).mean(1)), m.mean_LD
        size_L = np.where(size_L > 0, size_L, 1.0)
        if units is not None:
            mean_LD, scale_L = _side(units, site)
            size_L = size_L * scale_L
            centre_LD = centre_LD * scale_L[:, None] + mean_LD
        found |= _float32(site, centre_LD, size_L)
    return Scales(**found, bound_L=jnp.asarray(bound_L, jnp.float32))


def _side(scales: Scales, site: str) -> tuple[np.ndarray, np.ndarray]:
    """Means and scales of the reads or writes, float64."""
    names = f"{site}_mean_LD", f"{site}_scale_L"
    mean_LD, scale_L = (np.asarray(getattr(scales, x), np.float64) for x in names)
    return mean_LD, scale_L


def _float32(site: str, mean_LD: np.ndarray, scale_L: np.ndarray) -> dict[str, Array]:
    """Fields of `Scales`."""
    found = {f"{site}_mean_LD": mean_LD, f"{site}_scale_L": scale_L}
    return {name: jnp.asarray(x.astype(np.float32)) for name, x in found.items()}


def between(units: Scales, scales: Scales) -> Scales:
    """What takes activations normalised by `units` to those normalised by `scales`.

    ``normalise(between(u, s), *normalise(u, r, w)) == normalise(s, r, w)``. Computed in
    float64, held in float32.
    """
    found: dict[str, Array] = {}
    for site in ("read", "write"):
        (m0_LD, s0_L), (m1_LD, s1_L) = _side(units, site), _side(scales, site)
        found |= _float32(site, (m1_LD - m0_LD) / s0_L[:, None], s1_L / s0_L)
    return Scales(**found, bound_L=scales.bound_L)


def normalise(scales: Scales, read_LTD: Array, write_LTD: Array) -> tuple[Array, Array]:
    """Reads and writes in normalised units."""

    def apply(x_LTD: Array, mean_LD: Array, scale_L: Array) -> Array:
        mean, scale = mean_LD.astype(x_LTD.dtype), scale_L.astype(x_LTD.dtype)
        return (x_LTD - mean[:, None]) / scale[:, None, None]

    return (
        apply(read_LTD, scales.read_mean_LD, scales.read_scale_L),
        apply(write_LTD, scales.write_mean_LD, scales.write_scale_L),
    )


@precise
def fold(clt: CLTParams, scales: Scales) -> CLTParams:
    """The dictionary in raw units that does what `clt` does in normalised ones.

    ``W_enc / s_r``, ``b_enc - W_enc mean_r / s_r``, decoders times the scale of the
    layer they write, ``b_dec s_w + mean_w``; pre-activations, thresholds and
    activations stay as they are (maths 19.8).

    Args:
      clt: trained on normalised reads and writes.
      scales: of those.
    """
    dtype = clt.W_enc_LFD.dtype
    s = jax.tree.map(lambda leaf: leaf.astype(dtype), scales)
    W_enc_LFD = clt.W_enc_LFD / s.read_scale_L[:, None, None]
    b_dec_LD = clt.b_dec_LD * s.write_scale_L[:, None] + s.write_mean_LD
    W_skip_LDD = clt.W_skip_LDD
    if W_skip_LDD is not None:
        ratio_L = s.write_scale_L / s.read_scale_L
        W_skip_LDD = W_skip_LDD * ratio_L[:, None, None]
        b_dec_LD = b_dec_LD - jnp.einsum("LD,LDE->LE", s.read_mean_LD, W_skip_LDD)
    return CLTParams(
        W_enc_LFD=W_enc_LFD,
        b_enc_LF=clt.b_enc_LF - jnp.einsum("LFD,LD->LF", W_enc_LFD, s.read_mean_LD),
        W_dec=tuple(
            W_FMD * s.write_scale_L[l : l + W_FMD.shape[1]][None, :, None]
            for l, W_FMD in enumerate(clt.W_dec)
        ),
        b_dec_LD=b_dec_LD,
        theta_LF=clt.theta_LF,
        W_skip_LDD=W_skip_LDD,
    )
