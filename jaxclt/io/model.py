"""The front door of models: name, path or hub id -> weights, config, tokenizer."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh

from jaxclt.errors import InputError, did_you_mean, shown
from jaxclt.files.digest import fingerprint
from jaxclt.io.bundled import MODELS, bundled
from jaxclt.io.fetch import KNOWN_MODELS, fetch
from jaxclt.io.gguf_file import open_gguf
from jaxclt.io.hub import download_model, parse_hub_id
from jaxclt.io.published import repositories
from jaxclt.io.tokenizer import Tokenizer, load_tokenizer
from jaxclt.io.weights_gguf import load_gguf
from jaxclt.io.weights_hf import load_hf, save_hf
from jaxclt.lm.config import LMConfig
from jaxclt.lm.sharding import kept_whole, leaf_shapes, model_mesh
from jaxclt.types import LMParams

__all__ = ["Model", "load_model", "save_hf"]

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"),
    *("chat_template.jinja", "chat_template.json"),
)
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Model:
    """A language model ready for use."""

    params: LMParams
    cfg: LMConfig
    tokenizer: Tokenizer
    name: str  # as the user gave it
    hash: str  # of its weights, config and tokenizer, see `jaxclt.files.digest`
    mesh: Mesh | None = None  # that its weights are split over; None: on one device

    def __repr__(self) -> str:
        """Its name and shape."""
        cfg = self.cfg
        return (
            f"Model({self.name!r}: {cfg.n_layers} layers of width {cfg.d_model}, "
            f"{cfg.n_heads} heads, {cfg.d_vocab} tokens, {self.params.embed_VD.dtype})"
        )


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    mesh: Mesh | int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Model:
    """Load a model.

    Args:
      name_or_path: a known name (bundled, or fetched when absent), a local directory
        in the Hugging Face layout or with one GGUF file in it, a .gguf file, or a hub
        id `organisation/name[@revision]`.
      dtype: of the weights: float32, bfloat16 or float16.
      mesh: split the weights over so many devices, or over a mesh, for a model that one
        cannot hold: each gets its share of heads, MLP neurons and vocabulary, read from
        the files by slices (`jaxclt.lm.sharding`).
      progress: called with one line per stage of a download, and for each kind of axis
        that the devices do not divide, which is then whole on each.

    Raises:
      InputError: for an unknown name, devices that are not there, and for whatever is
        wrong with the files.
    """
    if dtype not in _DTYPES:
        raise InputError(
            f"dtype {dtype!r} is unknown; use one of {', '.join(_DTYPES)}"
            f"{did_you_mean(dtype, _DTYPES)}"
        )
    mesh = None if mesh is None else model_mesh(mesh)
    path = _locate(name_or_path, progress)
    if path.is_dir() and not (path / "config.json").is_file():
        path = _only_gguf(path)
    read = _read_directory if path.is_dir() else _read_gguf
    params, cfg, tokenizer, files = read(path, dtype, mesh)
    tokenizer = _of_model(path, tokenizer, cfg.d_vocab)
    if mesh is not None and progress is not None:
        for line in kept_whole(leaf_shapes(params), mesh):
            progress(line)
    return Model(
        params=params,
        cfg=cfg,
        tokenizer=tokenizer,
        name=str(name_or_path),
        hash=fingerprint({file.name: file for file in files}),
        mesh=mesh,
    )


def _of_model(path: Path, tokenizer: Tokenizer, n_rows: int) -> Tokenizer:
    """A tokenizer that knows how many tokens the model has embeddings of.

    Tokens that were added to it later, as Gemma 3's mark of an image, may have none.

    Raises:
      InputError: if it was learned with more tokens than that.
    """
    backend = tokenizer.backend
    # Only then: a large vocabulary takes a while to list.
    if tokenizer.vocab_size > n_rows:
        without = {i for i in backend.get_vocab().values() if i >= n_rows}
        if without - backend.added_tokens_decoder.keys():
            raise InputError(
                f"{path}: the tokenizer has {tokenizer.vocab_size} tokens but the "
                f"model only {n_rows}; they do not belong together"
            )
    return dataclasses.replace(tokenizer, n_rows=n_rows)


_Parts = tuple[LMParams, LMConfig, Tokenizer, list[Path]]


def _read_directory(path: Path, dtype: str, mesh: Mesh | None) -> _Parts:
    params, cfg = load_hf(path, dtype=dtype, mesh=mesh)
    files = [path / "config.json", *path.glob("*.safetensors")]
    return params, cfg, load_tokenizer(path), files + _tokenizer_files(path)


def _read_gguf(path: Path, dtype: str, mesh: Mesh | None) -> _Parts:
    file = open_gguf(path)
    params, cfg = load_gguf(file, dtype=dtype, mesh=mesh)
    files, folder = [path], path.parent
    if (folder / "tokenizer.json").is_file():  # preferred to what the file itself says
        files += _tokenizer_files(folder)
    return params, cfg, load_tokenizer(file), files


def _tokenizer_files(folder: Path) -> list[Path]:
    """What `load_tokenizer` reads of a folder."""
    there = (folder / name for name in _TOKENIZER_FILES)
    return [file for file in there if file.is_file()]


def _locate(
    name_or_path: str | os.PathLike[str], progress: Callable[[str], None] | None
) -> Path:
    """The local file or directory that a name, path or hub id stands for."""
    name = str(name_or_path)
    if (inside := bundled(name)) is not None:
        return inside
    if name in KNOWN_MODELS:
        return fetch(name, progress=progress)
    path = Path(os.path.expanduser(name))
    if name and os.path.exists(path):  # not for a name that no file can have
        return path
    hub = parse_hub_id(name)
    if hub and not name.endswith(".gguf"):
        try:
            return download_model(name)
        except InputError as error:
            hint = did_you_mean(hub[0], repositories("model"))
            raise InputError(f"{error}{hint}") from error
    known = (*MODELS, *KNOWN_MODELS)
    raise InputError(
        f"no model {shown(name)}: it is neither a file nor a directory, and the "
        f"known names are {', '.join(known)}{did_you_mean(name, known)}"
    )


def _only_gguf(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise InputError(
            f"{folder} holds no config.json and {len(found)} .gguf files; give one file"
        )
    return found[0]
