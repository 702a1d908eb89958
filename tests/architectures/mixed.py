"""Networks of other shapes: dense prediction, signals, volumes, tables, own parameters, shared towers."""

import torch
from torch import nn
from torch.nn import functional


class DoubleConv(nn.Module):
    """(convolution, batch norm, ReLU) twice."""

    def __init__(self, inside, outside):
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(inside, outside, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(outside),
            nn.ReLU(inplace=True),
            nn.Conv2d(outside, outside, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(outside),
            nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x):
        return self.double_conv(x)


class UNet(nn.Module):
    """The usual U-Net with a transposed convolution and a bilinear step up; its map of classes is averaged."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.inc, self.down1, self.down2 = DoubleConv(shape[0], 6), DoubleConv(6, 8), DoubleConv(8, 12)
        self.pool = nn.MaxPool2d(2)
        self.up1, self.conv1 = nn.ConvTranspose2d(12, 8, kernel_size=2, stride=2), DoubleConv(16, 8)
        self.up2, self.conv2 = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), DoubleConv(14, 6)
        self.outc = nn.Conv2d(6, outputs, kernel_size=1)

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down1(self.pool(x1))
        x3 = self.down2(self.pool(x2))
        x = self.conv1(torch.cat([x2, self.up1(x3)], dim=1))
        x = self.conv2(torch.cat([x1, self.up2(x)], dim=1))
        return self.outc(x).mean((2, 3))


class AutoEncoder(nn.Module):
    """A dilated encoder, a decoder of transposed convolutions, and a head on what is reconstructed."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(shape[0], 8, 3, stride=2, padding=1), nn.ELU(),
            nn.Conv2d(8, 12, 3, dilation=2, padding=2), nn.ELU(),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(12, 8, 3, stride=2, padding=1, output_padding=1), nn.BatchNorm2d(8), nn.ELU(),
            nn.ConvTranspose2d(8, shape[0], 3, padding=1), nn.Tanh(),
        )  # fmt: skip
        self.head = nn.Linear(shape[0] * shape[1] * shape[2], outputs)

    def forward(self, x):
        return self.head(torch.flatten(self.decoder(self.encoder(x)), start_dim=1))


class SegNet3d(nn.Module):
    """A medical volume in the manner of nnU-Net: instance norm, LeakyReLU, strided 3-d convolutions."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(shape[0], 6, 3, padding=1), nn.InstanceNorm3d(6, affine=True), nn.LeakyReLU(0.01)
        )
        self.down = nn.Sequential(
            nn.Conv3d(6, 8, 3, stride=2, padding=1), nn.InstanceNorm3d(8, affine=True), nn.LeakyReLU(0.01)
        )
        self.bottom = nn.Sequential(nn.Conv3d(8, 8, 3, padding=1), nn.InstanceNorm3d(8), nn.PReLU(8))
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Linear(8, outputs)

    def forward(self, x):
        return self.fc(self.pool(self.bottom(self.down(self.stem(x)))).flatten(1))


class GatedConv1d(nn.Module):
    """Gated linear units over time (Dauphin et al.): a convolution makes values and gates."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.conv1 = nn.Conv1d(shape[0], 2 * 8, 3, padding=1)
        self.conv2 = nn.Conv1d(8, 2 * 6, 3, padding=1)
        self.fc = nn.Linear(6, outputs)

    def forward(self, x):
        x = functional.glu(self.conv1(x), dim=1)
        a, b = torch.chunk(self.conv2(x), 2, dim=1)
        return self.fc((a * torch.sigmoid(b)).mean(dim=-1))


