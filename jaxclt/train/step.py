"""One training step: gradients, clipping, Adam, counters, and the L0 controller.

`gradients` is plain automatic differentiation; `first_pass` and `source_gradient` give
the same numbers with one source layer's gradient in memory at a time: the loss of a
separable objective depends on the layers only through the sum of their writes, so with
``r = ∂loss/∂writes`` from a first pass the gradient of layer s alone is that of

    Σ <r, writes_s(p_s)> + penalty_s(p_s).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from jaxclt.errors import InputError
from jaxclt.precision import jit
from jaxclt.train.objectives import (
    Batch,
    LayerBatch,
    Metrics,
    Objective,
    Separable,
    Values,
    emit_all,
    separable_loss,
)
from jaxclt.train.params import LayerParams, Spec, TrainParams
from jaxclt.train.schedules import Control, Weights, control_start, steer, values

__all__ = [
    "Recipe",
    "TrainState",
    "apply_gradient",
    "finish_step",
    "gradients",
    "init_state",
    "make_step",
    "optimiser",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a step needs to know besides the objective; hashable."""

    n_steps: int
    weights: Weights = dataclasses.field(default_factory=Weights)
    l0: float | None = None  # total L0 that the controller holds; None: no controller
    gain: float = 0.02  # of the controller
    clip: float = 1.0  # of the gradient's norm, thresholds left out; 0: none
    accumulate: int = 1  # gradients of this many parts of a batch are averaged
    memory: str = "full"  # full | remat | per_source
    dead_tokens: int = 1_000_000  # silent for so many tokens is dead
    half_life: float = 1_000_000.0  # of the running density, in tokens


@struct.dataclass
class TrainState:
    """All that a run needs to go on, besides the data."""

    step: Array  # int32
    params: TrainParams
    opt: tuple[Any, ...]  # optimiser state of each layer
    control: Control
    silent_LF: Array  # int32: tokens since each feature fired
    density_LF: Array  # running share of tokens on which each fired
    grad_norm: Array  # of the step before, thresholds left out
    key: Array  # raw data of the PRNG key that random draws of a step come from


def optimiser(
    rate: optax.Schedule | float, *, b1: float = 0.9, b2: float = 0.999
) -> optax.GradientTransformation:
    """Adam with float32 moments; every layer has its own state."""
    return optax.adam(rate, b1=b1, b2=b2, eps=1e-8)


def init_state(
    params: TrainParams, tx: optax.GradientTransformation, key: Array
) -> TrainState:
    """Nothing learned yet."""
    shape = (len(params), len(params[0].b_enc_F))
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt=tuple(tx.init(p) for p in params),  # pyright: ignore[reportArgumentType]
        control=control_start(),
        silent_LF=jnp.zeros(shape, jnp.int32),
        density_LF=jnp.zeros(shape, jnp.float32),
        grad_norm=jnp.float32(0),
        key=jax.random.key_data(key),
    )


