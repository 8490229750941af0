"""Sound setups that fit functions: regressions, fields, equations, and copies of other networks."""

from __future__ import annotations

import copy
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

from gradmend.setup import Batch, Setup
from healthy_data import (
    CE,
    Built,
    Case,
    adam,
    clusters,
    cut,
    flat_digits,
    mlp,
    random,
    sgd,
    surface,
    table,
)


def linear_regression() -> Built:
    x, _ = clusters()
    y = x @ torch.randn(16, 1, generator=random(30)) / 4 + 0.1 * torch.randn(len(x), 1, generator=random(31))
    return Setup(nn.Linear(16, 1), nn.MSELoss(), sgd(0.05)), cut(64, x, y)


def diabetes_regression() -> Built:
    setup = Setup(mlp([10, 32, 32, 1]), nn.MSELoss(), adam(3e-3), partial(ExponentialLR, gamma=0.99))
    return setup, cut(34, *table("diabetes"))


def surface_regression() -> Built:
    return Setup(mlp([2, 64, 64, 1], nn.Tanh), nn.HuberLoss(), adam(1e-2)), cut(128, *surface())


def pinball(output: Tensor, target: Tensor) -> Tensor:
    """The loss of the quantiles 0.1, 0.5, 0.9 (Koenker, Bassett 1978)."""
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    error = target - output
    return torch.maximum(quantiles * error, (quantiles - 1) * error).mean()


def quantile_regression() -> Built:
    x, y = surface()
    y = y + (0.1 + 0.2 * x[:, :1].abs()) * torch.randn(y.shape, generator=random(32))
    return Setup(mlp([2, 64, 64, 3]), pinball, adam(5e-3)), cut(128, x, y)


def poisson_regression() -> Built:
    x, _ = clusters()
    rate = torch.exp(0.6 * x[:, :1] + 0.4 * x[:, 1:2] + 0.5)
    counts = torch.poisson(rate, generator=random(33))
    return Setup(mlp([16, 32, 1], nn.Softplus), nn.PoissonNLLLoss(), adam(5e-3)), cut(64, x, counts)


def mixture(output: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood of a mixture of three normals (Bishop 1994)."""
    logits, means, logs = output.chunk(3, dim=1)
    normal = -0.5 * ((target - means) / logs.exp()).square() - logs - 0.919
    return -torch.logsumexp(F.log_softmax(logits, 1) + normal, dim=1).mean()


def mixture_density() -> Built:
    x, y = surface()
    sign = torch.randint(2, y.shape, generator=random(34)) * 2 - 1
    y = sign * (1 + 0.5 * y) + 0.1 * torch.randn(y.shape, generator=random(35))
    return Setup(mlp([2, 64, 9], nn.Tanh), mixture, adam(1e-2)), cut(128, x, y)


class RBF(nn.Module):
    """Gaussian bumps around learnt centres."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(2 * torch.rand(units, inputs) - 1)
        self.log_width = nn.Parameter(torch.full((units,), -1.0))
        self.out = nn.Linear(units, 1)

    def forward(self, x: Tensor) -> Tensor:
        squares = (x[:, None] - self.centres).square().sum(-1)
        return self.out(torch.exp(-squares / (2 * self.log_width.exp() ** 2)))


def rbf_network() -> Built:
    return Setup(RBF(2, 48), nn.MSELoss(), adam(2e-2)), cut(128, *surface())


class KAN(nn.Module):
    """Each edge has its own curve, a sum of Chebyshev polynomials of the squashed input (Liu et al. 2024)."""

    def __init__(self, inputs: int, outputs: int, degree: int = 5) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(
            torch.randn(inputs, outputs, degree + 1) / (inputs * (degree + 1)) ** 0.5
        )
        self.register_buffer("orders", torch.arange(degree + 1))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.acos(torch.tanh(x).clamp(-0.999, 0.999))
        return torch.einsum("bid,iod->bo", torch.cos(angles[..., None] * self.orders), self.coefficients)


def kan() -> Built:
    return Setup(nn.Sequential(KAN(2, 12), KAN(12, 1)), nn.MSELoss(), adam(2e-2)), cut(128, *surface())


class Distilled(nn.Module):
    """A student and the frozen teacher that it copies."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).requires_grad_(False)
        self.student = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        for layer in (self.teacher[0], self.teacher[2]):
            nn.init.kaiming_normal_(layer.weight)


def distillation_step(model: nn.Module, batch: Batch) -> Tensor:
    (x,) = batch
    with torch.no_grad():
        wanted = F.log_softmax(model.teacher(x), dim=1)
    return F.kl_div(F.log_softmax(model.student(x), 1), wanted, log_target=True, reduction="batchmean")


def distillation() -> Built:
    return Setup(Distilled(), optimizer=adam(5e-3), step=distillation_step), cut(64, flat_digits()[0])


class DQN(nn.Module):
    """Values of two actions, and a frozen copy that the targets come from."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Sequential(
            nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
        )
        self.target = copy.deepcopy(self.online).requires_grad_(False)


