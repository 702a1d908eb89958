"""A complete Flower app for a study: written from its settings, without a network."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import ConfigError

_APP = '''"""The two apps of this federation: what they do is in the run configuration of pyproject.toml."""

from secateur.flower import client_app, server_app

server = server_app()
client = client_app()
'''

_PROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = {name}
version = "0.1.0"
description = {description}
# Flower installs what stands here beside its own environment, which has secateur already. Add what your own code needs.
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "me"

[tool.flwr.app.components]
serverapp = "{module}:server"
clientapp = "{module}:client"

# The study's settings by their paths, and five of the server's own: set: more settings, also for --run-config, which
# overrides only what stands here; out: the run's folder; deadline: seconds for a round; wait: for the first nodes;
# link: the clients' links, such as 1Mbit/s,flower:4s, by which it is said before a round who cannot keep the deadline.
[tool.flwr.app.config]
{config}
"""

_README = """# {name}

{description}

{trial}

Other settings for one run: `--run-config 'rounds=5 set="training.lr=0.05"'`. The run's folder, `runs/METHOD-HASH` or
what `out` says, is that of `secateur run`: `secateur report`, `secateur export` and `secateur.load` read it.

On hosts, start a SuperLink and, on each of {nodes} of them, a SuperNode; secateur must be installed on all:

```
flower-superlink --ssl-ca-certfile ca.crt --ssl-certfile server.pem --ssl-keyfile server.key --enable-supernode-auth
flower-supernode --superlink HOST:9092 --root-certificates ca.crt --auth-supernode-private-key node \\
    --node-config 'partition-id=K{data}{permit}'        # K from 0 to {last}
flwr run . CONNECTION --stream
```

`data` is a folder of the host's own rows, which never leave it. A node takes nothing else that a run names: code of
your own must be allowed there with `allow`.
"""


_SIMULATED = """Try it on this machine, with Flower's simulation (`pip install 'flwr[simulation]'`):

```
{allow}flwr run . --stream --federation-config 'num-supernodes={nodes}'
```"""
_OWN_ROWS = """Each node reads a folder of its own, which the nodes of Flower's simulation have not. On one machine,
with a file of rows for each site in FOLDER, the same study is:

```
secateur run {method} --data {data}:FOLDER --rounds {rounds} ...     # the other settings of pyproject.toml by --set
```"""


@dataclass(frozen=True)
class Scaffold:
    """An app to be written.

    Attributes:
        folder: where.
        settings: the study's settings by path, as texts.
        clients: the number of nodes.
        files: files of one's own that the settings name, to be copied beside the app.
        places: whether each node reads a folder of its own.
        named: the settings that name code of one's own, which nodes must allow.
    """

    folder: Path
    settings: Mapping[str, str]
    clients: int
    files: Sequence[Path] = ()
    places: bool = False
    named: Sequence[str] = ()

    @property
    def name(self) -> str:
        """Return the project's name: that of the folder, in letters, figures and hyphens."""
        found = re.sub(r"[^a-z0-9]+", "-", self.folder.absolute().name.lower()).strip("-")
        return found if found[:1].isalpha() else f"app-{found}".strip("-")

    @property
    def module(self) -> str:
        """Return the name of the app's module."""
        return self.name.replace("-", "_") + "_app"

    def texts(self) -> dict[str, str]:
        """Return the text of each file by its name."""
        description = f"{self.settings['method']} on {self.settings['data.source']}, with secateur"
        permit = f' allow="{" ".join(self.named)}"' if self.named else ""
        project = _PROJECT.format(
            name=json.dumps(self.name), description=json.dumps(description), module=self.module, config=self._config()
        )
        readme = _README.format(
            name=self.name, description=description, nodes=self.clients, last=self.clients - 1, permit=permit,
            data=' data="/data"' if self.places else "", trial=self._trial(),
        )  # fmt: skip
        return {"pyproject.toml": project, f"{self.module}.py": _APP, "README.md": readme}

    def _trial(self) -> str:
        """Return how the app is tried on one machine."""
        if self.places:
            given = self.settings
            return _OWN_ROWS.format(method=given["method"], data=given["data.source"], rounds=given["rounds"])
        allow = f"export SECATEUR_ALLOW={shlex.quote(' '.join(self.named))}\n" if self.named else ""
        return _SIMULATED.format(allow=allow, nodes=self.clients)

    def _config(self) -> str:
        """Return the run configuration: a line for each setting; those that TOML could not hold together in ``set``."""
        paths = list(self.settings)
        clash = [p for p in paths if any(q.startswith(f"{p}.") or p.startswith(f"{q}.") for q in paths if q != p)]
        lines = [f"{path} = {_toml(value)}" for path, value in self.settings.items() if path not in clash]
        more = shlex.join(f"{path}={self.settings[path]}" for path in clash)
        return "\n".join([*lines, f"set = {json.dumps(more)}", 'out = ""', "deadline = 600", "wait = 120", 'link = ""'])

    def write(self) -> list[Path]:
        """Write the app; return the paths of its files.

        Raises:
            ConfigError: the folder exists and is not empty, or it cannot be written.
        """
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ConfigError(f"{self.folder} is there already and is not an empty folder: give the name of a new one")
        texts = self.texts()
        taken = next((file for file in self.files if file.name in texts), None)
        if taken is not None:
            raise ConfigError(f"{taken} has the name of the app's own module: give the folder another name")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                (self.folder / name).write_text(text, "utf-8")
            for file in self.files:
                shutil.copyfile(file, self.folder / file.name)
        except OSError as broken:
            raise ConfigError(f"cannot write the app into {self.folder}: {broken.strerror}") from broken
        return [self.folder / name for name in (*texts, *(file.name for file in self.files))]


def _toml(text: str) -> str:
    """Return a setting's text as a TOML value: a number or a truth value where it is one, else a text."""
    if text in {"true", "false"}:
        return text
    try:
        value: Any = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    return text if isinstance(value, int | float) and not isinstance(value, bool) else json.dumps(text)