class Chomp1d(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return x[:, :, : -self.size].contiguous()


class TemporalBlock(nn.Module):
    def __init__(self, inside, outside, dilation, wrap):
        super().__init__()
        pad = 2 * dilation
        self.net = nn.Sequential(
            wrap(nn.Conv1d(inside, outside, 3, padding=pad, dilation=dilation)), Chomp1d(pad), nn.ReLU(),
            nn.Dropout(0.2),
            wrap(nn.Conv1d(outside, outside, 3, padding=pad, dilation=dilation)), Chomp1d(pad), nn.ReLU(),
            nn.Dropout(0.2),
        )  # fmt: skip
        self.downsample = nn.Conv1d(inside, outside, 1) if inside != outside else None
        self.relu = nn.ReLU()

    def forward(self, x):
        res = x if self.downsample is None else self.downsample(x)
        return self.relu(self.net(x) + res)


class TCN(nn.Module):
    """A temporal convolutional network; its last step is read."""

    wrap = staticmethod(nn.Identity().__call__)

    def __init__(self, shape, outputs):
        super().__init__()
        self.tcn = nn.Sequential(TemporalBlock(shape[0], 8, 1, self.wrap), TemporalBlock(8, 8, 2, self.wrap))
        self.linear = nn.Linear(8, outputs)

    def forward(self, x):
        return self.linear(self.tcn(x)[:, :, -1])


class WeightNormTCN(TCN):
    """The same under weight norm, as the authors have it."""

    wrap = staticmethod(nn.utils.parametrizations.weight_norm)


class WaveNet(nn.Module):
    """Dilated convolutions with a tanh and a sigmoid branch, residual and skip sums."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.start = nn.Conv1d(shape[0], 8, 1)
        self.filters = nn.ModuleList(nn.Conv1d(8, 6, 3, dilation=d, padding=d) for d in (1, 2))
        self.gates = nn.ModuleList(nn.Conv1d(8, 6, 3, dilation=d, padding=d) for d in (1, 2))
        self.residuals = nn.ModuleList(nn.Conv1d(6, 8, 1) for _ in range(2))
        self.skips = nn.ModuleList(nn.Conv1d(6, 10, 1) for _ in range(2))
        self.end = nn.Conv1d(10, outputs, 1)

    def forward(self, x):
        x, skip = self.start(x), 0
        for f, g, residual, skip_conv in zip(self.filters, self.gates, self.residuals, self.skips, strict=True):
            z = torch.tanh(f(x)) * torch.sigmoid(g(x))
            skip = skip + skip_conv(z)
            x = x + residual(z)
        return self.end(functional.relu(skip)).mean(-1)


class OwnConvolutions(nn.Module):
    """Convolutions on the model's own parameters, in the manner of meta-learning code."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(8, shape[0], 3, 3))
        self.w2 = nn.Parameter(torch.empty(8, 8, 3, 3))
        self.out = nn.Parameter(torch.empty(outputs, 8))
        self.b = nn.Parameter(torch.zeros(outputs))
        for w in (self.w1, self.w2, self.out):
            nn.init.kaiming_normal_(w)

    def forward(self, x):
        x = functional.relu(functional.conv2d(x, self.w1, padding=1))
        x = functional.relu(functional.conv2d(x, self.w2, stride=2, padding=1))
        return functional.linear(x.mean((2, 3)), self.out, self.b)


class Siamese(nn.Module):
    """Two halves of the input go through one tower; their distance is classified."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(shape[0] // 2, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc1 = nn.Linear(8 * (shape[1] // 2) ** 2, 12)
        self.fc2 = nn.Linear(12, outputs)

    def forward_once(self, x):
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        return self.fc1(torch.flatten(functional.relu(self.conv2(x)), 1))

    def forward(self, x):
        one, two = torch.chunk(x, 2, dim=1)
        return self.fc2(torch.abs(self.forward_once(one) - self.forward_once(two)))


class MLPBatchNorm(nn.Module):
    """A table: linear layers, 1-d batch norm, dropout."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.bn0 = nn.BatchNorm1d(shape[0])
        self.net = nn.Sequential(
            nn.Linear(shape[0], 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.1),
            nn.Linear(24, 16), nn.BatchNorm1d(16), nn.Mish(), nn.Linear(16, outputs),
        )  # fmt: skip

    def forward(self, x):
        return self.net(self.bn0(x))


class TabularEmbeddings(nn.Module):
    """fast.ai's table: embeddings of the first columns, batch norm of the others, concatenated."""

    def __init__(self, shape, outputs, sizes=((5, 3), (4, 2))):
        super().__init__()
        self.embeds = nn.ModuleList(nn.Embedding(levels, width) for levels, width in sizes)
        self.levels = [levels for levels, _ in sizes]
        self.emb_drop = nn.Dropout(0.1)
        self.bn_cont = nn.BatchNorm1d(shape[0] - len(sizes))
        inside = sum(width for _, width in sizes) + shape[0] - len(sizes)
        self.layers = nn.Sequential(nn.Linear(inside, 20), nn.ReLU(), nn.BatchNorm1d(20), nn.Linear(20, 12), nn.ReLU())
        self.head = nn.Linear(12, outputs)

    def forward(self, x):
        cat = [x[:, i].long().clamp(0, levels - 1) for i, levels in enumerate(self.levels)]
        x_cat = torch.cat([e(c) for e, c in zip(self.embeds, cat, strict=True)], 1)
        x_cont = self.bn_cont(x[:, len(self.levels) :])
        return self.head(self.layers(torch.cat([self.emb_drop(x_cat), x_cont], 1)))


class TabularResNet(nn.Module):
    """Residual layers for tables (Gorishniy et al.)."""

    def __init__(self, shape, outputs, width=12, hidden=20):
        super().__init__()
        self.first_layer = nn.Linear(shape[0], width)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(2))
        self.linear0 = nn.ModuleList(nn.Linear(width, hidden) for _ in range(2))
        self.linear1 = nn.ModuleList(nn.Linear(hidden, width) for _ in range(2))
        self.last_norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x):
        x = self.first_layer(x)
        for norm, first, second in zip(self.norms, self.linear0, self.linear1, strict=True):
            z = functional.dropout(functional.relu(first(norm(x))), 0.0, training=self.training)
            x = x + second(z)
        return self.head(functional.relu(self.last_norm(x)))


