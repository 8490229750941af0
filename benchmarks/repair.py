"""What `mend` makes of random broken networks: how many train then, by how many changes, at what cost."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle, islice, pairwise
from statistics import mean, median
from time import process_time

import torch
from torch import Tensor, nn

from benchmarks.timing import Row
from gradmend import Budget, Setup, Treatment, diagnose, mend
from gradmend.data import load
from gradmend.setup import Batch
from gradmend.training.evaluation import evaluate
from gradmend.training.loop import Stepper, seeded

NETWORKS, STEPS, TRIAL, ROWS, WIDTH, GOOD, SOUND = 40, 300, 75, 64, 64, 0.9, 0.95

FIRST = 200
"""The first seed: thresholds of `mend` were chosen by networks of smaller ones."""

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
    """The accuracy on the training rows after all steps, and the seconds of the processor that they took."""
    copy = setup.copy()
    with seeded(0, torch.device("cpu")):
        step, start = Stepper(copy), process_time()
        for batch in islice(cycle(given), STEPS):
            step([batch])
        seconds = process_time() - start
    return evaluate(copy, given)[1] or 0.0, seconds


@dataclass(frozen=True)
class Repair:
    """One network and what `mend` made of it.

    Args:
        before: accuracy of the untreated network.
        after: of the mended one.
        changes: what was done, in words.
        needless: changes without which it is healthy and as accurate to a point.
        cost: of mending, in trainings of the untreated network.
    """

    network: Network
    before: float
    after: float
    changes: tuple[str, ...]
    needless: tuple[str, ...]
    cost: float

    def __str__(self) -> str:
        n = self.network
        drawn = f"{n.seed}: {n.depth} x {n.activation}, {n.init}, {n.optimizer} {n.rate:.1e}, x {n.scale:g}"
        done = "; ".join(f"({text})" if text in self.needless else text for text in self.changes) or "-"
        return f"{drawn} | {self.before:.3f} -> {self.after:.3f} at {self.cost:.1f} | {done}"

    @property
    def broken(self) -> bool:
        """Whether the untreated network does not train."""
        return self.before <= GOOD


def repairs(seeds: Iterable[int]) -> Iterator[Repair]:
    """Draws networks and mends them, also those that train as they are."""
    trained(draw(0).setup(), batches(1.0))  # the first step of a process loads half of torch
    for network in map(draw, seeds):
        setup, given = network.setup(), batches(network.scale)
        before, seconds = trained(setup, given)
        start = process_time()
        treatment = mend(setup, given, Budget(steps=TRIAL), steps=STEPS)
        cost = (process_time() - start) / seconds
        after, _ = trained(treatment.setup, given)
        changes = tuple(change.text for change in treatment.changes)
        yield Repair(network, before, after, changes, needless(setup, treatment, given, after), cost)


def needless(setup: Setup, treatment: Treatment, given: list[Batch], after: float) -> tuple[str, ...]:
    """The changes without which the setup is healthy, and trains as well to a point."""
    found = []
    for left_out in treatment.changes:
        rest = setup
        for change in treatment.changes:
            rest = rest if change is left_out else change.remedy.apply(rest, given).setup
        if trained(rest, given)[0] >= after - 0.01 and diagnose(rest, given, steps=STEPS).healthy:
            found.append(left_out.text)
    return tuple(found)


def until_broken(found: Iterable[Repair], wanted: int) -> Iterator[Repair]:
    """As many as it takes to have so many broken ones."""
    for repair in found:
        yield repair
        wanted -= repair.broken
        if not wanted:
            return


def run() -> Iterator[Row | str]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    yield f"Random networks, digits, {STEPS} steps of {ROWS} rows, seeds from {FIRST} on"
    drawn = []
    for repair in until_broken(repairs(count(FIRST)), NETWORKS):
        drawn.append(repair)
        yield f"  {repair}"
    found, sound = [r for r in drawn if r.broken], [r for r in drawn if r.before > SOUND]
    changes = sum(len(repair.changes) for repair in found)
    bad = [repair for repair in found if repair.after <= GOOD]
    yield Row(f"failed of {len(found)} broken ones", len(bad) / len(found), 0.03)
    yield Row("changes of a treatment, median", float(median(len(r.changes) for r in found)), 2.0)
    yield Row(f"needless of {changes} changes", sum(len(r.needless) for r in found) / changes, 0.0)
    yield Row(f"mend over {STEPS} steps untreated, median", median(r.cost for r in found), 5.0)
    yield Row(f"changed of {len(sound)} that train as they are", mean(bool(r.changes) for r in sound), 0.0)
