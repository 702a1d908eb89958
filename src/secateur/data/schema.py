"""The schema of a federation's tables: columns, categories, classes, means and scales, and rows made by it.

Each site describes its table by an ``Outline``; ``agree`` makes one schema of them. A column belongs to it if more than
half of the sites have it, so that no single site dictates it to the others. What a site says is bounded in size.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from secateur.data.outline import (
    MOST_CATEGORIES,
    MOST_FEATURES,
    MOST_NUMBERS,
    Feature,
    Kind,
    Name,
    Outline,
    check_names,
    labels_of,
    outline,
    read,
    some,
)
from secateur.data.raw_table import Column, RawTable
from secateur.errors import DataError

_HALF = 0.5
_UNKNOWN = -1.0  # the code of a word that is none of the agreed categories

_Number = Annotated[float, Field(allow_inf_nan=False)]
_Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_WORDS = frozenset({"category", "text"})
_UNUSED = frozenset({"text", "unknown"})


@dataclass(frozen=True)
class Schema:
    """What the sites of a federation agree on about their tables.

    Attributes:
        features: the columns that are used, in order.
        target: the column to learn.
        unused: the columns that sites have and nothing is made of: words that are no categories, or no cell at all.
        mean, scale: of each feature over all sites' training rows, in its own unit; 0 and 1 of categories.
        marked: whether a cell of the feature is missing in any training row; an input marks it then.
        target_mean, target_scale: of a number to learn, in its own unit; 0 and 1 of classes.
    """

    features: Annotated[tuple[Feature, ...], Field(max_length=MOST_FEATURES)]
    target: Feature
    unused: Annotated[tuple[Name, ...], Field(max_length=MOST_FEATURES)] = ()
    mean: tuple[_Number, ...] = ()
    scale: tuple[_Scale, ...] = ()
    marked: tuple[bool, ...] = ()
    target_mean: _Number = 0.0
    target_scale: _Scale = field(default=1.0)

    def to_json(self) -> str:
        """Return it as JSON; numbers come back to the bit."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Schema:
        """Return what ``to_json`` wrote.

        Raises:
            DataError: it is none, beyond the bounds, or its parts do not fit each other.
        """
        found = read(_SCHEMA, text, "a schema")
        check_names([*found.features, found.target])
        if not {len(found.mean), len(found.scale), len(found.marked)} <= {len(found.features)}:
            raise DataError("a schema must have a mean, a scale and a mark for each feature")
        return found

    @property
    def digest(self) -> str:
        """Return 16 hexadecimal digits that name it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the classes to learn; empty for a number."""
        return self.target.categories

    @property
    def outputs(self) -> int:
        """Return the number of classes, 1 for a number."""
        return len(self.classes) or 1

    @property
    def task(self) -> str:
        """Return the name of the task."""
        return "classification" if self.classes else "regression"

    @property
    def unit(self) -> str:
        """Return the target's unit: what stands in brackets at the end of its name, as in ``age [years]``."""
        found = None if self.classes else re.search(r"[\[(]([^\[\]()]{1,20})[\])]\s*$", self.target.name)
        return found[1].strip() if found else ""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return a name for each of a model's inputs: numbers, then categories, then marks of missing cells."""
        numbers = [f.name for f in self.features if not f.categories]
        words = [f"{f.name}={word}" for f in self.features for word in f.categories]
        return (
            *numbers,
            *words,
            *(f"{f.name} missing" for f, mark in zip(self.features, self.marked, strict=True) if mark),
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """Return a line for each column that nothing is made of."""
        why = f"it is empty, or its words are no categories (more than {MOST_CATEGORIES}, or each in one row only)"
        return tuple(f"column {name!r} is left out: {why}" for name in self.unused)

    def raw(self, table: RawTable) -> NDArray[np.float64]:
        """Return the features of rows in their own units, float64 (rows, features).

        A missing cell is NaN. A category is its place among the agreed ones, -1 if it is none of them.

        Raises:
            DataError: the table lacks a column, has another one, or holds something else in it.
        """
        wrong = self.unlike(outline(table, table))
        if wrong:
            raise DataError(wrong)
        columns = {column.name: column for column in table.features}
        made = [codes_of(columns[f.name], f.categories) for f in self.features]
        return np.stack(made, axis=1) if made else np.zeros((len(table.ids), 0))

    def rows(self, raw: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return a model's inputs for rows of ``raw``, float32 (rows, inputs).

        Numbers have the mean 0 and the scale 1; a missing one is the federation's mean, which is 0 then. A category is
        one-hot; an unknown or missing one is all zero. Then a 1 or 0 for each feature that is marked if missing.
        """
        missing = np.isnan(raw)
        words = np.array([bool(f.categories) for f in self.features], dtype=bool)
        mean, scale = np.array(self.mean)[~words], np.array(self.scale)[~words]
        numbers = np.where(missing[:, ~words], 0.0, (raw[:, ~words] - mean) / scale)
        hot = [raw[:, [at]] == np.arange(len(f.categories)) for at, f in enumerate(self.features) if f.categories]
        parts = [numbers, *hot, missing[:, np.array(self.marked, dtype=bool)]]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def undone(self, inputs: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return rows of ``raw`` whose ``rows`` are these inputs, up to rounding; float64 (rows, features)."""
        raw, at = np.zeros((len(inputs), len(self.features))), 0
        for place, feature in enumerate(self.features):
            if not feature.categories:
                raw[:, place] = inputs[:, at].astype(np.float64) * self.scale[place] + self.mean[place]
                at += 1
        for place, feature in enumerate(self.features):
            if feature.categories:
                hot = inputs[:, at : at + len(feature.categories)]
                raw[:, place] = np.where(hot.any(axis=1), hot.argmax(axis=1), _UNKNOWN)
                at += len(feature.categories)
        for place in np.flatnonzero(self.marked).tolist():
            raw[inputs[:, at] > _HALF, place] = np.nan
            at += 1
        return raw

    def targets(self, table: RawTable) -> NDArray[np.int64] | NDArray[np.float32]:
        """Return what rows teach: class numbers, or numbers with the mean 0 and the scale 1.

        Raises:
            DataError: a class is none of the agreed ones.
        """
        if not self.classes:
            return ((table.target.values - self.target_mean) / self.target_scale).astype(np.float32)
        place = {name: number for number, name in enumerate(self.classes)}
        labels = labels_of(table.target)
        new = next((label for label in labels if label not in place), None)
        if new is not None:
            raise DataError(
                f"target {self.target.name!r} holds {new!r}, which is none of the agreed {len(place)} classes"
            )
        return np.array([place[label] for label in labels], dtype=np.int64)

    def unlike(self, site: Outline) -> str:
        """Return why a site's table does not fit, and what to do; empty if it does."""
        here, due = {f.name: f for f in site.features}, {f.name: f for f in self.features}
        if site.target.name != self.target.name:
            return f"it learns {site.target.name!r}, most sites {self.target.name!r}: name the same target column"
        lacking = [name for name in (*due, *self.unused) if name not in here]
        if lacking:
            return f"its table lacks column {some(lacking)}: add it (its cells may be empty)"
        more = [name for name in here if name not in due and name not in self.unused]
        if more:
            return f"its table has column {some(more)}, which most sites lack: take it out"
        wrong = next((f for name, f in due.items() if _group(here[name].kind) not in {_group(f.kind), "unknown"}), None)
        if wrong is not None:
            held = _held(here[wrong.name])
            return f"its column {wrong.name!r} holds {held}, at most sites {_held(wrong)}: mend its cells"
        return self._unlike_target(site)

    def _unlike_target(self, site: Outline) -> str:
        if self.target.kind != site.target.kind:
            return f"its target {self.target.name!r} holds {_held(site.target)}, at most sites {_held(self.target)}"
        if self.classes and not site.target.categories:
            return f"its target {self.target.name!r} holds more than {MOST_CATEGORIES} numbers, at most sites classes"
        return ""


_SCHEMA = TypeAdapter(Schema)


def agree(sites: Mapping[int, Outline], *, classes: bool | None = None) -> tuple[Schema, dict[int, str]]:
    """Return the schema of some sites without means and scales, and why each site that does not fit is left out.

    A column is in the schema if more than half of the sites have it; it holds what most of these say. Categories are
    those of all sites that fit, at most 100. Whole numbers of at most 20 values are classes if more than half of the
    sites have no others.

    Args:
        sites: each client's outline.
        classes: whether the target is one of several classes; None: as the sites' targets show.

    Raises:
        DataError: no site fits.
    """
    names = Counter(f.name for site in sites.values() for f in site.features)
    held: dict[str, list[Feature]] = {}
    for site in sites.values():
        for feature in site.features:
            held.setdefault(feature.name, []).append(feature)
    used = [_agreed(held[name]) for name in held if 2 * names[name] > len(sites)]
    target = _agreed_target([site.target for site in sites.values()], classes=classes)
    unused = tuple(f.name for f in used if f.kind in _UNUSED)
    schema = Schema(tuple(f for f in used if f.kind not in _UNUSED), target, unused)
    left = {who: wrong for who, site in sites.items() if (wrong := schema.unlike(site))}
    fits = [site for who, site in sites.items() if who not in left]
    if not fits:
        who = min(left)
        raise DataError(
            f"no site's table fits: client {who}: {left[who]}" if left else "no site has described its table"
        )
    return _complete(schema, fits), left


def _complete(schema: Schema, fits: Sequence[Outline]) -> Schema:
    """Return a schema with the categories and classes of the sites that fit, its columns in the first one's order."""
    features, unused = list[Feature](), list(schema.unused)
    place = {feature.name: at for at, feature in enumerate(fits[0].features)}
    for feature in sorted(schema.features, key=lambda feature: place[feature.name]):
        words = {word for site in fits for f in site.features if f.name == feature.name for word in f.categories}
        if feature.kind == "number":
            features.append(feature)
        elif len(words) > MOST_CATEGORIES:
            unused.append(feature.name)
        else:
            features.append(replace(feature, categories=tuple(sorted(words))))
    if not features:
        raise DataError(f"no column can be learnt from: {some(unused)} have no cell, or words that are no categories")
    target = schema.target
    if target.categories:
        classes = {word for site in fits for word in site.target.categories}
        target = replace(target, categories=tuple(sorted(classes, key=_order if target.kind == "number" else str)))
    if len(target.categories) == 1:
        raise DataError(f"target {target.name!r} is {target.categories[0]!r} in every row: there is nothing to learn")
    return Schema(tuple(features), target, tuple(unused))


def _agreed(held: Sequence[Feature]) -> Feature:
    """Return a column with the kind that most of its holders say; the first of equally frequent ones."""
    kinds = Counter(_group(f.kind) for f in held if f.kind != "unknown")
    words = [f for f in held if f.kind in _WORDS]
    if not kinds or kinds.most_common(1)[0][0] == "number":
        return Feature(held[0].name, "number" if kinds else "unknown")
    shared = 2 * sum(f.kind == "category" for f in words) >= len(words)
    return Feature(held[0].name, "category" if shared else "text")


def _agreed_target(targets: Sequence[Feature], *, classes: bool | None) -> Feature:
    if not targets:
        raise DataError("no site has described its table")
    name = Counter(t.name for t in targets).most_common(1)[0][0]
    held = [t for t in targets if t.name == name]
    words = next((t.categories[0] for t in held if t.kind != "number" and t.categories), None)
    if classes is False and words is not None:
        raise DataError(
            f"target {name!r} holds words, such as {words[:40]!r}, and data.task learns numbers: leave it out, or set "
            "data.task=classification"
        )
    kind = Counter(t.kind for t in held).most_common(1)[0][0]
    few = {word for t in held if t.kind == kind for word in t.categories}
    most = MOST_NUMBERS if kind == "number" and classes is None else MOST_CATEGORIES
    shown = 2 * sum(bool(t.categories) for t in held) > len(held) and len(few) <= most
    if (shown if classes is None else classes) or kind != "number":
        if len(few) > most or not few:
            raise DataError(
                f"target {name!r} has more than {most} classes: set data.task=regression, or choose another"
            )
        return Feature(name, kind, tuple(sorted(few)))
    return Feature(name)


def _order(label: str) -> tuple[float, str]:
    """Return what numbers as text are sorted by."""
    try:
        return float(label), ""
    except ValueError:
        return float("inf"), label


def codes_of(column: Column, categories: Sequence[str]) -> NDArray[np.float64]:
    """Return a column as a model takes it: numbers; or places among categories, -1 for other words; NaN if missing.

    Args:
        column: the column.
        categories: the agreed ones; empty for numbers.
    """
    if not categories:
        return np.full(len(column.values), np.nan) if column.missing.all() else column.values.astype(np.float64)
    place = {word: float(at) for at, word in enumerate(categories)}
    codes = np.array([*(place.get(word, _UNKNOWN) for word in column.categories), np.nan])
    return codes[np.where(column.missing, -1, column.values).astype(np.int64)]


def _group(kind: Kind) -> str:
    return "words" if kind in _WORDS else kind


def _held(feature: Feature) -> str:
    return "words" if feature.kind in _WORDS else "numbers"
