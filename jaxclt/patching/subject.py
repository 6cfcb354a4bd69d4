"""A prompt, traced or not, becomes a model that is ready to be changed.

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

import jax
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
from jaxclt.graph.graph import Graph
from jaxclt.graph.memory import available_bytes
from jaxclt.graph.supernodes import with_features
from jaxclt.graph.targets import salient_targets
from jaxclt.io.dictionary import load_dictionary
from jaxclt.io.graph_file import load_graph
from jaxclt.io.model import Model, load_model
from jaxclt.patching.batch import (
    How,
    Local,
    default_range,
    make_local,
    make_patchable,
    patch_many,
)
from jaxclt.patching.edits import (
    Change,
    Edit,
    Edits,
    acting,
    batch_edits,
    changes_of,
    make_edits,
)
from jaxclt.patching.effects import Ask, Effect, measure_effect
from jaxclt.patching.features import Features, gather_features
from jaxclt.patching.modes import Gates, Mode, Patchable
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
      InputError: if the directory is no trace, or the weights found are others.
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
        with jax.default_matmul_precision("highest"):
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
                "this takes the graph of the prompt, not it alone: trace it first"
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
        return self.local_with(None)

    def local_with(self, also: np.ndarray | None) -> Local:
        """Tables that also hold some (layer, feature) rows."""
        return make_local(self.dictionary, self.patchable, self.active, also=also)

    def local_for(self, single: Sequence[Change]) -> tuple[Local, np.ndarray]:
        """Tables that hold the features of some changes, and where these are."""
        local = self.local
        pair_E2 = np.array([(c[0], c[2]) for c in single], int).reshape(-1, 2)
        if any(f not in local.feature_LU[l] for l, f in pair_E2):
            local = self.local_with(pair_E2)
        return local, local.slots(*pair_E2.T)

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
    def answers(self) -> tuple[np.ndarray, list[str]]:
        """Tokens that patches are measured on, int32, and their texts.

        The graph's targets; without a graph those that `trace` would choose.
        """
        if self.traced is not None:
            chosen = self.traced.meta.target_tokens
            token_K = self.traced.target_token_K[self.targets]
            return token_K, [chosen[k] for k in self.targets]
        out_D = self.patchable.recording.out_TD[-1]
        with jax.default_matmul_precision("highest"):
            token_K = np.asarray(salient_targets(self.model.params, out_D).token_K)
        return token_K, self.model.tokenizer.token_strings(token_K.tolist())

    @property
    def n_tokens(self) -> int:
        """T."""
        return len(self.patchable.recording.token_T)

    def watch(self, nodes: np.ndarray) -> Features:
        """Rows of the graph's features by slot."""
        g = self.graph
        node_W3 = np.stack([g.layer_A, g.pos_A, g.feature_A], 1)[nodes]
        return self.gather(node_W3)

    def gather(self, node_E3: np.ndarray) -> Features:
        """Rows of any features."""
        return gather_features(
            self.dictionary,
            self.model.params,
            self.patchable.recording,
            node_E3,
            cfg=self.model.cfg,
        )

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
                f"supernode {group.name!r} names nodes in words, which takes the graph "
                "of the prompt: trace it first, or give (layer, position, feature)"
            )
        return with_features(self.traced, group)

    def single(self, edits: Sequence[Edit], *, n_later: int = 0) -> list[Change]:
        """The single changes that edits make, see `expand_edits` and `acting`.

        Args:
          edits: made together.
          n_later: tokens that will be generated, which slices without an end cover.

        Raises:
          InputError: as these two and `make_edits`, or for a name that the graph does
            not have.
        """
        found = [
            edit
            if edit.supernode is None
            else dataclasses.replace(edit, supernode=self.named(edit.supernode))
            for edit in edits
        ]
        groups = changes_of(found, n_tokens=self.n_tokens, n_later=n_later)
        made = self.edits([change for group in groups for change in group])
        value_E = np.asarray(made.features.value_E)
        return acting(found, groups, value_E, self.n_tokens)

    def edits(self, single: Sequence[Change]) -> Edits:
        """The pytree of single changes (layer, position, feature, factor, offset)."""
        return make_edits(
            single,
            self.dictionary,
            self.model.params,
            self.patchable.recording,
            cfg=self.model.cfg,
        )

    def how(
        self,
        mode: Mode = "constrained",
        *,
        freeze_pattern: bool = True,
        freeze_norm: bool = False,
        gates: Gates | None = None,
    ) -> How:
        """Semantics; neurons keep their gates unless asked, as in the graph."""
        gated = self.patchable.coder.gated
        return How(
            mode=mode,
            freeze_pattern=freeze_pattern,
            freeze_norm=freeze_norm,
            gates=gates or ("frozen" if gated else "live"),
        )

    def effects(
        self,
        many: Sequence[Sequence[Change]],
        layers: Sequence[tuple[int, int]],
        how: How,
        ask: Ask,
        *,
        chunk: int | None = None,
        on_done: Callable[[int, int], None] = lambda done, total: None,
    ) -> Effect:
        """Separate patches (each some single changes), measured; numpy, leading B."""
        flat = [change for one in many for change in one]
        whole = self.edits(flat)
        ends = np.cumsum([len(one) for one in many])
        parts = [
            jax.tree.map(lambda x, a=a, b=b: np.asarray(x)[a:b], whole)
            for a, b in zip([0, *ends[:-1]], ends, strict=True)
        ]
        edits = batch_edits(parts)
        local = slot_BE = None
        if how.mode == "iterative":
            local, slot_N = self.local_for(flat)
            slot_BE = np.zeros(edits.factor_E.shape, np.int32)
            sizes = np.diff(ends, prepend=0)[:, None]
            filled = np.arange(slot_BE.shape[1])[None] < sizes
            slot_BE[filled] = slot_N
        with jax.default_matmul_precision("highest"):
            return patch_many(
                self.patchable,
                edits,
                np.asarray(layers, np.int32).reshape(-1, 2),
                how=how,
                measure=measure_effect,
                ask=ask,
                local=local,
                slot_BE=slot_BE,
                chunk=chunk,
                on_done=on_done,
            )

    def check_range(
        self, layers: tuple[int, int] | None, layer_E: np.ndarray, mode: Mode
    ) -> tuple[int, int]:
        """The layer range of a patch.

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
