"""Patches of every kind of target: the patched file gives the mended model, and its optimizer holds it."""

import pytest

from gradmend.remedies import (
    DropSquashing,
    He,
    LayerNorm,
    LearningRate,
    Remedy,
    StandardizeInput,
    SwapActivation,
    Tailor,
    UseOptimizer,
)
from patching import mend

pytestmark = pytest.mark.usefixtures("own_folder")

HEAD = """import torch
from torch import nn
import torch.nn.functional as F
from functools import partial
import gradmend as gm
x = torch.randn(96, 4) * 50
y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
batch = (x, y)
"""
NET = """
class Net(nn.Module):
    '''A net.'''
    def __init__(self, n=3):
        super().__init__()
        self.inp = nn.Linear(4, 16)
        self.hid = nn.ModuleList([nn.Linear(16, 16) for _ in range(n)])
        self.act = nn.Sigmoid()
        self.out = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
        self.apply(self.init)
    def init(self, m):
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=.1)
    def forward(self, x):
        x = F.sigmoid(self.inp(x))
        for h in self.hid: x = self.act(h(x))
        return F.softmax(self.out(x), dim=-1)
"""

TARGETS = {
    "of a class": (
        HEAD
        + NET
        + """
model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=.5, momentum=.9)
""",
        "model",
    ),
    "one of two of a class": (
        HEAD
        + NET
        + """
model = Net()
other = Net(2)
opt = torch.optim.SGD(model.parameters(), lr=.5, momentum=.9)
setup = gm.Setup(model, loss_fn=F.cross_entropy, optimizer=opt)
""",
        "setup",
    ),
    "a class": (
        HEAD + NET,
        "Net",
    ),
    "a subclass": (
        HEAD
        + NET
        + """
class Big(Net):
    def __init__(self):
        super().__init__(5)
""",
        "Big",
    ),
    "a lambda": (
        HEAD
        + NET
        + """
make = lambda: Net()
""",
        "make",
    ),
    "a lambda of a setup": (
        HEAD
        + NET
        + """
make = lambda: gm.Setup(Net(), nn.CrossEntropyLoss(), lambda p: torch.optim.SGD(p, lr=1.))
""",
        "make",
    ),
    "a setup in one call": (
        HEAD
        + """
setup = gm.Setup(nn.Sequential(nn.Linear(4, 16), nn.Sigmoid(), nn.Linear(16, 3), nn.Softmax(dim=1)),
                 nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=1.),)
""",
        "setup",
    ),
    "a function with branches": (
        HEAD
        + NET
        + """
def make(n=3):
    if n > 2:
        net = Net(n)
    else:
        net = Net(1)
    opt = torch.optim.SGD([{'params': net.parameters()}], lr=.2)
    return gm.Setup(net, nn.CrossEntropyLoss(), opt)
""",
        "make",
    ),
    "a function that calls another": (
        HEAD
        + NET
        + """
def build():
    return Net(2)

def make():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=.1)
    return gm.Setup(
        model=model,
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=optimizer,
    )
""",
        "make",
    ),
    "a function that keeps the setup": (
        HEAD
        + NET
        + """
def make():
    setup = gm.Setup(Net(), nn.CrossEntropyLoss(), torch.optim.Adam)
    return setup
""",
        "make",
    ),
    "a function that returns early": (
        HEAD
        + NET
        + """
def make():
    'doc'
    for n in (3,):
        if n: return Net(n)
    return None
""",
        "make",
    ),
    "beside a main part": (
        HEAD
        + NET
        + """
model = Net()
print(model)
if __name__ == '__main__':
    for _ in range(3): model(x)
""",
        "model",
    ),
    "of a tuple": (
        HEAD
        + NET
        + """
model, n = Net(), 3
""",
        "model",
    ),
    "of a condition": (
        HEAD
        + NET
        + """
if True:
    model = Net()
else:
    model = None
""",
        "model",
    ),
    "annotated": (
        HEAD
        + NET
        + """
model: nn.Module = Net().double().float()
""",
        "model",
    ),
    "an ordered dict": (
        HEAD
        + """
from collections import OrderedDict
model = nn.Sequential(OrderedDict(a=nn.Linear(4, 16), b=nn.Sigmoid(), c=nn.Linear(16, 3), d=nn.Softmax(1)))
""",
        "model",
    ),
    "nested": (
        HEAD
        + """
model = nn.Sequential(nn.Sequential(nn.Linear(4, 16), nn.Sigmoid()), nn.Sequential(nn.Linear(16, 16),
  nn.Sigmoid(), nn.Linear(16,3)), nn.Softmax(1))
""",
        "model",
    ),
    "appended": (
        HEAD
        + """
model = nn.Sequential()
for n in (4, 8):
    model.append(nn.Linear(n, 8))
    model.append(nn.Sigmoid())
model.append(nn.Linear(8, 3))
model.append(nn.Softmax(1))
""",
        "model",
    ),
    "a shared layer": (
        HEAD
        + """
act = nn.Sigmoid()
model = nn.Sequential(nn.Linear(4, 16), act, nn.Linear(16, 16), act, nn.Linear(16, 3), nn.Softmax(1))
""",
        "model",
    ),
    "a class in a field": (
        HEAD
        + """
from dataclasses import dataclass
@dataclass
class Config:
    width: int = 16
    act: type = nn.Sigmoid
c = Config()
model = nn.Sequential(nn.Linear(4, c.width), c.act(), nn.Linear(c.width, 3), nn.Softmax(1))
""",
        "model",
    ),
    "changed afterwards": (
        HEAD
        + """
model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3))
model[0].weight.data.mul_(3)
model.to(torch.float32)
""",
        "model",
    ),
    "with star imports": (
        """
from torch import *
from torch.nn import *
import torch
x = torch.randn(96, 4); y = torch.arange(96) % 3; batch = (x, y)
model = Sequential(Linear(4, 16), Sigmoid(), Linear(16, 3), Softmax(1))
optimizer = torch.optim.SGD(model.parameters(), lr=.1)
""",
        "model",
    ),
}
PLANS: dict[str, list[Remedy]] = {
    "in place": [DropSquashing(), SwapActivation("ReLU"), LayerNorm(), He(), LearningRate(0.01)],
    "wrapped": [StandardizeInput(), Tailor("Tanh"), UseOptimizer("Adam", 0.01)],
}


