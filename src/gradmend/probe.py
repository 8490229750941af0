"""Measure one training step: a forward and a backward pass, with every site's statistics.

Nothing of the user's changes: weights, buffers, `.grad`, random state, train flags and the optimizer are
afterwards what they were, also when forward or backward raises.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmend import stats
from gradmend.anatomy import Activation, Anatomy, Site
from gradmend.data import as_batches, check_batch
from gradmend.errors import BatchError
from gradmend.profile import Profile
from gradmend.readings import InputReading, ParameterReading, Reading
from gradmend.recorder import Recorder, tensors_in
from gradmend.setup import Batch, Setup, named_parameters, trainable
from gradmend.updates import updates


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
    trainable(setup.model)
    with undisturbed(setup.model):
        optimizer = setup.build_optimizer() if setup.optimizer is not None else None
        steps = [_Step(setup, batch, optimizer if i == 0 else None).read() for i, batch in enumerate(given)]
    return _assemble(setup.model, optimizer, given, steps)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a training step inside and leave the model and all random generators as they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    values = [(tensor, tensor.clone()) for tensor in map(_once, _changed_by_forward(model))]
    grads = [(p, p.grad) for p in model.parameters()]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), _gradients_on():
            model.train()
            for p, _ in grads:
                p.grad = None
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, training in modes:
            module.training = training
        for p, grad in grads:
            p.grad = grad
        for now, before in buffers:
            now.clear()
            now.update(before)
        for tensor, value in values:
            tensor.copy_(value)


@contextmanager
def _gradients_on() -> Iterator[None]:
    """Record gradients inside, also when the user called within `no_grad` or `inference_mode`."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _changed_by_forward(model: nn.Module) -> Iterator[Tensor]:
    """Buffers, and the weights of embeddings with `max_norm`, which forward itself shortens."""
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            yield module.weight


def _once(tensor: Tensor) -> Tensor:
    """The tensor with each of its values once: an expanded one repeats them and cannot be written to."""
    tensor = tensor.detach()
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim]:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


class _Step:
    """One measured forward and backward pass. Statistics stay on the device until `_fetch`."""

    def __init__(self, setup: Setup, batch: Batch, optimizer: Optimizer | None) -> None:
        self.forward: dict[int, Tensor] = {}
        self.weights: dict[int, Tensor] = {}
        self.silent: dict[int, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}
        self.entry: dict[str, Tensor] = {}
        recorder = Recorder(setup.model, self._before, self._after)
        with recorder.watching(batch):
            loss = setup.loss(batch)
        self.anatomy = recorder.anatomy()
        gradients = _gradients(setup.model, loss)
        named = named_parameters(setup.model)
        self.trained = {name: (p, g) for name, p in named if (g := gradients[name]) is not None}
        self.parameters = {name: _parameter_statistics(p, gradients[name]) for name, p in named}
        self.updates = updates(setup, optimizer, gradients) if optimizer is not None else {}
        self.loss = loss.detach().double()

    def read(self) -> _Numbers:
        """Fetch all statistics with one transfer from the device."""
        groups: dict[str, Mapping[Any, Tensor]] = {
            "loss": {"loss": self.loss},
            "forward": _finished(self.forward, self.anatomy, norm=1),
            "gradient": _finished(self.gradients, self.anatomy, norm=0),
            "weight": self.weights,
            "silent": self.silent,
            "parameter": self.parameters,
            "update": self.updates,
            "entry": self.entry,
        }
        numbers = _fetch([(group, key, t) for group, items in groups.items() for key, t in items.items()])
        for name, (parameter, gradient) in self.trained.items():
            if numbers["parameter", name][2]:  # rare, so the other rows are looked at only now
                same = stats.rows_equal(parameter.detach()) & stats.rows_equal(gradient)
                numbers["parameter", name][2] = float(same)
        return _Numbers(self.anatomy, numbers)

    def _before(self, signal: Tensor, phi: Activation | None) -> Tensor | None:
        if not signal.is_floating_point():
            return None
        if not self.forward and not self.entry and signal.dim() > 1:
            self.entry = {"entry": _entry_statistics(signal.detach())}
        return None if phi is None else stats.flat_fraction(signal.detach(), stats.steep_interval(phi))

    def _after(self, site: Site, output: Tensor, weight: Tensor | None, saturation: Tensor | None) -> None:
        if not output.is_floating_point() or output.dim() < 2:
            return
        signal, rows = output.detach(), stats.some_samples(output.detach())
        if site.kind == "activation":
            activity = stats.unit_activity(signal, site.unit_dim)
            self.silent[site.index], active = activity == 0, activity.mean()
        else:
            active = 1 - stats.zero_fraction(rows)
        self.forward[site.index] = _forward_statistics(signal, rows, active, saturation)
        if weight is not None and not isinstance(weight, nn.Parameter):  # those are measured anyway
            self.weights[site.index] = stats.norm(weight.detach()).square() / weight.numel()
        if output.requires_grad:
            output.register_hook(partial(self._backward, site.index))  # type: ignore[no-untyped-call]

    def _backward(self, index: int, gradient: Tensor) -> None:
        self.gradients[index] = _gradient_statistics(gradient)


