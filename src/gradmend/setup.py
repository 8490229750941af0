"""Setup: everything that trains, as one record that can be copied as a whole."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gradmend.errors import BatchError, SetupError

Batch: TypeAlias = Any
"""`(x, y)`, `(x1, x2, ..., y)`, a dict of keyword arguments, or whatever `step` takes."""

LossFn: TypeAlias = Callable[[Any, Any], Tensor]
Step: TypeAlias = Callable[[nn.Module, Batch], Tensor]
OptimizerFactory: TypeAlias = Callable[[Sequence[nn.Parameter]], Optimizer]
GradientTransform: TypeAlias = Callable[[Sequence[nn.Parameter]], object]


@dataclass(frozen=True)
class Budget:
    """How much mending may cost.

    Args:
        steps: of the optimizer in one trial.
        seconds: of all together; when they are over, the best so far is taken.
        trials: of all together.
    """

    steps: int = 200
    seconds: float = 120.0
    trials: int = 50

    def __post_init__(self) -> None:
        if self.steps < 1 or self.seconds <= 0 or self.trials < 1:
            raise SetupError(f"A budget needs at least one step, one trial and some time, not {self}.")


@dataclass(frozen=True, eq=False)
class Setup:
    """Everything that trains: model, loss, optimizer, schedule, gradient transform.

    Args:
        model: any module.
        loss_fn: `(output, target) -> scalar`; gradmend's statistics assume a mean over the batch, and
            say so where it matters.
        optimizer: a live optimizer, or a factory `parameters -> Optimizer`. Without one a setup can be
            measured but not trained.
        schedule: a factory `optimizer -> LRScheduler`, stepped once per optimizer step.
        gradient_transform: changes the `.grad` of a list of parameters in place before each step, such
            as `partial(nn.utils.clip_grad_norm_, max_norm=1.0)`.
        accumulate: how many batches make one optimizer step.
        step: `(model, batch) -> scalar loss`, the general form; takes the place of `loss_fn`.
        batch_size: rows of the batches that it trains on, joined or cut from those that come; None takes
            them as they are.

    Examples:
        >>> import torch
        >>> from functools import partial
        >>> setup = Setup(nn.Linear(4, 2), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1))
        >>> setup.loss((torch.zeros(8, 4), torch.zeros(8, dtype=torch.long))).shape
        torch.Size([])
    """

    model: nn.Module
    loss_fn: LossFn | None = None
    optimizer: Optimizer | OptimizerFactory | None = None
    schedule: Callable[[Optimizer], LRScheduler] | None = None
    gradient_transform: GradientTransform | None = None
    accumulate: int = 1
    step: Step | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise SetupError(f"`model` must be a torch.nn.Module, not {type(self.model).__name__}.")
        for name in ("loss_fn", "optimizer", "schedule", "gradient_transform", "step"):
            _check_callable(name, getattr(self, name))
        if self.step is not None and self.loss_fn is not None:
            raise SetupError("Give `loss_fn` or `step`, not both: `step` already returns the loss.")
        if self.accumulate < 1:
            raise SetupError(f"`accumulate` counts batches per step: 1 or more, not {self.accumulate}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise SetupError(f"`batch_size` counts rows: 1 or more, not {self.batch_size}.")

    def loss(self, batch: Batch) -> Tensor:
        """The loss of one batch, a scalar that carries gradients.

        Raises:
            BatchError: if model, batch and loss do not fit each other.
        """
        if self.step is not None:
            return _scalar(_call(self.step, self.model, batch))
        if isinstance(batch, Mapping) and self.loss_fn is None:
            return _scalar(_own_loss(_forward(self.model, batch)))
        if self.loss_fn is None:
            raise SetupError("This setup has no loss. Give `loss_fn=nn.CrossEntropyLoss()` or `step=`.")
        inputs, target = split(batch)
        output = _forward(self.model, inputs)
        return _scalar(_compare(self.loss_fn, output, target))

    def losses(self, batch: Batch, targets: Sequence[Any]) -> list[Tensor]:
        """The losses of a batch `(x, ..., y)` with other targets in the place of its own.

        The model runs once where its output is a tensor that a loss function compares, else for each.
        """
        if self.step is None and self.loss_fn is not None:
            output = _forward(self.model, split(batch)[0])
            if isinstance(output, Tensor):
                return [_scalar(_compare(self.loss_fn, output.clone(), target)) for target in targets]
        return [self.loss((*batch[:-1], target)) for target in targets]

    def copy(self) -> Setup:
        """An independent setup: parameters, optimizer groups and optimizer state stay paired.

        Raises:
            SetupError: if the model, or what trains it, holds something that cannot be copied.
        """
        if any(isinstance(module, ScriptModule) for module in self.model.modules()):
            raise SetupError("Scripts cannot be copied: give the model from before `torch.jit.script`.")
        parts = (self.model, self.loss_fn, self.optimizer, self.gradient_transform)
        values: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in _computed(parts)}
        try:
            model, loss_fn, optimizer, transform = copy.deepcopy(parts, values)
            if isinstance(optimizer, Optimizer):
                copy_attributes(self.optimizer, optimizer, values)
        except (RuntimeError, TypeError) as error:
            raise SetupError(
                f"The model cannot be copied: {error} Often an attribute of the model holds a tensor of an "
                "earlier forward pass (register it as a buffer, or detach it), an open file or a lock."
            ) from error
        return replace(self, model=model, loss_fn=loss_fn, optimizer=optimizer, gradient_transform=transform)

    def build_optimizer(self) -> Optimizer:
        """The live optimizer, or a new one from the factory over all parameters that are not frozen."""
        if isinstance(self.optimizer, Optimizer):
            return self.optimizer
        if self.optimizer is None:
            raise SetupError(
                "This setup has no optimizer. Give `optimizer=partial(torch.optim.Adam, lr=1e-3)`."
            )
        parameters = trainable(self.model)
        try:
            optimizer = self.optimizer(parameters)
        except (RuntimeError, TypeError, ValueError) as error:
            raise SetupError(
                f"The optimizer cannot be made: {error}\n`optimizer` is a function of the parameters, such "
                "as `partial(torch.optim.SGD, lr=0.1)`."
            ) from error
        if not isinstance(optimizer, Optimizer):
            raise SetupError(
                f"`optimizer` returned {type(optimizer).__name__}, not a torch Optimizer. Give an optimizer "
                "or a function of the parameters, such as `partial(torch.optim.SGD, lr=0.1)`."
            )
        return optimizer


def copy_attributes(old: Any, new: Optimizer, copied: dict[int, Any]) -> None:
    """Give a copied optimizer the attributes of its own class, which torch's copying leaves out.

    Args:
        copied: what is copied already, by `id`, such as the parameters.
    """
    missing = {key: value for key, value in vars(old).items() if key not in vars(new) and key != "step"}
    vars(new).update(copy.deepcopy(missing, copied))


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are real numbers, each once, with their names."""
    return [(name, p) for name, p in parameters_of(model.named_modules()) if p.is_floating_point()]


