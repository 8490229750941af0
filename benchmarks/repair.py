"""What `mend` makes of random broken networks: how many train then, by how many changes, at what cost."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle, islice, pairwise
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

from benchmarks.timing import Row
from gradmend import Budget, Setup, mend
from gradmend.data import load
from gradmend.setup import Batch
from gradmend.training.evaluation import evaluate
from gradmend.training.loop import Stepper, seeded

NETWORKS, STEPS, ROWS, WIDTH, GOOD = 40, 300, 64, 64, 0.9

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "hardtanh": nn.Hardtanh,
}
INITS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "zeros": nn.init.zeros_,
    "constant": partial(nn.init.constant_, val=0.1),
    "tiny": partial(nn.init.normal_, std=0.001),
    "small": partial(nn.init.normal_, std=0.01),
    "large": partial(nn.init.normal_, std=1.0),
    "uniform": partial(nn.init.uniform_, a=0.0, b=1.0),
    "xavier": nn.init.xavier_uniform_,
    "he": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "lecun": partial(nn.init.kaiming_normal_, nonlinearity="linear"),
    "orthogonal": nn.init.orthogonal_,
    "torch's": lambda weight: weight,
}
OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "RMSprop": torch.optim.RMSprop,
    "Adam": torch.optim.Adam,
}
SCALES = (0.01, 1.0, 100.0)


@dataclass(frozen=True)
class Network:
    """All that is drawn of one network."""

    seed: int
    depth: int
    activation: str
    init: str
    optimizer: str
    rate: float
    scale: float

    def setup(self) -> Setup:
        """The network as drawn."""
        torch.manual_seed(self.seed)
        sizes = [64, *[WIDTH] * (self.depth - 1), 10]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layer = nn.Linear(fan_in, fan_out)
            INITS[self.init](layer.weight)
            layers += [layer, ACTIVATIONS[self.activation]()]
        optimizer = partial(OPTIMIZERS[self.optimizer], lr=self.rate)
        return Setup(nn.Sequential(*layers[:-1]), nn.CrossEntropyLoss(), optimizer)


def draw(seed: int) -> Network:
    """One network, depth and learning rate log-uniform."""
    rng = random.Random(seed)
    depth = round(math.exp(rng.uniform(math.log(2), math.log(60))))
    names = (rng.choice(list(table)) for table in (ACTIVATIONS, INITS, OPTIMIZERS))
    return Network(seed, depth, *names, 10 ** rng.uniform(-5, 0), rng.choice(SCALES))


def batches(scale: float) -> list[Batch]:
    """The training rows of the digits, standardized and scaled."""
    data = load("digits")
    x = (data.x - data.x.mean()) / data.x.std() * scale
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return list(zip(x[order].split(ROWS), data.y[order].split(ROWS), strict=True))


def trained(setup: Setup, given: list[Batch]) -> tuple[float, float]:
    """The accuracy on the training rows after all steps, and the seconds that they took."""
    copy = setup.copy()
    with seeded(0, torch.device("cpu")):
        step, start = Stepper(copy), perf_counter()
        for batch in islice(cycle(given), STEPS):
            step([batch])
        seconds = perf_counter() - start
    return evaluate(copy, given)[1] or 0.0, seconds


@dataclass(frozen=True)
class Repair:
    """One broken network and what became of it."""

    network: Network
    before: float
    after: float
    changes: tuple[str, ...]
    cost: float


def repairs(seeds: Iterator[int]) -> Iterator[Repair]:
    """Draws networks, and mends those that do not train."""
    for network in map(draw, seeds):
        setup, given = network.setup(), batches(network.scale)
        before, seconds = trained(setup, given)
        if before <= GOOD:
            start = perf_counter()
            treatment = mend(setup, given, Budget(steps=100), steps=STEPS)
            cost = (perf_counter() - start) / seconds
            after, _ = trained(treatment.setup, given)
            yield Repair(network, before, after, tuple(c.text for c in treatment.changes), cost)


def run() -> Iterator[Row | str]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    yield f"Random broken networks, digits, {STEPS} steps of {ROWS} rows"
    found = list(islice(repairs(count()), NETWORKS))
    good = [repair for repair in found if repair.after > GOOD]
    yield Row(f"failed of {len(found)}", 1 - len(good) / len(found), 0.03)
    yield Row("changes of a treatment, median", float(median(len(r.changes) for r in found)), 2.0)
    yield Row(f"mend over {STEPS} steps untreated, median", median(r.cost for r in found), 5.0)
