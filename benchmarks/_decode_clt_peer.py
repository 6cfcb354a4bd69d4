"""Training steps of decode-clt 0.0.1, with its own Python; see train_step.py.

    python _decode_clt_peer.py '{"variant": "shipped", "weights": "weights.npz", ...}'

First the loss and the gradients at one step of the schedule are written, for the
comparison. Then each line `step` on stdin makes one training step and answers with its
seconds; `end` ends.

`shipped` is the package's own `CLTTrainer.train`, its loop unchanged: only the store
that it takes batches from is ours. There the time is taken, from the return of one
batch to the request for the next. `reference` is no peer but a plain PyTorch step of
the same formulas, written here: one encoder pass, one matmul for all decoders of a
source, autograd, and the fused Adam.

The package has a bias for every pair of source and target, of which only the sum has an
effect; all but those within a layer are frozen at zero, so that both train the same
weights.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from _timing import Steps, load_average
from clt.config import CLTConfig, TrainingConfig
from clt.models.activations import JumpReLU
from clt.models.clt import CrossLayerTranscoder
from clt.training import trainer as trainer_module
from clt.training.losses import LossManager

Weights = dict[str, np.ndarray]
NEVER = 10**9


def configs(job: dict[str, Any]) -> tuple[CLTConfig, TrainingConfig]:
    """The same recipe in the package's units: its penalty is a sum over tokens."""
    clt_config = CLTConfig(
        num_features=job["F"],
        num_layers=job["L"],
        d_model=job["D"],
        activation_fn=job["activation"],
        jumprelu_threshold=job["theta"],
    )
    training_config = TrainingConfig(
        learning_rate=job["lr"],
        training_steps=job["n_steps"],
        gradient_clip_val=job["clip"],
        train_batch_size_tokens=job["T"],
        normalization_method="none",
        activation_path="",
        sparsity_lambda=job["sparsity"] / job["T"],
        sparsity_c=job["c"],
        preactivation_coef=0.0,
        optimizer="adam",
        lr_scheduler=None,
        eval_interval=NEVER,
        checkpoint_interval=NEVER,
    )
    return clt_config, training_config


def set_weights(model: CrossLayerTranscoder, weights: Weights, L: int) -> None:
    """Ours into the package's layout; biases between layers are frozen."""

    def put(parameter: torch.nn.Parameter, array: np.ndarray) -> None:
        parameter.data.copy_(torch.from_numpy(np.ascontiguousarray(array)))

    for l in range(L):
        encoder = model.encoder_module.encoders[l]
        put(encoder.weight, weights[f"W_enc_{l}"])
        put(encoder.bias_param, weights[f"b_enc_{l}"])
        for target in range(l, L):
            decoder = model.decoder_module.decoders[f"{l}->{target}"]
            put(decoder.weight, weights[f"W_dec_{l}"][:, target - l].T)
            torch.nn.init.zeros_(decoder.bias_param)
            decoder.bias_param.requires_grad_(target == l)
        own = model.decoder_module.decoders[f"{l}->{l}"]
        put(own.bias_param, weights[f"b_dec_{l}"])


def gradients(model: CrossLayerTranscoder, L: int) -> Weights:
    """In our layout. Those of the thresholds follow another formula: left out."""
    found = {}
    for l in range(L):
        encoder = model.encoder_module.encoders[l]
        found[f"W_enc_{l}"] = encoder.weight.grad.numpy()
        found[f"b_enc_{l}"] = encoder.bias_param.grad.numpy()
        decoders = [
            model.decoder_module.decoders[f"{l}->{target}"] for target in range(l, L)
        ]
        found[f"W_dec_{l}"] = np.stack([d.weight.grad.numpy().T for d in decoders], 1)
        found[f"b_dec_{l}"] = decoders[0].bias_param.grad.numpy()
    return found


# -- the package's own loop ------------------------------------------------------------


class Store:
    """Gives the same batch whenever it is told to; the time between is a step's."""

    def __init__(self, batch: tuple[Any, Any], steps: Steps) -> None:
        self.batch, self.steps, self.begun = batch, steps, False

    def __iter__(self) -> Store:
        return self

    def __next__(self) -> tuple[Any, Any]:
        if self.begun:
            self.steps.done()
        self.begun = True
        self.steps.wait()
        return self.batch


