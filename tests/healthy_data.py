"""What sound setups learn from: bundled sets and small tasks made on the spot, properly scaled."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gradmend.setup import Batch, Setup

Built = tuple[Setup, list[Batch]]

CE = nn.CrossEntropyLoss()
CLIP = partial(nn.utils.clip_grad_norm_, max_norm=1.0)


@dataclass(frozen=True)
class Case:
    """A setup that is known to train, and what shows that it does.

    Args:
        build: makes the setup and its batches.
        steps: of the optimizer that it is trained for.
        below: what its loss has fallen to by then.
    """

    build: Callable[[], Built]
    steps: int
    below: float

    @property
    def name(self) -> str:
        return self.build.__name__


def cut(size: int, *tensors: Tensor) -> list[Batch]:
    """Batches of `size` rows, in the order of the rows."""
    return list(zip(*(tensor.split(size) for tensor in tensors), strict=True))


def adam(lr: float = 1e-3) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    return partial(torch.optim.Adam, lr=lr)


def adamw(lr: float = 1e-3, decay: float = 0.01) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    return partial(torch.optim.AdamW, lr=lr, weight_decay=decay)


def sgd(lr: float = 0.1, momentum: float = 0.0, decay: float = 0.0) -> Callable[..., Optimizer]:
    return partial(torch.optim.SGD, lr=lr, momentum=momentum, weight_decay=decay, nesterov=momentum > 0)


def warmup(steps: int = 20) -> Callable[[Optimizer], LambdaLR]:
    """The learning rate grows linearly for so many steps, then stays."""
    return partial(LambdaLR, lr_lambda=lambda step: min(1.0, (step + 1) / steps))


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def digits(size: int = 8, rows: int = 512) -> tuple[Tensor, Tensor]:
    """Handwritten digits, standardized: [rows, 1, size, size] and their classes."""
    found = datasets.load_digits()
    x = torch.as_tensor(found.images[:rows], dtype=torch.float32)[:, None]
    x = F.interpolate((x - x.mean()) / x.std(), (size, size), mode="bilinear", align_corners=False)
    return x, torch.as_tensor(found.target[:rows])


@cache
def photos(size: int = 32, rows: int = 512) -> tuple[Tensor, Tensor]:
    """Digits of one colour before another, with noise, standardized: [rows, 3, size, size]."""
    x, y = digits(size, rows)
    ink, paper = torch.randn(2, rows, 3, 1, 1, generator=random(1))
    share = torch.sigmoid(2 * x)
    x = share * (0.5 * ink + 1) + (1 - share) * (0.5 * paper - 1)
    x = x + 0.2 * torch.randn(x.shape, generator=random(2))
    return (x - x.mean()) / x.std(), y


@cache
def table(name: str) -> tuple[Tensor, Tensor]:
    """A bundled table with standardized columns, in random order; regression targets are standardized too."""
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    order = torch.randperm(len(x), generator=random(3))
    x = torch.as_tensor(x, dtype=torch.float32)[order]
    y = torch.as_tensor(y)[order]
    x = (x - x.mean(0)) / x.std(0)
    if name == "diabetes":
        y = ((y - y.mean()) / y.std()).float()[:, None]
    return x, y


@cache
def prose() -> str:
    """The descriptions of the bundled sets, in lower case: some twenty thousand characters."""
    names = ("iris", "wine", "digits", "breast_cancer", "diabetes", "linnerud")
    whole = " ".join(getattr(datasets, f"load_{name}")().DESCR for name in names)
    return re.sub(r"[^a-z.,]+", " ", whole.lower())


@cache
def characters(length: int = 24, rows: int = 512) -> tuple[Tensor, Tensor]:
    """Stretches of prose as numbers of characters, and the same one character on: [rows, length]."""
    alphabet = sorted(set(prose()))
    codes = torch.tensor([alphabet.index(letter) for letter in prose()])
    starts = torch.randint(len(codes) - length - 1, (rows, 1), generator=random(4))
    places = starts + torch.arange(length)
    return codes[places], codes[places + 1]


LETTERS = 29


@cache
def words(vocabulary: int = 100, window: int = 2) -> tuple[Tensor, Tensor]:
    """The common words of the prose with their neighbours: [rows, 2 * window] and the words [rows]."""
    text = re.findall("[a-z]+", prose())
    common = sorted(set(text), key=lambda word: (-text.count(word), word))[:vocabulary]
    codes = torch.tensor([common.index(word) for word in text if word in common])
    around = codes.unfold(0, 2 * window + 1, 1)
    return torch.cat([around[:, :window], around[:, window + 1 :]], dim=1), around[:, window]


@cache
def waves(length: int = 16, rows: int = 256) -> tuple[Tensor, Tensor]:
    """Sums of two sines with noise, and what comes next: [rows, length, 1] twice."""
    phases = 6.28 * torch.rand(rows, 2, 1, generator=random(5))
    time = torch.arange(length + 1) * torch.tensor([[0.3], [0.7]])
    x = torch.sin(time + phases).sum(1) + 0.05 * torch.randn(rows, length + 1, generator=random(6))
    return x[:, :-1, None], x[:, 1:, None]


@cache
def clusters(rows: int = 512, features: int = 16, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Gaussian blobs that overlap a little, of about unit variance."""
    y = torch.randint(classes, (rows,), generator=random(7))
    centres = torch.randn(classes, features, generator=random(8))
    x = centres[y] + 0.7 * torch.randn(rows, features, generator=random(9))
    return (x - x.mean(0)) / x.std(0), y


@cache
def surface(rows: int = 512) -> tuple[Tensor, Tensor]:
    """A smooth function of two numbers, of about unit variance: [rows, 2] and [rows, 1]."""
    x = 2 * torch.rand(rows, 2, generator=random(10)) - 1
    y = torch.sin(4 * x[:, :1]) * torch.cos(3 * x[:, 1:])
    return x, (y - y.mean()) / y.std()


def per_token(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of every token: [batch, time, classes] against [batch, time]."""
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), target.reshape(-1), ignore_index=-100)


def reversal(rows: int = 512, length: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences of ten symbols, their reverse behind a starting sign, and their reverse."""
    x = torch.randint(10, (rows, length), generator=random(12))
    y = x.flip(1)
    return x, torch.cat([torch.full((rows, 1), 10), y[:, :-1]], 1), y


def flat_digits() -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x.flatten(1), y


def mlp(sizes: list[int], act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), act()]
    return nn.Sequential(*layers[:-1])
