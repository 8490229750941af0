"""Sound networks for tables, graphs, words and ratings, and unusual feedforward ones."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from gradmend.setup import Batch, Setup
from healthy_data import (
    CE,
    Built,
    Case,
    adam,
    adamw,
    clusters,
    cut,
    flat_digits,
    mlp,
    random,
    sgd,
    table,
    warmup,
    words,
)


def logistic_regression() -> Built:
    return Setup(nn.Linear(13, 3), CE, sgd(0.5)), cut(32, *table("wine"))


def binary_classifier() -> Built:
    x, y = table("breast_cancer")
    model = nn.Sequential(mlp([30, 32, 16, 1]), nn.Flatten(0))
    optimizer = partial(torch.optim.RMSprop, lr=1e-3)
    return Setup(model, nn.BCEWithLogitsLoss(), optimizer), cut(32, x, y.float())


def multi_label() -> Built:
    x, _ = clusters()
    y = (x @ torch.randn(16, 6, generator=random(36)) > 0).float()
    optimizer = partial(torch.optim.Adagrad, lr=0.05)
    return Setup(mlp([16, 64, 6]), nn.BCEWithLogitsLoss(), optimizer), cut(64, x, y)


class Coral(nn.Module):
    """Ordered classes: one score, and a learnt bias for each threshold (Cao et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1, bias=False))
        self.thresholds = nn.Parameter(torch.tensor([1.0, 0.0, -1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x) + self.thresholds


def ordinal() -> Built:
    x, y = table("diabetes")
    grades = (y > torch.tensor([-0.7, 0.0, 0.7])).float()
    return Setup(Coral(), nn.BCEWithLogitsLoss(), adam(5e-3)), cut(34, x, grades)


def imbalanced() -> Built:
    """One sample in twenty is of the class that is looked for."""
    rare = torch.rand(1024, generator=random(37)) < 0.05
    x = torch.randn(1024, 16, generator=random(38)) + rare[:, None] * torch.randn(16, generator=random(39))
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 10.0]))
    return Setup(mlp([16, 32, 2]), loss, adam(3e-3)), cut(128, (x - x.mean(0)) / x.std(0), rare.long())


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.digit, self.ink = nn.Linear(32, 10), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.digit(h), self.ink(h)


def both_losses(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    digit, ink = output
    return F.cross_entropy(digit, target[:, 0].long()) + 0.5 * F.mse_loss(ink[:, 0], target[:, 1])


def multi_task() -> Built:
    x, y = flat_digits()
    ink = x.mean(1)
    target = torch.stack([y.float(), (ink - ink.mean()) / ink.std()], dim=1)
    return Setup(TwoHeads(), both_losses, adam(3e-3)), cut(64, x, target)


def batchnorm_mlp() -> Built:
    def block(inputs: int) -> list[nn.Module]:
        return [nn.Linear(inputs, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2)]

    model = nn.Sequential(*block(64), *block(64), *block(64), nn.Linear(64, 10))
    return Setup(model, CE, sgd(0.05, 0.9)), cut(64, *flat_digits())


def deep_he_relu() -> Built:
    model = mlp([64] + 10 * [64] + [10])
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return Setup(model, CE, adam(5e-4)), cut(64, *flat_digits())


def deep_orthogonal_tanh() -> Built:
    """Thirty layers without skips or normalization, at the edge of chaos (Saxe et al. 2014)."""
    model = mlp([64] + 30 * [64] + [10], nn.Tanh)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain=1.05)
            nn.init.zeros_(layer.bias)
    return Setup(model, CE, sgd(0.01, 0.9)), cut(64, *flat_digits())


def selu_network() -> Built:
    layers = mlp([64] + 8 * [48] + [10], nn.SELU)
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)
    model = nn.Sequential(*layers[:-1], nn.AlphaDropout(0.05), layers[-1])
    return Setup(model, CE, sgd(0.02, 0.9)), cut(64, *flat_digits())


