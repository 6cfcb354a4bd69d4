"""The shell of a run: load, prepare, loop, log, evaluate, checkpoint, export.

A run is a directory. Starting the same command again goes on from its newest intact
checkpoint, on one device with the same bits:

| file | content |
|---|---|
| `run.json` | what the run is: config, model, data; another command may not resume it |
| `windows.npz`, `scales.npz` | its token windows and its normalisation |
| `spool/` | activations the normalisation was measured on, until they are used |
| `metrics.jsonl` | a line per logged step, and one per evaluation |
| `checkpoints/` | everything needed to go on |
| `dictionary/` | the exported dictionary, renewed at every evaluation |
| `finetuned/` | the same after `--kl-steps`, with its own `dictionary/` |
| `card.json`, `README.md`, `curves.png` | what came out |
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclt.errors import InputError
from jaxclt.files.atomic import write_text
from jaxclt.files.json_file import parse_object
from jaxclt.files.json_text import to_json
from jaxclt.files.npz import Must, Npz, open_npz, write_npz
from jaxclt.io.model import Model
from jaxclt.runs.kept import claimed
from jaxclt.runs.pace import logged
from jaxclt.text.corpus import Windows
from jaxclt.text.hub import PREFIX
from jaxclt.train import card, checkpoint, dryrun, processes, sharding
from jaxclt.train.chunks import Chunks, Position
from jaxclt.train.config import TrainConfig
from jaxclt.train.harvest import mlp_response
from jaxclt.train.normalise import Scales
from jaxclt.train.objectives import Batch, load_objective
from jaxclt.train.outcome import Outcome
from jaxclt.train.params import init
from jaxclt.train.prepare import Job, fitted, run_windows
from jaxclt.train.schedules import learning_rate
from jaxclt.train.step import TrainState, init_state, make_step, optimiser
from jaxclt.train.tracking import Tracker, require

__all__ = ["DivergedError", "Listener", "train"]


class DivergedError(InputError):
    """The loss is not finite, or far worse than predicting the mean."""


@dataclasses.dataclass(frozen=True)
class Listener:
    """What the caller wants to hear of a run, and whether it is to stop."""

    stage: Callable[[str, int, int], None] = lambda what, done, total: None
    step: Callable[[dict[str, Any]], None] = lambda record: None
    line: Callable[[str], None] = lambda text: None
    # Entered for the steps; once what it yields is true they end with a checkpoint.
    stoppable: Callable[[], AbstractContextManager[Callable[[], bool]]] = lambda: (
        nullcontext(lambda: False)
    )
    stop_at: int | None = None  # as if stopped at this step


def train(
    model: Model,
    data: str | Path | Windows,
    out: str | Path,
    config: TrainConfig,
    *,
    mesh: str = "",
    store: str | Path | None = None,
    wandb: str = "",
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Train a dictionary, or go on with it, and export it.

    Args:
      model: from `jaxclt.load_model`.
      data: a text file or a folder of them, ``hub:NAME...`` (see `jaxclt.text.hub`), or
        ``model`` for text that the model writes itself; or token windows of your own.
      out: directory of the run.
      config: the recipe.
      mesh: ``data=1,feature=8``; all on one device if empty.
      store: folder that keeps harvested chunks, for several runs on the same data.
      wandb: project that metrics are sent to as well, if not empty.
      listener: progress; to the log if not given.

    Returns:
      The card of the run, or the last record when it was paused or stopped.

    Raises:
      InputError: for what cannot be trained, or when `out` holds another run.
      DivergedError: if the loss is not finite; names the last good checkpoint.
    """
    listener = listener or _logging(config.n_steps)
    if wandb:
        require(wandb)
    given = data if isinstance(data, Windows) else None
    name = f"windows {given.digest}" if given is not None else str(data)
    if given is None and not name.startswith(PREFIX) and name != "model":
        name = str(Path(name))
    config = fitted(config, model, given)
    job = Job(model=model, data=name, out=Path(out), config=config)
    run = _Run(job, given, mesh, None if store is None else Path(store), listener)
    if wandb and processes.is_first():
        run.tracker = Tracker(wandb, job.out, job.identity["config"])
    try:
        return run.go()
    finally:
        if run.tracker is not None:
            run.tracker.close()