def _entry_statistics(x: Tensor) -> Tensor:
    """Of what the first site reads: mean, rms, cosine, spread of its columns, how many are constant."""
    deviations = x.flatten(1).std(dim=0, unbiased=False)
    varying = deviations.masked_fill(deviations == 0, torch.nan)
    largest, constant = deviations.amax(), (deviations == 0).sum()
    cosine = stats.cosine(*stats.cosine_sums(stats.some_samples(x)))
    rms = stats.norm(x) / math.sqrt(x.numel())
    return torch.stack([stats.mean(x), rms, cosine, varying.nanmedian(), largest, constant])


def _forward_statistics(x: Tensor, rows: Tensor, active: Tensor, saturation: Tensor | None) -> Tensor:
    flat = rows.new_full((), torch.nan) if saturation is None else saturation
    pairs = (*stats.cosine_sums(rows), *stats.rank_sums(rows))
    return torch.stack([stats.mean(x), stats.norm(x), active, flat, *pairs])


def _gradient_statistics(g: Tensor) -> Tensor:
    return torch.stack([stats.norm(g), stats.zero_fraction(g), *stats.cosine_sums(stats.some_samples(g))])


def _finished(rows: dict[int, Tensor], anatomy: Anatomy, norm: int) -> dict[int, Tensor]:
    """Norms (column `norm`) to mean squares, sums at the end to cosine and rank, for all sites at once.

    Only the forward rows, whose norm is column 1, end with the sums of the rank.
    """
    if not rows:
        return {}
    columns = list(torch.stack(list(rows.values())).double().unbind(dim=1))
    sizes = [math.prod(anatomy.sites[index].shape) for index in rows]
    columns[norm] = columns[norm].square() / columns[norm].new_tensor(sizes)
    rank = [stats.effective_rank(*columns[-2:])] if norm == 1 else []
    basic, sums = (columns[:4], columns[4:6]) if norm == 1 else (columns[:2], columns[2:])
    done = torch.stack([*basic, stats.cosine(*sums), *rank], dim=1)
    return dict(zip(rows, done, strict=True))


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    """The parameters' gradients by name, without touching anybody's `.grad`."""
    if not loss.requires_grad:
        raise BatchError(
            "The loss does not depend on any parameter. Something cuts the path between them: `detach()`, "
            "`.item()`, `torch.no_grad()`, or a conversion to numpy or to integers."
        )
    trainable = [(name, p) for name, p in named_parameters(model) if p.requires_grad]
    try:
        gradients = torch.autograd.grad(loss, [p for _, p in trainable], allow_unused=True)
    except RuntimeError as error:
        raise BatchError(f"The backward pass failed: {error}") from error
    found = dict(zip([name for name, _ in trainable], gradients, strict=True))
    if all(g is None for g in gradients):
        raise BatchError("The loss reaches none of the model's parameters: is it computed from this model?")
    dense = {n: g.to_dense() if g is not None and g.is_sparse else g for n, g in found.items()}
    return {name: dense.get(name) for name, _ in named_parameters(model)}


