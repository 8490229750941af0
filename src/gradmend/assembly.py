"""Assembly: the numbers of measured steps as a profile."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

from torch import Tensor, nn
from torch.optim import Optimizer

from gradmend.anatomy import Anatomy, Site
from gradmend.inside import Inside, attended, drift
from gradmend.kinds import rows_in
from gradmend.ledger import Numbers
from gradmend.profile import Profile
from gradmend.readings import InputReading, ParameterReading, Reading
from gradmend.setup import Batch
from gradmend.stats import absorbed_shift

_NOTABLE = 0.05
"""Of the mean square of what a layer gives, that of its biases: below, their origin does not matter."""


@dataclass(frozen=True, eq=False)
class Step:
    """One measured forward and backward pass.

    Args:
        anatomy: the sites that it ran through.
        parameters: by name, those of floating point.
        numbers: what was measured at them.
        inside: what was looked at within sites.
        compiled: whether a part of the model was.
    """

    anatomy: Anatomy
    parameters: Mapping[str, nn.Parameter]
    numbers: Numbers
    inside: Inside
    compiled: bool


def assemble(optimizer: Optimizer | None, batches: Sequence[Batch], steps: Sequence[Step]) -> Profile:
    """Average the steps that ran through the same sites as the first."""
    first = steps[0]
    names = [site.name for site in first.anatomy.sites]
    same = [step for step in steps if [site.name for site in step.anatomy.sites] == names]
    numbers = _averaged([step.numbers for step in same])
    held = None if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
    parameters = {name: _parameter(name, p, held, numbers) for name, p in first.parameters.items()}
    measured = [site for site in first.anatomy.sites if site.index in numbers["moments"]]
    return Profile(
        anatomy=first.anatomy,
        loss=numbers["loss"][""][0],
        sites=tuple(_tied(_reading(site, numbers, first.inside, parameters), first) for site in measured),
        parameters=tuple(parameters.values()),
        inputs=_input_reading(numbers),
        samples=sum(rows_in(batch) for batch, step in zip(batches, steps, strict=True) if step in same),
        compiled=first.compiled,
    )


def _mean(*values: float) -> float:
    return sum(values) / len(values)


def _root_mean_square(*values: float) -> float:
    return math.hypot(*values) / math.sqrt(len(values))


_OVER_BATCHES: Mapping[str, Sequence[Callable[..., float]]] = {
    **dict.fromkeys(("loss", "signal", "active", "flat", "slopes", "nonzero", "weight"), (_mean,)),
    **dict.fromkeys(("gradient", "slope"), (_root_mean_square,)),
    **dict.fromkeys(("silent", "alike"), (lambda *values: min(values),)),
    "moments": (_mean, _root_mean_square),
}
"""How numbers of several batches become one, in turns; those of other groups are the first batch's."""


def _averaged(steps: Sequence[Numbers]) -> Numbers:
    """The numbers of the first batch, averaged with those of the others."""
    if len(steps) == 1:
        return steps[0]
    numbers = defaultdict(dict, steps[0])
    for group, functions in _OVER_BATCHES.items():
        rows = {key: [step[group][key] for step in steps if key in step[group]] for key in steps[0][group]}
        numbers[group] = {
            key: [function(*column) for function, column in zip(cycle(functions), zip(*found, strict=True))]
            for key, found in rows.items()
        }
    return numbers


def _known(numbers: Sequence[float] | None) -> float | None:
    return None if numbers is None or math.isnan(numbers[0]) else numbers[0]


def _reading(
    site: Site, numbers: Numbers, inside: Inside, parameters: Mapping[str, ParameterReading]
) -> Reading:
    index = site.index
    (total, norm), size = numbers["moments"][index], math.prod(site.shape)
    cosine, rank = numbers["signal"].get(index, (math.nan, math.nan))
    active, silent = _known(numbers["active"].get(index)), numbers["silent"].get(index)
    slope, alike = numbers["gradient"].get(index), numbers["slopes"].get(index)
    nonzero = _known(numbers["nonzero"].get(index))
    weight, bias = _variances(site, numbers, parameters)
    return Reading(
        site=site,
        mean=total / size,
        rms=norm / math.sqrt(size),
        zero=None if active is None or not math.isfinite(norm) else 1 - active,
        dead=silent.count(1) / len(silent) if silent else 0.0,
        saturation=_known(numbers["flat"].get(index)),
        cosine=cosine,
        rank=rank,
        gradient=slope[0] / math.sqrt(size) if slope else None,
        gradient_zero=None if nonzero is None else 1 - nonzero,
        gradient_cosine=alike[0] if alike else None,
        weight_variance=weight,
        bias_variance=bias,
        time=inside.time(numbers, index),
        attention=attended(numbers, index),
        drift=drift(numbers, index),
    )


def _variances(
    site: Site, numbers: Numbers, parameters: Mapping[str, ParameterReading]
) -> tuple[float | None, float]:
    """Fan-in x mean squared weight, and mean squared bias."""
    used = [parameters[name] for name in site.parameters]
    bias = sum((p.rms**2 for p in used if len(p.shape) == 1), start=0.0)
    if not site.fan_in:
        return None, bias
    square = _known(numbers["weight"].get(site.index) or [p.rms**2 for p in used if len(p.shape) > 1] or None)
    return None if square is None else site.fan_in * square, bias


def _tied(reading: Reading, step: Step) -> Reading:
    """With the shift of its input that large biases stand for, if they stand for one."""
    tensors = [step.parameters[name] for name in reading.site.parameters]
    small = reading.bias_variance < _NOTABLE * reading.rms**2
    if reading.weight_variance is None or len(tensors) != 2 or small:
        return reading
    found = absorbed_shift(*tensors)
    return replace(reading, shift=found[0], bias_variance=found[1]) if found else reading


def _parameter(name: str, parameter: Tensor, held: set[int] | None, numbers: Numbers) -> ParameterReading:
    slope, size = numbers["slope"].get(name), math.sqrt(parameter.numel() or 1)
    return ParameterReading(
        name=name,
        shape=tuple(parameter.shape),
        rms=numbers["value"][name][0] / size,
        gradient=slope[0] / size if slope else None,
        update=_known(numbers["update"].get(name)),
        trained=None if held is None else id(parameter) in held,
        frozen=not parameter.requires_grad,
        symmetric=any(numbers["alike"].get(name, ())),
    )


def _input_reading(numbers: Numbers) -> InputReading | None:
    """What the first layer gets; None where something else than a layer with weights comes first."""
    if not numbers["entry"]:
        return None
    mean, rms, middle, largest, constant = numbers["entry"]["spread"]
    deviations = (0.0 if math.isnan(middle) else middle, largest)
    cosine, _ = numbers["entry"]["directions"]
    return InputReading(mean, rms, cosine, deviations, constant=int(constant))
