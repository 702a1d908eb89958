"""What is found of a model that was just built: which tensors are weights, and what cannot be trained."""

import math
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

from secateur import cost, models
from secateur.errors import ModelError
from secateur.learning.resident import LocalState, tensors_of
from secateur.pruning.discovery import layout
from secateur.pruning.roles import remarks, roles, stored


class Plain(nn.Module):
    """Two layers, between which something of a test's own is put."""

    def __init__(self, outputs, prepare=lambda model: None, between=lambda model, h: h):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, outputs)
        self._between = between
        prepare(self)

    def forward(self, x):
        return self.last(torch.relu(self._between(self, torch.relu(self.first(x)))))


def built(prepare=lambda model: None, between=lambda model, h: h, init="xavier_normal"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "find", lambda name: lambda shape, outputs: Plain(outputs, prepare, between))
        return models.build("mine:net", input_shape=(4,), outputs=2, init=init)


def parameter(*shape):
    return nn.Parameter(0.1 * torch.randn(*shape))


# what is added before a test runs, how it is read, and whether it is pruned
READ = {
    "a matrix": (parameter(6, 6), lambda h, w: h @ w, True),
    "a matrix by a function": (parameter(6, 6), functional.linear, True),
    "one by einsum": (parameter(3, 6, 6), lambda h, w: torch.einsum("bi,eij->bj", h, w), True),
    "a bare convolution": (parameter(2, 1, 3), lambda h, w: functional.conv1d(h[:, None], w, padding=1).sum(1), True),
    "a low-rank pair's product": (parameter(6, 6), lambda h, w: h @ (w @ w), True),
    "what is never read": (parameter(6, 6), lambda h, _: h, True),
    "layer scale": (parameter(6), lambda h, w: h * w, False),
    "a token": (parameter(1, 1, 6), lambda h, w: h + w[0], False),
    "scales of channels": (parameter(6, 1, 1), lambda h, w: h * w.flatten(), False),
    "positions with a batch": (parameter(1, 3, 6), lambda h, w: h + w[:, 1], False),
    "positions without": (parameter(3, 6), lambda h, w: h + w[2], False),
    "a table of gates": (parameter(2, 6), lambda h, w: h * torch.sigmoid(w).prod(0), False),
    "queries through a layer": (parameter(3, 6), lambda h, w: h + functional.linear(w, torch.eye(6)).mean(0), False),
    "a number": (nn.Parameter(torch.tensor(0.5)), lambda h, w: h * w, False),
    "nothing": (parameter(0, 6), lambda h, _: h, False),
}


@pytest.mark.parametrize("what", READ)
def test_only_what_is_multiplied_like_a_weight_is_one(what):
    tensor, read, is_weight = READ[what]
    model = built(lambda m: setattr(m, "own", nn.Parameter(tensor.detach().clone())), lambda m, h: read(h, m.own))
    assert roles(model)["own"] == ("weight" if is_weight else "norm")
    assert "own" in layout(model).trainable


def test_norms_slopes_and_biases_are_none_and_torchs_layers_have_weights():
    layers = {
        "rms": nn.RMSNorm(6), "slope": nn.PReLU(6), "layer": nn.LayerNorm(6), "pair": nn.Bilinear(6, 6, 6),
        "cell": nn.GRUCell(6, 6), "attention": nn.MultiheadAttention(6, 2, add_bias_kv=True), "one": nn.Embedding(1, 6),
        "narrow": nn.Linear(6, 1), "up": nn.ConvTranspose1d(1, 1, 3),
    }  # fmt: skip
    found = roles(built(lambda m: [m.add_module(name, layer) for name, layer in layers.items()]))
    weights = {name for name, role in found.items() if role == "weight"}
    assert weights == {
        *("first.weight", "last.weight", "pair.weight", "cell.weight_ih", "cell.weight_hh", "one.weight"),
        *("attention.in_proj_weight", "attention.out_proj.weight", "narrow.weight", "up.weight"),
    }
    assert {found[n] for n in ("rms.weight", "slope.weight", "layer.weight")} == {"norm"}
    assert {found[n] for n in ("attention.bias_k", "cell.bias_ih", "pair.bias")} == {"bias"}


def test_what_an_author_says_of_a_parameter_is_believed():
    def prepare(model):
        model.own, model.not_pruned = parameter(6, 6), frozenset({"own"})

    assert roles(built(prepare, lambda m, h: h @ m.own))["own"] == "norm"
    assert roles(built(lambda m: setattr(m, "own", parameter(3, 6)), lambda m, h: h + m.own[0]))["own"] == "norm"

    def none(model):
        model.own, model.not_pruned = parameter(3, 6), frozenset()

    assert roles(built(none, lambda m, h: h + m.own[0]))["own"] == "weight"


