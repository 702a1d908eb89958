"""Tables on Flower: nodes with tables of their own agree on the schema that a simulation of them has."""

import json

import numpy as np
import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install '.[flower]' in a clone of secateur")
pytest.importorskip("pyarrow", reason="the extra tables is not installed")

from flwr.app import RecordDict

from helpers import INLINE, model_of, play, rows_of, same
from loopgrid import LoopGrid, Node
from secateur.errors import EngineError
from secateur.federation import prepare
from secateur.flower import apps, client_app, messages

pytestmark = [
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning"),
    pytest.mark.usefixtures("quick"),
]
SETTINGS = {
    "method": "fedavg", "rounds": 2, "data.clients": 3, "data.source": "table", "data.target": "age [years]",
    "data.partition": "natural", "participation": 1.0, "model.options.hidden": "[8]", "training.epochs": 1, "wait": 0.1,
}  # fmt: skip


def table(number, rows=40):
    """Return the lines of a site's table: an age that follows two numbers, a sex, and empty cells."""
    rng = np.random.default_rng(number)
    a, b = rng.normal(3e6, 1e5, rows), rng.normal(2.5, 0.2, rows)
    age = 50 + 15 * (a - 3e6) / 1e5 - 20 * (b - 2.5)
    cells = [
        ["" if n % 7 == number else f"{a[n]:.3f}", f"{b[n]:.5f}", "mf"[n % 2], f"{age[n]:.2f}"] for n in range(rows)
    ]
    return ["volume,thickness,sex,age [years]", *map(",".join, cells)]


@pytest.fixture
def sites(tmp_path):
    """Write a folder for each site with its table, and one folder with all tables; return the latter."""
    everything = tmp_path / "all"
    everything.mkdir()
    for number in range(3):
        text = "\n".join(table(number, 40 + 10 * number)) + "\n"
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "rows.csv").write_text(text)
        (everything / f"site{number}.csv").write_text(text)
    return everything


def grid_of(folder, settings, **config):
    return LoopGrid({
        10 + k: Node(client_app(), 10 + k, settings, **{"partition-id": k, "data": str(folder / str(k)), **config})
        for k in range(3)
    })  # fmt: skip


def ledger(folder):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows_of(folder)]


def test_nodes_agree_on_the_schema_and_the_model_of_a_simulation(sites, tmp_path):
    settings = {**SETTINGS, "out": str(tmp_path / "flower")}
    summary = apps.serve(grid_of(tmp_path, settings), settings)
    study, _ = apps.study_of({**settings, "data.source": f"table:{sites}"})
    with prepare.federation(study) as shards:
        local = play(study, tmp_path / "local", shards, runtime=INLINE)
    assert (tmp_path / "flower" / "schema.json").read_bytes() == (tmp_path / "local" / "schema.json").read_bytes()
    assert same(model_of(tmp_path / "flower"), model_of(tmp_path / "local"))
    sent = [[(row["phase"], row["each"]) for row in rows_of(tmp_path / name)] for name in ("flower", "local")]
    assert sent[0] == sent[1]
    assert [phase for phase, _ in sent[0]] == ["schema"] * 4 + ["train"] * 2
    assert all(row["bytes_down"] > 0 < row["bytes_up"] for row in rows_of(tmp_path / "flower"))
    assert summary["left_out"] == {}
    assert summary["final"]["metric"]["label"] == "MAE in years"
    mean = sum(local["final"]["local"]) / 3
    assert np.isclose(sum(summary["final"]["local"]) / 3, mean)  # in years on both sides


def test_a_site_with_another_column_is_left_out_by_name_and_dictates_nothing(sites, tmp_path, said):
    del sites
    path = tmp_path / "0" / "rows.csv"  # the lowest client
    path.write_text(path.read_text().replace("volume,", "volumes,"))
    settings = {**SETTINGS, "out": str(tmp_path / "run")}
    summary = apps.serve(grid_of(tmp_path, settings), settings)
    why = "its table lacks column 'volume': add it (its cells may be empty)"
    assert any(f"client 0 cannot take part: {why}" in line for line in said())
    first = rows_of(tmp_path / "run")[0]
    assert first["left_out"] == [{"client": 0, "reason": why}]
    schema = json.loads((tmp_path / "run" / "schema.json").read_text())
    assert [feature["name"] for feature in schema["features"]] == ["volume", "thickness", "sex"]
    assert len(summary["final"]["local"]) == 2


