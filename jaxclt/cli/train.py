"""`jaxclt train`: its flags and what they do."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from jaxclt.cli.common import answer, options, use_compilation_cache
from jaxclt.cli.flags import AsJson, Debug, ModelName
from jaxclt.cli.progress import Run, Stages
from jaxclt.train.config import PRESETS, TrainConfig, preset

if TYPE_CHECKING:
    from jaxclt.train.trainer import Listener

__all__ = ["TrainFlags", "run_train"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainFlags(TrainConfig):
    """Train a cross-layer or per-layer transcoder; resumes from --out by itself.
    Ctrl-C and SIGTERM end it with a checkpoint."""

    model: ModelName
    data: str
    """Text file, or folder of .txt, .md, .rst, .utf8 and .jsonl files; a dataset on the
    hub, hub:NAME[@REVISION][?config=..&split=..&text=..], of which as much is streamed
    as the run needs (pip install 'jaxclt[hub]'); or model: text that the model writes
    itself."""
    out: Path
    """Directory of the run."""
    preset: str = "default"
    """Recipe whose values are the defaults of all other flags."""
    mesh: str = ""
    """Devices, like data=1,feature=8: tokens and features are split over them."""
    store: str = ""
    """Folder that keeps harvested activations, for several runs on the same data."""
    processes: str = ""
    """Train on several machines, one process each: auto where JAX knows the cluster, or
    HOST:PORT,N,I (the first machine's address, how many, which one this is, from 0).
    --out must be a folder that all of them see."""
    wandb: str = ""
    """Weights & Biases project that metrics are sent to as well (pip install
    'jaxclt[wandb]')."""
    dry_run: bool = False
    """Say what the run would cost, on a mesh that need not exist here, and stop."""
    json: AsJson = False
    debug: Debug = False

    def __post_init__(self) -> None:
        """The values are checked by `config`, once errors are reported as lines."""

    @classmethod
    def defaults(cls, args: Sequence[str]) -> TrainFlags:
        """The command with the defaults of the preset that a command line names.

        Read before the command line is parsed, so that --help shows what would be used.
        """
        name = "default"
        for word, following in zip(args, [*args[1:], ""], strict=False):
            if word == "--preset":
                name = following
            elif word.startswith("--preset="):
                name = word.partition("=")[2]
        known: Any = PRESETS.get(name, {})  # an unknown one is refused when it is run
        missing: Any = tyro.MISSING
        return cls(model=missing, data=missing, out=missing, preset=name, **known)

    def config(self) -> TrainConfig:
        """The recipe without what only this command knows.

        Raises:
          InputError: for values out of their range.
        """
        return options(TrainConfig, self)


def run_train(flags: TrainFlags, run: Run) -> None:
    """Run the command; results on stdout."""
    from jaxclt.io.model import load_model
    from jaxclt.train import dryrun, processes, sharding
    from jaxclt.train.trainer import train

    preset(flags.preset)
    processes.start(flags.processes)
    sizes = sharding.parse_mesh(flags.mesh)

    use_compilation_cache()
    config = flags.config()
    if processes.is_first() and not flags.dry_run:
        run.own(flags.out)
    model = load_model(flags.model, progress=run.line)
    if flags.dry_run:
        found = dryrun.estimate(config, model.cfg, sizes)
        answer(flags.json, dataclasses.asdict(found), "\n".join(found.lines()))
        return
    run.look()
    with _listener(config.n_steps, run) as listener:
        card = train(
            model,
            flags.data,
            flags.out,
            config,
            mesh=flags.mesh,
            store=flags.store or None,
            wandb=flags.wandb,
            listener=listener,
        )
    if not processes.is_first():
        return
    if "metrics" not in card:
        run.line(
            f"jaxclt: stopped after step {card['step']} of {config.n_steps}, which is "
            "kept: the same command goes on"
        )
        sys.exit(run.stop.status)
    metrics = card["metrics"]
    text = (
        f"held-out FVU {metrics['fvu']:.3f}, {metrics['l0']:.1f} features a layer and "
        f"token, {metrics['dead']:.1%} silent: {flags.out}/card.json"
    )
    answer(flags.json, card, text)


@contextlib.contextmanager
def _listener(n_steps: int, run: Run) -> Iterator[Listener]:
    """Progress with tokens/s, FVU, L0 and the dead share, and a stop."""
    from jaxclt.train.trainer import Listener

    with Stages(run.say) as stages:

        def stage(what: str, done: int, total: int) -> None:
            run.look()
            stages(what, done, total)

        def step(record: dict[str, Any]) -> None:
            # No look: a run that is asked to stop here ends with a checkpoint.
            note = (
                f"{record['tokens_per_s']:,.0f} tokens/s, FVU {record['fvu']:.3f}, "
                f"L0 {record['l0']:.1f}, dead {record['dead']:.1%}"
            )
            stages("steps", record["step"], n_steps, note=note)

        yield Listener(
            stage=stage,
            step=step,
            line=run.line,
            stoppable=lambda: contextlib.nullcontext(run.stop),
        )
