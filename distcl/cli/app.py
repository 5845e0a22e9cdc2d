"""The command line: parse, call, print. No logic of a run is here, and no import of torch."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from time import sleep
from typing import Annotated, Any, NoReturn

import typer

from distcl import __version__
from distcl.cli import bench, compare, inspect, launch, setup, shard, training
from distcl.cli.common import complain, launch_rank, say
from distcl.errors import DistclError, of_path, told

app = typer.Typer(
    help="Distributed continual learning with prioritized sampling.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS: dict[str, Callable[..., None]] = {
    **training.COMMANDS,
    "compare": compare.compare,
    "eval": inspect.evaluate_run,
    "predict": inspect.predict,
    "report": inspect.report,
    "status": inspect.status,
    "config": setup.show_config,
    "init": setup.init,
    "list": setup.list_parts,
    "doctor": setup.doctor,
    "shard": shard.shard,
    "launch": launch.launch,
    "bench": bench.bench,
}
for name, command in _COMMANDS.items():
    app.command(name)(command)
app.add_typer(inspect.checkpoint, name="checkpoint")

RANK_0_FIRST = 2.0
"""Seconds that another rank waits before it exits on an error: a launcher ends all processes as
soon as one is gone, and rank 0 must have told why."""

_PARSER_ERROR: Any = typer.BadParameter.__mro__[1]  # typer's UsageError, which it does not export


def main() -> NoReturn:
    """Run the command line and exit. Under a launcher, only rank 0 prints."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # warnings of torch's own, to its users
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException as error:  # the outermost place: a model may raise SystemExit(0), too
        piped = isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError)
        if piped and "torch.distributed" not in sys.modules:  # who reads has had enough: | head
            sys.exit(1)
        fail(error)
    leave(code or 0)


def leave(code: int) -> NoReturn:
    """End this process, at once if it is one of several: what is registered for exit still runs.

    Threads of a process group that is gone may abort a tidy exit ("terminate called without an
    active exception"), and the launcher would take that for a failure.
    """
    runtime = sys.modules.get("distcl.distributed.runtime")
    if runtime is not None and runtime.was_in_a_group():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def fail(error: BaseException) -> NoReturn:
    """End this process on an error: rank 0 prints one or two lines, every rank its exit code.

    With DISTCL_DEBUG=1 every rank prints the traceback too.
    """
    code, theirs = 1, told(error)
    ours = error if theirs else of_path(error)
    if isinstance(ours, DistclError):
        code, text = ours.exit_code, str(ours)
    elif isinstance(error, _PARSER_ERROR):
        command = error.ctx.command_path if error.ctx else "distcl"
        code, text = 2, f"{error.format_message().rstrip('.')}; see '{command} --help'"
    else:
        first = str(error).strip().partition("\n")[0]
        text = theirs or f"internal error: {type(error).__name__}: {first}"
        text += "\nset DISTCL_DEBUG=1 for the traceback"
    if os.environ.get("DISTCL_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    if launch_rank() == 0:
        complain(text)
    else:
        sleep(RANK_0_FIRST)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)  # threads of a broken process group could abort a tidy exit
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        say(f"distcl {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        say(context.get_help())
