"""Random setups: what may be drawn, and the setup that a description stands for."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.prognosis.tasks import MAKERS, TOKENS, Task, task
from gradmend.layers import Residual
from gradmend.setup import Setup


@dataclass(frozen=True)
class Description:
    """All that is drawn at random of one setup; with the seed it is the setup."""

    seed: int
    task: str
    family: str
    width: int
    depth: int
    activation: str
    init: str
    norm: str
    dropout: float
    output: str
    loss: str
    inputs: str
    targets: str
    optimizer: str
    rate: float
    clip: bool
    batch: int


ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
}
INITS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "zero": nn.init.zeros_,
    "small": partial(nn.init.normal_, std=0.01),
    "large": partial(nn.init.normal_, std=1.0),
    "xavier": nn.init.xavier_normal_,
    "he": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "lecun": partial(nn.init.kaiming_normal_, nonlinearity="linear"),
    "orthogonal": nn.init.orthogonal_,
}
OUTPUTS: Mapping[str, Callable[[], nn.Module]] = {
    "right": nn.Identity,
    "softmax": partial(nn.Softmax, dim=1),
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
}
LOSSES: Mapping[str, Callable[[], nn.Module]] = {
    "cross entropy": nn.CrossEntropyLoss,
    "binary": nn.BCEWithLogitsLoss,
    "square": nn.MSELoss,
    "absolute": nn.L1Loss,
    "huber": nn.HuberLoss,
}
OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "RMSprop": torch.optim.RMSprop,
}
FAMILIES: Mapping[str, Mapping[str, float]] = {
    "rows": {"mlp": 0.7, "residual": 0.3},
    "images": {"mlp": 0.2, "residual": 0.1, "conv": 0.4, "residual conv": 0.3},
    "tokens": {"mlp": 0.15, "rnn": 0.25, "lstm": 0.2, "gru": 0.2, "attention": 0.2},
    "sequences": {"mlp": 0.15, "rnn": 0.25, "lstm": 0.2, "gru": 0.2, "attention": 0.2},
}
BOUNDS: Mapping[str, tuple[int, int]] = {
    "mlp": (256, 40),
    "residual": (256, 40),
    "conv": (24, 10),
    "residual conv": (24, 10),
    "rnn": (64, 2),
    "lstm": (48, 2),
    "gru": (48, 2),
    "attention": (48, 4),
}
"""The largest width and depth."""

_LARGEST = 40 * 128**2
"""Weights of hidden layers, so that no training takes long."""


def draw(seed: int) -> Description:
    """One setup of all that people try: what is right is drawn more often than what is wrong."""
    rng = random.Random(seed)
    data = task(rng.choice(list(MAKERS)))
    family = pick(rng, FAMILIES[data.kind])
    width, depth = size(rng, family)
    classes = data.classes
    if classes:
        loss = "binary" if classes == 2 and rng.random() < 0.5 else "cross entropy"
        output = pick(rng, {"right": 0.82, "softmax": 0.08, "sigmoid": 0.05, "relu": 0.05})
    else:
        loss = pick(rng, {"square": 0.7, "absolute": 0.15, "huber": 0.15})
        output = pick(rng, {"right": 0.85, "sigmoid": 0.05, "relu": 0.05, "tanh": 0.05})
    return Description(
        seed=seed,
        task=data.name,
        family=family,
        width=width,
        depth=depth,
        activation=rng.choice(list(ACTIVATIONS)),
        init=pick(
            rng,
            {"default": 0.25, "he": 0.15, "xavier": 0.15, "lecun": 0.1, "orthogonal": 0.1}
            | {"small": 0.1, "large": 0.1, "zero": 0.05},
        ),
        norm=pick(rng, {"none": 0.6, "batch": 0.2, "layer": 0.2}),
        dropout=pick(rng, {0.0: 0.75, 0.1: 0.1, 0.3: 0.1, 0.5: 0.05}),
        output="sigmoid" if loss == "binary" and output == "softmax" else output,
        loss=loss,
        inputs=pick(rng, {"standard": 0.65, "raw": 0.15, "large": 0.07, "small": 0.07, "shifted": 0.06}),
        targets="standard" if classes else pick(rng, {"standard": 0.6, "raw": 0.25, "large": 0.15}),
        optimizer=rng.choice(list(OPTIMIZERS)),
        rate=10 ** rng.uniform(-6, 1),
        clip=rng.random() < 0.1,
        batch=rng.choice((32, 64)),
    )


def pick(rng: random.Random, shares: Mapping[Any, float]) -> Any:
    return rng.choices(list(shares), list(shares.values()))[0]


def size(rng: random.Random, family: str) -> tuple[int, int]:
    """Width and depth, log-uniform within bounds."""
    widest, deepest = BOUNDS[family]
    while True:
        width = round(8 * (widest / 8) ** rng.random())
        depth = math.floor((deepest + 1) ** rng.random())
        if width**2 * depth <= _LARGEST:
            return width, depth


def build(d: Description) -> tuple[Setup, Tensor, Tensor]:
    """The setup with fresh weights, and all inputs and targets."""
    data = task(d.task)
    torch.manual_seed(d.seed)
    outputs = 1 if d.loss == "binary" else data.classes or data.y.shape[1]
    model = network(d, data, outputs)
    initialize(model, d.init)
    y = data.y.float()[:, None] if d.loss == "binary" else scaled(data.y, d.targets)
    optimizer = partial(OPTIMIZERS[d.optimizer], lr=d.rate)
    clip = partial(nn.utils.clip_grad_norm_, max_norm=1.0) if d.clip else None
    return Setup(model, LOSSES[d.loss](), optimizer, gradient_transform=clip), scaled(data.x, d.inputs), y


def scaled(x: Tensor, how: str) -> Tensor:
    if x.dtype == torch.long or how == "raw":
        return x
    deviation = x.std(0)
    standard = (x - x.mean(0)) / torch.where(deviation > 0, deviation, 1.0)
    return {
        "standard": standard,
        "large": 100 * standard,
        "small": 0.01 * standard,
        "shifted": standard + 10,
    }[how]


def initialize(model: nn.Module, init: str) -> None:
    """Fill all matrices; biases become zero; the parameters of normalizations stay."""
    if init == "default":
        return
    kept = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm, nn.Embedding, Places)
    for module in model.modules():
        if isinstance(module, kept):
            continue
        for p in module.parameters(recurse=False):
            INITS[init](p.data) if p.dim() > 1 else nn.init.zeros_(p)


class Last(nn.Module):
    """What a recurrent layer returns after the last step."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]


