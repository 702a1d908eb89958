"""Forty-eight small architectures as people write them: own code, in the idioms of the libraries that have such models.

Each is a factory as a study names it (``architectures:UNet``), with the shape of one input; token models have as many
outputs as their vocabulary has entries. Their tensors are drawn so that nothing is zero, one or symmetric by accident.
"""

import zlib
from dataclasses import dataclass

import torch
from torch import nn

from architectures.attention import GPT, T5, Bert, Llama, TimmViT, TorchEncoder, TorchvisionViT
from architectures.convolutional import (
    VGG,
    AlexNet,
    BottleneckResNet,
    DenseNet,
    Inception,
    MnistExample,
    ResNet,
    ResNeXt,
    SqueezeNet,
    TutorialLeNet,
    WideResNet,
)
from architectures.mixed import (
    TCN,
    AutoEncoder,
    GatedConv1d,
    GatedMLP,
    MLPBatchNorm,
    MLPMixer,
    OwnConvolutions,
    SegNet3d,
    SelfNormalising,
    Siamese,
    TabularEmbeddings,
    TabularResNet,
    UNet,
    WaveNet,
    WeightNormTCN,
)
from architectures.mobile import (
    ConvMixer,
    ConvNeXt,
    EfficientNet,
    MobileNetV2,
    MobileNetV3,
    SENet,
    ShuffleNetV2,
    SpectralDiscriminator,
)
from architectures.recurrent import (
    AttentionPooling,
    BiGRU,
    BiLSTM,
    ConvLSTM,
    LastHidden,
    LastStep,
    StepsFirst,
)

IMAGE, VOLUME, SIGNAL, SERIES, TABLE, TOKENS = (3, 12, 12), (1, 6, 6, 6), (3, 12), (8, 5), (9,), (6,)


@dataclass(frozen=True)
class Entry:
    """An architecture: its class, the shape of one input, and how many outputs it gets."""

    make: type[nn.Module]
    shape: tuple[int, ...]
    outputs: int = 4

    @property
    def tokens(self):
        return self.shape == TOKENS


ZOO = {
    cls.__name__: Entry(cls, shape, 11 if shape == TOKENS else 4)
    for shape, classes in (
        (IMAGE, (TutorialLeNet, MnistExample, AlexNet, VGG, ResNet, BottleneckResNet, ResNeXt, WideResNet, DenseNet)),
        (IMAGE, (Inception, SqueezeNet, MobileNetV2, MobileNetV3, EfficientNet, SENet, ShuffleNetV2, ConvNeXt)),
        (IMAGE, (ConvMixer, SpectralDiscriminator, UNet, AutoEncoder, OwnConvolutions, MLPMixer)),
        ((2, 12, 12), (Siamese,)),
        (VOLUME, (SegNet3d,)),
        (SIGNAL, (GatedConv1d, TCN, WeightNormTCN, WaveNet)),
        (TABLE, (MLPBatchNorm, TabularEmbeddings, TabularResNet, SelfNormalising, GatedMLP)),
        (TOKENS, (LastHidden, BiLSTM, AttentionPooling, Bert, GPT, Llama, T5)),
        (SERIES, (LastStep, BiGRU, StepsFirst, ConvLSTM, TorchEncoder)),
        (IMAGE, (TimmViT, TorchvisionViT)),
    )
    for cls in classes
}


def made(name):
    """Return an architecture with every tensor away from its initial zero or one, and dropout switched off."""
    entry = ZOO[name]
    draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(name.encode()))
        model = entry.make(entry.shape, entry.outputs)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, nn.RNNBase):
            module.dropout = 0.0
    return model


def rows(name, count=3, seed=0):
    """Return rows of input for an architecture; tokens are int64."""
    entry = ZOO[name]
    draw = torch.Generator().manual_seed(seed)
    if entry.tokens:
        return torch.randint(0, entry.outputs, (count, *entry.shape), generator=draw)
    return torch.randn(count, *entry.shape, generator=draw)
