"""Export of a finished run's slim model, in formats that other runtimes read, checked against the masked model."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import math
import re
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import nn

from secateur import cost
from secateur.data.schema import Schema
from secateur.data.shards import SCHEMA, Shape, open_shards
from secateur.data.sources import read_options
from secateur.data.table_options import TableOptions
from secateur.errors import CheckpointError, ConfigError, DataError, ModelError, SecateurError, need, unknown
from secateur.export.asked import answer_of, inputs_of, taken
from secateur.export.by_column import OUTPUT, READING_KEY, SCHEMA_KEY, SHAPE_KEY, by_column, cells_of, describe, reading
from secateur.export.deployed import deployed, undone
from secateur.federation import checkpoint, client, prepare, seals
from secateur.federation.folder import PLAN, SUMMARY, read_study
from secateur.federation.records import METRIC
from secateur.learning import resident
from secateur.learning.task import Data
from secateur.pruning.discovery import layout
from secateur.pruning.mask import Mask
from secateur.pruning.roles import stored
from secateur.pruning.structure import Plan
from secateur.pruning.surgery import plain, shrink
from secateur.report.card import Card, Figures, Layer
from secateur.study.study import Study, parse_study

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors", "executorch": ".pte"}
_INSTEAD = "keep forward to calls that the format has, or use secateur.load, which takes any model"
_CLOSE = 1e-4  # of the largest output
_BATCH, _SINGLES = 500, 200

Predict = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shipped:
    """The model of a finished run.

    Attributes:
        study, shape: the run's study, and the shape of its rows.
        masked: the dense network with zeros at pruned entries, which the run scored last.
        slim: the same function, physically smaller, made of torch's own layers; in evaluation mode.
        plan, mask: the units that were removed, and the weights that are pruned.
        summary: the run's summary.
        schema: of the table that the model learnt from; None of other data.
    """

    study: Study
    shape: Shape
    masked: nn.Module
    slim: nn.Module
    plan: Plan
    mask: Mask
    summary: dict[str, Any]
    schema: Schema | None = None


def read(folder: Path) -> Shipped:
    """Return the model of a finished run.

    Raises:
        CheckpointError: the run is not finished, its files are damaged, or an older version made it.
    """
    code = read_study(folder).code
    tensors, mask, about = checkpoint.shipped(folder)
    if "shape" not in about:
        raise CheckpointError(f"{folder} was made by an older version, which did not keep the shape of its data")
    try:
        study = parse_study({**tomllib.loads(about["study"]), "code": code})
        facts = json.loads(about["shape"])
        shape = Shape(**{**facts, "input_shape": tuple(facts["input_shape"])})
        summary = seals.document(folder, SUMMARY)
        schema = Schema.from_json(about[SCHEMA]) if SCHEMA in about else None
        removal = Plan.from_json(seals.checked(folder, PLAN).decode())
        model = client.make_model(study, shape)
        resident.load(model, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, OSError) as broken:
        raise CheckpointError(f"{folder} cannot be read: {type(broken).__name__}: {broken}") from broken
    return Shipped(study, shape, model.eval(), plain(shrink(model, removal)), removal, mask, summary, schema)


def load(folder: str | Path) -> nn.Module:
    """Return the slim model of a finished run as a plain ``nn.Module``: torch's own layers, none of our classes.

    It is in evaluation mode. Its inputs are those of training: images divided by their scale, tokens as int64. The
    model of a table takes rows as they stand there and predicts in the target's own unit, see ``deployed.Deployed``;
    the run's ``schema.json`` names the columns. Numbers learnt from other data are in their own unit too. A model of
    your own that torch.fx cannot trace is returned in its own class.

    Raises:
        CheckpointError: the run is not finished or its files are damaged.
    """
    shipped = read(Path(folder))
    return deployed(shipped.schema, shipped.shape, shipped.slim)


def export(folder: Path, to: str, out: Path | None = None) -> Card:
    """Write the slim model of a finished run, check it, and write its card.

    Args:
        folder: the run's folder.
        to: ``onnx``, ``torch`` (torch.export), ``safetensors`` (weights and plan) or ``executorch`` (batch size 1).
        out: the folder to write into; default: ``export`` in the run's folder.

    Returns:
        The card, which is also written as ``card.md`` and ``card.json``.

    Raises:
        ConfigError: unknown format.
        MissingExtraError: the format needs an extra that is not installed.
        ModelError: the exported model does not predict what the masked one does; nothing is left behind.
    """
    if to not in SUFFIXES:
        raise unknown("format", to, SUFFIXES)
    shipped = read(folder)
    place = out or folder / "export"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as broken:
        raise ConfigError(f"--out {place}: {broken.strerror}") from broken
    rows, origin = _rows(shipped)
    rows = undone(shipped.schema, shipped.shape, rows)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _export(shipped, to, place, rows, origin)
    finally:
        torch.set_num_threads(threads)


def _export(shipped: Shipped, to: str, place: Path, rows: Data, origin: str) -> Card:
    path, dense_path = place / f"model{SUFFIXES[to]}", place / f"dense{SUFFIXES[to]}"
    example, local = rows.batch(slice(0, 1))[0], resident.LocalState(shipped.masked)
    try:
        predict = _write(to, shipped, shipped.slim, example, path)
        checked = {"rows": origin, **_check(shipped, predict, rows, single=to == "executorch")}
        whole = replace(shipped, plan=Plan())
        slow = _write(to, whole, plain(shipped.masked), example, dense_path)
        files = {"dense": dense_path.stat().st_size, "masked": dense_path.stat().st_size, "slim": path.stat().st_size}
        times = {"dense": cost.latency(lambda: slow(example)), "slim": cost.latency(lambda: predict(example))}
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        dense_path.unlink(missing_ok=True)
    local.restore()  # a hook that copies share may have left activations in the model, and those cannot be copied
    layers = _layers(shipped)
    local.restore()
    card = Card(
        f"{shipped.study.method} on {shipped.study.data.source}, study {shipped.summary['study']}",
        path.name, to, checked, layers, _figures(shipped, _inner(shipped, example), files, times),
        inputs_of(shipped.schema), taken(shipped.schema, shipped.shape, to), answer_of(shipped.schema),
    )  # fmt: skip
    if shipped.schema is not None:
        checkpoint.write(place / SCHEMA, shipped.schema.to_json().encode())
    checkpoint.write(place / "card.json", json.dumps(asdict(card), indent=1).encode())
    checkpoint.write(place / "card.md", card.markdown().encode())
    return card


def _inner(shipped: Shipped, example: torch.Tensor) -> torch.Tensor:
    """Return an example of what the network itself takes, behind the steps of a schema."""
    return example if shipped.schema is None else client.example(shipped.shape)


def _write(to: str, shipped: Shipped, model: nn.Module, example: torch.Tensor, path: Path) -> Predict:
    """Write a model as a file; return the function that predicts with that file."""
    if to == "safetensors":
        return _safetensors(shipped, model, path)
    writers: dict[str, Callable[[nn.Module, torch.Tensor, Path], Predict]]
    writers = {"onnx": functools.partial(_onnx, shipped), "torch": _torch, "executorch": _executorch}
    try:
        with _quiet():
            predict = writers[to](deployed(shipped.schema, shipped.shape, model), example, path)
    except SecateurError:
        raise
    except Exception as broken:
        raise ModelError(f"this model cannot be exported to {to}: {_reason(broken)}; {_INSTEAD}") from broken
    return predict


def _reason(broken: BaseException) -> str:
    """Return the innermost cause of an exporter's or a runtime's error as one line, without terminal colours."""
    while (cause := broken.__cause__ or broken.__context__) is not None:
        broken = cause
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(broken)).splitlines()]
    return f"{type(broken).__name__}: {next(filter(None, lines), 'no reason given')}"


def _onnx(shipped: Shipped, model: nn.Module, example: torch.Tensor, path: Path) -> Predict:
    for module in ("onnx", "onnxscript"):
        need(module, extra="export")
    runtime = need("onnxruntime", extra="export")
    two = torch.cat([example, example])  # a batch of one would be taken for the only size
    program = torch.onnx.export(
        model, (two,), dynamo=True, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), verbose=False,
        input_names=["input"], output_names=["output"],
    )  # fmt: skip
    if program is None:
        raise ModelError("torch wrote no ONNX program")
    program.save(path)
    schema = shipped.schema
    if schema is None:
        describe(path, {SHAPE_KEY: json.dumps(asdict(shipped.shape))})
    else:
        by_column(path, schema, table_options(shipped.study.data.reading))
        describe(path, {SCHEMA_KEY: schema.to_json(), READING_KEY: reading(shipped.study.data.reading)})
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def predict(x: torch.Tensor) -> torch.Tensor:
        cells = {"input": x.numpy()} if schema is None else cells_of(schema, x.numpy())
        return torch.from_numpy(session.run([OUTPUT], cells)[0])

    return predict


def table_options(said: Mapping[str, object]) -> TableOptions:
    """Return how a study's tables are to be read; as usual where its data is none."""
    known = {name: value for name, value in said.items() if name in TableOptions.__dataclass_fields__}
    return read_options(TableOptions, known, "table")