def parameters_of(modules: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Parameter]]:
    """The parameters of modules that have names, each once, with their names."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for path, module in modules:
        for name, p in module._parameters.items():
            if p is not None and id(p) not in found:
                found[id(p)] = f"{path}.{name}" if path else name, p
    return list(found.values())


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen.

    Raises:
        SetupError: if there are none, or if they have no values yet (lazy layers, meta device).
    """
    modules = list(model.named_modules())
    parameters = parameters_of(modules)
    name = type(model).__name__
    if not parameters:
        raise SetupError(f"The model {name} has no parameters, so there is nothing to train.")
    buffers = [(f"{path}.{key}".lstrip("."), b) for path, m in modules for key, b in m._buffers.items()]
    _check_values(name, [*parameters, *buffers])
    wanted = [p for _, p in parameters if p.requires_grad]
    if not wanted:
        raise SetupError(
            f"All {len(parameters)} parameters of {name} are frozen. Call `model.requires_grad_(True)`."
        )
    return wanted


def _check_values(name: str, held: Sequence[tuple[str, Tensor | None]]) -> None:
    """Every parameter and buffer must hold numbers."""
    if any(type(tensor) in (UninitializedParameter, UninitializedBuffer) for _, tensor in held):
        raise SetupError(
            f"The model {name} has lazy layers whose sizes are not known yet. Show it one batch: `model(x)`."
        )
    empty = [path for path, tensor in held if tensor is not None and tensor.is_meta]
    if empty:
        raise SetupError(
            f"Of the parameters and buffers of {name}, {len(empty)} are on the meta device, the first is "
            f"`{empty[0]}`: they have no values. Make the model on a real device, or call "
            '`model.to_empty(device="cpu")` and initialize it.'
        )


