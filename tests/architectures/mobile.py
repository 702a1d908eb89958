"""Efficient and modern convolutional networks: gates, depthwise and grouped layers, layer scale."""

import torch
from torch import nn
from torch.nn import functional


def conv_bn(inside, outside, kernel=3, stride=1, groups=1, act=nn.ReLU6):
    layers = [
        nn.Conv2d(inside, outside, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outside),
    ]
    return nn.Sequential(*layers, act()) if act is not None else nn.Sequential(*layers)


class InvertedResidual(nn.Module):
    def __init__(self, inside, outside, stride, expand):
        super().__init__()
        hidden = inside * expand
        self.use_res_connect = stride == 1 and inside == outside
        layers = [conv_bn(inside, hidden, 1)] if expand != 1 else []
        layers += [conv_bn(hidden, hidden, 3, stride, groups=hidden)]
        layers += [nn.Conv2d(hidden, outside, 1, bias=False), nn.BatchNorm2d(outside)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x):
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class MobileNetV2(nn.Module):
    """Inverted residuals and ReLU6; global pooling as a function."""

    def __init__(self, shape, outputs):
        super().__init__()
        blocks = [InvertedResidual(8, 6, 1, 1), InvertedResidual(6, 8, 2, 3), InvertedResidual(8, 8, 1, 3)]
        self.features = nn.Sequential(conv_bn(shape[0], 8), *blocks, conv_bn(8, 20, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(20, outputs))

    def forward(self, x):
        x = self.features(x)
        x = functional.adaptive_avg_pool2d(x, (1, 1))
        return self.classifier(torch.flatten(x, 1))


class SqueezeExcitation(nn.Module):
    """torchvision's gate: pooling and two 1x1 convolutions."""

    def __init__(self, channels, squeeze, scale_activation):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, channels, 1)
        self.activation = nn.ReLU()
        self.scale_activation = scale_activation()

    def forward(self, x):
        scale = self.activation(self.fc1(self.avgpool(x)))
        return self.scale_activation(self.fc2(scale)) * x


class MobileNetV3Block(nn.Module):
    def __init__(self, inside, hidden, outside, *, stride, squeeze, act):
        super().__init__()
        self.use_res_connect = stride == 1 and inside == outside
        layers = [conv_bn(inside, hidden, 1, act=act), conv_bn(hidden, hidden, 3, stride, groups=hidden, act=act)]
        if squeeze:
            layers += [SqueezeExcitation(hidden, squeeze, nn.Hardsigmoid)]
        self.block = nn.Sequential(*layers, conv_bn(hidden, outside, 1, act=None))

    def forward(self, x):
        result = self.block(x)
        if self.use_res_connect:
            result += x
        return result


class MobileNetV3(nn.Module):
    """Hardswish, and gates by Hardsigmoid."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.features = nn.Sequential(
            conv_bn(shape[0], 8, act=nn.Hardswish),
            MobileNetV3Block(8, 16, 8, stride=1, squeeze=4, act=nn.ReLU),
            MobileNetV3Block(8, 18, 10, stride=2, squeeze=0, act=nn.ReLU),
            MobileNetV3Block(10, 20, 10, stride=1, squeeze=5, act=nn.Hardswish),
            conv_bn(10, 24, 1, act=nn.Hardswish),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(24, 16), nn.Hardswish(inplace=True), nn.Linear(16, outputs))

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class TimmSqueezeExcite(nn.Module):
    """timm's gate: a mean that keeps its dimensions, and a functional sigmoid."""

    def __init__(self, channels, reduced):
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, reduced, 1, bias=True)
        self.act1 = nn.SiLU(inplace=True)
        self.conv_expand = nn.Conv2d(reduced, channels, 1, bias=True)

    def forward(self, x):
        x_se = x.mean((2, 3), keepdim=True)
        x_se = self.conv_expand(self.act1(self.conv_reduce(x_se)))
        return x * torch.sigmoid(x_se)


