"""The lines that prune an existing Flower app, found by reading the app's source; nothing of it is run."""

from __future__ import annotations

import ast
import difflib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from secateur.errors import ConfigError

_OTHERWISE = "; docs/flower.md shows the five lines by hand"
Edit = tuple[int, int, str]
"""Where a text is put into a file's lines, as row from 0 and column, and the text."""


def wrapped(app: Path, module: str, name: str) -> str:
    """Return the change that prunes a Flower app, as a unified diff relative to the app's folder.

    Args:
        app: the folder with the app's ``pyproject.toml``.
        module: the module of the method, such as ``secateur.methods.fedsparsify``.
        name: the method's class.

    Raises:
        ConfigError: it is no Flower app, it imports secateur already, or it is written in another way.
    """
    server, _ = _component(app, "serverapp")
    client, client_app = _component(app, "clientapp")
    files = {path: Source.read(path) for path in (client, server)}
    edits: dict[Path, list[Edit]] = {path: [] for path in files}
    model, edited = files[server].strategy(name)
    edits[server] += [*edited, files[server].imports(f"from {module} import {name}")]
    edits[server].append(files[server].imports("from secateur.flower import Pruned"))
    edits[client] += [files[client].mods(client_app, files[client].model_of_client(model))]
    edits[client].append(files[client].imports("from secateur.flower import prune"))
    return "".join(_diff(app, files[path], edits[path]) for path in files)


def _component(app: Path, key: str) -> tuple[Path, str]:
    """Return the file of a Flower app's component, and the name of the app in it."""
    path = app / "pyproject.toml"
    try:
        component = tomllib.loads(path.read_text("utf-8"))["tool"]["flwr"]["app"]["components"][key]
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as broken:
        raise ConfigError(f"{app} is no Flower app: {path} cannot be read: {broken}") from broken
    except (KeyError, TypeError) as broken:
        raise ConfigError(f"{app} is no Flower app: {path} has no tool.flwr.app.components.{key}") from broken
    module, _, name = str(component).partition(":")
    file = app.joinpath(*module.split(".")).with_suffix(".py")
    if not file.is_file():
        raise ConfigError(f"{path} names {component!r}, and there is no file {file}")
    return file, name


