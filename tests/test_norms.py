"""What one client can change: the guard by medians, by hand and in runs with a client that lies within all ranges."""

import math
from dataclasses import replace

import pytest
import torch

from helpers import INLINE, Wrapped, edited, model_of, noted, play, rows_of, same, small, tiny_shards
from secateur import guards
from secateur.contract.ask import TRAIN, Ask
from secateur.contract.checks import Range, Signs
from secateur.contract.guard import Passage, check_together, medians
from secateur.contract.reply import Reply, Sent
from secateur.contract.state import Setting
from secateur.data.shards import Shards
from secateur.engines import Failure
from secateur.errors import ConfigError
from secateur.federation import server
from secateur.federation.server import Run
from secateur.guards.norms import Norms
from secateur.pruning.structure import Layout
from secateur.study.runtime import Runtime
from secateur.study.study import parse_study, where_nobody_is_known
from secateur.wire.codec import decode, encode
from secateur.wire.head import context_of
from secateur.wire.message import Expected, Message, Spec
from secateur.wire.settings import Wire

SETTING = Setting(0, 5, 20, 1.0, Layout({"w": "weight", "m": "buffer"}), {})
# the five updates of a published comparison's hand case: four agree, the last is far off
UPDATES = [(1.0, 0.0), (1.2, 0.1), (0.9, -0.1), (1.1, 0.05), (-10.0, 8.0)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def seen(values=None, names=("w",)):
    return Passage(TRAIN, 1, 0, SETTING, Wire(), frozenset(names), values)


def sent(start=(0.0, 0.0), **more):
    return Sent(SETTING, lambda: ({"w": torch.tensor(start), **more}, None))


def reply(w, rows=10, mask=None, **more):
    return Reply(0, rows, {"w": torch.tensor(w), **more}, mask, {})


def test_updates_are_clipped_to_the_median_norm_of_a_cohort():
    """Norms 1, 1.2042, .9055, 1.1011, 12.806; at their median 1.1011 the mean of the clipped is (.6475, .1459)."""
    guard = Norms(times=1.0)
    measured = [guard.arriving(reply(u), sent(), seen()) for u in UPDATES]
    assert all(one.tensors["w"].tolist() == torch.tensor(u).tolist() for one, u in zip(measured, UPDATES, strict=True))
    found = medians(one.facts for one in measured)
    assert found["update"] * math.sqrt(2) == pytest.approx(1.1011, abs=1e-4)
    judged = [guard.arriving(reply(u), sent(), seen(found)) for u in UPDATES]
    mean = torch.stack([one.tensors["w"] for one in judged]).mean(0)
    assert mean.tolist() == pytest.approx([0.6475, 0.1459], abs=1e-4)
    assert [bool(one.bounded) for one in judged] == [False, True, False, False, True]
    assert judged[4].bounded["update"] == pytest.approx(1.1011 / 12.806, abs=1e-4)


def test_what_is_bounded_is_the_difference_to_what_was_sent():
    """Sent (10, 10), back (13, 14): the update (3, 4) has norm 5, clipped to half of it leads to (11.5, 12)."""
    bound = {"update": 2.5 / math.sqrt(2), "rows": 10.0}
    judged = Norms(times=1.0).arriving(reply([13.0, 14.0]), sent([10.0, 10.0]), seen(bound))
    assert judged.tensors["w"].tolist() == [11.5, 12.0]


@pytest.mark.parametrize("value", [1e30, 3e38, -1e38])
def test_no_finite_value_overflows(value):
    judged = Norms(times=1.0).arriving(reply([value, 0.0]), sent([-3e38, 1.0]), seen({"update": 1.0, "rows": 1.0}))
    assert bool(judged.tensors["w"].isfinite().all())
    assert judged.facts["update"] == 2.0
    assert math.isfinite(Norms().arriving(reply([value, 0.0]), sent([-3e38, 1.0]), seen()).facts["update"])


def test_a_client_is_measured_over_the_coordinates_that_it_holds():
    """Updates 3 and 4 on two of four coordinates: root mean square sqrt(25/2); what it does not hold stays 0."""
    mask = {"w": torch.tensor([True, False, True, False])}
    one = replace(reply([3.0, 0.0, 4.0, 0.0]), mask=mask)
    start = sent([0.0, 7.0, 0.0, 7.0])  # the server's values of pruned weights are no update
    assert Norms().arriving(one, start, seen()).facts["update"] == pytest.approx(math.sqrt(12.5))
    judged = Norms(times=1.0).arriving(one, start, seen({"update": math.sqrt(12.5) / 2, "rows": 1.0}))
    assert judged.tensors["w"].tolist() == pytest.approx([1.5, 0.0, 2.0, 0.0])


def test_buffers_are_measured_apart():
    """A variance that moves by 100 must not hide what weights do, nor be scaled with them."""
    one, start = reply([3.0, 4.0], m=torch.tensor([100.0])), sent(m=torch.tensor([0.0]))
    measured = Norms().arriving(one, start, seen(names=("w", "m")))
    assert measured.facts["buffers"] == 100.0
    assert measured.facts["update"] == pytest.approx(math.sqrt(12.5))
    known = {"update": math.sqrt(12.5) / 2, "buffers": 100.0, "rows": 1.0}
    judged = Norms(times=1.0).arriving(one, start, seen(known, names=("w", "m")))
    assert judged.tensors["m"].tolist() == [100.0]
    assert judged.tensors["w"].tolist() == pytest.approx([1.5, 2.0])


def test_a_statistic_is_bounded_by_its_own_size_within_its_phase():
    """Values 3 and 4 have a root mean square of sqrt(12.5); half of that leaves 1.5 and 2, whatever was sent."""
    measured = replace(seen(names=()), phase="explore", statistics=frozenset("w"))
    facts = Norms().arriving(reply([3.0, 4.0]), sent([7.0, 9.0]), measured).facts
    assert facts == {"rows": 10.0, "statistics of explore": pytest.approx(math.sqrt(12.5))}
    known = {"statistics of explore": math.sqrt(12.5) / 2, "statistics of score": 1e9, "rows": 10.0, "update": 1e9}
    judged = Norms(times=1.0).arriving(reply([3.0, 4.0]), sent([7.0, 9.0]), replace(measured, medians=known))
    assert judged.tensors["w"].tolist() == pytest.approx([1.5, 2.0])
    aside = Norms(times=1.0, far=1.5).arriving(reply([3.0, 4.0]), sent([7.0, 9.0]), replace(measured, medians=known))
    assert (aside.tensors["w"].tolist(), aside.rows) == ([0.0, 0.0], 0)


def test_what_is_many_times_the_median_is_set_aside():
    """Norm 5 against a median of 0.5: ten times; with far = 9 it counts as if its client had not trained."""
    bound = {"update": 0.5 / math.sqrt(2), "rows": 10.0}
    aside = Norms(times=1.0, far=9.0).arriving(reply([13.0, 14.0]), sent([10.0, 10.0]), seen(bound))
    assert (aside.tensors["w"].tolist(), aside.rows, aside.bounded) == ([10.0, 10.0], 0, {"update": 0.0, "rows": 0.0})
    assert aside.facts["update"] == 2 * bound["update"]
    clipped = Norms(times=1.0, far=11.0).arriving(reply([13.0, 14.0]), sent([10.0, 10.0]), seen(bound))
    assert clipped.tensors["w"].tolist() == pytest.approx([10.3, 10.4])


def test_a_cohort_whose_updates_all_grow_is_followed():
    """A rate a hundred times as high from some round on: all are set aside until the median has caught up."""
    medians_, guard = {"update": 1.0, "rows": 10.0}, Norms(far=30.0)
    taken = []
    for _ in range(4):
        judged = [guard.arriving(reply([100.0, 100.0]), sent(), seen(medians_)) for _ in range(3)]
        taken.append(judged[0].rows)
        medians_ = medians(one.facts for one in judged)
    assert taken == [0, 0, 10, 10]


def test_rows_count_up_to_a_multiple_of_the_median():
    """Median of 10, 20, 30 and 1000 is 25: at most 75 rows count."""
    assert Norms(rows=3.0).counted([10, 20, 30, 1000, 0]) == [10, 20, 30, 75, 0]
    judged = Norms(rows=3.0).arriving(reply([0.0, 0.0], rows=2**40), sent(), seen({"rows": 25.0, "update": 1.0}))
    assert judged.rows == 75
    assert judged.bounded == {"rows": 75.0}


def test_a_lie_enters_the_next_median_as_twice_the_last_at_most():
    known = {"update": 1.0, "rows": 10.0}
    for lie in (10.0, 1e30):
        assert Norms().arriving(reply([lie, lie]), sent(), seen(known)).facts["update"] == 2.0
    # two of five cannot move the median beyond what the others say
    facts = [Norms().arriving(reply([u, u]), sent(), seen(known)).facts for u in (0.9, 1.0, 1.1, 1e30, 1e30)]
    assert medians(facts)["update"] == pytest.approx(1.1)


def test_medians_of_an_even_count_and_of_nothing():
    assert medians([{"a": 1.0}, {"a": 4.0}]) == {"a": 2.5}
    assert medians([{"a": 0.0}, {}]) == {}


def test_who_has_no_rows_is_no_part_of_the_median():
    idle = reply([0.0, 0.0], rows=0)
    assert Norms().arriving(idle, sent(), seen()) is idle


def test_only_what_training_changed_is_bounded():
    specs = {n: Spec((2,)) for n in "abcd"} | {"i": Spec((2,), torch.uint8)}
    message = Message({n: torch.zeros(2) for n in "abc"} | {"i": torch.zeros(2, dtype=torch.uint8)})
    checks = (Signs(frozenset("a")), Range(frozenset("b"), least=0.0))
    ask = Ask(TRAIN, 1, (0,), message, Expected(specs, checks=checks), {})
    assert ask.updated == {"b", "c"}
    assert replace(ask, phase="score").updated == frozenset()
    measured = replace(ask, phase="score", expects=replace(ask.expects, infinite=frozenset("d")))
    assert (ask.statistics, measured.statistics) == ({"d"}, {"b", "c"})
    assert Norms().wants(measured) == {"rows", "statistics of score"}
    assert Norms().wants(ask) == {"rows", "update", "statistics of train"}


@pytest.mark.parametrize(("setting", "words"), [
    ("guards.norms.times=0", "norms.times = 0.0 must be above 0"),
    ("guards.norms.far=1", "norms.far = 1.0 must be norms.times .2. or more"),
    ("guards.norms.rows=0.5", "norms.rows = 0.5 must be at least 1"),
    ("guards.norms.tims=2", "did you mean.*times"),
    ("guards.norms.on=maybe", "guards.norms.on = 'maybe': write true or false"),
    ("guards.bounds.on=false", "bounds always run"),
])  # fmt: skip
def test_a_wrong_setting_is_refused_in_one_line(setting, words):
    with pytest.raises(ConfigError, match=words):
        small("fedavg", setting)


def test_it_cannot_look_at_what_another_guard_hides():
    hiding = type("Pads", (Norms,), {"sums_only": True, "compares": False})()
    with pytest.raises(ConfigError, match="Norms looks at single replies, and guard Pads hides them"):
        check_together([hiding, Norms()])
    with pytest.raises(ConfigError, match="guards Norms and Norms compare clients"):
        check_together([Norms(), Norms()])


def test_it_is_part_of_a_flower_runs_study_unless_that_says_otherwise():
    assert parse_study(where_nobody_is_known({"method": "fedavg"})).guards == {"bounds": {}, "norms": {}}
    off = parse_study(where_nobody_is_known({"method": "fedavg", "guards": {"norms.on": "false"}}))
    assert off.guards == {"bounds": {}}
    assert off.hash() == parse_study({"method": "fedavg"}).hash()
    own = where_nobody_is_known({"method": "fedavg", "guards": {"norms.times": "2"}})
    assert parse_study(own).build_guards()[1] == Norms(times=2.0)
    assert "norms" in guards.names()


GUARDED = ("guards.norms.times=1.0",)
LIVELY = [
    ("fedavg", ()), ("fedsparsify", ("wire.replies=updates",)), ("fedsparsify", ("wire.replies=topk",)),
    ("heterofl", ()), ("subfedavg", ()), ("fedavg", ("wire.values=fp16",)), ("fedsparsify_local", ()),
]  # fmt: skip


class Carried(Wrapped):
    """The same clients, one by one and as bytes, as a server gets them that does not simulate its clients."""


@pytest.mark.parametrize(("method", "settings"), LIVELY)
def test_workers_and_who_reads_replies_change_no_bit(method, settings, tmp_path, shards):
    study = small(method, *GUARDED, *settings)
    play(study, tmp_path / "here", shards)
    play(study, tmp_path / "carried", shards, open_engine=Carried.open)
    assert same(model_of(tmp_path / "here"), model_of(tmp_path / "carried"))
    told = [[(r.get("bounded"), r.get("medians")) for r in rows_of(tmp_path / place)] for place in ("here", "carried")]
    assert told[0] == told[1]
    assert any(bounded for bounded, _ in told[0])
    play(small(method, *settings), tmp_path / "plain", shards)
    assert not same(model_of(tmp_path / "here"), model_of(tmp_path / "plain"))


@pytest.mark.parametrize("runtime", [Runtime(workers=2), Runtime(workers=2, relays=2)])
def test_neither_workers_nor_relays_change_a_bit(runtime, tmp_path, shards):
    study = small("fedavg", *GUARDED, participation=1.0)
    play(study, tmp_path / "one", shards)
    play(study, tmp_path / "more", shards, runtime=runtime)
    assert same(model_of(tmp_path / "one"), model_of(tmp_path / "more"))


def test_stacks_are_judged_one_by_one(tmp_path, shards):
    study = small("fedavg", *GUARDED, "compute.together=2")
    play(study, tmp_path / "one", shards)
    play(study, tmp_path / "two", shards, runtime=Runtime(workers=2))
    assert same(model_of(tmp_path / "one"), model_of(tmp_path / "two"))
    assert any(row.get("bounded") for row in rows_of(tmp_path / "one"))


def test_computed_bytes_change_no_bit(tmp_path, shards):
    play(small("fedavg", *GUARDED, "wire.packing=none"), tmp_path / "written", shards)
    play(small("fedavg", *GUARDED, "wire.packing=none", "wire.count=computed"), tmp_path / "not", shards)
    assert same(model_of(tmp_path / "written"), model_of(tmp_path / "not"))


def test_a_resumed_run_knows_the_medians(tmp_path, shards):
    study = small("fedavg", *GUARDED)
    play(study, tmp_path / "whole", shards)

    class Stop(Exception):
        """The run is stopped."""

    def stopping(row):
        if row["event"] == "row" and row.get("round") == 2:
            raise Stop

    with pytest.raises(Stop):
        play(study, tmp_path / "stopped", shards, watch=stopping)
    server.resume(tmp_path / "stopped", INLINE, shards=shards)
    assert same(model_of(tmp_path / "whole"), model_of(tmp_path / "stopped"))
    assert [r["medians"] for r in rows_of(tmp_path / "whole")] == [r["medians"] for r in rows_of(tmp_path / "stopped")]


# ---- one client of four lies within every range


def lying(study, folder, shards, *, rounds=range(1, 99), **lie):
    """Return an engine whose client 1 changes its update, or says something else of itself, in some exchanges."""
    specs, lie_in = Run(study, Runtime(workers=0), folder, shards).setting.specs, set(rounds) & set(range(5))

    class Lies(Wrapped):
        """Client 1 lies in these exchanges."""

        def exchange(self, requests, deadline=None):
            self.count, asked = getattr(self, "count", 0) + 1, {}
            for client, answer in self.inner.exchange(noted(requests, asked), deadline):
                if client != 1 or isinstance(answer, Failure) or self.count not in lie_in:
                    yield client, answer
                elif "scalars" in lie:
                    yield client, edited(**lie["scalars"])(answer)
                else:
                    told = decode(answer, Expected(specs, mask="none"))
                    made = {n: lie["change"](t) for n, t in told.tensors.items()}
                    context = context_of(asked[client])
                    yield client, encode(Message(made, None, told.scalars), template=specs, context=context)

    return Lies.open


ATTACKED = ("wire.replies=updates",)
ATTACKS = {"x100": lambda t: 100 * t, "1e30": lambda t: torch.full_like(t, 1e30), "3e38": lambda t: t * 0 - 3e38}


def away(folder, clean):
    """Return how far a model is from the clean one, by the clean one's size."""
    one, other = model_of(folder), model_of(clean)
    return math.sqrt(sum(float((one[n].double() - other[n].double()).square().sum()) for n in one)) / math.sqrt(
        sum(float(t.double().square().sum()) for t in other.values())
    )


@pytest.mark.parametrize("attack", list(ATTACKS))
def test_a_huge_update_moves_the_model_no_further_than_an_honest_one(attack, tmp_path, shards):
    """Before: one client of four multiplied the model, and at 1e30 the honest ones were named for NaN."""
    study = small("fedavg", *ATTACKED, "guards.norms.times=1.0", participation=1.0)
    play(study, tmp_path / "clean", shards)
    engine = lying(study, tmp_path / "lied", shards, change=ATTACKS[attack])
    summary = play(study, tmp_path / "lied", shards, open_engine=engine)
    assert summary["left_out"] == {}
    assert all(1 in [who for who, _ in row["bounded"]] for row in rows_of(tmp_path / "lied"))
    assert away(tmp_path / "lied", tmp_path / "clean") < 0.5


def test_without_the_guard_the_same_update_decides(tmp_path, shards):
    study = small("fedavg", *ATTACKED, participation=1.0)
    play(study, tmp_path / "clean", shards)
    play(study, tmp_path / "lied", shards, open_engine=lying(study, tmp_path / "lied", shards, change=ATTACKS["x100"]))
    assert away(tmp_path / "lied", tmp_path / "clean") > 5


@pytest.mark.parametrize("method", ["autoflip", "prunefl", "salientgrads"])
def test_a_huge_statistic_decides_no_mask(method, tmp_path, shards):
    """Before: one hostile explorer of 1e30 let AutoFLIP prune every weight, though the guard was on."""
    found = {}
    for name, settings in (("clean", GUARDED), ("lied", (*GUARDED, "attack=huge:0.25"))):
        play(small(method, *settings, participation=1.0), tmp_path / name, shards)
        found[name] = rows_of(tmp_path / name)
    asked = [row for row in found["lied"] if row["phase"] != TRAIN]
    assert asked
    for row in asked:
        assert set(row["attackers"]) <= {who for who, bounded in row["bounded"] if len(bounded) == 2}
    assert found["lied"][-1]["sparsity"] == pytest.approx(found["clean"][-1]["sparsity"], abs=0.05)


def test_without_the_guard_the_same_statistic_prunes_every_weight(tmp_path, shards):
    play(small("autoflip", "attack=huge:0.25", participation=1.0), tmp_path / "bare", shards)
    assert rows_of(tmp_path / "bare")[-1]["sparsity"] == 1.0


def test_where_rows_are_not_known_a_claim_counts_as_three_others(tmp_path, shards):
    """Before: 2^40 rows were believed, and the mean was that client's reply."""
    study = small("fedavg", "guards.norms.rows=3", "guards.bounds.rows=1099511627776", participation=1.0)
    engine = lying(study, tmp_path / "lied", shards, scalars={"samples": 2**40})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "empty", True)
        play(study, tmp_path / "lied", shards, open_engine=engine)
    for row in rows_of(tmp_path / "lied"):
        (cut,) = [what["rows"] for who, what in row["bounded"] if who == 1]
        assert cut == math.floor(3 * row["medians"]["rows"])
        assert cut < 100
