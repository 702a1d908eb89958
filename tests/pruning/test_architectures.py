"""Architectures as people write them: their units are found, and cut at random they equal the masked model."""

import pytest

from architectures import ZOO, made, rows
from architectures.measure import apart, cut, onnx_apart
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