def shipped(job: dict[str, Any], weights: Weights, batch: tuple[Any, Any]) -> None:
    clt_config, training_config = configs(job)
    steps = Steps()
    store = Store(batch, steps)
    trainer_module.create_activation_store = lambda **_: store
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_module.CLTTrainer(
            clt_config, training_config, log_dir=folder, device="cpu"
        )
        set_weights(trainer.model, weights, job["L"])
        losses: LossManager = trainer.loss_manager
        activations = trainer.model.get_feature_activations(batch[0])
        loss, _ = losses.compute_total_loss(
            trainer.model,
            *batch,
            job["at_step"],
            job["n_steps"],
            precomputed_activations=activations,
        )
        loss.backward()
        answer(job, float(loss), gradients(trainer.model, job["L"]))
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.model.decoder_module._cached_decoder_norms = None
        del loss, activations
        steps.ready()
        try:
            trainer.train()
        except SystemExit:  # raised by `wait` when told to end
            logged = trainer.metric_logger.metrics["train_losses"]
            steps.report({"losses": [x["total"] for x in logged], **about()})


# -- a plain step of the same formulas -------------------------------------------------


def reference(job: dict[str, Any], weights: Weights, batch: tuple[Any, Any]) -> None:
    L, D, T = job["L"], job["D"], job["T"]
    p = {
        name: torch.nn.Parameter(torch.from_numpy(array.copy()))
        for name, array in weights.items()
        if not name.startswith("theta")
    }
    log_theta = None
    if job["activation"] == "jumprelu":
        theta = np.stack([weights[f"theta_{l}"] for l in range(L)])
        log_theta = torch.nn.Parameter(torch.from_numpy(np.log(theta)))
    trained = [*p.values(), *([] if log_theta is None else [log_theta])]
    adam = torch.optim.Adam(trained, lr=job["lr"], fused=True)
    inputs, targets = batch

    def loss_at(step: int) -> torch.Tensor:
        written: list[Any] = [p[f"b_dec_{l}"] for l in range(L)]
        penalty = torch.zeros(())
        for l in range(L):
            pre = torch.addmm(p[f"b_enc_{l}"], inputs[l], p[f"W_enc_{l}"].T)
            if log_theta is None:
                a = torch.relu(pre)
            else:
                a = JumpReLU.apply(pre, log_theta[l].exp(), 1.0)
            W_FMD = p[f"W_dec_{l}"]
            writes = (a @ W_FMD.flatten(1)).view(T, L - l, D)
            for offset, part in enumerate(writes.unbind(1)):
                written[l + offset] = written[l + offset] + part
            norm = W_FMD.square().sum((1, 2)).sqrt()
            penalty = penalty + torch.tanh(job["c"] * a * norm).sum() / T
        errors = [(written[l] - targets[l]).square().mean() for l in range(L)]
        return sum(errors) + job["sparsity"] * step / job["n_steps"] * penalty

    def train(step: int) -> float:
        adam.zero_grad(set_to_none=True)
        loss = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, job["clip"])
        adam.step()
        return loss.item()

    loss = loss_at(job["at_step"])
    loss.backward()
    answer(job, float(loss), {name: x.grad.numpy() for name, x in p.items()})
    del loss
    losses: list[float] = []
    serve(lambda: losses.append(train(len(losses))), {"losses": losses, **about()})


# -- shared ----------------------------------------------------------------------------


def serve(step: Callable[[], Any], report: dict[str, Any]) -> None:
    """Steps as they are asked for, then the report."""
    steps = Steps()
    steps.ready()
    try:
        while True:
            steps.wait()
            step()
            steps.done()
    except SystemExit:
        steps.report(report)


def answer(job: dict[str, Any], loss: float, grads: Weights) -> None:
    np.savez(job["out"], loss=np.float64(loss), **grads)


def about() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "decode_clt": version("decode-clt"),
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
    }


def main() -> None:
    logging.disable(logging.WARNING)
    job = json.loads(sys.argv[1])
    with np.load(job["weights"]) as found:
        weights = {name: found[name] for name in found.files}
    read, write = weights.pop("read_LTD"), weights.pop("write_LTD")
    batch = tuple({l: torch.from_numpy(x[l]) for l in range(job["L"])}
                  for x in (read, write))  # fmt: skip
    {"shipped": shipped, "reference": reference}[job["variant"]](job, weights, batch)


if __name__ == "__main__":
    main()
