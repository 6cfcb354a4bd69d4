"""The planted models of an experiment are importable, as from its own directory."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments/zoo"))
