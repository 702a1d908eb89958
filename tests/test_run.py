"""Runs: folders, workers, resuming after kills, personal state, records, local scores."""

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from helpers import INLINE, SCORED, Wrapped, edited, model_of, play, rows_of, same, small, tiny_shards
from secateur.data.shards import Shards
from secateur.engines import Failure
from secateur.errors import CheckpointError, ConfigError, DataError, NobodyTrainedError, NoResultError
from secateur.federation import checkpoint, prepare, server
from secateur.federation.folder import new_folder, read_study, reserve
from secateur.report.outcomes import outcome
from secateur.study.runtime import Runtime
from secateur.wire.codec import decode, with_scalar
from secateur.wire.message import Expected


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_gives_the_same_bits(workers, tmp_path, shards):
    study = small("autoflip", model={"name": "smallcnn", "options": {"width": 4, "features": 8}})
    play(study, tmp_path / "inline", shards)
    play(study, tmp_path / "workers", shards, runtime=Runtime(workers=workers))
    assert same(model_of(tmp_path / "inline"), model_of(tmp_path / "workers"))


def test_a_run_folder_is_complete_and_runs_again_to_the_same_bits(tmp_path, shards):
    study = small("fedsparsify")
    summary = play(study, tmp_path / "one", shards)
    names = {p.name for p in (tmp_path / "one").iterdir()}
    assert {
        "study.toml",
        "rounds.jsonl",
        "checkpoint.safetensors",
        "model.safetensors",
        "run.log",
        "summary.json",
    } <= names
    assert json.loads((tmp_path / "one" / "summary.json").read_text()) == summary
    play(read_study(tmp_path / "one"), tmp_path / "two", shards)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
    assert "train 4: accuracy" in (tmp_path / "one" / "run.log").read_text()
    assert summary["final"]["accuracy"] == rows_of(tmp_path / "one")[-1]["accuracy"]
    assert len(summary["final"]["local"]) == 4


def test_evaluation_every_few_rounds_and_always_at_the_end(tmp_path, shards):
    play(small("fedavg", evaluate_every=3), tmp_path / "run", shards)
    assert ["accuracy" in row for row in rows_of(tmp_path / "run")] == [False, False, True, True]


@pytest.mark.parametrize(("values", "most"), [("fp16", 0.55), ("bf16", 0.55), ("int8", 0.40)])
def test_smaller_formats_send_less_and_still_learn(values, most, tmp_path, shards):
    full = play(small(), tmp_path / "full", shards)
    less = play(small("fedavg", f"wire.values={values}"), tmp_path / "less", shards)
    rows, other = rows_of(tmp_path / "full"), rows_of(tmp_path / "less")
    for way in ("down", "up"):
        assert all(b[way]["values"] < most * a[way]["values"] for a, b in zip(rows, other, strict=True))
    assert abs(full["final"]["accuracy"] - less["final"]["accuracy"]) < 0.2


