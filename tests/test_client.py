"""The client's side: bytes in, bytes out."""

import time

import pytest
import torch
from safetensors import torch as safetensors

from helpers import SCORED, small, tiny_shards
from secateur.contract.ask import EVALUATE, REPORT
from secateur.data.shards import open_shards
from secateur.errors import WireError
from secateur.federation import client, gathering
from secateur.federation.intake import COST_SCALARS, SECONDS
from secateur.learning.resident import tensors_of
from secateur.wire.codec import Outgoing, decode, encode, part_sizes
from secateur.wire.message import Expected, Message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def participant(folder):
    return client.Participant(small("fedavg"), open_shards(folder))


def request(participant, phase="train", round_=1, mask=None):
    tensors = tensors_of(participant.model)
    return encode(Message(tensors, mask, {"phase": phase, "round": round_}))


def expects(participant, **changes):
    scalars = {**REPORT, **COST_SCALARS}
    return Expected(participant.setting.specs, scalars=scalars, **changes)


def test_a_reply_carries_weights_and_what_was_done(participant):
    before = tensors_of(participant.model)
    reply, kept = participant(2, request(participant), None)
    message = decode(reply, expects(participant))
    assert kept is None
    assert message.scalars["samples"] == message.scalars["processed"] == len(participant.data(2)) == 18
    assert message.scalars[SECONDS] > 0
    assert not torch.equal(message.tensors["fc1.weight"], before["fc1.weight"])


def test_serving_one_client_leaves_no_trace_on_the_next(participant, folder):
    first = request(participant)
    alone, _ = client.Participant(small("fedavg"), open_shards(folder))(3, first, None)
    for other in (0, 1, 2):
        participant(other, first, None)
    after, _ = participant(3, first, None)
    one, two = (decode(reply, expects(participant)) for reply in (alone, after))
    assert all(torch.equal(one.tensors[n], two.tensors[n]) for n in one.tensors)


def test_the_mask_is_not_sent_back(participant):
    g = torch.Generator().manual_seed(0)
    tensors = tensors_of(participant.model)
    mask = {n: torch.rand(t.shape, generator=g) < 0.1 for n, t in tensors.items() if n.endswith("weight")}
    pruned = {n: torch.where(mask[n], t, 0.0) if n in mask else t for n, t in tensors.items()}
    asked = encode(Message(pruned, mask, {"phase": "train", "round": 1}))
    reply, _ = participant(0, asked, None)
    assert part_sizes(reply)["mask"] == 16 < part_sizes(asked)["mask"]
    message = decode(reply, expects(participant, mask="same", known=mask))
    assert all((message.tensors[n][~m] == 0).all() for n, m in mask.items())


def test_evaluation_scores_the_local_test_split(participant):
    memory = safetensors.save({"theirs": torch.ones(2)})
    reply, kept = participant(1, request(participant, EVALUATE), memory)
    message = decode(reply, Expected({}, scalars=SCORED))
    assert kept is None  # nothing new
    x, y = participant.shards.test(1)
    with torch.no_grad():
        right = (participant.model(x.float() / 255).argmax(1) == y).float().mean().item()
    assert message.scalars["metric"] == pytest.approx(right)
    assert message.scalars["samples"] == len(y) == 6


def test_evaluation_scores_the_validation_rows_beside_the_test(tmp_path):
    own = client.Participant(small("fedavg"), open_shards(tiny_shards(tmp_path, validation_fraction=0.2)))
    reply, _ = own(1, request(own, EVALUATE), None)
    scores = decode(reply, Expected({}, scalars=SCORED)).scalars
    held = own.shards.test, own.shards.validation
    for rows, key, count in zip(held, ("metric", "validation"), ("samples", "validation_samples"), strict=True):
        x, y = rows(1)
        with torch.no_grad():
            right = (own.model(x.float() / 255).argmax(1) == y).float().mean().item()
        assert (scores[key], scores[count]) == (pytest.approx(right), len(y))
    assert (scores["samples"], scores["validation_samples"]) == (6, 5)  # a quarter and a fifth of 24 rows
    assert len(own.data(1)) == 13


def test_a_client_without_test_rows_says_so(tmp_path):
    import numpy as np

    from helpers import tiny_source
    from secateur.data.shards import make_shards

    source = tiny_source()
    shards = make_shards(source, [np.arange(96)], test_fraction=0.0, seed=0, folder=tmp_path)
    alone = client.Participant(small("fedavg"), shards)
    reply, _ = alone(0, request(alone, EVALUATE), None)
    scores = decode(reply, Expected({}, scalars=SCORED)).scalars
    assert (scores["samples"], scores["metric"]) == (0, 0.0)
    assert (scores["validation_samples"], scores["validation"]) == (0, 0.0)


@pytest.mark.parametrize("damage", [b"", b"x" * 100])
def test_a_client_refuses_what_it_cannot_read(participant, damage):
    with pytest.raises(WireError):
        participant(0, damage, None)


@pytest.mark.parametrize("together", [1, 2])
def test_seconds_include_writing_the_reply(together, folder, monkeypatch):
    study = small("fedavg", f"compute.together={together}")
    participant = client.Participant(study, open_shards(folder))
    asked = request(participant)
    plain, _ = participant(2, asked, None)

    def slowly(*args, **more):
        time.sleep(0.2)
        return Outgoing(*args, **more)

    monkeypatch.setattr(client, "Outgoing", slowly)
    slow, _ = participant(2, asked, None)
    one, other = (decode(reply, expects(participant)) for reply in (plain, slow))
    assert other.scalars[SECONDS] > 0.2
    assert all(torch.equal(one.tensors[n], other.tensors[n]) for n in one.tensors)
    assert len(plain) == len(slow)


def test_seconds_include_reading_a_request_that_another_client_of_the_worker_read(participant, monkeypatch):
    def slowly(*args, **more):
        time.sleep(0.2)
        return decode(*args, **more)

    monkeypatch.setattr(client, "decode", slowly)
    asked = request(participant)
    for who in (0, 1):
        reply, _ = participant(who, asked, None)
        assert decode(reply, expects(participant)).scalars[SECONDS] > 0.2


def test_a_client_refuses_another_model(participant):
    wrong = encode(Message({"fc1.weight": torch.zeros(3, 3)}, None, {"phase": "train", "round": 1}))
    with pytest.raises(WireError, match=r"fc1\.weight"):
        participant(0, wrong, None)


def test_initial_weights_follow_the_seed_and_nothing_else(folder):
    shards = open_shards(folder)
    one, again = (client.make_model(small("fedavg"), shards) for _ in range(2))
    other_method = client.make_model(small("autoflip"), shards)
    other_seed = client.make_model(small("fedavg", seed=1), shards)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other_method.parameters(), strict=True))
    assert not torch.equal(one.fc1.weight, other_seed.fc1.weight)


def test_settings_are_equal_on_both_sides(folder, participant):
    shards = open_shards(folder)
    model = client.make_model(small("fedavg"), shards)
    server = client.make_setting(small("fedavg"), model, shards.clients, client.example(shards))
    assert server == participant.setting


def test_build_in_a_worker_uses_one_thread(folder):
    before = torch.get_num_threads()
    try:
        served = gathering.build(small("fedavg").complete().model_dump_json(), str(folder)).participant
        assert torch.get_num_threads() == 1
        assert served.setting.clients == 4
    finally:
        torch.set_num_threads(before)
