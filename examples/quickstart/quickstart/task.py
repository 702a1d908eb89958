"""Model, data, training and test of the app; nothing here knows of a federation."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """Two convolutions and two linear layers for 8x8 images."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 4 * 4, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = torch.relu(self.conv1(x))
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def load_data(partition_id, num_partitions, batch_size):
    """Return a partition's training and test batches: every num_partitions-th image, a fifth of them for the test."""
    digits = load_digits()
    rows = slice(partition_id, None, num_partitions)
    x = torch.tensor(digits.images[rows], dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target[rows])
    cut = len(y) * 4 // 5
    train, test = TensorDataset(x[:cut], y[:cut]), TensorDataset(x[cut:], y[cut:])
    return DataLoader(train, batch_size, shuffle=True), DataLoader(test, batch_size)


def train(net, batches, epochs, lr):
    """Train with SGD; return the mean loss of the last epoch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    for _ in range(epochs):
        total = 0.0
        for x, y in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / len(batches)


def test(net, batches):
    """Return loss and accuracy."""
    net.eval()
    loss = correct = count = 0
    with torch.no_grad():
        for x, y in batches:
            output = net(x)
            loss += nn.functional.cross_entropy(output, y, reduction="sum").item()
            correct += (output.argmax(1) == y).sum().item()
            count += len(y)
    return loss / count, correct / count
