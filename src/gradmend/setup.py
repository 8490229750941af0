"""Setup: everything that trains, as one record that can be copied as a whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
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
    """How much a trial may cost: so many optimizer steps, and no more than so many seconds."""

    steps: int = 200
    seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.seconds <= 0:
            raise SetupError(f"A budget needs at least one step and some time, not {self}.")


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

    Example:
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

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise SetupError(f"`model` must be a torch.nn.Module, not {type(self.model).__name__}.")
        if self.step is not None and self.loss_fn is not None:
            raise SetupError("Give `loss_fn` or `step`, not both: `step` already returns the loss.")
        if self.accumulate < 1:
            raise SetupError(f"`accumulate` counts batches per step: 1 or more, not {self.accumulate}.")

    def loss(self, batch: Batch) -> Tensor:
        """The loss of one batch, a scalar that carries gradients.

        Raises:
            BatchError: if model, batch and loss do not fit each other.
        """
        if self.step is not None:
            return _scalar(self.step(self.model, batch))
        if isinstance(batch, Mapping) and self.loss_fn is None:
            return _scalar(_own_loss(_forward(self.model, batch)))
        if self.loss_fn is None:
            raise SetupError("This setup has no loss. Give `loss_fn=nn.CrossEntropyLoss()` or `step=`.")
        inputs, target = split(batch)
        output = _forward(self.model, inputs)
        return _scalar(_compare(self.loss_fn, output, target))

    def copy(self) -> Setup:
        """An independent setup: parameters, optimizer groups and optimizer state stay paired."""
        parts = (self.model, self.loss_fn, self.optimizer, self.gradient_transform)
        try:
            model, loss_fn, optimizer, transform = copy.deepcopy(parts)
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
        optimizer = self.optimizer(trainable(self.model))
        if not isinstance(optimizer, Optimizer):
            raise SetupError(
                f"`optimizer` returned {type(optimizer).__name__}, not a torch Optimizer. Give an optimizer "
                "or a function of the parameters, such as `partial(torch.optim.SGD, lr=0.1)`."
            )
        return optimizer


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are real or complex numbers, each once, with their names."""
    return [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen.

    Raises:
        SetupError: if there are none, or if they have no values yet (lazy layers, meta device).
    """
    parameters = list(model.parameters())
    name = type(model).__name__
    if not parameters:
        raise SetupError(f"The model {name} has no parameters, so there is nothing to train.")
    if any(isinstance(p, UninitializedParameter) for p in parameters):
        raise SetupError(
            f"The model {name} has lazy layers whose sizes are not known yet. Show it one batch: `model(x)`."
        )
    if any(p.is_meta for p in parameters):
        raise SetupError(
            f"Parameters of {name} are on the meta device, so they have no values. Make the model on a real "
            'device, or call `model.to_empty(device="cpu")` and initialize it.'
        )
    wanted = [p for p in parameters if p.requires_grad]
    if not wanted:
        raise SetupError(
            f"All {len(parameters)} parameters of {name} are frozen. Call `model.requires_grad_(True)`."
        )
    return wanted


def split(batch: Batch) -> tuple[tuple[Any, ...], Any]:
    """The inputs and the target of a batch `(x, y)` or `(x1, x2, ..., y)`."""
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return tuple(batch[:-1]), batch[-1]
    raise BatchError(
        f"A batch is `(x, y)` here, not {describe(batch)}. For anything else give the setup "
        "`step=lambda model, batch: ...`, which returns the loss."
    )


def describe(value: object) -> str:
    """A batch or output in words: shapes and dtypes.

    >>> import torch
    >>> describe((torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)))
    '(float32 [2, 3], int64 [2])'
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)) and len(value) <= 8:
        return "(" + ", ".join(map(describe, value)) + ")"
    return type(value).__name__


def _forward(model: nn.Module, inputs: Any) -> Any:
    try:
        return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise BatchError(
            f"The model {type(model).__name__} cannot take the input {describe(inputs)}: {error}"
            f"{_hint(inputs, str(error))}"
        ) from error


def _hint(inputs: Any, error: str) -> str:
    tensors = [x for x in inputs if isinstance(x, Tensor)] if isinstance(inputs, tuple) else []
    if "type" in error and any(not (x.is_floating_point() or x.is_complex()) for x in tensors):
        return "\nThe input holds integers. Layers other than embeddings take real numbers: type `x.float()`."
    if "more than 1 value per channel" in error:
        return "\nBatch normalization cannot train on a batch with a single row: take more rows."
    if "index out of range" in error:
        return "\nA number in the input is no row of an embedding: it needs `num_embeddings > x.max()`."
    return ""


def _compare(loss_fn: LossFn, output: Any, target: Any) -> Tensor:
    try:
        return loss_fn(output, target)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise BatchError(
            f"The loss {name} cannot compare the output {describe(output)} with the target "
            f"{describe(target)}: {error}\nCrossEntropyLoss takes outputs [batch, classes] and int64 class "
            "numbers [batch]; MSELoss and BCEWithLogitsLoss take two float tensors of one shape."
        ) from error


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
        raise BatchError(f"The loss must be one number, not {describe(loss)}. Take its mean.")
    return loss.reshape(())