@dataclass(frozen=True)
class Source:
    """A file of an app: its path, its text and its syntax tree."""

    path: Path
    text: str
    tree: ast.Module

    @classmethod
    def read(cls, path: Path) -> Source:
        """Return a file.

        Raises:
            ConfigError: it cannot be read, is no Python, or imports secateur already.
        """
        try:
            text = path.read_text("utf-8")
            made = cls(path, text, ast.parse(text))
        except (OSError, SyntaxError, ValueError) as broken:
            raise ConfigError(f"{path} cannot be read: {broken}") from broken
        if any(module.partition(".")[0] == "secateur" for module in made._modules()):
            raise ConfigError(f"{path} imports secateur already: there is nothing to wrap")
        return made

    def _modules(self) -> Iterator[str]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                yield node.module or ""
            elif isinstance(node, ast.Import):
                yield from (one.name for one in node.names)

    def strategy(self, name: str) -> tuple[str, list[Edit]]:
        """Return the source of the server's model, and the edits that put ``Pruned`` around its strategy."""
        for body in (node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)):
            started = next((call for call in _calls(body, "start") if _names(call, "grid")), None)
            if started is None or not isinstance(started.func, ast.Attribute):
                continue
            found = self._made(body, started.func.value)
            if found is None:
                break
            model = self._model(body, "state_dict")
            if model is None:
                raise ConfigError(
                    f"{self.path}: no model is found whose state_dict() the server starts with{_OTHERWISE}"
                )
            return model, [(*_start(found), "Pruned("), (*_end(found), f", {name}(), {model})")]
        raise ConfigError(
            f"{self.path}: no strategy is found on which .start(grid=...) is called, as in Flower's Message API"
            f"{_OTHERWISE}"
        )

    def model_of_client(self, fallback: str) -> str:
        """Return the source of the client's model, whose names must be there where the app is made."""
        found = next(
            (model for body in self.tree.body if isinstance(body, ast.FunctionDef)
             if (model := self._model(body, "load_state_dict")) is not None), fallback,
        )  # fmt: skip
        known = {name for node in self.tree.body for name in _bound(node)}
        unknown = {node.id for node in ast.walk(ast.parse(found)) if isinstance(node, ast.Name)} - known
        if unknown:
            raise ConfigError(
                f"{self.path}: the model is made as {found}, and {min(unknown)!r} is not known where the "
                f"ClientApp is made{_OTHERWISE}"
            )
        return found

    def mods(self, app: str, model: str) -> Edit:
        """Return the edit that adds the mod to the ClientApp; it goes before the app's own mods."""
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and app in _bound(node) and isinstance(node.value, ast.Call):
                call = node.value
                given = next((one.value for one in call.keywords if one.arg == "mods"), None)
                if given is None:
                    row, column = _end(call)
                    before = ", " if call.args or call.keywords else ""
                    return row, column - 1, f"{before}mods=[prune({model})]"
                if isinstance(given, ast.List):
                    row, column = _start(given)
                    return row, column + 1, f"prune({model}), " if given.elts else f"prune({model})"
        raise ConfigError(f"{self.path}: no line {app} = ClientApp(...) is found{_OTHERWISE}")

    def imports(self, line: str) -> Edit:
        """Return the edit that adds an import below those of Flower."""
        rows = [
            node.end_lineno or node.lineno for node in self.tree.body
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "flwr"
        ]  # fmt: skip
        if not rows:
            raise ConfigError(f"{self.path} has no line: from flwr... import ...{_OTHERWISE}")
        return max(rows), 0, line + "\n"

    def _model(self, body: ast.FunctionDef, method: str) -> str | None:
        """Return the source of what a call of ``method`` in a function is made on."""
        for call in _calls(body, method):
            if isinstance(call.func, ast.Attribute) and (made := self._made(body, call.func.value)) is not None:
                return ast.get_source_segment(self.text, made)
        return None

    def _made(self, body: ast.FunctionDef, thing: ast.expr) -> ast.Call | None:
        """Return the call that makes a thing: itself, or what its name was assigned in the function or the file."""
        if isinstance(thing, ast.Call):
            return thing
        if not isinstance(thing, ast.Name):
            return None
        made = [
            node.value for place in (body, self.tree) for node in ast.walk(place)
            if isinstance(node, ast.Assign) and thing.id in _bound(node) and isinstance(node.value, ast.Call)
        ]  # fmt: skip
        return made[0] if made else None


def _calls(body: ast.AST, method: str) -> Iterator[ast.Call]:
    for node in ast.walk(body):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method:
            yield node


def _names(call: ast.Call, argument: str) -> bool:
    return any(one.arg == argument for one in call.keywords)


def _bound(node: ast.stmt) -> set[str]:
    """Return the names that a statement gives a meaning."""
    if isinstance(node, ast.Assign):
        return {one.id for target in node.targets for one in ast.walk(target) if isinstance(one, ast.Name)}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {one.asname or one.name.partition(".")[0] for one in node.names}
    return {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()


def _start(node: ast.expr) -> tuple[int, int]:
    return node.lineno - 1, node.col_offset


def _end(node: ast.expr) -> tuple[int, int]:
    return (node.end_lineno or node.lineno) - 1, node.end_col_offset or 0


def _diff(app: Path, source: Source, edits: list[Edit]) -> str:
    before = source.text.splitlines(keepends=True)
    after = [line.encode() for line in before]  # a column of a syntax tree counts bytes
    for row, column, text in sorted(edits, reverse=True):
        if text.endswith("\n"):
            after.insert(row, text.encode())
        else:
            after[row] = after[row][:column] + text.encode() + after[row][column:]
    name = source.path.relative_to(app).as_posix()
    lines = difflib.unified_diff(before, [line.decode() for line in after], f"a/{name}", f"b/{name}", n=2)
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)
