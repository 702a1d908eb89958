"""The command line: it makes a Study and a Runtime of arguments. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import secateur
from secateur.cli.compare import compare
from secateur.cli.flower import init, wrap
from secateur.cli.models import export, list_, predict
from secateur.cli.report import budget, log, report
from secateur.cli.runs import resume, run
from secateur.engines.stopping import Stopped, stoppable
from secateur.errors import SecateurError

app = typer.Typer(
    help="Prune neural networks while they train across a federation, and measure what it saves.",
    no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def _version(asked: bool) -> None:  # noqa: FBT001 -- as typer calls it
    if asked:
        sys.stdout.write(f"secateur {secateur.__version__}\n")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")]


@app.callback()
def _whole(version: Version = False) -> None:  # noqa: FBT002 -- as typer calls it
    del version


for command in (run, resume, compare, report, log, budget, export, predict, init, wrap):
    app.command()(command)
app.command(name="list")(list_)


def main() -> None:
    """Run the command line. An error that a user can mend is one line on stderr, with exit code 2.

    So is being stopped: the line says how to go on, and the exit code is 130 after Control-C, 143 after SIGTERM.
    """
    try:
        with stoppable():
            app()
    except SecateurError as error:
        sys.stderr.write(f"secateur: {error}\n")
        raise SystemExit(2) from None
    except Stopped as stopped:
        sys.stderr.write(f"secateur: {stopped}\n")
        raise SystemExit(stopped.status) from None