def test_batch_norm_statistics_travel_and_are_averaged(tmp_path, monkeypatch, shards):
    (tmp_path / "their_norm.py").write_text(
        "from torch import nn\n\ndef net(input_shape, outputs):\n"
        "    head = nn.Linear(16, outputs)\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), head)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for method in ("fedsparsify", "autoflip"):
        play(small(method, model={"name": "their_norm:net"}), tmp_path / method, shards)
        tensors = model_of(tmp_path / method)
        assert (tensors["1.running_var"] > 0).all()
        assert not torch.equal(tensors["1.running_mean"], torch.zeros(4))


def test_clients_keep_personal_state_through_a_stop(tmp_path, shards, monkeypatch):
    """A method that counts on its clients: what they keep is saved with the run."""
    (tmp_path / "their_counter.py").write_text(
        '"""Count visits.\n\nReference: none\n"""\n'
        "from dataclasses import dataclass\nimport torch\nfrom secateur.methods.kit.composition import Composition\n\n"
        "@dataclass(frozen=True)\nclass Counter(Composition):\n"
        "    def respond(self, ask, client):\n"
        "        reply = super().respond(ask, client)\n"
        "        visits = client.memory.get('visits', torch.zeros(1)) + 1\n"
        "        client.memory['visits'] = visits\n"
        "        tensors = {n: t + visits for n, t in reply.tensors.items()}\n"
        "        return type(reply)(tensors, reply.mask, reply.scalars)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    study = small("their_counter", rounds=5)
    play(study, tmp_path / "whole", shards)
    whole = model_of(tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(event):
        if event["event"] == "reply" and event["round"] == 3 and event["done"] == 2:
            raise Stop

    reserve(tmp_path / "cut", study)
    with pytest.raises(Stop):
        server.resume(tmp_path / "cut", INLINE, shards=shards, watch=stop)
    server.resume(tmp_path / "cut", INLINE, shards=shards)
    assert same(model_of(tmp_path / "cut"), whole)
    assert len(list((tmp_path / "cut" / "clients").iterdir())) <= 4
    forgotten = small("fedavg", rounds=5)
    play(forgotten, tmp_path / "plain", shards)
    assert not same(model_of(tmp_path / "plain"), whole)


SERVER = """
import sys
from pathlib import Path
if __name__ == "__main__":  # as the command line begins
    from secateur.engines.workers import warm
    warm()
from secateur.federation import server
from secateur.study.runtime import Runtime

if __name__ == "__main__":
    folder, shards = Path(sys.argv[1]), Path(sys.argv[2])
    def watch(event):
        if event["event"] == "row":
            print(event["phase"], event["round"], flush=True)
    server.resume(folder, Runtime(workers=2), shards=shards, watch=watch)
"""


@pytest.fixture(scope="module")
def long_run(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("undisturbed")
    study = small("autoflip", rounds=12)
    play(study, folder, shards)
    return study, model_of(folder), [{k: v for k, v in r.items() if "seconds" not in k} for r in rows_of(folder)]


def serve(script, folder, shards):
    path = os.pathsep.join(p for p in sys.path if p)
    return subprocess.Popen(
        [sys.executable, script, folder, shards],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def children(pid):
    """Return all living descendants of a process."""
    tasks = Path(f"/proc/{pid}/task")
    direct = [int(c) for t in tasks.glob("*/children") for c in t.read_text().split()] if tasks.exists() else []
    return direct + [c for d in direct for c in children(d)]


def test_kill_9_of_server_and_workers_at_random_moments(tmp_path, shards, long_run):
    """Twelve trials: the server, or a worker, is killed at a random moment; then the run goes on from its folder."""
    study, model, records = long_run
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    draw = random.Random(7)
    folder, trials, finished = tmp_path / "run0", 0, 0
    reserve(folder, study)
    while trials < 12:
        process = serve(script, folder, shards)
        with process:
            lines = draw.randint(0, 4)
            seen = 0
            while seen < lines and process.stdout.readline():
                seen += 1
            time.sleep(draw.random() * 0.03)
            trials += 1
            if trials % 2:
                process.kill()
            else:
                for worker in children(process.pid)[-2:]:
                    try:
                        os.kill(worker, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
                process.stdout.read()
        if (folder / "summary.json").exists():
            finished += 1
            assert same(model_of(folder), model)
            assert [{k: v for k, v in r.items() if "seconds" not in k} for r in rows_of(folder)] == records
            folder = tmp_path / f"run{trials}"
            reserve(folder, study)
    server.resume(folder, INLINE, shards=shards)
    assert same(model_of(folder), model)
    assert [{k: v for k, v in r.items() if "seconds" not in k} for r in rows_of(folder)] == records
    assert finished


def test_records_behind_the_checkpoint_are_cut_and_lost_ones_are_an_error(tmp_path, shards):
    study = small()

    class Stop(Exception):
        pass

    def stop(event):
        if event["event"] == "row" and event["round"] == 2:
            raise Stop

    reserve(tmp_path / "run", study)
    with pytest.raises(Stop):
        server.resume(tmp_path / "run", INLINE, shards=shards, watch=stop)
    with (tmp_path / "run" / "rounds.jsonl").open("a") as file:
        file.write('{"round": 3, "half a li')
    server.resume(tmp_path / "run", INLINE, shards=shards)
    assert [row["round"] for row in rows_of(tmp_path / "run")] == [1, 2, 3, 4]
    for name in ("summary.json", "rounds.jsonl"):
        (tmp_path / "run" / name).unlink()
    with pytest.raises(CheckpointError, match="records of this run are lost"):
        server.resume(tmp_path / "run", INLINE, shards=shards)


def test_changed_data_is_noticed_before_going_on(tmp_path, shards):
    study = small()

    class Stop(Exception):
        pass

    def stop(event):
        if event["event"] == "row":
            raise Stop

    reserve(tmp_path / "run", study)
    with pytest.raises(Stop):
        server.resume(tmp_path / "run", INLINE, shards=shards, watch=stop)
    other = tiny_shards(tmp_path / "other", clients=4, rows=120)
    with pytest.raises(CheckpointError, match="no longer what the run began with"):
        server.resume(tmp_path / "run", INLINE, shards=other)


def stopped_after_one_row(folder, shards):
    class Stop(Exception):
        pass

    def stop(event):
        if event["event"] == "row":
            raise Stop

    reserve(folder, small())
    with pytest.raises(Stop):
        server.resume(folder, INLINE, shards=shards, watch=stop)


def test_an_edited_study_is_not_gone_on_with(tmp_path, shards):
    stopped_after_one_row(tmp_path, shards)
    path = tmp_path / "study.toml"
    whole = path.read_text()
    path.write_text(whole.replace("lr = 0.1", "lr = 0.9"))
    with pytest.raises(
        CheckpointError, match=r"study.toml was changed since the run wrote it, or is damaged: bring it back"
    ):
        server.resume(tmp_path, INLINE, shards=shards)
    path.write_text(whole)
    server.resume(tmp_path, INLINE, shards=shards)
    play(small(), tmp_path / "whole", shards)
    assert same(model_of(tmp_path), model_of(tmp_path / "whole"))


def test_replies_that_a_killed_server_left_on_disk_are_removed(tmp_path, shards):
    stopped_after_one_row(tmp_path, shards)
    (tmp_path / "spool-abc").mkdir()
    (tmp_path / "spool-abc" / "0.safetensors").write_bytes(b"x")
    server.resume(tmp_path, INLINE, shards=shards)
    assert not list(tmp_path.glob("spool-*"))


def test_a_finished_run_returns_its_summary_without_running(tmp_path, shards):
    summary = play(small(), tmp_path / "run", shards)
    (tmp_path / "run" / checkpoint.NAME).unlink()
    assert server.resume(tmp_path / "run", INLINE, shards=Path("/nowhere")) == summary


def test_new_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = small()
    first = new_folder(study, None)
    assert first == Path("runs") / f"fedavg-{study.hash()}"
    reserve(first, study)
    assert new_folder(study, None) == Path(f"{first}-2")
    with pytest.raises(ConfigError, match="not an empty folder"):
        new_folder(study, first)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="not an empty folder"):
        new_folder(study, tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot make the run folder"):
        reserve(tmp_path / "file" / "run", study)
    with pytest.raises(CheckpointError, match="holds no run"):
        read_study(tmp_path)


def test_start_is_reserve_and_resume(tmp_path, shards):
    summary = server.start(small(), INLINE, tmp_path / "run", shards=shards)
    assert summary["phases"]["train"]["asks"] == 4


def test_a_deadline_names_who_was_late(tmp_path, shards):
    class Late(Wrapped):
        def exchange(self, requests, deadline=None):
            assert deadline == 5.0
            yield from self.inner.exchange(requests, 1e-9)

    with pytest.raises(NobodyTrainedError, match="no reply within"):
        play(small(), tmp_path / "run", shards, runtime=Runtime(workers=0, deadline=5.0), open_engine=Late.open)
    left = rows_of(tmp_path / "run")[0]["left_out"]
    assert [entry["client"] for entry in left] == rows_of(tmp_path / "run")[0]["clients"]
    assert "no reply within" in left[0]["reason"]
    assert rows_of(tmp_path / "run")[0]["bytes_down"] == 0  # nothing was sent


def test_federation_makes_shards_and_removes_them():
    with prepare.federation(small(data={"clients": 5, "partition": "iid"})) as folder:
        from secateur.data.shards import open_shards

        assert open_shards(folder).clients == 5
    assert not folder.exists()


def test_what_a_method_does_not_read_is_still_counted(tmp_path, monkeypatch, shards):
    """A method that looks at the first reply only: all of them were carried, and all are in the ledger."""
    (tmp_path / "their_hasty.py").write_text(
        '"""Take the first reply.\n\nReference: none\n"""\n'
        "from dataclasses import dataclass, replace\n"
        "from secateur.contract.reduction import Keep\n"
        "from secateur.methods.kit.composition import Composition\n"
        "from secateur.methods.kit.rounds import stepped\n\n"
        "@dataclass(frozen=True)\nclass Hasty(Composition):\n"
        "    def plan(self, state):\n"
        "        ask = super().plan(state)\n"
        "        return ask and replace(ask, reduce={'single': Keep()})\n"
        "    def absorb(self, state, reduced):\n"
        "        return stepped(state, reduced.ask, next(iter(reduced['single'].values())))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    play(small("their_hasty"), tmp_path / "hasty", shards)
    play(small("fedavg"), tmp_path / "plain", shards)
    hasty, plain = rows_of(tmp_path / "hasty"), rows_of(tmp_path / "plain")
    assert hasty[0]["bytes_up"] == plain[0]["bytes_up"]  # later rounds train other weights, which shrink otherwise
    assert [r["processed"] for r in hasty] == [r["processed"] for r in plain]
    assert not same(model_of(tmp_path / "hasty"), model_of(tmp_path / "plain"))


def test_a_disk_without_room_for_the_shards_is_one_clear_error(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(prepare, "make_shards", full)
    with (
        pytest.raises(DataError, match="No space left on device; set TMPDIR"),
        prepare.federation(small(data={"clients": 5, "partition": "iid"})),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_opened_is_one_clear_error(tmp_path, shards):
    study = small()
    reserve(tmp_path / "run", study)
    (tmp_path / "run" / "run.log").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*run\.log"):
        server.resume(tmp_path / "run", INLINE, shards=shards)
    (tmp_path / "run" / "run.log").rmdir()
    assert server.resume(tmp_path / "run", INLINE, shards=shards)["phases"]["train"]["asks"] == 4


def test_a_disk_that_fills_in_mid_run_stops_it_and_a_resume_goes_on(tmp_path, monkeypatch, shards):
    """The third checkpoint cannot be written: the run stops, the second is intact, and nothing differs in the end."""
    study = small("autoflip")
    play(study, tmp_path / "whole", shards)
    original, calls = checkpoint.save, []

    def save(folder, state, *rest):
        calls.append(state.round)
        if len(calls) == 3:
            raise CheckpointError("cannot write: No space left on device")
        original(folder, state, *rest)

    reserve(tmp_path / "run", study)
    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(CheckpointError, match="No space left"):
        server.resume(tmp_path / "run", INLINE, shards=shards)
    assert len(rows_of(tmp_path / "run")) == 3  # the record of what was not checkpointed is cut off again
    server.resume(tmp_path / "run", INLINE, shards=shards)
    assert same(model_of(tmp_path / "run"), model_of(tmp_path / "whole"))
    assert [r["round"] for r in rows_of(tmp_path / "run")] == [0, 1, 2, 3, 4]


BURSTS = """
from torch import nn

class Bursts(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.fc = nn.Linear(inputs, outputs)

    def forward(self, x):
        if self.training and x.any():  # zeros are what models are tried with when they are built
            raise ValueError("not [today]\\nnor tomorrow")
        return self.fc(x.flatten(1))

def net(input_shape, outputs):
    return Bursts(input_shape[0] * input_shape[1] * input_shape[2], outputs)
"""


def test_a_run_in_which_all_clients_raise_is_an_error_that_names_the_reason(tmp_path, monkeypatch, shards):
    (tmp_path / "their_bursts.py").write_text(BURSTS)
    monkeypatch.syspath_prepend(tmp_path)
    study = small("fedavg", model={"name": "their_bursts:net"})
    for workers in (0, 1):
        folder = tmp_path / f"run{workers}"
        with pytest.raises(NobodyTrainedError, match=r"3 clients .*: ValueError: not \[today\] nor tomorrow$"):
            server.start(study, Runtime(workers=workers), folder, shards=shards)
        assert {path.name for path in folder.iterdir()} & {"rounds.jsonl", "summary.json", "model.safetensors"} == set()
        with pytest.raises(NoResultError, match="no first step"):  # and no page or comparison shows it
            outcome(folder)


def test_a_learning_rate_without_bounds_is_an_error(tmp_path, shards):
    with pytest.raises(NobodyTrainedError, match="its loss is (nan|inf) after a step or two: lower training.lr"):
        play(small("fedavg", "training.lr=1e30"), tmp_path / "run", shards)


class Unheard(Wrapped):
    """Requests of one phase are not answered."""

    word = b""

    def exchange(self, requests, deadline=None):
        for who, request in requests:
            if self.word in request[:200]:
                yield who, Failure(who, "no")
            else:
                yield from self.inner.exchange([(who, request)], deadline)


def test_a_phase_that_nobody_answered_is_an_error_before_anything_is_trained(tmp_path, shards):
    """Where all clients fail to score, PruneFL would prune nothing and look like FedAvg."""
    mute = type("Mute", (Unheard,), {"word": b"score"})
    with pytest.raises(NobodyTrainedError, match="phase 'score' of round 0.* 9 of 9 requests failed because: no$"):
        play(small("prunefl", "every=2"), tmp_path / "run", shards, open_engine=mute.open)
    assert {row["phase"] for row in rows_of(tmp_path / "run")} == {"score"}


def test_a_run_whose_scores_never_came_has_its_model_and_is_an_error(tmp_path, shards):
    """Personal models are scored by clients alone."""
    mute = type("Mute", (Unheard,), {"word": b"evaluate"})
    with pytest.raises(NobodyTrainedError, match="phase 'evaluate'.* 4 of 4 requests failed because: no"):
        play(small("dispfl"), tmp_path / "run", shards, open_engine=mute.open)
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "summary.json").exists()
    server.resume(tmp_path / "run", INLINE, shards=shards)
    assert (tmp_path / "run" / "summary.json").exists()


VALIDATION_ROWS, TEST_ROWS = Shards.server_validation, Shards.server_test


def scored(study, shards, folder, rows):
    """Return the accuracy of a run's shipped model on some rows."""
    held = server.Run(study, INLINE, folder, shards)
    held.model.load_state_dict({n: t for n, t in model_of(folder).items() if not n.startswith("mask/")})
    with torch.no_grad():
        x, y = rows(held.shards)
        return float((held.model.eval()(x.float() / 255).argmax(1) == y).float().mean())


def test_records_tell_validation_and_test_rows_apart(tmp_path):
    shards, study = tiny_shards(tmp_path / "shards", validation_fraction=0.2), small("fedsparsify", evaluate_every=2)
    summary = play(study, tmp_path / "run", shards)
    rows, final = rows_of(tmp_path / "run"), summary["final"]
    assert ["validation" in row for row in rows] == ["accuracy" in row for row in rows] == [False, True, False, True]
    validation, test = (scored(study, shards, tmp_path / "run", rows) for rows in (VALIDATION_ROWS, TEST_ROWS))
    assert (final["validation"], final["accuracy"]) == (pytest.approx(validation), pytest.approx(test))
    assert rows[-1]["validation"] == final["validation"]
    found = outcome(tmp_path / "run")
    assert found.validation == final["validation"]
    assert found.validation_by_round == [(2.0, rows[1]["validation"]), (4.0, rows[3]["validation"])]
    assert f"validation {final['validation']:.4f}" in (tmp_path / "run" / "run.log").read_text()


def test_without_validation_rows_nothing_is_said_of_them(tmp_path, shards):
    summary = play(small("fedavg", "data.validation_fraction=0"), tmp_path / "run", shards)
    assert "validation" not in summary["final"]
    assert not any("validation" in row for row in rows_of(tmp_path / "run"))
    assert math.isnan(outcome(tmp_path / "run").validation)
    assert outcome(tmp_path / "run").validation_by_round == []


def test_personal_models_are_validated_on_their_clients_rows(tmp_path):
    shards, told = tiny_shards(tmp_path / "shards", validation_fraction=0.2), []

    class Heard(Wrapped):
        def exchange(self, requests, deadline=None):
            for who, reply in self.inner.exchange(requests, deadline):
                if b"validation_samples" in reply[:300]:
                    told.append(
                        decode(
                            reply,
                            Expected({}, scalars=SCORED),
                        ).scalars
                    )
                yield who, reply

    summary = play(small("dispfl"), tmp_path / "run", shards, open_engine=Heard.open)
    last = told[-4:]
    assert [scores["validation_samples"] for scores in last] == [5, 5, 5, 5]
    mean = sum(scores["validation"] for scores in last) / 4
    assert summary["final"]["validation"] == pytest.approx(mean)
    assert rows_of(tmp_path / "run")[-1]["validation"] == pytest.approx(mean)
    assert outcome(tmp_path / "run").validation == pytest.approx(mean)


def test_personal_models_without_test_rows_are_still_validated(tmp_path):
    shards = tiny_shards(tmp_path / "shards", validation_fraction=0.2)
    study = small("dispfl", "data.test_fraction=0", "data.validation_fraction=0.2")
    with_tests = play(small("dispfl"), tmp_path / "with", shards)
    summary = play(study, tmp_path / "run", shards)
    assert summary["final"]["validation"] == with_tests["final"]["validation"]


@pytest.mark.parametrize(("name", "value"), [("metric", 1.5), ("validation", 1e6), ("validation", -0.1)])
def test_a_client_cannot_score_better_than_perfect(name, value, tmp_path):
    shards = tiny_shards(tmp_path / "shards", validation_fraction=0.2)

    class Boasting(Wrapped):
        def exchange(self, requests, deadline=None):
            for who, reply in self.inner.exchange(requests, deadline):
                boasts = who == 1 and b"validation_samples" in reply[:300]
                yield who, with_scalar(reply, name, value) if boasts else reply

    summary = play(small("dispfl"), tmp_path / "run", shards, open_engine=Boasting.open)
    assert len(summary["final"]["local"]) == 3
    assert 0 <= summary["final"]["accuracy"] <= 1
    assert 0 <= summary["final"]["validation"] <= 1


# 16 inputs, 12 and 8 hidden units, 3 classes: 192 + 96 + 24 weights, each of which is multiplied once in a forward pass
DENSE = 312


def test_macs_of_gradients_of_all_weights_count_all_weights(tmp_path, shards):
    """PruneFL measures at the start and after round 2: 3 clients, 18 rows each, half of the weights pruned then."""
    play(small("prunefl", "every=2", "sparsity=0.5"), tmp_path / "run", shards)
    first, second = (row for row in rows_of(tmp_path / "run") if row["phase"] == "score")
    rows, kept = 3 * 18, DENSE // 2
    assert first["processed"] == second["processed"] == rows
    assert first["train_macs"] == first["train_macs_physical"] == 3 * rows * DENSE
    # forward by what is kept, backward to the inputs by what is kept, and a gradient of every weight
    assert second["train_macs"] == rows * (kept + kept + DENSE) == 33_696
    assert second["train_macs_physical"] == 3 * rows * DENSE == 50_544  # nothing is cut
    trained = [row for row in rows_of(tmp_path / "run") if row["phase"] == "train"]
    assert [row["train_macs"] for row in trained] == [3 * rows * kept] * 4


@pytest.mark.parametrize(("method", "options"), [("feddst", ["every=2", "sparsity=0.5"]), ("dispfl", ["target=0.5"])])
def test_macs_of_gradients_within_a_training_round(method, options, tmp_path, shards):
    """One batch of 16 rows for gradients beside an epoch of 18 rows, both under the mask that was sent."""
    play(small(method, *options, "training.batch_size=16"), tmp_path / "run", shards)
    row, kept = rows_of(tmp_path / "run")[1], DENSE // 2
    assert row["processed"] == 3 * (16 + 18)
    assert row["train_macs"] == 3 * (3 * 18 * kept + 16 * (2 * kept + DENSE))


def test_no_client_counts_less_than_it_processed(tmp_path, shards):
    """A reply that says it measured more rows than it processed is counted as if it had measured them all."""

    class Odd(Wrapped):
        def exchange(self, requests, deadline=None):
            for who, reply in self.inner.exchange(requests, deadline):
                yield who, edited(measured=2**30)(reply)

    play(small("fedavg", rounds=1), tmp_path / "run", shards, open_engine=Odd.open)
    (row,) = rows_of(tmp_path / "run")
    assert row["train_macs"] == 3 * 18 * (2 * DENSE + DENSE)
