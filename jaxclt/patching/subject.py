"""A prompt, traced or not, recorded and ready to be changed.

directory --reopen--> model, dictionary, graph (or a prompt) --Subject.of--> recording
  --Subject.effects--> measured patches
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxclt.clt.active import Active, active_features
from jaxclt.clt.coder import Dictionary
from jaxclt.errors import InputError
from jaxclt.files.json_file import (
    TEXT,
    check_json,
    json_schema,
    named,
    read_json,
    record,
)
from jaxclt.graph.contrast import contrast
from jaxclt.graph.graph import Graph
from jaxclt.graph.memory import available_bytes
from jaxclt.graph.prompt import Recorded
from jaxclt.graph.supernodes import with_features
from jaxclt.graph.targets import salient_targets
from jaxclt.io.dictionary import load_dictionary
from jaxclt.io.graph_file import load_graph
from jaxclt.io.model import Model, load_model
from jaxclt.lm.run import Run, readout
from jaxclt.patching.batch import (
    chunk_size,
    default_range,
    in_chunks,
    patch_chunk,
)
from jaxclt.patching.change import Change, batched
from jaxclt.patching.edits import Edit, acting, expand_edits
from jaxclt.patching.effects import Ask, Effect
from jaxclt.patching.features import Features, gather_features
from jaxclt.patching.heads import Heads
from jaxclt.patching.how import How, Mode
from jaxclt.patching.local import Local, Tables, make_local
from jaxclt.patching.modes import patched
from jaxclt.patching.patchable import Patchable, make_patchable
from jaxclt.precision import jit
from jaxclt.text.prompts import Prompt
from jaxclt.trace.record import prompt_tokens, record_again, record_text, same_hash
from jaxclt.types import Supernode

__all__ = ["Reopened", "Subject", "reopen"]

_REPORT = json_schema(  # of what is read of it here
    record(
        {
            "environment": record({}, {"dtype": TEXT}),
            "identity": record({"hashes": named(TEXT)}),
            "model": TEXT,
            "dictionary": TEXT,
        }
    )
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reopened:
    """What `trace` worked with, loaded again."""

    model: Model
    dictionary: Dictionary
    graph: Graph
    report: dict[str, Any]


def reopen(
    directory: str | os.PathLike[str],
    *,
    model: str | None = None,
    dictionary: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Reopened:
    """Load the model and the dictionary that a directory was traced with.

    Args:
      directory: written by `trace`.
      model: where the model is now, if it has moved.
      dictionary: where the dictionary is now.
      progress: called with one line per stage of a download.

    Raises:
      InputError: if `trace` did not write the directory, or the weights found are not
        the traced ones.
    """
    folder = Path(directory)
    graph = load_graph(folder / "graph.npz")
    report = read_json(folder / "report.json")
    check_json(report, _REPORT, f"{folder / 'report.json'} is not a report of trace")
    dtype = report["environment"].get("dtype", "float32")
    traced = report["identity"]["hashes"]
    names = (model or report["model"], dictionary or report["dictionary"])
    loaded = load_model(names[0], dtype=dtype, progress=progress)
    same_hash("model", names[0], loaded.hash, traced.get("model"))
    opened = load_dictionary(names[1], loaded)
    same_hash("dictionary", names[1], opened.hash, traced.get("dictionary"))
    return Reopened(model=loaded, dictionary=opened, graph=graph, report=report)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A prompt, recorded and ready to be changed."""

    model: Model
    dictionary: Dictionary
    patchable: Patchable
    traced: Graph | None = None  # of the prompt, if there is one

    @classmethod
    def of(
        cls,
        model: Model,
        dictionary: Dictionary,
        prompt: Graph | Prompt,
    ) -> Subject:
        """Record a prompt.

        Args:
          model: from `load_model`.
          dictionary: from `load_dictionary`.
          prompt: the graph of one, or text, token ids or a chat.

        Raises:
          InputError: if the graph belongs to another model or dictionary, or the prompt
            does not fit the model.
        """
        traced = prompt if isinstance(prompt, Graph) else None
        if isinstance(prompt, Graph):
            recording = record_again(prompt, model, dictionary, pad=False)
        else:
            ids = prompt_tokens(model, prompt)
            recording = record_text(model, ids, available_bytes(), pad=False)
        return cls(
            model=model,
            dictionary=dictionary,
            patchable=make_patchable(dictionary, model.params, recording, model.cfg),
            traced=traced,
        )

    @property
    def graph(self) -> Graph:
        """The graph of the prompt.

        Raises:
          InputError: if it was not traced.
        """
        if self.traced is None:
            raise InputError(
                "this needs the graph of a prompt, not only the prompt: trace it first"
            )
        return self.traced

    @functools.cached_property
    def active(self) -> Active:
        """The active features; for `neurons:k` the kept ones."""
        return active_features(
            self.dictionary, self.model.params, self.patchable.recording, self.model.cfg
        )

    @functools.cached_property
    def local(self) -> Local:
        """The local replacement model's tables."""
        return make_local(self.dictionary, self.patchable, self.active)

    def _placed(self, change: Change, how: How) -> tuple[Tables | None, Change]:
        """Tables that hold what is changed, and the change with its slots in them."""
        if how.mode != "iterative":
            return None, change
        local = self.local
        if not local.holds(change):
            parts = self.dictionary, self.patchable, self.active
            local = make_local(*parts, also=change)
        return local.tables, local.placed(change)

    @functools.cached_property
    def targets(self) -> np.ndarray:
        """Indices of the graph's targets that are tokens (custom directions are not).

        Raises:
          InputError: if there is none.
        """
        found = np.flatnonzero(self.graph.target_token_K >= 0)
        if not len(found):
            raise InputError(
                "all targets of the graph are custom directions, but patches are "
                "measured on tokens: trace with token targets"
            )
        return found

    @functools.cached_property
    def contrast_K(self) -> np.ndarray:  # noqa: N802
        """Weights of the targets that are tokens in the graph's contrast.

        The first of them alone if the contrast is of something else.
        """
        weight_K = contrast(self.graph).weight_K[self.targets]
        return weight_K if weight_K.any() else np.eye(len(weight_K))[0]

    @functools.cached_property
    def answers(self) -> tuple[np.ndarray, list[str]]:
        """Tokens that patches are measured on, int32, and their texts.

        The graph's targets; without a graph those that `trace` would choose.
        """
        if self.traced is not None:
            chosen = self.traced.meta.target_tokens
            token_K = self.traced.target_token_K[self.targets]
            return token_K, [chosen[k] for k in self.targets]
        out_D = self.patchable.recording.out_TD[-1]
        token_K = np.asarray(salient_targets(self.model.params, out_D).token_K)
        return token_K, self.model.tokenizer.token_strings(token_K.tolist())

    @functools.cached_property
    def recorded(self) -> Recorded:
        """The prompt with the features that its graph's nodes are chosen from."""
        active, cfg = self.active, self.model.cfg
        if self.graph.meta.convention == "circuit-tracer":
            active = active.where(active.pos_A > 0)
        return Recorded(self.model.params, self.patchable.recording, active, cfg=cfg)

    def next_logits(self) -> np.ndarray:
        """Logits of the next token before any cap, [V], on the clean run."""
        out_D = self.patchable.recording.out_TD[-1]
        return np.asarray(readout(self.model.params, out_D))

    @property
    def n_tokens(self) -> int:
        """T."""
        return len(self.patchable.recording.token_T)

    def watch(self, nodes: np.ndarray) -> Features:
        """Rows of the graph's features by slot."""
        g = self.graph
        return self.gather(np.stack([g.layer_A, g.pos_A, g.feature_A], 1)[nodes])

    def gather(self, node_E3: np.ndarray | Sequence[tuple[int, int, int]]) -> Features:
        """Rows of any features, see `gather_features`."""
        return gather_features(self.dictionary, self.patchable, node_E3)

    def ask(self, watch: Features | None = None, *, n_top: int = 0) -> Ask:
        """What to measure: `answers` at the last position."""
        return Ask(
            token_K=jnp.asarray(self.answers[0]),
            last=jnp.asarray(self.n_tokens - 1, jnp.int32),
            watch=watch,
            n_top=n_top,
        )

    def named(self, group: Supernode) -> Supernode:
        """A supernode with the features that it names by text found in the graph.

        Raises:
          InputError: for a name that the graph does not have, or without a graph.
        """
        if all(not isinstance(node, str) for node in group.nodes):
            return group
        if self.traced is None:
            raise InputError(
                f"supernode {group.name!r} names nodes in words, which needs the graph "
                "of the prompt: trace it first, or give (layer, position, feature)"
            )
        return with_features(self.traced, group)

    def change(self, edits: Sequence[Edit], *, n_later: int = 0) -> Change:
        """What edits change, with the rows of its features.

        Args:
          edits: made together.
          n_later: tokens that will be generated, which slices without an end cover.

        Raises:
          InputError: as `expand_edits`, `gather_features` and `acting`, or for a name
            that the graph does not have.
        """
        found = [
            edit
            if edit.supernode is None
            else dataclasses.replace(edit, supernode=self.named(edit.supernode))
            for edit in edits
        ]
        groups = expand_edits(found, n_tokens=self.n_tokens, n_later=n_later)
        edit_E = np.repeat(np.arange(len(found)), [len(group) for group in groups])
        features = self.gather([place for group in groups for place in group])
        factor_E, offset_E = np.array([edit.affine for edit in found])[edit_E].T
        change = Change.of(features, factor_E, offset_E)
        return acting(found, edit_E, change, self.n_tokens)

    def run(self, change: Change, layers: tuple[int, int], how: How) -> Run:
        """The whole pass of one patch."""
        change = batched(change, [len(change.factor_E)]).where(0)
        tables, change = self._placed(change, how)
        layers_2 = jnp.asarray(layers, jnp.int32)
        return _run(self.patchable, change, layers_2, how=how, tables=tables)

    def effects(
        self,
        change: Change,
        layers: Sequence[tuple[int, int]] | np.ndarray,
        how: How,
        ask: Ask,
        *,
        chunk: int | None = None,
        on_done: Callable[[int, int], None] = lambda done, total: None,
        heads: Heads | None = None,
    ) -> Effect:
        """B separate patches, measured; compiled once per shape.

        Args:
          change: of each patch, leaves with a leading B, see `batched`.
          layers: first and last layer of every patch's range.
          how: the semantics of all of them.
          ask: what to measure.
          chunk: patches run together, padded up to, so that batches of any length share
            a program; None: as many as fit, at most B.
          on_done: progress, (patches done, patches planned).
          heads: the only ones whose queries or keys see the changes, if there are any.

        Returns:
          The effects, numpy, with a leading B in the given order.
        """
        layers_B2 = np.asarray(layers, np.int32).reshape(-1, 2)
        tables, change = self._placed(change, how)
        how = how.of(self.patchable.coder)
        B, E = change.factor_E.shape

        def call(part: tuple[Change, np.ndarray]) -> Effect:
            return patch_chunk(self.patchable, *part, tables, ask, heads, how=how)

        order_B = np.lexsort((layers_B2[:, 1], layers_B2[:, 0]))
        size = chunk or min(chunk_size(self.patchable, E), B)
        return in_chunks(call, (change, layers_B2), order_B, size, on_done)

    def layer_range(
        self, layers: tuple[int, int] | None, layer_E: np.ndarray, mode: Mode
    ) -> tuple[int, int]:
        """The layer range of a patch: as given, or by default (`default_range`).

        Raises:
          InputError: for an empty range, or one outside the model.
        """
        L = self.model.cfg.n_layers
        if layers is None:
            span = self.patchable.coder.shape.span
            return default_range(layer_E, span=span, n_layers=L, mode=mode)
        first, last = layers
        if first > last:
            raise InputError(
                f"layers {first}:{last} are an empty range: both ends are included, "
                "give the smaller one first"
            )
        if first < 0 or last >= L:
            raise InputError(
                f"layers {first}:{last} are not in the model: it has layers 0 to "
                f"{L - 1}, both ends are included"
            )
        return first, last


_run = jit(patched, static_argnames="how")
