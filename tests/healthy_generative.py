"""Sound autoencoders, generators, critics, and setups that learn from pairs."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gradmend.setup import Batch, Setup
from healthy_data import (
    Built,
    Case,
    adam,
    adamw,
    cut,
    digits,
    flat_digits,
    random,
)


def autoencoder() -> Built:
    encoder = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16))
    decoder = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 64))
    x = flat_digits()[0]
    return Setup(nn.Sequential(encoder, decoder), nn.MSELoss(), adam(3e-3)), cut(64, x, x)


def convolutional_autoencoder() -> Built:
    encoder = [nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()]
    middle = [nn.Flatten(), nn.Linear(512, 32), nn.Linear(32, 512), nn.ReLU(), nn.Unflatten(1, (32, 4, 4))]
    decoder = [nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1)]
    x, _ = digits(16)
    return Setup(nn.Sequential(*encoder, *middle, *decoder), nn.MSELoss(), adam(2e-3)), cut(32, x, x)


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(24, 64))
        self.hidden_bias, self.visible_bias = nn.Parameter(torch.zeros(24)), nn.Parameter(torch.zeros(64))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(F.linear(x, self.weight, self.hidden_bias))
        return F.linear(hidden, self.weight.t(), self.visible_bias)


def tied_autoencoder() -> Built:
    x = flat_digits()[0]
    return Setup(TiedAutoencoder(), nn.MSELoss(), adam(5e-3)), cut(64, x, x)


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(64, 64), nn.Linear(64, 8), nn.Linear(64, 8)
        self.fc3, self.fc4 = nn.Linear(8, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.relu(self.fc1(x))
        mean, logvar = self.fc21(h), self.fc22(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), mean, logvar


def vae_step(model: nn.Module, batch: Batch) -> Tensor:
    (x,) = batch
    again, mean, logvar = model(x)
    likelihood = F.binary_cross_entropy(again, x, reduction="sum")
    divergence = -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())
    return (likelihood + divergence) / len(x)


def vae() -> Built:
    x = flat_digits()[0]
    x = (x - x.min()) / (x.max() - x.min())
    return Setup(VAE(), optimizer=adam(3e-3), step=vae_step), cut(64, x)


def discriminator_step(model: nn.Module, batch: Batch) -> Tensor:
    real, fake = batch
    wanted = torch.ones(len(real), 1)
    loss = F.binary_cross_entropy_with_logits
    return loss(model(real), wanted) + loss(model(fake), torch.zeros_like(wanted))


def gan_discriminator() -> Built:
    """Real digits against those of a generator that has learnt their means and deviations only."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [spectral_norm(nn.Conv2d(inputs, outputs, 4, 2, 1)), nn.LeakyReLU(0.2, inplace=True)]

    model = nn.Sequential(*block(1, 16), *block(16, 32), nn.Flatten(), spectral_norm(nn.Linear(512, 1)))
    real, _ = digits(16)
    fake = real.mean(0) + real.std(0) * torch.randn(real.shape, generator=random(20))
    optimizer = partial(torch.optim.Adam, lr=2e-3, betas=(0.5, 0.999))
    return Setup(model, optimizer=optimizer, step=discriminator_step), cut(32, real, fake)


def critic_step(model: nn.Module, batch: Batch) -> Tensor:
    """Wasserstein distance with a penalty on the gradient (Gulrajani et al. 2017)."""
    real, fake = batch
    share = torch.rand(len(real), 1)
    between = (share * real + (1 - share) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
    return model(fake).mean() - model(real).mean() + 10 * (slope.norm(dim=1) - 1).square().mean()


def wasserstein_critic() -> Built:
    real = flat_digits()[0]
    fake = torch.randn(real.shape, generator=random(21))
    hidden = [nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2)]
    optimizer = partial(torch.optim.Adam, lr=1e-3, betas=(0.5, 0.9))
    return Setup(nn.Sequential(*hidden, nn.Linear(64, 1)), optimizer=optimizer, step=critic_step), cut(
        64, real, fake
    )


