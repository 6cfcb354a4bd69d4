"""The small model and the dictionaries that come with the package.

Made by ``experiments/addition/run.py``: a transformer that adds, the paper's case study
with a known answer. Their directories are like any other model's and dictionary's.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

__all__ = ["DICTIONARIES", "MODELS", "bundled", "bundled_text"]

MODELS = ("addition",)
DICTIONARIES = ("addition-clt", "addition-plt")


def bundled(name: str) -> Path | None:
    """Directory of a bundled model or dictionary; None for another name."""
    if name not in MODELS + DICTIONARIES:
        return None
    return Path(str(resources.files("jaxclt").joinpath("bundled", name)))


def bundled_text(name: str) -> Path | None:
    """Held-out prompts of a bundled model (a .jsonl); None if it has none."""
    folder = bundled(name) if name in MODELS else None
    return None if folder is None else folder / "heldout.jsonl"
