"""Patches that a served page asks for: the model behind `jaxclt serve`.

The model and the dictionary are those that the command named, else those that the
graph's report names, which the command then takes from this machine only. They are
loaded when first asked for and must be the traced ones, by their hashes. One patch runs
at a time.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, get_args

from jaxclt.files.json_file import TEXT, check_json, json_schema, record
from jaxclt.patching.edits import Edit
from jaxclt.patching.how import How, Part
from jaxclt.patching.log import keep_patch, patch_record
from jaxclt.patching.modes import MODES
from jaxclt.patching.patch import measure
from jaxclt.patching.plan import plan_patch
from jaxclt.patching.subject import Subject, reopen
from jaxclt.types import Supernode

__all__ = ["BUSY", "FILES", "MAX_NODES", "MAX_SCALE", "Patcher"]

BUSY = "another patch is running: ask again when it is done"
FILES = ("graph.npz", "report.json")  # read for a patch, beside graph.json
MAX_NODES = 512
MAX_SCALE = 100.0
MAX_NAME = 300

_NODE = {"type": "string", "pattern": "^[0-9]{1,9}_[0-9]{1,9}_[0-9]{1,9}$"}
_NODES = {"type": "array", "items": _NODE, "minItems": 1, "maxItems": MAX_NODES}
_CHANGE = json_schema(
    record(
        {"nodes": _NODES},
        {
            "scale": {"type": "number", "minimum": -MAX_SCALE, "maximum": MAX_SCALE},
            "mode": {"enum": list(MODES)},
            "patterns": {"enum": list(get_args(Part))},
            "name": {**TEXT, "maxLength": MAX_NAME},
        },
    )
)


class Patcher:
    """Patches the prompts of traced directories, the last of which stays recorded.

    Args:
      model: where the model is; None where the report of a graph says.
      dictionary: the same of the dictionary.
    """

    def __init__(self, model: str | None = None, dictionary: str | None = None) -> None:
        self.model, self.dictionary = model, dictionary
        self._running = threading.Lock()
        self._stamp: tuple[str, int, int] | None = None
        self._subject: Subject | None = None

    def patch(self, directory: Path, change: Any) -> dict[str, Any] | None:
        """Change features as asked, and keep what it did beside the graph.

        Args:
          directory: that trace wrote.
          change: ``{"nodes": [layer_feature_pos, ...], "scale": number, "name": text,
            "mode": one of `MODES`, "patterns": frozen or live}``; scale is 0, mode
            constrained and patterns frozen if not given.

        Returns:
          The record that the page shows (`jaxclt.patching.log.patch_record`); None if
          another patch is running.

        Raises:
          InputError: for a change that does not fit, or another model's graph.
        """
        nodes, scale, how, name = read_change(change)
        if not self._running.acquire(blocking=False):
            return None
        try:
            subject = self._of(directory)
            places = tuple((layer, pos, feature) for layer, feature, pos in nodes)
            group = Supernode(name or "patched", places)
            edits = [Edit(supernode=group, scale=scale)]
            result = measure(plan_patch(subject, edits, how))
            record = patch_record(result, [name], {"scale": scale})
            keep_patch(directory, record, subject.graph.meta)
            return record
        finally:
            self._running.release()

    def _of(self, directory: Path) -> Subject:
        """The recorded prompt of a directory; again if its graph has changed."""
        state = (directory / FILES[0]).stat()
        stamp = (str(directory), state.st_mtime_ns, state.st_size)
        if self._subject is None or stamp != self._stamp:
            self._subject = None  # never two models at once
            opened = reopen(directory, model=self.model, dictionary=self.dictionary)
            self._subject = Subject.of(opened.model, opened.dictionary, opened.graph)
            self._stamp = stamp
        return self._subject


def read_change(change: Any) -> tuple[list[tuple[int, ...]], float, How, str]:
    """(layer, feature, pos) of the nodes, factor, semantics and name of what was asked.

    Raises:
      InputError: if it is not as `Patcher.patch` says.
    """
    check_json(change, _CHANGE, "what is to be patched")
    nodes = [tuple(map(int, i.split("_"))) for i in change["nodes"]]
    how = How(**{key: change[key] for key in ("mode", "patterns") if key in change})
    return nodes, float(change.get("scale", 0.0)), how, change.get("name", "")
