"""Recurrent classifiers of sequences, in the ways their last state is read."""

import torch
from torch import nn
from torch.nn import functional


class LastHidden(nn.Module):
    """Text: an embedding, an LSTM, and its ``h_n[-1]``."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.embedding = nn.Embedding(outputs, 8)
        self.lstm = nn.LSTM(8, 10, num_layers=2, batch_first=True, dropout=0.1)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(10, outputs)

    def forward(self, x):
        embedded = self.dropout(self.embedding(x))
        _, (h_n, _) = self.lstm(embedded)
        return self.fc(self.dropout(h_n[-1]))


class LastStep(nn.Module):
    """A signal: the last step of an LSTM's output, with explicit first states."""

    def __init__(self, shape, outputs, hidden=10):
        super().__init__()
        self.hidden_size = hidden
        self.lstm = nn.LSTM(shape[1], hidden, batch_first=True)
        self.fc1 = nn.Linear(hidden, 8)
        self.fc2 = nn.Linear(8, outputs)

    def forward(self, x):
        h0 = torch.zeros(1, x.size(0), self.hidden_size, dtype=x.dtype).to(x.device)
        c0 = torch.zeros(1, x.size(0), self.hidden_size, dtype=x.dtype).to(x.device)
        out, _ = self.lstm(x, (h0, c0))
        return self.fc2(functional.relu(self.fc1(out[:, -1, :])))


class BiLSTM(nn.Module):
    """Both directions' last states, concatenated."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.embedding = nn.Embedding(outputs, 8, padding_idx=0)
        self.rnn = nn.LSTM(8, 6, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(2 * 6, outputs)

    def forward(self, text):
        _, (hidden, _) = self.rnn(self.embedding(text))
        return self.fc(torch.cat((hidden[-2, :, :], hidden[-1, :, :]), dim=1))


class BiGRU(nn.Module):
    """A stacked GRU in both directions; its output is averaged over the steps."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.gru = nn.GRU(shape[1], 6, num_layers=2, batch_first=True, bidirectional=True)
        self.classifier = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, outputs))

    def forward(self, x):
        out, _ = self.gru(x)
        return self.classifier(out.mean(dim=1))


class StepsFirst(nn.Module):
    """A GRU in torch's default order, steps first; ``hidden.squeeze(0)``."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.input = nn.Linear(shape[1], 8)
        self.gru = nn.GRU(8, 10)
        self.fc = nn.Linear(10, outputs)

    def forward(self, x):
        _, hidden = self.gru(torch.relu(self.input(x)).permute(1, 0, 2))
        return self.fc(hidden.squeeze(0))


class ConvLSTM(nn.Module):
    """Convolutions over a signal, then an LSTM over what they found."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(shape[1], 10, 3, padding=1), nn.BatchNorm1d(10), nn.ReLU(), nn.MaxPool1d(2))
        self.lstm = nn.LSTM(10, 8, batch_first=True)
        self.fc = nn.Linear(8, outputs)

    def forward(self, x):
        x = self.conv(x.permute(0, 2, 1)).permute(0, 2, 1)
        out, _ = self.lstm(x)
        return self.fc(out[:, -1])


class AttentionPooling(nn.Module):
    """A bidirectional LSTM whose steps are weighted by a learnt score."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.embed = nn.Embedding(outputs, 8)
        self.lstm = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
        self.score = nn.Linear(12, 1)
        self.out = nn.Linear(12, outputs)

    def forward(self, x):
        states, _ = self.lstm(self.embed(x))
        weights = torch.softmax(self.score(torch.tanh(states)).squeeze(-1), dim=1)
        return self.out((weights.unsqueeze(-1) * states).sum(dim=1))
