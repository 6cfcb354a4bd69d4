"""Objectives: pure functions of weights, batch and schedule values.

    objective(params, batch, values, spec) -> (loss, metrics)

The shipped ones are *separable*: each layer emits what its features write, and a
penalty of its own; one readout compares the sum of the writes with the truth,

    loss = readout(sum over layers of writes) + sum over layers of penalty.

That form lets a step hold one layer's gradient at a time (`jaxclt.train.step`). An
objective of your own is any function with the signature above, or a `Separable`:

    # mine.py, used by: jaxclt train --objective mine.py:objective
    from jaxclt.train.objectives import Standard
    def penalty(p, pre_TF, a_TF, values, spec):
        return values["sparsity"] * (a_TF**0.5).sum(-1).mean()
    objective = Standard(extra=penalty)

`metrics` must hold what `Standard` returns: ``fvu_L``, ``l0_L`` and ``density_LF`` (the
share of tokens on which each feature fired); more entries are logged as they are.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxclt.clt.estimators import kth_largest
from jaxclt.errors import InputError, did_you_mean
from jaxclt.train import penalties
from jaxclt.train.matmul import matmul
from jaxclt.train.params import LayerParams, Spec, TrainParams, decoder_norm

__all__ = [
    "Batch",
    "Emission",
    "LayerBatch",
    "Metrics",
    "Objective",
    "Separable",
    "Standard",
    "Terms",
    "Values",
    "Writes",
    "emit_all",
    "encode_layer",
    "load_objective",
    "read_out",
    "separable_loss",
]

Values = Mapping[str, Array]
Metrics = dict[str, Array]
Writes = dict[str, tuple[Array, ...]]  # channel -> per target layer [T, D]


@struct.dataclass
class Batch:
    """Tokens to learn from, in normalised units, in any order."""

    read_LTD: Array  # what the encoders read
    write_LTD: Array  # what the MLPs wrote
    dead_LF: Array  # bool: silent for long
    tangent_LTD: Array | None = None  # random directions at the read site
    response_LTD: Array | None = None  # the true MLPs' derivative along them

    def layer(self, l: int) -> LayerBatch:
        """What one layer's features see."""
        seen = self.read_LTD, self.dead_LF, self.tangent_LTD, self.response_LTD
        return LayerBatch(*(None if x is None else x[l] for x in seen))  # pyright: ignore[reportArgumentType]


@struct.dataclass
class LayerBatch:
    """One layer of a batch, without the truth: that belongs to the readout."""

    read_TD: Array
    dead_F: Array
    tangent_TD: Array | None = None
    response_TD: Array | None = None


class Emission(NamedTuple):
    """What one layer contributes."""

    writes: dict[str, Array]  # channel -> [T, M, D]
    penalty: Array
    l0: Array  # features active per token
    density_F: Array  # share of tokens on which each fired


class Objective(Protocol):
    """Loss and metrics of a batch."""

    def __call__(
        self, params: TrainParams, batch: Batch, values: Values, spec: Spec
    ) -> tuple[Array, Metrics]:
        """Return a scalar and a dict with at least fvu_L, l0_L and density_LF."""
        ...


@runtime_checkable
class Separable(Protocol):
    """An objective in the form that allows one layer's gradient at a time."""

    def emit(
        self, p: LayerParams, x: LayerBatch, values: Values, spec: Spec
    ) -> Emission:
        """What one layer writes, and its penalty."""
        ...

    def readout(
        self, writes: Writes, batch: Batch, values: Values, spec: Spec
    ) -> tuple[Array, Metrics]:
        """Compare the summed writes with the truth."""
        ...


