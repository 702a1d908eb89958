"""One contestant of ``simulate.py`` in a process of its own: the same case, as each engine would run it.

    python benchmarks/contestants.py NAME FOLDER [SETTING...]

Reads ``case.json`` and the shards in FOLDER and prints one line of JSON: when each round ended, in seconds since the
epoch. Every contestant has the same initial weights, rows, batches per client and plain SGD, and one torch thread in
each process that trains. Settings are secateur's alone, as on its command line.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.queues import Queue
    from multiprocessing.synchronize import Barrier

    import torch
    from torch import nn

LR = 0.05


@dataclass(frozen=True)
class Case:
    """What is simulated.

    Attributes:
        model: name of a secateur model; ``options`` are its keywords.
        shape: of a row.
        clients: K; each has ``rows`` rows.
        cohort: clients in each round.
        epochs, batch: of local training.
        rounds: how many; the first holds what has to be started, the last is followed by an evaluation.
        workers: processes that train.
        channels_last: whether images and weights lie in memory as secateur's do, channels last.
    """

    model: str
    shape: tuple[int, ...]
    clients: int
    cohort: int
    rows: int
    epochs: int = 1
    batch: int = 32
    rounds: int = 6
    workers: int = 2
    options: tuple[tuple[str, Any], ...] = ()
    channels_last: bool = False

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        """Return images as a model wants them."""
        import torch

        x = x.float() / 255
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    @classmethod
    def read(cls, folder: Path) -> Case:
        """Return the case of a folder."""
        values = json.loads((folder / "case.json").read_text())
        return cls(**{**values, "shape": tuple(values["shape"]), "options": tuple(map(tuple, values["options"]))})

    def write(self, folder: Path) -> None:
        """Write the case and its rows: uniform noise with labels by chance, since only speed is looked at."""
        import numpy as np

        from secateur.data import Source
        from secateur.data.shards import make_shards

        draw = np.random.default_rng(0)
        count = self.clients * self.rows
        x = draw.integers(0, 256, (count, *self.shape), dtype=np.uint8)
        y = draw.integers(0, 10, count)
        source = Source("noise", x, y, x[:100], y[:100], None, 10, kind="image", scale=255.0, task="classification")
        parts = list(np.arange(count).reshape(self.clients, self.rows))
        make_shards(source, parts, test_fraction=0.0, seed=0, folder=folder)
        (folder / "case.json").write_text(json.dumps(asdict(self)))

    def work(self) -> tuple[float, float]:
        """Return floating-point operations and bytes of weights that one round's local steps cannot do without.

        Operations: two for each multiply-accumulate; a layer's weights are used in the forward pass, for their own
        gradient and, but in the first layer, for their inputs'. Bytes: each step reads its weights for each of these,
        writes their gradient, and reads both and writes one to move them; activations are left out.
        """
        import torch

        from secateur import cost

        model = self.make_model()
        uses = cost.uses(model, torch.zeros(1, *self.shape))
        sizes = {name: tensor.numel() for name, tensor in model.named_parameters()}
        first = next(iter(uses))
        rows, steps = self.cohort * self.epochs * self.rows, self.cohort * self.epochs * -(-self.rows // self.batch)
        macs = sum((2 if name == first else 3) * sizes[name] * count for name, count in uses.items())
        moved = 6 * sum(sizes.values()) - sizes[first]
        return 2.0 * rows * macs, 4.0 * steps * moved

    def make_model(self) -> nn.Module:
        """Return the model with its initial weights."""
        from secateur import models

        options = {name: tuple(v) if isinstance(v, list) else v for name, v in self.options}
        return models.build(self.model, input_shape=self.shape, outputs=10, init="torch", seed=0, options=options)


def cohorts(case: Case) -> list[list[int]]:
    """Return the clients of each round."""
    import torch

    draw = torch.Generator().manual_seed(0)
    return [torch.randperm(case.clients, generator=draw)[: case.cohort].tolist() for _ in range(case.rounds)]


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, case: Case) -> None:
    """Train as a plain PyTorch loop does: torch's SGD, shuffled batches."""
    import torch
    from torch.nn.functional import cross_entropy

    model = model.to(memory_format=torch.channels_last) if case.channels_last else model  # type: ignore[call-overload]
    optimiser = torch.optim.SGD(model.parameters(), lr=LR)
    model.train()
    for _ in range(case.epochs):
        for index in torch.split(torch.randperm(len(y)), case.batch):
            optimiser.zero_grad()
            cross_entropy(model(case.inputs(x[index])), y[index]).backward()
            optimiser.step()