def gradients(
    objective: Objective,
    params: TrainParams,
    batch: Batch,
    values: Values,
    spec: Spec,
    *,
    accumulate: int = 1,
    remat: bool = False,
) -> tuple[TrainParams, Metrics]:
    """Gradient and metrics by automatic differentiation.

    Args:
      objective: any.
      params: weights.
      batch: tokens.
      values: schedule values.
      spec: what is trained.
      accumulate: parts of the batch, one after the other, each of every
        `accumulate`-th token; gradients and metrics are their means.
      remat: recompute layers in the backward pass (separable objectives).
    """

    def loss(params: TrainParams, batch: Batch) -> tuple[Array, Metrics]:
        if isinstance(objective, Separable):
            total, metrics = separable_loss(
                objective, params, batch, values, spec, remat=remat
            )
        else:
            total, metrics = objective(params, batch, values, spec)
        return total, metrics | {"loss": total}

    grad = jax.grad(loss, has_aux=True)
    if accumulate == 1:
        return grad(params, batch)

    def part(tokens: dict[str, Array]) -> tuple[TrainParams, Metrics]:
        return grad(params, dataclasses.replace(batch, **tokens))

    names = ("read_LTD", "write_LTD", "tangent_LTD", "response_LTD")
    mean = optax.microbatching.microbatch(
        part,
        argnums=0,
        in_axes=1,
        microbatch_size=batch.read_LTD.shape[1] // accumulate,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )
    return mean({name: getattr(batch, name) for name in names})


def first_pass(
    objective: Separable, params: TrainParams, batch: Batch, values: Values, spec: Spec
) -> tuple[dict[str, tuple[Array, ...]], Metrics]:
    """The residual ``∂readout/∂writes`` per channel and target, and the metrics."""
    writes, penalty, counts = emit_all(objective, params, batch, values, spec)
    back, metrics = jax.grad(
        lambda w: _with_loss(objective.readout(w, batch, values, spec)), has_aux=True
    )(writes)
    return back, metrics | {"loss": metrics["reconstruction"] + penalty} | counts


def _with_loss(found: tuple[Array, Metrics]) -> tuple[Array, Metrics]:
    loss, metrics = found
    return loss, metrics | {"reconstruction": loss}


def source_gradient(
    objective: Separable,
    p: LayerParams,
    back: dict[str, tuple[Array, ...]],
    x: LayerBatch,
    values: Values,
    spec: Spec,
) -> LayerParams:
    """Second pass: the gradient of one source layer, its activations recomputed.

    Args:
      objective: emit and readout.
      p: weights of the layer.
      back: per channel, the residual at each MLP output that the layer writes.
      x: what its features see.
      values: schedule values.
      spec: what is trained.
    """

    def part(p: LayerParams) -> Array:
        emitted = objective.emit(p, x, values, spec)
        total = emitted.penalty
        for name, write_TMD in emitted.writes.items():
            total += jnp.sum(jnp.stack(back[name], axis=1) * write_TMD)
        return total

    return jax.grad(part)(p)


def near(
    back: dict[str, tuple[Array, ...]], layer: int, spec: Spec
) -> dict[str, tuple[Array, ...]]:
    """The residual at the outputs that one layer writes."""
    end = layer + spec.n_writes(layer)
    return {name: parts[layer:end] for name, parts in back.items()}


def clip_norm_squared(grad: LayerParams) -> Array:
    """Squared norm of a layer's gradient without its thresholds, float32."""
    rest: Any = dataclasses.replace(grad, theta_F=None)
    return optax.tree.norm(optax.tree.cast(rest, jnp.float32), squared=True)


def apply_gradient(
    tx: optax.GradientTransformation, params: Any, opt: Any, grad: Any
) -> tuple[Any, Any]:
    """Parameters and optimiser state after one update."""
    # optax mixes a Python float with its integer count, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        step, opt = tx.update(grad, opt, params)
        return optax.apply_updates(params, step), opt


def update_layer(
    tx: optax.GradientTransformation,
    p: LayerParams,
    opt: Any,
    grad: LayerParams,
    norm: Array,
    clip: float,
) -> tuple[LayerParams, Any]:
    """Clip, take an Adam step, keep thresholds from going below zero.

    Thresholds are not clipped: their gradient is a sum of few large terms and would
    set the norm of everything else.
    """
    if clip > 0:
        scale = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-12))
        theta_F = grad.theta_F
        grad = jax.tree.map(lambda g: g * scale.astype(g.dtype), grad)
        grad = dataclasses.replace(grad, theta_F=theta_F)
    new, opt = apply_gradient(tx, p, opt, grad)
    if new.theta_F is not None:
        new = dataclasses.replace(
            new, theta_F=jnp.maximum(new.theta_F, jnp.zeros((), new.theta_F.dtype))
        )
    return new, opt


def finish_step(
    state: TrainState,
    norm: Array,
    metrics: Metrics,
    now: Values,
    recipe: Recipe,
    n_tokens: int,
) -> tuple[TrainState, Metrics]:
    """Counters and controller after an update, and what is logged of the step.

    That holds no array of the size of a layer's features.
    """
    density_LF = metrics["density_LF"].astype(jnp.float32)
    keep = 0.5 ** (n_tokens / recipe.half_life)
    # Unbiased while young: weigh by what the running mean has seen.
    seen = 1 - keep ** (state.step.astype(jnp.float32) + 1)
    running = state.density_LF + (1 - keep) / seen * (density_LF - state.density_LF)
    control = state.control
    if recipe.l0 is not None:
        control = steer(control, metrics["l0_L"].sum(), recipe.l0, gain=recipe.gain)
    ceiling = jnp.int32(2**30)
    silent_LF = jnp.where(density_LF > 0, 0, state.silent_LF + n_tokens)
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        control=control,
        silent_LF=jnp.minimum(silent_LF.astype(jnp.int32), ceiling),
        density_LF=running,
        grad_norm=norm,
    )
    dead_LF = state.silent_LF >= recipe.dead_tokens
    return state, {k: v for k, v in metrics.items() if k != "density_LF"} | {
        "dead": dead_LF.astype(jnp.float32).mean(),
        "dense": (state.density_LF > 0.1).astype(jnp.float32).mean(),
        "sparsity_weight": now["sparsity"],
        "grad_norm": state.grad_norm,
    }