def _logging(n_steps: int) -> Listener:
    """One that writes to the log."""
    report = logged()
    return Listener(
        stage=report,
        step=lambda record: report("steps", record["step"], n_steps),
        line=logging.getLogger("jaxclt").info,
    )


class _Run:
    """One run in this process."""

    def __init__(
        self,
        job: Job,
        given: Windows | None,
        mesh: str,
        store: Path | None,
        listener: Listener,
    ) -> None:
        self.job, self.given, self.say = job, given, listener
        self.model, self.out, self.config = job.model, job.out, job.config
        model, config = job.model, job.config
        self.spec = config.spec(model.cfg)
        self.recipe = config.recipe(model.cfg)
        self.objective = load_objective(config.objective, config.terms(model.cfg))
        sizes = sharding.parse_mesh(mesh)
        self.mesh = (
            sharding.make_mesh(sizes, config.features, config.batch_tokens)
            if max(sizes.values()) > 1
            else None
        )
        if self.mesh is None and jax.process_count() > 1:
            raise InputError(
                f"--processes needs a --mesh of all {jax.device_count()} devices"
            )
        dryrun.check_memory(config, model.cfg, sizes)
        rate = learning_rate(config.lr, config.n_steps, warmup=config.warmup)
        self.tx = optimiser(rate)
        self.step_fn = make_step(self.objective, self.spec, self.tx, self.recipe)
        if processes.is_first():
            with claimed(self.out, job.identity):
                self._windows()
        processes.wait("windows")
        self.windows = self._windows()
        self.chunks = Chunks(
            model,
            self.windows,
            config.chunk_config(),
            store=store,
            spool=self.out / "spool" if processes.is_first() else None,
            read_only=not processes.is_first(),
        )
        self.scales = self._scales()
        activities = ("data", "step", "evaluate", "checkpoint")
        self.seconds: dict[str, float] = dict.fromkeys(activities, 0.0)
        self.outcome = Outcome(job, self.chunks)
        self.last_good: Path | None = None
        self.tracker: Tracker | None = None

    # -- preparation -------------------------------------------------------------------

    def _windows(self) -> Windows:
        if self.given is not None:
            return self.given
        return run_windows(self.job, self.say.stage)

    def _scales(self) -> Scales:
        """What earlier processes of this run normalised by, or measured now."""
        file = self.out / "scales.npz"
        names = [f.name for f in dataclasses.fields(Scales)]
        if processes.same(np.asarray(file.is_file())):
            sizes = {"L": self.model.cfg.n_layers, "D": self.model.cfg.d_model}

            def read(found: Npz, part: str, name: str) -> jax.Array:
                axes = name.rpartition("_")[2]
                must = Must("float", axes, finite=name != "bound_L")
                return jnp.asarray(found.array(part + name, must, sizes))

            with open_npz(file, "cannot be read", "give another --out") as found:
                scales, units = (
                    Scales(**{name: read(found, part, name) for name in names})
                    for part in ("", "units_")
                )
            self.chunks.use(units, scales)
            return scales
        self.chunks.normalisation(
            self.config.norm_tokens,
            lambda done, total: self.say.stage("normalisation", done, total),
        )
        units, scales = processes.same((self.chunks.units, self.chunks.scales))
        self.chunks.use(units, scales)
        if not processes.is_first():
            return scales
        arrays: Any = {
            part + name: np.asarray(getattr(of, name))
            for part, of in (("", scales), ("units_", self.chunks.units))
            for name in names
        }
        write_npz(file, **arrays)
        return scales

    def _start(self) -> tuple[int, TrainState, Position]:
        """The newest intact state, or a fresh one."""
        key_params, key_draws = jax.random.split(jax.random.key(self.config.seed))
        params = init(
            key_params, self.spec, theta=self.config.theta, skip=self.config.skip
        )
        state = init_state(params, self.tx, key_draws)
        if self.mesh is not None:
            state = sharding.shard_state(state, self.mesh)
        found = checkpoint.newest_intact(self.out / "checkpoints", self.say.line)
        if found is None:
            self._cut_log(0)
            return 0, state, Position()
        step, state, position = checkpoint.restore_checkpoint(found, state)
        self.last_good = found
        self._cut_log(step)
        self.say.line(f"going on after step {step} from {found}")
        return step, state, Position(**position)

    def _cut_log(self, step: int) -> None:
        """Drop what was logged after the state that the run goes on from.

        The last evaluation comes after the last checkpoint, and is made again.
        """
        if not processes.is_first():
            return
        file = self.out / "metrics.jsonl"
        text = file.read_text("utf-8", "replace") if file.is_file() else ""
        lines, n_steps = text.splitlines(), self.config.n_steps
        kept = [line for line in lines if _step_of(line, n_steps) <= step]
        write_text(file, "".join(f"{line}\n" for line in kept))

    # -- the loop ----------------------------------------------------------------------

    def go(self) -> dict[str, Any]:
        """The steps that are left, and what comes after the last; see `train`."""
        config, n_steps = self.config, self.config.n_steps
        step, state, at = self._start()
        if at.chunk == 0 and self.spec.k is not None:
            self.outcome.calibration_rows()  # while they are in memory
        first, began = step, time.perf_counter()
        logged, busy = step, 0.0  # at the last line of the log
        record: dict[str, Any] = {"step": step}
        last_step = min(n_steps, self.say.stop_at or n_steps)
        with self.say.stoppable() as stopped:
            while step < last_step:
                with _spent(self.seconds, "data"):
                    batch, at = self._batch(state, at)
                with _spent(self.seconds, "step"):
                    state, metrics = self.step_fn(state, batch)
                    step += 1
                    due = step % config.log_every == 0
                    last_step = step if processes.agree(stopped, due) else last_step
                    if due or step == last_step:
                        jax.block_until_ready(metrics)
                if due or step == last_step:
                    now = self.seconds["data"] + self.seconds["step"]
                    rate = (step - logged) * config.batch_tokens / max(now - busy, 1e-9)
                    logged, busy = step, now
                    record = self._log_step(step, metrics, rate)
                if (
                    config.eval_every
                    and step % config.eval_every == 0
                    and step < n_steps
                ):
                    self._log_eval(step, state)
                if step % config.checkpoint_every == 0 or step == last_step:
                    self._check_finite(step, processes.to_host(metrics))
                    with _spent(self.seconds, "checkpoint"):
                        self.last_good = checkpoint.save_checkpoint(
                            self.out / "checkpoints",
                            step,
                            state,
                            dataclasses.asdict(at),
                            regular=self._regular,
                        )
        if step < n_steps:
            return record
        seconds = time.perf_counter() - began
        final = self._log_eval(step, state)
        params = processes.to_host(state.params)
        if not processes.is_first():
            return final
        if config.kl_steps:
            final["finetuned"] = self.outcome.finetune(params, self.say.stage)
        self.chunks.close()
        checkpoint.tidy_checkpoints(self.out / "checkpoints", self._regular)
        return self._write_card(final, seconds, step - first)

    def _regular(self, step: int) -> bool:
        """Whether a run that nothing stops has a checkpoint of this step."""
        n_steps = self.config.n_steps
        return step % self.config.checkpoint_every == 0 or step == n_steps

    def _batch(self, state: TrainState, at: Position) -> tuple[Batch, Position]:
        read_LTD, write_LTD, at = self.chunks.batch(at, self.config.batch_tokens)
        rows = {"read_LTD": read_LTD, "write_LTD": write_LTD}
        if self.config.jacobian > 0:
            key, step = processes.to_host((state.key, state.step))
            key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(key)), step)
            tangent_LTD = jax.random.normal(key, read_LTD.shape, jnp.float32)
            rows["tangent_LTD"] = tangent_LTD
            rows["response_LTD"] = mlp_response(
                self.model.params,
                self.scales,
                read_LTD,
                tangent_LTD,
                cfg=self.model.cfg,
                site=self.spec.read,
            )
        if self.mesh is not None:
            where = sharding.batch_sharding(self.mesh)
            rows = {name: sharding.place(x, where) for name, x in rows.items()}
        # numpy: the same on all devices of all processes
        dead_LF: Any = np.zeros((self.spec.n_layers, self.spec.n_features), bool)
        return Batch(**rows, dead_LF=dead_LF), at

    def _log_step(
        self, step: int, metrics: dict[str, Any], rate: float
    ) -> dict[str, Any]:
        metrics = processes.to_host(metrics)
        self._check_finite(step, metrics)
        found = {k: np.asarray(v, np.float64).tolist() for k, v in metrics.items()}
        record = {
            "kind": "step",
            "step": step,
            "tokens": step * self.config.batch_tokens,
            "fvu": float(np.mean(found["fvu_L"])),
            "l0": float(np.mean(found["l0_L"])),
            **found,
            "tokens_per_s": rate,
            "eta_s": (self.config.n_steps - step) * self.config.batch_tokens / rate,
        }
        if processes.is_first():
            # A run that was never stopped would have no line there.
            if step % self.config.log_every == 0 or step == self.config.n_steps:
                self._append(record)
            self.say.step(record)
        return record

    def _check_finite(self, step: int, metrics: dict[str, Any]) -> None:
        loss, fvu = float(metrics["loss"]), float(metrics["fvu_L"].mean())
        if math.isfinite(loss) and math.isfinite(fvu) and fvu < 1e3:
            return
        good = "there is no checkpoint yet"
        if self.last_good is not None:
            good = f"the last good checkpoint is {self.last_good}"
        raise DivergedError(
            f"the loss is {loss:g} (unexplained {fvu:g}) at step {step}: lower --lr or "
            f"the weights of the penalties; {good}"
        )

    def _append(self, record: dict[str, Any]) -> None:
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(to_json(record) + "\n")
        if self.tracker is not None:
            self.tracker.log(record)

    def _log_eval(self, step: int, state: TrainState) -> dict[str, Any]:
        with _spent(self.seconds, "evaluate"):
            params = processes.to_host(state.params)  # all processes hold a part
            found: dict[str, Any] = {}
            if processes.is_first():
                self.say.line(f"evaluating after step {step}")
                found = self.outcome.evaluate(params)
        record = {
            "kind": "eval",
            "step": step,
            "tokens": step * self.config.batch_tokens,
            **found,
        }
        if found:
            self._append(record)
            self.say.line(card.one_line(record))
        return record

    def _write_card(
        self, final: dict[str, Any], seconds: float, steps: int
    ) -> dict[str, Any]:
        spent = {**self.seconds, "total": seconds}
        spent = {name: round(x, 1) for name, x in spent.items()}
        made = card.make_card(self.job, self.windows, final, spent, steps)
        write_text(self.out / "card.json", to_json(made, indent=1))
        write_text(self.out / "README.md", card.readme(made))
        card.plot(self.out / "metrics.jsonl", self.out / "curves.png")
        return made


@contextmanager
def _spent(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds of its body."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] += time.perf_counter() - start


def _step_of(line: str, n_steps: int) -> float:
    """The step that a line of the log was written in; a torn one counts as too late."""
    try:
        found = parse_object(line, "a line")
    except InputError:
        return math.inf
    step = found.get("step")
    if not isinstance(step, int):
        return math.inf
    return step + (found.get("kind") == "eval" and step == n_steps)