def _floor_worker(folder: Path, number: int, gate: Barrier) -> None:
    import torch

    from secateur.data.shards import open_shards

    torch.set_num_threads(1)
    case = Case.read(folder)
    shards, model = open_shards(folder), case.make_model()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for clients in cohorts(case):
        gate.wait()
        for client in clients[number :: case.workers]:
            model.load_state_dict(start)
            train(model, *shards.train(client), case)
        gate.wait()


def floor(folder: Path) -> list[float]:
    """Local steps alone: each process trains its share of the clients, and nothing is sent or averaged."""
    from secateur.engines.workers import for_workers

    case = Case.read(folder)
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(case.workers + 1)
    workers = [context.Process(target=_floor_worker, args=(folder, n, gate)) for n in range(case.workers)]
    with for_workers():  # freed memory stays theirs, as it does with ours
        for worker in workers:
            worker.start()
    ends = []
    for _ in range(case.rounds):
        gate.wait()
        gate.wait()
        ends.append(time.time())
    for worker in workers:
        worker.join()
    return ends


def _peak_worker(gate: Barrier, told: Queue[tuple[float, float]]) -> None:
    import torch

    torch.set_num_threads(1)
    square, wide = torch.rand(1024, 1024), torch.rand(2**24)
    product, copy = torch.empty_like(square), torch.empty_like(wide)

    def rate(work: Callable[[], object], amount: float) -> float:
        work()
        gate.wait()
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < 1:
            work()
            count += 1
        return amount * count / (time.perf_counter() - begun)

    flops = rate(lambda: torch.mm(square, square, out=product), 2 * 1024**3)
    told.put((flops, rate(lambda: copy.copy_(wide), 2 * wide.nbytes)))


def peak(folder: Path) -> list[float]:
    """Return what all workers reach together: operations a second of a large product, bytes a second of a copy."""
    case = Case.read(folder)
    context = multiprocessing.get_context("spawn")
    gate, told = context.Barrier(case.workers), context.Queue()
    workers = [context.Process(target=_peak_worker, args=(gate, told)) for _ in range(case.workers)]
    for worker in workers:
        worker.start()
    found = [told.get() for _ in workers]
    for worker in workers:
        worker.join()
    return [sum(one[n] for one in found) for n in (0, 1)]


def secateur(folder: Path, settings: tuple[str, ...] = (), workers: int | None = None) -> list[float]:
    """Run secateur's local engine: FedAvg, or what the settings say."""
    from secateur.federation import server
    from secateur.study.runtime import Runtime
    from secateur.study.study import assign, parse_study

    case = Case.read(folder)
    values: dict[str, Any] = {
        "method": "fedavg",
        "rounds": case.rounds,
        "participation": case.cohort / case.clients,
        "evaluate_every": case.rounds,
        "data": {"clients": case.clients, "test_fraction": 0.0},
        "model": {"name": case.model, "init": "torch", "options": dict(case.options)},
        "training": {"epochs": case.epochs, "batch_size": case.batch, "lr": LR},
    }
    for setting in settings:
        assign(values, setting)
    ends = []

    def watch(row: dict[str, Any]) -> None:
        if row["event"] == "row" and row["phase"] == "train":
            ends.append(time.time())

    made, out = parse_study(values), folder / "run"
    out.mkdir()
    run = server.Run(made, Runtime(workers=case.workers if workers is None else workers), out, folder)
    run.play(run.create(), watch)
    return ends


