"""Edits of every kind, on one model that has something for each."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from gradmend import surgery
from gradmend.layers import definitions
from gradmend.surgery import Edit

X = torch.linspace(-2, 2, 20).reshape(5, 4)


class Net(nn.Module):
    """A shared activation, a block shared as a whole, and a layer that takes two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()
        self.net = nn.Sequential(nn.Linear(4, 4), self.act, nn.Linear(4, 4), nn.BatchNorm1d(4), self.act)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
        self.again = self.block
        self.mix = nn.Bilinear(4, 4, 4)
        self.head = nn.ModuleDict({"out": nn.Linear(4, 2)})

    def forward(self, x: Tensor) -> Tensor:
        h = self.again(self.block(self.net(self.act(x))))
        return self.head["out"](self.mix(h, h))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


Change = Callable[[nn.Module], Edit | None]
EDITS: dict[str, Change] = {
    "replace": lambda model: surgery.replace(model, "block.1", nn.LeakyReLU(0.2)),
    "replace shared": lambda model: surgery.replace(model, "net.1", nn.ReLU()),
    "replace with parameters": lambda model: surgery.replace(model, "net.3", nn.LayerNorm(4)),
    "replace by a chain": lambda model: surgery.replace(
        model, "block.1", nn.Sequential(nn.ReLU(), nn.LayerNorm(4))
    ),
    "replace and keep": lambda model: surgery.replace(model, "net.3", nn.LayerNorm(4), keep=True),
    "before": lambda model: surgery.insert_before(model, "head.out", nn.LayerNorm(4)),
    "before, two arguments": lambda model: surgery.insert_before(model, "mix", nn.Softsign()),
    "before shared": lambda model: surgery.insert_before(model, "act", nn.BatchNorm1d(4)),
    "after": lambda model: surgery.insert_after(model, "net.0", nn.LayerNorm(4)),
    "after shared": lambda model: surgery.insert_after(model, "block", nn.BatchNorm1d(4)),
    "residual": lambda model: surgery.wrap_residual(model, ["net.2"], 0.5),
    "learned residual": lambda model: surgery.wrap_residual(model, ["net.0"], 0.25, learned=True),
    "projected residual": lambda model: surgery.wrap_residual(
        model, ["head.out"], 0.5, skip=nn.Linear(4, 2, bias=False)
    ),
    "residual over siblings": lambda model: surgery.wrap_residual(model, ["net.1", "net.2"], 0.5, True),
    "residual over all": lambda model: surgery.wrap_residual(model, ["block.0", "block.1"]),
}
INITS: dict[str, Change] = {
    "fill": lambda model: surgery.fill(model, "net.0", nn.init.orthogonal_, "nn.init.orthogonal_"),
    "fill with arguments": lambda model: surgery.fill(
        model, "block.0", partial(nn.init.normal_, std=0.1), "partial(nn.init.normal_, std=0.1)"
    ),
}
every_edit = pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)


def prelude(edits: list[Edit]) -> str:
    """What the code of the edits needs before it."""
    return definitions("\n".join(edit.code for edit in edits))


def run(edits: list[Edit], model: nn.Module) -> nn.Module:
    """Apply the code of edits to a model."""
    names = {"model": model}
    exec(prelude(edits) + "\n".join(edit.code for edit in edits), names)
    return names["model"]


def outputs(model: nn.Module, x: Tensor = X) -> Tensor:
    """What a copy of the model computes, in the model's mode."""
    torch.manual_seed(1)
    return copy.deepcopy(model)(x)


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have equal keys, values and outputs."""
    first, second = a.state_dict(), b.state_dict()
    return (
        list(first) == list(second)
        and all(torch.equal(first[key], second[key]) for key in first)
        and torch.equal(outputs(a), outputs(b))
    )


def randomized(model: nn.Module) -> nn.Module:
    """The model with other values everywhere, as after training."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.detach().uniform_(0.5, 1.5)
    return model
