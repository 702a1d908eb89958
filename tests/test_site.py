"""What a node's owner decides: the configuration, the limits, and what a hostile server gets of it."""

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: pip install '.[flower]' in a clone of secateur")


from secateur import models
from secateur.errors import DataError
from secateur.federation import prepare
from secateur.flower import codes, limits
from secateur.flower.asked import Node
from secateur.flower.codes import CODES, RefusedError
from secateur.flower.memory import Memory
from secateur.flower.site import Most, Site, site_of
from secateur.learning.loop import Effort
from secateur.learning.optimiser import Training
from secateur.learning.work import Evaluate, Learn, Measure, Train
from secateur.study.study import parse_study

ROOT = Path(__file__).parents[1]


def test_a_hostile_server_gets_nothing_that_the_policy_does_not_say(tmp_path):
    """Under an audit hook, in a process of its own: each try is one line in the log, and reads and writes nothing."""
    folder = tmp_path.resolve() / "site"
    done = subprocess.run(
        [sys.executable, "hostile_server.py", str(folder)], cwd=ROOT / "tests", capture_output=True, text=True,
        timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    tried = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(tried) >= 30
    python = tuple(str(Path(path).resolve()) for path in (*sys.path, sys.prefix, sys.base_prefix, ROOT / "src") if path)
    for one in tried:
        what = one["try"]
        assert one["said"]["error"] == one["expected"], what
        assert len(one["log"]) == 1, what
        assert "\n" not in one["log"][0], what
        assert str(folder) not in json.dumps(one["said"]).replace(what, ""), what
        assert one["modules"] == [], what
        assert one["seconds"] < 5, what
        assert one["memory"] < 2**28, what
        check_events(one["events"], folder, python, what)
    assert not list((folder / "traps").rglob("imported"))
    assert {path.name for path in folder.iterdir()} <= {"data", "secret", "traps", "state"}


def check_events(events, folder, python, what):
    """Let a process read its node's data and state and Python's own files, and change nothing."""
    reads = {"open", "os.listdir", "os.scandir"}
    for event, given in events:
        if event == "import":
            assert not given[0].startswith("trap"), what
            continue
        assert event in reads, (what, event, given)
        assert event != "open" or "w" not in given[1], (what, given)
        path = str(Path(given[0]).resolve())
        inside = any(Path(path).is_relative_to(folder / place) for place in ("data", "state"))
        assert inside or path.startswith(python), (what, given)


# ---- the configuration


def test_a_policy_beside_the_data_is_read(tmp_path):
    (tmp_path / "secateur.toml").write_text(
        'methods = ["fedavg"]\nallow = ["model.name=my_models:net"]\nanswers = ["train"]\n[most]\nepochs = 2\n'
    )
    site = site_of({"partition-id": 0, "data": str(tmp_path)}, {"SECATEUR_ALLOW": "method=theirs"})
    assert (site.data, site.methods, site.answers, site.most.epochs) == (str(tmp_path), ("fedavg",), ("train",), 2)
    assert site.owners == {("model.name", "my_models:net"), ("method", "theirs")}
    assert site.most.rows == Most().rows


def test_a_policy_may_stand_elsewhere_or_in_the_nodes_own_configuration(tmp_path):
    (tmp_path / "policy.toml").write_text(f'data = "{tmp_path}"\nsources = ["table"]\n')
    site = site_of({"policy": str(tmp_path / "policy.toml")}, {})
    assert (site.data, site.sources) == (str(tmp_path), ("table",))
    told = {"methods": "fedavg autoflip", "most.epochs": 3, "most.seconds": 1.5, "answers": "train evaluate"}
    site = site_of({**told, "num-partitions": 4, "another-apps-own": 1}, {})
    assert (site.methods, site.answers) == (("fedavg", "autoflip"), ("train", "evaluate"))
    assert (site.most.epochs, site.most.seconds) == (3, 1.5)
    assert site_of({}, {}) == Site()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("metods = ['fedavg']", "unknown key 'metods': did you mean 'methods'"),
        ("[most]\nepoch = 3", "unknown key 'epoch': did you mean 'epochs'"),
        ("methods = ['fedavgg']", "did you mean 'fedavg'.*what is not ours is named in allow"),
        ("models = ['my_models:net']", "unknown model 'my_models:net'"),
        ("sources = ['idx:/srv']", "unknown source 'idx:/srv'"),
        ("[most]\nepochs = 0", "most.epochs = 0: input should be greater than or equal to 1"),
        ("[most]\nseconds = inf", "most.seconds = inf"),
        ("answers = ['score']", "answers.0 = 'score': input should be 'train', 'evaluate', 'explore' or 'statistics'"),
        ("allow = ['data.source']", "write it as path=value"),
        ("methods = [", "is not valid TOML"),
        ("most = 3", "most = 3: input should be"),
        ("state = 4", "state = 4: input should be a valid string"),
    ],
)
def test_a_wrong_policy_is_one_line_with_the_nearest_name(text, match, tmp_path):
    (tmp_path / "secateur.toml").write_text(text + "\n")
    with pytest.raises(RefusedError, match=match) as found:
        site_of({"data": str(tmp_path)}, {})
    assert found.value.code == "policy"
    assert "\n" not in str(found.value)


