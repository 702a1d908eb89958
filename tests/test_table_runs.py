"""Runs on tables from their files to the deployed model: errors in the target's own unit, rows as they stand there."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import fx

pytest.importorskip("pyarrow", reason="the extra tables is not installed")

import secateur
from helpers import INLINE, play, rows_of
from secateur.export import export
from secateur.federation import prepare
from secateur.study.study import parse_study

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
NAN = float("nan")


def finished(folder, source, **values):
    study = parse_study({"method": "fedavg", "data": {"source": source}, **values})
    with prepare.federation(study) as shards:
        return play(study, folder, shards, runtime=INLINE)


def lines(target):
    """Return a table of three sites whose target follows two numbers and a word; some cells are empty."""
    rng = np.random.default_rng(0)
    rows = ["volume,thickness,sex,site,y"]
    for n in range(150):
        volume, thickness, sex = rng.normal(3e6, 1e5), rng.normal(2.5, 0.2), "mf"[n % 2]
        value = 50 + 15 * (volume - 3e6) / 1e5 + 10 * (sex == "m")
        rows.append(f"{'' if n % 11 == 0 else f'{volume:.2f}'},{thickness:.4f},{sex},{'abc'[n % 3]},{target(value)}")
    return "\n".join(rows) + "\n"


SMALL = {"rounds": 6, "participation": 1.0, "model": {"options": {"hidden": (16, 8)}}, "training": {"lr": 0.05}}
SPARSE = {"method": "fedsparsify", "options": {"schedule.sparsity": 0.5, "schedule.start": 0, "granularity": "channel"}}


@pytest.fixture(scope="module")
def ages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ages")
    (folder / "t.csv").write_text(lines(lambda value: f"{value:.3f}"))
    finished(folder / "run", f"table:{folder / 't.csv'}#y#site", **SMALL, **SPARSE)
    return folder / "run"


@pytest.fixture(scope="module")
def illness(tmp_path_factory):
    folder = tmp_path_factory.mktemp("illness")
    (folder / "t.csv").write_text(lines(lambda value: "ill" if value > 55 else "well"))
    finished(folder / "run", f"table:{folder / 't.csv'}#y#site", **{**SMALL, "rounds": 12})
    return folder / "run"


def test_errors_are_in_the_targets_own_unit_and_the_records_begin_with_the_schema(ages):
    final = json.loads((ages / "summary.json").read_text())["final"]
    spread = np.std([50, 65])  # of a target of this size, whose scaled errors would be below 1
    assert 1 < final["mae"] < 2 * spread
    assert final["r2"] > 0.5
    rows = rows_of(ages)
    assert [row["phase"] for row in rows[:5]] == ["schema"] * 4 + ["train"]
    assert rows[4]["mae"] > final["mae"]
    summary = json.loads((ages / "summary.json").read_text())
    assert summary["phases"]["schema"]["asks"] == 4
    assert summary["phases"]["schema"]["bytes_down"] == sum(row["bytes_down"] for row in rows[:4]) > 0


def raw(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def by_hand(run, masked, row):
    """Return the prediction for a row of the file, with the steps of the schema written out."""
    schema = json.loads((run / "schema.json").read_text())
    volume, thickness, sex = row
    x = [
        0.0 if np.isnan(v) else (v - m) / s
        for v, m, s in zip((volume, thickness), schema["mean"], schema["scale"], strict=False)
    ]
    x += [float(sex == 0), float(sex == 1), float(np.isnan(volume))]
    assert schema["features"][2]["categories"] == ["f", "m"]
    assert schema["marked"] == [True, False, False]
    return masked(torch.tensor([x], dtype=torch.float32))[0], schema


@pytest.mark.parametrize(
    "row", [(3.1e6, 2.5, 1), (2.9e6, 2.2, 0), (NAN, 2.5, 1), (3e6, 2.4, -1), (3e6, 2.4, NAN)], ids=str
)
def test_the_loaded_model_takes_rows_as_they_stand_in_the_file(row, ages, illness):
    for run in (ages, illness):
        shipped = export.read(run)
        expected, schema = by_hand(run, shipped.masked, row)
        if run is ages:
            expected = expected * schema["target_scale"] + schema["target_mean"]
        model = secateur.load(run)
        assert isinstance(model, fx.GraphModule)
        assert torch.allclose(model(raw(row))[0], expected, atol=1e-4, rtol=1e-5)
        assert {type(part).__module__.partition(".")[0] for part in model.modules()} == {"torch"}


def test_exports_hold_the_schema_and_score_as_the_run(ages, tmp_path):
    card = export.export(ages, "safetensors", tmp_path)
    final = json.loads((ages / "summary.json").read_text())["final"]
    assert card.checked["mae"] == pytest.approx(final["mae"], rel=1e-4)
    assert card.checked["count"] == 30
    assert (tmp_path / "schema.json").read_bytes() == (ages / "schema.json").read_bytes()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["about"])["schema.json"] == (ages / "schema.json").read_text()


def test_the_onnx_of_a_hospital_is_used_on_the_next_patient_without_this_package(illness, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    import onnx

    card = export.export(illness, "onnx", tmp_path)
    final = json.loads((illness / "summary.json").read_text())["final"]
    assert card.checked["accuracy"] == final["accuracy"] > 0.8
    assert card.checked["differ"] == 0
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    schema = json.loads(facts["secateur.schema"])
    assert schema["target"]["categories"] == ["ill", "well"]
    patients = [{"sex": "m", "thickness": 2.5, "volume": 3.2e6}, {"volume": 2.7e6, "sex": "f", "thickness": 2.5}]
    columns = {
        f["name"]: np.array([p[f["name"]] for p in patients], object if f["categories"] else np.float64)
        for f in schema["features"]
    }
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (said,) = session.run(["label"], columns)
    assert said.tolist() == ["ill", "well"]


def test_the_models_file_holds_the_schema(ages):
    with safe_open(ages / "model.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    assert about["schema.json"] == (ages / "schema.json").read_text()


def test_workers_and_a_stop_change_no_bit_of_a_tables_run(ages, tmp_path):
    from secateur.federation import server
    from secateur.federation.folder import read_study, reserve
    from secateur.study.runtime import Runtime

    study, seen = read_study(ages), []

    def stop(row):
        if row["event"] == "row":
            seen.append(row["phase"])
            if seen in (["schema"] * 2, ["schema"] * 6 + ["train"] * 3):
                raise KeyboardInterrupt

    reserve(tmp_path / "run", study)
    with prepare.federation(study) as shards:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                server.resume(tmp_path / "run", INLINE, shards=shards, watch=stop)
        server.resume(tmp_path / "run", Runtime(workers=2), shards=shards)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (ages / "model.safetensors").read_bytes()
    assert [row["phase"] for row in rows_of(tmp_path / "run")] == [row["phase"] for row in rows_of(ages)]


@pytest.mark.parametrize(
    ("source", "sites", "score", "least", "most"),
    [
        ("heart_disease#14>0", 4, "accuracy", 0.75, 1.0),
        ("fcon1000_brain_age/fcon1000.csv.gz#age#site", 23, "mae", 0.0, 9.0),
    ],
)
def test_real_tables_with_no_setting_but_data_and_target(source, sites, score, least, most, tmp_path):
    place = SHARED / source.partition("#")[0]
    if not place.exists():
        pytest.skip(f"the data is not beside this checkout (../shared/data/{place.name})")
    summary = finished(tmp_path / "run", f"table:{SHARED}/{source}", evaluate_every=60)
    assert least < summary["final"][score] < most
    assert summary["left_out"] == {}
    assert len(summary["final"]["local"]) == sites
