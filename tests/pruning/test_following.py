"""What is followed in networks of images: activations, sums, gates, concatenations, convolutions of every kind."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from secateur.pruning.discovery import layout
from secateur.pruning.structure import Slot, expand, plan
from secateur.pruning.surgery import shrink


class Net(nn.Module):
    """Layers by name, and a forward pass."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def conv(inputs, outputs, size=3, **more):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **more)


def head(width, outputs=3):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, outputs))


def stirred(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if "running" in n)):
            tensor.copy_(torch.randn(tensor.shape) * 0.3 + (1 if tensor.dim() == 1 else 0)).abs_()
    return model


def difference(model, found, x, *, training):
    """Return how far outputs of slim and masked are apart, in double precision, without a third of the units."""
    dense = stirred(copy.deepcopy(model)).double()
    state = dense.state_dict()
    masks = {}
    for group in found.groups:
        keep = torch.arange(group.units) % 3 != 1
        if group.kind == "block":
            continue
        for slot in group.incoming if group.silent else (*group.incoming, *group.outgoing):
            part = masks.get(slot.tensor, torch.ones(state[slot.tensor].shape, dtype=torch.bool))
            masks[slot.tensor] = part & expand(keep, slot, part.shape)
    dense.load_state_dict({n: torch.where(masks[n], t, 0.0) if n in masks else t for n, t in state.items()})
    small = shrink(dense, plan(masks, found.groups))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())
    x = x.double().contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.double()
    one, two = (net.train(training)(x).detach() for net in (dense, small))
    return float((one - two).abs().max()) / max(1.0, float(one.abs().max()))


def dense_net(m, x):
    x = m.stem(x)
    for layer in m.layers:
        x = torch.cat([x, layer(torch.relu(x))], 1)
    return m.head(m.norm(x))


def u_net(m, x):
    first = torch.relu(m.down1(x))
    second = torch.relu(m.down2(functional.max_pool2d(first, 2)))
    up = torch.relu(m.up(second))
    return m.head(torch.relu(m.merge(torch.cat([up, first], 1))))


def squeezed(m, x):
    x = m.conv(x)
    gate = torch.sigmoid(m.expand(torch.relu(m.squeeze(x.mean((2, 3), keepdim=True)))))
    return m.head(x * gate)


def squeezed_by_linear(m, x):
    x = m.conv(x)
    gate = torch.sigmoid(m.expand(torch.relu(m.squeeze(functional.adaptive_avg_pool2d(x, 1).flatten(1)))))
    return m.head(x * gate[:, :, None, None])


def convnext(m, x):
    x = m.stem(x)
    y = m.norm(m.depthwise(x).permute(0, 2, 3, 1))
    y = m.scale * m.fc2(functional.gelu(m.fc1(y)))
    return m.head(x + y.permute(0, 3, 1, 2))


def residual(m, x):
    x = m.relu(m.norm(m.stem(x)))
    return m.head(m.relu(x + m.norm2(m.b(m.relu(m.norm1(m.a(x)))))))


def inception(m, x):
    parts = [torch.relu(branch(x)) for branch in m.branches]
    return m.head(torch.relu(m.last(torch.cat(parts, dim=1))))


def own_weights(m, x):
    x = functional.relu(functional.conv2d(x, m.weight, m.bias, padding=1))
    return m.head(x)


def siamese(m, x):
    return m.out((m.encode(x) - m.encode(x.flip(-1))).abs())


def scaled(m, x):
    return m.head(m.conv(x) * m.gamma.view(1, -1, 1, 1) + m.beta[None, :, None, None])


def spatial_gate(m, x):
    x = m.conv(x)
    return m.head(x * torch.sigmoid(m.where(x)))


