"""Hostile clients of a simulation: what each attack sends, and that nothing else of a run changes with them."""

import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import own_attack
from helpers import model_of, play, rows_of, same, small, tiny_shards
from secateur import attacks, methods
from secateur.attacks.alie import ALIE
from secateur.attacks.crowd import alie_z, moments
from secateur.attacks.huge import Huge
from secateur.attacks.inflated import Inflated
from secateur.attacks.ipm import IPM
from secateur.attacks.label_flip import LabelFlip
from secateur.attacks.mimic import Mimic
from secateur.attacks.minmax import MinMax, largest_gamma
from secateur.attacks.nan import NotANumber
from secateur.attacks.noise import Noise
from secateur.attacks.rank_reverse import RankReverse
from secateur.attacks.scale import Scale
from secateur.attacks.sign_flip import SignFlip
from secateur.attacks.sparse import Sparse
from secateur.attacks.stale import Stale
from secateur.attacks.vote_flip import VoteFlip
from secateur.attacks.vote_target import VoteTarget
from secateur.contract.attack import Cohort, Scene
from secateur.contract.state import Setting
from secateur.errors import ConfigError
from secateur.federation import attackers
from secateur.federation.attackers import Attackers
from secateur.federation.folder import reserve
from secateur.federation.server import Run, resume
from secateur.learning.task import Data
from secateur.pruning.ranking import packed, unpacked
from secateur.pruning.structure import Layout
from secateur.study.attack import Hostile
from secateur.study.runtime import Runtime
from secateur.study.study import parse_study
from secateur.wire.message import Message, Spec
from secateur.wire.settings import Wire

EIGHT = {"clients": 8, "partition": "iid", "test_fraction": 0.2}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"), clients=8)


def hostile(method, attack, *settings, **top):
    given = [f"attack={attack}"] if attack else []
    return small(method, *given, *settings, **{"data": EIGHT, "participation": 1.0, **top})


def setting(*sizes):
    specs = {name: Spec((size,)) for name, size in zip("ab", sizes, strict=False)}
    return Setting(0, 5, 20, 1.0, Layout(dict.fromkeys(specs, "weight")), specs)


def scene(sent, *kinds, mask=None, phase="train", of=None):
    tensors = {name: torch.tensor(values) for name, values in sent.items()}
    return Scene(phase, 2, 3, of or setting(*map(len, sent.values())), Message(tensors, mask), frozenset(kinds))


def message(mask=None, rows=10, **tensors):
    return Message({name: torch.tensor(values) for name, values in tensors.items()}, mask, {"samples": rows})


def listed(found):
    return {name: [round(value, 5) for value in tensor.tolist()] for name, tensor in found.tensors.items()}


# ---- what a study says


def test_an_attack_is_a_name_a_share_and_parameters():
    made = parse_study({"method": "fedavg", "attack": "alie:0.3,z=1.5"}).build_attack()
    assert (made.attack, made.share, made.name) == (ALIE(z=1.5), 0.3, "alie")
    assert parse_study({"method": "fedavg", "attack": "own_attack:0.5"}).build_attack().attack == own_attack.Watching()
    plain, spelled = (parse_study({"method": "fedavg", "attack": text}) for text in ("ipm", "ipm:0.20,epsilon=0.5"))
    assert plain.attack == spelled.attack == "ipm:0.2,epsilon=0.5,knows=all"
    assert plain.hash() == spelled.hash() != parse_study({"method": "fedavg"}).hash()
    for name in attacks.names():
        text = str(Hostile.parse(name))
        assert str(Hostile.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("aile:0.3", "unknown attack 'aile': did you mean 'alie'?"),
        ("alie:a third", "the share 'a third' is no number"),
        ("alie:0", "share = 0.0 must be above 0 and at most 1"),
        ("alie:1.5", "share = 1.5 must be above 0 and at most 1"),
        ("alie:0.2,x=1", "unknown option of ALIE 'x'"),
        ("alie:0.2,z", "write 'z' as parameter=value"),
        ("alie:0.2,z=high", "z = 'high'"),
        ("alie:0.2,z=-1", "must be a finite number of at least 0"),
        ("sparse:0.2,share=0", "share = 0.0 must be above 0"),
        ("minmax,direction=up", "direction = 'up'"),
    ],
)
def test_a_wrong_attack_is_one_line(text, said):
    with pytest.raises(ConfigError) as refused:
        parse_study({"method": "fedavg", "attack": text})
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_attackers_are_drawn_from_the_seed_and_a_larger_share_holds_a_smaller_one():
    few, more = (Hostile.parse(f"{name}:{share}") for name, share in (("alie", 0.1), ("scale", 0.3)))
    for seed in range(20):
        assert len(few.who(seed, 20)) == 2
        assert len(more.who(seed, 20)) == 6
        assert few.who(seed, 20) < more.who(seed, 20) <= set(range(20))
    assert len({more.who(seed, 20) for seed in range(20)}) == 20
    with pytest.raises(ConfigError, match=r"0.01 of 20 clients is nobody"):
        Hostile.parse("alie:0.01").who(0, 20)


