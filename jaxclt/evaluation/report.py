"""An evaluation as people read it: the table, the claims in words, the files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxclt.evaluation import plots
from jaxclt.evaluation.claims import Claim
from jaxclt.files.atomic import write_text
from jaxclt.files.json_text import to_json

__all__ = ["COLUMNS", "cells", "markdown", "write_evaluation"]

Row = dict[str, Any]


def _number(digits: str) -> Callable[[Row, str], str]:
    def shown(row: Row, key: str) -> str:
        value = row.get(key)
        if value is None:
            return ""
        text = format(value, digits)
        interval = row.get("intervals", {}).get(key)
        if interval and None not in interval:
            low, high = (format(x, digits) for x in interval)
            text += f" ({low} to {high})"
        return text

    return shown


def _filtered(row: Row, key: str) -> str:
    text = _number(".1%")(row, key)
    return text and f"{text}, n {row['n_strict_filtered']}"


def _step_cosine(row: Row, key: str) -> str:
    found = row.get("faithfulness", {}).get(key, {})
    cosine, nmse = (found.get(x, {}).get("1") for x in ("cosine", "nmse"))
    return "" if cosine is None else f"{cosine:.2f}, {nmse:.2f}"


def _plain(row: Row, key: str) -> str:
    return str(row[key])


COLUMNS: tuple[tuple[str, str, Callable[[Row, str], str]], ...] = (
    ("dictionary", "dictionary", _plain),
    ("kind", "kind", _plain),
    ("features a layer", "features", _plain),
    ("FVU", "fvu", _number(".3f")),
    ("L0", "l0", _number(".1f")),
    ("silent", "dead", _number(".1%")),
    ("top-1", "top1", _number(".1%")),
    ("KL", "kl", _number(".3g")),
    ("top-1, nothing kept", "top1_strict", _number(".1%")),
    ("top-1, paper's filter", "top1_strict_filtered", _filtered),
    ("right", "accuracy", _number(".1%")),
    ("completeness", "completeness", _number(".3f")),
    ("replacement", "replacement", _number(".3f")),
    ("path length", "path_length", _number(".2f")),
    ("through attention", "attention", _number(".1%")),
    ("next layer: cosine, NMSE", "upstream", _step_cosine),
    ("Sort", "sort", _number(".1%")),
    ("Contrastive", "contrastive", _number(".1%")),
)


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Heads and texts of the columns that any row has something for."""
    body = [[shown(row, key) for _, key, shown in COLUMNS] for row in rows]
    used = [i for i in range(len(COLUMNS)) if any(line[i] for line in body)]
    heads = [COLUMNS[i][0] for i in used]
    return heads, [[line[i] for i in used] for line in body]


def markdown(rows: Sequence[Row], claims: Sequence[Claim]) -> str:
    """The table, and the paper's claims with what became of them."""
    heads, body = cells(rows)
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += ["| " + " | ".join(line) + " |" for line in body]
    text = "\n".join(lines) + "\n"
    if claims:
        text += "\nIntervals are 95%, differences of the same prompts or windows.\n\n"
    for claim in claims:
        low, high = claim.interval
        text += (
            f"- **{claim.verdict}**: {claim.text} (difference {claim.difference:+.3g}, "
            f"{low:+.3g} to {high:+.3g})\n"
        )
    return text


def write_evaluation(
    rows: Sequence[Row],
    raw: Sequence[Row],
    claims: Sequence[Claim],
    out: Path,
    *,
    meta: dict[str, Any],
) -> None:
    """Write eval.json, rows.jsonl, table.md and the plots into a directory.

    Args:
      rows: from `jaxclt.evaluation.evaluate.evaluate`.
      raw: the raw rows from there.
      claims: from `check_claims`.
      out: directory.
      meta: what it was made with, beside the rows of eval.json.

    Raises:
      InputError: if the directory cannot be written.
    """
    verdicts = [
        {
            "claim": claim.text,
            "verdict": claim.verdict,
            "difference": claim.difference,
            "interval": list(claim.interval),
        }
        for claim in claims
    ]
    document = {**meta, "rows": list(rows), "claims": verdicts}
    for name, text in {
        "eval.json": to_json(document, indent=1) + "\n",
        "rows.jsonl": "".join(to_json(line) + "\n" for line in raw),
        "table.md": markdown(rows, claims),
    }.items():
        write_text(out / name, text)
    plots.draw_layers(out / "layers.png", rows)
    plots.draw_graphs(out / "graphs.png", rows)
    plots.draw_faithfulness(out / "faithfulness.png", rows)