IMAGE = (2, 8, 8)
FOLLOWED = {
    "a shared ReLU": (
        Net(residual, stem=conv(2, 6), norm=nn.BatchNorm2d(6), a=conv(6, 4), norm1=nn.BatchNorm2d(4), b=conv(4, 6),
            norm2=nn.BatchNorm2d(6), relu=nn.ReLU(inplace=True), head=head(6)),
        {"stem": 6, "a": 4},
    ),
    "DenseNet": (
        Net(dense_net, stem=conv(2, 4), layers=nn.ModuleList([conv(4, 3), conv(7, 5)]), norm=nn.BatchNorm2d(12),
            head=head(12)),
        {"stem": 4, "layers.0": 3, "layers.1": 5},
    ),
    "U-Net": (
        Net(u_net, down1=conv(2, 4), down2=conv(4, 6), up=nn.ConvTranspose2d(6, 5, 2, stride=2), merge=conv(9, 4),
            head=head(4)),
        {"down1": 4, "down2": 6, "up": 5, "merge": 4},
    ),
    "squeeze and excitation": (
        Net(squeezed, conv=conv(2, 6), squeeze=conv(6, 4, 1), expand=conv(4, 6, 1), head=head(6)),
        {"conv": 6, "squeeze": 4},
    ),
    "squeeze and excitation by linear layers": (
        Net(squeezed_by_linear, conv=conv(2, 6), squeeze=nn.Linear(6, 4), expand=nn.Linear(4, 6), head=head(6)),
        {"conv": 6, "squeeze": 4},
    ),
    "a gate of one channel": (
        Net(spatial_gate, conv=conv(2, 6), where=conv(6, 1), head=head(6)), {"conv": 6},
    ),
    "GLU of channels": (
        nn.Sequential(conv(2, 12), nn.GLU(1), head(6)), {"0": 6},
    ),
    "a gate by halves": (
        Net(lambda m, x: m.head(torch.mul(*((a := m.conv(x).chunk(2, 1))[0], a[1].sigmoid()))), conv=conv(2, 12),
            head=head(6)),
        {"conv": 6},
    ),
    "ConvNeXt": (
        Net(convnext, stem=conv(2, 6), depthwise=conv(6, 6, groups=6), norm=nn.LayerNorm(6), fc1=nn.Linear(6, 9),
            fc2=nn.Linear(9, 6), scale=nn.Parameter(torch.ones(6)), head=head(6)),
        {"fc1": 9},
    ),
    "a layer's scale and shift": (
        Net(scaled, conv=conv(2, 6), gamma=nn.Parameter(torch.ones(6)), beta=nn.Parameter(torch.ones(6)),
            head=head(6)),
        {"conv": 6},
    ),
    "Inception": (
        Net(inception, branches=nn.ModuleList([conv(2, 4, 1), conv(2, 3), conv(2, 5, 5)]), last=conv(12, 4),
            head=head(4)),
        {"branches.0": 4, "branches.1": 3, "branches.2": 5, "last": 4},
    ),
    "ResNeXt": (
        nn.Sequential(conv(2, 12), nn.ReLU(), conv(12, 18, groups=6), nn.BatchNorm2d(18), nn.ReLU(), head(18)),
        {"0": 6},
    ),
    "depthwise, more outputs than inputs": (
        nn.Sequential(conv(2, 6), nn.ReLU(), conv(6, 12, groups=6), nn.ReLU(), head(12)), {"0": 6},
    ),
    "MobileNetV3": (
        nn.Sequential(conv(2, 6, 1), nn.BatchNorm2d(6), nn.Hardswish(), conv(6, 6, groups=6), nn.BatchNorm2d(6),
                      nn.Hardswish(), conv(6, 4, 1), head(4)),
        {"0": 6, "6": 4},
    ),
    "a decoder": (
        nn.Sequential(conv(2, 6), nn.ELU(), nn.Upsample(scale_factor=2), conv(6, 4), nn.ReLU(),
                      nn.ConvTranspose2d(4, 5, 2, stride=2), nn.ReLU(), nn.ConvTranspose2d(5, 5, 3, groups=5), head(5)),
        {"0": 6, "3": 4, "5": 5},
    ),
    "instance norm with scale": (
        nn.Sequential(conv(2, 6), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), head(6)), {"0": 6},
    ),
    "instance norm without": (
        nn.Sequential(conv(2, 6), nn.InstanceNorm2d(6), nn.ReLU(), head(6)), {"0": 6},
    ),
    "instance norm with statistics": (
        nn.Sequential(conv(2, 6), nn.InstanceNorm2d(6, track_running_stats=True), nn.ReLU(), head(6)), {"0": 6},
    ),
    "group norm": (nn.Sequential(conv(2, 6), nn.GroupNorm(2, 6), nn.ReLU(), head(6)), {"0": 6}),
    "weights of its own": (
        Net(own_weights, weight=nn.Parameter(torch.randn(6, 2, 3, 3)), bias=nn.Parameter(torch.ones(6)), head=head(6)),
        {"": 6},
    ),
    "a shared encoder": (
        Net(siamese, encode=nn.Sequential(conv(2, 5), nn.ReLU(), conv(5, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            out=nn.Linear(4, 3)),
        {"encode.0": 5, "encode.2": 4},
    ),
    "a view behind a pool": (
        Net(lambda m, x: m.fc(functional.max_pool2d(m.conv(x), 2).reshape(x.shape[0], -1)), conv=conv(2, 6),
            fc=nn.Linear(96, 3)),
        {"conv": 6},
    ),
    "padded, cropped, rolled": (
        Net(lambda m, x: m.head(functional.pad(m.conv(x), (1, 1, 1, 1))[:, :, 1:-2, ::2].roll(1, 2)), conv=conv(2, 6),
            head=head(6)),
        {"conv": 6},
    ),
    "maxout by a reshape": (
        Net(lambda m, x: m.head(m.conv(x).view(len(x), -1, 2, 8, 8).amax(2)), conv=conv(2, 12), head=head(6)),
        {"conv": 6},
    ),
    "a number for each position": (
        Net(lambda m, x: m.head(m.conv(x) * torch.linspace(0, 1, 8).to(x) + 0.5), conv=conv(2, 6), head=head(6)),
        {"conv": 6},
    ),
    "drop path": (
        Net(lambda m, x: m.head(m.conv(x) * (torch.rand(len(x), 1, 1, 1) < (0.5 if m.training else 1)).to(x)),
            conv=conv(2, 6), head=head(6)),
        {"conv": 6},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWED)
def test_units_are_found_and_slim_is_masked(name):
    model, expected = FOLLOWED[name]
    found = layout(model, example=torch.zeros(1, *IMAGE))
    assert {g.name: g.units for g in found.groups if g.kind == "channel"} == expected, found.whole
    x = torch.randn(4, *IMAGE, generator=torch.Generator().manual_seed(1))
    assert difference(model, found, x, training=False) < 1e-9
    if name != "drop path":  # its draws differ from call to call
        assert difference(model, found, x, training=True) < 1e-9


KEEP_ZERO = [
    nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.PReLU(), nn.PReLU(6), nn.ELU(), nn.SELU(), nn.CELU(), nn.GELU(),
    nn.GELU(approximate="tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Tanh(), nn.Hardtanh(), nn.Softsign(),
    nn.Tanhshrink(), nn.Softshrink(), nn.Hardshrink(), nn.Identity(), nn.Dropout(0.5), nn.Dropout2d(0.5),
    nn.AlphaDropout(0.1), nn.FeatureAlphaDropout(0.1), nn.MaxPool2d(2), nn.AvgPool2d(3, padding=1), nn.LPPool2d(2, 2),
    nn.AdaptiveMaxPool2d(2), nn.ReflectionPad2d(1), nn.ZeroPad2d(1), nn.UpsamplingNearest2d(scale_factor=2),
]  # fmt: skip
ARE_CONSTANT = [
    nn.Sigmoid(), nn.Softplus(), nn.Hardsigmoid(), nn.LogSigmoid(), nn.Threshold(0.1, 0.3), nn.ConstantPad2d(1, 0.5),
    nn.BatchNorm2d(6, affine=False), nn.Softmin(2),
]  # fmt: skip


@pytest.mark.parametrize("layer", [*KEEP_ZERO, *ARE_CONSTANT], ids=lambda layer: str(layer).partition("(")[0])
def test_every_layer_without_channels_of_its_own_passes_them_on(layer):
    """A unit is silent where f(0) = 0; where not, it is removed only if nothing reads it."""
    model = nn.Sequential(conv(2, 6), copy.deepcopy(layer), head(6))
    found = layout(model, example=torch.zeros(1, *IMAGE))
    assert [(g.name, g.units, g.silent) for g in found.groups] == [("0", 6, layer in KEEP_ZERO)], found.whole
    x = torch.randn(4, *IMAGE, generator=torch.Generator().manual_seed(1))
    assert difference(model, found, x, training=False) < 1e-9


CALLS = {
    "leaky_relu": lambda x: functional.leaky_relu(x, 0.2),
    "hardswish": functional.hardswish,
    "mish": functional.mish,
    "elu": lambda x: functional.elu(x, alpha=0.5),
    "clamp": lambda x: x.clamp(min=0, max=6),
    "x sigmoid(x)": lambda x: x * x.sigmoid(),
    "x relu6(x + 3) / 6": lambda x: x * functional.relu6(x + 3) / 6,
    "square root": lambda x: x.abs().sqrt(),
    "in place": lambda x: x.mul_(2).relu_(),
    "difference": lambda x: 2 * x - x**2,
    "negative": lambda x: -x,
    "maximum": lambda x: torch.maximum(x, x / 2),
    "dropout": lambda x: functional.dropout(x, 0.5, training=True),
    "half and back": lambda x: x.float().double().to(x.dtype).clone().contiguous(),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "chosen by a comparison": lambda x: x * (x > 0),
    "hidden": lambda x: x.masked_fill(x < 0, 0.0),
    "unit length": lambda x: functional.normalize(x, dim=1),
    "divided by its length": lambda x: x / (1 + x.norm(dim=1, keepdim=True)),
    "over one dimension": lambda x: x - x.mean(dim=(2, 3), keepdim=True),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_keep_zeros_are_followed(name):
    call = CALLS[name]
    model = Net(lambda m, x: m.head(call(m.conv(x))), conv=conv(2, 6), head=head(6))
    found = layout(model, example=torch.zeros(1, *IMAGE))
    assert [(g.name, g.units, g.silent) for g in found.groups] == [("conv", 6, True)], found.whole
    if name != "dropout":
        assert difference(model, found, torch.randn(4, *IMAGE), training=False) < (1e-6 if "half" in name else 1e-9)


def test_a_constant_unit_is_dead_only_where_nothing_reads_it():
    found = layout(nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2)), example=torch.zeros(1, 4))
    unread = {"0.weight": torch.ones(3, 4, dtype=torch.bool), "0.bias": torch.ones(3, dtype=torch.bool)}
    for tensor in unread.values():
        tensor[1] = False
    assert not plan(unread, found.groups)
    unread["2.weight"] = torch.tensor([[True, False, True], [True, False, True]])
    assert [(cut.tensor, cut.kept) for cut in plan(unread, found.groups).cuts] == [
        ("0.weight", (0, 2)), ("0.bias", (0, 2)), ("2.weight", (0, 2)),
    ]  # fmt: skip


def test_units_behind_a_concatenation_begin_at_an_offset():
    model, _ = FOLLOWED["DenseNet"]
    stem, first, second = layout(model, example=torch.zeros(1, *IMAGE)).groups
    assert stem.outgoing == (
        Slot("layers.0.weight", 1),
        Slot("layers.1.weight", 1, 1, 1, 0, 7),
        Slot("head.2.weight", 1, 1, 1, 0, 12),
    )
    assert [slot for slot in first.incoming if "norm" in slot.tensor] == [
        Slot("norm.weight", 0, 1, 1, 4, 12), Slot("norm.bias", 0, 1, 1, 4, 12),
    ]  # fmt: skip
    assert second.statistics == (Slot("norm.running_mean", 0, 1, 1, 7, 12), Slot("norm.running_var", 0, 1, 1, 7, 12))


def shuffled(m, x):
    return m.head(functional.pixel_shuffle(m.conv(x), 2))


def squeezed(m, x):
    return m.fc(functional.relu(m.conv(x)).mean((2, 3)).squeeze())


def by_position(m, x):
    return m.fc(m.conv(x).reshape(x.size(0) * 6, -1)).view(x.size(0), -1)[:, :3]


class Late(nn.Module):
    """A layer that only one mode uses."""

    def __init__(self, mode):
        super().__init__()
        self.a, self.extra, self.o = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.mode = mode

    def forward(self, x):
        x = torch.relu(self.a(x))
        if self.training == self.mode:
            x = torch.relu(self.extra(x))
        return self.o(x)


class Hidden(torch.autograd.Function):
    """A function that torch does not show: it reverses the channels."""

    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy()[:, ::-1].copy())

    @staticmethod
    def backward(ctx, grad):
        return grad.flip(1)


REFUSED = {
    "rows of channels": (Net(by_position, conv=conv(2, 6), fc=nn.Linear(64, 3)), IMAGE, "conv", "another dimension"),
    "batch norm over steps": (
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5), nn.Flatten(), nn.Linear(30, 3)), (5, 4), "0",
        "another dimension",
    ),
    "a call that torch does not show": (
        Net(lambda m, x: m.fc(Hidden.apply(m.a(x))), a=nn.Linear(4, 6), fc=nn.Linear(6, 3)), (4,), "a",
        "fails without some of them",
    ),
    "one unit that is squeezed away": (
        Net(squeezed, conv=conv(2, 6), fc=nn.Linear(6, 3)), IMAGE, "conv", "fails without some of them",
    ),
    "a computed weight": (
        nn.Sequential(nn.Linear(4, 6), nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))), (4,), "0", "computes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_stays_with_the_true_reason(name):
    model, shape, layer, says = REFUSED[name]
    found = layout(model, example=torch.zeros(1, *shape))
    assert layer not in {group.name for group in found.groups}
    assert says in found.whole.get(layer, ""), found.whole


