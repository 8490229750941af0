"""Sound setups with zeros on purpose, frozen parts, softmax within, or gradients turned round."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmend.setup import Batch, Setup
from healthy_data import (
    CE,
    Built,
    Case,
    adam,
    adamw,
    cut,
    digits,
    flat_digits,
    mlp,
    photos,
    random,
    sgd,
)


class ReZero(nn.Module):
    """Each branch begins at nothing (Bachlechner et al. 2021)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear, self.alpha = nn.Linear(dim, dim), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * F.relu(self.linear(x))


def rezero() -> Built:
    model = nn.Sequential(nn.Linear(64, 48), *(ReZero(48) for _ in range(24)), nn.Linear(48, 10))
    return Setup(model, CE, adam(3e-3)), cut(64, *flat_digits())


class Modulated(nn.Module):
    """Blocks scaled, shifted and gated by the condition, all of it zero at first (Peebles, Xie 2023)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(dim, elementwise_affine=False), mlp([dim, 2 * dim, dim], nn.GELU)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        nn.init.zeros_(self.modulation[1].weight)
        nn.init.zeros_(self.modulation[1].bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.label = nn.Linear(64, 64), nn.Embedding(10, 64)
        self.blocks, self.out = nn.ModuleList(Modulated(64) for _ in range(3)), nn.Linear(64, 64)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        h, condition = self.inner(x), self.label(label)
        for block in self.blocks:
            h = block(h, condition)
        return self.out(h)


def zero_modulation() -> Built:
    """Digits from noisy ones and their classes."""
    x, y = flat_digits()
    noisy = x + 2 * torch.randn(x.shape, generator=random(70))
    return Setup(Conditional(), nn.MSELoss(), adam(2e-3)), cut(64, noisy, y, x)


class VQVAE(nn.Module):
    """The nearest of some learnt vectors; the gradient goes straight past it (van den Oord et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp([64, 48, 32]), mlp([32, 48, 64])
        self.codebook = nn.Embedding(32, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x).view(-1, 8)
        nearest = torch.cdist(z, self.codebook.weight).argmin(1)
        q = self.codebook(nearest)
        commitment = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
        return self.decoder((z + (q - z).detach()).view(len(x), -1)), commitment


def vq_loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return F.mse_loss(output[0], target) + output[1]


def vq_vae() -> Built:
    x = flat_digits()[0]
    return Setup(VQVAE(), vq_loss, adam(5e-3)), cut(64, x, x)


class SpatialSoftmax(nn.Module):
    """Where each channel is strongest: softmax over places, and the mean place (Levine et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.temperature, self.head = nn.Parameter(torch.ones(())), mlp([32, 48, 2])
        line = torch.linspace(-1, 1, 12)
        self.register_buffer("grid", torch.cartesian_prod(line, line))

    def forward(self, x: Tensor) -> Tensor:
        weights = F.softmax(self.conv(x).flatten(2) / self.temperature, dim=-1)
        return self.head((weights @ self.grid).flatten(1))


def spatial_softmax() -> Built:
    """Where a bright spot is."""
    place = 1.6 * torch.rand(256, 2, generator=random(71)) - 0.8
    line = torch.linspace(-1, 1, 12)
    rows, columns = ((line - place[:, i, None]) ** 2 for i in (0, 1))
    x = torch.exp(-10 * (rows[:, :, None] + columns[:, None, :]))[:, None]
    x = (x - x.mean()) / x.std() + 0.1 * torch.randn(x.shape, generator=random(72))
    return Setup(SpatialSoftmax(), nn.MSELoss(), adam(5e-3)), cut(32, x, place / place.std())


class TopicModel(nn.Module):
    """Shares of topics, by a softmax, make the words (Srivastava, Sutton 2017)."""

    def __init__(self, vocabulary: int = 150, topics: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(vocabulary, 48), nn.Softplus(), nn.Linear(48, 2 * topics))
        self.decoder, self.norm = nn.Linear(topics, vocabulary, bias=False), nn.BatchNorm1d(vocabulary)

    def forward(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.encoder(torch.log1p(counts)).chunk(2, dim=1)
        shares = F.softmax(mean + torch.randn_like(mean) * torch.exp(0.5 * logvar), dim=1)
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(1).mean()
        return F.log_softmax(self.norm(self.decoder(shares)), dim=1), divergence


def likelihood(output: tuple[Tensor, Tensor], counts: Tensor) -> Tensor:
    logs, divergence = output
    return (-(counts * logs).sum(1).mean() + divergence) / 20


def topic_model() -> Built:
    topics = torch.distributions.Dirichlet(torch.full((150,), 0.05)).sample((8,))
    shares = torch.distributions.Dirichlet(torch.full((8,), 0.2)).sample((512,))
    counts = torch.distributions.Multinomial(60, shares @ topics).sample()
    return Setup(TopicModel(), likelihood, adam(5e-3)), cut(64, counts, counts)


def sparse_step(model: nn.Module, batch: Batch) -> Tensor:
    (x,) = batch
    code = F.relu(model[0](x))
    return F.mse_loss(model[1](code), x) + 1e-2 * code.mean()


def sparse_autoencoder() -> Built:
    """More units than inputs, few of them active at a time."""
    model = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64))
    return Setup(model, optimizer=adam(2e-3), step=sparse_step), cut(64, flat_digits()[0])


class BYOL(nn.Module):
    """Predicts what a frozen copy says of another view; the loss is a negative cosine (Grill et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.predictor = mlp([32, 32, 32])


def byol_step(model: nn.Module, batch: Batch) -> Tensor:
    (x,) = batch
    a, b = (x + 0.3 * torch.randn_like(x) for _ in range(2))
    with torch.no_grad():
        wanted = model.target(b)
    return 2 - 2 * F.cosine_similarity(model.predictor(model.online(a)), wanted).mean()


def byol() -> Built:
    return Setup(BYOL(), optimizer=adam(2e-3), step=byol_step), cut(64, flat_digits()[0])


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return -0.3 * gradient


class DomainAdversarial(nn.Module):
    """The features shall not tell the domain: its gradient is turned round (Ganin, Lempitsky 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.label, self.domain = nn.Linear(64, 10), mlp([64, 32, 2])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.features(x)
        return self.label(h), self.domain(Reverse.apply(h))


def both_domains(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return F.cross_entropy(output[0], target[:, 0]) + F.cross_entropy(output[1], target[:, 1])


def gradient_reversal() -> Built:
    x, y = flat_digits()
    domain = torch.arange(len(x)) % 2
    x = torch.where(domain[:, None] == 1, 0.7 * x + 0.3, x)
    return Setup(DomainAdversarial(), both_domains, adam(2e-3)), cut(64, x, torch.stack([y, domain], 1))


class Reservoir(nn.Module):
    """Only the read-out learns (Jaeger 2001)."""

    def __init__(self, units: int = 100) -> None:
        super().__init__()
        self.register_buffer("inner", torch.randn(8, units) / 3)
        recurrent = torch.randn(units, units)
        self.register_buffer("recurrent", 0.9 * recurrent / torch.linalg.eigvals(recurrent).abs().max())
        self.out = nn.Linear(units, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.recurrent.size(0))
        for t in range(x.size(2)):
            h = torch.tanh(x[:, 0, t] @ self.inner + h @ self.recurrent)
        return self.out(h)


def reservoir() -> Built:
    return Setup(Reservoir(), CE, adam(1e-2)), cut(64, *digits())


class DropPath(nn.Module):
    """Blocks are left out at random, for a whole batch at a time (Huang et al. 2016)."""

    def __init__(self, channels: int, p: float) -> None:
        super().__init__()
        self.conv, self.norm, self.p = (
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            p,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()).item() < self.p:
            return x
        return x + F.relu(self.norm(self.conv(x)))


def stochastic_depth() -> Built:
    blocks = [DropPath(16, 0.05 * i) for i in range(8)]
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), *blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return Setup(model.append(nn.Linear(64, 10)), CE, adamw(3e-3)), cut(32, *photos(12, 128))


def sparse_embedding() -> Built:
    """A large table of which a batch reads few rows, with gradients of those rows only."""
    x, y = flat_digits()
    codes = ((x > 0).long() * 2 + (x > 1).long()) + 4 * torch.arange(64)
    model = nn.Sequential(nn.EmbeddingBag(256, 10, mode="sum", sparse=True))
    return Setup(model, CE, partial(torch.optim.SparseAdam, lr=2e-2)), cut(64, codes, y)


def wide_network() -> Built:
    """All rows in one batch, and a layer so wide that its weights hardly move."""
    model = mlp([64, 1024, 10])
    return Setup(model, CE, sgd(0.02, 0.9)), [flat_digits()]


CASES = (
    Case(rezero, 80, 0.4),
    Case(zero_modulation, 120, 0.5),
    Case(vq_vae, 200, 0.7),
    Case(spatial_softmax, 150, 0.1),
    Case(topic_model, 150, 14.0),
    Case(sparse_autoencoder, 150, 0.1),
    Case(byol, 150, 1.0),
    Case(gradient_reversal, 150, 1.5),
    Case(reservoir, 150, 0.5),
    Case(stochastic_depth, 70, 0.8),
    Case(sparse_embedding, 150, 0.5),
    Case(wide_network, 100, 0.3),
)
