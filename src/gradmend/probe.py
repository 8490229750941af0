"""Measure one training step: a forward and a backward pass, with every site's statistics.

Nothing of the user's changes: weights, buffers, `.grad`, random state, train flags and the optimizer are
afterwards what they were, also when forward or backward raises.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmend import stats
from gradmend.anatomy import Site
from gradmend.data import as_batches, check_batch
from gradmend.errors import BatchError
from gradmend.gauge import Gauge, moments, sure
from gradmend.harmless import uncollected, undisturbed, untouched, untrained
from gradmend.inside import Inside, attended, drift
from gradmend.kinds import tensors_in
from gradmend.ledger import Key, Ledger, Numbers, Pile
from gradmend.profile import Profile
from gradmend.readings import InputReading, ParameterReading, Reading
from gradmend.recorder import Call, Recorder
from gradmend.samples import real
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
        check_batch(batch, paired=setup.step is None)
    trainable(setup.model)
    with uncollected():
        with undisturbed(setup.model):
            optimizer = setup.build_optimizer() if setup.optimizer is not None else None
            steps = [_Step(setup, batch, optimizer if i == 0 else None) for i, batch in enumerate(given)]
        return _assemble(setup.model, optimizer, given, steps)


_NOTHING, _UNREACHED = [math.nan], (math.nan,) * 3
_PREPARING = frozenset(("scale", "dropout", "pool"))
"""Kinds that only prepare the batch for the first layer."""


class _Step:
    """One measured forward and backward pass."""

    def __init__(self, setup: Setup, batch: Batch, optimizer: Optimizer | None) -> None:
        self._ledger = Ledger()
        self._signals = Gauge(partial(self._size, "moments"), self._look)
        self._outputs: dict[int, Gauge] = {}
        self._slopes = Gauge(partial(self._size, "gradient"), self._look_at_slope)
        self._output_slopes = Gauge(partial(self._size, "gradient"), None)
        self._last: tuple[Site, Tensor, int, Pile | None] | None = None
        self._readers: dict[Key, list[tuple[int, tuple[float, float]]]] = {}
        self._opened = self._backward = False
        self._recorder = Recorder(setup.model, self._before, self._after)
        self.inside = Inside(self._ledger, self._recorder.sites)
        batch = untouched(batch)
        with self._recorder.watching(batch), untrained(setup.model):
            loss = setup.loss(batch)
        self._last = None
        for gauge in (self._signals, *self._outputs.values()):
            gauge.finish()
        self.anatomy = self._recorder.anatomy()
        self.parameters = parameters = dict(named_parameters(setup.model))
        self._backward = True
        sparse, others = _gradients(parameters, self.inside.watched, loss)
        gradients = {name: g.to_dense() if g.is_sparse else g for name, g in sparse.items()}
        self.inside.after_backward(others)
        self._slopes.finish()
        self._output_slopes.finish()
        self._ledger.add("loss", [""], loss.detach()[None])
        self._add_parameters(parameters, gradients)
        if optimizer is not None and (found := updates(setup, optimizer, sparse)):
            self._ledger.add("update", list(found), torch.stack(list(found.values())))
        self.numbers = self._fetch(parameters, gradients)

    def _before(self, call: Call) -> None:
        signal = call.signal
        if not _readable(signal):
            return
        self.inside.before(call)
        if not self._opened and call.kind not in _PREPARING:
            self._opened = True
            if call.weight is not None:
                x = real(signal.detach())
                self._ledger.add("entry", ["spread"], _entry_statistics(x)[None])
                self._ledger.add("entry", ["sums"], stats.sample_sums(stats.some_samples(x.flatten(1)))[None])
        if call.activation is not None:
            self._note_steepness(signal, stats.steep_interval(call.activation))

    def _note_steepness(self, signal: Tensor, steep: tuple[float, float]) -> None:
        """Saturation is looked for where the input lies: mostly in a pile, as the last site's output."""
        index = len(self._recorder.sites)
        if self._last is not None:
            site, output, version, pile = self._last
            if output is signal and signal._version == version and pile and site.index in pile:
                self._readers.setdefault(site.index, []).append((index, steep))
                return
        rows = stats.some_samples(real(signal.detach()).flatten(1))
        self._ledger.add("flat", [index], stats.flat_fraction(rows, steep)[None])

    def _after(self, call: Call, site: Site, output: Tensor) -> None:
        self._opened = self._opened or call.kind not in _PREPARING
        if not _readable(output):
            return
        active = call.activation is not None
        gauge = self._output_gauge(site.unit_dim) if active else self._signals
        pile = gauge.put(site.index, _samples_first(output, site.batch_dim))
        self._last = (site, output, output._version, pile)
        self.inside.after(call, site, output)
        weight = call.weight
        if weight is not None and not isinstance(weight, nn.Parameter):  # those are measured anyway
            square = stats.norm(weight.detach()).square() / weight.numel()
            self._ledger.add("weight", [site.index], square[None])
        if output.requires_grad:
            hook = partial(self._after_backward, site, self._output_slopes if active else self._slopes)
            output.register_hook(hook)  # type: ignore[no-untyped-call]

    def _after_backward(self, site: Site, gauge: Gauge, gradient: Tensor) -> None:
        if self._backward:  # and not that of a loss that takes gradients itself
            gauge.put(site.index, _samples_first(gradient, site.batch_dim))

    def _output_gauge(self, unit_dim: int) -> Gauge:
        if unit_dim not in self._outputs:
            self._outputs[unit_dim] = Gauge(partial(self._size_of_output, unit_dim), self._look_at_output)
        return self._outputs[unit_dim]

    def _size(self, group: str, x: Tensor, keys: Sequence[Key]) -> None:
        self._ledger.add(group, keys, moments(x.flatten(2)))

    def _size_of_output(self, unit_dim: int, x: Tensor, keys: Sequence[Key]) -> None:
        self._size("moments", x, keys)
        self._ledger.add("silent", keys, stats.silent_units(x, unit_dim))

    def _look(self, rows: Tensor, keys: Sequence[Key]) -> None:
        """Signals, and how flat the activations are that read them."""
        self._ledger.add("signal", keys, stats.sample_sums(rows))
        places: dict[tuple[float, float], list[tuple[int, int]]] = {}
        for place, key in enumerate(keys):
            for index, steep in self._readers.get(key, ()):
                places.setdefault(steep, []).append((place, index))
        for steep, found in places.items():
            chosen = rows if len(found) == len(rows) else rows[[place for place, _ in found]]
            self._ledger.add("flat", [index for _, index in found], stats.flat_fraction(chosen, steep))

    def _look_at_output(self, rows: Tensor, keys: Sequence[Key]) -> None:
        """Outputs of activations: cosine and rank are known of their inputs."""
        self._ledger.add("nonzero", keys, stats.nonzero_share(rows))

    def _look_at_slope(self, rows: Tensor, keys: Sequence[Key]) -> None:
        self._ledger.add("slopes", keys, stats.sample_sums(rows))

    def _add_parameters(self, parameters: dict[str, nn.Parameter], gradients: dict[str, Tensor]) -> None:
        """Norms of values and gradients, and whether the first two rows begin alike."""
        values = {name: p.detach() for name, p in parameters.items()}
        rows = {name: p for name, p in values.items() if p.dim() > 1 and p.shape[0] > 1 and p.numel()}
        self._ledger.add("value", list(values), _norms(values))
        self._ledger.add("slope", list(gradients), _norms(gradients))
        if rows:
            first = torch.stack([p.as_strided((2,), (p.stride(0),)) for p in rows.values()])
            self._ledger.add("alike", list(rows), first[:, 0] == first[:, 1])

    def _fetch(self, parameters: dict[str, nn.Parameter], gradients: dict[str, Tensor]) -> Numbers:
        """All numbers with one transfer from the device; what is rare is looked at again."""
        numbers = self._ledger.fetch()
        for name in [name for name in gradients if numbers.get(("alike", name)) == [1.0]]:
            same = stats.rows_equal(parameters[name].detach()) & stats.rows_equal(gradients[name])
            numbers["alike", name] = [float(same)]
        for group, tensors in (("value", parameters), ("slope", gradients)):
            unsure = {name: x.detach() for name, x in tensors.items() if not sure(numbers[group, name][0])}
            if unsure:
                norms = _norms(unsure, torch.float64).tolist()
                numbers |= {(group, name): [norm] for name, norm in zip(unsure, norms, strict=True)}
        return numbers