@pytest.mark.parametrize(
    ("kind", "plan"),
    [(kind, plan) for n, kind in enumerate(TARGETS) for plan in PLANS if plan == "in place" or n % 3 == 0],
)
def test_every_target(kind: str, plan: str) -> None:
    source, name = TARGETS[kind]
    patch, wanted, again = mend(source, name, *PLANS[plan], some=True)
    meant = ("makes no optimizer", "makes no loss", "sets it for each group")
    assert [line for line in patch.left if not any(words in line for words in meant)] == []
    model, optimizers = again.setup.model, [s.build_optimizer() for s in (again.setup, wanted)]
    held = [p for group in optimizers[0].param_groups for p in group["params"]]
    assert {*held} == {*model.parameters()}
    if not patch.left:
        assert type(optimizers[0]) is type(optimizers[1])
        assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]


def test_what_hides_the_model_is_left() -> None:
    source = (
        HEAD
        + """
setup = gm.Setup(net := nn.Sequential(nn.Linear(4, 16), nn.Sigmoid(), nn.Linear(16, 3)),
                 nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=.1))
"""
    )
    patch, _, _ = mend(source, "setup", SwapActivation("ReLU"), StandardizeInput(), same=False)
    words = "net.py:10 hides the model, of which the optimizer is made already"
    assert patch.left == (f"input standardized: {words}",)
    assert "nn.Linear(4, 16), nn.ReLU()" in patch.after.decode()


def test_a_file_in_one_line() -> None:
    source = """import torch; from torch import nn; x, y = torch.randn(96, 4), torch.arange(96) % 3; \\
batch = (x, y); model = nn.Sequential(nn.Linear(4, 16), nn.Sigmoid(), nn.Linear(16, 3))"""
    patch, _, _ = mend(source, "model", He())
    assert not patch.left
