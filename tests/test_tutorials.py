"""The tutorials are run as they stand: their blocks in order, in an empty folder. And the site of the docs builds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "docs" / "tutorials").glob("*.md") if path.stem != "index")
BLOCK = re.compile(r"^```(\w+)(?: title=\"([\w./]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    """Return the blocks of a page that a reader pastes: language, file name or nothing, text."""
    return [(one[1], one[2], one[3]) for one in BLOCK.finditer(page.read_text("utf-8"))]


def run(command, folder, **more):
    return subprocess.run(command, cwd=folder, env=environment() | more, capture_output=True, text=True, check=False)


def environment():
    found = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "100"}
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return found | quiet | {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "OMP_NUM_THREADS": "1"}


LONG = {"comparison", "flower", "method"}  # many runs, or Flower's simulation


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.stem, marks=[pytest.mark.long] if p.stem in LONG else []) for p in PAGES]
)
def test_a_tutorial_runs_as_it_stands(page, tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    ran = 0
    for language, title, text in blocks(page):
        if title:
            (tmp_path / title).write_text(text, "utf-8")
            continue
        shell, python = ["bash", "-euo", "pipefail", "-c", text], [sys.executable, "-W", "error", "-c", text]
        command = {"bash": shell, "python": python}
        assert language in command, f"a reader cannot paste a block of {language!r}"
        done = run(command[language], tmp_path)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 1


def test_every_tutorial_is_told_of():
    listed = re.findall(r"\]\((\w+)\.md\)", (ROOT / "docs" / "tutorials" / "index.md").read_text("utf-8"))
    assert sorted(listed) == [page.stem for page in PAGES]


def test_the_site_builds_and_has_every_page(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = run(build, ROOT, NO_MKDOCS_2_WARNING="1")
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*.html")} >= pages
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    missing = [str(page.with_suffix(".md")) for page in pages if str(page.with_suffix(".md")) not in text]
    assert not missing, f"not in the site's navigation: {missing}"
    whole = (tmp_path / "reference" / "contract.html").read_text("utf-8")
    assert all(name in whole for name in ("absorb", "Reduction", "Guard"))
