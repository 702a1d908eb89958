"""What a run's configuration may name on a node: nothing is imported, called or opened that its owner did not name."""

import importlib
import sys

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install '.[flower]' in a clone of secateur")

from loopgrid import LoopGrid, Node
from secateur import data, methods, models
from secateur.data.shards import open_shards
from secateur.errors import ConfigError, EngineError
from secateur.flower import apps, client_app, messages, policy
from secateur.flower import engine as engine_of
from secateur.flower.greeting import Greeting, Rows
from secateur.flower.settings import settings_of
from secateur.study.options import choices, flatten
from secateur.study.study import parse_study

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
SETTINGS = {
    "method": "fedavg", "rounds": 1, "data.clients": 2, "participation": 1.0, "data.partition": "iid",
    "model.name": "mlp", "model.options.hidden": "[4]", "training.epochs": 1, "wait": 0.2,
}  # fmt: skip
# a module that tells when it is imported, and when something of it is called
TRAP = """
from pathlib import Path
HERE = Path(__file__).parent
(HERE / "imported").touch()
from dataclasses import dataclass
from secateur.aggregation.steps import Mean
from secateur.methods.kit.composition import Composition
from secateur.data import Source, load
from secateur.models.tabular import MLP

def net(shape, outputs, **options):
    (HERE / "called").touch()
    return MLP(shape, outputs, hidden=(4,))

def read(folder, seed):
    (HERE / "called").touch()
    return load("digits", seed=seed)

@dataclass(frozen=True)
class Slot(Mean):
    pass
"""
METHOD = TRAP + "\n@dataclass(frozen=True)\nclass Theirs(Composition):\n    pass\n"


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SECATEUR_ALLOW", raising=False)
    monkeypatch.setattr(engine_of, "_PULL_EVERY", 0.001)


@pytest.fixture
def trap(monkeypatch, tmp_path):
    """Put the modules of the trap where they would be found; return their folder."""
    folder = tmp_path / "site"
    (folder / "trap_package").mkdir(parents=True)
    (folder / "trap_module.py").write_text(TRAP)
    for name, text in (("__init__", "from pathlib import Path\n(Path(__file__).parent / 'imported').touch()\n"),
                       ("method", METHOD)):  # fmt: skip
        (folder / "trap_package" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    yield folder
    for name in [n for n in sys.modules if n.startswith("trap_")]:
        del sys.modules[name]


def greeted(settings, kind=messages.HELLO, payload=None, **config):
    """Return what a node of this configuration answers to a server whose run has these settings."""
    grid = LoopGrid({1: Node(client_app(), 1, settings, **{"partition-id": 0, **config})})
    about = {} if payload is None else {"run": "r", "client": 0, "kept": ""}
    (ask,) = grid.push_messages([messages.Message(messages.pack(about, payload), 1, kind)])
    (reply,) = grid.pull_messages([ask])
    return messages.unpack(reply.content)[0]


def everything(folder):
    return sorted((str(p.relative_to(folder)), p.stat().st_mtime_ns, p.is_file() and p.read_bytes())
                  for p in folder.rglob("*") if "__pycache__" not in p.parts)  # fmt: skip


NAMES = [
    {"method": "trap_module"},
    {"method": "trap_package.method"},
    {"method": "os.path"},
    {"model.name": "trap_module:net"},
    {"aggregator": "trap_module:Slot"},
    {"set": "aggregator=trap_module:Slot"},
    {"set": "'options.aggregator=trap_module:Slot'"},
    {"set": "data.source=trap_module:read:/etc"},
    {"data.source": "trap_module:read"},
    {"data.source": "shutil:rmtree"},
    {"data.source": "text:/etc/passwd"},
    {"data.source": "table:/etc/passwd#1#2"},
    {"data.source": "idx:/tmp"},
    {"data.source": "cifar10:~"},
    {"data.source": "hub:mnist"},
    {"data.source": "hub:/etc"},
    {"data.source": "digits:/etc"},
    {"data.source": "/etc/passwd"},
    {"data.source": "no_such_module:f"},
    {"data.task": "trap_module:Slot"},
    {"set": "data.task=trap_module:Slot"},
    {"set": "guards.trap_module.norm=1"},
    {"set": "guards.trap_package.method.norm=1"},
    {"guards.trap_module.norm": 1},
    {"guards.os.path.norm": 1},
    {"attack": "trap_module"},
    {"attack": " trap_package.method :0.5,scale=2"},
    {"set": "attack=os.path:0.3"},
]


@pytest.mark.parametrize("own", [False, True], ids=["simulated", "own data"])
@pytest.mark.parametrize("named", NAMES, ids=str)
def test_what_the_owner_did_not_name_is_refused_before_anything_happens(named, own, trap, tmp_path, said):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "patients.csv").write_text("a,b\n1,2\n")
    config = {"data": str(folder), "state": str(tmp_path / "state")} if own else {"state": str(tmp_path / "state")}
    before, modules = everything(tmp_path), set(sys.modules)
    for kind, payload in ((messages.HELLO, None), (messages.SERVE, b"x")):
        told = greeted({**SETTINGS, **named}, kind, payload, **config)
        assert set(told) == {"error", "detail"}
        assert told["error"] == "allow"
        assert 0 < len(told["detail"]) <= 80
    assert everything(tmp_path) == before
    assert not {m for m in set(sys.modules) - modules if m.startswith("trap_")}
    assert len(said()) == 2  # one line for each try
    assert all("not allowed here: " in line and "--node-config 'allow=" in line for line in said())


