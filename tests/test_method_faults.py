"""What a method's own code raises ends a run in one line that names method, verb, phase and round."""

from dataclasses import dataclass

import pytest

from helpers import play, small, tiny_shards
from secateur.errors import NoResultError
from secateur.federation.folder import read_failure
from secateur.methods.kit.composition import Composition


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@dataclass(frozen=True)
class Stumbles(Composition):
    """FedAvg of which one verb raises in one round."""

    verb: str = "absorb"
    since: int = 2

    def _step(self, verb, round_):
        if verb == self.verb and round_ >= self.since:
            {}["weights\nof nobody"]

    def start(self, setting, weights, archive):
        self._step("start", 9)
        return super().start(setting, weights, archive)

    def plan(self, state):
        self._step("plan", state.round + 1)
        return super().plan(state)

    def absorb(self, state, reduced):
        self._step("absorb", state.round + 1)
        return super().absorb(state, reduced)

    def final(self, state):
        self._step("final", state.round)
        return super().final(state)


@pytest.mark.parametrize(
    ("verb", "where"),
    [
        ("start", "start failed in round 0"),
        ("plan", "plan failed in round 2"),
        ("absorb", "absorb failed in phase 'train' of round 2"),
        ("final", "final failed in round 4"),
    ],
)
def test_a_fault_of_a_method_is_one_line_and_its_traceback_is_in_the_log(tmp_path, shards, verb, where):
    study = small(f"{__name__}", "verb=" + verb)
    expected = f"method Stumbles: {where}: KeyError: .* its traceback is in run.log$"
    with pytest.raises(NoResultError, match=expected) as told:
        play(study, tmp_path / "run", shards)
    assert "\n" not in str(told.value)
    log = (tmp_path / "run" / "run.log").read_text()
    assert "Traceback" in log
    assert "test_method_faults.py" in log
    assert read_failure(tmp_path / "run")["failed"] == str(told.value)
