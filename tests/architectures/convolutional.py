"""Convolutional classifiers as people write them: tutorials, and the families of torchvision."""

import torch
from torch import nn
from torch.nn import functional


class TutorialLeNet(nn.Module):
    """PyTorch's CIFAR tutorial: one pooling module, used twice."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(shape[0], 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.fc1 = nn.Linear(8 * ((shape[1] - 4) // 2 // 2 - 1) ** 2, 20)
        self.fc2 = nn.Linear(20, 12)
        self.fc3 = nn.Linear(12, outputs)

    def forward(self, x):
        x = self.pool(functional.relu(self.conv1(x)))
        x = self.pool(functional.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = functional.relu(self.fc1(x))
        x = functional.relu(self.fc2(x))
        return self.fc3(x)


class MnistExample(nn.Module):
    """The basic example: functional pooling, modules for dropout, log-probabilities, ``view`` instead of flatten."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(shape[0], 6, 3, 1)
        self.conv2 = nn.Conv2d(6, 10, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(10 * ((shape[1] - 4) // 2) ** 2, 16)
        self.fc2 = nn.Linear(16, outputs)

    def forward(self, x):
        x = functional.relu(self.conv1(x))
        x = functional.relu(self.conv2(x))
        x = functional.max_pool2d(x, 2)
        x = self.dropout1(x)
        x = x.reshape(x.size(0), -1)
        x = functional.relu(self.fc1(x))
        x = self.dropout2(x)
        return functional.log_softmax(self.fc2(x), dim=1)


class AlexNet(nn.Module):
    """Features, average pooling and a classifier, each in a Sequential."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(shape[0], 8, kernel_size=5, stride=1, padding=2), nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(8, 12, kernel_size=3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(12, 10, kernel_size=3, padding=1), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d((3, 3))
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(10 * 3 * 3, 24), nn.ReLU(inplace=True),
            nn.Dropout(), nn.Linear(24, 16), nn.ReLU(inplace=True), nn.Linear(16, outputs),
        )  # fmt: skip

    def forward(self, x):
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


class VGG(nn.Module):
    """VGG with batch norm, made from a list."""

    def __init__(self, shape, outputs):
        super().__init__()
        layers, width = [], shape[0]
        for entry in (8, "M", 12, 12, "M"):
            if entry == "M":
                layers += [nn.MaxPool2d(2)]
            else:
                layers += [nn.Conv2d(width, entry, 3, padding=1), nn.BatchNorm2d(entry), nn.ReLU(inplace=True)]
                width = entry
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(nn.Linear(12 * 4, 20), nn.ReLU(True), nn.Dropout(), nn.Linear(20, outputs))

    def forward(self, x):
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


def conv3x3(inside, outside, stride=1, groups=1):
    return nn.Conv2d(inside, outside, 3, stride=stride, padding=1, groups=groups, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 2
    groups = 1

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride, self.groups)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class GroupedBottleneck(Bottleneck):
    groups = 4


class ResNet(nn.Module):
    """torchvision's residual network: one ReLU module for each block, used two or three times."""

    block = BasicBlock

    def __init__(self, shape, outputs):
        super().__init__()
        self.inplanes = 8
        self.conv1 = nn.Conv2d(shape[0], 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._make_layer(8, 2)
        self.layer2 = self._make_layer(12, 2, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(12 * self.block.expansion, outputs)

    def _make_layer(self, planes, blocks, stride=1):
        downsample, outside = None, planes * self.block.expansion
        if stride != 1 or self.inplanes != outside:
            shortcut = nn.Conv2d(self.inplanes, outside, 1, stride=stride, bias=False)
            downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outside))
        layers = [self.block(self.inplanes, planes, stride, downsample)]
        self.inplanes = outside
        layers += [self.block(self.inplanes, planes) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


class BottleneckResNet(ResNet):
    block = Bottleneck


class ResNeXt(ResNet):
    block = GroupedBottleneck


class PreActBlock(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = conv3x3(inside, outside, stride)
        self.bn2 = nn.BatchNorm2d(outside)
        self.dropout = nn.Dropout(0.3)
        self.conv2 = conv3x3(outside, outside)
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, kernel_size=1, stride=stride, bias=False))

    def forward(self, x):
        out = functional.relu(self.bn1(x))
        shortcut = self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(self.dropout(functional.relu(self.bn2(out))))
        return out + shortcut


class WideResNet(nn.Module):
    """A residual network with norm and activation before each convolution."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.conv1 = conv3x3(shape[0], 6)
        self.blocks = nn.ModuleList([PreActBlock(6, 8, 1), PreActBlock(8, 8, 1), PreActBlock(8, 12, 2)])
        self.bn = nn.BatchNorm2d(12)
        self.linear = nn.Linear(12, outputs)

    def forward(self, x):
        out = self.conv1(x)
        for block in self.blocks:
            out = block(out)
        out = functional.relu(self.bn(out))
        out = functional.avg_pool2d(out, out.shape[-1])
        return self.linear(out.view(out.size(0), -1))


class DenseLayer(nn.Module):
    def __init__(self, inside, growth):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inside)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inside, 2 * growth, kernel_size=1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(2 * growth, growth, kernel_size=3, padding=1, bias=False)

    def forward(self, features):
        bottleneck = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(bottleneck)))


class DenseNet(nn.Module):
    """torchvision's DenseNet: a list of all features so far, concatenated before each layer."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.conv0 = nn.Conv2d(shape[0], 8, 3, padding=1, bias=False)
        self.layers1 = nn.ModuleList(DenseLayer(8 + 4 * n, 4) for n in range(3))
        self.transition = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1), nn.AvgPool2d(2, 2))
        self.layers2 = nn.ModuleList(DenseLayer(10 + 4 * n, 4) for n in range(2))
        self.norm5 = nn.BatchNorm2d(18)
        self.classifier = nn.Linear(18, outputs)

    @staticmethod
    def _block(layers, x):
        features = [x]
        for layer in layers:
            features.append(layer(features))
        return torch.cat(features, 1)

    def forward(self, x):
        x = self.transition(self._block(self.layers1, self.conv0(x)))
        x = functional.relu(self.norm5(self._block(self.layers2, x)), inplace=True)
        x = functional.adaptive_avg_pool2d(x, (1, 1))
        return self.classifier(torch.flatten(x, 1))


class BasicConv2d(nn.Module):
    def __init__(self, inside, outside, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(outside, eps=0.001)

    def forward(self, x):
        return functional.relu(self.bn(self.conv(x)), inplace=True)


class InceptionBlock(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.branch1 = BasicConv2d(inside, 4, kernel_size=1)
        self.branch2 = nn.Sequential(
            BasicConv2d(inside, 4, kernel_size=1), BasicConv2d(4, 6, kernel_size=(1, 3), padding=(0, 1)),
            BasicConv2d(6, 6, kernel_size=(3, 1), padding=(1, 0)),
        )  # fmt: skip
        self.branch3 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True), BasicConv2d(inside, 5, kernel_size=1)
        )

    def forward(self, x):
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x)], 1)


