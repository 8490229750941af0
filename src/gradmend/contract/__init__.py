"""Contract: how output, loss, targets and inputs of a setup fit together, read without training.

The model passes one batch forward and backward; the loss is called some dozen times more, on outputs made up
for it. Nothing of the user's changes.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradmend.anatomy import Site
from gradmend.contract.facts import read_columns, read_output, read_target, shortfall
from gradmend.contract.learnable import read_learnable
from gradmend.contract.nature import (
    answers_alike,
    classes_told_apart,
    pairs_samples,
    read_loss,
    weighs_more,
)
from gradmend.contract.slopes import Compare
from gradmend.errors import GradmendError
from gradmend.harmless import undisturbed, untouched
from gradmend.kinds import identify
from gradmend.lines import line_of_definition
from gradmend.readings import Contract, LearnableReading, LossReading, TargetReading
from gradmend.recorder import Call, Recorder
from gradmend.setup import Batch, Setup, Step
from gradmend.updates import changes, wants_closure

__all__ = ["read_contract"]

_VALUES = 40_000
"""A loss is probed with outputs of about so many values: as many samples as that takes, but two."""

_FEW = 16
"""Of smaller batches several are put together, so that a loss is probed with so many rows."""

_CLASSES = 10
"""Of so many of the commonest classes it is asked whether the loss tells them apart."""

_TOLD = ("binary cross entropy", "cross entropy")
"""Losses of which it is asked."""

_KEPT = 32
"""So many of the last sites are looked through for the one that the output comes from."""

_REFUSALS = (GradmendError, RuntimeError, TypeError, ValueError, KeyError)
"""What an optimizer or a transform raises that cannot work on copies."""

_MODAL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
"""What acts differently in training."""


def read_contract(setup: Setup, batches: Sequence[Batch]) -> Contract | None:
    """Read how output, loss, targets and inputs fit together.

    Args:
        setup: what trains. It is left exactly as it was.
        batches: at least one; targets and inputs of all are looked at, the model sees the first.

    Returns:
        What was found; None if the model cannot take the batch.

    Examples:
        >>> setup = Setup(nn.Sequential(nn.Linear(4, 3), nn.Softmax(dim=1)), nn.CrossEntropyLoss())
        >>> found = read_contract(setup, [(torch.rand(8, 4), torch.arange(8) % 3)])
        >>> found.loss.wants, found.output.sums_to_one
        ('logits', 1)
    """
    setup, batches = _as_compared(setup, batches)
    evaluating, asleep = not setup.model.training, _asleep(setup.model)
    try:
        with undisturbed(setup.model):
            terms = _observe(setup, batches[0])
    except GradmendError:
        return None
    modes = Contract(descent=terms.descent, evaluating=evaluating and bool(asleep))
    modes = modes if evaluating else replace(modes, asleep=asleep)
    with torch.random.fork_rng(devices=[]):
        return _agreement(terms, batches, modes, setup.accumulate)


def _as_compared(setup: Setup, batches: Sequence[Batch]) -> tuple[Setup, Sequence[Batch]]:
    """With the targets as a loss that renumbers them shows them to the loss inside it."""
    loss: Any = setup.loss_fn
    if not hasattr(loss, "renumbered"):
        return setup, batches
    pairs = [(*batch[:-1], loss.renumbered(batch[-1])) for batch in batches]
    return replace(setup, loss_fn=loss.loss), pairs


@dataclass
class _Terms:
    """What was seen of one step; `paired` if the target is the last member of the batch."""

    output: Tensor | None = None
    target: Tensor | None = None
    compare: Compare | None = None
    line: str | None = None
    paired: bool = False
    descent: float | None = None
    passed: list[tuple[Site, Tensor]] = field(default_factory=list)


def _agreement(terms: _Terms, batches: Sequence[Batch], found: Contract, accumulate: int) -> Contract:
    pairs = [pair for pair in map(_pair, batches) if pair is not None]
    output, target = terms.output, terms.target
    inputs = [x for x, _ in pairs]
    targets = [y for _, y in pairs] if terms.paired or target is None else [target]
    if inputs and inputs[0] is not None:
        found = replace(found, columns=read_columns([x for x in inputs if x is not None]))
    if target is not None and target.numel():
        whole = read_target(_steps(targets, accumulate))
        partial = len(batches) < accumulate
        found = replace(found, target=replace(whole, shape=tuple(targets[0].shape), partial=partial))
    if output is None:
        return found
    found = replace(found, output=read_output(output, terms.passed))
    if target is None or not target.numel() or not target.dim() or terms.compare is None:
        return found
    more = _more_rows(output, target, targets)
    probed = _probed(terms.compare, *more, found.target, terms.line)
    if more[1] is not target and probed.get("loss") is None:  # it may know the size of its batches
        probed = _probed(terms.compare, output, target, found.target, terms.line)
    found = replace(found, **probed)
    if found.output and found.output.bounds and _comparable(output, target):
        every = torch.cat([t for t in targets if t.shape[1:] == target.shape[1:]])
        least = shortfall(every.reshape(-1, *output.shape[1:]), found.output.bounds, found.output.sums_to_one)
        found = replace(found, shortfall=least)
    return replace(found, learnable=_learnable(found, inputs, targets) if terms.paired else None)


def _steps(targets: Sequence[Tensor], accumulate: int) -> list[Tensor]:
    """The targets of each optimizer step together, if it takes several batches."""
    alike = [t for t in targets if t.dim() and t.shape[1:] == targets[0].shape[1:]]
    if accumulate == 1 or not alike:
        return list(targets)
    return [torch.cat(alike[i : i + accumulate]) for i in range(0, len(alike), accumulate)]


def _more_rows(output: Tensor, target: Tensor, targets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """An output and targets of more rows than a small batch has; the output's numbers do not matter."""
    alike = [t for t in targets if t.dim() and t.shape[1:] == target.shape[1:]]
    rows = torch.cat(alike)[:_FEW] if len(target) < _FEW and len(target) == len(output) else target
    if len(rows) <= len(target):
        return output, target
    if len(target) == 1 and target.numel() == output.numel():  # one number meets one, whatever their shapes
        rows = rows.reshape(len(rows), *output.shape[1:])
    return output[:1].expand(len(rows), *output.shape[1:]), rows


