"""`zoact`: finetune, replay, explain, export, tune, bench, demo. Thin: options in, text out; all else is elsewhere.

Errors that a user can mend are one line and exit code 2; `--debug` anywhere shows the traceback.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

import typer
from rich.console import Console

from .hardware import bench, explain, tune
from .runs import demo, export, finetune, methods, replay
from .terminal import Display, console

__all__ = ["Display", "app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune low-bit language models by forward passes only. --debug shows tracebacks.",
)
for command in (finetune, replay, export, methods, explain, tune, bench, demo):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 2 for what a user can mend, 128 + n when stopped by signal n."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _say_warning
            app([argument for argument in given if argument != "--debug"])
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if debug:
            raise
        Console(stderr=True, highlight=False).print(f"error: {error}", markup=False, style="red", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        if debug:
            raise
        sys.exit(130)


def _say_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    console.print(f"warning: {message}", markup=False, style="yellow", soft_wrap=True)
