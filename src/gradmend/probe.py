"""Measure one training step: a forward and a backward pass, with every site's statistics.

Nothing of the user's changes: weights, buffers, `.grad`, random state, train flags and the optimizer are
afterwards what they were, also when forward or backward raises.
"""

from __future__ import annotations

import copy
import inspect
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmend import stats, theory
from gradmend.anatomy import Activation, Anatomy, Site
from gradmend.data import as_batches, check_batch
from gradmend.errors import BatchError, SetupError
from gradmend.profile import Expected, InputReading, ParameterReading, Profile, Reading
from gradmend.recorder import Recorder, tensors_in
from gradmend.setup import Batch, Setup

_CHUNK = 1_000_000
"""How many parameter values are stepped at a time, so that the copies stay small."""


def measure(setup: Setup, batches: Batch | Iterable[Batch]) -> Profile:
    """Measure one forward and backward pass; several batches are averaged.

    Args:
        setup: what trains. It is left exactly as it was.
        batches: one batch `(x, y)`, or several (a list, a `DataLoader`).

    Returns:
        The statistics of every site and parameter, and what theory predicts where it can.

    Raises:
        BatchError: if model, batch and loss do not fit, or no gradient reaches any parameter.
        DataError: if a batch is empty or holds NaN.

    Example:
        >>> setup = Setup(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), nn.CrossEntropyLoss())
        >>> profile = measure(setup, (torch.randn(32, 4), torch.randint(2, (32,))))
        >>> [reading.site.kind for reading in profile.sites]
        ['linear', 'activation', 'linear']
    """
    given = as_batches(batches)
    for batch in given:
        check_batch(batch)
    _check_parameters(setup)
    with undisturbed(setup.model):
        optimizer = setup.build_optimizer() if setup.optimizer is not None else None
        steps = [_Step(setup, batch, optimizer if i == 0 else None).read() for i, batch in enumerate(given)]
    return _assemble(setup.model, optimizer, given, steps)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a training step inside and leave the model and all random generators as they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            model.train()
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                buffer.copy_(value)
                module._buffers[name] = buffer


def _check_parameters(setup: Setup) -> None:
    parameters = list(setup.model.parameters())
    name = type(setup.model).__name__
    if not parameters:
        raise SetupError(f"The model {name} has no parameters, so there is nothing to train.")
    if not any(p.requires_grad for p in parameters):
        raise SetupError(
            f"All {len(parameters)} parameters of {name} are frozen. Call `model.requires_grad_(True)`."
        )


class _Step:
    """One measured forward and backward pass. Statistics stay on the device until `_fetch`."""

    def __init__(self, setup: Setup, batch: Batch, optimizer: Optimizer | None) -> None:
        self.forward: dict[int, Tensor] = {}
        self.weights: dict[int, Tensor] = {}
        self.silent: dict[int, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}
        recorder = Recorder(setup.model, _saturation, self._after)
        with torch.enable_grad(), recorder.watching(batch):
            loss = setup.loss(batch)
        self.anatomy = recorder.anatomy()
        gradients = _gradients(setup.model, loss)
        self.parameters = {name: _parameter_statistics(p, gradients[name]) for name, p in _named(setup.model)}
        self.updates = _updates(setup, optimizer, gradients) if optimizer is not None else {}
        self.loss = loss.detach().double()

    def read(self) -> _Numbers:
        """Fetch all statistics with one transfer from the device."""
        groups: dict[str, Mapping[Any, Tensor]] = {
            "loss": {"loss": self.loss},
            "forward": self.forward,
            "gradient": self.gradients,
            "weight": self.weights,
            "silent": self.silent,
            "parameter": self.parameters,
            "update": self.updates,
        }
        numbers = _fetch([(group, key, t) for group, items in groups.items() for key, t in items.items()])
        return _Numbers(self.anatomy, numbers)

    def _after(self, site: Site, output: Tensor, weight: Tensor | None, saturation: Tensor | None) -> None:
        if not output.is_floating_point() or output.dim() < 2:
            return
        signal = output.detach()
        self.forward[site.index] = _forward_statistics(signal, saturation)
        if site.kind == "activation":
            self.silent[site.index] = stats.silent_units(signal, site.unit_dim)
        if weight is not None:
            self.weights[site.index] = stats.mean_square(weight.detach())
        if output.requires_grad:
            output.register_hook(partial(self._backward, site.index))  # type: ignore[no-untyped-call]

    def _backward(self, index: int, gradient: Tensor) -> None:
        self.gradients[index] = _gradient_statistics(gradient)


def _saturation(signal: Tensor, phi: Activation | None) -> Tensor | None:
    if phi is None or not signal.is_floating_point():
        return None
    return stats.flat_fraction(signal.detach(), stats.steep_interval(phi))


