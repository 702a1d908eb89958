"""A trained model on new rows: the ONNX file on raw columns, and `secateur predict`, say what the network says."""

import csv
import io
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow", reason="the extra tables is not installed")
pytest.importorskip("onnxruntime", reason="the extra export is not installed")
pytest.importorskip("onnxscript", reason="the extra export is not installed")

import onnxruntime as runtime

from helpers import INLINE, play
from secateur import cli
from secateur.errors import ConfigError, DataError
from secateur.export.export import export, read
from secateur.export.predict import predict
from secateur.federation import prepare
from secateur.study.study import parse_study

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
SMALL = {"rounds": 6, "participation": 1.0, "model": {"options": {"hidden": (16, 8)}}, "training": {"lr": 0.05}}
NAMED = {"target": "y [years]", "site": "site"}
SPARSE = {"method": "fedsparsify", "options": {"schedule.sparsity": 0.5, "schedule.start": 0}}


def finished(folder, source, **values):
    study = parse_study({"method": "fedavg", **values, "data": {"source": source, **values.get("data", {})}})
    with prepare.federation(study) as shards:
        play(study, folder, shards, runtime=INLINE)
    return folder


def table(target):
    rng = np.random.default_rng(0)
    rows = ["volume,thickness,sex,site,y [years]"]
    for n in range(150):
        volume, thickness, sex = rng.normal(3e6, 1e5), rng.normal(2.5, 0.2), "mf"[n % 2]
        value = 50 + 15 * (volume - 3e6) / 1e5 + 10 * (sex == "m")
        rows.append(f"{'' if n % 11 == 0 else f'{volume:.2f}'},{thickness:.4f},{sex},{'abc'[n % 3]},{target(value)}")
    return "\n".join(rows) + "\n"


@pytest.fixture(scope="module")
def ages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ages")
    (folder / "t.csv").write_text(table(lambda value: f"{value:.3f}"))
    return finished(folder / "run", f"table:{folder / 't.csv'}", data=NAMED, **SMALL)


@pytest.fixture(scope="module")
def illness(tmp_path_factory):
    folder = tmp_path_factory.mktemp("illness")
    (folder / "t.csv").write_text(table(lambda value: "ill" if value > 55 else "well"))
    return finished(folder / "run", f"table:{folder / 't.csv'}", data=NAMED, **{**SMALL, **SPARSE, "rounds": 12})


@pytest.fixture(scope="module")
def hospital(illness):
    """The folder that holds the ONNX file of the hospitals' model."""
    export(illness, "onnx")
    return illness / "export"


PATIENTS = """patient,sex,thickness,volume,seen by
p-07,m,2.5,3200000,Dr. A
p-12,f,2.25,2700000,"B, C"
p-13,f,2.25,,Dr. A
p-20,,2.5,3000000,Dr. A
"""
"""The columns in another order, without site and target, with two that the model does not take, and missing cells."""


def network(run, rows):
    """The masked network on inputs made by hand: volume, thickness, sex=f, sex=m, volume missing."""
    schema = json.loads((run / "schema.json").read_text())
    assert [f["name"] for f in schema["features"]] == ["volume", "thickness", "sex"]
    made = []
    for volume, thickness, sex in rows:
        x = [0.0 if volume is None else (volume - schema["mean"][0]) / schema["scale"][0]]
        x += [(thickness - schema["mean"][1]) / schema["scale"][1]]
        made.append([*x, float(sex == "f"), float(sex == "m"), float(volume is None)])
    with torch.no_grad():
        return read(run).masked(torch.tensor(made, dtype=torch.float32)).double(), schema


ROWS = [(3.2e6, 2.5, "m"), (2.7e6, 2.25, "f"), (None, 2.25, "f"), (3e6, 2.5, "")]
COLUMNS = {
    "thickness": np.array([2.5, 2.25, 2.25, 2.5]),
    "volume": np.array([3.2e6, 2.7e6, np.nan, 3e6]),
    "sex": np.array(["m", "f", "f", ""], dtype=object),
}


