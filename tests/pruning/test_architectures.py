"""Architectures as people write them: their units are found, and cut at random they equal the masked model."""

import pytest

from architectures import ZOO, made, rows
from architectures.measure import apart, cut, onnx_apart, whole
from secateur import models
from secateur.pruning.discovery import layout
from zoo import drawn


@pytest.mark.parametrize("name", ZOO)
def test_slim_equals_masked_in_training_and_in_evaluation(name):
    model, x = made(name), rows(name)
    found = layout(model, example=x[:1])
    for seed, drop in ((1, 0.3), (2, 0.6), (3, 1.0)):
        pruned, small = cut(model, found, drawn(found, seed, drop))
        assert apart(pruned, small, x, train=True) < 1e-9
        assert apart(pruned, small, x, train=False) < 1e-9


@pytest.mark.parametrize("name", ZOO)
def test_a_layer_without_units_says_why(name):
    model, x = made(name), rows(name)
    assert all(reason for reason, _ in whole(model, layout(model, example=x[:1]), x[:1]).values())


MAIN = {  # share of the MACs in layers whose outputs are not units
    "ResNet": 0.01, "BottleneckResNet": 0.01, "ResNeXt": 0.01, "DenseNet": 0.01, "Inception": 0.01, "MobileNetV3": 0.01,
    "EfficientNet": 0.01, "SENet": 0.01, "ShuffleNetV2": 0.01, "UNet": 0.02, "GatedConv1d": 0.01, "GatedMLP": 0.06,
    "TCN": 0.01, "LastHidden": 0.02, "LastStep": 0.02, "BiLSTM": 0.05, "BiGRU": 0.01, "StepsFirst": 0.01,
}  # fmt: skip
HEADS = {"TimmViT": 6, "TorchvisionViT": 6, "Bert": 6, "GPT": 6, "Llama": 4, "T5": 9, "TorchEncoder": 6}


@pytest.mark.parametrize("name", MAIN)
def test_the_main_units_are_found(name):
    model, x = made(name), rows(name)
    shares = [share for _, share in whole(model, layout(model, example=x[:1]), x[:1]).values()]
    assert sum(shares) <= MAIN[name]


@pytest.mark.parametrize("name", HEADS)
def test_attention_has_its_heads_and_its_neurons(name):
    found = layout(made(name), example=rows(name)[:1])
    assert sum(group.units for group in found.of("head")) == HEADS[name]
    assert len(found.of("channel")) >= 2 - (name == "T5")


def test_every_architecture_is_one_that_a_study_can_name():
    assert len(ZOO) >= 40
    for name, entry in ZOO.items():
        built = models.build(
            f"architectures:{name}", input_shape=entry.shape, outputs=entry.outputs, tokens=entry.tokens
        )
        assert type(built) is entry.make


@pytest.mark.parametrize("name", ["UNet", "TimmViT", "TorchvisionViT", "Llama", "BiLSTM"])
def test_what_is_left_is_the_same_through_onnx(name, tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    model, x = made(name), rows(name)
    found = layout(model, example=x[:1])
    _, small = cut(model, found, drawn(found, 2, 0.5))
    assert onnx_apart(small, x, tmp_path / "model.onnx") < 1e-5