def hooked(name, layer):
    return lambda m: setattr(m, name, layer(getattr(m, name)))


REFUSED = {
    "old spectral norm": (hooked("first", nn.utils.spectral_norm), r"\.remove_spectral_norm\(model\.first"),
    "masks of torch": (
        hooked("first", lambda layer: prune.random_unstructured(prune.l1_unstructured(layer, "bias", 1), "bias", 1)),
        r"'bias' of layer 'first'.*torch\.nn\.utils\.prune\.remove\(model\.first, 'bias'\)",
    ),
    "complex": (lambda m: setattr(m, "own", nn.Parameter(torch.zeros(6, dtype=torch.cfloat))), r"'own' is complex"),
    "double": (lambda m: m.double(), r"'first\.weight' is of torch\.float64.*\.float\(\)"),
    "expanded": (lambda m: setattr(m, "own", nn.Parameter(torch.ones(1, 6).expand(3, 6))), r"expanded view"),
    "one memory": (
        lambda m: setattr(m, "other", nn.Linear(4, 6)) or setattr(m.other.weight, "data", m.first.weight.data),
        r"'first\.weight' and 'other\.weight' share memory.*model\.other\.weight = model\.first\.weight",
    ),
    "all frozen": (lambda m: m.requires_grad_(False), r"no parameter that is trained"),
    "a lock": (lambda m: setattr(m, "lock", threading.Lock()), r"cannot be copied.*lock"),
    "a lazy layer beside": (lambda m: setattr(m, "spare", nn.LazyLinear(3)), r"'spare\.weight' of a lazy.*remove"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_trained_and_exchanged_is_one_line_at_once(what):
    prepare, said = REFUSED[what]
    with pytest.raises(ModelError, match=said) as caught:
        built(prepare)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_what_a_parametrisation_computes_is_trained_and_not_pruned(kind):
    make = getattr(parametrizations, kind)
    model, plain = built(hooked("first", make)), built()
    found = roles(model)
    assert {role for name, role in found.items() if "parametrizations" in name} <= {"norm", "buffer", "constant"}
    assert [name for name, role in found.items() if role == "weight"] == ["last.weight"]
    made = {f"first.{name}" for name, _ in model.first.named_parameters()}
    assert made <= set(layout(model).trainable)
    assert remarks(model) == ["layer 'first' is trained and not pruned: its weight is computed in each step"]
    assert not remarks(plain)
    x = torch.zeros(1, 4)
    uses = cost.uses(model, x)
    assert cost.macs(uses, dict(model.named_parameters()), None) == cost.macs(
        cost.uses(plain, x), dict(plain.named_parameters()), None
    )
    lstm = make(nn.LSTM(4, 4), "weight_hh_l0")
    assert sum(cost.uses(lstm, torch.zeros(3, 1, 4)).values()) == 2 * 3


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_old_weight_norm_is_refused_too():
    with pytest.raises(ModelError, match=r"torch\.nn\.utils\.weight_norm.*remove_weight_norm\(model\.first\)"):
        built(hooked("first", nn.utils.weight_norm))


def test_a_buffer_that_training_changes_must_be_one_that_can_travel():
    def prepare(model):
        model.register_buffer("seen", torch.zeros(6, dtype=torch.float64))

    with pytest.raises(ModelError, match=r"'seen' is of torch\.float64"):
        built(prepare, lambda m, h: h + m.seen.add_(h.detach().mean(0)).float())
    assert roles(built(prepare, lambda m, h: h + m.seen.float()))["seen"] == "constant"


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_lazy_layers_get_their_shapes_before_their_weights():
    model = built(
        lambda m: setattr(m, "more", nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.LazyLinear(6))),
        lambda m, h: m.more(h),
    )
    assert {n: tuple(t.shape) for n, t in stored(model).items() if n.startswith("more.")} == {
        "more.0.weight": (3, 6),
        "more.0.bias": (3,),
        "more.1.weight": (3,),
        "more.1.bias": (3,),
        "more.1.running_mean": (3,),
        "more.1.running_var": (3,),
        "more.1.num_batches_tracked": (),
        "more.2.weight": (6, 3),
        "more.2.bias": (6,),
    }
    assert (model.more[0].bias == 0).all()  # as initialised
    again = built(
        lambda m: setattr(m, "more", nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.LazyLinear(6))),
        lambda m, h: m.more(h),
    )
    assert torch.equal(model.more[2].weight, again.more[2].weight)


