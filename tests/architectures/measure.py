"""What secateur does with an architecture: units, what stays whole, and whether slim, masked and ONNX agree."""

import contextlib
import copy
import logging
import warnings

import torch

from architectures import made, rows
from secateur import cost
from secateur.pruning.discovery import layout
from secateur.pruning.structure import plan, slice_of
from secateur.pruning.surgery import plain, shrink
from zoo import drawn, masked, shapes


def owner(tensor):
    """Return the layer that a tensor belongs to, also where a parametrisation has it."""
    return tensor.partition(".parametrizations.")[0] if ".parametrizations." in tensor else tensor.rpartition(".")[0]


def layer_macs(model, example):
    """Return the MACs of one example by layer: entries of its weights times their uses."""
    found, first = {}, {id(parameter): name for name, parameter in model.named_parameters()}
    for name, uses in cost.uses(model, example).items():
        weight = getattr(model.get_submodule(owner(name)), name.rpartition(".")[2])
        layer = owner(first.get(id(weight), name))  # that of two that share a weight which comes first
        found[layer] = found.get(layer, 0) + uses * weight.numel()
    return found


def whole(model, found, example):
    """Return the layers without units of their own, with the reason and their share of the MACs."""
    macs = layer_macs(model, example)
    total = sum(macs.values())
    with_units = {owner(slot.tensor) for group in found.layers for slot in group.incoming}
    left = dict.fromkeys(layer for layer in macs if layer not in with_units)
    every = found.whole.get("", "")
    if not macs and not with_units:
        return {"": (every or "its weights are its own parameters", 1.0)}
    return {layer: (_reason(layer, found.whole) or every, macs[layer] / total) for layer in left}


def _reason(layer, whole):
    """Return why a layer is whole, or the first part of it that is listed."""
    return whole.get(layer) or next((why for n, why in whole.items() if n.startswith((f"{layer}.", f"{layer}["))), "")


def cut(model, found, keep):
    """Return the masked model and the slim one for flags of units."""
    mask = slice_of(found.groups, shapes(model), keep)
    pruned = masked(model, mask)
    return pruned, shrink(pruned, plan(mask, found.groups))


def apart(pruned, small, x, *, train):
    """Return how far two models' outputs differ in double precision, as a share of the largest output."""
    x = x if x.dtype == torch.int64 else x.double()
    with torch.no_grad():
        one, two = (copy.deepcopy(net).double().train(train)(x) for net in (pruned, small))
    return float((one - two).abs().max()) / max(1.0, float(one.abs().max()))


def half(found):
    """Return flags that keep the first half of each layer's units."""
    return {group.name: torch.arange(group.units) < (group.units + 1) // 2 for group in found.layers}


def macs_left(model, found, example):
    """Return the share of MACs, by torch's counter, that is left of a model with half of each layer's units."""
    _, small = cut(model, found, half(found))
    return cost.counted(small, example) / cost.counted(copy.deepcopy(model), example)


def onnx_apart(small, x, path):
    """Return how far the ONNX file of a model is from it in single precision, as a share of the largest output."""
    import onnxruntime

    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(None):
            program = torch.onnx.export(
                plain(small), (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), verbose=False
            )
            program.save(path)
    finally:
        logging.disable(logging.NOTSET)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    with torch.no_grad():
        expected = small.eval()(x)
    found = torch.from_numpy(session.run(None, {name: x.numpy()})[0])
    return float((expected - found).abs().max()) / max(1.0, float(expected.abs().max()))


def measure(name, path=None):
    """Return one row of the table: an architecture's figures; a failure stands where its figure would."""
    model, x = made(name), rows(name)
    row = {"architecture": name, "layers": len(layer_macs(copy.deepcopy(model), x[:1]))}
    try:
        found = layout(model, example=x[:1])
    except Exception as broken:  # noqa: BLE001 -- the table says so
        return {**row, "failed": f"{type(broken).__name__}: {broken}"}
    row["units"] = {kind: sum(g.units for g in found.of(kind)) for kind in ("channel", "head", "block")}
    row["groups"] = [group.name for group in found.groups]
    row["whole"] = {layer: list(entry) for layer, entry in whole(copy.deepcopy(model), found, x[:1]).items()}
    try:
        cuts = [cut(model, found, drawn(found, seed, drop)) for seed, drop in ((1, 0.3), (2, 0.6))]
        row["apart"] = max(apart(*pair, x, train=train) for pair in cuts for train in (False, True))
        row["left"] = macs_left(model, found, x[:1])
        if path is not None:
            row["onnx"] = onnx_apart(cuts[1][1], x, path)
    except Exception as broken:  # noqa: BLE001 -- the table says so
        row["failed"] = f"{type(broken).__name__}: {' '.join(str(broken).split())[:200]}"
    return row