@pytest.mark.parametrize("source", ["run", "onnx"])
def test_new_patients_get_classes_and_probabilities(illness, hospital, tmp_path, source):
    (tmp_path / "new.csv").write_text(PATIENTS)
    found = predict(illness if source == "run" else hospital / "model.onnx", tmp_path / "new.csv")
    logits, schema = network(illness, ROWS)
    assert found.classes == tuple(schema["target"]["categories"]) == ("ill", "well")
    assert np.abs(found.probabilities - logits.softmax(1).numpy()).max() <= 1e-5
    assert found.answers == [found.classes[chosen] for chosen in logits.argmax(1)]
    assert found.answers[:2] == ["ill", "well"]
    assert found.others == {"patient": ["p-07", "p-12", "p-13", "p-20"], "seen by": ["Dr. A", "B, C", "Dr. A", "Dr. A"]}
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    assert [row["row"] for row in rows] == ["2", "3", "4", "5"]  # as a spreadsheet shows them
    assert [row["patient"] for row in rows] == ["p-07", "p-12", "p-13", "p-20"]
    assert [row["predicted y [years]"] for row in rows] == found.answers
    assert sum(float(rows[0][f"probability of {name}"]) for name in ("ill", "well")) == pytest.approx(1, abs=2e-6)


def session_of(folder):
    return runtime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])


def test_the_onnx_file_takes_raw_columns_and_answers_as_predict(illness, hospital, tmp_path):
    (tmp_path / "new.csv").write_text(PATIENTS)
    label, chances, logits = session_of(hospital).run(["label", "probabilities", "output"], COLUMNS)
    found = predict(illness, tmp_path / "new.csv")
    assert label.tolist() == found.answers
    assert np.abs(chances - found.probabilities).max() <= 1e-5
    assert np.abs(logits - network(illness, ROWS)[0].numpy()).max() <= 1e-5


def test_the_lines_of_the_docs_take_a_new_patients_file(illness, hospital, tmp_path):
    pandas = pytest.importorskip("pandas", reason="the docs read the file with pandas, which is not installed")
    (tmp_path / "new.csv").write_text(PATIENTS)
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    (code,) = [part for part in text.split("```python\n") if part.startswith("session = onnxruntime")]
    code = code.partition("```")[0].replace("runs/heart/export", str(hospital))
    scope = {"onnxruntime": runtime, "pandas": pandas}
    exec(code.replace("new-patients.csv", str(tmp_path / "new.csv")), scope)
    assert scope["label"].tolist() == predict(illness, tmp_path / "new.csv").answers


def test_an_onnx_file_of_numbers_answers_in_the_targets_unit(ages, tmp_path):
    (tmp_path / "new.csv").write_text(PATIENTS)
    export(ages, "onnx", tmp_path)
    (years,) = session_of(tmp_path).run(None, COLUMNS)
    found = predict(ages, tmp_path / "new.csv")
    expected, schema = network(ages, ROWS)
    expected = expected.numpy() * schema["target_scale"] + schema["target_mean"]
    assert years == pytest.approx(expected, rel=1e-5)
    assert found.values == pytest.approx(expected[:, 0], rel=1e-5)
    assert found.unit == "years"
    assert found.csv().splitlines()[0] == "row,patient,seen by,predicted y [years]"


def test_unknown_words_are_none_of_the_categories_and_are_told(illness, hospital, tmp_path):
    text = "volume,thickness,sex\n3200000,2.5,M\n3200000,2.5,d\n3200000,2.5,?\n"
    (tmp_path / "new.csv").write_text(text)
    expected = network(illness, [(3.2e6, 2.5, "")])[0].softmax(1).numpy().repeat(3, 0)
    for source in (illness, hospital / "model.onnx"):
        found = predict(source, tmp_path / "new.csv")
        assert np.abs(found.probabilities - expected).max() <= 1e-5
        (remark,) = found.remarks
        assert remark.startswith("column 'sex': 2 rows with 'M', 'd', which no site had in training")
    cells = {"volume": np.full(3, 3.2e6), "thickness": np.full(3, 2.5), "sex": np.array(["M", "d", "?"], object)}
    assert np.abs(session_of(hospital).run(["probabilities"], cells)[0] - expected).max() <= 1e-5


