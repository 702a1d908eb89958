# make run: the main job.  make test: the tests (make test-long: the long ones).  make lint: style and types.
# On a machine with only Python (3.11 or newer) and make, each of them makes its own environment first.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: run test test-long coverage lint format docs clean

run: .venv/installed
	$(BIN)/secateur run

test: .venv/tested
	$(BIN)/python -m pytest

# Whole tutorials, deployments beside hostile nodes, and others that take long.
test-long: .venv/tested
	$(BIN)/python -m pytest -m long

# The tests with their coverage: they take up to twice as long so.
coverage: .venv/tested
	$(BIN)/python -m pytest --cov=secateur --cov-branch --cov-report=term:skip-covered

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/tested
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation as a site in site/, its listing of methods, slot values, data and models made anew.
docs: .venv/documented
	$(BIN)/secateur list --markdown > docs/catalogue.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/tested: .venv/installed
	$(PIP) --editable '.[hub,dev]'
	touch $@

.venv/documented: .venv/installed
	$(PIP) --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv build dist site