def test_slips_contradictions_and_missing_files_are_said(tmp_path):
    (tmp_path / "secateur.toml").write_text('state = "/a"\n')
    (tmp_path / "other.toml").write_text("")
    for config, match in (
        ({"polcy": "x.toml"}, "unknown key in --node-config 'polcy': did you mean 'policy'"),
        ({"most.epoch": 3}, "unknown key 'epoch': did you mean 'epochs'"),
        ({"data": str(tmp_path), "state": "/b"}, "state is set in --node-config and in .*secateur.toml: say it once"),
        ({"data": str(tmp_path), "policy": str(tmp_path / "other.toml")}, "there are two policies"),
        ({"policy": str(tmp_path / "none.toml")}, "No such file"),
        ({"methods": "'fedavg"}, "No closing quotation"),
    ):
        with pytest.raises(RefusedError, match=match) as found:
            site_of(config, {})
        assert found.value.code == "policy"


def test_what_is_answered_is_told_by_phase():
    site = Site(answers=("train", "statistics"))
    site.answering("train")
    site.answering("schema")
    for phase, kind in (("evaluate", "evaluate"), ("explore", "explore"), ("score", "explore"), ("None", "explore")):
        with pytest.raises(RefusedError) as found:
            site.answering(phase)
        assert (found.value.code, found.value.detail) == ("answers", kind)


def test_a_link_out_of_the_data_folder_is_refused_and_one_within_it_is_not(tmp_path):
    study = parse_study({"data": {"source": "arrays", "clients": 1}})
    (tmp_path / "own").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "own" / "a.txt").touch()
    (tmp_path / "own" / "b.txt").symlink_to("a.txt")
    (tmp_path / "linked").symlink_to(tmp_path / "own")  # the owner's own way to name the folder
    prepare._check_within(tmp_path / "linked")
    for target in ("../other", "../other/none.npz", "/etc"):
        link = tmp_path / "own" / "c"
        link.symlink_to(target)
        with pytest.raises(DataError, match="leads out of the data folder"):
            prepare.own(study, 0, str(tmp_path / "own"))
        link.unlink()


def test_the_policy_of_the_documentation_is_one_and_names_the_defaults(tmp_path):
    text = (ROOT / "docs" / "flower.md").read_text()
    (shown,) = [part for part in text.split("```toml\n")[1:] if "[most]" in part]
    path = tmp_path / "policy.toml"
    path.write_text(shown.partition("```")[0])
    site = site_of({"policy": str(path)}, {})
    assert site.most == Most()
    assert set(tomllib.loads(path.read_text())) == set(Site.model_fields) - {"data", "resident"}
    rows = {line.split("|")[1].strip() for line in text.partition("| code |")[2].splitlines()[2:] if "|" in line}
    told = {code.strip("`") for row in rows for code in row.split(", ")}
    assert set(CODES) <= told


def test_a_node_keeps_the_states_of_its_newest_runs(tmp_path):
    site, node = Site(state=str(tmp_path)), Node(1, 1, {}, {})
    (tmp_path / "base").mkdir()
    (tmp_path / "key-0").write_bytes(b"k")
    for number in range(20):
        name = Memory(node, site, f"run{number}", 0).put(b"state %d" % number, after="")
        os.utime(tmp_path / f"run{number}-0", (number, number))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "key-0", *(f"run{n}-0" for n in range(4, 20))}
    assert Memory(node, site, "run19", 0).get(name) == b"state 19"
    assert Memory(node, site, "run0", 0).get(name) is None


# ---- the limits