def test_expanded_buffers_and_extra_state_are_no_obstacle():
    class Stateful(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            del state

    def prepare(model):
        model.first = Stateful(4, 6)
        model.register_buffer("wide", torch.ones(1, 6).expand(3, 6))

    model = built(prepare, lambda m, h: h + m.wide[1])
    assert model.wide.stride() == (6, 1)
    assert set(roles(model)) == {"first.weight", "first.bias", "last.weight", "last.bias", "wide"}
    assert set(tensors_of(model)) == set(roles(model)) - {"wide"}


def test_building_leaves_what_a_model_counts_as_it_was():
    model = built(lambda m: setattr(m, "calls", 0), lambda m, h: setattr(m, "calls", m.calls + 1) or h)
    assert model.calls == 0
    layout(model)  # a trace runs the model too
    assert model.calls == 0


def test_layers_that_the_first_forward_makes_are_part_of_the_model():
    def between(model, h):
        if not hasattr(model, "late"):
            model.late = nn.Linear(6, 6)
        return model.late(h)

    assert "late.weight" in roles(built(between=between))


# ---- what is put back before each client's work


def test_all_that_is_not_exchanged_goes_back():
    model = built(
        lambda m: (
            m.register_buffer("count", torch.tensor(3)),
            m.register_buffer("cache", torch.zeros(2), persistent=False),
            m.register_buffer("none", None),
            vars(m).update(steps=0, seen=[1], table={"a": torch.ones(2)}, draw=torch.Generator().manual_seed(5)),
        )
    )
    first, drawn = torch.rand(3, generator=torch.Generator().manual_seed(5)), []
    local = LocalState(model)
    for _ in range(2):
        drawn.append(torch.rand(3, generator=model.draw))
        model.count += 1
        model.cache = torch.full((4,), math.nan, requires_grad=True) * 2
        model.none = torch.ones(1)
        model.steps, model.fresh = 9, model.cache
        model.seen.append(model.seen)
        model.table["a"].zero_()
        model.first.calls = 1
        with torch.no_grad():
            model.first.bias.fill_(7.0)
        assert local.changed()
        local.restore()
        assert not local.changed()
        assert (model.steps, int(model.count), model.seen, model.none) == (0, 3, [1], None)
        assert model.cache.tolist() == [0.0, 0.0]
        assert not model.cache.requires_grad
        assert model.table["a"].tolist() == [1.0, 1.0]
        assert not hasattr(model, "fresh")
        assert not hasattr(model.first, "calls")
        assert (model.first.bias == 7).all()  # weights are not part of it
    assert torch.equal(drawn[0], first)
    assert torch.equal(drawn[1], first)


def test_references_between_modules_stay_references():
    model = built(lambda m: vars(m).update(order=[m.first, m.last], head=m.last.weight))
    LocalState(model).restore()
    assert model.order[0] is model.first
    assert model.head is model.last.weight


def test_an_attribute_that_cannot_be_copied_is_named():
    model = built()
    model.first.lock = threading.Lock()
    LocalState(model)  # of torch's own layers only plain values are kept
    model.lock = threading.Lock()
    with pytest.raises(ModelError, match=r"attribute 'lock' of the model, a lock, cannot be copied"):
        LocalState(model)


class Auxiliary(Plain):
    """A second head in training, as in Inception."""

    def forward(self, x):
        found = super().forward(x)
        return (found, found) if self.training else found


class Squeezed(Plain):
    """Drops all dimensions of one entry, the rows among them."""

    def forward(self, x):
        return super().forward(x).squeeze()


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Auxiliary, r"returns tuple in training mode, and one tensor of logits, shape \(rows, 3\)"),
        (Squeezed, r"returns shape \(3,\) for a batch of 1, \(1, 3\) is expected: squeeze\(\) drops the rows"),
        (lambda outputs: torch.jit.script(nn.Linear(4, outputs)), "made by torch.jit, and compiled code cannot be"),
        (lambda outputs: torch.compile(nn.Linear(4, outputs)), "made by torch.compile, and compiled code"),
        (
            lambda outputs: nn.Sequential(nn.Linear(4, 6), torch.jit.script(nn.Linear(6, outputs))),
            "module '1' was made by torch.jit",
        ),
    ],
)
def test_outputs_and_code_that_cannot_be_used_are_refused_with_what_to_do(monkeypatch, make, says):
    monkeypatch.setattr("secateur.models.find", lambda _: lambda shape, outputs: make(outputs))
    with pytest.raises(ModelError, match=says):
        models.build("their:net", input_shape=(4,), outputs=3)


def test_macs_of_a_model_that_gives_a_parameter_to_a_layer_are_counted():
    """A learnt query: torch's own counter asks such an input for its gradient's function."""

    class Query(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.read = nn.Parameter(torch.randn(1, 4)), nn.Linear(4, 3)

        def forward(self, x):
            return self.read(self.query) + x

    model = Query()
    assert cost.counted(model, torch.zeros(1, 3)) == 12
    assert model.query.requires_grad
