"""The generated listing: complete, and docs/catalogue.md is it."""

from pathlib import Path

from secateur import attacks, methods, models
from secateur.report.listing import to_markdown
from secateur.study.catalogue import catalogue

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
    assert PAGE.read_text(encoding="utf-8") == to_markdown(catalogue()), "make docs writes it anew"