def _forward_statistics(x: Tensor, saturation: Tensor | None) -> Tensor:
    flat = torch.full((), torch.nan, dtype=torch.float64) if saturation is None else saturation
    basic = (stats.mean(x), stats.mean_square(x), stats.zero_fraction(x))
    return torch.stack([*basic, flat.to(x.device), stats.sample_cosine(x), stats.effective_rank(x)])


def _gradient_statistics(g: Tensor) -> Tensor:
    return torch.stack([stats.mean_square(g), stats.zero_fraction(g), stats.sample_cosine(g)])


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    """The parameters' gradients by name, without touching anybody's `.grad`."""
    if not loss.requires_grad:
        raise BatchError(
            "The loss does not depend on any parameter. Something cuts the path between them: `detach()`, "
            "`.item()`, `torch.no_grad()`, or a conversion to numpy or to integers."
        )
    trainable = [(name, p) for name, p in _named(model) if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in trainable], allow_unused=True)
    found = dict(zip([name for name, _ in trainable], gradients, strict=True))
    if all(g is None for g in gradients):
        raise BatchError("The loss reaches none of the model's parameters: is it computed from this model?")
    return {name: found.get(name) for name, _ in _named(model)}


def _parameter_statistics(parameter: Tensor, gradient: Tensor | None) -> Tensor:
    """Mean squares of values and gradient; whether all rows are, and stay, equal; whether it is reached."""
    value = parameter.detach()
    square = stats.mean_square(value)
    if gradient is None:
        return torch.stack([square, *[torch.zeros_like(square)] * 3])
    equal = value.new_zeros((), dtype=torch.bool)
    if value.dim() >= 2 and value.shape[0] > 1:
        equal = stats.rows_equal(value) & stats.rows_equal(gradient)
    return torch.stack([square, stats.mean_square(gradient), equal.double(), torch.ones_like(square)])


