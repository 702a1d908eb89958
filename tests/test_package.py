"""The public names, errors and streams."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import secateur
from secateur import errors, streams


def test_public_names_are_sorted_and_exist():
    assert secateur.__all__ == sorted(secateur.__all__)
    assert all(getattr(secateur, name) for name in secateur.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = secateur.nothing


def test_what_editors_are_told_is_what_there_is():
    stub = Path(secateur.__file__).with_suffix(".pyi").read_text()
    told = {name: home for home, name in re.findall(r"from secateur\.(\S+) import (\w+) as", stub)}
    assert told == secateur._HOME
    assert set(dir(secateur)) == {*secateur.__all__, "__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", secateur.__version__)


MODULES = [
    "errors",
    "federation.records",
    "streams",
    "study.options",
    "pruning.allocation",
    "pruning.criteria",
    "wire.entropy",
    "wire.reader",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"secateur.{name}")
    result = doctest.testmod(module)
    assert result.attempted
    assert result.failed == 0


def test_every_error_is_a_secateur_error():
    found = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(found) == 14
    assert all(issubclass(e, errors.SecateurError) for e in found)


def test_a_missing_extra_is_named():
    with pytest.raises(errors.MissingExtraError, match=r"pip install '\.\[hub\]' in a clone"):
        errors.need("no_such_package_here", extra="hub")
    assert errors.need("json", package="x").dumps([]) == "[]"


def test_check_words_name_value_and_bound():
    with pytest.raises(errors.DataError, match="x = 3 must be 2"):
        errors.check(False, name="x", value=3, must="be 2", error=errors.DataError)
    assert "did you mean" not in str(errors.unknown("thing", "zzz", ["abc"]))


def test_streams_are_told_apart_by_every_part_of_the_label():
    labels = [("a", 1), ("a", 2), ("a1",), ("a", "1"), ()]
    seeds = {streams.derive(0, *label) for label in labels}
    assert len(seeds) == len(labels)
    assert all(0 <= s < 2**63 for s in seeds)
    assert streams.derive(0, "a") != streams.derive(1, "a")
    draws = [torch.rand(3, generator=streams.stream(0, "x")) for _ in range(2)]
    assert torch.equal(*draws)
