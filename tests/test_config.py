"""Settings: paths, types, bounds; every mistake is one clear line before any training."""

import hashlib
import json
import tomllib

import pytest

from secateur import methods
from secateur.aggregation.steps import ServerMomentum
from secateur.errors import ConfigError
from secateur.guards.bounds import Bounds
from secateur.methods.autoflip import AutoFLIP
from secateur.methods.fedavg import FedAvg
from secateur.methods.kit.criteria import Criterion
from secateur.methods.kit.recovery import FineTune, Rewind
from secateur.methods.kit.schedule import Cubic
from secateur.pruning.criteria import Exploration
from secateur.study.options import build, choices, flatten
from secateur.study.runtime import Runtime
from secateur.study.study import Study, assign, parse_study, put, read_toml

LATER = {
    "training": {"schedule", "period", "floor"},
    "data": {"task", "target", "site", "options"},
    "wire": {"packing", "count", "sample"},
    "quorum": True,
    "code": True,
    "attack": True,
}  # came after the first runs


def test_defaults_are_the_main_job():
    made = parse_study({})
    assert (made.method, made.data.source, made.data.clients, made.data.partition) == (
        "autoflip",
        "digits",
        20,
        "pathological:2",
    )
    assert isinstance(made.build_method(), AutoFLIP)


def test_assign_sorts_paths_into_study_model_and_method():
    values = {}
    for setting in (
        "rounds=7", "training.lr=0.5", "data.clients=3", "model.name=mlp", "model.hidden=[8,4]",
        "model.options.extra=x",        "criterion.explore.epochs=9", "aggregator=mean", "options.granularity.rho=0.25",
    ):  # fmt: skip
        assign(values, setting)
    assert values == {
        "rounds": "7", "training": {"lr": "0.5"}, "data": {"clients": "3"},
        "model": {"name": "mlp", "options": {"hidden": (8, 4), "extra": "x"}},
        "options": {"criterion.explore.epochs": "9", "aggregator": "mean", "granularity.rho": "0.25"},
    }  # fmt: skip
    made = parse_study(values)
    assert made.training.lr == 0.5
    method = made.build_method()
    assert (method.criterion.explore.epochs, method.granularity.rho) == (9, 0.25)
    assert made.complete().options["aggregator"] == "mean"


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5_000, "{", "nan"])
def test_an_option_that_is_no_literal_is_text(text):
    """Found by fuzzing a run's settings: brackets without end were a RecursionError."""
    values = {}
    assign(values, f"model.hidden={text}")
    assert values["model"]["options"]["hidden"] == text


@pytest.mark.parametrize("path", ["data", "training", "model", "options", "data.options"])
def test_a_section_that_is_a_single_value_too_is_refused(path):
    """Found by fuzzing a run's settings: it was a TypeError."""
    inner = {"model": "model.hidden", "options": "momentum", "data.options": "data.options.size"}.get(
        path, f"{path}.lr"
    )
    values = {}
    put(values, path, 3) if path != "options" else values.update(options=3)
    with pytest.raises(ConfigError, match=f"{path} = '3' is a single value"):
        assign(values, f"{inner}=1")


@pytest.mark.parametrize("name", methods.names())
def test_options_round_trip_for_every_method(name):
    method = methods.find(name)()
    assert build(type(method), flatten(method)) == method


def test_a_composition_that_no_paper_has():
    options = {"criterion": "deviation", "criterion.explore.epochs": 3, "schedule": "cubic", "schedule.sparsity": "0.8",
               "consensus": "majority", "aggregator": "server_momentum", "aggregator.beta": 0.5}  # fmt: skip
    made = build(FedAvg, options)
    assert made.criterion.explore == Exploration(epochs=3)
    assert made.schedule == Cubic(sparsity=0.8)
    assert made.aggregator == ServerMomentum(beta=0.5)
    assert build(FedAvg, flatten(made)) == made