# ---- what each attack sends


def test_changes_are_turned_scaled_and_drowned():
    """By hand: W = (1, 2), w = (1.5, 1), so that the change is (0.5, -1)."""
    honest, seen = message(a=[1.5, 1.0]), scene({"a": [1.0, 2.0]}, "weights")
    assert listed(SignFlip(factor=2.0).alter(honest, seen, {})) == {"a": [0.0, 4.0]}
    assert listed(Scale(factor=100.0).alter(honest, seen, {})) == {"a": [51.0, -98.0]}
    assert listed(Huge(value=7.0).alter(honest, seen, {})) == {"a": [7.0, 7.0]}
    assert NotANumber().alter(honest, seen, {}).tensors["a"].isnan().all()
    assert Inflated(factor=100).alter(honest, seen, {}).scalars == {"samples": 1000}
    statistic = scene({"a": [1.0, 2.0]}, "statistics", phase="explore")  # a statistic is no change of the weights sent
    assert listed(Scale(factor=100.0).alter(honest, statistic, {})) == {"a": [150.0, 100.0]}


def test_pruned_entries_stay_pruned_whatever_an_attacker_sends():
    mask = {"a": torch.tensor([True, False])}
    honest, seen = message(mask, a=[1.5, 0.0]), scene({"a": [1.0, 0.0]}, "weights", mask=mask)
    cohort = Cohort([message(mask, a=[2.0, 0.0]), message(mask, a=[4.0, 0.0])], [honest])
    for attack in (Noise(), SignFlip(), Scale(), Huge(), NotANumber(), ALIE(), IPM(), MinMax(), Mimic(), Sparse()):
        for sent in (attack.alter(honest, seen, {}), attack.craft(honest, cohort, seen)):
            assert sent.tensors["a"][1].item() == 0.0
            assert sent.mask is mask


def test_noise_has_the_size_that_it_says_and_repeats():
    honest, seen = message(a=[0.0] * 4000), scene({"a": [0.0] * 4000}, "weights")
    sent = Noise(sigma=0.5).alter(honest, seen, {}).tensors["a"]
    assert abs(sent.std().item() - 0.5) < 0.5 * 5 / (2 * 4000) ** 0.5  # five standard errors of a deviation
    assert torch.equal(sent, Noise(sigma=0.5).alter(honest, seen, {}).tensors["a"])
    assert not torch.equal(sent, Noise(sigma=0.5).alter(honest, replace(seen, client=4), {}).tensors["a"])


def test_stale_sends_its_first_reply_for_ever():
    memory, seen = {}, scene({"a": [0.0, 0.0]}, "weights")
    assert listed(Stale().alter(message(a=[1.0, 2.0]), seen, memory)) == {"a": [1.0, 2.0]}
    mask = {"a": torch.tensor([True, False])}
    assert listed(Stale().alter(message(mask, a=[3.0, 0.0]), seen, memory)) == {"a": [1.0, 0.0]}


def test_labels_are_flipped_where_there_are_labels():
    data = Data(torch.zeros(3, 1), torch.tensor([0, 1, 9]))
    assert LabelFlip().poison(data, 10).y.tolist() == [9, 8, 0]


def test_a_ranking_and_a_statistic_are_turned_upside_down():
    of = setting(4)
    ranks = {"a": torch.tensor([2, 0, 3, 1], dtype=torch.int32)}
    sent = RankReverse().alter(Message(packed(ranks)), scene({}, "ranks", of=of), {})
    assert unpacked(sent.tensors, {"a": (4,)})["a"].tolist() == [1, 3, 0, 2]
    statistic = RankReverse().alter(message(a=[0.5, 0.1, 9.0, 0.2]), scene({}, "statistics", phase="explore"), {})
    assert listed(statistic) == {"a": [0.2, 9.0, 0.1, 0.5]}


