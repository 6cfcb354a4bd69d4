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
      mid_LTD: the residual stream after attention (only a skip needs it).
    """
    L, T, D = mid_LTD.shape
    write_LTD = np.repeat(active.write_bias_LD[:, None, :], T, axis=1)
    for layer in range(L):
        slots = active.of_layer(layer)
        rows_AMD = active.decoder[layer]
        n = rows_AMD.shape[1]
        gate_TA = np.zeros((T, len(rows_AMD)), write_LTD.dtype)
        gate_TA[active.pos_A[slots], np.arange(len(rows_AMD))] = active.value_A[slots]
        written_TMD = (gate_TA @ rows_AMD.reshape(len(rows_AMD), n * D)).reshape(
            T, n, D
        )
        write_LTD[layer : layer + n] += written_TMD.transpose(1, 0, 2)
    if active.skip_LDD is not None and active.skip_diagonal_LTD is not None:
        write_LTD += (mid_LTD * active.skip_diagonal_LTD) @ active.skip_LDD
    return write_LTD


def error_nodes(active: Active, recording: Recording) -> np.ndarray:
    """Error vectors [L, T, D]: true MLP output minus reconstruction.

    Circuit Tracing (2025), section 2.3: added back as constants, they make the local
    replacement model equal the model on this prompt, whatever the dictionary.
    """
    mid_LTD = np.asarray(recording.mid_LTD)
    return np.asarray(recording.write_LTD) - reconstruct(active, mid_LTD)