class MBConv(nn.Module):
    def __init__(self, inside, expand, outside, stride=1):
        super().__init__()
        hidden = inside * expand
        self.has_skip = stride == 1 and inside == outside
        self.conv_pw, self.bn1 = nn.Conv2d(inside, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.conv_dw = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.se = TimmSqueezeExcite(hidden, 4)
        self.conv_pwl, self.bn3 = nn.Conv2d(hidden, outside, 1, bias=False), nn.BatchNorm2d(outside)
        self.act = nn.SiLU()

    def forward(self, x):
        shortcut = x
        x = self.act(self.bn1(self.conv_pw(x)))
        x = self.se(self.act(self.bn2(self.conv_dw(x))))
        x = self.bn3(self.conv_pwl(x))
        return x + shortcut if self.has_skip else x


class EfficientNet(nn.Module):
    """timm's EfficientNet: one SiLU module for each block, used twice."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.conv_stem = nn.Conv2d(shape[0], 8, 3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.act = nn.SiLU(inplace=True)
        self.blocks = nn.Sequential(MBConv(8, 2, 8), MBConv(8, 3, 12, stride=2), MBConv(12, 2, 12))
        self.conv_head = nn.Conv2d(12, 24, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(24)
        self.classifier = nn.Linear(24, outputs)

    def forward(self, x):
        x = self.blocks(self.act(self.bn1(self.conv_stem(x))))
        x = self.act(self.bn2(self.conv_head(x)))
        return self.classifier(x.mean((2, 3)))


class SELayer(nn.Module):
    """The gate of most repositories: ``view``, two linear layers and ``expand_as``."""

    def __init__(self, channel, reduction=2):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False), nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class SEResBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu, self.se = nn.ReLU(inplace=True), SELayer(width)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.se(self.bn2(self.conv2(out)))
        return self.relu(out + x)


class SENet(nn.Module):
    """A residual network with squeeze-and-excitation."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(shape[0], 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.layers = nn.Sequential(SEResBlock(8), SEResBlock(8))
        self.fc = nn.Linear(8, outputs)

    def forward(self, x):
        x = self.layers(self.stem(x))
        return self.fc(functional.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1))


def channel_shuffle(x, groups):
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    def __init__(self, width):
        super().__init__()
        half = width // 2
        self.branch2 = nn.Sequential(
            conv_bn(half, half, 1, act=nn.ReLU), conv_bn(half, half, 3, groups=half, act=None),
            conv_bn(half, half, 1, act=nn.ReLU),
        )  # fmt: skip

    def forward(self, x):
        x1, x2 = x.chunk(2, dim=1)
        return channel_shuffle(torch.cat((x1, self.branch2(x2)), dim=1), 2)


class ShuffleNetV2(nn.Module):
    """Half of the channels pass by; then they are shuffled."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.conv1, self.maxpool = conv_bn(shape[0], 12, act=nn.ReLU), nn.MaxPool2d(3, 2, 1)
        self.stage = nn.Sequential(ShuffleUnit(12), ShuffleUnit(12))
        self.conv5 = conv_bn(12, 16, 1, act=nn.ReLU)
        self.fc = nn.Linear(16, outputs)

    def forward(self, x):
        x = self.conv5(self.stage(self.maxpool(self.conv1(x))))
        return self.fc(x.mean([2, 3]))


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(1e-6 * torch.ones(dim))

    def forward(self, x):
        residual = x
        x = self.dwconv(x)
        x = x.permute(0, 2, 3, 1)
        x = self.norm(x)
        x = self.pwconv2(self.act(self.pwconv1(x)))
        x = self.gamma * x
        x = x.permute(0, 3, 1, 2)
        return residual + x


class ConvNeXt(nn.Module):
    """The authors' ConvNeXt: channels last inside a block, layer scale."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.stem = nn.Conv2d(shape[0], 8, kernel_size=2, stride=2)
        self.stages = nn.Sequential(ConvNeXtBlock(8), ConvNeXtBlock(8))
        self.norm = nn.LayerNorm(8, eps=1e-6)
        self.head = nn.Linear(8, outputs)

    def forward(self, x):
        x = self.stages(self.stem(x))
        return self.head(self.norm(x.mean([-2, -1])))


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x) + x


class ConvMixer(nn.Sequential):
    """One Sequential: depthwise residuals and pointwise convolutions."""

    def __init__(self, shape, outputs, dim=10, depth=2):
        super().__init__(
            nn.Conv2d(shape[0], dim, kernel_size=2, stride=2), nn.GELU(), nn.BatchNorm2d(dim),
            *[
                nn.Sequential(
                    Residual(nn.Sequential(
                        nn.Conv2d(dim, dim, 5, groups=dim, padding="same"), nn.GELU(), nn.BatchNorm2d(dim))),
                    nn.Conv2d(dim, dim, kernel_size=1), nn.GELU(), nn.BatchNorm2d(dim),
                )
                for _ in range(depth)
            ],
            nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(dim, outputs),
        )  # fmt: skip


class SpectralDiscriminator(nn.Module):
    """A discriminator: strided convolutions under spectral norm, LeakyReLU."""

    def __init__(self, shape, outputs):
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.conv1 = norm(nn.Conv2d(shape[0], 8, 4, 2, 1))
        self.conv2 = norm(nn.Conv2d(8, 12, 4, 2, 1))
        self.fc = norm(nn.Linear(12 * (shape[1] // 4) * (shape[2] // 4), outputs))

    def forward(self, x):
        x = functional.leaky_relu(self.conv1(x), 0.2)
        x = functional.leaky_relu(self.conv2(x), 0.2)
        return self.fc(x.flatten(1))