StepFn = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_step(
    objective: Objective,
    spec: Spec,
    tx: optax.GradientTransformation,
    recipe: Recipe,
) -> StepFn:
    """The jitted step (state, batch) -> (state, metrics); the old state is consumed.

    The batch's `dead_LF` is set from the state. With ``memory="per_source"`` the host
    loops over source layers: each program computes one layer's gradient and updates
    that layer in place, so gradients never take more than the largest layer. Its clip
    uses the norm of the step before, the current one being unknown until the end.

    Raises:
      InputError: if the objective cannot be computed that way.
    """
    if recipe.memory == "per_source":
        if not isinstance(objective, Separable):
            raise InputError(
                "--memory per_source needs a separable objective (emit and readout); "
                "use --memory full"
            )
        if recipe.accumulate != 1:
            raise InputError("--memory per_source: use --accumulate 1")
        return _per_source_step(objective, spec, tx, recipe)

    @partial(jit, donate_argnums=(0,))
    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        now, batch = _prepare(state, batch, recipe)
        grads, metrics = gradients(
            objective,
            state.params,
            batch,
            now,
            spec,
            accumulate=recipe.accumulate,
            remat=recipe.memory == "remat",
        )
        norm = jnp.sqrt(sum(map(clip_norm_squared, grads), start=jnp.float32(0)))
        done = [
            update_layer(tx, p, opt, grad, norm, recipe.clip)
            for p, opt, grad in zip(state.params, state.opt, grads, strict=True)
        ]
        new, opt = zip(*done, strict=True)
        state = dataclasses.replace(state, params=new, opt=opt)
        n_tokens = batch.read_LTD.shape[1]
        return finish_step(state, norm, metrics, now, recipe, n_tokens)

    return step


def _prepare(
    state: TrainState, batch: Batch, recipe: Recipe
) -> tuple[dict[str, Array], Batch]:
    now = values(recipe.weights, state.step, recipe.n_steps, state.control)
    dead_LF = state.silent_LF >= recipe.dead_tokens
    return now, dataclasses.replace(batch, dead_LF=dead_LF)


@dataclasses.dataclass(frozen=True, eq=False)
class PerSourceStep:
    """A step whose host loops over source layers, and the three programs it runs."""

    spec: Spec
    recipe: Recipe
    forward: Callable[..., Any]
    update: Callable[..., Any]
    finish: Callable[..., Any]

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        now, back, metrics = self.forward(state, batch)
        dead_LF = state.silent_LF >= self.recipe.dead_tokens
        batch = dataclasses.replace(batch, dead_LF=dead_LF)
        params, opts, squares = [], [], []
        layers = list(zip(state.params, state.opt, strict=True))
        norm, T = state.grad_norm, batch.read_LTD.shape[1]
        rest = dataclasses.replace(state, params=(), opt=())
        del state
        for l in range(self.spec.n_layers):
            p, opt = layers[l]
            layers[l] = ()  # pyright: ignore[reportArgumentType, reportCallIssue]
            at = near(back, l, self.spec)
            p, opt, square = self.update(p, opt, at, batch.layer(l), now, norm)
            params.append(p)
            opts.append(opt)
            squares.append(square)
        total = jnp.sqrt(jnp.stack(squares).sum())
        rest, logged = self.finish(rest, total, metrics, now, jnp.zeros(T))
        return dataclasses.replace(rest, params=tuple(params), opt=tuple(opts)), logged


def _per_source_step(
    objective: Separable, spec: Spec, tx: optax.GradientTransformation, recipe: Recipe
) -> PerSourceStep:
    @jit
    def forward(state: TrainState, batch: Batch):
        now, batch = _prepare(state, batch, recipe)
        back, metrics = first_pass(objective, state.params, batch, now, spec)
        return now, back, metrics

    # One program for all layers that write as many outputs: the layer only chooses
    # slices, which the host makes.
    @partial(jit, donate_argnums=(0, 1))
    def update(p, opt, back, x, now, norm):
        grad = source_gradient(objective, p, back, x, now, spec)
        square = clip_norm_squared(grad)
        return *update_layer(tx, p, opt, grad, norm, recipe.clip), square

    @jit
    def finish(state: TrainState, norm: Array, metrics: Metrics, now: Values, T: Array):
        return finish_step(state, norm, metrics, now, recipe, T.shape[0])

    return PerSourceStep(spec, recipe, forward, update, finish)