class Inception(nn.Module):
    """Parallel branches, concatenated."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.stem = BasicConv2d(shape[0], 8, kernel_size=3, padding=1)
        self.mixed1, self.mixed2 = InceptionBlock(8), InceptionBlock(15)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(15, outputs)

    def forward(self, x):
        x = self.mixed2(functional.max_pool2d(self.mixed1(self.stem(x)), 2, 2))
        return self.fc(self.dropout(self.pool(x)).flatten(1))


class Fire(nn.Module):
    def __init__(self, inside, squeeze, expand):
        super().__init__()
        self.squeeze = nn.Conv2d(inside, squeeze, kernel_size=1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(squeeze, expand, kernel_size=1)
        self.expand1x1_activation = nn.ReLU(inplace=True)
        self.expand3x3 = nn.Conv2d(squeeze, expand, kernel_size=3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.squeeze_activation(self.squeeze(x))
        wide = [self.expand1x1_activation(self.expand1x1(x)), self.expand3x3_activation(self.expand3x3(x))]
        return torch.cat(wide, 1)


class SqueezeNet(nn.Module):
    """torchvision's SqueezeNet: its last convolution makes the classes."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(shape[0], 8, kernel_size=3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(8, 4, 6), Fire(12, 4, 8),
        )  # fmt: skip
        final = nn.Conv2d(16, outputs, kernel_size=1)
        self.classifier = nn.Sequential(nn.Dropout(0.5), final, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1)))

    def forward(self, x):
        return torch.flatten(self.classifier(self.features(x)), 1)
