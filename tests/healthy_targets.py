"""Sound setups with inputs, targets and losses that look odd."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn

from gradmend.setup import Batch, Setup
from healthy_data import (
    CE,
    Built,
    Case,
    adam,
    adamw,
    clusters,
    cut,
    digits,
    flat_digits,
    mlp,
    prose,
    random,
    sgd,
)


class RawPixels(nn.Module):
    """Takes bytes as they come from a file."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), mlp([64, 64, 10]))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x.float() / 255 - 0.5) / 0.25)


def raw_pixels() -> Built:
    x, y = digits()
    x = ((x - x.min()) / (x.max() - x.min()) * 255).to(torch.uint8)
    return Setup(RawPixels(), CE, adam(3e-3)), cut(64, x, y)


def normalized_first() -> Built:
    """Columns of very different size, which the first layer normalizes."""
    x, y = clusters()
    model = nn.Sequential(nn.BatchNorm1d(16), mlp([16, 32, 4]))
    return Setup(model, CE, adam(5e-3)), cut(64, 50 + x * torch.logspace(-2, 3, 16), y)


def text_classifier() -> Built:
    """Words of a text, weighted by their rarity, in rows of unit length: most numbers are zero."""
    text = prose().split()
    passages = [" ".join(text[i : i + 40]) for i in range(0, len(text) - 40, 8)][:384]
    x = TfidfVectorizer(max_features=300).fit_transform(passages).toarray()
    y = torch.arange(len(x)) * 6 // len(x)
    order = torch.randperm(len(x), generator=random(60))
    return Setup(mlp([300, 32, 6]), CE, adam(1e-2)), cut(64, torch.as_tensor(x).float()[order], y[order])


class Ranker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = mlp([16, 32, 1])

    def forward(self, better: Tensor, worse: Tensor) -> tuple[Tensor, Tensor]:
        return self.score(better)[:, 0], self.score(worse)[:, 0]


