"""The suites that come with the package, as the catalogue lists them, and names that mean two things."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from secateur import methods
from secateur.comparison.suite import load, names
from secateur.study.catalogue import Detail, Entry, Setting


def entries() -> list[Entry]:
    """Return an entry for each suite of the package."""
    return [Entry(name, load(name).title, "") for name in names()]


def details(name: str) -> list[Detail]:
    """Return what there is to say of a suite: what is common to its variants, and what each of them sets."""
    if name not in names():
        return []
    suite = load(name)
    facts = {
        "source": suite.source, "partitions": ", ".join(suite.partitions), "seeds": ", ".join(map(str, suite.seeds)),
        "controls": ", ".join(suite.controls), **suite.common,
    }  # fmt: skip
    settings = [Setting(path, value, "") for path, value in facts.items()]
    for variant, given in suite.variants.items():
        settings.append(Setting(variant, ", ".join(f"{path}={value}" for path, value in given.items()), "a variant"))
    return [Detail("suites", Entry(name, suite.title, ""), settings, {})]


def shadowed(words: Sequence[str]) -> list[str]:
    """Return a remark for each word that names a suite or a method of the package, and a file that lies here too."""
    found = []
    for word in words:
        name = word.partition(":")[0]
        kind, ending = ("suite", ".toml") if name in names() else ("method", ".py")
        if name in {*names(), *methods.names()} and Path(name + ending).exists():
            found.append(f"{name} is the {kind} of the package; for the file that lies here write ./{name}{ending}")
    return found