class Places(nn.Module):
    """Adds a learnt vector to each step, so that attention knows the order."""

    def __init__(self, steps: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(0.1 * torch.randn(steps, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.vectors


class Mean(nn.Module):
    """The mean over all steps."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def network(d: Description, data: Task, outputs: int) -> nn.Sequential:
    match d.family:
        case "mlp" | "residual":
            layers, inputs = dense(d, data)
        case "conv" | "residual conv":
            layers, inputs = convolutional(d, data)
        case "attention":
            layers, inputs = attention(d, data)
        case _:
            layers, inputs = recurrent(d, data)
    return nn.Sequential(*layers, nn.Linear(inputs, outputs), OUTPUTS[d.output]())


Layers = tuple[list[nn.Module], int]
"""Layers, and how many numbers the last returns."""


def dense(d: Description, data: Task) -> Layers:
    embedding = [nn.Embedding(TOKENS, 8)] if data.kind == "tokens" else []
    inputs = data.x[0].numel() * (8 if embedding else 1)
    norm = {"none": None, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}[d.norm]
    return [*embedding, nn.Flatten(), *chain(blocks(d, inputs, nn.Linear, norm))], d.width


def convolutional(d: Description, data: Task) -> Layers:
    norm = {"none": None, "batch": nn.BatchNorm2d, "layer": partial(nn.GroupNorm, 1)}[d.norm]
    first, *others = blocks(d, 1, partial(nn.Conv2d, kernel_size=3, padding=1), norm)
    side = data.x.shape[-1] // 2
    return [*first, nn.MaxPool2d(2), *chain(others), nn.Flatten()], d.width * side**2


def recurrent(d: Description, data: Task) -> Layers:
    embedding = [nn.Embedding(TOKENS, 8)] if data.kind == "tokens" else []
    inputs = 8 if embedding else data.x.shape[2]
    options = {"batch_first": True, "num_layers": d.depth, "dropout": d.dropout if d.depth > 1 else 0.0}
    match d.family:
        case "rnn":
            how = "relu" if d.activation in ("relu", "leaky relu") else "tanh"
            layer: nn.Module = nn.RNN(inputs, d.width, nonlinearity=how, **options)
        case "lstm":
            layer = nn.LSTM(inputs, d.width, **options)
        case _:
            layer = nn.GRU(inputs, d.width, **options)
    return [*embedding, Last(layer)], d.width


def attention(d: Description, data: Task) -> Layers:
    width = 2 * (d.width // 2)
    front = nn.Embedding(TOKENS, width) if data.kind == "tokens" else nn.Linear(data.x.shape[2], width)
    how = {"activation": ACTIVATIONS[d.activation](), "dropout": d.dropout, "batch_first": True}
    norm = {"norm_first": d.norm != "none"}
    layers = [nn.TransformerEncoderLayer(width, 2, 2 * width, **how, **norm) for _ in range(d.depth)]
    return [front, Places(data.x.shape[1], width), *layers, Mean()], width


def blocks(
    d: Description,
    inputs: int,
    layer: Callable[[int, int], nn.Module],
    norm: Callable[[int], nn.Module] | None,
) -> list[list[nn.Module]]:
    """Weights, normalization, activation, dropout; from the second on with a skip connection, if residual."""
    found: list[list[nn.Module]] = []
    for k in range(d.depth):
        block = [layer(d.width if k else inputs, d.width), *([norm(d.width)] if norm else [])]
        block += [ACTIVATIONS[d.activation](), *([nn.Dropout(d.dropout)] if d.dropout else [])]
        found.append([Residual(nn.Sequential(*block))] if k and d.family.startswith("residual") else block)
    return found


def chain(groups: Iterable[list[nn.Module]]) -> list[nn.Module]:
    return [layer for group in groups for layer in group]
