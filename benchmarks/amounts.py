"""What `mend` makes of random programs that predict amounts, with faults of output, loss, data and rate."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.timing import Row
from gradmend import Budget, Setup, mend
from gradmend.layers import After, Before, Rescale, Standardize
from gradmend.setup import Batch, LossFn
from gradmend.training import train

PROGRAMS, UNSEEN, TRIAL, MOST_STEPS, SHARE, LEARNT = 60, 300, 200, 2000, 0.9, 0.1

FIRST = 1000
"""The first seed: rules were mended on programs of smaller ones."""


def _log_cosh(z: Tensor, y: Tensor) -> Tensor:
    return (z - y + nn.functional.softplus(-2 * (z - y)) - math.log(2)).mean()


def _percent(z: Tensor, y: Tensor) -> Tensor:
    return 100 * ((z - y) / y.abs().clamp_min(1e-7)).abs().mean()


def _log_error(z: Tensor, y: Tensor) -> Tensor:
    return (z.clamp_min(1e-7).log1p() - y.clamp_min(1e-7).log1p()).square().mean()


def _cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    p = z.clamp(1e-7, 1 - 1e-7)
    return -(y * p.log() + (1 - y) * (1 - p).log()).mean()


LOSSES: Mapping[str, LossFn] = {
    "squared": nn.MSELoss(),
    "absolute": nn.L1Loss(),
    "Huber": nn.HuberLoss(),
    "sum of squares": nn.MSELoss(reduction="sum"),
    "percent": _percent,
    "logarithms": _log_error,
    "binary cross-entropy": _cross_entropy,
    "log cosh": _log_cosh,
}
ENDS: Mapping[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softmax": partial(nn.Softmax, dim=-1),
}
ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "ELU": nn.ELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softmax": partial(nn.Softmax, dim=-1),
    "none": nn.Identity,
}
INITS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "zeros": nn.init.zeros_,
    "small": partial(nn.init.normal_, std=0.001),
    "large": partial(nn.init.normal_, std=1.0),
}
LAWS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda z: z[:, 0],
    "sines": lambda z: z.sin().sum(1),
    "squares": lambda z: z[:, :2].square().sum(1),
}
UNITS = ((1, 0), (1, 0), (3, 0), (0.01, 0), (0.2, 0.5), (50, 200), (1e4, 1e5))
"""Deviation and mean of the targets."""

SCALES = ((1, 0), (1, 0), (1, 0), (0.01, 0), (100, 0), (20, 300))
"""Deviation and mean of the inputs."""


@dataclass(frozen=True)
class Program:
    """A program as drawn: its data, of which the last rows are kept from it, and how it trains."""

    seed: int
    x: Tensor
    y: Tensor
    rows: int
    steps: int
    sizes: tuple[int, ...]
    activation: str
    end: str
    loss: str
    init: str
    optimizer: Callable[..., torch.optim.Optimizer]

    def setup(self) -> Setup:
        """The program."""
        model = self._network(ACTIVATIONS[self.activation], INITS.get(self.init))
        end = [ENDS[self.end]()] if self.end in ENDS else []
        return Setup(nn.Sequential(*model, *end), LOSSES[self.loss], self.optimizer)

    def well_set(self) -> Setup:
        """A network of its size as textbooks set it."""
        x, y = self.x[:-UNSEEN], self.y[:-UNSEEN]
        he = partial(nn.init.kaiming_normal_, nonlinearity="relu")
        inner = Before(nn.Sequential(*self._network(nn.ReLU, he)), Standardize(x.mean(0), x.std(0)))
        shape = nn.Flatten(0) if y.dim() == 1 else nn.Identity()
        model = After(nn.Sequential(inner, shape), Rescale(y.std(), y.mean()))
        return Setup(model, nn.MSELoss(), partial(torch.optim.Adam, lr=1e-3))

    def _network(
        self, bend: Callable[[], nn.Module], init: Callable[[Tensor], Tensor] | None
    ) -> list[nn.Module]:
        torch.manual_seed(self.seed)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(self.sizes):
            layer = nn.Linear(fan_in, fan_out)
            layers += [layer, bend()]
            if init is not None:
                init(layer.weight)
        return layers[:-1]

    def batches(self) -> Iterator[Batch]:
        """Epoch after epoch, shuffled."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            for part in torch.split(torch.randperm(len(self.x) - UNSEEN, generator=generator), self.rows):
                yield self.x[part], self.y[part]

    def score(self, setup: Setup) -> float:
        """R² on the rows that were kept, after all steps; never below -1."""
        trained = setup.copy()
        train(trained, self.batches(), steps=self.steps, seed=0, device="cpu")
        with torch.no_grad():
            output = trained.model.eval()(self.x[-UNSEEN:]).flatten()
        y = self.y[-UNSEEN:].flatten()
        error = float((output - y).square().mean() / (y - self.y[:-UNSEEN].mean()).square().mean())
        return max(-1.0, 1 - error) if math.isfinite(error) else -1.0


