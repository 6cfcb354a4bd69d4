"""Metrics to Weights & Biases too (``jaxclt[wandb]``); metrics.jsonl is always kept.

Numbers only; lists, one value per layer, become ``fvu_L/00`` and so on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxclt.errors import InputError

__all__ = ["Tracker", "flat", "require"]


def require(project: str) -> Any:
    """The package, asked for before anything long is begun.

    Raises:
      InputError: if it is not installed.
    """
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            f"--wandb {project} needs the package wandb: pip install "
            "'jaxclt[wandb]', or leave out the flag"
        ) from error
    return wandb


def flat(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line of metrics.jsonl under one name each."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            if all(isinstance(x, int | float) for x in value):
                found |= {f"{prefix}{key}/{i:02d}": x for i, x in enumerate(value)}
        elif isinstance(value, int | float):
            found[prefix + key] = value
    return found


class Tracker:
    """A run in a project; resumed with the directory it belongs to."""

    def __init__(self, project: str, out: Path, config: dict[str, Any]) -> None:
        wandb = require(project)
        file = out / "wandb_id.txt"
        known = file.read_text("utf-8").strip() if file.is_file() else None
        self.run = wandb.init(
            project=project,
            name=out.name,
            id=known,
            resume="allow",
            config=config,
            dir=str(out),
        )
        file.write_text(str(self.run.id), "utf-8")

    def log(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl, evaluations under ``eval/``."""
        prefix = "eval/" if record["kind"] == "eval" else ""
        numbers = {k: v for k, v in record.items() if k not in ("kind", "step")}
        self.run.log(flat(numbers, prefix), step=record["step"])

    def close(self) -> None:
        """The run is over."""
        self.run.finish()