def test_a_flipped_vote_keeps_what_an_honest_one_prunes_first():
    """By hand: of five entries, one of them gone, three are kept: first the one that is pruned, then the smallest."""
    held = {"a": torch.tensor([True, True, True, True, False])}
    honest = message({"a": torch.tensor([True, True, True, False, False])}, a=[3.0, -1.0, 2.0, 0.0, 0.0])
    sent = VoteFlip().alter(honest, scene({"a": [9.0, 9.0, 9.0, 0.5, 0.0]}, "weights", "votes", mask=held), {})
    assert sent.mask["a"].tolist() == [False, True, True, True, False]
    assert listed(sent) == {"a": [0.0, -1.0, 2.0, 0.5, 0.0]}  # what comes in has the value that was sent


def test_a_targeted_vote_keeps_nothing_of_a_layer_and_as_much_in_all():
    honest = message(
        {"a": torch.tensor([True, False, False]), "b": torch.tensor([True, True])}, a=[3.0, 0.0, 0.0], b=[1.0, 2.0]
    )
    seen = scene({"a": [9.0, 0.5, 0.5], "b": [9.0, 9.0]}, "weights", "votes")
    last = VoteTarget().alter(honest, seen, {})
    assert {n: m.tolist() for n, m in last.mask.items()} == {"a": [True, True, True], "b": [False, False]}
    first = VoteTarget(layer="a").alter(honest, seen, {})  # two entries elsewhere, and three votes: one has to stay
    assert {n: m.tolist() for n, m in first.mask.items()} == {"a": [True, False, False], "b": [True, True]}
    with pytest.raises(ConfigError, match="unknown layer of attack vote_target 'c'"):
        VoteTarget(layer="c").check(seen.setting, None)


# ---- attacks of several


def three(mask=None):
    """Return three honest messages: means 2 and 3, deviations 1 and 3, over squares by two."""
    return [message(mask, a=[1.0, 0.0]), message(mask, a=[2.0, 3.0]), message(mask, a=[3.0, 6.0])]


def test_alie_by_hand_and_by_another_quantile():
    assert alie_z(20, 6) == pytest.approx(statistics.NormalDist().inv_cdf(9 / 14))  # s = 11 - 6
    assert alie_z(20, 4) == pytest.approx(statistics.NormalDist().inv_cdf(9 / 16))
    assert alie_z(50, 24) == pytest.approx(statistics.NormalDist().inv_cdf(24 / 26))
    assert alie_z(4, 3) == alie_z(3, 3) == 0.0
    cohort, seen = Cohort(three(), [message(a=[0.0, 0.0])]), scene({"a": [0.0, 0.0]}, "weights")
    assert listed(ALIE(z=2.0).craft(message(a=[0.0, 0.0]), cohort, seen)) == {"a": [0.0, -3.0]}
    own = Cohort([message(a=[50.0, 50.0])], three())
    assert listed(ALIE(z=2.0, knows="own").craft(three()[0], own, seen)) == {"a": [0.0, -3.0]}


def test_ipm_is_minus_epsilon_times_the_mean_change():
    """By hand: W = (1, 1), the mean (2, 3), its change (1, 2)."""
    seen = scene({"a": [1.0, 1.0]}, "weights")
    sent = IPM(epsilon=0.5).craft(message(a=[0.0, 0.0]), Cohort(three(), []), seen)
    assert listed(sent) == {"a": [0.5, 0.0]}


def test_moments_are_of_those_that_hold_an_entry():
    masks = [{"a": torch.tensor(flags)} for flags in ([True, False], [True, False], [True, True])]
    found = moments([message(m, a=v) for m, v in zip(masks, ([1.0, 0.0], [3.0, 0.0], [5.0, 8.0]), strict=True)])
    assert found.mean["a"].tolist() == [3.0, 8.0]
    assert found.std["a"].tolist() == [2.0, 0.0]


@given(st.lists(st.lists(st.floats(-3, 3), min_size=3, max_size=3), min_size=2, max_size=6), st.integers(0, 2))
def test_minmax_goes_as_far_as_the_two_furthest_are_apart(points, kind):
    """The largest gamma by bisection, as the paper looks for it."""
    cloud = torch.tensor(points, dtype=torch.float64)
    centre = cloud.mean(dim=0)
    direction = (-cloud.std(dim=0), -centre / max(float(centre.norm()), 1e-9), -centre.sign())[kind]
    diameter = max(float((one - other).norm()) for one in cloud for other in cloud)

    def inside(gamma):
        return max(float((centre + gamma * direction - one).norm()) for one in cloud) <= diameter

    gamma = largest_gamma(cloud, centre, direction)
    if not float(direction.norm()):
        assert gamma == 0.0
        return
    low, high = 0.0, 1.0
    while inside(high):
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) else (low, middle)
    assert gamma * float(direction.norm()) == pytest.approx(low * float(direction.norm()), abs=1e-5)