def draw(seed: int) -> Program:
    """One program; most parts of it are sound, so that a few faults come together."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    count, columns = rng.choice((60, 200, 600, 2000)), rng.choice((1, 2, 4, 8, 13))
    x = torch.randn(count + UNSEEN, columns, generator=generator)
    mixed = x @ torch.randn(columns, 6, generator=generator) / columns**0.5
    y = rng.choice(list(LAWS.values()))(mixed)
    y = y + 0.1 * y.std() * torch.randn(len(y), generator=generator)
    deviation, mean = rng.choice(UNITS)
    y = (y - y.mean()) / y.std() * deviation + mean
    scale, shift = rng.choice(SCALES)
    rows = min(count, rng.choice((1, 5, 16, 32, 64, 128, count)))
    width, hidden = rng.choice((4, 16, 64)), rng.choice((0, 1, 2, 3))
    return Program(
        seed,
        x * scale + shift,
        y if rng.random() < 0.25 else y[:, None],
        rows,
        min(MOST_STEPS, rng.choice((1, 5, 20, 100)) * math.ceil(count / rows)),
        (columns, *[width] * hidden, 1),
        rng.choice(list(ACTIVATIONS)),
        rng.choice(("none", "none", "none", "none", *ENDS)),
        rng.choice(("squared", "squared", "squared", *LOSSES)),
        rng.choice(("torch's", "torch's", "torch's", "torch's", *INITS)),
        _optimizer(rng),
    )


def _optimizer(rng: random.Random) -> Callable[..., torch.optim.Optimizer]:
    return rng.choice(
        (
            partial(torch.optim.SGD, lr=10 ** rng.uniform(-4, -1)),
            partial(torch.optim.SGD, lr=0.01, momentum=0.9),
            partial(torch.optim.Adam, lr=10 ** rng.uniform(-4, -1.5)),
            partial(torch.optim.Adam, lr=1e-3),
            partial(torch.optim.RMSprop, lr=1e-3),
        )
    )


@dataclass(frozen=True)
class Repair:
    """A program that does not train, and what `mend` made of it; scores are those of rows that were kept.

    Args:
        told: whether an error was told of it.
    """

    name: str
    before: float
    well: float
    after: float
    changes: tuple[str, ...]
    told: bool

    @property
    def good(self) -> bool:
        """Whether it trains now."""
        return self.after >= SHARE * self.well

    def __str__(self) -> str:
        scores = f"{self.before:.2f} -> {self.after:.2f} of {self.well:.2f}"
        return f"{self.name}: {scores}{'' if self.told else ', silent'} | {'; '.join(self.changes) or '-'}"


def repairs(seeds: Iterable[int]) -> Iterator[Repair]:
    """Those of these seeds that a well-set network learns, and the program does not."""
    for program in map(draw, seeds):
        setup, well = program.setup(), program.score(program.well_set())
        before = program.score(setup)
        if well < LEARNT or before >= SHARE * well:
            continue
        epoch = math.ceil((len(program.x) - UNSEEN) / program.rows)
        given = list(islice(program.batches(), min(epoch, 128)))
        made = mend(setup, given, Budget(steps=min(TRIAL, program.steps), seconds=30.0), steps=program.steps)
        changes = tuple(change.text for change in made.changes)
        told = not made.before.healthy
        yield Repair(str(program.seed), before, well, program.score(made.setup), changes, told)


def run() -> Iterator[Row | str]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    yield f"Random programs that predict amounts, seeds from {FIRST} on"
    found = []
    for repair in repairs(range(FIRST, FIRST + PROGRAMS)):
        found.append(repair)
        yield f"  {repair}"
    bad = sum(not repair.good for repair in found)
    yield Row(f"not repaired of {len(found)} that do not train", bad / len(found), 0.1)
    yield Row("changes of a treatment, median", float(median(len(repair.changes) for repair in found)))
