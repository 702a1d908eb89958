"""Every command and piece of code in README and docs is checked: how, and what is not run and why, stands here."""

import ast
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from secateur import cli
from secateur.cli.runs import RunFlags, _study
from secateur.comparison import suite as suites

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page.parent.name != "tutorials"]  # test_tutorials runs those as they stand

# What the first word of a line in a block of commands is, and how the line is checked.
HOW = {
    "secateur": "parsed, and its study or suite is made; each command is run, on fewer rounds: test_cli, test_compare, "
    "test_export, test_trackers, test_report",
    "python": "the file and its flags are looked for; not run: benchmarks take minutes to hours; deploy.py is run by "
    "test_deployment",
    "make": "the target is looked for; not run: it makes an environment, or runs these tests",
    "pip": "its form is checked (test_readme); not run: it changes the environment that tests run in",
    "flwr": "the app and the settings it declares are looked for; run by test_deployment and test_init_wrap",
    "sh": "not run: it starts a node for good; test_deployment (long) runs what deploy.py packs",
    "apt-get": "not run: it installs what one measurement needs, as root",
    "git": "not run: the address of the repository is left out",
    "--node-config": "not a command but a part of one, which test_policy and test_flower_base use",
    "layers": "not a command but what one prints",
    "set": "not a command but a setting of a Flower app's configuration",
}
# Blocks that are read and not run: the page on migration shows what was written before; and a list of signatures.
READ = ("docs/migration.md", "plan(state)  ")
# What stands for something of the reader's own, so that a study or suite cannot be made of it.
OWN = {"my_package.my_method", "./my_method.py", "mine.toml"}


def blocks():
    for page in PAGES:
        for found in re.finditer(r"^```(\w*)\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE):
            yield str(page.relative_to(ROOT)), found[1], found[2]


def commands():
    for page, language, text in blocks():
        if language in {"", "bash", "sh"}:
            for line in text.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    yield page, line


def code(*languages):
    found = [
        (f"{page}-{n}", text) for n, (page, language, text) in enumerate(blocks())
        if language in languages and not (page + text).startswith(READ) and not text.startswith(READ)
    ]  # fmt: skip
    return [pytest.param(text, id=name) for name, text in found]


def test_every_line_and_every_kind_of_block_is_known():
    lines = list(commands())
    assert len(lines) > 40
    assert {line.split()[0] for _, line in lines} == set(HOW)
    # hex: golden bytes of the wire, read by wire/test_golden; diff: below; text: code of before, or none
    assert {language for _, language, _ in blocks()} == {"", "python", "toml", "diff", "hex", "text"}


def braces(word):
    """Return what a shell makes of ``a{b,c}d``: abd and acd."""
    found = re.fullmatch(r"(.*)\{(.*)\}(.*)", word)
    return [found[1] + one + found[3] for one in found[2].split(",")] if found else [word]


def context_of(words):
    """Return a command's context, its words parsed; a flag that does not exist, or a missing argument, is an error."""
    group = get_command(cli.app)
    whole = group.make_context("secateur", words, resilient_parsing=True)
    command = group.get_command(whole, words[0])
    assert command is not None, words
    return command.make_context(words[0], words[1:], parent=whole)


@pytest.mark.parametrize(("page", "line"), [one for one in commands() if one[1].startswith("secateur")])
def test_a_command_is_understood_with_its_settings(page, line):
    words = [one for word in shlex.split(line, comments=True)[1:] for one in braces(word)]
    given = context_of(words).params
    if words[0] == "run" and given["config"] is None and given["method"] not in OWN:
        _study(RunFlags(**given))
    if words[0] == "compare" and not OWN & set(given["what"]):
        what = [str(ROOT / word) if word.endswith(".toml") else word for word in given["what"]]
        chosen, place = suites.chosen(what, given["data"])
        wanted = chosen.adjusted(given["seeds"], given["rounds"], given["partition"] or [], given["settings"] or [])
        assert suites.cells(wanted, place)


def test_a_wrong_command_would_be_found():
    for line in ("run --roundz 3", "resume", "run fedsparsfy", "run fedavg --set training.rate=1", "lists"):
        words = line.split()
        with pytest.raises((Exception, SystemExit)):  # of click, or of secateur
            _study(RunFlags(**context_of(words).params))


@pytest.mark.parametrize(("page", "line"), [one for one in commands() if one[1].startswith(("python", "make", "flwr"))])
def test_files_flags_and_targets_exist(page, line):
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        targets = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{word}:", targets, re.MULTILINE) for word in words[1:])
        return
    place = ROOT / next(word for word in words[1:] if "/" in word)
    if words[0] == "python":
        text = place.read_text("utf-8")
        assert not [word for word in words if word.startswith("--") and f'"{word}"' not in text]
        return
    config = tomllib.loads((place / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    for word in shlex.split(words[words.index("--run-config") + 1]) if "--run-config" in words else []:
        assert word.partition("=")[0] in config


@pytest.mark.parametrize("text", code("python"))
def test_python_is_python_and_what_it_imports_exists(text):
    """The README's example is run whole by test_readme, those of docs/method.md by contract and own-slot tests."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "secateur":
            module = importlib.import_module(node.module)
            assert all(
                hasattr(module, one.name) or importlib.import_module(f"{node.module}.{one.name}") for one in node.names
            )


@pytest.mark.parametrize("text", code("toml"))
def test_toml_is_a_suite_or_an_apps_configuration(text):
    values = tomllib.loads(text)
    if {"variants", "source"} <= set(values):  # without a source it is a part of one
        assert suites.cells(suites.parse(values, "of the page"), "path/to/data")
        return
    config = values.get("tool", {}).get("flwr", {}).get("app", {}).get("config")
    assert config is not None or values
    if config is not None:
        settings = pytest.importorskip("secateur.flower.settings", reason="Flower is not installed")
        flat = pytest.importorskip("flwr.common.config").flatten_dict(config)
        assert settings.study_of(flat)[0].rounds == config["rounds"]


def test_the_diff_of_the_page_on_flower_is_the_file_beside_the_quickstart():
    (shown,) = [text for page, language, text in blocks() if (page, language) == ("docs/flower.md", "diff")]
    assert shown == (ROOT / "examples" / "quickstart" / "fedsparsify.diff").read_text()