class Denoiser(nn.Module):
    """Tells the noise in a digit, knowing how much there is; its last layer begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 128))
        self.inner = nn.Linear(64, 128)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 128), nn.SiLU()) for _ in range(3)
        )
        self.out = nn.Linear(128, 64)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(100.0) * torch.arange(8) / 8) * 10
        angles = t[:, None] * frequencies
        h = self.inner(x) + self.time(torch.cat([angles.sin(), angles.cos()], 1))
        for block in self.blocks:
            h = h + block(h)
        return self.out(h)


def diffusion_step(model: nn.Module, batch: Batch) -> Tensor:
    (x,) = batch
    t = torch.rand(len(x))
    signal = torch.cos(t * math.pi / 2)[:, None]
    noise = torch.randn_like(x)
    return F.mse_loss(model(signal * x + (1 - signal**2).sqrt() * noise, t), noise)


def diffusion() -> Built:
    return Setup(Denoiser(), optimizer=adamw(2e-3), step=diffusion_step), cut(64, flat_digits()[0])


class Coupling(nn.Module):
    """Half of the numbers scale and shift the other half; begins as the identity (Dinh et al. 2017)."""

    def __init__(self, dim: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.net = nn.Sequential(
            nn.Linear(dim // 2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, dim)
        )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, dim=1) if self.first else x.chunk(2, dim=1)[::-1]
        scale, shift = self.net(a).chunk(2, dim=1)
        scale = torch.tanh(scale)
        b = b * scale.exp() + shift
        return torch.cat([a, b] if self.first else [b, a], dim=1), scale.sum(1)


class Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Coupling(4, i % 2 == 0) for i in range(6))

    def forward(self, x: Tensor) -> Tensor:
        """The negative log-likelihood, averaged over batch and features."""
        logs = torch.zeros(len(x))
        for layer in self.layers:
            x, log = layer(x)
            logs = logs + log
        return (0.5 * x.square().sum(1) + 2 * math.log(2 * math.pi) - logs).mean() / 4


def flow_step(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch[0])


def normalizing_flow() -> Built:
    x = torch.randn(512, 4, generator=random(22))
    x[:, 1] = 0.2 * x[:, 1] + x[:, 0] ** 2
    x[:, 3] = 0.2 * x[:, 3] + torch.sin(2 * x[:, 2])
    x = (x - x.mean(0)) / x.std(0)
    return Setup(Flow(), optimizer=adam(3e-3), step=flow_step), cut(64, x)


def encoder(outputs: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, outputs))


def contrastive_step(model: nn.Module, batch: Batch) -> Tensor:
    """InfoNCE of two noisy views, at temperature 0.2 (van den Oord et al. 2018; Chen et al. 2020)."""
    (x,) = batch
    a, b = (F.normalize(model(x + 0.3 * torch.randn_like(x)), dim=1) for _ in range(2))
    return F.cross_entropy(a @ b.t() / 0.2, torch.arange(len(x)))


def contrastive() -> Built:
    return Setup(encoder(), optimizer=adam(2e-3), step=contrastive_step), cut(64, flat_digits()[0])


def siamese_step(model: nn.Module, batch: Batch) -> Tensor:
    """Contrastive loss with a margin (Hadsell, Chopra, LeCun 2006)."""
    a, b, same = batch
    distance = F.pairwise_distance(model(a), model(b))
    return (same * distance.square() + (1 - same) * F.relu(1 - distance).square()).mean()


def siamese() -> Built:
    x, y = flat_digits()
    mixed = torch.randperm(len(x), generator=random(23))
    near = torch.stack(
        [torch.where((y == label) & (torch.arange(len(y)) != i))[0][0] for i, label in enumerate(y)]
    )
    partner = torch.where(torch.arange(len(x)) % 2 == 0, near, mixed)
    return Setup(encoder(8), optimizer=adam(1e-3), step=siamese_step), cut(
        64, x, x[partner], (y == y[partner]).float()
    )


def triplet_step(model: nn.Module, batch: Batch) -> Tensor:
    return F.triplet_margin_loss(*(model(x) for x in batch))


def triplet() -> Built:
    x, y = flat_digits()
    other = torch.randperm(len(x), generator=random(24))
    near = torch.stack([torch.where(y == label)[0][0] for label in y])
    apart = y != y[other]
    return Setup(encoder(), optimizer=adam(1e-3), step=triplet_step), cut(
        64, x[apart], x[near][apart], x[other][apart]
    )


CASES = (
    Case(autoencoder, 200, 0.4),
    Case(convolutional_autoencoder, 100, 0.3),
    Case(tied_autoencoder, 150, 0.3),
    Case(vae, 200, 27.0),
    Case(gan_discriminator, 100, 0.4),
    Case(wasserstein_critic, 150, -2.0),
    Case(diffusion, 200, 0.6),
    Case(normalizing_flow, 200, 1.1),
    Case(contrastive, 150, 1.5),
    Case(siamese, 150, 0.1),
    Case(triplet, 100, 0.1),
)