class Rows:
    """Rows of which only the number counts."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


def test_jobs_are_booked_before_they_begin():
    """Ten rows: by hand, 2 epochs are 20 rows, half of them 1 epoch is 5, a gradient of 3 batches of 4 is 12."""
    begun, training, data = [], Training(epochs=2, batch_size=4), Rows(10)
    meter = limits.Meter(Most(epochs=6, rows=57), begun.append)
    model = torch.nn.Linear(2, 2)
    meter(Train(model, {}, data, training, None))
    meter(Train(model, {}, data, training, None, effort=Effort(1, share=0.5)))
    meter(Learn(model, {}, data, training, {}, None, None))
    meter(Measure(model, {}, data, training, None, None, batches=3))
    assert (meter.epochs, meter.rows) == (5, 57)
    with pytest.raises(RefusedError, match="rows: 67 are asked for, 57 at most") as found:
        meter(Evaluate(model, {}, data))
    assert found.value.detail == "rows 57"
    assert len(begun) == 4
    meter = limits.Meter(Most(epochs=3), begun.append)
    with pytest.raises(RefusedError, match="epochs: 4 are asked for, 3 at most"):
        meter(Train(model, {}, data, training, None, effort=Effort(4)))
    assert len(begun) == 4
    with pytest.raises(TypeError, match="no known cost"):
        meter(object())


def test_what_runs_too_long_is_ended_and_nothing_comes_after_it():
    begun = time.monotonic()
    with pytest.raises(RefusedError, match=r"ended after 0\.2 s") as found, limits.within(0.2):
        while True:
            with contextlib.suppress(Exception):  # as anyone's code does
                math.sqrt(2.0)
    assert time.monotonic() - begun < 60
    assert (found.value.code, found.value.detail) == ("limit", "seconds 0.2")
    with limits.within(0.05):
        pass
    time.sleep(0.2)  # nothing strikes once the block is left
    with pytest.raises(KeyError), limits.within(30.0):
        raise KeyError


def test_another_threads_work_is_ended_too():
    told = []

    def work():
        try:
            with limits.within(0.1):
                while True:
                    math.sqrt(2.0)
        except RefusedError as refused:
            told.append(refused.code)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert told == ["limit"]


@pytest.mark.parametrize("name", models.names())
def test_models_of_the_package_are_measured_without_memory(name):
    """The count on torch's meta device is that of the model itself: one less refuses it, and it is enough."""
    shape = {"charlstm": (80,), "chartransformer": (80,), "gcn": (4, 9), "mlp": (6,)}.get(name, (3, 32, 32))
    study = parse_study({"model": {"name": name}, "data": {"clients": 1}})
    made = models.find(name)(shape, 10)
    count = sum(tensor.numel() for tensor in (*made.parameters(), *made.buffers()))
    limits.check_model(study, shape, 10, Most(parameters=count))
    with pytest.raises(RefusedError, match="more than the"):
        limits.check_model(study, shape, 10, Most(parameters=count - 1))
    with pytest.raises(RefusedError, match="parameters"):
        limits.check_made(made, Most(parameters=count - 1))


def test_a_model_of_more_than_this_machines_memory_is_refused_at_once():
    study = parse_study({"model": {"name": "mlp", "options": {"hidden": [10**7, 10**7]}}, "data": {"clients": 1}})
    with pytest.raises(RefusedError, match="268435456"):
        limits.check_model(study, (784,), 10, Most())
    assert not registered()


def registered():
    from torch.nn.modules import module

    return [hook for name, hooks in vars(module).items() if "registration_hooks" in name for hook in hooks]


# ---- what a node says


def test_every_code_has_words_and_no_exception_has_its_own(caplog):
    secret = "/home/anna/patients.csv: cell 'Anna Meier'"
    for broken in (RuntimeError(secret), KeyError(secret), DataError(secret), OSError(2, secret), MemoryError(secret)):
        told = codes.refused(broken)
        assert secret not in json.dumps(told)
        assert told["error"] in CODES
        assert secret not in codes.heard(told)
    assert codes.said(type("AnnaMeierError", (Exception,), {})())["detail"] == "an error of its own"
    assert (
        codes.heard(codes.said(ZeroDivisionError()))
        == "its code raised ZeroDivisionError; the node's own log says more"
    )
    for code in CODES:
        assert codes.heard({"error": code, "detail": "x"}).count("{") == 0


@pytest.mark.parametrize(
    "said",
    [
        {"error": "x" * 10**7}, {"error": 7}, {"error": ["a"]},
        {"error": "limit", "detail": "y\n\x1b[2J\u202e" * 10**6},
        {"error": "limit", "detail": 3}, {"error": b"\xff"}, {"error": None}, {"error": "allow", "detail": "{0.x}"},
    ],
    ids=lambda said: str(said)[:30],
)  # fmt: skip
def test_whatever_a_node_says_is_one_short_printable_line(said):
    told = codes.heard(said)
    assert 0 < len(told) < 400
    assert told.isprintable()


def test_no_error_is_no_reason():
    assert codes.heard({"lost": True}) == ""