def test_parquet_and_a_file_with_decimal_commas_say_the_same(ages, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "a.csv").write_text("volume;thickness;sex\n3200000,0;2,5;m\n;2,25;f\n")
    columns = {"sex": ["m", "f"], "thickness": [2.5, 2.25], "volume": [3.2e6, None]}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    expected, schema = network(ages, [ROWS[0], ROWS[2]])
    expected = expected.numpy()[:, 0] * schema["target_scale"] + schema["target_mean"]
    for name in ("a.csv", "a.parquet"):
        assert predict(ages, tmp_path / name).values == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "volume,sex\n1,m\n",
            "lacks column 'thickness', which the model takes: add it; its cells may be empty",
        ),
        ("volume,thicknes,sex\n1,2,m\n", r"did you mean its 'thicknes'\? Rename it"),
        ("volume,thickness,sex\n1,2,m\n1,thin,m\n", "row 3, column 'thickness': 'thin' is a word"),
        (
            "volume,thickness,sex\nmany,thin,m\n",
            "row 2, column 'volume': 'many' is a word, and the model",
        ),
        ("volume,thickness,sex\ninf,2,m\n", "column 'volume': 'inf' is not finite"),
        ("", "new.csv is empty"),
    ],
)
def test_rows_that_do_not_fit_are_one_clear_line(illness, tmp_path, text, told):
    (tmp_path / "new.csv").write_text(text)
    with pytest.raises(DataError, match=told) as raised:
        predict(illness, tmp_path / "new.csv")
    assert "\n" not in str(raised.value)


def test_sources_that_are_none_are_one_clear_line(illness, tmp_path):
    (tmp_path / "new.csv").write_text(PATIENTS)
    with pytest.raises(DataError, match="--data .*no.csv: there is no such file"):
        predict(illness, tmp_path / "no.csv")
    with pytest.raises(ConfigError, match="neither the folder of a run nor an .onnx file"):
        predict(tmp_path / "new.csv", tmp_path / "new.csv")
    with pytest.raises(ConfigError, match="--out .*p.csv: No such file or directory: nothing was written"):
        predict(illness, tmp_path / "new.csv").write(tmp_path / "none" / "p.csv")
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be read as ONNX"):
        predict(tmp_path / "broken.onnx", tmp_path / "new.csv")


def test_from_the_command_line(illness, tmp_path, monkeypatch, capsys):
    (tmp_path / "new.csv").write_text(PATIENTS.replace("m,2.5", "d,2.5"))
    arguments = ["secateur", "predict", str(illness), "--data", str(tmp_path / "new.csv")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    printed = capsys.readouterr()
    assert "column 'sex': 1 row with 'd'" in printed.err
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(tmp_path / "predictions.csv")])
    with pytest.raises(SystemExit):
        cli.main()
    assert (tmp_path / "predictions.csv").read_text() == printed.out
    assert "4 predictions" in capsys.readouterr().out


def test_the_card_lists_the_columns_with_what_is_done_to_them(ages, tmp_path):
    for to in ("safetensors", "torch"):
        card = export(ages, to, tmp_path / to)
        kept = json.loads((tmp_path / to / "card.json").read_text())
        schema = json.loads((tmp_path / to / "schema.json").read_text())
        assert [one["name"] for one in kept["inputs"]] == ["volume", "thickness", "sex"]
        assert kept["inputs"] == [json.loads(json.dumps(asdict(one))) for one in card.inputs]
        assert [one["mean"] for one in kept["inputs"]] == schema["mean"]
        assert [one["scale"] for one in kept["inputs"]] == schema["scale"]
        assert kept["inputs"][2]["categories"] == ["f", "m"]
        assert kept["answer"] == {
            "target": "y [years]", "classes": [], "unit": "years", "mean": schema["target_mean"],
            "scale": schema["target_scale"],
        }  # fmt: skip
        text = (tmp_path / to / "card.md").read_text()
        assert "| `sex` | `f`, `m` |" in text
        assert "It answers `y [years]`: a number in years." in text


HEART = ("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak", "slope", "ca", "thal")


def heart(folder):
    """Write a file for each of three hospitals; and new.csv, rows of a fourth whose columns run from last to first."""
    place = SHARED / "heart_disease"
    if not place.exists():
        pytest.skip("the heart disease data is not here")
    (folder / "sites").mkdir()
    for site in ("cleveland", "switzerland", "va"):
        text = (place / f"processed.{site}.data").read_text()
        (folder / "sites" / f"{site}.csv").write_text(f"{','.join(HEART)},num\n{text}")
    rows = list(csv.reader((place / "processed.hungarian.data").read_text().splitlines()))
    with (folder / "new.csv").open("w") as out:
        csv.writer(out).writerows([[*reversed(HEART)], *(row[-2::-1] for row in rows)])
    return [dict(zip(HEART, row, strict=False)) for row in rows]


def scaled(line, schema):
    """A model's inputs for a row, by hand."""
    numbers, words, marks = [], [], []
    for f, mean, scale, marked in zip(*(schema[key] for key in ("features", "mean", "scale", "marked")), strict=True):
        cell = line[f["name"]]
        if f["categories"]:
            words += [float(cell == word) for word in f["categories"]]
        else:
            numbers.append(0.0 if cell == "?" else (float(cell) - mean) / scale)
        marks += [float(cell == "?")] * marked
    return [*numbers, *words, *marks]


