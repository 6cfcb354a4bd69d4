"""The shell of feature dashboards: text becomes files of what features respond to.

text --windows--> TokenWindows --dashboards.stream--> Examples --documents, files-->
  features/index.json.gz, features/layer_x.bin, report.json

The directory also keeps the pass itself, `seen.npz`: an interrupted run goes on where
it was, in the text or in the files, and the files come out the same to the byte.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxclt.clt.coder import Dictionary, load
from jaxclt.dashboards import files
from jaxclt.dashboards.documents import feature_document, validate
from jaxclt.dashboards.examples import Examples
from jaxclt.dashboards.logits import TokenEffects, vocabulary_effects
from jaxclt.dashboards.stream import (
    STATE,
    ExampleOptions,
    digest_of,
    gather_examples,
)
from jaxclt.errors import InputError, check_at_least
from jaxclt.files.atomic import is_temporary, write_text
from jaxclt.files.json_file import read_json
from jaxclt.files.json_text import to_json
from jaxclt.io.model import Model
from jaxclt.runs.kept import claimed
from jaxclt.runs.pace import logged
from jaxclt.text.features import Features, choose_features
from jaxclt.text.windows import Data, Mask, TokenWindows, read_windows

__all__ = ["FeatureOptions", "feature_dashboards"]

REPORT = "report.json"
# What files depend on, as run.json and report.json have it.
SETTINGS = ("excerpt", "top", "drawn", "bins", "histogram_every")
SETTINGS += ("logits", "loose", "seed")
TOLD = 256  # records between two reports of progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureOptions(ExampleOptions):
    """How much text to look at, and what to show of each feature.

    Raises:
      InputError: for a number out of its range.
    """

    tokens: int = 1_000_000
    """Tokens of text to look at; first positions and special tokens do not count."""
    context: int = 256
    """Tokens of a window of text."""
    logits: int = 10
    """Tokens listed that a feature raises most, and that it lowers most."""
    loose: bool = False
    """Also write one file per feature, features/NUMBER.json."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, tokens=self.tokens, context=self.context)
        check_at_least(0, logits=self.logits)


def feature_dashboards(
    model: Model,
    dictionary: Dictionary,
    data: Data | TokenWindows,
    out: str | os.PathLike[str],
    options: FeatureOptions | None = None,
    *,
    features: Features = "all",
    mask: Mask = None,
    on_stage: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, Any], Examples]:
    """What features respond to in text, as files that viewers read.

    Args:
      model: from `load_model`.
      dictionary: from `load_dictionary`, of any kind.
      data: a text source or windows, see `read_windows`.
      out: directory; a second call with the same arguments goes on.
      options: how much of what.
      features: which, see `choose_features`.
      mask: which positions count, see `read_windows`.
      on_stage: progress, (what, done, in all); to the log if not given.

    Returns:
      The report (see report.json) and the examples.

    Raises:
      InputError: for more memory than is free, or a directory of another run.
    """
    options = options or FeatureOptions()
    out, tell = Path(out), on_stage or logged()
    started = time.perf_counter()
    windows = read_windows(
        model,
        data,
        mask=mask,
        tokens=options.tokens,
        context=options.context,
        on_tokens=partial(tell, "tokens"),
    )
    subset = choose_features(
        model, dictionary, features, windows, partial(tell, "features")
    )
    encoder = load(dictionary, model.params, model.cfg, decoders=False)
    settings = {name: getattr(options, name) for name in SETTINGS}
    hashes = {
        "model": model.hash,
        "dictionary": dictionary.hash,
        # Neurons of one model differ by which of them count.
        "neurons": dictionary.name if encoder.coder.gated else "",
    }
    identity = {
        **hashes,
        "windows": windows.digest,
        "features": digest_of(subset),
        **settings,
    }
    passed = time.perf_counter()
    counted: list[int] = []

    def on_tokens(done: int, total: int) -> None:
        tell("examples", done, total)
        counted.append(done)

    with claimed(out, identity, (STATE, "features")):
        examples = gather_examples(
            model.params,
            encoder,
            windows,
            options,
            subset=subset,
            state=out,
            identity=hashes,
            on_tokens=on_tokens,
        )
    pass_s = time.perf_counter() - passed
    folder, on_layer = out / "features", partial(tell, "files")
    _write_features(model, dictionary, examples, folder, options, on_layer)
    new, report = counted[-1] - counted[0], out / REPORT
    if not new and report.is_file():
        # Nothing was left to do: the seconds are those of the run that did it.
        return read_json(report), examples
    found = {
        "schema": 1,
        "model": model.name,
        "dictionary": dictionary.name,
        "hashes": {k: identity[k] for k in ("model", "dictionary", "windows")},
        "settings": settings | {"context": windows.token_WS.shape[1]},
        "tokens": windows.n_tokens,
        "windows": len(windows.token_WS),
        "features": len(subset),
        "never_active": float((examples.count_U == 0).mean()),
        "active_share": float(examples.frequency.mean()),
        "seconds": {
            "pass": round(pass_s, 3),
            "all": round(time.perf_counter() - started, 3),
        },
        "bytes": {
            "state": (out / STATE).stat().st_size,
            "features": sum(
                x.stat().st_size for x in folder.iterdir() if not is_temporary(x.name)
            ),
        },
        "tokens_per_second": round(new / pass_s, 1),  # compiling included
    }
    write_text(report, to_json(found, indent=1) + "\n")
    return found, examples


