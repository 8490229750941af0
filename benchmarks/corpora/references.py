"""What a broken program is measured against: a network of its size that is set well, for as many steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.corpora.cases import batches
from benchmarks.corpora.tasks import LossFn, Task
from gradmend.layers import After, Before, Rescale, Standardize
from gradmend.setup import Setup
from gradmend.training import train

EPOCHS = 20
"""How long a program trains whose corpus does not say."""

STEPS, SECONDS, LEAST = 3_000, 2.0, 20
"""No training takes more steps, or more than so many seconds of CPU time on the program as it is; where less
than `LEAST` of its own steps fit into these, nothing is trained."""


def own_steps(case: Any) -> int:
    """How many steps the program takes by itself."""
    return int((case.epochs or EPOCHS) * math.ceil(len(case.x_train) / case.batch_size))


def affordable(case: Any, step_seconds: float) -> int:
    """How many of its own steps the program is given here; 0 if they are too few to tell anything."""
    own = own_steps(case)
    steps = min(own, STEPS, int(SECONDS / step_seconds))
    return steps if steps >= min(LEAST, own) else 0


def train_copy(setup: Setup, case: Any, steps: int, seed: int) -> tuple[nn.Module, float]:
    """The model of a copy that was trained on the program's own batches, and the CPU seconds it took."""
    trained, start = setup.copy(), process_time()
    train(trained, batches(case, seed), steps=steps, seed=seed, device="cpu")
    return trained.model, process_time() - start


def well_set(case: Any, task: Task, seed: int) -> Setup:
    """A network of the same layers as textbooks set it.

    ReLU with weights by He et al. 2015, recurrent layers with tanh, Xavier's and orthogonal weights, raw
    outputs with the loss for the task, no dropout, no penalty, Adam at 1e-3, input and amounts standardized.

    Raises:
        ValueError: if its outputs do not fit the targets.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = type(case.model)(*_layers(case, task))
        body.penalties = []
        model: nn.Module = Before(body, _standardize(case.x_train)) if _takes_numbers(body) else body
        if task.kind == "amounts":
            shift = task.mean if case.y_train.ndim > 1 else task.mean.mean()
            model = After(model, Rescale(torch.tensor(task.deviation or 1.0), shift))
        with torch.no_grad():
            _check(model(case.x_train[:2]), case, task)
    return Setup(model, loss_fn=_loss(task), optimizer=partial(torch.optim.Adam, lr=1e-3))


def _layers(case: Any, task: Task) -> Iterator[nn.Module]:
    modules = list(copy.deepcopy(case.model))
    weighted = [place for place, module in enumerate(modules) if _has_weights(module)]
    units = len(task.levels) if task.kind == "class" else _columns(case.y_train)
    for place, module in enumerate(modules):
        if place == weighted[-1] and isinstance(module, nn.Linear):
            yield nn.Linear(module.in_features, units)
        elif place in weighted:
            yield _drawn(module)
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                yield nn.ReLU()
        elif not isinstance(module, nn.Dropout) and not _bends(module):
            yield module
    if not isinstance(modules[weighted[-1]], nn.Linear):
        yield from (nn.Flatten(), nn.LazyLinear(units))


def _columns(y: Tensor) -> int:
    return y.shape[-1] if y.ndim > 1 else 1


def _has_weights(module: nn.Module) -> bool:
    return not isinstance(module, nn.Embedding) and any(p.ndim > 1 for p in module.parameters())


def _bends(module: nn.Module) -> bool:
    """Whether it is an activation: one of torch's, or of those that cases bring along."""
    known = type(module).__module__ == "torch.nn.modules.activation"
    return known or type(module).__name__ in ("Exponential", "HardSigmoid", "Identity")


def _drawn(module: nn.Module) -> nn.Module:
    """The layer with fresh weights, trainable."""
    for part in module.modules():
        if hasattr(part, "act") and hasattr(part, "inner"):  # the recurrent layers of cases
            vars(part).update(act="tanh", inner="sigmoid")
        if isinstance(part, nn.RNNBase):
            for name, weight in part.named_parameters():
                _draw_recurrent(name, weight)
        elif isinstance(part, (nn.Linear, nn.modules.conv._ConvNd)):
            nn.init.kaiming_normal_(part.weight.requires_grad_(True), nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias.requires_grad_(True))
    return module


def _draw_recurrent(name: str, weight: nn.Parameter) -> None:
    if name.startswith("weight_hh"):
        nn.init.orthogonal_(weight)
    elif name.startswith("weight_ih"):
        nn.init.xavier_uniform_(weight)


def _takes_numbers(body: nn.Module) -> bool:
    """Whether the input holds amounts: neither numbers of words nor steps that are marked as empty."""
    first = next(iter(body.children()))
    return not isinstance(first, nn.Embedding) and not hasattr(first, "mask")


def _standardize(x: Tensor) -> Standardize:
    """Per column of a table, per channel of what is wider."""
    rows = x.flatten(0, -2) if x.ndim > 2 else x
    std, mean = torch.std_mean(rows, 0, correction=0)
    return Standardize(mean, std.masked_fill(std < 1e-6, 1.0))


def _check(output: Tensor, case: Any, task: Task) -> None:
    wanted = task.labels(case.y_train[:2]) if task.kind == "class" else case.y_train[:2]
    units = len(task.levels) if task.kind == "class" else 1
    if output.numel() != wanted.numel() * units:
        raise ValueError(f"outputs {list(output.shape)} do not fit targets {list(wanted.shape)}")


def _loss(task: Task) -> LossFn:
    if task.kind == "class":
        return lambda output, y: F.cross_entropy(output.flatten(0, -2), task.labels(y).flatten())
    if task.kind == "flags":
        return lambda output, y: F.binary_cross_entropy_with_logits(output.view_as(y), y)
    return lambda output, y: ((output.view_as(y) - y) / (task.deviation or 1.0)).square().mean()