def _compiled(model: nn.Module) -> bool:
    modules = list(model.modules())
    whole = any(type(module).__name__ == "OptimizedModule" for module in modules)
    return whole or any(module._compiled_call_impl is not None for module in modules)


def _readable(signal: Tensor) -> bool:
    """Whether it is a batch of real numbers, and not what a transform of torch.func sees of it."""
    inside = torch._C._functorch.is_functorch_wrapped_tensor(signal)
    return signal.is_floating_point() and signal.dim() > 1 and not inside


def _samples_first(x: Tensor, batch_dim: int) -> Tensor:
    x = x.detach()
    return x.movedim(batch_dim, 0) if batch_dim else x


def _norms(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
    exact = [x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in tensors.values()]
    return torch.stack(torch._foreach_norm(exact, 2, dtype=dtype))


def _entry_statistics(x: Tensor) -> Tensor:
    """Of what the first site reads: mean, rms, spread of its columns, how many are constant."""
    apart = (x - x[:1]).flatten(1)  # so that large means do not drown small deviations
    variances = apart.square().mean(0) - apart.mean(0).square()
    deviations = variances.clamp_min_(0).sqrt().double()
    varying = deviations.masked_fill(deviations == 0, torch.nan)
    rms, mean = stats.norm(x) / math.sqrt(x.numel()), x.mean(dtype=torch.float64)
    constant = (deviations == 0).sum()
    return torch.stack([mean, rms, varying.nanmedian(), deviations.amax(), constant])


def _gradients(
    parameters: dict[str, nn.Parameter], others: Sequence[Tensor], loss: Tensor
) -> tuple[dict[str, Tensor], Sequence[Tensor | None]]:
    """The gradients of the parameters that the loss reaches, and of others, without touching any `.grad`."""
    if not loss.requires_grad:
        raise BatchError(
            "The loss does not depend on any parameter. Something cuts the path between them: `detach()`, "
            "`.item()`, `torch.no_grad()`, or a conversion to numpy or to integers."
        )
    wanted = {name: p for name, p in parameters.items() if p.requires_grad}
    if not wanted:
        raise BatchError("All parameters that train are complex numbers; gradmend measures real ones.")
    try:
        gradients = torch.autograd.grad(loss, [*wanted.values(), *others], allow_unused=True)
    except RuntimeError as error:
        again = "second time" in str(error)
        hint = "\n`step` returns the loss before any `backward()`: take yours out of it." if again else ""
        raise BatchError(f"The backward pass failed: {error}{hint}") from error
    found = {name: g for name, g in zip(wanted, gradients, strict=False) if g is not None}
    if not found:
        raise BatchError("The loss reaches none of the model's parameters: is it computed from this model?")
    return found, gradients[len(wanted) :]


def _assemble(
    model: nn.Module, optimizer: Optimizer | None, batches: Sequence[Batch], steps: Sequence[_Step]
) -> Profile:
    """Average the steps that ran through the same sites as the first."""
    anatomy = steps[0].anatomy
    names = [site.name for site in anatomy.sites]
    same = [step for step in steps if [site.name for site in step.anatomy.sites] == names]
    held = None if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
    parameters = tuple(_parameter(name, p, held, same) for name, p in steps[0].parameters.items())
    named = {reading.name: reading for reading in parameters}
    measured = [site for site in anatomy.sites if ("moments", site.index) in same[0].numbers]
    return Profile(
        anatomy=anatomy,
        loss=_average(same, "loss", ""),
        sites=tuple(_reading(site, same, named) for site in measured),
        parameters=parameters,
        inputs=_input_reading(steps[0]),
        samples=sum(_rows(batch) for batch, step in zip(batches, steps, strict=True) if step in same),
        compiled=_compiled(model),
    )


def _rows(batch: Batch) -> int:
    return next((tensor.size(0) for tensor in tensors_in(batch) if tensor.dim() > 0), 0)


def _average(steps: Sequence[_Step], group: str, key: Key) -> float:
    """NaN where nothing was measured."""
    found = [step.numbers.get((group, key), _NOTHING)[0] for step in steps]
    return found[0] if len(found) == 1 else sum(found) / len(found)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _reading(site: Site, steps: Sequence[_Step], parameters: dict[str, ParameterReading]) -> Reading:
    index, first = site.index, steps[0]
    mean, square, zero, cosine, rank = _averages([_of_signal(step.numbers, site) for step in steps])
    reached = ("gradient", index) in first.numbers
    slope = _averages([_of_gradient(step.numbers, site) for step in steps]) if reached else _UNREACHED
    weight, bias = _variances(site, steps, parameters)
    return Reading(
        site=site,
        mean=mean,
        rms=math.sqrt(square),
        zero=_known(zero) if math.isfinite(square) else None,
        dead=_dead(steps, index),
        saturation=_known(_average(steps, "flat", index)),
        cosine=cosine,
        rank=rank,
        gradient=math.sqrt(slope[0]) if reached else None,
        gradient_zero=_known(slope[1]),
        gradient_cosine=slope[2] if ("slopes", index) in first.numbers else None,
        weight_variance=weight,
        bias_variance=bias,
        time=first.inside.time(first.numbers, index),
        attention=attended(first.numbers, index),
        drift=drift(first.numbers, index),
    )


def _of_signal(numbers: Numbers, site: Site) -> tuple[float, ...]:
    """Mean, mean square, share of zeros (activations), cosine, rank (other sites)."""
    size = math.prod(site.shape)
    total, norm = numbers["moments", site.index]
    if site.activation is not None:
        return total / size, norm**2 / size, 1 - numbers["nonzero", site.index][0], math.nan, math.nan
    sums = numbers["signal", site.index]
    return total / size, norm**2 / size, math.nan, stats.cosine(sums), stats.rank(sums)


def _of_gradient(numbers: Numbers, site: Site) -> tuple[float, ...]:
    """Mean square; share of zeros and cosine, where it was sampled."""
    sums, norm = numbers.get(("slopes", site.index)), numbers["gradient", site.index][1]
    shares = (stats.zeros(sums), stats.cosine(sums)) if sums else (math.nan, math.nan)
    return norm**2 / math.prod(site.shape), *shares


def _averages(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    if len(rows) == 1:
        return rows[0]
    return tuple(sum(column) / len(column) for column in zip(*rows, strict=True))


def _dead(steps: Sequence[_Step], index: int) -> float:
    """The share of units that are silent in all steps."""
    silent = [step.numbers.get(("silent", index), []) for step in steps]
    units = silent[0] if len(steps) == 1 else [min(column) for column in zip(*silent, strict=True)]
    return sum(units) / len(units) if units else 0.0


def _variances(
    site: Site, steps: Sequence[_Step], parameters: dict[str, ParameterReading]
) -> tuple[float | None, float]:
    """Fan-in x mean squared weight, and mean squared bias."""
    used = [parameters[name] for name in site.parameters]
    bias = sum((p.rms**2 for p in used if len(p.shape) == 1), start=0.0)
    if not site.fan_in:
        return None, bias
    square = _average(steps, "weight", site.index)
    if math.isnan(square):
        square = next((p.rms**2 for p in used if len(p.shape) > 1), math.nan)
    return (None if math.isnan(square) else site.fan_in * square), bias


def _parameter(
    name: str, parameter: Tensor, held: set[int] | None, steps: Sequence[_Step]
) -> ParameterReading:
    numbers, size = steps[0].numbers, math.sqrt(parameter.numel() or 1)
    slopes = [step.numbers.get(("slope", name), _NOTHING)[0] for step in steps]
    slope = slopes[0] if len(slopes) == 1 else math.hypot(*slopes) / math.sqrt(len(slopes))
    return ParameterReading(
        name=name,
        shape=tuple(parameter.shape),
        rms=numbers["value", name][0] / size,
        gradient=slope / size if ("slope", name) in steps[0].numbers else None,
        update=_known(numbers.get(("update", name), _NOTHING)[0]),
        trained=None if held is None else id(parameter) in held,
        frozen=not parameter.requires_grad,
        symmetric=all(step.numbers.get(("alike", name)) == [1.0] for step in steps),
    )


def _input_reading(step: _Step) -> InputReading | None:
    """What the first layer gets; None where something else than a layer with weights comes first."""
    if ("entry", "spread") not in step.numbers:
        return None
    mean, rms, middle, largest, constant = step.numbers["entry", "spread"]
    deviations = (0.0 if math.isnan(middle) else middle, largest)
    cosine = stats.cosine(step.numbers["entry", "sums"])
    return InputReading(mean, rms, cosine, deviations, constant=int(constant))
