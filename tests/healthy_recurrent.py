"""Sound networks for sequences, recurrent or convolutional in time."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

from gradmend.setup import Batch, Setup
from healthy_data import (
    CE,
    CLIP,
    LETTERS,
    Built,
    Case,
    adam,
    characters,
    cut,
    digits,
    per_token,
    random,
    reversal,
    waves,
)


class LSTMClassifier(nn.Module):
    """Reads a digit row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 48, num_layers=2, batch_first=True, dropout=0.1)
        self.fc = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, _) = self.lstm(x[:, 0])
        return self.fc(h[-1])


def lstm_classifier() -> Built:
    return Setup(LSTMClassifier(), CE, adam(5e-3), gradient_transform=CLIP), cut(32, *digits())


class LanguageModel(nn.Module):
    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.encoder, self.drop = nn.Embedding(LETTERS, hidden), nn.Dropout(0.2)
        self.rnn = nn.LSTM(hidden, hidden, batch_first=True)
        self.decoder = nn.Linear(hidden, LETTERS)
        self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(self.drop(self.encoder(x)))
        return self.decoder(self.drop(out))


def lstm_language_model() -> Built:
    clip = partial(nn.utils.clip_grad_norm_, max_norm=0.25)
    return Setup(LanguageModel(), per_token, adam(1e-2), gradient_transform=clip), cut(16, *characters())


class Seq2Seq(nn.Module):
    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 24)
        self.encoder, self.decoder = (
            nn.GRU(24, hidden, batch_first=True),
            nn.GRU(24, hidden, batch_first=True),
        )
        self.out = nn.Linear(hidden, 10)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, state = self.encoder(self.embed(source))
        return self.out(self.decoder(self.embed(target), state)[0])


def gru_seq2seq() -> Built:
    return Setup(Seq2Seq(), per_token, adam(5e-3), gradient_transform=CLIP), cut(32, *reversal())


class PackedTagger(nn.Module):
    """Sequences of several lengths, packed, read from both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16, padding_idx=10)
        self.lstm = nn.LSTM(16, 32, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
        _, (h, _) = self.lstm(packed)
        return self.fc(torch.cat([h[0], h[1]], dim=1))


def packed_bilstm() -> Built:
    x, _, _ = reversal(length=10)
    lengths = torch.randint(4, 11, (len(x),), generator=random(13))
    x = x.masked_fill(torch.arange(10) >= lengths[:, None], 10)
    last = x.gather(1, lengths[:, None] - 1)[:, 0]
    return Setup(PackedTagger(), CE, adam(5e-3)), cut(32, x, lengths, (x[:, 0] + last) % 10)


class Elman(nn.Module):
    def __init__(self, nonlinearity: str = "tanh") -> None:
        super().__init__()
        self.rnn = nn.RNN(8, 64, nonlinearity=nonlinearity, batch_first=True)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x[:, 0])[0][:, -1])


def rnn_tanh() -> Built:
    return Setup(Elman(), CE, adam(2e-3), gradient_transform=CLIP), cut(32, *digits())


def irnn() -> Built:
    """Rectified units that begin as memory: identity weights (Le, Jaitly, Hinton 2015)."""
    model = Elman("relu")
    nn.init.eye_(model.rnn.weight_hh_l0)
    nn.init.normal_(model.rnn.weight_ih_l0, std=0.05)
    nn.init.zeros_(model.rnn.bias_ih_l0)
    nn.init.zeros_(model.rnn.bias_hh_l0)
    return Setup(model, CE, adam(1e-3), gradient_transform=CLIP), cut(32, *digits())


class Forecaster(nn.Module):
    """A cell in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(1, 32), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 32)
        outputs = []
        for t in range(x.size(1)):
            h = self.cell(x[:, t], h)
            outputs.append(self.out(h))
        return torch.stack(outputs, dim=1)


def grucell_forecaster() -> Built:
    return Setup(Forecaster(), nn.MSELoss(), adam(5e-3), gradient_transform=CLIP), cut(32, *waves())


class TemporalBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.padding = 2 * dilation
        self.conv1 = weight_norm(nn.Conv1d(inputs, outputs, 3, dilation=dilation))
        self.conv2 = weight_norm(nn.Conv1d(outputs, outputs, 3, dilation=dilation))
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(F.relu(self.conv1(F.pad(x, (self.padding, 0)))))
        out = self.dropout(F.relu(self.conv2(F.pad(out, (self.padding, 0)))))
        return F.relu(out + self.downsample(x))


class TCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(*(TemporalBlock(1 if i == 0 else 24, 24, 2**i) for i in range(4)))
        self.linear = nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.network(x.transpose(1, 2)).transpose(1, 2))


def tcn() -> Built:
    return Setup(TCN(), nn.MSELoss(), adam(2e-3), gradient_transform=CLIP), cut(32, *waves())


class WaveNet(nn.Module):
    """Gated units, a residual and a skip path (van den Oord et al. 2016)."""

    def __init__(self, channels: int = 24) -> None:
        super().__init__()
        self.inputs = nn.Conv1d(1, channels, 1)
        self.gates = nn.ModuleList(nn.Conv1d(channels, 2 * channels, 2, dilation=2**i) for i in range(5))
        self.outs = nn.ModuleList(nn.Conv1d(channels, 2 * channels, 1) for _ in range(5))
        self.head = nn.Sequential(
            nn.ReLU(), nn.Conv1d(channels, channels, 1), nn.ReLU(), nn.Conv1d(channels, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.inputs(x.transpose(1, 2)), 0
        for i, (gate, out) in enumerate(zip(self.gates, self.outs, strict=True)):
            a, b = gate(F.pad(x, (2**i, 0))).chunk(2, dim=1)
            residual, skip = out(torch.tanh(a) * torch.sigmoid(b)).chunk(2, dim=1)
            x, skips = x + residual, skips + skip
        return self.head(skips).transpose(1, 2)


def wavenet() -> Built:
    return Setup(WaveNet(), nn.MSELoss(), adam(3e-3)), cut(32, *waves())


class Speech(nn.Module):
    """Frames to symbols: a convolution, an LSTM from both sides, and probabilities in time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(8, 32, 3, padding=1), nn.BatchNorm1d(32)
        self.lstm, self.fc = nn.LSTM(32, 32, bidirectional=True), nn.Linear(64, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.conv(x.transpose(1, 2))))
        return F.log_softmax(self.fc(self.lstm(h.permute(2, 0, 1))[0]), dim=-1)


def ctc_step(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    out = model(x)
    frames, symbols = torch.full((len(x),), out.size(0)), torch.full((len(y),), y.size(1))
    return F.ctc_loss(out, y, frames, symbols)


def ctc() -> Built:
    y = torch.randint(1, 6, (256, 4), generator=random(14))
    sounds = torch.randn(6, 8, generator=random(15))
    frames = torch.stack([y, torch.zeros_like(y)], dim=2).flatten(1).repeat_interleave(2, dim=1)
    x = sounds[frames] + 0.3 * torch.randn(256, 16, 8, generator=random(16))
    return Setup(Speech(), optimizer=adam(5e-3), step=ctc_step), cut(32, x, y)


CASES = (
    Case(lstm_classifier, 150, 0.6),
    Case(lstm_language_model, 150, 2.4),
    Case(gru_seq2seq, 200, 1.0),
    Case(packed_bilstm, 200, 1.2),
    Case(rnn_tanh, 150, 0.3),
    Case(irnn, 150, 0.8),
    Case(grucell_forecaster, 100, 0.1),
    Case(tcn, 60, 0.2),
    Case(wavenet, 60, 0.2),
    Case(ctc, 100, 0.5),
)