def test_a_loader_that_deletes_finds_nothing_to_delete(tmp_path):
    """The instance that was found: the node's own data folder was gone after the greeting."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "patients.csv").write_text("1,2\n")
    told = greeted({**SETTINGS, "data.source": "shutil:rmtree"}, data=str(tmp_path / "rows"))
    assert told == {"error": "allow", "detail": "data.source=shutil:rmtree"}
    assert (tmp_path / "rows" / "patients.csv").read_text() == "1,2\n"


def test_a_file_of_the_server_is_not_opened_beside_a_folder_of_the_nodes_own(tmp_path):
    """A file with its columns, ``table:FILE#1#2``: the node's folder would be put behind the columns."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.csv").write_text("1,2\n")
    secret = tmp_path / "secret.csv"
    secret.write_text("1,2,3\n" * 50)
    told = greeted({**SETTINGS, "data.source": f"table:{secret}#1#2"}, data=str(tmp_path / "rows"))
    assert told["error"] == "allow"


@pytest.mark.parametrize("where", ["node", "environment"])
def test_what_the_owner_names_works_and_only_where_it_was_named(where, trap, tmp_path, monkeypatch):
    settings = {
        **SETTINGS, "method": "trap_package.method", "model.name": "trap_module:net", "data.source": "trap_module:read",
        "set": "aggregator=trap_module:Slot", "out": str(tmp_path / "run"),
    }  # fmt: skip
    del settings["model.options.hidden"]
    text = (
        "method=trap_package.method model.name=trap_module:net data.source=trap_module:read aggregator=trap_module:Slot"
    )
    config = {"allow": text} if where == "node" else {}
    if where == "environment":
        monkeypatch.setenv("SECATEUR_ALLOW", text)
    grid = LoopGrid({k + 1: Node(client_app(), k + 1, settings, **{"partition-id": k, **config}) for k in range(2)})
    summary = apps.serve(grid, settings)
    assert summary["left_out"] == {}
    assert (trap / "called").exists()
    swapped = {**settings, "model.name": "trap_module:read"}  # a loader's name is no model's
    assert greeted(swapped, **config) == {"error": "allow", "detail": "model.name=trap_module:read"}
    folder = {**settings, "data.source": "trap_module:read:/etc"}  # nor is a folder named with it
    assert greeted(folder, **config) == {"error": "allow", "detail": "data.source=trap_module:read:/etc"}


def test_a_place_that_the_owner_names_may_be_opened_by_a_node_without_data(tmp_path):
    text = tmp_path / "a play.txt"
    text.write_text("\n\n".join(f"ROLE {k}:\n{'to be or not to be ' * 20}" for k in range(4)))
    settings = {**SETTINGS, "data.source": f"text:{text}", "model.name": "charlstm"}
    del settings["model.options.hidden"]
    assert greeted(settings)["error"] == "allow"
    assert greeted(settings, allow=f"'data.source=text:{text}'")["kind"] == "tokens"


def test_all_that_is_the_packages_own_is_allowed():
    for name in methods.names():
        options = {path: str(value) for path, value in flatten(methods.find(name)()).items()}
        assert policy.refused({"method": name, "options": options}, (), own=False) == []
    for name in models.names():
        assert policy.refused({"model": {"name": name}}, (), own=False) == []
    asks_a_network = {"hub"}
    for name in data.names():
        wrong = policy.refused({"data": {"source": name}}, (), own=True)
        assert wrong == ([("data.source", name)] if name in asks_a_network else [])
    assert policy.refused({}, (), own=False) == []
    from secateur.aggregation import Aggregator

    assert not any(":" in name for name in choices(Aggregator))


def test_the_policy_sees_what_the_study_would_use():
    """The last of two settings of one path holds, for both."""
    values = settings_of({**SETTINGS, "model.name": "mlp", "set": "model.name=twocnn model.name=a:b"})
    assert policy.refused(values, (), own=False) == [("model.name", "a:b")]
    values = settings_of({**SETTINGS, "set": "options.aggregator=x:Y criterion.explore.start=u:V"})
    assert policy.refused(values, (), own=False) == [("aggregator", "x:Y"), ("criterion.explore.start", "u:V")]


def test_a_long_or_broken_name_costs_a_short_line(said):
    long = "x" * 10_000 + "\nsecateur: forged:f"
    tries = [{"data.source": long}, {long: "a:b"}, {"set": f"{long}=a:b"}, {f"training.{long}": 1}]
    for named in tries:
        told = greeted({**SETTINGS, **named})
        assert told["error"] in {"allow", "settings"}
        assert len(told["detail"]) <= 80
    assert len(said()) == len(tries)
    assert all(len(line) < 2100 and "\n" not in line for line in said())


@pytest.mark.parametrize(
    ("text", "match"), [("data.source", "write it as path=value"), ("'a=b", "No closing quotation")]
)
def test_an_owners_text_that_is_no_setting_is_said_so(text, match, said):
    with pytest.raises(ConfigError, match=match):
        policy.allowed(text)
    assert greeted(SETTINGS, allow=text) == {"error": "policy", "detail": ""}
    assert match in said()[0]


def test_a_server_imports_no_task_that_a_node_names(trap):
    """Rows of the nodes' own say what is learnt of them; a server takes this package's tasks, or its study's."""
    rows = {"inputs": [4], "outputs": 3, "kind": "tabular", "scale": 1.0, "task": "trap_module:Slot"}
    rows |= {"classes": "", "model": "0" * 16}
    made = parse_study({"data": {"clients": 2}, "model": {"name": "mlp"}})

    def said(**more):
        return {0: Greeting(client=0, own=True, rows=Rows(**rows | more))}

    with pytest.raises(EngineError, match="if you trust it, set data.task to it"), apps._rows(made, said()):
        pass
    assert not (trap / "imported").exists()
    with apps._rows(made, said(task="regression")) as folder:
        assert open_shards(folder).task == "regression"