class Highway(nn.Module):
    """Gates that begin nearly closed carry the input through (Srivastava et al. 2015)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.plain, self.gate = nn.Linear(dim, dim), nn.Linear(dim, dim)
        nn.init.constant_(self.gate.bias, -2.0)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x))
        return gate * F.relu(self.plain(x)) + (1 - gate) * x


def highway() -> Built:
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), *(Highway(48) for _ in range(15)), nn.Linear(48, 10))
    return Setup(model, CE, sgd(0.05, 0.9)), cut(64, *flat_digits())


class Maxout(nn.Module):
    def __init__(self, inputs: int, outputs: int, pieces: int = 3) -> None:
        super().__init__()
        self.linear, self.shape = nn.Linear(inputs, outputs * pieces), (outputs, pieces)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).view(-1, *self.shape).amax(-1)


def maxout() -> Built:
    return Setup(nn.Sequential(Maxout(64, 48), Maxout(48, 48), nn.Linear(48, 10)), CE, sgd(0.1)), cut(
        64, *flat_digits()
    )


def parametrized() -> Built:
    """Normed, bounded and orthogonal weights, and learnt slopes."""
    layers = [weight_norm(nn.Linear(64, 64)), nn.PReLU(), spectral_norm(nn.Linear(64, 64)), nn.PReLU(64)]
    model = nn.Sequential(*layers, orthogonal(nn.Linear(64, 64)), nn.ELU(), nn.Linear(64, 10))
    return Setup(model, CE, adam(3e-3)), cut(64, *flat_digits())


def half_bounded() -> Built:
    layers = [
        nn.Linear(64, 64),
        nn.ReLU6(),
        nn.Linear(64, 64),
        nn.Hardswish(),
        nn.Linear(64, 64),
        nn.Hardtanh(),
    ]
    return Setup(nn.Sequential(*layers, nn.Linear(64, 10)), CE, sgd(0.1, 0.9), warmup(20)), cut(
        64, *flat_digits()
    )


def double_precision() -> Built:
    x, y = table("iris")
    return Setup(mlp([4, 16, 3], nn.Sigmoid).double(), CE, adam(2e-2)), cut(30, x.double(), y)


class Experts(nn.Module):
    """A softmax weighs what four small networks say (Jacobs et al. 1991)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 4)
        self.experts = nn.ModuleList(mlp([64, 24, 10]) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        shares = F.softmax(self.gate(x), dim=1)
        return torch.einsum("be,beo->bo", shares, torch.stack([expert(x) for expert in self.experts], dim=1))


def experts() -> Built:
    return Setup(Experts(), CE, adamw(5e-3)), cut(64, *flat_digits())


class DeepSets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phi, self.rho = mlp([3, 48, 48]), mlp([48, 48, 1])

    def forward(self, x: Tensor) -> Tensor:
        return self.rho(self.phi(x).mean(1))


def deep_sets() -> Built:
    """The spread of a cloud of points."""
    size = 0.5 + torch.rand(512, 1, generator=random(40))
    x = size[:, None] * torch.randn(512, 20, 3, generator=random(41))
    return Setup(DeepSets(), nn.MSELoss(), adam(3e-3)), cut(64, x, (size - size.mean()) / size.std())


class GCN(nn.Module):
    """Kipf, Welling 2017, with a dense adjacency."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32, bias=False), nn.Linear(32, 4, bias=False)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        degree = adjacency.sum(1).rsqrt()
        norm = degree[:, None] * adjacency * degree
        h = F.relu(norm @ self.first(x))
        return norm @ self.second(self.dropout(h))


def graph_convolution() -> Built:
    x, y = clusters(rows=128)
    x = x + torch.randn(x.shape, generator=random(42))
    chance = torch.where(y[:, None] == y, 0.15, 0.01)
    upper = torch.triu(torch.rand(128, 128, generator=random(43)) < chance, 1).float()
    adjacency = upper + upper.t() + torch.eye(128)
    return Setup(GCN(), CE, adam(1e-2)), [(x / x.std(), adjacency, y)]


class CBOW(nn.Module):
    """A word from the mean of its neighbours (Mikolov et al. 2013)."""

    def __init__(self, vocabulary: int = 100, dim: int = 32) -> None:
        super().__init__()
        self.embeddings = nn.EmbeddingBag(vocabulary, dim, mode="mean")
        self.linear = nn.Linear(dim, vocabulary)

    def forward(self, context: Tensor) -> Tensor:
        return self.linear(self.embeddings(context))


def word2vec() -> Built:
    context, word = words()
    return Setup(CBOW(), CE, adam(1e-2)), cut(64, context[:1024], word[:1024])


class Factorization(nn.Module):
    def __init__(self, users: int = 60, items: int = 40, dim: int = 8) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(users, dim), nn.Embedding(items, dim)
        self.user_bias, self.item_bias = nn.Embedding(users, 1), nn.Embedding(items, 1)
        for embedding in (self.user, self.item):
            nn.init.normal_(embedding.weight, std=0.1)
        for embedding in (self.user_bias, self.item_bias):
            nn.init.zeros_(embedding.weight)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        bias = self.user_bias(user) + self.item_bias(item)
        return (self.user(user) * self.item(item)).sum(1) + bias[:, 0]


def matrix_factorization() -> Built:
    tastes = torch.randn(60, 3, generator=random(44)) @ torch.randn(3, 40, generator=random(45)) / 3**0.5
    chosen = torch.randperm(2400, generator=random(46))[:1536]
    user, item = chosen // 40, chosen % 40
    return Setup(Factorization(), nn.MSELoss(), adam(2e-2)), cut(128, user, item, tastes[user, item])


class WideAndDeep(nn.Module):
    """Categories as embeddings beside numbers (Cheng et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, 8) for size in (12, 7))
        self.norm = nn.BatchNorm1d(16)
        self.deep, self.wide = mlp([32, 64, 32, 4]), nn.Linear(16, 4)

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        parts = [embedding(categories[:, i]) for i, embedding in enumerate(self.embeddings)]
        return self.deep(torch.cat([*parts, self.norm(numbers)], dim=1)) + self.wide(numbers)


