"""The networks: parameter counts of the papers, seeded initialisation, clear refusals."""

import pytest
import torch
from torch import fx, nn

from secateur import models
from secateur.errors import MissingExtraError, ModelError
from secateur.learning.resident import tensors_of
from secateur.models.memory_format import fragile, lay_out

COUNTS = [
    ("twocnn", (1, 24, 24), 10, {}, 1_663_370),
    ("twocnn", (3, 24, 24), 10, {}, 1_664_970),
    ("twocnn", (3, 24, 24), 100, {"hidden": 128}, 7_303_524),
    ("femnistcnn", (1, 28, 28), 62, {}, 13_180_734),
    ("mlp", (1, 28, 28), 10, {}, 118_282),
    ("sparsifycnn", (3, 32, 32), 10, {}, 1_609_930),
    ("vgg16", (3, 32, 32), 100, {}, 14_774_436),
    ("resnet20", (3, 32, 32), 10, {}, 272_474),
    ("resnet18", (3, 32, 32), 10, {}, 11_173_962),
    ("smallcnn", (1, 8, 8), 10, {}, 160 + 4_640 + 8_256 + 650),
]


@pytest.mark.parametrize(("name", "shape", "outputs", "options", "count"), COUNTS)
def test_parameter_counts(name, shape, outputs, options, count):
    model = models.build(name, input_shape=shape, outputs=outputs, options=options)
    assert sum(p.numel() for p in model.parameters()) == count


def test_charlstm_has_the_leaf_count_and_reads_tokens():
    model = models.build("charlstm", input_shape=(80,), outputs=80, tokens=True)
    assert sum(p.numel() for p in model.parameters()) == 819_920
    assert model(torch.randint(0, 80, (3, 80))).shape == (3, 80)


def test_chartransformer_counts_by_hand_and_refuses_heads_that_do_not_fit():
    model = models.build("chartransformer", input_shape=(80,), outputs=80, tokens=True)
    block = 2 * 2 * 64 + 4 * (64 * 64 + 64) + (64 * 256 + 256) + (256 * 64 + 64)
    assert sum(p.numel() for p in model.parameters()) == 80 * 64 + 80 * 64 + 2 * block + 2 * 64 + 64 * 80 + 80
    tokens = torch.randint(0, 80, (3, 80))
    shorter = tokens.clone()
    shorter[:, 40:] = 0
    assert model(tokens).shape == (3, 80)
    with torch.no_grad():  # no step sees a later one
        states = [model.blocks(model.embedding(x) + model.positions)[:, :40] for x in (tokens, shorter)]
    assert torch.allclose(*states, atol=1e-6)
    with pytest.raises(ModelError, match="width 10 is not a multiple of 4 heads"):
        models.build("chartransformer", input_shape=(80,), outputs=80, tokens=True, options={"width": 10})
    with pytest.raises(ModelError, match=r"inputs \(characters,\)"):
        models.build("chartransformer", input_shape=(1, 8, 8), outputs=3)


def test_charlstm_knows_every_symbol_that_its_outputs_name():
    for outputs, options, symbols in ((97, {}, 97), (2, {}, 80), (2, {"vocabulary": 30}, 30)):
        small = {"hidden": 4, **options}
        model = models.build("charlstm", input_shape=(80,), outputs=outputs, tokens=True, options=small)
        assert model.embedding.num_embeddings == symbols


