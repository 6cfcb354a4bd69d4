"""The `jaxclt` command: one frozen config dataclass per subcommand, no logic.

Results go to stdout, progress and logs to stderr. Exit status: 0 done, 2 bad input (one
line that says what to change), 130 interrupted by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from rich.console import Console

from jaxclt.cli_causal import PatchConfig, ValidateConfig, run_patch, run_validate
from jaxclt.cli_convert import ConvertConfig, run_convert
from jaxclt.cli_demo import DemoConfig, run_demo_command
from jaxclt.cli_eval import EvalConfig, run_eval
from jaxclt.cli_explain import ExplainConfig, run_explain
from jaxclt.cli_features import FeaturesConfig, run_features
from jaxclt.cli_fetch import FetchConfig, run_fetch
from jaxclt.cli_globals import GlobalsConfig, run_globals
from jaxclt.cli_progress import Interrupted
from jaxclt.cli_serve import ServeConfig, run_serve
from jaxclt.cli_trace import SweepConfig, TraceConfig, run_sweep, run_trace
from jaxclt.cli_view import ViewConfig, run_view
from jaxclt.errors import InputError
from jaxclt.train.config import TrainConfig

__all__ = ["main"]

_RESUMES = (SweepConfig, EvalConfig, GlobalsConfig, FeaturesConfig, TrainConfig)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line and exit."""
    from jaxclt.train.command import TrainCommand, run_train

    try:
        config = _parse(argv)
    except KeyboardInterrupt:  # before anything began
        sys.exit(130)
    run = {
        DemoConfig: run_demo_command,
        TraceConfig: run_trace,
        SweepConfig: run_sweep,
        FetchConfig: run_fetch,
        ConvertConfig: run_convert,
        ViewConfig: run_view,
        ServeConfig: run_serve,
        ExplainConfig: run_explain,
        PatchConfig: run_patch,
        ValidateConfig: run_validate,
        EvalConfig: run_eval,
        GlobalsConfig: run_globals,
        FeaturesConfig: run_features,
        TrainCommand: run_train,
    }[type(config)]
    say = Console(stderr=True, highlight=False)
    try:
        run(config, say)
    except InputError as error:
        if config.debug:
            traceback.print_exc()
        say.print(f"jaxclt: {error}", markup=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt as error:
        kept = "every file is whole"
        if isinstance(config, _RESUMES):
            kept = "the same command goes on from what is kept"
        say.print(f"jaxclt: interrupted; {kept}")
        sys.exit(error.status if isinstance(error, Interrupted) else 130)


def _parse(argv: Sequence[str] | None) -> Any:
    from jaxclt.train.command import TrainCommand, train_defaults

    defaults = train_defaults(sys.argv[1:] if argv is None else argv)
    return tyro.cli(
        Annotated[DemoConfig, tyro.conf.subcommand("demo")]  # pyright: ignore
        | Annotated[TraceConfig, tyro.conf.subcommand("trace")]
        | Annotated[SweepConfig, tyro.conf.subcommand("sweep")]
        | Annotated[FetchConfig, tyro.conf.subcommand("fetch")]
        | Annotated[ConvertConfig, tyro.conf.subcommand("convert")]
        | Annotated[ViewConfig, tyro.conf.subcommand("view")]
        | Annotated[ServeConfig, tyro.conf.subcommand("serve")]
        | Annotated[ExplainConfig, tyro.conf.subcommand("explain")]
        | Annotated[PatchConfig, tyro.conf.subcommand("patch")]
        | Annotated[ValidateConfig, tyro.conf.subcommand("validate")]
        | Annotated[EvalConfig, tyro.conf.subcommand("eval")]
        | Annotated[GlobalsConfig, tyro.conf.subcommand("globals")]
        | Annotated[FeaturesConfig, tyro.conf.subcommand("features")]
        | Annotated[TrainCommand, tyro.conf.subcommand("train", default=defaults)],
        args=argv,
        prog="jaxclt",
        description="Circuit tracing in JAX: explain a prediction as a feature graph.",
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