@pytest.mark.parametrize("mode", [False, True])
def test_a_layer_of_one_mode_is_cut_for_both(mode):
    model = Late(mode)
    found = layout(model, example=torch.zeros(1, 4))
    assert [(g.name, g.units) for g in found.groups] == [("a", 6)]
    assert {s.tensor for s in found.groups[0].outgoing} == {"extra.weight", "o.weight"}
    for training in (False, True):
        assert difference(model, found, torch.randn(5, 4), training=training) < 1e-9


def test_a_weight_that_a_call_reads_besides_its_layer_is_cut_for_both():
    model = Net(
        lambda m, x: m.b(functional.relu(m.a(x))) + m.c(functional.relu(functional.linear(x.flip(1), m.a.weight))),
        a=nn.Linear(4, 6), b=nn.Linear(6, 3), c=nn.Linear(6, 3),
    )  # fmt: skip
    found = layout(model, example=torch.zeros(1, 4))
    assert [(g.name, g.units) for g in found.groups] == [("a", 6)]
    assert {s.tensor for s in found.groups[0].outgoing} == {"b.weight", "c.weight"}
    assert difference(model, found, torch.randn(5, 4), training=True) < 1e-9


def test_layers_without_units_of_their_own_are_named_too():
    """A depthwise convolution, one whose weight is computed, and one with a single output."""
    wide = nn.utils.parametrizations.spectral_norm(conv(6, 4))
    model = nn.Sequential(conv(2, 6), conv(6, 6, groups=6), nn.LocalResponseNorm(3), wide, conv(4, 1), head(1))
    found = layout(model, example=torch.zeros(1, *IMAGE))
    assert found.whole["1"] == found.whole["0"] == "'2' (LocalResponseNorm) mixes its channels"
    assert "computes, and does not hold" in found.whole["3"]
    assert found.whole["4"] == "it has one unit"
    assert found.groups == ()
