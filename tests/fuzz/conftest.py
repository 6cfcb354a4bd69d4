"""The tiny models on disk of tests/io are samples here too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "io"))
