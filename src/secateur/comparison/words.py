"""What a command line compares: a suite by its name or file, or methods with their settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import util
from typing import Any

from secateur import methods
from secateur.comparison.suite import Suite, load, names
from secateur.errors import ConfigError, unknown
from secateur.study.own import located
from secateur.study.study import Study, split_setting


def chosen(words: Sequence[str], data: str | None = None) -> tuple[Suite, str | None]:
    """Return the suite that a command line asks for, and the folder or file of its data.

    Args:
        words: the name or file of one suite; or methods, each as ``METHOD`` or ``METHOD:PATH=VALUE,PATH=VALUE``.
        data: for a suite the folder or file of its source; for methods a data source, as for ``secateur run``.

    Raises:
        ConfigError: there is no such suite or method, or a variant is given twice.
    """
    if len(words) == 1 and (words[0].endswith(".toml") or words[0] in names()):
        return load(words[0]), data
    source = data or Study().data.source
    known = Study.model_validate({"data": {"source": source}})
    variants: dict[str, dict[str, Any]] = {}
    for word in words:
        method, _, rest = word.partition(":")
        if method.endswith(".toml") or method in names():
            raise ConfigError(f"{word}: a suite is compared by itself; to compare several, name methods")
        method = str(located({"method": method})["method"])
        if "." not in method and method not in methods.names() and util.find_spec(method) is None:
            raise unknown("suite or method", method, [*names(), "FILE.toml", *methods.names()])
        settings = dict(split_setting(setting, word) for setting in rest.split(",") if setting)
        name = named(method, settings)
        if name in variants:
            raise ConfigError(f"{name!r} is compared twice: {word}")
        variants[name] = {"method": word.partition(":")[0], **settings}
    title = f"{', '.join(dict.fromkeys(one['method'] for one in variants.values()))} on {source}"
    return Suite(title=title, source=source, partitions=[known.data.partition], variants=variants).located(), None


def named(method: str, settings: Mapping[str, Any]) -> str:
    """Return a variant's name, with its sparsity in per cent at the end, where tables by sparsity look for it."""
    words, end = [method.rpartition(".")[2]], ""
    for path, value in settings.items():
        last = path.rpartition(".")[2]
        try:
            share = f"{100 * float(value):.4g} %" if last in {"sparsity", "target"} else ""
        except ValueError:
            share = ""
        words += [] if share else [f"{last}={value}"]
        end = share or end
    return " ".join([", ".join(words), end]).strip()
