"""The generated listing: complete, and docs/catalogue.md is it."""

import json
from pathlib import Path

import pytest

from secateur import attacks, methods, models
from secateur.cli.models import list_
from secateur.comparison import known
from secateur.errors import ConfigError
from secateur.report.listing import to_markdown
from secateur.study.catalogue import attributes, catalogue, details, names
from secateur.study.options import build

PAGE = Path(__file__).parents[1] / "docs" / "catalogue.md"


def test_everything_is_listed_with_one_line():
    kinds = catalogue()
    assert [e.name for e in kinds["methods"]] == methods.names()
    assert {e.name for e in kinds["models"]} == set(models.names())
    assert [e.name for e in kinds["attacks"]] == attacks.names()
    measured = {"fisher", "grasp", "snip", "synflow", "taylor"}
    assert {e.name for e in kinds["criterion"]} == {"magnitude", "random", "deviation"} | measured
    assert {"allocation", "granularity", "schedule", "consensus", "recovery", "aggregator", "data"} <= set(kinds)
    assert all(e.summary and "\n" not in e.summary for entries in kinds.values() for e in entries)
    assert all(e.reference for e in kinds["methods"])


def test_the_page_in_the_docs_is_what_the_code_says():
    assert PAGE.read_text(encoding="utf-8") == to_markdown({**catalogue(), "suites": known.entries()}), "make docs"


def test_every_name_has_its_options_in_full():
    """Each option of a method can be set to its own default, and says what it is."""
    options = [(name, option) for name in names() for one in details(name) for option in one.options]
    silent = [f"{name} {option.path}" for name, option in options if not option.summary]
    assert len(options) > 300
    assert not silent
    for name in methods.names():
        (one,) = [found for found in details(name) if found.kind == "methods"]
        given = {option.path: option.default for option in one.options}
        assert build(methods.find(name), given) == methods.find(name)()


def test_the_lines_of_a_docstring():
    text = """A thing.

    Attributes:
        a, b: two numbers
            of one kind. Both count.
        c: a third.

    Raises:
        ValueError: never.
    """
    two = "two numbers of one kind."
    assert attributes(text) == {"a": two, "b": two, "c": "a third."}
    assert attributes("Nothing.") == {}


def test_details_by_hand():
    (one,) = details("fedsparsify")
    assert {"schedule.sparsity": 0.9, "schedule.exponent": 3.0}.items() <= {
        o.path: o.default for o in one.options
    }.items()
    (frl,) = details("frl")
    assert frl.recommended == {"training.optimiser": "adam", "training.lr": 0.001}
    (cnn,) = details("SmallCNN")
    assert [(o.path, o.default) for o in cnn.options] == [("model.width", 16), ("model.features", 64)]
    (table,) = details("table")
    assert "data.options.delimiter" in {o.path for o in table.options}
    assert table.recommended["data.partition"] == "natural"
    assert {one.kind for one in details("random")} == {"methods", "criterion"}
    (quick,) = known.details("quick")
    assert {o.path: o.default for o in quick.options}["FedDST 80 %"] == "method=feddst, sparsity=0.8, every=5"


def test_it_is_shown_in_full_and_as_json(capsys):
    list_("frl")
    out = capsys.readouterr().out
    assert "Recommends, unless set: training.optimiser = adam" in out
    list_("frl", as_json=True)
    (one,) = json.loads(capsys.readouterr().out)
    assert one["entry"]["name"] == "frl"
    assert {option["path"] for option in one["options"]} >= {"aggregator"} or one["options"]
    list_(as_json=True)
    kinds = json.loads(capsys.readouterr().out)
    assert {"methods", "criterion", "guards", "data", "models", "suites"} <= set(kinds)
    with pytest.raises(ConfigError, match="unknown name 'fedsparsfy': did you mean 'fedsparsify'"):
        list_("fedsparsfy")