def test_minmax_by_hand():
    """Points 0 and 4: mean 2, deviation sqrt(8), diameter 4; 2 - gamma sqrt(8) may reach 0, four from the other."""
    cohort = Cohort([message(a=[0.0]), message(a=[4.0])], [])
    assert listed(MinMax().craft(message(a=[0.0]), cohort, scene({"a": [0.0]}, "weights"))) == {"a": [0.0]}


def test_mimic_sends_what_the_outermost_client_sent():
    """The replies differ along (1, 1) only; the last one is furthest from their mean."""
    honest = [message(a=[0.0, 0.0]), message(a=[1.0, 1.0]), message(a=[8.0, 8.0])]
    sent = Mimic().craft(message(rows=7, a=[5.0, 5.0]), Cohort(honest, []), scene({"a": [0.0, 0.0]}, "weights"))
    assert listed(sent) == {"a": [8.0, 8.0]}
    assert sent.scalars == {"samples": 7}


def test_sparse_shifts_hard_what_is_dear_and_little_elsewhere():
    """By hand: saliency |w u| is |4 x (2 - 4)| = 8 and |1 x (3 - 1)| = 2: the first entry is dear."""
    cohort, seen = Cohort(three(), []), scene({"a": [4.0, 1.0]}, "weights")
    sent = Sparse(scale=5.0, z=1.0, share=0.5).craft(message(a=[0.0, 0.0]), cohort, seen)
    assert listed(sent) == {"a": [2 - 5.0, 3 - 3.0]}


# ---- what a run makes of them


def test_a_value_beyond_the_format_is_the_largest_that_it_carries():
    honest, ask = message(a=[0.0]), None
    for values, most in (("fp16", 65504.0), ("fp32", 1e30), ("int8", 1e30)):
        party = Attackers(Huge(), frozenset([0]), Wire(values=values), setting(1))
        assert party._carried(Huge().alter(honest, ask, {})).tensors["a"].item() == pytest.approx(most)
    party = Attackers(NotANumber(), frozenset([0]), Wire(values="int8"), setting(1))
    assert party._carried(NotANumber().alter(honest, ask, {})).tensors["a"].isfinite().all()


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("fedavg", {"compute": {"together": 4}}), ("fedavg", {"wire": {"values": "fp16", "replies": "updates"}}),
        ("fedsparsify", {"wire": {"replies": "topk"}}), ("heterofl", {"wire": {"values": "int8"}}),
        ("fedsparsify_local", {"guards": {"norms.times": 1.5}}),
    ],
)  # fmt: skip
def test_attackers_that_change_nothing_change_nothing(tmp_path, shards, method, given):
    """Replies that are carried one by one, read by attackers and written again are those reduced in workers."""
    own_attack.Watching.SEEN.clear()
    given = {**given, "rounds": 3}
    play(hostile(method, "", **given), tmp_path / "honest", shards)
    play(hostile(method, "own_attack:0.25", **given), tmp_path / "watched", shards)
    assert same(model_of(tmp_path / "honest"), model_of(tmp_path / "watched"))
    honest, watched = rows_of(tmp_path / "honest"), rows_of(tmp_path / "watched")
    assert [(r["bytes_up"], r["up"], r["each"]) for r in honest] == [
        (r["bytes_up"], r["up"], r["each"]) for r in watched
    ]
    two = watched[0]["attackers"]
    assert [("train", t, who, 6, 2) for t in (1, 2, 3) for who in two] == own_attack.Watching.SEEN
    assert "attackers" not in honest[0]