def _updates(setup: Setup, optimizer: Optimizer, gradients: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Mean square of what the optimizer's next step would add to each parameter that it holds.

    The step is taken by a copy of the optimizer on copies of the parameters, a chunk at a time. Optimizers
    whose step wants a closure (LBFGS) are left out.
    """
    if inspect.signature(type(optimizer).step).parameters["closure"].default is inspect.Parameter.empty:
        return {}
    names = {id(p): name for name, p in _named(setup.model)}
    held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in names]
    stand_ins = {id(p): p.detach().requires_grad_() for p in held}
    for p in held:
        stand_ins[id(p)].grad = gradients[names[id(p)]]
    if setup.gradient_transform is not None:
        setup.gradient_transform(cast(list[nn.Parameter], list(stand_ins.values())))
    wanted = {id(p): stand_ins[id(p)].grad for p in held}
    return {
        names[id(p)]: stats.mean_square(change)
        for chunk in _chunks(held)
        for p, change in _changes(optimizer, chunk, wanted)
    }


def _changes(
    optimizer: Optimizer, chunk: Sequence[Tensor], gradients: dict[int, Tensor | None]
) -> Iterator[tuple[Tensor, Tensor]]:
    """What one step of a copy of the optimizer changes in copies of these parameters."""
    twins = {id(p): p.detach().clone().requires_grad_() for p in chunk}
    for p in chunk:
        twins[id(p)].grad = gradients[id(p)]
    copied = copy.copy(optimizer)
    copied.state = defaultdict(dict, {twins[id(p)]: copy.deepcopy(optimizer.state.get(p, {})) for p in chunk})
    copied.param_groups = [
        {**group, "params": [twins[id(p)] for p in group["params"] if id(p) in twins]}
        for group in optimizer.param_groups
    ]
    type(copied).step(copied)
    return ((p, twins[id(p)].detach() - p.detach()) for p in chunk)


def _chunks(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    chunk: list[Tensor] = []
    for parameter in parameters:
        chunk.append(parameter)
        if sum(p.numel() for p in chunk) >= _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


_Key = tuple[str, int | str]


class _Numbers:
    """The statistics of one step on the host: (group, site or parameter) -> values."""

    def __init__(self, anatomy: Anatomy, values: dict[_Key, list[float]]) -> None:
        self.anatomy = anatomy
        self.values = values

    def get(self, group: str, key: int | str, size: int = 1) -> list[float]:
        """The values, NaN where nothing was measured."""
        return self.values.get((group, key), [math.nan] * size)


def _fetch(tensors: Sequence[tuple[str, int | str, Tensor]]) -> dict[_Key, list[float]]:
    device = tensors[0][2].device
    flat = torch.cat([t.detach().double().flatten().to(device) for _, _, t in tensors]).tolist()
    values, start = {}, 0
    for group, key, tensor in tensors:
        values[group, key] = flat[start : start + tensor.numel()]
        start += tensor.numel()
    return values


def _assemble(
    model: nn.Module, optimizer: Optimizer | None, batches: Sequence[Batch], steps: Sequence[_Numbers]
) -> Profile:
    """Average the steps that ran through the same sites as the first, and put theory beside them."""
    anatomy = steps[0].anatomy
    names = [site.name for site in anatomy.sites]
    same = [step for step in steps if [site.name for site in step.anatomy.sites] == names]
    held = None if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
    parameters = tuple(_parameter(name, p, held, same) for name, p in _named(model))
    rms = {reading.name: reading.rms for reading in parameters}
    readings = [
        _reading(site, same, rms) for site in anatomy.sites if ("forward", site.index) in same[0].values
    ]
    inputs = _input_reading(batches[0])
    expected, reason = _predict(anatomy, {r.site.index: r for r in readings}, inputs)
    return Profile(
        anatomy=anatomy,
        loss=_average(same, "loss", "loss")[0],
        sites=tuple(replace(r, expected=expected.get(r.site.index)) for r in readings),
        parameters=parameters,
        inputs=inputs,
        samples=sum(len(next(tensors_in(batch))) for batch in batches),
        unpredictable=reason,
    )


def _average(steps: Sequence[_Numbers], group: str, key: int | str, size: int = 1) -> list[float]:
    rows = [step.get(group, key, size) for step in steps]
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _reading(site: Site, steps: Sequence[_Numbers], rms: dict[str, float]) -> Reading:
    mean, square, zero, flat, cosine, rank = _average(steps, "forward", site.index, 6)
    has_gradient = ("gradient", site.index) in steps[0].values
    gradient = _average(steps, "gradient", site.index, 3) if has_gradient else None
    silent = [min(column) for column in zip(*(s.get("silent", site.index, 0) for s in steps), strict=True)]
    (weight,) = _average(steps, "weight", site.index)
    biases = [name for name in site.parameters if name.endswith("bias")]
    return Reading(
        site=site,
        mean=mean,
        rms=math.sqrt(square) if square >= 0 else math.nan,
        zero=zero,
        dead=sum(silent) / len(silent) if silent else 0.0,
        saturation=_known(flat),
        cosine=cosine,
        rank=rank,
        gradient=math.sqrt(gradient[0]) if gradient else None,
        gradient_zero=gradient[1] if gradient else None,
        gradient_cosine=gradient[2] if gradient else None,
        weight_variance=site.fan_in * weight if site.fan_in and not math.isnan(weight) else None,
        bias_variance=sum(rms[name] ** 2 for name in biases),
    )


def _parameter(
    name: str, parameter: Tensor, held: set[int] | None, steps: Sequence[_Numbers]
) -> ParameterReading:
    square, gradient, symmetric, reached = _average(steps, "parameter", name, 4)
    (update,) = steps[0].get("update", name)
    rms = math.sqrt(square)
    return ParameterReading(
        name=name,
        shape=tuple(parameter.shape),
        rms=rms,
        gradient=math.sqrt(gradient) if reached else None,
        update_ratio=math.sqrt(update) / rms if rms and not math.isnan(update) else None,
        trained=None if held is None else id(parameter) in held,
        frozen=not parameter.requires_grad,
        symmetric=symmetric > 0,
    )


def _input_reading(batch: Batch) -> InputReading | None:
    x = next((t for t in tensors_in(batch) if t.is_floating_point()), None)
    if x is None or x.dim() < 2:
        return None
    columns = x.detach().double().flatten(1)
    deviation = columns.std(dim=0, unbiased=False)
    varying = deviation[deviation > 0]
    ends = (varying.min().item(), varying.max().item()) if len(varying) else (0.0, 0.0)
    return InputReading(
        shape=tuple(x.shape),
        mean=columns.mean().item(),
        rms=math.sqrt(stats.mean_square(x.detach()).item()),
        cosine=stats.sample_cosine(x.detach()).item(),
        deviations=ends,
        constant=len(deviation) - len(varying),
    )


def _predict(
    anatomy: Anatomy, readings: dict[int, Reading], inputs: InputReading | None
) -> tuple[dict[int, Expected], str | None]:
    """What theory expects at each linear site, with the gradient anchored at the last one."""
    stack = anatomy.stack()
    if isinstance(stack, str):
        return {}, stack
    if inputs is None or math.isnan(inputs.cosine):
        return {}, "the input is not a batch of real vectors"
    sites = [linear for linear, _ in stack]
    layers = [
        theory.Layer(after.activation if after else None, r.weight_variance or 0.0, r.bias_variance or 0.0)
        for (linear, after), r in ((pair, readings[pair[0].index]) for pair in stack)
    ]
    if not all(readings[site.index].finite for site in sites):
        return {}, "values are not finite"
    predicted = theory.predict(layers, inputs.rms**2, inputs.cosine)
    last = readings[sites[-1].index].gradient_norm or 0.0
    triples = zip(predicted.q, predicted.cosine, predicted.log_gradient, strict=True)
    return {
        site.index: Expected(math.sqrt(q), cosine, last * math.exp(log / 2))
        for site, (q, cosine, log) in zip(sites, triples, strict=True)
    }, None
