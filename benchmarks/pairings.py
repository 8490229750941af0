"""What `diagnose` and `mend` make of losses, last activations and targets that do not belong together.

All pairings of them on one small task that is easy to learn, of which every fourth is taken.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import cycle, islice, product
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.amounts import SHARE, Repair
from benchmarks.timing import Row
from gradmend import Budget, Setup, mend
from gradmend.errors import GradmendError
from gradmend.layers import After, Rescale
from gradmend.setup import Batch, LossFn
from gradmend.training import train

EVERY, ROWS, UNSEEN, STEPS, TRIAL = 4, 32, 400, 600, 200


def _clipped(p: Tensor) -> Tensor:
    return p.clamp(1e-7, 1 - 1e-7)


def _shares(z: Tensor) -> Tensor:
    return _clipped(z / z.sum(-1, keepdim=True))


def _divergence(p: Tensor, y: Tensor) -> Tensor:
    y, p = y.clamp(1e-7, 1), p.clamp(1e-7, 1)
    return (y * (y / p).log()).sum(-1).mean()


LOSSES: Mapping[str, LossFn] = {
    "squared": nn.MSELoss(),
    "absolute": nn.L1Loss(),
    "Huber": nn.HuberLoss(),
    "log cosh": lambda z, y: (z - y).cosh().log().mean(),
    "percent": lambda z, y: 100 * ((z - y) / y.abs().clamp(min=1e-7)).abs().mean(),
    "squared share": lambda z, y: ((z - y) / y.abs().clamp(min=1e-7)).square().mean(),
    "logarithms": lambda z, y: (z.clamp(min=0).log1p() - y.log1p()).square().mean(),
    "Poisson": nn.PoissonNLLLoss(),
    "cosine": lambda z, y: -F.cosine_similarity(z, y).mean(),
    "hinge": lambda z, y: (1 - z * y).clamp(min=0).mean(),
    "hinge of classes": lambda z, y: (((1 - y) * z).amax(-1) - (y * z).sum(-1) + 1).clamp(min=0).mean(),
    "binary cross-entropy": lambda p, y: -(y * _clipped(p).log() + (1 - y) * (1 - _clipped(p)).log()).mean(),
    "binary cross-entropy of scores": nn.BCEWithLogitsLoss(),
    "cross-entropy": lambda z, y: -(y * _shares(z).log()).sum(-1).mean(),
    "cross-entropy of numbers": lambda z, y: F.nll_loss(_shares(z).log(), y.long().flatten()),
    "cross-entropy of scores": nn.CrossEntropyLoss(),
    "cross-entropy of scores by hand": lambda z, y: -(y * z.log_softmax(-1)).sum(-1).mean(),
    "likelihood": nn.NLLLoss(),
    "divergence": _divergence,
}
ENDS: Mapping[str, Callable[[], nn.Module]] = {
    "scores": nn.Identity,
    "softmax": partial(nn.Softmax, dim=-1),
    "log softmax": partial(nn.LogSoftmax, dim=-1),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "ReLU": nn.ReLU,
}


@dataclass(frozen=True)
class Task:
    """What is to be learnt: inputs and targets, how many units these ask for, and how it is set well.

    Args:
        loss: the right one, on raw outputs.
        score: of outputs and targets, at most 1; near 0 for a constant.
    """

    x: Tensor
    y: Tensor
    units: int
    loss: LossFn
    score: Callable[[Tensor, Tensor], float]

    @property
    def batches(self) -> list[Batch]:
        """Of the rows that are seen."""
        return list(zip(self.x[:-UNSEEN].split(ROWS), self.y[:-UNSEEN].split(ROWS), strict=True))

    @cached_property
    def well(self) -> float:
        """What a well-set network reaches."""
        amounts = self.y.is_floating_point() and self.y.std() > 1
        scaled = Rescale(self.y.std(), self.y.mean()) if amounts else nn.Identity()
        return self.reached(Setup(After(_network(self.units), scaled), self.loss, ADAM))

    def reached(self, setup: Setup) -> float:
        """The score on unseen rows after all steps."""
        trained = setup.copy()
        train(trained, cycle(self.batches), steps=STEPS, seed=0, device="cpu")
        with torch.no_grad():
            return self.score(trained.model.eval()(self.x[-UNSEEN:]), self.y[-UNSEEN:])


ADAM = partial(torch.optim.Adam, lr=3e-3)


def _network(units: int, end: Callable[[], nn.Module] = nn.Identity) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, units), end())


def _over_chance(right: Tensor, labels: Tensor) -> float:
    chance = labels.bincount().max() / len(labels)
    return float((right.float().mean() - chance) / (1 - chance))


def _of_classes(labels: Callable[[Tensor], Tensor], z: Tensor, y: Tensor) -> float:
    """The accuracy: of the largest unit, of one unit beside 0 or 1/2, or of one that gives numbers."""
    known = labels(y).flatten().long()
    if z.dim() > 1 and z.shape[-1] > 1:
        return _over_chance(z.argmax(-1) == known, known)
    z = z.flatten()
    cuts = [z > 0, z > 0.5] if known.max() == 1 else [z.round()]
    return max(_over_chance(cut.long() == known, known) for cut in cuts)


def _of_amounts(z: Tensor, y: Tensor) -> float:
    """R² of outputs, of their sigmoid or of their exponential, as losses may take them."""
    if z.numel() != y.numel():
        return -1.0
    z, spread = z.reshape(y.shape), (y - y.mean(0)).square().mean()
    errors = [float((link - y).square().mean() / spread) for link in (z, z.sigmoid(), z.exp())]
    return max(-1.0, 1 - min(error for error in [*errors, 2.0] if math.isfinite(error)))


def tasks(x: Tensor) -> dict[str, Task]:
    """Classes and amounts that are linear in the columns, in all forms in which targets come."""
    scores, direct = x @ torch.randn(6, 3), x @ torch.randn(6, 1)
    kind, yes = scores.argmax(1), (direct > 0).float()
    given, flat = partial(_of_classes, lambda y: y), partial(_of_classes, lambda y: y.argmax(1))
    by_number, task = nn.CrossEntropyLoss(), partial(Task, x)
    return {
        "one-hot": task(F.one_hot(kind, 3).float(), 3, by_number, flat),
        "one-hot of two": task(F.one_hot(yes[:, 0].long(), 2).float(), 2, by_number, flat),
        "numbers": task(kind, 3, by_number, given),
        "numbers of two": task(yes[:, 0].long(), 2, by_number, given),
        "column of numbers": task(kind.float()[:, None], 3, _by_column, given),
        "column of numbers, one unit": task(kind.float()[:, None], 1, nn.MSELoss(), given),
        "zeros and ones": task(yes, 1, nn.BCEWithLogitsLoss(), given),
        "signs": task(2 * yes - 1, 1, nn.SoftMarginLoss(), partial(_of_classes, lambda y: y > 0)),
        "amounts": task(direct, 1, nn.MSELoss(), _of_amounts),
        "row of amounts": task(direct[:, 0], 1, lambda z, y: F.mse_loss(z[:, 0], y), _of_amounts),
        "positive amounts": task(F.softplus(direct), 1, nn.MSELoss(), _of_amounts),
        "large amounts": task(100 * direct + 500, 1, nn.MSELoss(), _of_amounts),
        "three amounts": task(scores, 3, nn.MSELoss(), _of_amounts),
        "shares": task(direct.sigmoid(), 1, nn.MSELoss(), _of_amounts),
    }


def _by_column(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y[:, 0].long())


def pairings() -> Iterator[tuple[str, Task, Setup]]:
    """Those that run at all."""
    torch.manual_seed(0)
    for (name, task), end, loss in product(tasks(torch.randn(800 + UNSEEN, 6)).items(), ENDS, LOSSES):
        setup = Setup(_network(task.units, ENDS[end]), LOSSES[loss], ADAM)
        try:
            setup.loss(task.batches[0])
        except GradmendError:
            continue
        yield f"{name}, {end}, {loss}", task, setup


def repairs() -> Iterator[Repair]:
    """Of those that are taken, those that do not train."""
    for name, task, setup in islice(pairings(), 0, None, EVERY):
        before = task.reached(setup)
        if before >= SHARE * task.well:
            continue
        made = mend(setup, task.batches, Budget(steps=TRIAL), steps=STEPS)
        changes = tuple(change.text for change in made.changes)
        told = not made.before.healthy
        yield Repair(name, before, task.well, task.reached(made.setup), changes, told)


def run() -> Iterator[Row | str]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    yield "Pairings of targets, last activation and loss"
    found = []
    for repair in repairs():
        found.append(repair)
        if not repair.good or not repair.told:
            yield f"  {repair}"
    yield Row(f"not repaired of {len(found)} that do not train", mean(not r.good for r in found), 0.1)
    yield Row("of these no error told", mean(not r.told for r in found), 0.1)