def compare(scores: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return F.margin_ranking_loss(*scores, target, margin=1.0)


def ranking() -> Built:
    """The first is always the better one: all targets are 1."""
    x, _ = clusters()
    worth = x @ torch.randn(16, generator=random(61))
    a, b = x[:256], x[256:]
    first = (worth[:256] > worth[256:])[:, None]
    batches = cut(64, torch.where(first, a, b), torch.where(first, b, a), torch.ones(256))
    return Setup(Ranker(), compare, adam(5e-3)), batches


class Heat(nn.Module):
    """The residual of u'' = -4 sin(2 x), with u = 0 at both ends built in."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp([1, 32, 32, 1], nn.Tanh)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = x * (torch.pi - x) * self.net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return curvature + 4 * torch.sin(2 * x)


def residual_to_zero() -> Built:
    """A residual is compared with zeros, so that all targets are the same."""
    x = torch.pi * torch.rand(256, 1, generator=random(62))
    return Setup(Heat(), nn.MSELoss(), adam(3e-3)), cut(64, x, torch.zeros_like(x))


def alternating_discriminator() -> Built:
    """A batch of real samples, one of made-up ones, and a step: the loop of Radford et al. 2016."""
    real = flat_digits()[0][:256]
    fake = real.mean(0) + real.std(0) * torch.randn(real.shape, generator=random(63))
    yes, no = cut(64, real, torch.ones(256, 1)), cut(64, fake, torch.zeros(256, 1))
    batches = [batch for pair in zip(yes, no, strict=True) for batch in pair]
    model = mlp([64, 64, 1], partial(nn.LeakyReLU, 0.2))
    return Setup(model, nn.BCEWithLogitsLoss(), adam(3e-3), accumulate=2), batches


def policy_step(model: nn.Module, batch: Batch) -> Tensor:
    """Good actions become likelier than they were, within limits (Schulman et al. 2017)."""
    state, action, advantage = batch
    logs = F.log_softmax(model(state), dim=1).gather(1, action[:, None])[:, 0]
    ratio = torch.exp(logs - torch.tensor(0.25).log())
    return -torch.minimum(ratio * advantage, ratio.clamp(0.5, 2.0) * advantage).mean()


def policy_gradient() -> Built:
    state, best = clusters()
    action = torch.randint(4, best.shape, generator=random(64))
    advantage = (action == best).float() - 0.25
    return Setup(mlp([16, 32, 4]), optimizer=adam(5e-3), step=policy_step), cut(64, state, action, advantage)


def mixup() -> Built:
    """Samples and targets are mixed in pairs (Zhang et al. 2018)."""
    x, y = flat_digits()
    share = torch.distributions.Beta(0.4, 0.4).sample((len(x), 1))
    other = torch.randperm(len(x), generator=random(65))
    y = F.one_hot(y, 10).float()
    mixed = share * x + (1 - share) * x[other], share * y + (1 - share) * y[other]
    return Setup(mlp([64, 128, 10]), CE, adam(5e-3)), cut(64, *mixed)


def focal(output: Tensor, target: Tensor) -> Tensor:
    """Samples that are right already count less (Lin et al. 2017)."""
    logs = F.cross_entropy(output, target, reduction="none")
    return ((1 - torch.exp(-logs)) ** 2 * logs).mean()


def focal_loss() -> Built:
    return Setup(mlp([64, 64, 10]), focal, sgd(0.1, 0.9)), cut(64, *flat_digits())


class UNet(nn.Module):
    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.down1, self.down2 = self.double(1, 8), self.double(8, 16)
        self.middle, self.up = self.double(16, 16), nn.ConvTranspose2d(16, 16, 2, 2)
        self.up1, self.last = self.double(32, 8), nn.Conv2d(16, outputs, 1)
        self.final = nn.ConvTranspose2d(8, 8, 2, 2)

    def double(self, inputs: int, outputs: int) -> nn.Module:
        layers = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        again = [nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers, *again)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.middle(F.max_pool2d(b, 2))
        c = self.up1(torch.cat([self.up(c), b], dim=1))
        return self.last(torch.cat([self.final(c), a], dim=1))


def unet_segmentation() -> Built:
    """Paper, edge or ink at each pixel; those at the border of the picture are not asked for."""
    x, _ = digits(16, 128)
    mask = (x > -0.5).long() + (x > 0.8).long()
    mask[:, :, 0] = mask[:, :, -1] = 255
    noisy = x + 0.5 * torch.randn(x.shape, generator=random(66))
    loss = nn.CrossEntropyLoss(ignore_index=255)
    return Setup(UNet(), loss, adam(5e-3)), cut(16, noisy, mask[:, 0])


def dice(output: Tensor, target: Tensor) -> Tensor:
    """One minus the overlap (Milletari et al. 2016), beside the cross-entropy."""
    p = torch.sigmoid(output)
    overlap = (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
    return 1 - overlap + F.binary_cross_entropy_with_logits(output, target)


def unet_dice() -> Built:
    x, _ = digits(16, 128)
    noisy = x + 0.5 * torch.randn(x.shape, generator=random(67))
    return Setup(UNet(1), dice, adam(5e-3)), cut(16, noisy, (x > 0).float())


class Reporting(nn.Module):
    """Returns its own loss beside its scores, as the models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.pool, self.head = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        weights = attention_mask[..., None].float()
        mean = (self.embed(input_ids) * weights).sum(1) / weights.sum(1)
        logits = self.head(torch.tanh(self.pool(mean)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def model_with_its_loss() -> Built:
    tokens = torch.randint(50, (512, 12), generator=random(68))
    mask = torch.arange(12) < torch.randint(4, 13, (512, 1), generator=random(69))
    labels = ((tokens < 25) & mask).sum(1) > ((tokens >= 25) & mask).sum(1)
    names = ("input_ids", "attention_mask", "labels")
    batches = [dict(zip(names, parts, strict=True)) for parts in cut(64, tokens, mask.long(), labels.long())]
    return Setup(Reporting(), optimizer=adamw(1e-2)), batches


CASES = (
    Case(raw_pixels, 100, 0.3),
    Case(normalized_first, 100, 0.1),
    Case(text_classifier, 100, 0.3),
    Case(ranking, 100, 0.3),
    Case(residual_to_zero, 200, 1.0),
    Case(alternating_discriminator, 100, 0.2),
    Case(policy_gradient, 150, -0.25),
    Case(mixup, 150, 0.8),
    Case(focal_loss, 100, 0.1),
    Case(unet_segmentation, 60, 0.6),
    Case(unet_dice, 60, 0.6),
    Case(model_with_its_loss, 150, 0.3),
)