def _parameter_statistics(parameter: Tensor, gradient: Tensor | None) -> Tensor:
    """Norms of values and gradient; whether the first two rows are equal; whether it is reached."""
    value = parameter.detach()
    norm = stats.norm(value)
    if gradient is None:
        return torch.stack([norm, *[torch.zeros_like(norm)] * 3])
    several = value.dim() >= 2 and value.shape[0] > 1
    equal = stats.rows_equal(value[:2]).double() if several else torch.zeros_like(norm)
    return torch.stack([norm, stats.norm(gradient), equal, torch.ones_like(norm)])


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
    parameters = tuple(_parameter(name, p, held, same) for name, p in named_parameters(model))
    named = {reading.name: reading for reading in parameters}
    readings = [
        _reading(site, same, named) for site in anatomy.sites if ("forward", site.index) in same[0].values
    ]
    return Profile(
        anatomy=anatomy,
        loss=_average(same, "loss", "loss")[0],
        sites=tuple(readings),
        parameters=parameters,
        inputs=_input_reading(anatomy, steps[0]),
        samples=sum(_rows(batch) for batch, step in zip(batches, steps, strict=True) if step in same),
    )


def _rows(batch: Batch) -> int:
    return next((len(tensor) for tensor in tensors_in(batch) if tensor.dim() > 0), 0)


def _average(steps: Sequence[_Numbers], group: str, key: int | str, size: int = 1) -> list[float]:
    rows = [step.get(group, key, size) for step in steps]
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _reading(site: Site, steps: Sequence[_Numbers], parameters: dict[str, ParameterReading]) -> Reading:
    mean, square, activity, flat, cosine, rank = _average(steps, "forward", site.index, 6)
    has_gradient = ("gradient", site.index) in steps[0].values
    gradient = _average(steps, "gradient", site.index, 3) if has_gradient else None
    silent = [min(column) for column in zip(*(s.get("silent", site.index, 0) for s in steps), strict=True)]
    (weight,) = _average(steps, "weight", site.index)
    used = [parameters[name] for name in site.parameters]
    squares = [p.rms**2 for p in used if len(p.shape) > 1]
    weight = squares[0] if squares and math.isnan(weight) else weight
    return Reading(
        site=site,
        mean=mean,
        rms=math.sqrt(square) if square >= 0 else math.nan,
        zero=1 - activity,
        dead=sum(silent) / len(silent) if silent else 0.0,
        saturation=_known(flat),
        cosine=cosine,
        rank=rank,
        gradient=math.sqrt(gradient[0]) if gradient else None,
        gradient_zero=gradient[1] if gradient else None,
        gradient_cosine=gradient[2] if gradient else None,
        weight_variance=site.fan_in * weight if site.fan_in and not math.isnan(weight) else None,
        bias_variance=sum((p.rms**2 for p in used if len(p.shape) == 1), start=0.0),
    )


def _parameter(
    name: str, parameter: Tensor, held: set[int] | None, steps: Sequence[_Numbers]
) -> ParameterReading:
    rows = [step.get("parameter", name, 4) for step in steps]
    (update,) = steps[0].get("update", name)
    root = math.sqrt(parameter.numel() or 1)
    rms, gradient = rows[0][0] / root, math.hypot(*(row[1] for row in rows)) / math.sqrt(len(rows)) / root
    return ParameterReading(
        name=name,
        shape=tuple(parameter.shape),
        rms=rms,
        gradient=gradient if rows[0][3] else None,
        update=_known(update),
        trained=None if held is None else id(parameter) in held,
        frozen=not parameter.requires_grad,
        symmetric=all(row[2] for row in rows),
    )


def _input_reading(anatomy: Anatomy, step: _Numbers) -> InputReading | None:
    """What the first layer gets; None where something else than a layer with weights comes first."""
    if not anatomy.sites or not anatomy.sites[0].weighted or ("entry", "entry") not in step.values:
        return None
    mean, rms, cosine, middle, largest, constant = step.get("entry", "entry")
    deviations = (0.0 if math.isnan(middle) else middle, largest)
    return InputReading(mean, rms, cosine, deviations, constant=int(constant))
