"""The house rules that a program can check: imports point down and never in a circle, no pickle, small functions."""

import ast
import os
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import secateur

ROOT = Path(secateur.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# The rooms, low to high: folders, and the few modules that stand alone. Rooms of one floor never import each other.
FLOORS = [
    {"errors", "streams", "cost"},
    {"bandwidth"},
    {"pruning", "wire", "engines", "data"},
    {"models"},
    {"learning"},
    {"contract"},
    {"aggregation"},
    {"methods", "guards", "attacks"},
    {"study"},
    {"federation"},
    {"flower", "comparison"},
    {"report"},
    {"export"},
    {"api"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(FLOORS) for name in names}


def unit(path):
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def imported(path):
    """Return the units of this package that a file imports, wherever in the file."""
    units = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "secateur":
            rest = node.module.split(".")[1:]
            units |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            units |= {a.name.split(".")[1] for a in node.names if a.name.startswith("secateur.")}
    return units


def test_every_room_has_its_floor():
    assert {unit(path) for path in FILES} - {"__init__"} == set(RANK)


def test_the_page_on_architecture_names_every_room_on_its_floor():
    text = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d*) ?\| (`[^|]*) \|", text.partition("## The rooms")[2], re.MULTILINE)
    floors = []
    for number, rooms in rows:
        if number:
            floors.append(set())
            assert int(number) == len(floors)
        floors[-1] |= set(re.findall(r"`(\w+)`", rooms))
    assert floors == FLOORS


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    here = unit(path)
    if here == "__init__":
        assert imported(path) == set()
        return
    for other in imported(path) - {here}:
        assert RANK[other] < RANK[here], f"{here} imports {other}"


def name_of(path):
    """Return a file's module name; a package's is that of its folder."""
    parts = ["secateur", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def modules_imported(name):
    """Return the modules of this package that a module imports, wherever in its file."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & MODULES.keys()) or {node.module}
    return (found & MODULES.keys()) - {name}


def test_no_circle_of_imports():
    graph = {name: modules_imported(name) for name in MODULES}
    assert sum(map(len, graph.values())) > len(graph)
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as circle:
        pytest.fail(" -> ".join(reversed(circle.args[1])))


def test_the_top_level_is_folders_and_a_few_modules():
    assert len([path for path in FILES if path.parent == ROOT]) <= 8


def test_engines_know_no_tensor_and_nobody_pickles():
    for path in FILES:
        modules = {
            name
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        tops = {m.split(".")[0] for m in modules}
        assert not tops & {"pickle", "dill", "cloudpickle", "marshal", "torchvision"}
        assert "flwr" not in tops or path in {ROOT / "flower" / "messages.py", ROOT / "flower" / "supernode.py"}
        if unit(path) == "engines":
            assert not tops & {"torch", "numpy"}


def test_a_client_needs_no_data_set_stack():
    """An edge device that installs without dependencies needs torch, numpy, pydantic and safetensors."""
    code = "import sys, secateur.federation.client; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    heavy = {"datasets", "flwr_datasets", "flwr", "sklearn", "pandas", "pyarrow", "matplotlib", "rich", "typer"}
    assert not heavy & set(done.stdout.split())


def functions():
    for path in FILES:
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, source.splitlines(), node


def code_lines(lines, node):
    doc = node.body[0] if ast.get_docstring(node) else None
    skip = range(doc.lineno, doc.end_lineno + 1) if doc else ()
    numbers = [n for n in range(node.lineno, node.end_lineno + 1) if n not in skip]
    return sum(bool(lines[n - 1].strip()) and not lines[n - 1].strip().startswith("#") for n in numbers)


def parameters(node):
    names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    more = [one for one in (node.args.vararg, node.args.kwarg) if one]
    return len([name for name in names if name not in {"self", "cls"}]) + len(more)


def test_functions_take_eight_parameters_at_most():
    assert not {f"{name_of(path)}.{node.name}" for path, _, node in functions() if parameters(node) > 8}


def test_no_method_reads_replies_one_by_one():
    for path in (ROOT / "methods").rglob("*.py"):
        assert not re.search(r"for .*message.* in .*replies", path.read_text()), path


def file_lines(path):
    """Return a file's lines of code: no docstrings, comments or blank lines."""
    source = path.read_text()
    lines = source.splitlines()
    skipped = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            skipped |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    kept = (line.strip() for number, line in enumerate(lines, 1) if number not in skipped)
    return sum(bool(line) and not line.startswith("#") for line in kept)


@pytest.mark.parametrize("path", sorted((ROOT / "methods").glob("*.py")), ids=lambda path: path.stem)
def test_a_method_is_one_small_file(path):
    assert file_lines(path) <= 100


def test_functions_and_modules_are_small():
    sizes = [(code_lines(lines, node), f"{path.name}:{node.name}") for path, lines, node in functions()]
    assert max(sizes)[0] <= 50, max(sizes)
    ordered = sorted(size for size, _ in sizes)
    assert ordered[len(ordered) // 2] <= 8
    assert all(len(path.read_text().splitlines()) <= 420 for path in FILES)


def test_no_asserts_validate_and_no_global_random_state():
    for path in FILES:
        tree = ast.parse(path.read_text())
        asserts = [n for n in ast.walk(tree) if isinstance(n, ast.Assert)]
        assert len(asserts) <= (1 if path.name == "cost.py" else 0), path
        text = path.read_text()
        if path.name != "streams.py":
            for call in ("torch.manual_seed", "np.random", "random.seed", "torch.rand(", "torch.randperm("):
                for line in text.splitlines():
                    assert call not in line or "generator=" in line, f"{path.name}: {line.strip()}"
