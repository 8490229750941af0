"""The networks that measuring is timed on, each with one batch, and the steps taken on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import gradmend
from gradmend.zoo import mlp

Build = Callable[[], tuple[nn.Module, Tensor, Tensor]]
OptimizerFactory = Callable[..., Optimizer]

SGD = partial(torch.optim.SGD, lr=1e-6, momentum=0.9)
"""So slow that the weights of the last step are nearly those of the first."""

ADAM = partial(torch.optim.Adam, lr=1e-6)


@dataclass(frozen=True)
class Workload:
    """A network with a batch.

    Args:
        name: of the row.
        build: model, inputs and classes; the same in every call.
        reach: what one measured step may cost over a plain forward and backward pass.
    """

    name: str
    build: Build
    reach: float

    def job(self, optimizer: OptimizerFactory | None = None, device: str = "cpu") -> Job:
        """A copy of its own, so that what watches one job does not slow another."""
        torch.manual_seed(0)
        model, x, y = self.build()
        model.to(device)
        live = None if optimizer is None else optimizer(model.parameters())
        return Job(model, x.to(device), y.to(device), live)


@dataclass(frozen=True, eq=False)
class Job:
    """What is stepped and measured."""

    model: nn.Module
    x: Tensor
    y: Tensor
    optimizer: Optimizer | None = None

    def step(self) -> Tensor:
        """The plain step: forward, backward and, if there is an optimizer, its step."""
        self.model.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.optimizer is not None:
            self.optimizer.step()
        return loss.detach()

    def measure(self) -> gradmend.Profile:
        """One measured step."""
        setup = gradmend.Setup(self.model, nn.CrossEntropyLoss(), self.optimizer)
        return gradmend.measure(setup, (self.x, self.y))


def deep_mlp(depth: int, width: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A fully connected network of ReLU layers, with a batch of 128."""
    model = mlp(width, 10, width=width, depth=depth, activation="relu", init="he")
    return model, torch.randn(128, width), torch.randint(10, (128,))


class Block(nn.Module):
    """A pre-LN transformer block (Radford et al. 2019) on [batch, sequence, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class GPT(nn.Module):
    """Tokens [batch, sequence] to logits [batch, vocabulary, sequence]."""

    def __init__(self, layers: int, width: int, sequence: int, vocabulary: int = 256) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(sequence, width))
        self.blocks = nn.Sequential(*[Block(width, heads=8) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.blocks(self.token(tokens) + self.position)
        logits: Tensor = self.head(self.norm(hidden))
        return logits.transpose(1, 2)


def gpt(layers: int = 6, width: int = 256, sequence: int = 128) -> tuple[nn.Module, Tensor, Tensor]:
    """Byte-level language modelling, batch 8."""
    x = torch.randint(256, (8, sequence))
    return GPT(layers, width, sequence), x, x.roll(-1, dims=1)


class ResidualBlock(nn.Module):
    """Two convolutions with batch normalization beside a skip connection (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.skip(x))


def resnet() -> tuple[nn.Module, Tensor, Tensor]:
    """ResNet-8 for 32 x 32 images, batch 64."""
    model = nn.Sequential(
        *[nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()],
        *[ResidualBlock(16, 16), ResidualBlock(16, 32), ResidualBlock(32, 64)],
        *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)],
    )
    return model, torch.randn(64, 3, 32, 32), torch.randint(10, (64,))


class SequenceClassifier(nn.Module):
    """A GRU over [batch, time, features]; classes from its last state."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(features, width, batch_first=True)
        self.out = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(x)
        logits: Tensor = self.out(states[:, -1])
        return logits


def gru() -> tuple[nn.Module, Tensor, Tensor]:
    """100 steps of 32 features, batch 32."""
    return SequenceClassifier(32, 128), torch.randn(32, 100, 32), torch.randint(10, (32,))


WORKLOADS = (
    Workload("MLP 20 x 256, batch 128", partial(deep_mlp, 20, 256), 1.6),
    Workload("MLP 1,000 x 64, batch 128", partial(deep_mlp, 1000, 64), 2.5),
    Workload("GPT 6 x 256, sequence 128, batch 8", gpt, 1.6),
    Workload("ResNet-8 16/32/64, 32 x 32 images, batch 64", resnet, 1.6),
    Workload("GRU 128, 100 steps, batch 32", gru, 1.6),
)