def test_a_slot_value_of_your_own(monkeypatch, tmp_path):
    (tmp_path / "their_slots.py").write_text(
        "from dataclasses import dataclass\nfrom secateur.methods.kit.schedule import Schedule\nnumber = 3\n"
        "@dataclass(frozen=True)\nclass Half(Schedule):\n    share: float = 0.5\n"
        "    def level(self, state):\n        return self.share\n"
        "@dataclass(frozen=True)\nclass Before:\n    def level(self, done, rounds):\n        return 0.5\n"
        "@dataclass(frozen=True)\nclass Empty(Schedule):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    made = build(FedAvg, {"schedule": "their_slots:Half", "schedule.share": "0.25"})
    assert made.schedule.level(None) == 0.25
    assert flatten(made)["schedule"] == "their_slots:Half"
    for value, says in {
        "their_slots:number": "frozen dataclass",
        "their_slots:no": "no attribute",
        "nowhere:X": "No module",
        "their_slots:Before": "schedule = 'their_slots:Before': Before lacks 'due', 'planned' of Schedule; derive it "
        r"from secateur\.methods\.kit\.schedule\.Schedule, and write what has no default there",
        "their_slots:Empty": "Empty lacks 'level' of Schedule",
    }.items():
        with pytest.raises(ConfigError, match=says):
            build(FedAvg, {"schedule": value})


def test_slot_choices_leave_out_helpers():
    measured = ["fisher", "grasp", "snip", "synflow", "taylor"]  # their common base is abstract, and no choice
    assert sorted(choices(Criterion)) == sorted(["deviation", "magnitude", "random", *measured])
    assert choices(Exploration) == {"exploration": Exploration}


def test_hash_names_the_result_and_written_defaults_do_not_change_it():
    made = parse_study({"method": "fedsparsify"})
    assert len(made.hash()) == 8
    assert made.hash() == made.complete().hash() == parse_study(tomllib.loads(made.to_toml())).hash()
    assert made.hash() != parse_study({"method": "fedsparsify", "options": {"schedule.sparsity": 0.8}}).hash()
    assert made.hash() != parse_study({"method": "fedsparsify", "seed": 1}).hash()
    # a section that came later: the name of a run that was made before it, and another one where it says something
    values = made.complete().model_dump(mode="json", exclude={"compute": True, "guards": True, **LATER})
    assert values["options"].pop("recovery") == "fine_tune"
    assert made.hash() == hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    assert made.hash() != parse_study({"method": "fedsparsify", "compute": {"together": 2}}).hash()
    assert made.hash() != parse_study({"method": "fedsparsify", "guards": {"bounds.rows": 10}}).hash()
    assert made.hash() != parse_study({"method": "fedsparsify", "quorum": 0.5}).hash()


def test_guards_are_options_by_name_and_the_bounds_always_stand():
    made = parse_study({"method": "fedavg", "guards": {"bounds.largest": 2.5}})
    assert made.guards == {"bounds": {"largest": 2.5}}
    assert made.build_guards() == [Bounds(largest=2.5)]
    values = {"method": "fedavg"}
    assign(values, "guards.bounds.rows=7")
    assert parse_study(values).build_guards() == [Bounds(rows=7)]
    assert parse_study(tomllib.loads(made.to_toml())) == made.complete()
    with pytest.raises(ConfigError, match="unknown guard 'bound'"):
        parse_study({"guards": {"bound.rows": 1}})
    with pytest.raises(ConfigError, match="unknown option of Bounds 'row'"):
        parse_study({"guards": {"bounds.row": 1}})
    with pytest.raises(ConfigError, match="bounds.rows = 0 must be at least 1"):
        parse_study({"guards": {"bounds.rows": 0}})


def test_rows_held_out_for_validation_belong_to_the_name_of_a_result():
    without = parse_study({"method": "fedsparsify", "data": {"validation_fraction": 0}})
    assert parse_study({"method": "fedsparsify"}).hash() != without.hash()
    # a run from before there was such a split has the name that it had
    values = without.complete().model_dump(mode="json", exclude={"compute": True, "guards": True, **LATER})
    del values["options"]["recovery"]
    del values["data"]["validation_fraction"]
    assert without.hash() == hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    with pytest.raises(ConfigError, match=r"data.test_fraction \+ data.validation_fraction = 1.1 must be below 1"):
        parse_study({"data": {"test_fraction": 0.8, "validation_fraction": 0.3}})


def test_rewinding_under_its_earlier_name_is_the_slot_of_today():
    """Study files, and run folders, which write out every option, have ``schedule.rewind``; -1 was the default."""
    options = {"schedule": "geometric", "schedule.share": 0.5}
    late = parse_study({"method": "fedsparsify", "options": {**options, "schedule": "geometric", "schedule.rewind": 2}})
    assert late.build_method().recovery == Rewind(round=2)
    stayed = parse_study({"method": "fedsparsify", "options": {**options, "schedule.rewind": -1}})
    assert stayed == parse_study({"method": "fedsparsify", "options": options})
    assert stayed.build_method().recovery == FineTune()
    # runs of before keep their names, here of complete studies as version 3aae6c6 hashed them
    assert stayed.hash() == "298fe3b5"
    assert late.hash() == "12ba0f06"
    with pytest.raises(ConfigError, match=r"recovery.round = -2 must be 0 or more"):
        parse_study({"method": "fedsparsify", "options": {**options, "schedule.rewind": -2}})


def test_toml_round_trip_with_model_options():
    made = parse_study({"model": {"name": "mlp", "options": {"hidden": (8, 4)}}}).complete()
    assert parse_study(tomllib.loads(made.to_toml())) == made


def test_dense_twin_shares_all_but_the_method():
    made = parse_study({"method": "autoflip", "options": {"aggregator.beta": 0.5}})
    twin = made.dense()
    assert twin.method == "fedavg"
    assert twin.build_method().aggregator == made.build_method().aggregator
    assert (twin.data, twin.model, twin.training, twin.seed) == (made.data, made.model, made.training, made.seed)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"method": "autofilp"}, "unknown method 'autofilp': did you mean 'autoflip'"),
        ({"round": 3}, "unknown setting 'round': did you mean 'rounds'"),
        ({"training": {"learning": 3}}, "unknown setting 'learning'"),
        ({"data": {"client": 3}}, "unknown setting 'client': did you mean 'clients'"),
        ({"rounds": 0}, "rounds = 0: input should be greater"),
        ({"rounds": "many"}, "rounds = 'many'"),
        ({"participation": 1.5}, "participation = 1.5"),
        ({"training": {"lr": -1}}, r"training\.lr = -1"),
        ({"training": {"optimiser": "sgdd"}}, r"training\.optimiser = 'sgdd'"),
        ({"data": {"partition": "dirichlet:-1"}}, r"data\.partition"),
        (
            {"options": {"schedule.sparsty": 0.5}},
            "unknown option of EveryRound 'schedule.sparsty': did you mean 'schedule.sparsity'",
        ),
        ({"options": {"shedule.sparsity": 0.5}}, "did you mean 'schedule'"),
        ({"options": {"schedule.sparsity": 1.5}}, r"schedule\.sparsity = 1\.5 must be in"),
        ({"options": {"schedule.sparsity": "lots"}}, r"schedule\.sparsity = 'lots'"),
        ({"options": {"schedule.sparsity.x": 1}}, "single value"),
        ({"options": {"schedule": "cubik"}}, "unknown value of schedule 'cubik': did you mean 'cubic'"),
        ({"options": {"criterion.normalise": "afterwards"}}, r"criterion\.normalise = 'afterwards'"),
        ({"wire": {"values": "fp8"}}, r"wire\.values = 'fp8'"),
    ],
)
def test_mistakes(values, says):
    with pytest.raises(ConfigError, match=says) as caught:
        parse_study(values)
    assert "\n" not in str(caught.value)


