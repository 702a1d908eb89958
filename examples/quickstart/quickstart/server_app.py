"""The server of the app."""

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from quickstart.task import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    torch.manual_seed(0)
    arrays = ArrayRecord(Net().state_dict())
    strategy = FedAvg()
    rounds = context.run_config["num-server-rounds"]
    result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds)
    print("eval_acc", result.evaluate_metrics_clientapp[rounds]["eval_acc"])
    if context.run_config["save-to"]:
        torch.save(result.arrays.to_torch_state_dict(), context.run_config["save-to"])
