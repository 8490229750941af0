"""Patches: the user's file after them gives the mended model, and all that was not meant stays as it was."""

import sys

import pytest
import torch
from torch import nn

from gradmend.remedies import (
    Accumulate,
    BatchSize,
    ClipNorm,
    DropSquashing,
    FitLoss,
    He,
    LayerNorm,
    Orthogonal,
    StandardizeInput,
    SwapActivation,
    UseOptimizer,
    UseSchedule,
    WeightDecay,
)
from patching import DECORATED, HEAD, PLAIN, mend, rates, removed

pytestmark = pytest.mark.usefixtures("own_folder")


# ---- layers and functions where they stand


def test_layers_are_changed_where_they_are_made() -> None:
    patch, _, _ = mend(PLAIN, "model", DropSquashing(), SwapActivation("ReLU"))
    after = patch.after.decode()
    assert removed(patch) == [
        "nn.Sigmoid(),",
        "nn.Linear(16, 16), nn.Sigmoid(),",
        "nn.Softmax(1),  # probabilities",
    ]
    assert "    nn.Linear(16, 16), nn.ReLU(),\n    nn.Linear(16, 3),  # out\n)\n" in after
    assert "net.py:17: nn.Softmax(1) left out" in patch.written
    assert not patch.left


def test_a_layer_is_inserted_beside_its_neighbour_and_others_find_their_places() -> None:
    patch, _, again = mend(PLAIN, "model", LayerNorm(), SwapActivation("ReLU"), He(), DropSquashing())
    after = patch.after.decode()
    assert "    nn.Linear(4, 16),  # first\n    nn.LayerNorm((16,)),\n    nn.ReLU(),\n" in after
    assert "nn.Linear(16, 16), nn.LayerNorm((16,)), nn.ReLU(),\n" in after
    assert "model = mended(model)\noptimizer" in after
    assert [type(m).__name__ for m in again.setup.model] == ["Linear", "LayerNorm", "ReLU"] * 2 + ["Linear"]


def test_a_function_of_the_forward_becomes_another_one() -> None:
    source = (
        HEAD
        + """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = torch.sigmoid(self.a(x))  # squash
        x = self.b(x).sigmoid()
        return torch.softmax(self.c(x) + 1, dim=1)
"""
    )
    patch, _, _ = mend(source, "Net", DropSquashing(), SwapActivation("LeakyReLU"))
    after = patch.after.decode()
    assert "import torch.nn.functional as F" not in after
    assert "        x = nn.functional.leaky_relu(self.a(x))  # squash\n" in after
    assert "        x = nn.functional.leaky_relu(self.b(x))\n        return (self.c(x) + 1)\n" in after
    assert len(removed(patch)) == 3
    assert patch.name == "Net"


def test_a_missing_import_is_added_after_those_that_are_there() -> None:
    source = '''"""A net."""
from __future__ import annotations
from torch import arange, randn, sigmoid  # from there
from torch.nn import Linear, Module
x, y = randn(64, 4), arange(64) % 3
batch = x, y

class Net(Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Linear(4, 16), Linear(16, 3)

    def forward(self, x):
        return self.b(sigmoid(self.a(x)))
'''
    patch, _, _ = mend(source, "Net", SwapActivation("GELU"))
    assert removed(patch) == ["return self.b(sigmoid(self.a(x)))"]
    added = "from torch.nn import Linear, Module\nimport torch.nn.functional as F\nx, y = "
    assert added in patch.after.decode()
    assert "        return self.b(F.gelu(self.a(x)))\n" in patch.after.decode()


LOOP = (
    HEAD
    + """
def block(width):
    return [nn.Linear(width, width), nn.Sigmoid()]

layers = [nn.Linear(4, 8), nn.Sigmoid()]
for _ in range(3):
    layers += block(8)
model = nn.Sequential(*layers, nn.Linear(8, 3))
"""
)


def test_one_line_that_makes_several_layers_is_changed_once() -> None:
    patch, _, _ = mend(LOOP, "model", SwapActivation("ReLU"))
    assert removed(patch) == [
        "return [nn.Linear(width, width), nn.Sigmoid()]",
        "layers = [nn.Linear(4, 8), nn.Sigmoid()]",
    ]