Extra = Callable[[LayerParams, Array, Array, Values, Spec], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """Which terms the standard objective has; their weights are schedule values."""

    sparsity: Literal["none", "tanh", "l1", "l0"] = "tanh"
    c: float = 4.0  # of tanh: how fast a feature counts as one
    norm_gradient: bool = True  # of sparsity through the decoder norm
    target_l0: float = 0.0  # features per layer and token, for l0
    preactivation: Literal["none", "dead", "all"] = "none"
    auxk: int = 0  # dead features per layer and token that reconstruct the error
    auxk_share: float = 0.125  # of the batch's tokens that AuxK sees
    matryoshka: tuple[int, ...] = ()  # prefixes of features, besides all of them
    jacobian: bool = False


def encode_layer(p: LayerParams, read_TD: Array, spec: Spec) -> tuple[Array, Array]:
    """Pre-activations and activations [T, F] of one layer."""
    read_TD = read_TD.astype(p.W_enc_FD.dtype)
    pre_TF = matmul(read_TD, p.W_enc_FD.T, spec.compute) + p.b_enc_F[None]
    train = spec.gate.train
    assert train is not None, "the command line offers no other"
    return pre_TF, train(pre_TF, p.theta_F, spec)


def _decode(a_TF: Array, W_FMD: Array, spec: Spec) -> Array:
    F, M, D = W_FMD.shape
    return matmul(a_TF, W_FMD.reshape(F, M * D), spec.compute).reshape(-1, M, D)


@dataclasses.dataclass(frozen=True)
class Standard:
    """Reconstruction plus the chosen penalties.

        Σ_l mean_t |ŷ_l - y_l|² / D  +  values["sparsity"] · Σ_l sparsity_l
          + values["preactivation"] · ...  + values["auxk"] · ...
          + values["jacobian"] · ...  + Σ_l extra_l

    With Matryoshka prefixes (Bussmann et al. 2025) the first term is the mean over
    prefixes, each reconstructing with the first features of every layer only.
    """

    terms: Terms = Terms()
    extra: Extra | None = None

    def __call__(
        self, params: TrainParams, batch: Batch, values: Values, spec: Spec
    ) -> tuple[Array, Metrics]:
        """The loss, as plain autodiff takes it."""
        return separable_loss(self, params, batch, values, spec)

    def emit(
        self, p: LayerParams, x: LayerBatch, values: Values, spec: Spec
    ) -> Emission:
        """What one layer writes, and its penalty."""
        with jax.named_scope("encode"):
            pre_TF, a_TF = encode_layer(p, x.read_TD, spec)
        with jax.named_scope("decode"):
            writes = self._writes(p, x.read_TD, a_TF, spec)
            if self.terms.auxk:
                writes["auxk"] = self._auxk(p, pre_TF, x.dead_F, spec)
        with jax.named_scope("penalty"):
            penalty = self._penalty(p, pre_TF, a_TF, x, values, spec)
        active_TF = (a_TF > jnp.zeros((), a_TF.dtype)).astype(jnp.float32)
        density_F = jax.lax.stop_gradient(active_TF.mean(0))
        return Emission(writes, penalty, density_F.sum(), density_F)

    def _writes(
        self, p: LayerParams, read_TD: Array, a_TF: Array, spec: Spec
    ) -> dict[str, Array]:
        """One channel per Matryoshka group of features; constants go to the first."""
        ends = (*self.terms.matryoshka, spec.n_features)
        starts = (0, *self.terms.matryoshka)
        writes = {
            f"group_{i}": _decode(a_TF[:, lo:hi], p.W_dec_FMD[lo:hi], spec)
            for i, (lo, hi) in enumerate(zip(starts, ends, strict=True))
        }
        own_D = p.b_dec_D[None]
        if p.W_skip_DD is not None:
            own_D = own_D + matmul(
                read_TD.astype(own_D.dtype), p.W_skip_DD, spec.compute
            )
        writes["group_0"] = writes["group_0"].at[:, 0].add(own_D)
        return writes

    def _auxk(self, p: LayerParams, pre_TF: Array, dead_F: Array, spec: Spec) -> Array:
        """What the strongest dead features would write, on some of the tokens."""
        rows = _auxk_rows(self.terms, len(pre_TF))
        pre_TF = pre_TF[:rows]
        zero = jnp.zeros((), pre_TF.dtype)
        lowest = jnp.asarray(jnp.finfo(pre_TF.dtype).min, pre_TF.dtype)
        k = min(self.terms.auxk, spec.n_features)

        def revive(pre_TF: Array, W_FMD: Array) -> Array:
            only_TF = jnp.where(dead_F[None], pre_TF, lowest)
            best = jax.lax.stop_gradient(kth_largest(only_TF, k))
            keep_TF = (only_TF >= best) & (only_TF > zero)
            return _decode(jnp.where(keep_TF, pre_TF, zero), W_FMD, spec)

        def nothing(pre_TF: Array, W_FMD: Array) -> Array:
            return jnp.zeros((rows, *W_FMD.shape[1:]), pre_TF.dtype)

        return jax.lax.cond(dead_F.any(), revive, nothing, pre_TF, p.W_dec_FMD)

    def _penalty(
        self,
        p: LayerParams,
        pre_TF: Array,
        a_TF: Array,
        x: LayerBatch,
        values: Values,
        spec: Spec,
    ) -> Array:
        t, dtype = self.terms, pre_TF.dtype
        total = jnp.zeros((), dtype)
        norm_F = decoder_norm(p)
        if not t.norm_gradient:
            norm_F = jax.lax.stop_gradient(norm_F)

        def weighted(name: str, term: Array) -> Array:
            return values[name].astype(dtype) * term

        match t.sparsity:
            case "tanh":
                term = penalties.tanh_sparsity(a_TF, norm_F, c=t.c)
                total += weighted("sparsity", term)
            case "l1":
                total += weighted("sparsity", penalties.l1(a_TF, norm_F))
            case "l0":
                theta_F = jnp.zeros_like(p.b_enc_F) if p.theta_F is None else p.theta_F
                term = penalties.l0_to_target(
                    pre_TF, theta_F, target=t.target_l0, bandwidth=spec.bandwidth
                )
                total += weighted("sparsity", term)
        if t.preactivation != "none":
            every = t.preactivation == "all"
            weight_F = jnp.ones_like(p.b_enc_F) if every else x.dead_F.astype(dtype)
            term = penalties.preactivation(pre_TF, p.theta_F, norm_F, weight_F)
            total += weighted("preactivation", term)
        if t.jacobian and x.tangent_TD is not None:
            assert x.response_TD is not None
            along = x.tangent_TD.astype(dtype), x.response_TD.astype(dtype)
            term = penalties.jacobian(a_TF, p.W_enc_FD, p.W_dec_FMD[:, 0], *along)
            total += weighted("jacobian", term)
        if self.extra is not None:
            total += self.extra(p, pre_TF, a_TF, values, spec)
        return total

    def readout(
        self, writes: Writes, batch: Batch, values: Values, spec: Spec
    ) -> tuple[Array, Metrics]:
        """Reconstruction (every prefix) and AuxK."""
        groups = len(self.terms.matryoshka) + 1
        loss = jnp.zeros((), writes["group_0"][0].dtype)
        fvu = []
        for l in range(spec.n_layers):
            y_TD = batch.write_LTD[l].astype(loss.dtype)
            error_TD = -y_TD
            for i in range(groups):
                error_TD = error_TD + writes[f"group_{i}"][l]
                loss += penalties.reconstruction(error_TD) / groups
            if self.terms.auxk:
                rows = _auxk_rows(self.terms, len(y_TD))
                # The error is -(truth minus reconstruction), and a constant here.
                left_TD = -jax.lax.stop_gradient(error_TD[:rows])
                loss += values["auxk"].astype(loss.dtype) * penalties.reconstruction(
                    writes["auxk"][l] - left_TD
                )
            centred_TD = y_TD - y_TD.mean(0, keepdims=True)
            fvu.append(
                penalties.reconstruction(error_TD)
                / penalties.reconstruction(centred_TD)
            )
        return loss, {"fvu_L": jax.lax.stop_gradient(jnp.stack(fvu))}


def _auxk_rows(terms: Terms, T: int) -> int:
    return max(1, int(T * terms.auxk_share))


def read_out(emitted: list[dict[str, Array]], spec: Spec) -> Writes:
    """Sum what all layers wrote: channel -> per target layer [T, D]."""
    total: dict[str, list[Array | None]] = {}
    for source, writes in enumerate(emitted):
        for name, write_TMD in writes.items():
            into = total.setdefault(name, [None] * spec.n_layers)
            # split, not slices: its transpose is one concatenation
            parts = jnp.split(write_TMD, write_TMD.shape[1], axis=1)
            for offset, part in enumerate(parts):
                old = into[source + offset]
                new = part[:, 0]
                into[source + offset] = new if old is None else old + new
    return {
        name: tuple(x for x in parts if x is not None) for name, parts in total.items()
    }


def emit_all(
    objective: Separable,
    params: TrainParams,
    batch: Batch,
    values: Values,
    spec: Spec,
    *,
    remat: bool = False,
) -> tuple[Writes, Array, Metrics]:
    """What all layers write, their penalties together, and ``l0_L``, ``density_LF``.

    With `remat` each layer's activations are recomputed in the backward pass.
    """

    def emit(p: LayerParams, x: LayerBatch) -> Emission:
        return objective.emit(p, x, values, spec)

    call = jax.checkpoint(emit) if remat else emit
    found = [call(p, batch.layer(layer)) for layer, p in enumerate(params)]
    writes = read_out([e.writes for e in found], spec)
    penalty = sum((e.penalty for e in found[1:]), start=found[0].penalty)
    return (
        writes,
        penalty,
        {
            "l0_L": jnp.stack([e.l0 for e in found]),
            "density_LF": jnp.stack([e.density_F for e in found]),
        },
    )


def separable_loss(
    objective: Separable,
    params: TrainParams,
    batch: Batch,
    values: Values,
    spec: Spec,
    *,
    remat: bool = False,
) -> tuple[Array, Metrics]:
    """The loss of a separable objective, for autodiff; `remat` as for `emit_all`."""
    writes, penalty, counts = emit_all(
        objective, params, batch, values, spec, remat=remat
    )
    loss, metrics = objective.readout(writes, batch, values, spec)
    return loss + penalty, metrics | {"reconstruction": loss} | counts


_SHIPPED = ("tanh", "l1", "l0", "none")


def load_objective(name: str, terms: Terms) -> Objective:
    """A shipped objective by its sparsity term, or ``file.py:function``.

    Args:
      name: tanh, l1, l0, none, or a path and a name in it.
      terms: of the shipped objective; its sparsity is what `name` says.

    Raises:
      InputError: if there is no such objective.
    """
    if name in _SHIPPED:
        return Standard(dataclasses.replace(terms, sparsity=name))  # pyright: ignore
    path, _, attribute = name.rpartition(":")
    if not path.endswith(".py"):
        raise InputError(
            f"--objective {name!r}: give {', '.join(_SHIPPED)}, or file.py:function"
            f"{did_you_mean(name, _SHIPPED)}"
        )
    if not Path(path).is_file():
        raise InputError(f"--objective {name!r}: there is no file {path}")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module: Any = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"--objective {name!r}: {path} fails: {error}") from error
    found: Any = getattr(module, attribute, None)
    if not callable(found):
        raise InputError(f"--objective {name!r}: {path} has no function {attribute}")
    return cast(Objective, found)