def test_options_as_nested_tables_of_a_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('method = "fedsparsify"\n[options]\n"schedule.sparsity" = 0.8\n')
    assert parse_study(read_toml(path)).build_method().schedule.sparsity == 0.8
    path.write_text('method = "fedsparsify"\n[options.schedule]\nsparsity = 0.8\n')
    assert parse_study(read_toml(path)).build_method().schedule.sparsity == 0.8


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="No such file.*path of a TOML file"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("rounds = = 3")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_toml(tmp_path / "bad.toml")


@pytest.mark.parametrize("setting", ["rounds", "=3", ""])
def test_set_without_a_value(setting):
    with pytest.raises(ConfigError, match="write it as path=value"):
        assign({}, setting)


def test_runtime_bounds():
    assert Runtime().workers >= 1
    with pytest.raises(ConfigError, match="workers = -1"):
        Runtime(workers=-1)
    with pytest.raises(ConfigError, match="deadline = 0"):
        Runtime(deadline=0)


def test_a_study_cannot_be_changed():
    with pytest.raises(Exception, match="frozen"):
        Study().rounds = 3


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("x = 1\n", "exactly one frozen dataclass"),
        ("import nothing_like_this\n", "cannot be imported: No module named 'nothing_like_this'"),
    ],
)
def test_modules_that_are_no_method(source, says, monkeypatch, tmp_path):
    name = f"their_method_{len(source)}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=says):
        methods.find(name)


def test_a_schedule_goes_over_the_rounds_of_the_study_and_renames_it():
    usual = parse_study({"rounds": 30})
    cosine = parse_study({"rounds": 30, "training": {"schedule": "cosine"}})
    assert cosine.training.period == 30
    assert cosine.hash() != usual.hash()
    assert parse_study(tomllib.loads(cosine.to_toml())).hash() == cosine.hash()
    assert parse_study({"rounds": 30, "training": {"decay": 0.5}}).training.rate(3) == 0.1 * 0.25  # as ever
    with pytest.raises(ConfigError, match=r"training\.period = 0 must be at least 1 with training\.schedule = step"):
        parse_study({"training": {"schedule": "step", "decay": 0.5}})


def test_a_task_of_ones_own_is_found_before_anything_runs():
    assert parse_study({"data": {"task": "regression"}}).hash() != parse_study({}).hash()
    with pytest.raises(ConfigError, match=r"task 'regresion'.*regression"):
        parse_study({"data": {"task": "regresion"}})
    with pytest.raises(ConfigError, match=r"task 'json:loads': TypeError"):
        parse_study({"data": {"task": "json:loads"}})
    with pytest.raises(ConfigError, match="must be a class derived from"):
        parse_study({"data": {"task": "collections:Counter"}})


def test_columns_and_options_of_data_are_settings():
    """A name may hold what else separates: the first = ends the path, and commas end nothing."""
    values = {}
    for setting in ["data.target=a=b#c,d", "data.options.drop=id, old", 'data.options.missing=["-9", "x"]',
                    "data.options.delimiter=;", "data.options.classes=3"]:  # fmt: skip
        assign(values, setting)
    made = parse_study(values)
    reading = {"target": "a=b#c,d", "drop": "id, old", "missing": ("-9", "x"), "delimiter": ";", "classes": 3}
    assert made.data.reading == reading
    assert parse_study(tomllib.loads(made.to_toml())).data == made.data
    assert parse_study({"data": {"site": "ward"}}).data.reading == {"site": "ward"}
    assert made.hash() != parse_study({}).hash()
