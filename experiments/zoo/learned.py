"""Small transcoders of planted models, trained by the library's own step in seconds."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from planted import Planted

from jaxclt.clt.store import ParamsStore
from jaxclt.clt.transcoder import StoreDictionary
from jaxclt.train.export import threshold_form
from jaxclt.train.harvest import harvest, mlp_response
from jaxclt.train.normalise import Moments, fold, normalise, scales_of
from jaxclt.train.objectives import Batch, Standard, Terms
from jaxclt.train.params import Spec, init
from jaxclt.train.schedules import Weights, learning_rate
from jaxclt.train.step import Recipe, TrainState, init_state, make_step, optimiser

__all__ = ["Learned", "learn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
    """A trained dictionary and how well it does on its training prompts."""

    dictionary: StoreDictionary
    l0_L: np.ndarray  # features active per position
    fvu_L: np.ndarray  # unexplained share of the variance of the MLPs' outputs


def learn(
    planted: Planted,
    *,
    span: int,
    sparsity: float,
    jacobian: float = 0.0,
    n_features: int = 48,
    c: float = 0.3,
    n_steps: int = 3000,
    batch: int = 64,
    rate: float = 3e-3,
    seed: int = 0,
) -> Learned:
    """Train a JumpReLU transcoder with the tanh penalty of Circuit Tracing (2025).

    The penalty is weighted by the norm of all of a feature's decoders together, in
    units where every layer's MLP output has variance 1 on average over channels.
    Encoders get nothing from the ballast: it is constant, and what a random weight
    reads of it is a bias.

    Args:
      planted: the model and its prompts.
      span: MLP outputs a feature writes; 1 is a PLT.
      sparsity: final weight of the penalty; it rises over the first half.
      jacobian: weight of the Jacobian term (`jaxclt.train.penalties.jacobian`).
      n_features: per layer.
      c: of tanh. An active feature that writes one planted direction has a norm of
        about sqrt(d_model), 6: the trainer's default of 4 makes the penalty flat there,
        and features that share a job stay.
      n_steps: of Adam.
      batch: positions per step.
      rate: of Adam.
      seed: of weights and batches.
    """
    cfg, L = planted.cfg, planted.cfg.n_layers
    site = "resid_mid"
    raw = harvest(planted.params, planted.train_PT, None, cfg=cfg, site=site)
    read_LTD, write_LTD, norm_LT = map(np.asarray, raw)
    scales = scales_of(Moments.of(read_LTD), Moments.of(write_LTD), norm_LT.max(1))
    read_LTD, write_LTD = normalise(scales, *map(jnp.asarray, (read_LTD, write_LTD)))
    n, D = read_LTD.shape[1:]
    key_init, key_state, key_batch, key_tangent = jax.random.split(
        jax.random.key(seed), 4
    )
    spec = Spec(n_layers=L, d_model=D, n_features=n_features, span=span, read=site)
    weights = Weights(sparsity=sparsity, jacobian=jacobian, ramp=0.5)
    recipe = Recipe(n_steps=n_steps, weights=weights)
    tx = optimiser(learning_rate(rate, n_steps, warmup=50))
    state = init_state(init(key_init, spec), tx, key_state)
    terms = Terms(sparsity="tanh", c=c, jacobian=jacobian > 0)
    step = make_step(Standard(terms), spec, tx, recipe)

    @jax.jit
    def draw(i: jax.Array) -> Batch:
        at = jax.random.randint(jax.random.fold_in(key_batch, i), (batch,), 0, n)
        one = Batch(
            read_LTD=read_LTD[:, at],
            write_LTD=write_LTD[:, at],
            dead_LF=jnp.zeros((L, n_features), bool),
        )
        if not jacobian:
            return one
        shape = one.read_LTD.shape
        tangent = jax.random.normal(jax.random.fold_in(key_tangent, i), shape)
        tangent = tangent.at[:, :, 0].set(0)
        response = mlp_response(
            planted.params, scales, one.read_LTD, tangent, cfg=cfg, site=site
        )
        return dataclasses.replace(one, tangent_LTD=tangent, response_LTD=response)

    @jax.jit
    def run(state: TrainState) -> TrainState:
        def one(state: TrainState, i: jax.Array) -> tuple[TrainState, None]:
            return step(state, draw(i))[0], None

        return jax.lax.scan(one, state, jnp.arange(n_steps, dtype=jnp.int32))[0]

    state = run(state)
    params = tuple(
        dataclasses.replace(p, W_enc_FD=p.W_enc_FD.at[:, 0].set(0))
        for p in state.params
    )
    zero = {"sparsity": jnp.float32(0), "jacobian": jnp.float32(0)}
    every = Batch(
        read_LTD=read_LTD,
        write_LTD=write_LTD,
        dead_LF=jnp.zeros((L, n_features), bool),
    )
    plain = Standard(Terms(sparsity="none"))
    _, found = jax.jit(plain, static_argnames="spec")(params, every, zero, spec=spec)
    clt, clt_cfg = threshold_form(params, spec)
    clt = fold(clt, scales)
    kind = "PLT" if span == 1 else "CLT"
    return Learned(
        dictionary=StoreDictionary(
            ParamsStore(clt, clt_cfg), name=f"{kind}, sparsity {sparsity:g}"
        ),
        l0_L=np.asarray(found["l0_L"]),
        fvu_L=np.asarray(found["fvu_L"]),
    )
