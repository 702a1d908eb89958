"""The public names, errors and streams."""

import doctest
import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


ROOT = Path(__file__).parents[1]


def test_constraints_name_a_version_of_everything_that_is_installed_for_the_tests():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    extras = {name: asked for name, asked in project["optional-dependencies"].items() if name != "executorch"}
    for asked in (project["dependencies"], *extras.values()):
        for requirement in map(Requirement, asked):
            name = canonicalize_name(requirement.name)
            assert name in pinned, f"{name} has no version in constraints.txt"
            assert requirement.specifier.contains(pinned[name]), (
                f"{requirement}, and constraints.txt has {pinned[name]}"
            )
    for name in pinned:
        for text in importlib.metadata.requires(name) or [] if installed(name) else []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert canonicalize_name(needed.name) in pinned, f"{needed.name}, which {name} needs, has no version"


def installed(name):
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def test_a_source_archive_is_complete_and_a_wheel_has_its_data(tmp_path):
    """What git knows is in the archive: tests, docs, examples, benchmarks; what is read at run time is in the wheel."""
    pytest.importorskip("build", reason="build is not installed: pip install '.[dev]' in a clone of secateur")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=False, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no clone with git, which knows the files")
    names = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    for name in names:
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / "clone" / name)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(tmp_path / "clone")]
    done = subprocess.run(build, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (archive,), (wheel,) = tmp_path.glob("secateur_fl-*.tar.gz"), tmp_path.glob("secateur_fl-*.whl")
    with tarfile.open(archive) as opened:
        inside = {name.partition("/")[2] for name in opened.getnames()}
    assert set(names) - inside <= {".gitignore"}
    with zipfile.ZipFile(wheel) as opened:
        packed = set(opened.namelist())
        metadata = opened.read(next(name for name in packed if name.endswith("METADATA"))).decode()
    assert {name.removeprefix("src/") for name in names if name.startswith("src/secateur/")} <= packed
    assert f"Name: secateur-fl\nVersion: {secateur.__version__}\n" in metadata
