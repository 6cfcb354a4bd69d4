"""The global circuit at the `=`: virtual weights and TWERA between labelled features.

Restricted to features that are active at the `=` of at least 10 of the 10,000 sums
(Circuit Tracing 2025, section 4.1). Same position only: what attention brings is not
in it, so lookup tables of layer 0, which read other positions, have no inputs here.
"""

from __future__ import annotations

import numpy as np
import task
from families import Label

import jaxclt
from jaxclt.clt.transcoder import StoreDictionary
from jaxclt.io.model import Model

LEAST = 10  # sums on which a feature must be active
PICKS = (("lookup table", 1), ("ends in", 1), ("sum in range", 2))
PER_KIND = 3  # targets of each


def weights_at_equals(
    model: Model, dictionary: StoreDictionary, rows: np.ndarray
) -> jaxclt.GlobalWeights:
    """Weights between features (layer, feature) by the `=` of all sums."""
    token_NT, last_N = task.all_tokens()
    stats = jaxclt.coactivation(
        model,
        dictionary,
        token_NT,
        features=rows,
        mask=np.arange(token_NT.shape[1])[None] == last_N[:, None],
    )
    return jaxclt.global_weights(model, dictionary, stats)


def links(
    model: Model,
    dictionary: StoreDictionary,
    a_LNF: np.ndarray,
    labels: dict[tuple[int, int], Label],
    *,
    k: int = 10,
) -> list[dict]:
    """The k strongest inputs of the best labelled features, by TWERA and by V."""
    rows = np.argwhere((a_LNF > 0).sum(1) >= LEAST)
    active = set(map(tuple, rows.tolist()))
    weights = weights_at_equals(model, dictionary, rows)
    found = []
    for family, layer in PICKS:
        best = sorted(
            (x.fit, place)
            for place, x in labels.items()
            if x.family == family and place[0] == layer and place in active
        )[-PER_KIND:]
        for _, place in reversed(best):
            for by in ("twera", "virtual"):
                sources = [
                    (int(r["source_layer"]), int(r["source_feature"]), float(r[by]))
                    for r in weights.inputs(*place, k, by=by).rows()
                ]
                found.append(
                    {
                        "target": place,
                        "label": labels[place].text,
                        "family": family,
                        "by": by,
                        "sources": [
                            (l, f, value, labels[l, f].text) for l, f, value in sources
                        ],
                        "together": together(a_LNF, place, sources),
                    }
                )
    return found


def together(a_LNF: np.ndarray, place: tuple[int, int], sources: list) -> float:
    """How often the target is on when a source is, mean over the sources."""
    on_N = a_LNF[place[0], :, place[1]] > 0
    shares = [on_N[a_LNF[l, :, f] > 0].mean() for l, f, _ in sources]
    return float(np.mean(shares)) if shares else float("nan")


def lines(found: list[dict]) -> str:
    """A row per target: its strongest inputs in words."""
    head = "| target | by | strongest inputs | target on when they are |\n"
    head += "|---" * 4 + "|\n"
    return head + "".join(
        f"| {r['label']} (L{r['target'][0]} {r['target'][1]}) | {r['by']} "
        f"| {'; '.join(f'{t} {value:+.2g}' for *_, value, t in r['sources'][:4])} "
        f"| {r['together']:.0%} |\n"
        for r in found
    )
