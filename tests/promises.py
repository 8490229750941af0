"""The promises that every remedy keeps, in one place, for setups on which it has something to do."""

import copy
import pickle
import warnings
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gradmend import remedies
from gradmend.errors import NoEffectWarning
from gradmend.layers import definitions
from gradmend.remedies import SEED, Change, Remedy
from gradmend.setup import Batch, Setup
from gradmend.training.loop import Stepper
from helpers import assert_same, trace


def applied(remedy: Remedy, setup: Setup, batch: Batch) -> Change:
    """Apply a remedy that changes something, and hold it to its promises."""
    before = trace(setup)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        made = remedy.apply(setup, batch)
    assert_same(trace(setup), before)
    assert made.edits
    assert eval(repr(made.remedy), vars(remedies)) == made.remedy
    _changes_nothing_more(made, batch)
    _survives_copies(made.setup, batch)
    _keeps_the_optimizer_paired(made.setup)
    _runs_as_code(setup, made, batch)
    assert torch.isfinite(Stepper(made.setup.copy())([batch]))
    return made


def _changes_nothing_more(made: Change, batch: Batch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        again = made.remedy.apply(made.setup, batch).setup
    assert str(again.model) == str(made.setup.model)
    assert_same(again.model.state_dict(), made.setup.model.state_dict())
    assert repr(again.schedule) == repr(made.setup.schedule)


def _survives_copies(setup: Setup, batch: Batch) -> None:
    blank = copy.deepcopy(setup.model)
    for value in chain(blank.parameters(), blank.buffers()):
        value.data.zero_()
    blank.load_state_dict(setup.model.state_dict())
    for model in (blank, pickle.loads(pickle.dumps(setup.model)), setup.copy().model):
        for mode in (True, False):
            assert_same(output(model, batch, mode), output(setup.model, batch, mode))
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # of torch itself, as it looks at tensors
        compiled = torch.compile(copy.deepcopy(setup.model), backend="eager")
        assert_same(output(compiled, batch), output(setup.model, batch))


def output(model: Any, batch: Batch, training: bool = True) -> Any:
    """What a model computes in a mode, without changing it."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    torch.manual_seed(1)
    try:
        if not training:
            model.eval()
        return model(*batch[:-1])
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)
        for module, mode in modes:
            module.training = mode


def _keeps_the_optimizer_paired(setup: Setup) -> None:
    held = [p for group in setup.build_optimizer().param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in setup.model.parameters() if p.requires_grad}
    assert len(held) == len({id(p) for p in held})


def _runs_as_code(setup: Setup, made: Change, batch: Batch) -> None:
    own, text = setup.copy(), "\n".join(edit.code for edit in made.edits)
    optimizer = own.build_optimizer()
    names: dict[str, Any] = {"model": own.model, "optimizer": optimizer, "loss_fn": own.loss_fn}
    torch.manual_seed(SEED)
    exec(f"{definitions(text)}\n{text}", names)
    assert "gradmend" not in text
    assert_same(output(names["model"], batch), output(made.setup.model, batch))
    assert_same(names["model"].state_dict(), made.setup.model.state_dict())
    if isinstance(optimizer, Optimizer) and type(optimizer) is type(made.setup.build_optimizer()):
        assert _options(names["optimizer"]) == _options(made.setup.build_optimizer())


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def grown(model: nn.Module) -> int:
    """How many numbers a model learns."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