def _torch(model: nn.Module, example: torch.Tensor, path: Path) -> Predict:
    two = torch.cat([example, example])  # a batch of one would be taken for the only size
    program = torch.export.export(model, (two,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _safetensors(shipped: Shipped, model: nn.Module, path: Path) -> Predict:
    fresh = plain(shrink(client.make_model(shipped.study, shipped.shape), shipped.plan))
    about = {"plan": shipped.plan.to_json(), "study": shipped.study.to_toml()}
    about |= {SCHEMA: shipped.schema.to_json()} if shipped.schema else {"shape": json.dumps(asdict(shipped.shape))}
    tensors = {name: tensor.contiguous() for name, tensor in stored(model).items() if tensor.is_floating_point()}
    checkpoint.write(path, safetensors.save(tensors, {"about": json.dumps(about)}))
    resident.load(fresh, safetensors.load_file(path))
    return deployed(shipped.schema, shipped.shape, fresh)


def _executorch(model: nn.Module, example: torch.Tensor, path: Path) -> Predict:
    exir = need("executorch.exir", extra="executorch")
    runtime = need("executorch.runtime", extra="executorch")
    program = exir.to_edge_transform_and_lower(torch.export.export(model, (example,))).to_executorch()
    path.write_bytes(program.buffer)
    method = runtime.Runtime.get().load_program(str(path)).load_method("forward")
    return lambda x: torch.as_tensor(method.execute([x])[0]).clone()


def _check(shipped: Shipped, predict: Predict, rows: Data, *, single: bool) -> dict[str, Any]:
    """Compare predictions of the file with those of the masked model, row by row."""
    count = min(len(rows), _SINGLES) if single else len(rows)
    batch = 1 if single else _BATCH
    task, deviation, differ, outputs, targets = rows.task, 0.0, 0, list[torch.Tensor](), list[torch.Tensor]()
    masked = deployed(shipped.schema, shipped.shape, shipped.masked)
    with torch.no_grad():
        for start in range(0, count, batch):
            x, y = rows.batch(slice(start, min(count, start + batch)))
            expected, found = masked(x), _predicted(predict, x)
            if expected.shape != found.shape:
                raise ModelError(
                    f"the exported model returns {tuple(found.shape)} where {tuple(expected.shape)} is due"
                )
            deviation = max(deviation, float((expected - found).abs().max()) / max(1.0, float(expected.abs().max())))
            differ += int((~task.agreed(expected, found)).sum())
            outputs.append(found)
            targets.append(y)
    if not deviation <= _CLOSE:
        raise ModelError(f"the exported model's outputs are {deviation:.2g} away from those of the masked one")
    scores = task.scores(torch.cat(outputs), torch.cat(targets))
    defined = {name: value for name, value in scores.items() if not math.isnan(value)}
    return {"count": count, "deviation": deviation, "differ": differ, METRIC: asdict(task.metrics[0]), **defined}


def _predicted(predict: Predict, x: torch.Tensor) -> torch.Tensor:
    """Return what the exported model predicts for some rows.

    Raises:
        ModelError: it fails on them, such as where the batch size of the export is written in it.
    """
    try:
        return predict(x)
    except Exception as broken:  # a runtime raises classes of its own
        raise ModelError(f"the exported model fails on {len(x)} rows ({_reason(broken)}); {_INSTEAD}") from broken


def _rows(shipped: Shipped) -> tuple[Data, str]:
    """Return rows to check with, and where they are from: the server, the clients, or random draws without the data."""
    try:
        with prepare.federation(shipped.study) as folder:
            shards = open_shards(folder)
            x, y = shards.server_test()
            origin = "the server's test set"
            if not len(y):
                parts = [shards.test(k) for k in range(shards.clients)]
                x, y = (torch.cat(part) for part in zip(*parts, strict=True))
                origin = "the clients' own test rows"
            if len(y):
                return client.wrap(shards, x.clone(), y.clone()), origin
    except DataError:
        pass  # a deployment's rows never left its nodes
    shape = shipped.shape
    draw = torch.Generator().manual_seed(shipped.study.seed)
    high = shape.outputs if shape.kind == "tokens" else 256
    x = torch.randint(0, high, (_SINGLES, *shape.input_shape), generator=draw)
    x = x.float() / high if shape.kind == "tabular" else x.to(torch.uint8)
    rows = client.wrap(shape, x, torch.zeros(_SINGLES, dtype=torch.int64))
    return rows, "random rows, as the run's data is not on this machine: accuracy says nothing here"


def _layers(shipped: Shipped) -> tuple[Layer, ...]:
    found = layout(shipped.masked, shipped.study.model.structure, client.example(shipped.shape))
    layers = []
    for group in found.groups:
        slot, gone = group.weights[0], shipped.plan.drops(group.name)
        cut = next((c for c in shipped.plan.of(slot.tensor) if c.dim == slot.dim), None)
        own = range(slot.offset, slot.offset + slot.length(group.units))
        left = group.units if cut is None else sum(k in own for k in cut.kept) // (slot.tiles * slot.repeat)
        kept = 0 if gone else left
        layers.append(Layer(group.name, group.kind, kept, group.units, ""))
    whole = [Layer(name or "model", "", 0, 0, reason) for name, reason in found.whole.items()]
    return (*layers, *whole)


def _figures(
    shipped: Shipped, example: torch.Tensor, files: dict[str, int], times: dict[str, float]
) -> tuple[Figures, ...]:
    dense = client.make_model(shipped.study, shipped.shape)
    uses, tensors = cost.uses(dense, example), stored(shipped.masked)
    found = []
    for name, model in (("dense", dense), ("masked", shipped.masked), ("slim", shipped.slim)):
        local = resident.LocalState(model)
        alone = plain(model)
        held = cost.memory(copy.deepcopy(model), example)
        parameters = sum(p.numel() for p in model.parameters())
        nonzero = parameters if name == "dense" else sum(int((p != 0).sum()) for p in model.parameters())
        surviving = cost.macs(uses, tensors, None if name == "dense" else shipped.mask)
        with torch.no_grad():
            taken = cost.latency(lambda alone=alone: alone(example))  # type: ignore[misc]
        counts = {"parameters": parameters, "nonzero": nonzero, "macs": cost.counted(alone, example)}
        counts |= {"parameter_bytes": held.parameters, "activation_bytes": held.activations}
        local.restore()
        counts |= {"macs_surviving": surviving, "file_bytes": files[name]}
        found.append(Figures(name, seconds=taken, runtime_seconds=times.get(name), **counts))
    return tuple(found)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' warnings about other packages; failures are still raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