def split(batch: Batch) -> tuple[tuple[Any, ...], Any]:
    """The inputs and the target of a batch `(x, y)` or `(x1, x2, ..., y)`."""
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return tuple(batch[:-1]), batch[-1]
    keywords = "For a model that returns its `.loss`, leave out `loss_fn`. "
    raise BatchError(
        f"A batch is `(x, y)` here, not {describe(batch)}. {keywords if isinstance(batch, Mapping) else ''}"
        "For anything else give the setup `step=lambda model, batch: ...`, which returns the loss."
    )


def describe(value: object) -> str:
    """A batch or output in words: shapes and dtypes.

    >>> import torch
    >>> describe((torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)))
    '(float32 [2, 3], int64 [2])'
    """
    if isinstance(value, Tensor):
        shape = "[nested]" if value.is_nested else list(value.shape)
        return f"{str(value.dtype).removeprefix('torch.')} {shape}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)) and len(value) <= 8:
        return "(" + ", ".join(map(describe, value)) + ")"
    return type(value).__name__


def _check_callable(name: str, value: object) -> None:
    if isinstance(value, type) and issubclass(value, nn.Module):
        raise SetupError(f"`{name}` is the class {value.__name__}: type `{value.__name__}()`.")
    if value is not None and not callable(value) and not isinstance(value, Optimizer):
        possible = {
            "optimizer": "an optimizer, or a function of the parameters: `partial(torch.optim.SGD, lr=0.1)`",
            "loss_fn": "a function of output and target, such as `nn.CrossEntropyLoss()`",
        }.get(name, "a function")
        raise SetupError(f"`{name}` is {possible}, not {value!r:.60}.")


def _computed(value: object) -> Iterator[Tensor]:
    """Tensors of an earlier forward pass that modules hold as attributes: they carry a graph."""
    for part in _leaves(value):
        for module in part.modules() if isinstance(part, nn.Module) else ():
            held = (leaf for leaf in _leaves(vars(module)) if isinstance(leaf, Tensor))
            yield from (tensor for tensor in held if not tensor.is_leaf)


