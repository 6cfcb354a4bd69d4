"""Gemma Scope's own repositories: many dictionaries beside each other, no config.yaml.

layer_3/width_16k/average_l0_54/params.npz                            Gemma Scope
transcoder_all/layer_3_width_16k_l0_small_affine/params.safetensors   Gemma Scope 2
clt/width_262k_l0_medium_affine/params_layer_3.safetensors            its CLTs

A dictionary of all layers is named by what is left of the files' names without the
layer: ``width_16k/average_l0_70``, ``transcoder_all/width_16k_l0_small_affine``. Gemma
Scope has other average L0s in each layer, and 70 stands for the nearest one there;
it is said which one that is. A name that leaves a choice is refused with what there is.

What features read and write: Gemma Scope 2 says so beside the weights, in config.json.
Gemma Scope does not, and its residual SAEs look the same: there `published.toml` says
it, or a config.yaml that is put beside the folders of layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxclt.errors import InputError
from jaxclt.files.json_file import read_json
from jaxclt.files.yaml_file import read_yaml
from jaxclt.io.formats.circuit_tracer import CONFIG, open_described
from jaxclt.io.formats.fields import (
    HOOK_OF_READ,
    HOOK_OF_WRITE,
    READS,
    WRITES,
    check_fields,
    of_layer,
)
from jaxclt.io.formats.layouts import CLT, PLT
from jaxclt.io.formats.pieces import FileStore

__all__ = ["chosen_files", "is_scope", "open_scope"]


class _Shelf(NamedTuple):
    """One way of naming the files of many dictionaries."""

    file: re.Pattern[str]  # its groups: the layer, and what `choice` is made of
    choice: str
    glob: str
    model_kind: str
    beside: str | None = None  # says what features read and write, or
    hooks: Mapping[str, str] = {}  # all do the same, or else nothing says it

    def choice_of(self, found: re.Match[str]) -> str:
        """The dictionary that a file belongs to."""
        return self.choice.format(**found.groupdict())


_LAYER = r"layer_(?P<layer>\d{1,4})"
_WIDTH = r"(?P<width>width_\w+)"
_SHELVES = (
    _Shelf(
        re.compile(rf"{_LAYER}/{_WIDTH}/(?P<l0>average_l0_\d{{1,6}})/params\.npz"),
        "{width}/{l0}",
        "layer_*/width_*/average_l0_*/params.npz",
        PLT,
    ),
    _Shelf(
        re.compile(rf"(?P<kind>transcoder\w*)/{_LAYER}_{_WIDTH}/params\.safetensors"),
        "{kind}/{width}",
        "transcoder*/layer_*/params.safetensors",
        PLT,
        beside="config.json",
    ),
    _Shelf(
        re.compile(rf"(?P<kind>clt\w*)/{_WIDTH}/params_{_LAYER}\.safetensors"),
        "{kind}/{width}",
        "clt*/width_*/params_layer_*.safetensors",
        CLT,
        # as circuit-tracer's lists of them have it
        hooks={
            "feature_input_hook": "mlp.hook_in",
            "feature_output_hook": "hook_mlp_out",
        },
    ),
)
_NAME = re.compile(r"(width_\w+(/average_l0_\d+)?)|((transcoder|clt)\w*(/width_\w+)?)")
_NEAREST = re.compile(r"(?P<of>.+)/average_l0_(?P<l0>\d{1,6})")


class _Book(NamedTuple):
    """A file of weights on a shelf."""

    shelf: _Shelf
    choice: str
    layer: int
    file: str

    @property
    def beside(self) -> str | None:
        """The config of this file."""
        folder = self.file.rpartition("/")[0]
        return self.shelf.beside and f"{folder}/{self.shelf.beside}"


def _books(names: Iterable[str]) -> list[_Book]:
    matches = ((shelf, shelf.file.fullmatch(x)) for x in names for shelf in _SHELVES)
    return [
        _Book(shelf, shelf.choice_of(found), int(found["layer"]), found[0])
        for shelf, found in matches
        if found
    ]


def _l0(choice: str) -> int:
    return int(choice.rpartition("_")[2])


def _choose(books: Sequence[_Book], wanted: str, where: str) -> list[_Book]:
    """One file for each layer, in order.

    Raises:
      InputError: if the name fits none, leaves a choice, or a layer is missing.
    """
    fits = [x for x in books if x.choice == wanted or not wanted]
    fits = fits or [x for x in books if x.choice.startswith(f"{wanted}/")]
    nearest = _NEAREST.fullmatch(wanted)
    if nearest is not None:
        of, target = nearest["of"], int(nearest["l0"])
        fits = [x for x in books if x.choice.startswith(f"{of}/average_l0_")]
        # of two that are as near, the sparser one
        fits.sort(key=lambda x: (abs(_l0(x.choice) - target), _l0(x.choice)))
        fits = list({x.layer: x for x in reversed(fits)}.values())
    if not fits:
        raise InputError(f"{where} has no {wanted}; it has {_listed(books)}")
    by_layer = {x.layer: x for x in fits}
    if len(by_layer) < len(fits):
        # The line must hold some of the choices, however long a path is.
        brief = where if len(where) <= 40 else f"...{where[-37:]}"
        raise InputError(
            f"{brief}{wanted and f'//{wanted}'} leaves a choice: name one of "
            f"{_listed(fits)}"
        )
    n_layers = 1 + max(x.layer for x in books)
    missing = sorted(set(range(n_layers)) - set(by_layer))
    if missing:
        raise InputError(
            f"{where}//{fits[0].choice} has no layer {missing[0]}, but a dictionary "
            f"covers all; there is {_listed(books)}"
        )
    return [by_layer[layer] for layer in range(n_layers)]


def _listed(books: Sequence[_Book]) -> str:
    """What may be named: dictionaries, or for L0s of each layer those of all."""
    plain = sorted({x.choice for x in books if not _NEAREST.fullmatch(x.choice)})
    l0s: dict[str, dict[int, list[int]]] = {}
    for x in books:
        if found := _NEAREST.fullmatch(x.choice):
            l0s.setdefault(found["of"], {}).setdefault(x.layer, []).append(
                _l0(x.choice)
            )
    for of, by_layer in sorted(l0s.items()):
        each = "; ".join(
            f"layer {layer}: {', '.join(map(str, sorted(by_layer[layer])))}"
            for layer in sorted(by_layer)
        )
        plain.append(f"{of}/average_l0_N, the nearest to N in each layer ({each})")
    return ", ".join(plain)


def chosen_files(names: Sequence[str], wanted: str, where: str) -> list[str] | None:
    """Files of a repository that a name asks for; None if it is none of these.

    Args:
      names: of all files of the repository.
      wanted: the folder that was asked for, or "".
      where: the repository, for messages.

    Raises:
      InputError: if the name fits nothing that is there, or leaves a choice.
    """
    books = _books(names)
    if not books or (wanted and not _NAME.fullmatch(wanted)):
        return None
    if f"{wanted}/{CONFIG}".lstrip("/") in names:
        return None  # which says what its files are
    kept = _choose(books, wanted, where)
    beside = dict.fromkeys(x.beside for x in kept if x.beside)
    more = [x for x in (CONFIG, *beside) if x in names]
    return [*more, *(x.file for x in kept)]


def _place(path: Path) -> tuple[Path, str] | None:
    """The folder that a path to a dictionary begins with, and the dictionary's name.

    The name is not that of a folder there: ``width_16k/average_l0_70``. None if the
    path names no such dictionary.
    """
    for root in (path, path.parent, path.parent.parent):
        wanted = path.relative_to(root).as_posix().removeprefix(".")
        named = not wanted or _NAME.fullmatch(wanted)
        if named and root.is_dir() and any(any(root.glob(x.glob)) for x in _SHELVES):
            return root, wanted
    return None


def is_scope(path: Path) -> bool:
    """Whether a path names a dictionary of such a folder."""
    place, own = _place(path), path / CONFIG
    if place is None or not own.is_file():
        return place is not None
    # one that lists files says all there is to say
    return not (place[1] or "transcoders" in read_yaml(own))


_FIELDS = {
    "architecture": ("jump_relu",),
    "type": None,
    "model_name": None,
    "width": None,
    "l0": None,
    "affine_connection": None,  # the weights have it or not
    "hf_hook_point_in": None,  # looked at below, like the next
    "hf_hook_point_out": None,
}


def _said_beside(root: Path, books: Sequence[_Book]) -> dict[str, Any]:
    """What the config.json files say, in the words of a config.yaml.

    Raises:
      InputError: for one that is missing or damaged, or says what cannot be done here.
    """
    hooks, l0s, models = set(), [], set()
    for x in books:
        file = root / str(x.beside)
        said = read_json(file)
        check_fields(file, said, _FIELDS)
        place, read = of_layer(
            file, "hf_hook_point_in", said.get("hf_hook_point_in"), READS
        )
        after, write = of_layer(
            file, "hf_hook_point_out", said.get("hf_hook_point_out"), WRITES
        )
        if {place, after} != {x.layer}:
            raise InputError(
                f"{file} is of layers {place} and {after}, not of layer {x.layer}; "
                "fetch it again"
            )
        hooks.add((HOOK_OF_READ[READS[read]], HOOK_OF_WRITE[WRITES[write]]))
        l0s.append(said.get("l0"))
        models.add(said.get("model_name"))
    if len(hooks) > 1 or len(models) > 1:
        raise InputError(
            f"{root}: the layers of {books[0].choice} read and write at different "
            "places, or are of different models"
        )
    (read, write), model = hooks.pop(), models.pop()
    return {
        "feature_input_hook": read,
        "feature_output_hook": write,
        "model_name": model,
        "l0": l0s,
    }


def open_scope(path: Path, supplement: Mapping[str, Any] | None = None) -> FileStore:
    """Open a dictionary of such a folder without reading its weights.

    Args:
      path: the folder, and in it the dictionary's name: ``width_16k/average_l0_70``.
      supplement: what a config.yaml would say of it.

    Raises:
      InputError: if the name fits nothing or leaves a choice, if nothing says what its
        features read and write, or if a file is damaged.
    """
    root, wanted = _place(path) or (path, "")
    there = [
        x.relative_to(root).as_posix()
        for shelf in _SHELVES
        for x in root.glob(shelf.glob)
    ]
    kept = _choose(_books(there), wanted, str(root))
    shelf = kept[0].shelf
    described = {x.beside: root / x.beside for x in kept if x.beside}
    config: dict[str, Any] = {"model_kind": shelf.model_kind, **shelf.hooks}
    if shelf.beside is None:
        own = root / CONFIG
        described = {CONFIG: own} if own.is_file() else {}
        config |= {**(supplement or {}), **(read_yaml(own) if described else {})}
        if not {"feature_input_hook", "feature_output_hook"} <= set(config):
            raise InputError(
                f"{root} does not say what its features read and write, and residual "
                f"SAEs look the same: put a {CONFIG} there with feature_input_hook and "
                "feature_output_hook (ln2.hook_normalized and hook_mlp_out for Gemma "
                "Scope's transcoders)"
            )
    else:
        config |= _said_beside(root, kept)
    provenance: dict[str, Any] = {"files": [x.file for x in kept]}
    if _NEAREST.fullmatch(kept[0].choice):
        provenance = {"average_l0": [_l0(x.choice) for x in kept], **provenance}
    elif "l0" in config:
        provenance = {"l0": config.pop("l0"), **provenance}
    return open_described(
        root,
        config | {"transcoders": [x.file for x in kept]},
        described=described,
        provenance=provenance,
    )
