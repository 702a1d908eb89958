"""What the commands share."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

import secateur

if TYPE_CHECKING:
    from rich.console import Console

Flags = TypeVar("Flags")
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the last line and errors only.")]


def bundled(command: Callable[[Flags], None]) -> Callable[..., None]:
    """Return a command that takes each field of a bundle of flags as a parameter, as typer wants it."""
    hints = get_type_hints(command)
    (bundle,) = [hint for name, hint in hints.items() if name != "return"]
    annotations = get_type_hints(bundle, include_extras=True)

    def flat(**values: Any) -> None:
        command(bundle(**values))

    def parameter(one: Field[Any]) -> inspect.Parameter:
        default = inspect.Parameter.empty if one.default is MISSING else one.default
        either = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Parameter(one.name, either, default=default, annotation=annotations[one.name])

    signature = inspect.Signature([parameter(one) for one in fields(bundle)])
    flat.__signature__ = signature  # type: ignore[attr-defined]
    flat.__name__, flat.__doc__, flat.__annotations__ = command.__name__, command.__doc__, annotations
    return flat


def warm(workers: int | None = None) -> None:
    """Start the workers' imports, so that they run while this process does its own."""
    if workers != 0:
        from secateur.engines.workers import warm  # noqa: PLC0415

        warm()


def new_console(*, quiet: bool = False) -> Console:
    """Return a console on standard output; a quiet one prints nothing."""
    from rich.console import Console  # noqa: PLC0415

    return Console(quiet=quiet)


def begin(what: str, *, quiet: bool) -> None:
    """Say at once which version does what, before the imports that take a second or more."""
    if not quiet:
        sys.stdout.write(f"secateur {secateur.__version__}: {what}\n")
        sys.stdout.flush()