@pytest.mark.parametrize("name", sorted(models.names()))
def test_every_model_can_be_traced_and_its_trace_agrees(name):
    tokens = name.startswith("char")
    shape = (80,) if tokens else (4, 9) if name == "gcn" else (3, 32, 32)
    options = {"charlstm": {"hidden": 4}, "resnet18": {"width": 8}}.get(name)
    model = models.build(name, input_shape=shape, outputs=5, tokens=tokens, options=options).eval()
    x = torch.randint(0, 80, (2, *shape)) if tokens else torch.rand(2, *shape)
    assert torch.equal(fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("name", sorted(set(models.names()) - {"charlstm", "chartransformer"}))
def test_every_model_takes_a_batch_and_trains(name):
    size = 32 if name in {"sparsifycnn", "vgg16", "resnet20", "resnet18"} else 8
    options = {
        "femnistcnn": {"hidden": 2, "features": 8},
        "twocnn": {"hidden": 2, "features": 8},
        "resnet18": {"width": 8},
    }
    shape = (4, 9) if name == "gcn" else (1, size, size)
    model = models.build(name, input_shape=shape, outputs=3, options=options.get(name))
    out = model(torch.rand(2, *shape))
    assert out.shape == (2, 3)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_group_norm_replaces_batch_norm():
    for name in ("resnet20", "resnet18"):
        kinds = {type(m) for m in models.build(name, input_shape=(3, 32, 32), outputs=10).modules()}
        assert nn.GroupNorm in kinds
        assert nn.BatchNorm2d not in kinds


@pytest.mark.parametrize("init", ["xavier_normal", "xavier_uniform", "kaiming_normal", "torch"])
def test_initialisation_is_seeded(init):
    def made(seed):
        return tensors_of(models.build("mlp", input_shape=(64,), outputs=10, init=init, seed=seed))

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, again, other = made(1), made(1), made(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not torch.equal(one["fc1.weight"], other["fc1.weight"])
    if init != "torch":
        assert all((t == 0).all() for n, t in one.items() if n.endswith("bias"))
    deviation = {
        "xavier_normal": (2 / 192) ** 0.5,
        "xavier_uniform": (2 / 192) ** 0.5,
        "kaiming_normal": (2 / 64) ** 0.5,
    }
    if init in deviation:
        assert one["fc1.weight"].std().item() == pytest.approx(deviation[init], rel=0.03)
    if init == "xavier_uniform":
        assert one["fc1.weight"].abs().max() <= (6 / 192) ** 0.5


def test_lstm_keeps_torchs_defaults():
    kept = models.build("charlstm", input_shape=(80,), outputs=80, tokens=True, init="torch")
    assert (kept.lstm.bias_ih_l0 != 0).any()
    set_ = models.build("charlstm", input_shape=(80,), outputs=80, tokens=True, init="xavier_normal")
    assert torch.equal(set_.lstm.weight_ih_l0, kept.lstm.weight_ih_l0)
    assert (set_.fc.bias == 0).all()


def test_a_bias_set_on_purpose_can_be_kept(monkeypatch, tmp_path):
    (tmp_path / "biased.py").write_text(
        "from torch import nn\n\ndef net(input_shape, outputs):\n"
        "    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, outputs))\n"
        "    nn.init.constant_(model[1].bias, -2.0)\n"
        "    model[1].keep_bias = True\n    return model\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = models.build("biased:net", input_shape=(4,), outputs=3)
    assert model[0].bias.tolist() == [0.0] * 4
    assert model[1].bias.tolist() == [-2.0] * 3


def test_whatever_their_code_raises_is_one_clear_line(monkeypatch, tmp_path):
    (tmp_path / "their_broken.py").write_text(
        "from torch import nn\nfrom secateur.errors import MissingExtraError\n\n"
        "class Pair(nn.Module):\n    def __init__(self, shape, outputs):\n        super().__init__()\n"
        "    def forward(self, x):\n        return x, x\n"
        "def key(shape, outputs):\n    return {}['nope']\n"
        "def zero(shape, outputs):\n    return 1 / 0\n"
        "def extra(shape, outputs):\n    raise MissingExtraError('pip install theirs')\n"
    )
    (tmp_path / "their_syntax.py").write_text("def (\n")
    (tmp_path / "their_import.py").write_text("raise RuntimeError('at\\nimport')\n")
    (tmp_path / "their_extra.py").write_text(
        "from secateur.errors import MissingExtraError\nraise MissingExtraError('pip install theirs')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name, says in {
        "their_broken:Pair": "returns tuple, and one tensor of logits, shape .* let forward return that alone",
        "their_broken:key": "KeyError: 'nope'",
        "their_broken:zero": "ZeroDivisionError",
        "their_syntax:net": "importing their_syntax failed: SyntaxError",
        "their_import:net": "importing their_import failed: RuntimeError: at import",
        "builtins:dict": "TypeError",
        ":net": "give your own model as module:factory",
        ".their_broken:key": "give your own model as module:factory",
        "their_broken:": "give your own model as module:factory",
    }.items():
        with pytest.raises(ModelError, match=says) as caught:
            models.build(name, input_shape=(4,), outputs=2)
        assert "\n" not in str(caught.value)
    for name in ("their_broken:extra", "their_extra:net"):
        with pytest.raises(MissingExtraError, match="pip install theirs"):
            models.build(name, input_shape=(4,), outputs=2)


def test_your_own_factory_by_module_and_name(monkeypatch, tmp_path):
    (tmp_path / "their_models.py").write_text(
        "from torch import nn\n\ndef net(input_shape, outputs, **options):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0] * 4, outputs, **options))\n"
        "def text(input_shape, outputs):\n    return 'a string'\n"
        "def wide(input_shape, outputs):\n    return nn.Flatten()\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = models.build("their_models:net", input_shape=(1, 2, 2), outputs=5, options={"bias": False})
    assert sum(p.numel() for p in model.parameters()) == 20
    for name, says in {
        "their_models:text": "returned str",
        "their_models:wide": r"shape \(2, 4\) for a batch of 2, \(2, 5\)",
        "their_models:number": "not callable",
        "their_models:nothing": "has no attribute 'nothing'",
        "no_such_package:net": "No module named",
    }.items():
        with pytest.raises(ModelError, match=says):
            models.build(name, input_shape=(1, 2, 2), outputs=5)


@pytest.mark.parametrize(
    ("name", "shape", "options", "says"),
    [
        ("twocn", (1, 8, 8), {}, "did you mean 'twocnn'"),
        ("mlp", (1, 8, 8), {"hiden": 3}, "unknown option of model mlp 'hiden': did you mean 'hidden'"),
        ("twocnn", (64,), {}, "channels, height, width"),
        ("charlstm", (1, 8, 8), {}, "characters"),
        ("vgg16", (3, 8, 8), {}, "at least 32x32"),
        ("sparsifycnn", (3, 4, 32), {}, "at least 8x8"),
        ("mlp", (64,), {"hidden": "x"}, "cannot take inputs"),
        ("mlp", (64,), {"outputs": 2}, "unknown option of model mlp 'outputs'"),
        ("resnet20", (3, 32, 32), {"groups": 0}, "ZeroDivisionError"),
    ],
)
def test_refusals(name, shape, options, says):
    with pytest.raises(ModelError, match=says):
        models.build(name, input_shape=shape, outputs=10, options=options)


def test_unknown_initialisation():
    with pytest.raises(ModelError, match="unknown initialisation 'xavier'"):
        models.build("mlp", input_shape=(4,), outputs=2, init="xavier")


def test_listing_reads_the_docstrings():
    listed = models.names()
    assert listed["twocnn"].reference.startswith("AutoFLIP")
    assert all(info.summary and info.reference for info in listed.values())


def test_a_graph_convolution_by_hand():
    """Two nodes that are joined, and two places that are not used."""
    model = models.build("gcn", input_shape=(4, 6), outputs=2, options={"hidden": 3})
    x = torch.zeros(1, 4, 6)
    x[0, :2, :2] = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    x[0, :2, 2:4] = 1.0
    mixed = (model.conv1(x[0, 0, :2]) + model.conv1(x[0, 1, :2])) / 2
    hidden = torch.relu(model.conv2(torch.relu(mixed)))  # both nodes see the same, so their mean is each of them
    assert torch.allclose(model(x)[0], model.fc(hidden), atol=1e-6)
    with pytest.raises(ModelError, match="a graph model needs rows of"):
        models.build("gcn", input_shape=(8,), outputs=2)


def test_strided_pointwise_convolutions_of_few_channels_see_channels_first():
    """What crashed: gradients of such weights, images channels last, on CPUs without AVX-512; see ``fragile``."""
    model = models.build("resnet20", input_shape=(3, 8, 8), outputs=4, options={"width": 6}, init="torch")
    lay_out(model)
    seen = {}

    def watch(name, layer):
        def hook(_, inputs):
            seen[name] = layer.weight.stride(), inputs[0].is_contiguous(memory_format=torch.channels_last)

        layer.register_forward_pre_hook(hook)

    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    for name, layer in convolutions.items():
        watch(name, layer)
    x = torch.rand(5, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    model.train()(x).square().sum().backward()
    kept = {name for name, layer in convolutions.items() if fragile(layer)}
    assert {name for name, (_, last) in seen.items() if not last} == kept
    assert {convolutions[name].stride for name in kept} == {(2, 2)}
    assert all(seen[name][0] == (convolutions[name].in_channels, 1, 1, 1) for name in kept)
    exact = models.build("resnet20", input_shape=(3, 8, 8), outputs=4, options={"width": 6}, init="torch").double()
    exact.train()(x.double().contiguous()).square().sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert torch.allclose(mine.grad.double(), theirs.grad, rtol=1e-3, atol=1e-3), name


def test_weights_of_a_single_input_channel_lie_channels_last_too():
    """Their strides say so, though either order is the same memory; torch chooses its code by them."""
    model = models.build("twocnn", input_shape=(1, 28, 28), outputs=10, init="torch")
    lay_out(model)
    assert (model.conv1.weight.stride(), model.conv2.weight.stride()) == ((25, 1, 5, 1), (800, 1, 160, 32))


class Viewing(nn.Module):
    """Flattens images with ``view``, which needs channels first: behind a convolution, at once, or in training only."""

    def __init__(self, where):
        super().__init__()
        self.conv, self.aside, self.out = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(3 * 16, 5), nn.Linear(64, 5)
        self.where = where

    def forward(self, x):
        y = torch.relu(self.conv(x))
        if self.where == "at once" or (self.where == "in training" and self.training):
            return self.aside(x.view(x.size(0), -1)) + self.out(y.flatten(1))
        return self.out(y.view(y.size(0), -1) if self.where == "behind" else y.flatten(1))


def viewing(shape, outputs, where="behind"):
    return Viewing(where)


@pytest.mark.parametrize("where", ["behind", "at once", "in training", "nowhere"])
def test_a_model_that_flattens_with_view_gets_its_images_channels_first(where):
    options = {"where": where}
    model = models.build(f"{__name__}:viewing", input_shape=(3, 4, 4), outputs=5, options=options)
    lay_out(model)
    assert model.conv.weight.is_contiguous() == (where != "nowhere")
    x = torch.rand(2, 3, 4, 4)
    last = x.contiguous(memory_format=torch.channels_last)
    flat = x.flatten(1)
    for training in (False, True):
        seen = torch.relu(model.conv(x)).flatten(1)
        expected = model.out(seen)
        if where == "at once" or (where == "in training" and training):
            expected = expected + model.aside(flat)
        assert torch.allclose(model.train(training)(last), expected, atol=1e-6)