@pytest.mark.parametrize("place", ["context", "folder"])
def test_a_node_that_lost_the_schema_is_sent_it_again_and_its_bytes_are_counted(place, sites, tmp_path, said):
    settings = {**SETTINGS, "rounds": 3, "out": str(tmp_path / "run")}
    grid = grid_of(tmp_path, settings)
    if place == "folder":
        grid.nodes[12].context.node_config["state"] = str(tmp_path / "state")
    answer, trained = grid.nodes[12].answer, []

    def forget(message):
        about, request = messages.unpack(message.content)
        if request is not None and about["schema"]:
            trained.append(about)
            if len(trained) == 1 and place == "folder":
                (kept,) = (tmp_path / "state" / "schema").iterdir()
                kept.write_bytes(kept.read_bytes()[:-9] + b"9" + kept.read_bytes()[-8:])
            elif len(trained) == 1:
                grid.nodes[12].context.state = RecordDict()
        return answer(message)

    grid.nodes[12].answer = forget
    del sites
    apps.serve(grid, settings)
    rows = [row for row in rows_of(tmp_path / "run") if row["phase"] == "train"]
    assert [[entry["client"] for entry in row["left_out"]] for row in rows] == [[2], [], []]
    assert "it no longer had the schema" in rows[0]["left_out"][0]["reason"]
    size = len((tmp_path / "run" / "schema.json").read_bytes())
    (again,) = [row for row in rows if row["down"].get("schema", 0) > size]
    each = {who: down for who, down, _ in again["each"]}
    assert again is rows[0] or each[2] - each[1] == again["down"]["schema"]
    assert again["bytes_down"] == sum(each.values())


def test_a_run_that_goes_on_has_the_schema_that_it_began_with(sites, tmp_path, monkeypatch):
    del sites
    settings = {**SETTINGS, "rounds": 3, "out": str(tmp_path / "run")}

    def stop(row):
        if row["event"] == "row" and row["phase"] == "train":
            raise KeyboardInterrupt

    whole = {**settings, "out": str(tmp_path / "whole")}
    apps.serve(grid_of(tmp_path, whole), whole)
    grid = grid_of(tmp_path, settings)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(apps, "_log", stop)
        apps.serve(grid, settings)
    begun = (tmp_path / "run" / "schema.json").read_bytes()
    grid.nodes[11].context.state = RecordDict()  # one of the nodes was away, too
    apps.serve(grid, settings)
    assert (tmp_path / "run" / "schema.json").read_bytes() == begun
    assert [row["phase"] for row in rows_of(tmp_path / "run")] == ["schema"] * 4 + ["train"] * 3
    assert same(model_of(tmp_path / "run"), model_of(tmp_path / "whole"))


@pytest.mark.parametrize("nodes", [3, 2])
def test_one_node_without_a_table_costs_itself_alone_and_one_of_two_ends_the_run(nodes, sites, tmp_path, said):
    del sites
    settings = {**SETTINGS, "out": str(tmp_path / "run")}
    grid = grid_of(tmp_path, settings)
    for node in list(grid.nodes)[nodes:]:
        del grid.nodes[node]
    answer = grid.nodes[11].answer

    def other(message):
        reply = answer(message)
        about, _ = messages.unpack(reply.content)
        facts = {
            "inputs": [3],
            "outputs": 1,
            "kind": "tabular",
            "scale": 1.0,
            "task": "regression",
            "model": "0" * 16,
            "classes": "",
        }
        if message.metadata.message_type != messages.SERVE:
            reply.content = messages.pack({**{k: v for k, v in about.items() if k != "holds"}, **facts})
        return reply

    grid.nodes[11].answer = other
    if nodes == 2:
        with pytest.raises(
            EngineError, match=r"nodes disagree on what their data is.* a table \(client 0\), or rows of"
        ):
            apps.serve(grid, settings)
        assert not (tmp_path / "run" / "rounds.jsonl").exists()
        return
    apps.serve(grid, settings)
    assert any("node 11 (client 1) cannot take part: its data is rows of its own, a table is exp" in x for x in said())
    assert {entry["client"] for row in rows_of(tmp_path / "run")[4:] for entry in row["left_out"]} == {1}


def test_nodes_whose_classes_have_other_names_are_not_mixed(tmp_path, said):
    x = np.random.default_rng(0).normal(size=(40, 3))
    for k, names in enumerate((["a", "b"], ["b", "c"], ["a", "b"])):
        (tmp_path / str(k)).mkdir()
        np.savez(tmp_path / str(k) / "rows.npz", x=x, y=np.array(names)[(x[:, 0] > 0).astype(int)])
    settings = {
        **SETTINGS,
        "data.source": "arrays",
        "data.target": "",
        "model.name": "mlp",
        "out": str(tmp_path / "run"),
    }
    settings["data.partition"] = "iid"
    summary = apps.serve(grid_of(tmp_path, settings), settings)
    assert any("its digest of the names of classes is" in line and "is expected" in line for line in said())
    assert summary["left_out"] == {"1": 2}
