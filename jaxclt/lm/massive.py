"""Positions with massive activations: where the stream is out of all proportion."""

from __future__ import annotations

import numpy as np

from jaxclt.types import Recording

__all__ = ["MASSIVE", "massive_positions"]

MASSIVE = 10.0  # times the median of the other positions


def massive_positions(recording: Recording, n_tokens: int) -> np.ndarray:
    """Positions whose stream is `MASSIVE` times as long as the median's, ascending.

    Most models keep such a one, the first, on which heads rest that have nothing to
    attend to (Sun et al. 2024, massive activations); no linear prediction holds there.

    Args:
      recording: the clean pass; may be padded.
      n_tokens: of the prompt itself.
    """
    stream_LTD = np.asarray(recording.mid_LTD[:, :n_tokens], np.float64)
    length_T = np.linalg.norm(stream_LTD, axis=-1).max(0)
    return np.flatnonzero(length_T > MASSIVE * np.median(length_T))
