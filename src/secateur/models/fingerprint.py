"""The digest of a model that is an object of this process: of its structure, its weights, and the code it runs."""

from __future__ import annotations

import dis
import functools
import hashlib
import sys
import sysconfig
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_INSTALLED = tuple({str(Path(path).resolve()) for name, path in sysconfig.get_paths().items() if name.endswith("lib")})
"""Where the code of packages lies, which goes by its name."""
_PASSING = frozenset({"training", "__module__", "__doc__", "__dict__", "__weakref__", "__annotations__"})
_PASSING_CODE = frozenset({"__firstlineno__", "__static_attributes__", "__annotate__", "__annotate_func__"})


def digest(thing: object) -> str:
    """Return 8 hexadecimal digits that change with whatever a model, or a factory of models, computes with.

    That is its class and the names of its parts, every tensor, what modules keep in attributes of their own, and the
    compiled code of its classes and of the functions that they call, unless these are of an installed package.
    """
    walk = _Walk()
    walk.take(thing)
    return walk.running.hexdigest()[:8]


class _Walk:
    """Goes through an object once and feeds a running digest."""

    def __init__(self) -> None:
        self.running = hashlib.sha256()
        self._seen: dict[int, int] = {}
        self._alive: list[object] = []  # else an identity could be given to another object

    def take(self, thing: Any) -> None:
        if isinstance(thing, _PLAIN):
            self._say(repr(thing))
        elif id(thing) in self._seen:
            self._say(f"again {self._seen[id(thing)]}")
        else:
            self._seen[id(thing)] = len(self._seen)
            self._alive.append(thing)
            self._take_new(thing)

    def _take_new(self, thing: Any) -> None:
        self._say(type(thing).__name__)
        if isinstance(thing, torch.Tensor):
            kept = thing.detach().cpu().contiguous()
            self._say(f"{kept.dtype} {tuple(kept.shape)} {thing.requires_grad}")
            self.running.update(kept.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(thing, np.ndarray):
            self._say(f"{thing.dtype} {thing.shape}")
            self.running.update(np.ascontiguousarray(thing).tobytes())
        elif isinstance(thing, Mapping):
            self._all([part for item in thing.items() for part in item])
        elif isinstance(thing, list | tuple):
            self._all(thing)
        elif isinstance(thing, set | frozenset):
            self._say(repr(sorted(map(repr, thing))))
        elif isinstance(thing, types.ModuleType):
            self._say(thing.__name__)
        else:
            self._take_code_or_object(thing)

    def _take_code_or_object(self, thing: Any) -> None:
        if isinstance(thing, types.CodeType):
            self.running.update(thing.co_code)
            self._all([thing.co_names, thing.co_consts])
        elif isinstance(thing, types.MethodType):
            self._all([thing.__func__, thing.__self__])
        elif isinstance(thing, functools.partial):
            self._all([thing.func, thing.args, thing.keywords])
        elif isinstance(thing, type | types.FunctionType | types.BuiltinFunctionType):
            self._say(f"{thing.__module__}.{thing.__qualname__}")
            if not _installed(thing.__module__):
                self._class(thing) if isinstance(thing, type) else self._function(thing)
        else:
            self._all([type(thing), {name: value for name, value in _kept(thing).items() if name not in _PASSING}])

    def _class(self, cls: type) -> None:
        skipped = _PASSING | _PASSING_CODE
        self._all([cls.__bases__, {name: value for name, value in vars(cls).items() if name not in skipped}])

    def _function(self, function: Callable[..., object]) -> None:
        code: Any = getattr(function, "__code__", None)
        if code is None:
            return
        self._all([code, function.__defaults__, function.__kwdefaults__])
        cells = getattr(function, "__closure__", None) or ()
        self._all([cell.cell_contents for cell in cells if _filled(cell)])
        known = getattr(function, "__globals__", {})
        self._all([known[name] for name in sorted(_names(code)) if name in known])

    def _all(self, things: Any) -> None:
        self._say(str(len(things)))
        for thing in things:
            self.take(thing)

    def _say(self, text: str) -> None:
        self.running.update(f"{text}\x1f".encode())


def _kept(thing: object) -> Mapping[str, object]:
    """Return what an object keeps: its own attributes, or what a property or a class method wraps."""
    wrapped = {name: getattr(thing, name, None) for name in ("fget", "fset", "__func__", "__wrapped__")}
    return {**getattr(thing, "__dict__", {}), **{name: value for name, value in wrapped.items() if value is not None}}


def _names(code: types.CodeType) -> set[str]:
    """Return the names of its module that some code, and the code within it, reads."""
    inner = [_names(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    read = {step.argval for step in dis.get_instructions(code) if step.opname in {"LOAD_GLOBAL", "LOAD_NAME"}}
    return read.union(*inner)


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 -- reading it tells
    except ValueError:
        return False
    return True


def _installed(module: str) -> bool:
    """Return whether a module's code is Python's own or a package's."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:  # built in, or what a notebook and standard input define
        return module != "__main__" and not module.startswith("__")
    return str(Path(file).resolve()).startswith(_INSTALLED)
