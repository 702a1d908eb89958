"""The client of the app."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from quickstart.task import Net, load_data
from quickstart.task import test as test_fn
from quickstart.task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    torch.manual_seed(context.node_config["partition-id"])
    net = Net()
    net.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    config, node = context.run_config, context.node_config
    batches, _ = load_data(node["partition-id"], node["num-partitions"], config["batch-size"])
    loss = train_fn(net, batches, config["local-epochs"], config["learning-rate"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(batches.dataset)})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    net = Net()
    net.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    config, node = context.run_config, context.node_config
    _, batches = load_data(node["partition-id"], node["num-partitions"], config["batch-size"])
    loss, accuracy = test_fn(net, batches)
    metrics = MetricRecord({"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(batches.dataset)})
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)