def test_a_line_of_whose_layers_only_some_change_stays() -> None:
    source = (
        HEAD
        + """
acts = [nn.Sigmoid() for _ in range(2)]
model = nn.Sequential(nn.Linear(4, 8), acts[0], nn.Linear(8, 3), acts[1])
"""
    )
    patch, _, _ = mend(source, "model", SwapActivation("ReLU"))
    assert "acts = [nn.Sigmoid() for _ in range(2)]" in patch.after.decode()
    assert any("net.py:11 makes layers of which only some change" in line for line in patch.written)


def test_a_function_that_others_use_stays_as_it_is() -> None:
    source = LOOP + "other = nn.Sequential(*block(4))\n"
    patch, _, _ = mend(source, "model", SwapActivation("ReLU"))
    assert "    return [nn.Linear(width, width), nn.Sigmoid()]" in patch.after.decode()
    assert any("is also used by net.py:18" in line for line in patch.written)


def test_a_loop_over_the_parameters_draws_as_before() -> None:
    source = PLAIN.replace("optimizer", "for p in model.parameters():\n    nn.init.normal_(p)\noptimizer", 1)
    patch, _, _ = mend(source, "model", LayerNorm())
    after = patch.after.decode()
    assert "    nn.init.normal_(p)\n\nmodel = mended(model)\noptimizer" in after
    assert not any("look it through" in line for line in patch.left)


# ---- the helper


def test_several_models_in_one_file() -> None:
    source = PLAIN + "\nother = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid())\n"
    patch, _, _ = mend(source, "model", StandardizeInput(), Orthogonal())
    assert removed(patch) == []
    assert patch.after.decode().endswith("other = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid())\n")


def test_a_class_gets_a_function_that_makes_mended_models() -> None:
    source = (
        HEAD
        + """
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 16), nn.Sigmoid(), nn.Linear(16, 3))
"""
    )
    patch, _, again = mend(source, "Net", StandardizeInput(), He())
    assert patch.name == "mended_net"
    assert removed(patch) == []
    assert type(again.setup.model).__name__ == "Before"


def test_a_decorated_function_that_returns_a_setup() -> None:
    remedies = (StandardizeInput(), He(), FitLoss(), UseOptimizer("AdamW", 0.01), ClipNorm(2.0))
    more = (UseSchedule(steps=50), Accumulate(2), BatchSize(8), WeightDecay(0.1))
    patch, wanted, again = mend(DECORATED, "make", *remedies, *more)
    after = patch.after.decode()
    assert not patch.left
    assert "        nn.init.normal_(layer.weight)\n\n    net = mended(net)\n    loss = " in after
    assert after.index("def mended") < after.index("# what trains\n@twice\ndef make")
    setup = again.setup
    assert type(setup.loss_fn) is nn.CrossEntropyLoss
    optimizer = setup.build_optimizer()
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["lr"], optimizer.defaults["weight_decay"] == (0.01, 0.1)
    assert repr(setup.gradient_transform) == repr(wanted.gradient_transform)
    assert repr(setup.schedule) == repr(wanted.schedule)
    assert (setup.accumulate, setup.batch_size) == (2, 8)


def test_a_function_that_returns_a_model_or_a_setup_of_another_function() -> None:
    source = HEAD + "def make():\n    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))\n"
    patch, _, _ = mend(source, "make", He())
    line = "    return mended(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)))\n"
    assert line in patch.after.decode()
    patch, _, again = mend(DECORATED + "\nsmall = make()\n", "small", StandardizeInput())
    assert patch.after.decode().endswith("small = make()\nsmall = mended(small)\n")
    assert rates(again.setup) == [5.0]


def test_names_that_the_file_uses_otherwise() -> None:
    source = PLAIN.replace("nn", "layers").replace("from torch import layers", "import torch.nn as layers")
    source += "\nclass Before: pass\ndef mended(): return Before()\n"
    patch, _, _ = mend(source, "model", StandardizeInput(), He(), DropSquashing())
    after = patch.after.decode()
    assert "def mended_2(model):" in after
    assert "\nclass Before(" not in after
    assert "from torch import nn" not in after


def test_the_random_numbers_after_it_stay_the_same() -> None:
    source = PLAIN + "\nlater = torch.randn(4)\n"
    mend(source, "model", Orthogonal(), SwapActivation("PReLU"))
    assert torch.equal(sys.modules["net"].later, sys.modules["again"].later)
