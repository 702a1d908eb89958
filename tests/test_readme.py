"""What README and docs tell to type works as it stands."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_comparison_is_played_from_a_script_too(tmp_path):
    (tmp_path / "example.py").write_text(
        """
from pathlib import Path
from secateur.comparison import grid
from secateur.comparison.suite import Suite

common = {"data.clients": 3, "rounds": 1, "model.name": "mlp", "model.options.hidden": "[8]", "training.epochs": 1}
suite = Suite.model_validate({
    "source": "digits", "seeds": [0], "partitions": ["iid"], "common": common, "controls": [],
    "variants": {"plain": {"method": "fedavg"}},
})
print(len(grid.run_suite(suite, Path("out"), jobs=1)))
"""
    )
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) >= 1


def bare(text):
    """Return what a text tells to install under our name alone: on PyPI that is another project."""
    asked = re.findall(r"(?:pip|uv) (?:install|add|sync)[^\n`]*", text)
    asked += re.findall(r"^dependencies = \[[^\]]*\]", text, re.MULTILINE)
    return [
        line
        for line in asked
        if re.search(r"(?<![\w./-])secateur(?![\w./-])(?! @)", re.sub(r"in a clone of secateur|-t secateur", "", line))
    ]


def test_what_counts_as_our_bare_name():
    assert bare("pip install secateur") == ["pip install secateur"]
    assert bare("run: pip install --upgrade 'secateur[flower]' now")
    assert bare('dependencies = ["torch", "secateur[flower]"]')
    assert bare("`uv add secateur`")
    for good in (
        "pip install '.[hub]' in a clone of secateur", "pip install .", "pip install '/secateur[flower]'",
        "pip install '../secateur[hub]'", "pip install 'secateur @ file:///home/me/secateur'",
    ):  # fmt: skip
        assert not bare(good)


def told():
    """Return the files that tell somebody what to install."""
    places = [ROOT / "README.md", ROOT / "Makefile", ROOT / ".ci" / "run", ROOT / "CHANGELOG.md"]
    for folder in ("docs", "examples", "src", "benchmarks"):
        places += [p for p in (ROOT / folder).rglob("*") if p.suffix in {".md", ".py", ".toml", ".html", ".js", ""}]
    return [p for p in places if p.is_file()]


def test_nobody_is_told_to_install_another_projects_package():
    assert len(told()) > 150
    assert {str(p.relative_to(ROOT)): found for p in told() if (found := bare(p.read_text("utf-8")))} == {}


def test_every_extra_that_is_asked_for_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    texts = [p.read_text("utf-8") for p in told()]
    asked = {
        name for text in texts for name in re.findall(r"(?:need\([^)]*extra=|(?<!\w)install\()[\"'](\w+)[\"']", text)
    }
    asked |= {
        name
        for text in texts
        for found in re.findall(r"'(?:\.|/secateur)\[([\w,]+)\]'", text)
        for name in found.split(",")
    }
    assert {"hub", "flower", "report", "export", "structure"} <= asked <= set(extras)


def test_what_the_page_on_security_names_exists():
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    shown = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(shown) > 20
    assert [name for path, name in shown if f"\ndef {name}(" not in (ROOT / path).read_text("utf-8")] == []
    others = re.findall(r"`(benchmarks/\w+\.py|examples/\w+|tests/[\w/]+\.py)`", text)
    assert [path for path in others if not (ROOT / path).exists()] == []