def _leaves(value: object) -> Iterator[object]:
    """What nested tuples, lists and dicts hold."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


_MISFITS = (RuntimeError, TypeError, ValueError, IndexError)
"""What torch raises where shapes, dtypes, devices or arguments do not fit."""


def _forward(model: nn.Module, inputs: Any) -> Any:
    try:
        return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    except _MISFITS as error:
        arguments = "positional argument" in str(error) or "keyword argument" in str(error)
        hint = _takes(model) if arguments else _hint(model, inputs, str(error))
        raise BatchError(
            f"The model {type(model).__name__} cannot take the input {describe(inputs)}: {error}{hint}"
        ) from error


def _call(step: Step, model: nn.Module, batch: Batch) -> object:
    try:
        return step(model, batch)
    except _MISFITS as error:
        raise BatchError(
            f"`step(model, batch)` fails on the batch {describe(batch)}: {error}"
            f"{_hint(model, batch, str(error))}"
        ) from error


def _compare(loss_fn: LossFn, output: Any, target: Any) -> object:
    try:
        return loss_fn(output, target)
    except _MISFITS as error:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise BatchError(
            f"The loss {name} cannot compare the output {describe(output)} with the target "
            f"{describe(target)}: {error}\n{_loss_hint(output, target, str(error))}"
        ) from error


def _hint(model: nn.Module, inputs: Any, error: str) -> str:
    """What to type, for the usual reasons why a forward pass fails."""
    tensors = [leaf for leaf in _leaves(inputs) if isinstance(leaf, Tensor)]
    weights = list(model.parameters())
    integers = any(not (x.is_floating_point() or x.is_complex()) for x in tensors)
    hints = (
        ("be Tensor" in error, _no_tensor_hint(inputs)),
        ('"forward"' in error, "Write its `forward`, or take `nn.Sequential`, which has one."),
        ("'indices'" in error, "An embedding takes integers: type `x.long()`."),
        ("device" in error, _unlike("device", tensors, weights)),
        (
            "type" in error and integers,
            "The input holds integers. Layers other than embeddings take real numbers: type `x.float()`.",
        ),
        ("type" in error, _unlike("dtype", tensors, weights)),
        (
            "more than 1 value per channel" in error,
            "Batch normalization cannot train on a batch with a single row: take more rows.",
        ),
        (
            "index out of range" in error,
            "A number in the input is no row of an embedding: it needs `num_embeddings > x.max()`.",
        ),
    )
    return next((f"\n{hint}" for seen, hint in hints if seen and hint), "")


def _loss_hint(output: Any, target: Any, error: str) -> str:
    """What to type, for the usual reasons why a loss function fails."""
    if output is None:
        return "The model returned None: its `forward` needs a `return`."
    if not isinstance(output, Tensor):
        return "Pick what the loss takes: `loss_fn=lambda output, y: nn.CrossEntropyLoss()(output[0], y)`."
    if not isinstance(target, Tensor):
        return _no_tensor_hint(target)
    if output.device != target.device:
        return _unlike("device", [target], [output])
    if "out of bounds" in error:
        low, high = target.min().item(), target.max().item()
        return f"Class numbers run from 0 to {output.shape[1] - 1} here; the target holds {low} to {high}."
    return (
        "CrossEntropyLoss takes outputs [batch, classes] and int64 class numbers [batch] (`y.long()`); "
        "MSELoss and BCEWithLogitsLoss take two float tensors of one shape (`y.float()`)."
    )


def _no_tensor_hint(value: object) -> str:
    if any(isinstance(leaf, str) for leaf in _leaves(value)):
        return "It holds text: turn it into numbers first."
    return "Give tensors: type `torch.as_tensor(x)`."


def _takes(model: nn.Module) -> str:
    names = ", ".join(inspect.signature(model.forward).parameters)
    return (
        f"\nIts forward takes ({names}). A batch `(x1, x2, y)` gives it x1 and x2, a dict each entry by its "
        "name; for anything else give the setup `step=lambda model, batch: ...`."
    )


def _unlike(what: str, tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> str:
    """Names the devices or dtypes of tensors that differ from those of the weights."""
    given, wanted = (
        {str(getattr(t, what)) for t in part if what == "device" or t.is_floating_point()}
        for part in (tensors, weights)
    )
    if len(wanted) != 1 or given <= wanted:
        return ""
    other, own = ", ".join(sorted(given - wanted)), wanted.pop()
    cure = own if what == "dtype" else f'"{own}"'
    return f"The {what} of the batch is {other}, that of the model {own}: type `x.to({cure})`."


def _own_loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise BatchError(
            f"The model returned {describe(output)} without a `.loss`. Put the labels into the batch, or "
            "give `loss_fn=` or `step=`."
        )
    return loss


def _scalar(loss: object) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        cure = "Take its mean." if isinstance(loss, Tensor) else "Return the loss alone, as a tensor."
        raise BatchError(f"The loss must be one number, not {describe(loss)}. {cure}")
    if not loss.is_floating_point():
        raise BatchError(
            f"The loss must be a real number, not {describe(loss)}. A count or a comparison has no gradient; "
            "of a complex number take `.abs()` or `.real`."
        )
    return loss.reshape(())