class SelfNormalising(nn.Module):
    """Functional activations of several kinds: SELU, Hardswish, LeakyReLU, softplus."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(shape[0], 20), nn.Linear(20, 18)
        self.fc3, self.fc4 = nn.Linear(18, 16), nn.Linear(16, 14)
        self.fc5 = nn.Linear(14, outputs)

    def forward(self, x):
        x = functional.selu(self.fc1(x))
        x = functional.hardswish(self.fc2(x))
        x = functional.leaky_relu(self.fc3(x), negative_slope=0.1)
        return self.fc5(functional.softplus(self.fc4(x)))


class GEGLU(nn.Module):
    def forward(self, x):
        x, gates = x.chunk(2, dim=-1)
        return x * functional.gelu(gates)


class GatedMLP(nn.Module):
    """Gated feed-forward layers: GEGLU as a module, nn.GLU, and two separate layers."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.geglu = nn.Sequential(nn.Linear(shape[0], 2 * 16), GEGLU(), nn.Linear(16, 12))
        self.proj, self.glu = nn.Linear(12, 2 * 10), nn.GLU(dim=-1)
        self.gate, self.up = nn.Linear(10, 14), nn.Linear(10, 14)
        self.down = nn.Linear(14, outputs)

    def forward(self, x):
        x = self.glu(self.proj(self.geglu(x)))
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class MixerMlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class MixerBlock(nn.Module):
    def __init__(self, dim, tokens):
        super().__init__()
        self.norm1, self.mlp_tokens = nn.LayerNorm(dim), MixerMlp(tokens, 10)
        self.norm2, self.mlp_channels = nn.LayerNorm(dim), MixerMlp(dim, 16)

    def forward(self, x):
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.norm2(x))


class MLPMixer(nn.Module):
    """timm's MLP-Mixer: linear layers across tokens, then across channels."""

    def __init__(self, shape, outputs, dim=12, patch=4):
        super().__init__()
        self.stem = nn.Conv2d(shape[0], dim, kernel_size=patch, stride=patch)
        tokens = (shape[1] // patch) * (shape[2] // patch)
        self.blocks = nn.Sequential(MixerBlock(dim, tokens), MixerBlock(dim, tokens))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, outputs)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(dim=1))
