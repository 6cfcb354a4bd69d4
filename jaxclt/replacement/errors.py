"""Error nodes: what the dictionary does not explain of each MLP output."""

from __future__ import annotations

import numpy as np

from jaxclt.clt.active import Active
from jaxclt.types import Recording

__all__ = ["error_nodes", "reconstruct"]


def reconstruct(active: Active, mid_LTD: np.ndarray) -> np.ndarray:
    """MLP outputs [L, T, D] as the active features (biases and skip included) say.

    Args:
      active: the active features.
      mid_LTD: the residual stream where the MLPs read (only a skip needs it).
    """
    L, T, D = mid_LTD.shape
    write_LTD = np.repeat(active.write_bias_LD[:, None, :], T, axis=1)
    for layer in range(L):
        slots = active.of_layer(layer)
        rows_UMD = active.decoder[layer]
        U, n, _ = rows_UMD.shape
        value_TU = np.zeros((T, U), write_LTD.dtype)
        value_TU[active.pos_A[slots], active.row_A[slots]] = active.value_A[slots]
        written_TMD = (value_TU @ rows_UMD.reshape(U, n * D)).reshape(T, n, D)
        write_LTD[layer : layer + n] += written_TMD.transpose(1, 0, 2)
    if active.skip_LDD is not None:
        write_LTD += (mid_LTD * active.scale_LT[:, :, None]) @ active.skip_LDD
    return write_LTD


def error_nodes(active: Active, recording: Recording) -> np.ndarray:
    """Error vectors [L, T, D]: true MLP output minus reconstruction.

    Circuit Tracing (2025), section 2.3: added back as constants, they make the local
    replacement model equal the model on this prompt, whatever the dictionary.
    """
    mid_LTD = np.asarray(recording.mid_LTD)
    return np.asarray(recording.write_LTD) - reconstruct(active, mid_LTD)