def _probed(
    compare: Compare, output: Tensor, target: Tensor, kinds: TargetReading | None, line: str | None
) -> dict[str, Any]:
    """The loss's nature, from a few rows on the CPU: there an output it refuses does no harm."""
    rows = max(2, min(len(output), _VALUES // max(1, output[0].numel())))
    if len(target) == len(output):
        places = torch.arange(0, len(output), max(1, len(output) // rows))[:rows]
        output, target = output[places.to(output.device)], target[places.to(target.device)]
    elif output.numel() > 25 * _VALUES:
        return {}
    shape, target = tuple(output.shape), target.detach().cpu()
    loss = read_loss(compare, shape, target)
    if loss is not None and kinds is not None:
        loss = _on_classes(loss, compare, shape, target, kinds)
    if shape == tuple(target.shape):
        paired = False if answers_alike(compare, shape, target) else None
    else:
        paired = pairs_samples(compare, shape, target)
    return {"loss": replace(loss, line=line) if loss else None, "paired": paired}


def _on_classes(
    loss: LossReading, compare: Compare, shape: tuple[int, ...], target: Tensor, given: TargetReading
) -> LossReading:
    """With what it makes of the classes that the targets hold, where there is one target per sample."""
    present = sorted((pair for pair in given.counts if pair[1]), key=lambda pair: pair[1])
    if len(present) < 2 or len(shape) > 2 or math.prod(given.shape[1:]) not in (1, len(given.counts)):
        return loss
    rare, common = (_row(target, value, given.one_hot) for value in (present[0][0], present[-1][0]))
    even = torch.full(shape, 0.0 if loss.wants == "logits" else 0.5)
    loss = replace(loss, weighted=weighs_more(compare, even, target, common, rare))
    if given.one_hot is None and loss.family in _TOLD:
        values = [value for value, _ in present[-_CLASSES:]]
        loss = replace(loss, kinds=classes_told_apart(compare, shape, target, values))
    return loss


def _row(target: Tensor, value: float, one_hot: int | None) -> Tensor:
    """The target of a sample of this class."""
    if one_hot is None:
        return torch.full_like(target[0], value)
    row = torch.zeros_like(target[0])
    row[int(value)] = 1
    return row


def _comparable(output: Tensor, target: Tensor) -> bool:
    given, wanted = tuple(target.shape), tuple(output.shape)
    return given == wanted or (*given, 1) == wanted or given == (*wanted, 1)


def _learnable(
    found: Contract, inputs: Sequence[Tensor | None], targets: Sequence[Tensor]
) -> LearnableReading | None:
    """Only of tables and images, with one class or amount per sample: elsewhere neighbours mean nothing."""
    given = [(x, y) for x, y in zip(inputs, targets, strict=True) if x is not None and x.is_floating_point()]
    kind = found.target
    if not given or kind is None or given[0][0].dim() not in (2, 4):
        return None
    alike = [
        (x, y)
        for x, y in given
        if x.shape[1:] == given[0][0].shape[1:] and y.shape[1:] == given[0][1].shape[1:]
    ]
    x, y = torch.cat([x for x, _ in alike]).cpu(), torch.cat([y for _, y in alike]).cpu()
    if kind.one_hot == 1 and y.dim() == 2:
        y = y.argmax(1)
    if y.numel() != len(y) or len(x) != len(y):
        return None
    classes = found.loss is None or found.loss.wants != "values"
    if classes and (not kind.counts or len(kind.counts) > len(y) // 8):
        return None
    return read_learnable(x.detach(), y.flatten().detach(), classes)


def _observe(setup: Setup, batch: Batch) -> _Terms:
    """Run one step and keep what its loss compares."""
    passed: deque[tuple[Site, Tensor]] = deque(maxlen=_KEPT)

    def keep(_: Call, site: Site, output: Tensor) -> None:
        if _plain(output):
            passed.append((site, output))

    recorder = Recorder(setup.model, after=keep)
    given, called = untouched(batch), _Losses()
    with _outputs(setup.model) as outputs, recorder.watching(given), called:
        loss = setup.loss(given)
    terms = _Terms(descent=_descent(setup, loss), passed=list(passed))
    _add_sides(terms, setup, given, outputs, called)
    if len(recorder.losses) == 1 and recorder.losses[0].line:
        terms.line = recorder.losses[0].line
    return terms


def _add_sides(terms: _Terms, setup: Setup, batch: Batch, outputs: Sequence[Any], called: _Losses) -> None:
    """Output, target and loss: of the user's function or step if there is one, else of torch's."""
    pair = _pair(batch)
    output = outputs[-1] if len(outputs) == 1 and _plain(outputs[-1]) else None
    if output is not None and pair is not None and (setup.loss_fn is not None or setup.step is not None):
        terms.output, terms.target, terms.paired = output.detach(), pair[1], True
        terms.compare = _own(setup, batch)
        terms.line = line_of_definition(setup.loss_fn)
    elif len(called.found) == 1 and _plain(called.found[0][1][0]) and _strided(called.found[0][1][1]):
        ((function, args, kwargs),) = called.found
        terms.output, terms.target = args[0].detach(), args[1].detach()
        rest = [_on_cpu(value) for value in args[2:]]
        named = {key: _on_cpu(value) for key, value in kwargs.items()}
        terms.compare = lambda z, y: function(z, y, *rest, **named)


def _own(setup: Setup, batch: Batch) -> Compare:
    """The user's loss, as a function of output and target."""
    if setup.step is not None:
        return partial(_stepped, setup.step, setup.model, tuple(batch[:-1]))
    loss_fn: Any = setup.loss_fn
    with suppress(RuntimeError, TypeError):  # one that cannot be copied is called itself
        loss_fn = copy.deepcopy(loss_fn)
    return loss_fn.cpu() if isinstance(loss_fn, nn.Module) and loss_fn is not setup.loss_fn else loss_fn


def _stepped(step: Step, model: nn.Module, inputs: tuple[Any, ...], z: Tensor, y: Tensor) -> Tensor:
    """The loss of a step whose model puts out `z`, whatever it gets."""
    twin = copy.copy(model)
    vars(twin)["forward"] = lambda *_, **__: z
    return step(twin, (*inputs, y))


class _Losses(TorchFunctionMode):
    """Keeps the calls of torch's loss functions, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if identify(func)[1] == "loss" and len(args) > 1 and all(isinstance(a, Tensor) for a in args[:2]):
            self.found.append((func, args, kwargs))
        return func(*args, **kwargs)


@contextmanager
def _outputs(model: nn.Module) -> Iterator[list[Any]]:
    """Inside, what each call of the model returns goes into a list."""
    found: list[Any] = []
    handle = model.register_forward_hook(lambda *call: found.append(call[-1]))
    try:
        yield found
    finally:
        handle.remove()


def _pair(batch: Batch) -> tuple[Tensor | None, Tensor] | None:
    """The first input and the target of `(x, y)` or `(x1, x2, ..., y)`, if these are plain tensors."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not isinstance(batch[-1], Tensor):
        return None
    x, y = batch[0], batch[-1]
    if not _strided(y) or y.is_complex():
        return None
    return (x.detach() if len(batch) == 2 and _strided(x) else None), y.detach()


def _strided(value: object) -> bool:
    """Whether it is a tensor with a value at every place, and not what torch.func sees of one."""
    if not isinstance(value, Tensor) or value.is_nested or value.layout != torch.strided:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(value)


def _plain(output: object) -> bool:
    """Whether it is real numbers for some samples."""
    return isinstance(output, Tensor) and _strided(output) and _numbers(output)


def _numbers(output: Tensor) -> bool:
    return output.is_floating_point() and output.dim() > 0 and output.numel() > 0


def _descent(setup: Setup, loss: Tensor) -> float | None:
    """The cosine between the optimizer's next step and the gradient, both over all parameters."""
    if setup.optimizer is None or not loss.requires_grad or not bool(loss.isfinite()):
        return None
    optimizer = setup.build_optimizer()
    held = [p for group in optimizer.param_groups for p in group["params"]]
    wanted = [p for p in held if p.requires_grad and p.is_floating_point()]
    if wants_closure(optimizer) or not wanted:
        return None
    slopes = dict(zip(map(id, wanted), torch.autograd.grad(loss, wanted, allow_unused=True), strict=True))
    if any(slope is not None and slope.is_sparse for slope in slopes.values()):
        return None
    try:
        steps = list(changes(optimizer, held, _transformed(setup, wanted, slopes)))
    except _REFUSALS:
        return None
    return _cosine([(slopes[id(p)], step) for p, step in steps if id(p) in slopes])


def _transformed(
    setup: Setup, wanted: Sequence[nn.Parameter], slopes: Mapping[int, Tensor | None]
) -> dict[int, Tensor | None]:
    """The gradients as the optimizer gets them. The parameters' own are put back by `undisturbed`."""
    for p in wanted:
        slope = slopes[id(p)]
        p.grad = None if slope is None else slope.clone()
    if setup.gradient_transform is not None:
        copy.deepcopy(setup.gradient_transform)(wanted)
    return {id(p): p.grad for p in wanted}


def _cosine(pairs: Sequence[tuple[Tensor | None, Tensor]]) -> float | None:
    """Between two vectors given in pieces; None if one is zero, or no number."""
    sums = [torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()]) for a, b in _double(pairs)]
    if not sums:
        return None
    product, first, second = torch.stack([s.cpu() for s in sums]).sum(0).tolist()
    size = math.sqrt(first * second)
    return product / size if size > 0 and math.isfinite(size) else None


def _double(pairs: Sequence[tuple[Tensor | None, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    return ((a.double(), b.double()) for a, b in pairs if a is not None)


def _asleep(model: nn.Module) -> tuple[str, ...]:
    """The parts that act differently in training, do not train, and are meant to."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, _MODAL) and not m.training]
    return tuple(name for name, m in found if not _frozen(m))


def _frozen(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return bool(own) and not any(p.requires_grad for p in own)


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