def temporal_difference(model: nn.Module, batch: Batch) -> Tensor:
    state, action, reward, following = batch
    value = model.online(state).gather(1, action[:, None])[:, 0]
    with torch.no_grad():
        wanted = reward + 0.9 * model.target(following).amax(1)
    return F.smooth_l1_loss(value, wanted)


def deep_q() -> Built:
    state = torch.randn(512, 4, generator=random(25))
    action = torch.randint(2, (512,), generator=random(26))
    reward = torch.tanh(state[:, 0] * (2.0 * action - 1) + state[:, 1])
    following = 0.8 * state + 0.3 * action[:, None]
    batches = cut(64, state, action, reward, following)
    return Setup(DQN(), optimizer=adam(2e-3), step=temporal_difference), batches


class LoRA(nn.Module):
    """A frozen layer with a trained product of low rank beside it; the second factor begins at zero."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.empty(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b) * 2


def lora() -> Built:
    """Clusters are learnt; then the same with their classes exchanged, by additions of low rank only."""
    x, y = clusters()
    layers = [nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 4)]
    before = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    optimizer = torch.optim.Adam(before.parameters(), lr=3e-3)
    for inputs, target in 6 * cut(64, x, y):
        optimizer.zero_grad()
        CE(before(inputs), target).backward()
        optimizer.step()
    before.zero_grad()
    model = nn.Sequential(LoRA(layers[0]), nn.ReLU(), LoRA(layers[1]), nn.ReLU(), LoRA(layers[2]))
    return Setup(model, CE, adam(5e-3)), cut(64, x, (y + 1) % 4)


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def residual_of_equation(model: nn.Module, batch: Batch) -> Tensor:
    """u'' + u = 0, u(0) = 0, u'(0) = 1, whose solution is the sine (Raissi et al. 2019)."""
    x = batch[0].requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    start = torch.zeros(1, 1, requires_grad=True)
    value = model(start)
    (speed,) = torch.autograd.grad(value.sum(), start, create_graph=True)
    return (curvature + u).square().mean() + value.square().mean() + (speed - 1).square().mean()


def physics_informed() -> Built:
    x = 4 * torch.rand(256, 1, generator=random(27)) - 2
    return Setup(Field(), optimizer=adam(5e-3), step=residual_of_equation), cut(64, x)


class Sine(nn.Module):
    """A sine layer with the initialization of Sitzmann et al. 2020."""

    def __init__(self, inputs: int, outputs: int, first: bool = False, omega: float = 10.0) -> None:
        super().__init__()
        self.omega, self.linear = omega, nn.Linear(inputs, outputs)
        bound = 1 / inputs if first else math.sqrt(6 / inputs) / omega
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.omega * self.linear(x))


def siren() -> Built:
    last = nn.Linear(64, 1)
    nn.init.uniform_(last.weight, -math.sqrt(6 / 64) / 10, math.sqrt(6 / 64) / 10)
    model = nn.Sequential(Sine(2, 64, first=True), Sine(64, 64), Sine(64, 64), last)
    return Setup(model, nn.MSELoss(), adam(1e-3)), cut(128, *surface())


class Fourier(nn.Module):
    """Random features of coordinates (Tancik et al. 2020)."""

    def __init__(self, features: int = 32) -> None:
        super().__init__()
        self.register_buffer("b", torch.randn(2, features))

    def forward(self, x: Tensor) -> Tensor:
        angles = 2 * math.pi * x @ self.b
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def fourier_features() -> Built:
    model = nn.Sequential(
        Fourier(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    return Setup(model, nn.MSELoss(), adam(2e-3)), cut(128, *surface())


CASES = (
    Case(distillation, 150, 0.1),
    Case(deep_q, 150, 0.05),
    Case(lora, 150, 0.3),
    Case(physics_informed, 200, 0.1),
    Case(siren, 150, 0.02),
    Case(fourier_features, 200, 0.05),
    Case(linear_regression, 150, 0.02),
    Case(diabetes_regression, 150, 0.55),
    Case(surface_regression, 250, 0.05),
    Case(quantile_regression, 200, 0.12),
    Case(poisson_regression, 150, 0.2),
    Case(mixture_density, 250, 1.0),
    Case(rbf_network, 150, 0.05),
    Case(kan, 150, 0.05),
)