def wide_and_deep() -> Built:
    x, y = clusters()
    categories = torch.stack([(3 * y + torch.randint(3, y.shape, generator=random(47))) % 12, y % 7], dim=1)
    return Setup(WideAndDeep(), CE, adamw(2e-3)), cut(64, categories, x, y)


class Flowing(nn.Module):
    """One small network, called again and again: Euler's steps of an ordinary differential equation."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(64, 32), nn.Linear(32, 10)
        self.speed = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        for _ in range(8):
            h = h + self.speed(h) / 8
        return self.out(h)


def neural_ode() -> Built:
    return Setup(Flowing(), CE, adam(3e-3)), cut(64, *flat_digits())


def half_precision_step(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    return F.cross_entropy(output.float(), y)


def half_precision() -> Built:
    hidden = [nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()]
    model = nn.Sequential(*hidden, nn.Linear(64, 10))
    return Setup(model, optimizer=adamw(3e-3), step=half_precision_step), cut(64, *flat_digits())


CASES = (
    Case(neural_ode, 100, 0.2),
    Case(half_precision, 100, 0.2),
    Case(logistic_regression, 100, 0.1),
    Case(binary_classifier, 150, 0.1),
    Case(multi_label, 150, 0.2),
    Case(ordinal, 150, 0.5),
    Case(imbalanced, 150, 0.3),
    Case(multi_task, 150, 0.3),
    Case(batchnorm_mlp, 100, 0.3),
    Case(deep_he_relu, 150, 0.2),
    Case(deep_orthogonal_tanh, 120, 0.3),
    Case(selu_network, 100, 0.2),
    Case(highway, 100, 0.5),
    Case(maxout, 100, 0.3),
    Case(parametrized, 100, 0.2),
    Case(half_bounded, 150, 0.2),
    Case(double_precision, 150, 0.2),
    Case(experts, 100, 0.2),
    Case(deep_sets, 200, 0.2),
    Case(graph_convolution, 100, 0.3),
    Case(word2vec, 200, 3.0),
    Case(matrix_factorization, 150, 0.1),
    Case(wide_and_deep, 100, 0.1),
)
