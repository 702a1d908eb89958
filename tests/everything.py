"""A network with all at once that is easily handled wrongly: ties, frozen parts, counters, random draws, a mask."""

import math
import random

import numpy as np
import torch
from torch import nn


class Everything(nn.Module):
    """Attention over the rows of an image, each looking back only.

    The first layer is frozen; ``mix`` and ``again`` are one parameter; the norm's running statistics are a plain mean
    over all batches; training is weaker at first, by a count of steps in an attribute, and by another in a buffer; each
    step draws from the generators of Python and of numpy. One parameter scales, one is a token, one is never used.
    """

    def __init__(self, inputs, outputs, width=8):
        super().__init__()
        rows, columns = inputs[-2], inputs[-1]
        self.body = nn.Linear(columns, width)
        self.body.requires_grad_(False)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.mix, self.again = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.again.weight = self.mix.weight
        self.norm = nn.BatchNorm1d(width, momentum=None)
        self.hidden, self.head = nn.Linear(width, width), nn.Linear(width, outputs)
        self.scale, self.token = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(1, rows, width))
        self.spare = nn.Linear(3, 2)
        self.register_buffer("past", torch.full((rows, rows), -math.inf).triu(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("recent", torch.zeros(width), persistent=False)
        self.steps, self.history = 0, []

    def forward(self, x):
        x = torch.relu(self.body(x.flatten(1, 2))) + self.token
        scores = self.query(x) @ self.key(x).transpose(1, 2) + self.past
        x = (scores.softmax(-1) @ self.value(x)).mean(1)
        if self.training:
            self.steps += 1
            self.seen += 1
            self.history.append(self.steps)
            self.recent = 0.5 * self.recent + 0.5 * x.detach().mean(0)
            strength = (1 - 0.5**self.steps) * (1 - 0.5 ** int(self.seen)) * (1 - 0.5 ** len(self.history))
            drawn = 0.01 * random.random() + 0.01 * np.random.rand()  # noqa: NPY002 -- as people write it
            x = strength * x + drawn + 0.1 * self.recent
        x = torch.relu(self.norm(self.mix(x)))
        return self.head(torch.relu(self.hidden(self.scale * torch.relu(self.again(x)))))
