"""A traced directory opened again, for `jaxclt patch` and `jaxclt validate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from jaxclt.cli.common import use_compilation_cache
from jaxclt.cli.flags import AsJson, Debug
from jaxclt.cli.progress import Run
from jaxclt.errors import InputError

if TYPE_CHECKING:
    from jaxclt.patching.subject import Reopened
    from jaxclt.types import Supernode

__all__ = ["OpenFlags", "ReopenFlags", "check_traced"]


def check_traced(directory: Path) -> None:
    """Raise InputError unless trace wrote a directory."""
    if not (directory / "graph.npz").is_file():
        raise InputError(f"no graph in {directory}: give a directory that trace wrote")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenFlags:
    """A traced directory, and where its model and dictionary are."""

    model: Annotated[str | None, arg(metavar="M")] = None
    """The model; for a traced directory only if it has moved since."""
    dictionary: Annotated[str | None, arg(metavar="D")] = None
    """The dictionary; for a traced directory only if it has moved since."""
    json: AsJson = False
    debug: Debug = False

    def reopen(self, directory: Path, run: Run) -> Reopened:
        """The graph of a directory with its model and dictionary.

        Raises:
          InputError: if trace did not write the directory, it cannot be written, or
            they are not the traced ones.
        """
        from jaxclt.runs.kept import owned

        # The place to write to is checked before anything long begins.
        check_traced(directory)
        with owned(directory):
            pass
        use_compilation_cache()
        from jaxclt.patching.subject import reopen

        return reopen(
            directory,
            model=self.model,
            dictionary=self.dictionary,
            progress=run.line,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReopenFlags(OpenFlags):
    """The same, and its groups."""

    supernodes: Path | None = None
    """JSON file of groups, [["name", "layer_feature_pos", ...], ...] as the viewer
    saves them; or a graph.json with some."""

    def groups(self, directory: Path, opened: Reopened) -> list[Supernode]:
        """Supernodes of the file that is named, else those saved in the directory."""
        from jaxclt.trace.supernodes import read_supernodes

        path = self.supernodes or directory / "graph.json"
        if self.supernodes is None and not path.is_file():
            return []
        return read_supernodes(path, opened.graph)
