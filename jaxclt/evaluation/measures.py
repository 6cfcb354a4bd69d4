"""The measures of one dictionary, each kept in a file of its own.

A file says what it depends on: an interrupted evaluation goes on where it was.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxclt.clt.coder import Dictionary, Loaded, load
from jaxclt.dashboards.examples import Examples
from jaxclt.dashboards.stream import gather_examples
from jaxclt.errors import (
    check_at_least,
    check_choice,
    check_finite,
    check_positive,
    check_share,
)
from jaxclt.evaluation.concepts import readable
from jaxclt.evaluation.graphs import graph_means, graph_row
from jaxclt.evaluation.judges import Judge
from jaxclt.evaluation.judging import Questions, interpretability
from jaxclt.evaluation.prompts import EvalText, unsure
from jaxclt.files.atomic import write_text
from jaxclt.files.json_file import json_schema, record
from jaxclt.files.json_text import finite, to_json
from jaxclt.graph.attribute import AttributeConfig
from jaxclt.graph.graph import Graph
from jaxclt.io.model import Model
from jaxclt.patching.subject import Subject
from jaxclt.replacement.agreement import Compared, compare, compare_layers
from jaxclt.replacement.reconstruction import (
    Reconstruction,
    decoder_reach,
    reconstructed,
)
from jaxclt.runs.kept import digest, intact_json
from jaxclt.text.prompts import Given
from jaxclt.text.windows import batches
from jaxclt.trace.prompt import trace_prompt
from jaxclt.train.harvest import harvest
from jaxclt.validation.faithfulness import by_distance, faithfulness
from jaxclt.validation.stats import ratio_interval
from jaxclt.version import __version__

__all__ = ["EvalOptions", "Measures", "Stage"]

Stage = Callable[[str, int, int], None]
Part = tuple[dict[str, Any], list[dict[str, Any]]]  # the row's share, raw rows

BATCH_BYTES = 1 << 28  # of dense activations of all layers

# What each measure depends on: another setting does not undo it.
_PART = json_schema(
    record(
        {
            "row": {"type": "object"},
            "raw": {"type": "array", "items": {"type": "object"}},
            "seconds": {"type": "number"},
        }
    )
)
_OPTIONS = {
    "reconstruction": ("tokens", "seed"),
    "agreement": ("agreement_tokens", "seed"),
    "layers": ("layer_tokens",),
    "graphs": ("max_features", "tolerance", "seed"),
    "faithfulness": ("max_features", "tolerance", "perturbed", "seed"),
    "judged": ("sort", "contrastive", "seed"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """How much to measure.

    Raises:
      InputError: for a value out of its range.
    """

    tokens: int = 8_192  # reconstruction, and what features are judged by
    agreement_tokens: int = 2_048  # replacement model
    layer_tokens: int = 128  # the same for each layer by itself; 0: not
    graphs: int = 16  # prompts
    filter: Literal["auto", "paper", "none"] = "auto"  # of prompts out of text
    lengths: tuple[int, int] = (8, 16)  # tokens of a prompt out of text
    max_features: int = 512  # of a graph
    tolerance: float = 0.02
    perturbed: int = 3  # prompts on which perturbations are followed
    sort: int = 200  # trials
    contrastive: int = 200
    # Thresholded neurons with so many times the transcoders' active features.
    baselines: tuple[float, ...] = (1.0, 4.0)
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(
            1,
            tokens=self.tokens,
            agreement_tokens=self.agreement_tokens,
            max_features=self.max_features,
        )
        check_at_least(
            0,
            layer_tokens=self.layer_tokens,
            graphs=self.graphs,
            perturbed=self.perturbed,
            sort=self.sort,
            contrastive=self.contrastive,
        )
        check_choice("filter", self.filter, ("auto", "paper", "none"))
        check_share(zero=True, one=False, tolerance=self.tolerance)
        for factor in self.baselines:
            check_positive(baselines=factor)
        check_finite(seed=self.seed)


@dataclasses.dataclass(kw_only=True, eq=False)
class Measures:
    """One dictionary, and where its measures are kept."""

    model: Model
    dictionary: Dictionary
    text: EvalText
    prompts: list[Given]
    options: EvalOptions
    out: Path | None
    on_stage: Stage
    # Graphs that are perturbed as well.
    _held: dict[int, Graph] = dataclasses.field(default_factory=dict, init=False)

    @cached_property
    def key(self) -> jax.Array:
        """Of everything drawn."""
        return jax.random.key(self.options.seed)

    @cached_property
    def loaded(self) -> Loaded:
        """The dictionary in memory, read when it is first needed."""
        return load(self.dictionary, self.model.params, self.model.cfg)

    def progress(self, what: str) -> Callable[[int, int], None]:
        """Progress of one measure."""
        return lambda done, total: self.on_stage(
            f"{self.dictionary.name}: {what}", done, total
        )

    def kept(
        self, name: str, measure: Callable[[], Part], depends: str
    ) -> tuple[dict[str, Any], list[dict[str, Any]], float]:
        """A measure from its file if that is of exactly this, else measured."""
        settings = dataclasses.asdict(self.options)
        prompts = [x if isinstance(x, str) else list(x) for x in self.prompts]
        identity = [
            *(self.model.hash, self.dictionary.hash, self.dictionary.name),
            *(self.text.digest, name, depends, __version__),
            [settings[option] for option in _OPTIONS[name]],
            prompts if "max_features" in _OPTIONS[name] else None,
        ]
        part = f"{digest(identity)[:24]}.json"
        file = None if self.out is None else self.out / "parts" / part
        if file is not None and (old := intact_json(file, _PART)):
            return old["row"], old["raw"], old["seconds"]
        start = time.perf_counter()
        row, raw = measure()
        took = round(time.perf_counter() - start, 1)
        row, raw = finite(row), finite(raw)
        # What a judge was not asked yet is asked by the next run; its log has the rest.
        open_ = any(score["not_asked"] for score in row.get("judged", {}).values())
        if file is not None and not open_:
            kept = {"row": row, "raw": raw, "seconds": took, "measure": name}
            write_text(file, to_json(kept))
        return row, raw, took

    def row(self, judge: Judge | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """All measures that are asked for."""
        stages: dict[str, Callable[[], Part]] = {
            "reconstruction": self.reconstruction,
            "agreement": self.agreement,
        }
        if self.options.layer_tokens:
            stages["layers"] = self.layers
        if self.prompts:
            stages["graphs"] = self.graphs
        if self.prompts and self.options.perturbed:
            stages["faithfulness"] = self.faithfulness
        depends = ""
        if judge is not None:
            stages["judged"] = lambda: self.judged(judge)
            depends = f"{judge.name} {self.text.pairs}"
        row, lines, seconds = self.described(), [], {}
        for name, measure in stages.items():
            found, raw, seconds[name] = self.kept(
                name, measure, depends if name == "judged" else ""
            )
            intervals = row["intervals"] | found.pop("intervals", {})
            row |= found | {"intervals": intervals}
            head = {"dictionary": self.dictionary.name, "measure": name}
            lines += [head | line for line in raw]
        return row | {"seconds": seconds}, lines

    def described(self) -> dict[str, Any]:
        """What a dictionary is."""
        size, dec_LFMD = self.loaded.coder.shape, self.loaded.weights.dec
        kind = "clt" if size.span > 1 else "plt"
        shape: dict[str, Any] = {
            "kind": "neurons" if dec_LFMD is None else kind,
            "span": size.span,
            "features": size.n_features,
        }
        if dec_LFMD is not None:
            shape["decoder_reach"] = decoder_reach(dec_LFMD)
        return {"dictionary": self.dictionary.name, **shape, "intervals": {}}

    # -- measures ----------------------------------------------------------------------

    def reconstruction(self) -> Part:
        """FVU, L0, silent and dense features."""
        model, windows = self.model, self.text.windows
        per_token = 4 * model.cfg.n_layers * self.loaded.n_features
        n_tokens = max(windows.token_WS.shape[1], BATCH_BYTES // per_token)
        report, parts = self.progress("reconstruction"), []
        for token_WS, mask_WS, done in batches(windows, 0, min(n_tokens, 2048)):
            read_LTD, write_LTD, _ = harvest(
                model.params,
                jnp.asarray(token_WS),
                None,
                cfg=model.cfg,
                site=self.loaded.coder.site,
            )
            found = reconstructed(
                self.loaded,
                read_LTD,
                write_LTD,
                mask_WS.reshape(-1),
                n_groups=len(token_WS),
                params=model.params,
            )
            parts.append(found)
            report(int(windows.mask_WS[:done].sum()), windows.n_tokens)
        found = Reconstruction.joined(parts).where_tokens()
        W = len(found.token_W)
        draw = np.asarray(jax.random.randint(self.key, (200, W), 0, W))
        fvu = [float(found.fvu_L(d).mean()) for d in draw] if W > 1 else []
        l0 = [found.l0(d) for d in draw] if W > 1 else []
        lines = [{"window": w, "fvu": x} for w, x in enumerate(found.fvu_W())]
        intervals = {"fvu": _quantiles(fvu), "l0": _quantiles(l0)}
        return found.summary() | {"intervals": intervals}, lines

    def agreement(self) -> Part:
        """The replacement model, with the first position's MLPs and without."""
        text = self.text
        asked_W = np.cumsum(text.ask_WS.sum(1))
        text = text.take(
            int(np.searchsorted(asked_W, self.options.agreement_tokens)) + 1
        )
        W, report = len(text.windows.token_WS), self.progress("replacement model")

        row: dict[str, Any] = {"intervals": {}}
        lines = [{"window": w} for w in range(W)]
        both = compare(
            self.model.params,
            self.loaded,
            text.windows.token_WS,
            cfg=self.model.cfg,
            keep_first=(True, False),
            on_windows=report,
        )
        for name, found in zip(("", "_strict"), both, strict=True):
            unsure_WS = unsure(found.model_WS, found.confidence_WS, text.next_WS)
            for kind, ask_WS in (
                ("", text.ask_WS),
                ("_filtered", text.ask_WS & unsure_WS),
            ):
                self._count(found, ask_WS, name + kind, row, lines)
            known_WS = text.ask_WS & (text.next_WS >= 0)
            if known_WS.any() and not name:
                right = (found.found_WS == text.next_WS)[known_WS]
                row["accuracy"] = float(right.mean())
                model_right = (found.model_WS == text.next_WS)[known_WS]
                row["model_accuracy"] = float(model_right.mean())
        return row, lines

    def _count(
        self,
        found: Compared,
        ask_WS: np.ndarray,
        name: str,
        row: dict[str, Any],
        lines: list[dict[str, Any]],
    ) -> None:
        """Means and intervals over windows of one set of positions."""
        n_W = ask_WS.sum(1)
        row[f"n{name}"] = int(n_W.sum())
        for what, value_WS in (("top1", found.same_WS), ("kl", found.kl_WS)):
            sum_W = np.where(ask_WS, value_WS, 0).sum(1)
            key = what + name
            row[key] = float(sum_W.sum() / n_W.sum()) if n_W.sum() else math.nan
            row["intervals"][key] = ratio_interval(sum_W, n_W, self.key)
            for line, value in zip(lines, sum_W, strict=True):
                line[key] = float(value)
        for line, n in zip(lines, n_W, strict=True):
            line[f"n{name}"] = int(n)

    def layers(self) -> Part:
        """The model with one layer replaced at a time."""
        asked_W = np.cumsum(self.text.ask_WS.sum(1))
        wanted = self.options.layer_tokens
        text = self.text.take(max(1, int(np.searchsorted(asked_W, wanted, "right"))))
        same_LWS, kl_LWS = compare_layers(
            self.model.params,
            self.loaded,
            text.windows.token_WS,
            cfg=self.model.cfg,
            on_layer=self.progress("layer by layer"),
        )
        return {
            "layer_kl_L": kl_LWS[:, text.ask_WS].mean(1),
            "layer_top1_L": same_LWS[:, text.ask_WS].mean(1),
        }, []

    def graphs(self) -> Part:
        """Scores of the graphs of all prompts."""
        lines, report, n = [], self.progress("graphs"), len(self.prompts)
        for i in range(n):
            graph = self._traced(i, lambda *_, i=i: report(i, n))
            lines.append(graph_row(graph))
            report(i + 1, n)
        return graph_means(lines, self.key), lines

    def _traced(self, i: int, on_rows: Callable[[int, int], None]) -> Graph:
        """The graph of a prompt; those that are perturbed too are made once."""
        if i in self._held:
            return self._held[i]
        graph = trace_prompt(
            self.model,
            self.dictionary,
            self.prompts[i],
            on_rows=on_rows,
            config=AttributeConfig(
                max_features=self.options.max_features,
                tolerance=self.options.tolerance,
            ),
        ).graph
        if i < self.options.perturbed:
            self._held[i] = graph
        return graph

    def faithfulness(self) -> Part:
        """How perturbations spread, by layers between."""
        lines, report = [], self.progress("perturbations")
        n = min(self.options.perturbed, len(self.prompts))
        for i in range(n):
            graph = self._traced(i, lambda *_, i=i: report(i, n))
            subject = Subject.of(self.model, self.dictionary, graph)
            tables, layers = faithfulness(
                subject,
                jax.random.fold_in(self.key, i),
                n_layers=5,
                n_perturbed=2,
                variants=("frozen",),
                on_batch=lambda _, i=i: report(i, n),
            )
            lines.append({"layers": layers, "tables": tables})
            report(i + 1, n)
        return {"faithfulness": by_distance(lines)}, lines

    def judged(self, judge: Judge) -> Part:
        """Sort and Contrastive Evals; the trials are logged in ``judged/``."""
        model, options = self.model, self.options
        examples = gather_examples(
            model.params,
            self.loaded,
            self.text.windows,
            on_tokens=self.progress("examples of features"),
        )
        folder = re.sub(r"[^A-Za-z0-9@.-]+", "-", self.dictionary.name).strip("-.")
        questions = Questions(
            sort=options.sort,
            contrastive=options.contrastive,
            pairs=readable(model, self.text.pairs or ()),
            seed=options.seed,
        )
        scores = interpretability(
            judge,
            examples,
            self.loaded,
            model,
            questions,
            log_dir=None if self.out is None else self.out / "judged" / folder,
            directions_UD=self._directions(examples),
            on_trial=lambda name, done, n: self.progress(f"{name} trials")(done, n),
        )
        row: dict[str, Any] = {"judge": scores.pop("judge"), "judged": scores}
        row["intervals"] = {}
        for name, score in scores.items():
            row[name] = score["accuracy"]
            row["intervals"][name] = score["interval"]
        return row, []

    def _directions(self, examples: Examples) -> np.ndarray:
        """What each feature writes to its own layer's MLP output, [U, D]."""
        layer_U, dtype = examples.layer_U, self.model.params.embed_VD.dtype
        parts = [
            self.dictionary.decoders(
                self.model.params, int(layer), examples.feature_U[layer_U == layer]
            )[:, 0].astype(dtype)
            for layer in np.unique(layer_U)
        ]
        return np.concatenate(parts)


def _quantiles(x: Sequence[float]) -> list[float]:
    return np.quantile(x, [0.025, 0.975]).tolist() if x else [math.nan] * 2