@pytest.mark.parametrize(
    ("method", "attack"),
    [("fedsparsify_local", "alie:0.25,z=1.5"), ("fedavg", "stale:0.25"), ("autoflip", "rank_reverse:0.25")],
)
def test_workers_and_a_stop_after_any_round_change_no_bit(tmp_path, shards, method, attack):
    study = hostile(method, attack)
    play(study, tmp_path / "inline", shards)
    play(study, tmp_path / "workers", shards, runtime=Runtime(workers=2))
    assert same(model_of(tmp_path / "inline"), model_of(tmp_path / "workers"))

    def stop(row):
        if row["event"] == "row" and row["phase"] == "train" and row["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(study, tmp_path / "stopped", shards, watch=stop)
    resume(tmp_path / "stopped", Runtime(workers=0), shards=shards)
    assert same(model_of(tmp_path / "inline"), model_of(tmp_path / "stopped"))


def test_relays_add_up_what_attackers_send_alone_and_are_refused_where_they_collude(tmp_path, shards):
    runtime = Runtime(workers=2, relays=2)
    play(hostile("fedavg", "sign_flip:0.25"), tmp_path / "none", shards)
    play(hostile("fedavg", "sign_flip:0.25"), tmp_path / "relays", shards, runtime=runtime)
    assert same(model_of(tmp_path / "none"), model_of(tmp_path / "relays"))
    with pytest.raises(ConfigError, match="attack ALIE: its attackers see each other's replies.*set relays=0"):
        play(hostile("fedavg", "alie:0.25"), tmp_path / "refused", shards, runtime=runtime)


def test_an_attacker_sends_what_the_attack_makes_of_its_honest_reply(tmp_path, shards):
    """The mean is linear in the factor on attackers' changes: that at -1 follows from those at 1 (honest) and 0."""
    once = {"rounds": 1}
    changes = {}
    for name, attack in (("honest", ""), ("nothing", "scale:0.25,factor=0"), ("turned", "sign_flip:0.25")):
        study = hostile("fedavg", attack, **once)
        reserve(tmp_path / name, study)
        run = Run(study, Runtime(workers=0), tmp_path / name, shards)
        before = {n: t.clone() for n, t in run.scoring.initial.items()}
        run.books.close()
        resume(tmp_path / name, Runtime(workers=0), shards=shards)
        changes[name] = {n: t - before[n] for n, t in model_of(tmp_path / name).items()}
    for name, change in changes["honest"].items():
        assert torch.allclose(changes["turned"][name], 2 * changes["nothing"][name] - change, atol=1e-6)
        assert not torch.allclose(changes["turned"][name], change, atol=1e-4)


def test_who_attacks_is_named_and_a_provable_lie_costs_only_its_sender(tmp_path, shards):
    summary = play(hostile("fedavg", "inflated:0.25"), tmp_path, shards)
    named = {who for row in rows_of(tmp_path) for who in row["attackers"]}
    assert named == Hostile.parse("inflated:0.25").who(0, 8)
    assert {int(who) for who in summary["left_out"]} == named
    assert "it says that it has" in summary["reasons"][0]["reason"]


def test_the_bytes_of_what_is_crafted_are_counted(tmp_path, shards):
    """Equal values shrink to almost nothing: the attackers' replies are shorter than the honest ones."""
    play(hostile("fedavg", "own_flat:0.25"), tmp_path, shards)
    for row in rows_of(tmp_path):
        carried = {who: up for who, _, up in row["each"]}
        assert sum(carried.values()) == row["bytes_up"] == sum(row["up"].values())
        honest = min(up for who, up in carried.items() if who not in row["attackers"])
        assert all(carried[who] < honest / 2 for who in row["attackers"])


def test_an_attack_that_changes_nothing_of_a_method_is_refused(tmp_path, shards):
    for method, attack, sent in (
        ("fedavg", "vote_flip", "votes, and clients of fedavg send weights"),
        ("frl", "alie:0.25", "scores, weights, and clients of frl send ranks"),
        ("autoflip", "vote_target", "votes, and clients of autoflip send statistics, weights"),
    ):
        with pytest.raises(ConfigError, match=sent):
            play(hostile(method, attack), tmp_path / method, shards)
        assert not (tmp_path / method / "rounds.jsonl").exists()


def test_numbers_have_no_labels_to_flip():
    with pytest.raises(ConfigError, match="the task learns numbers"):
        LabelFlip().check(None, attackers.tasks.find("regression"))


def test_real_clients_are_not_attacked(tmp_path, shards):
    study = hostile("fedavg", "alie:0.25")
    reserve(tmp_path, study)
    run = Run(hostile("fedavg", ""), Runtime(workers=0), tmp_path, shards)

    class Elsewhere:
        empty, task = True, "classification"

    with pytest.raises(ConfigError, match="attacks are played in simulations, and these clients are real"):
        attackers.check(study, run.method, run.setting, Elsewhere, run.scoring.initial)
    run.books.close()


@pytest.mark.parametrize("method", methods.names())
def test_every_method_says_what_its_clients_send(method, shards, tmp_path):
    """Each attack of an honest kind fits what a method's clients are seen to send, or is refused in words."""
    study = small(method, data={**EIGHT, "public": 8}, participation=1.0)
    reserve(tmp_path, study)
    run = Run(study, Runtime(workers=0), tmp_path, shards)
    kinds = frozenset(attackers._sent(study, run.method, run.setting, run.scoring.initial))
    run.books.close()
    assert kinds, method