PARTS = {
    "training": ("learning/loop.py", ("fit",)),
    "codec": ("wire/codec.py", ("__init__", "bytes", "decode")),
    "aggregation": ("contract/reducer.py", ("add", "finish")),
    "evaluation": ("learning/evaluate.py", ("evaluate",)),
    "records and checkpoint": ("federation/books.py", ("save",)),
}


def profile(folder: Path, settings: tuple[str, ...]) -> dict[str, float]:
    """Run secateur in one process under Python's profiler; return seconds by part, and of the whole."""
    import cProfile
    import pstats

    from secateur.federation import server

    watched = cProfile.Profile()
    loop = server.Run._loop  # noqa: SLF001

    def counted(*given: Any) -> Any:
        return watched.runcall(loop, *given)

    server.Run._loop = counted  # type: ignore[method-assign] # noqa: SLF001
    secateur(folder, settings, workers=0)
    found = pstats.Stats(watched).stats  # type: ignore[attr-defined]
    times = {
        part: sum(line[3] for (file, _, name), line in found.items() if file.endswith(f"/{place}") and name in names)
        for part, (place, names) in PARTS.items()
    }
    return {**times, "whole": pstats.Stats(watched).total_tt}  # type: ignore[attr-defined]


def flower(folder: Path) -> list[float]:
    """Run Flower's simulation: its own FedAvg, a client app that keeps model and rows in its process."""
    import torch
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    from secateur.data.shards import open_shards

    case = Case.read(folder)
    ends: list[float] = []
    client, resident = ClientApp(), {}

    @client.train()
    def _(message: Message, context: Context) -> Message:
        if not resident:
            torch.set_num_threads(1)
            resident["model"], resident["rows"] = case.make_model(), open_shards(folder)
        model = resident["model"]
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        x, y = resident["rows"].train(int(context.node_config["partition-id"]))
        train(model, x, y, case)
        told = MetricRecord({"num-examples": len(y)})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": told})
        return Message(content=content, reply_to=message)

    class Timed(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            merged = super().aggregate_train(server_round, replies)
            ends.append(time.time())
            return merged

    server = ServerApp()

    @server.main()
    def _(grid: Grid, _context: Context) -> None:
        share = case.cohort / case.clients
        strategy = Timed(fraction_train=share, fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
        strategy.start(grid, ArrayRecord(case.make_model().state_dict()), num_rounds=case.rounds)

    resources = {"init_args": {"num_cpus": case.workers}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=case.clients, backend_config=resources)
    return ends


def pfl(folder: Path) -> list[float]:
    """Run pfl-research, under torchrun with a process a core. It shuffles no rows, and no client sends anything."""
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    from secateur.data.shards import open_shards

    torch.set_num_threads(1)
    case = Case.read(folder)
    shards, model = open_shards(folder), case.make_model()
    ends: list[float] = []

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(case.inputs(x)), y)

    class Clock(TrainingProcessCallback):
        def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Metrics]:
            ends.append(time.time())
            return False, Metrics()

    model.loss, model.metrics = loss, lambda _x, _y: {}  # type: ignore[assignment]
    wrapped = PyTorchModel(model, torch.optim.SGD, torch.optim.SGD(model.parameters(), 1.0))
    sampler = get_user_sampler("random", list(range(case.clients)))
    users = FederatedDataset(lambda client: Dataset(shards.train(client), user_id=str(client)), sampler)
    FederatedAveraging().run(
        NNAlgorithmParams(case.rounds, case.rounds + 1, case.cohort, None),
        SimulatedBackend(users, users),
        wrapped,
        NNTrainHyperParams(local_batch_size=case.batch, local_num_epochs=case.epochs, local_learning_rate=LR),
        callbacks=[Clock()],
    )
    return ends


CONTESTANTS = {"floor": floor, "peak": peak, "flower": flower, "pfl": pfl}


if __name__ == "__main__":
    name, place, *more = sys.argv[1:]
    ours = {"secateur": secateur, "profile": profile}
    marks = ours[name](Path(place), tuple(more)) if name in ours else CONTESTANTS[name](Path(place))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(marks), flush=True)
    os._exit(0)  # threads of an engine that are still there may abort an orderly end