def _write_features(
    model: Model,
    dictionary: Dictionary,
    examples: Examples,
    folder: Path,
    options: FeatureOptions,
    on_layer: Callable[[int, int], None],
) -> None:
    """Write the feature files of some examples; layers that have a file are kept."""
    token_N = np.arange(model.cfg.d_vocab)
    strings = model.tokenizer.token_strings(token_N.tolist())
    shape = dictionary.coder(model.cfg).shape
    offsets: dict[int, list[int]] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for layer in range(shape.n_layers):
        row_N = np.flatnonzero(examples.layer_U == layer)
        feature_N = examples.feature_U[row_N]
        path = folder / files.layer_file(layer)
        if not path.is_file():
            effects = vocabulary_effects(
                dictionary, model.params, layer, feature_N, k=options.logits
            )
            documents = _documents(examples, row_N, effects, strings, dictionary.name)

            def records(
                layer: int = layer,
                feature_N: np.ndarray = feature_N,
                documents: Iterator[bytes] = documents,
            ) -> Iterator[bytes]:
                for i, document in enumerate(documents):
                    if i and not i % TOLD:
                        on_layer(layer, shape.n_layers)
                    if options.loose:
                        # Not forced to disk one by one: the layer's file, which is,
                        # comes after them.
                        name = f"{files.cantor(layer, int(feature_N[i]))}.json"
                        (folder / name).write_bytes(document)
                    yield files.pack(document)

            files.write_layer(folder, layer, records())
        found = files.read_offsets(path)
        count_F = np.zeros(shape.n_features, np.int64)
        count_F[feature_N] = 1
        if len(found) != len(feature_N) + 1:
            raise InputError(f"{path} is of other features: remove it")
        # A feature without a record starts where the next one does.
        offsets[layer] = [0] + [found[i] for i in np.cumsum(count_F).tolist()]
        on_layer(layer + 1, shape.n_layers)
    files.write_index(folder, offsets)


def _documents(
    examples: Examples,
    row_N: np.ndarray,
    effects: TokenEffects,
    strings: list[str],
    name: str,
) -> Iterator[bytes]:
    """The documents of a layer's features; the first is checked."""
    for i, u in enumerate(row_N.tolist()):
        top, bottom = (
            [strings[t] for t in token_NK[i].tolist()]
            for token_NK in (effects.top_NK, effects.bottom_NK)
        )
        document = feature_document(
            examples,
            u,
            strings,
            top_logits=top,
            bottom_logits=bottom,
            transcoder_id=name,
        )
        if not i:
            validate(document)
        yield document
