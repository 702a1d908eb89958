"""The commands for Flower's people: ``init`` writes an app, ``wrap`` prints the lines that prune one."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli.base import bundled
from secateur.errors import ConfigError
from secateur.study.usual import METHOD, SOURCE

if TYPE_CHECKING:
    from secateur.cli.scaffold import Scaffold

_NODES = 4


@dataclass(frozen=True)
class InitFlags:
    """The flags of ``init``."""

    folder: Annotated[Path, typer.Argument(help="A new folder for the app")]
    method: Annotated[str, typer.Option(help="A name of `secateur list`, or your own FILE.py")] = METHOD
    data: Annotated[str, typer.Option(help="digits; or table, arrays, images: each node's own folder")] = SOURCE
    target: Annotated[str | None, typer.Option(help="The column to learn of the nodes' tables")] = None
    model: Annotated[str | None, typer.Option(help="A name of `secateur list`, or your own FILE.py:factory")] = None
    clients: Annotated[int, typer.Option(help="The number of nodes")] = _NODES
    rounds: Annotated[int, typer.Option(help="R")] = 20
    settings: Annotated[list[str] | None, typer.Option("--set", help="path=value: training.lr=0.1")] = None


@bundled
def init(flags: InitFlags) -> None:
    """Write a complete Flower app, with the study in its pyproject.toml, ready for flwr run and for hosts."""
    made = _scaffold(flags)
    for path in made.write():
        sys.stdout.write(f"Written: {path}\n")
    allow = f"SECATEUR_ALLOW={shlex.quote(' '.join(made.named))} " if made.named else ""
    nodes = f"--federation-config 'num-supernodes={flags.clients}'"
    trial = f"{allow}flwr run {shlex.quote(str(flags.folder))} --stream {nodes}"
    told = f"How to run it: {flags.folder / 'README.md'}" if made.places else f"Try it: {trial}"
    sys.stdout.write(f"{told}\n")


def _scaffold(flags: InitFlags) -> Scaffold:
    """Return the app, after its study was made once, so that a wrong setting is refused before anything is written."""
    from secateur.cli.scaffold import Scaffold  # noqa: PLC0415
    from secateur.data import sources  # noqa: PLC0415
    from secateur.study.own import located  # noqa: PLC0415
    from secateur.study.study import assign, parse_study, split_setting  # noqa: PLC0415

    given = {
        "method": flags.method, "rounds": str(flags.rounds), "data.source": flags.data,
        "data.clients": str(flags.clients), "participation": "1.0", "data.target": flags.target,
        "model.name": flags.model,
    }  # fmt: skip
    texts = {path: value for path, value in given.items() if value is not None}
    texts |= dict(split_setting(setting) for setting in flags.settings or [])
    files = [Path(head) for value in texts.values() if (head := value.partition(":")[0]).endswith(".py")]
    settings = located(texts)
    named = [f"{path}={settings[path]}" for path, text in texts.items() if text != settings[path]]
    settings.pop("code", None)
    values: dict[str, object] = {}
    for path, value in settings.items():
        assign(values, f"{path}={value}")
    parse_study(values)
    name = settings["data.source"].partition(":")[0]
    places = name in sources.names() and name not in sources.embedded() and ":" not in settings["data.source"]
    return Scaffold(flags.folder, settings, flags.clients, files, places, named)


def wrap(
    app: Annotated[Path, typer.Argument(help="The folder of a Flower app, with its pyproject.toml")],
    method: Annotated[str, typer.Option(help="fedsparsify, autoflip, oneshot or random")] = "fedsparsify",
) -> None:
    """Print the lines that prune a Flower app that exists already, as a diff; the app is not changed."""
    from secateur import methods  # noqa: PLC0415
    from secateur.cli.wrapping import wrapped  # noqa: PLC0415
    from secateur.methods.kit.composition import Composition  # noqa: PLC0415

    found = methods.find(method)
    made = found()
    if not isinstance(made, Composition) or made.consensus.ballot or made.refines or made.criterion.by_training is None:
        raise ConfigError(
            f"{method} needs code of its own on the nodes, which another's app has not: take a method whose masks are "
            "made on the server, such as fedsparsify, autoflip, oneshot or random, or write an app by secateur init"
        )
    sys.stdout.write(wrapped(app, found.__module__, found.__name__))
    sys.stderr.write(f"To apply it: secateur wrap {shlex.quote(str(app))} | patch -p1 -d {shlex.quote(str(app))}\n")