def test_what_some_hospitals_export_answers_on_anothers_rows_in_another_order(tmp_path):
    """Real rows, many of whose cells are missing."""
    lines = heart(tmp_path)
    data = {"target": "num>0", "options": {"categories": ["cp", "thal", "restecg"]}}
    run = finished(tmp_path / "run", f"table:{tmp_path / 'sites'}", data=data, **{**SMALL, **SPARSE, "rounds": 3})
    export(run, "onnx", tmp_path / "out")
    found = predict(run, tmp_path / "new.csv")
    schema = json.loads((run / "schema.json").read_text())
    with torch.no_grad():
        inputs = torch.tensor([scaled(line, schema) for line in lines], dtype=torch.float32)
        expected = read(run).masked(inputs).softmax(1).numpy()
    assert found.classes == ("0", "1")
    assert len(lines) == len(found.values) == 294
    assert np.abs(found.probabilities - expected).max() <= 1e-5
    assert sum(line["ca"] == "?" for line in lines) > 200
    raw = {
        f["name"]: np.array([line[f["name"]] for line in lines], object) if f["categories"]
        else np.array([np.nan if line[f["name"]] == "?" else float(line[f["name"]]) for line in lines])
        for f in schema["features"]
    }  # fmt: skip
    label, chances = session_of(tmp_path / "out").run(["label", "probabilities"], raw)
    assert np.abs(chances - found.probabilities).max() <= 1e-5
    assert label.tolist() == found.answers


def test_brain_ages_are_in_years_and_the_file_answers_as_the_run(tmp_path):
    place = SHARED / "fcon1000_brain_age" / "fcon1000.csv.gz"
    if not place.exists():
        pytest.skip("the brain age data is not here")
    run = finished(
        tmp_path / "run", f"table:{place}#age#site", **{**SMALL, "rounds": 2, "data": {"partition": "natural"}}
    )
    export(run, "onnx", tmp_path / "out")
    ours, theirs = predict(run, place), predict(tmp_path / "out" / "model.onnx", place)
    assert len(ours.values) == 1078
    assert np.abs(ours.values - theirs.values).max() / np.abs(ours.values).max() <= 1e-5
    ages = np.array([float(age) for age in ours.others["age"]])
    error = np.abs(ours.values - ages).mean()
    said = json.loads((run / "summary.json").read_text())["final"]["mae"]
    assert error == pytest.approx(said, rel=0.25)  # the run scored held-out rows, this is all


def test_arrays_and_folders_of_images(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="the extra images is not installed")
    rng = np.random.default_rng(0)
    y = np.arange(80) % 2
    x = rng.integers(0, 60, (80, 1, 6, 6)).astype(np.uint8) + (120 * y[:, None, None, None]).astype(np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    model = {"name": "mlp", "options": {"hidden": (8,)}}
    data = {"clients": 2, "partition": "iid"}
    run = finished(
        tmp_path / "run", f"arrays:{tmp_path / 'a.npz'}", data=data, model=model, rounds=6, participation=1.0
    )
    export(run, "onnx", tmp_path / "out")
    np.savez(tmp_path / "new.npz", x=x[:6], ids=np.array(list("abcdef")))
    with torch.no_grad():
        expected = read(run).masked(torch.from_numpy(x[:6]).float() / 255).softmax(1).numpy()
    (tmp_path / "pictures").mkdir()
    for n in range(6):
        image.fromarray(x[n, 0]).save(tmp_path / "pictures" / f"{n}.png")
    for source in (run, tmp_path / "out" / "model.onnx"):
        found = predict(source, tmp_path / "new.npz")
        assert np.abs(found.probabilities - expected).max() <= 1e-5
        assert found.places == tuple("abcdef")
        assert found.answers == ["0", "1"] * 3
        pictures = predict(source, tmp_path / "pictures")
        assert np.abs(pictures.probabilities - expected).max() <= 1e-5
        assert pictures.places[0] == "0.png"
    np.savez(tmp_path / "bad.npz", x=np.zeros((3, 5)))
    with pytest.raises(DataError, match=r"x has shape \(3, 5\), and the model takes \(rows, 1, 6, 6\)"):
        predict(run, tmp_path / "bad.npz")
    np.savez(tmp_path / "none.npz", y=y)
    with pytest.raises(DataError, match="holds y: name the rows to predict for x"):
        predict(run, tmp_path / "none.npz")
