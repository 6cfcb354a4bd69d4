"""Feature documents: what the ecosystem's viewers show of a feature, as JSON.

Keys are those of Anthropic's format and circuit-tracer's, see `SCHEMA`. ``act_min`` and
``act_max`` are the ends of ``histogram``; what has no place in the format lies under
``jaxclt``. Activations are given to four digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

from jaxclt.dashboards.examples import Examples, Excerpts
from jaxclt.dashboards.files import cantor
from jaxclt.files.json_file import TEXT, TEXTS, check_json, json_schema, record

__all__ = ["SCHEMA", "feature_document", "significant", "validate"]

INTERVALS = 4  # of activation, by which the drawn examples are grouped
DIGITS = 4

_INDEX = {"type": "integer", "minimum": 0}
_NUMBER = {"type": "number"}
_NUMBERS = {"type": "array", "items": _NUMBER}
_EXAMPLE = record(
    {
        "tokens": TEXTS,
        "tokens_acts_list": _NUMBERS,
        "train_token_ind": _INDEX,
        "is_repeated_datapoint": {"type": "boolean"},
    }
)
_QUANTILE = record(
    {"quantile_name": TEXT, "examples": {"type": "array", "items": _EXAMPLE}}
)
SCHEMA = record(
    {"index": _INDEX, "examples_quantiles": {"type": "array", "items": _QUANTILE}},
    {
        "layer": _INDEX,
        "feature": _INDEX,
        "transcoder_id": TEXT,
        "top_logits": TEXTS,
        "bottom_logits": TEXTS,
        "act_min": _NUMBER,
        "act_max": _NUMBER,
        "quantile_values": _NUMBERS,
        "histogram": _NUMBERS,
        "activation_frequency": {"type": "number", "minimum": 0, "maximum": 1},
    },
)
_CHECKED = json_schema(SCHEMA)


def validate(document: bytes) -> None:
    """Check a document as it is written.

    Raises:
      InputError: if other viewers could not read it.
    """
    check_json(orjson.loads(document), _CHECKED, "feature document")


def feature_document(
    examples: Examples,
    u: int,
    strings: Sequence[str],
    *,
    top_logits: Sequence[str] = (),
    bottom_logits: Sequence[str] = (),
    transcoder_id: str = "",
) -> bytes:
    """The JSON document of one feature.

    ``examples_quantiles`` are the top activations (of a feature that was on both sides
    of zero, those of either, the larger first), then the drawn examples in equal
    intervals of activation (of its size, where there are both signs), from the highest
    down; ``quantile_values`` are the intervals' ends. An example is repeated if its
    window is among the top ones too.

    Args:
      examples: from `gather_examples`.
      u: row of the feature.
      strings: of every token id of the text.
      top_logits: tokens that the feature raises most.
      bottom_logits: and lowers most.
      transcoder_id: name of the dictionary.
    """
    layer, feature = int(examples.layer_U[u]), int(examples.feature_U[u])
    drawn = examples.drawn
    n_drawn = int((drawn.window_UE[u] >= 0).sum())
    quantiles: list[dict[str, Any]] = []
    in_top: set[int] = set()

    def show(name: str, excerpts: Excerpts, of: Sequence[int]) -> None:
        rows = _examples(examples, excerpts, u, of, strings, in_top)
        quantiles.append({"quantile_name": name, "examples": rows})

    tops = _tops(examples, u)
    for name, top in tops:
        show(name, top, range(int((top.window_UE[u] >= 0).sum())))
    in_top.update(*(top.window_UE[u].tolist() for _, top in tops))
    size_E = np.abs(drawn.value_UE[u, :n_drawn])
    most = float(max(abs(examples.max_U[u]), abs(examples.min_U[u])))
    edge_I = significant(np.linspace(0, most, INTERVALS + 1))
    place_E = np.searchsorted(edge_I[1:-1], size_E, side="right")
    for i in reversed(range(INTERVALS)):
        of = np.flatnonzero(place_E == i).tolist()
        if of:
            name = f"Drawn at random, {edge_I[i]:.4g} to {edge_I[i + 1]:.4g}"
            show(name, drawn, of)
    histogram, low, high = _histogram(examples, u)
    document = {
        "index": cantor(layer, feature),
        "layer": layer,
        "feature": feature,
        "transcoder_id": transcoder_id,
        "top_logits": list(top_logits),
        "bottom_logits": list(bottom_logits),
        "act_min": low,
        "act_max": high,
        "quantile_values": edge_I.tolist() if most else [],
        "histogram": histogram,
        "activation_frequency": float(examples.frequency[u]),
        "examples_quantiles": quantiles,
        "jaxclt": {
            "tokens": examples.n_tokens,
            "active_tokens": int(examples.count_U[u]),
            "least": float(examples.min_U[u]),
            "largest": float(examples.max_U[u]),
            "histogram_every": examples.histogram_every,
        },
    }
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def _tops(examples: Examples, u: int) -> list[tuple[str, Excerpts]]:
    """The top activations, by side of zero if the feature was on both."""
    name = "Top activations"
    if not (examples.sides and examples.min_U[u] < 0 < examples.max_U[u]):
        return [(name, examples.top)]
    above, below = examples.sides
    sides = [(f"{name} above zero", above), (f"{name} below zero", below)]
    return sides if examples.max_U[u] >= -examples.min_U[u] else sides[::-1]


def _histogram(examples: Examples, u: int) -> tuple[list[int], float, float]:
    """The bins from the least to the largest activation, and their ends."""
    if not examples.count_U[u]:
        return [], 0.0, 0.0
    count_B = examples.histogram_UB[u]
    low, high = examples.edge_U2[u].tolist()
    edge = np.linspace(low, high, len(count_B) + 1)
    first = int(np.searchsorted(edge, examples.min_U[u], side="right")) - 1
    last = int(np.searchsorted(edge, examples.max_U[u], side="right")) - 1
    first, last = (min(max(b, 0), len(count_B) - 1) for b in (first, last))
    part = count_B[first : last + 1].tolist()
    return part, float(edge[first]), float(edge[last + 1])


def _examples(
    examples: Examples,
    excerpts: Excerpts,
    u: int,
    of: Sequence[int],
    strings: Sequence[str],
    repeated: set[int],
) -> list[dict[str, Any]]:
    act_EC = significant(excerpts.act_UEC[u])
    found = []
    for e in of:
        shown = examples.shown(excerpts, u, e, lambda ids: [strings[t] for t in ids])
        found.append(
            {
                "tokens": shown.tokens,
                "tokens_acts_list": act_EC[e, : len(shown.tokens)],
                "train_token_ind": shown.peak,
                "is_repeated_datapoint": shown.window in repeated,
            }
        )
    return found


def significant(x: np.ndarray, digits: int = DIGITS) -> np.ndarray:
    """Numbers rounded to some significant digits, in float64."""
    x = np.asarray(x, np.float64)
    size = np.abs(np.where(x == 0, 1, x))
    power = digits - 1 - np.floor(np.log10(size)).astype(np.int64)
    # Divide by a whole power of ten rather than multiply by 0.001: shortest digits.
    scale = 10.0 ** np.abs(power)
    return np.where(
        power >= 0, np.round(x * scale) / scale, np.round(x / scale) * scale
    )
