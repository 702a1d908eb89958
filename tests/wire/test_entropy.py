"""Flags at the cost of their entropy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import WireError
from secateur.wire import entropy
from secateur.wire.entropy import Run, RunReader
from secateur.wire.reader import Reader, varint


def flags(count, density, seed=0):
    return np.random.default_rng(seed).random(count) < density


def section(*heads):
    return memoryview(entropy.write(heads))


def test_entropy_by_hand():
    assert entropy.entropy(0, 100) == entropy.entropy(100, 100) == entropy.entropy(0, 0) == 0
    assert entropy.entropy(400, 800) == 100
    assert entropy.entropy(200, 800) == pytest.approx((200 * 2 + 600 * math.log2(4 / 3)) / 8)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 3000), st.sampled_from([0, 1e-3, 0.02, 0.3, 0.5, 0.9, 0.999, 1])), max_size=4),
    st.integers(0, 99),
)
def test_runs_come_back_in_order_with_what_stands_between(wanted, seed):
    runs = [flags(count, density, seed) for count, density in wanted]
    heads = [part for n, run in enumerate(runs) for part in (bytes([n]), Run.of(run))]
    reader = RunReader(section(*heads), "the mask")
    for n, run in enumerate(runs):
        assert reader.heads.byte("n") == n
        assert np.array_equal(reader.run(run.size), run)
    reader.end()


@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 0.3, 0.7, 0.99])
def test_independent_flags_cost_their_entropy(density):
    run = Run.of(flags(400_000, density))
    size = len(section(run))
    bound = entropy.entropy(run.kept, run.count)
    assert bound <= size + 1
    assert size <= 1.003 * bound + 16
    assert abs(size - run.size) <= 0.003 * bound + 16  # the choice between forms goes by this


def test_the_cheapest_mode():
    assert bytes(section(Run.of(flags(1000, 0)))) == b"\x01\x00"
    assert bytes(section(Run.of(flags(1000, 1)))) == b"\x01\x01"
    assert len(section(Run.of(flags(1000, 0.5)))) == 1 + 1 + 125  # as a bitmap
    few = np.zeros(80, bool)
    few[3] = True
    assert len(section(Run.of(few))) <= 1 + 1 + 1 + 4
    assert Run.of(few).mode == 3


def test_what_was_not_written_by_us():
    run = Run.of(flags(400, 0.05))
    data = bytes(section(run))
    heads = 1 + 1 + len(varint(run.kept))

    def refused(changed, says, count=400, end=False):
        with pytest.raises(WireError, match=says):
            reader = RunReader(memoryview(changed), "the mask")
            reader.run(count)
            reader.end()

    refused(b"", "ends within the mask")
    refused(b"\x05\x00", "ends within the mask")
    refused(data[:1] + b"\x04" + data[2:], "unknown mode 4")
    refused(data[:-1], "no whole number of words")
    refused(data + bytes(4), "ends in an empty word")
    refused(data[:2] + bytes([run.kept + 1]) + data[3:], "flags announced")
    refused(data[:2] + b"\0" + data[3:], "0 of 400 flags")
    refused(data, "3 flags|flags announced|beyond|left over", count=392)
    refused(data[:heads] + data[heads + 4 :], "others came|left over|beyond")
    refused(bytes([heads]) + data[1:heads] + b"\0" + data[heads:], "bytes are left over")
    refused(b"\x02\x02\xff", "beyond its tensor", count=7)


def test_varints():
    assert [varint(n).hex() for n in (0, 127, 128, 2**63 - 1)] == ["00", "7f", "8001", "ff" * 8 + "7f"]
    assert all(Reader(varint(n)).varint("n") == n for n in (0, 1, 127, 128, 300, 2**40, 2**63 - 1))
