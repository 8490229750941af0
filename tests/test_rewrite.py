"""Rewriting: functions of the user's forward become modules, and all else of a model stays as it was."""

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmend import rewrite
from gradmend.anatomy import Anatomy, Site
from gradmend.errors import SetupError
from gradmend.layers import definitions
from gradmend.recorder import read
from gradmend.surgery import Edit
from helpers import Functional, Tied, assert_same, blobs
from promises import output

X, Y = blobs()
BATCH = (X, Y)


class Net(nn.Module):
    """Functions of every kind, a mode that matters, a shared and an unused layer, and an own method."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(16, 3)  # not in the order of execution
        self.inner, self.twice, self.norm = nn.Linear(8, 16), nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("factor", torch.tensor(2.0))
        self.bias = nn.Parameter(torch.zeros(16))
        self.note = "kept"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = torch.sigmoid(self.norm(self.inner(x)) + self.bias)
        h = F.dropout(h, 0.3, self.training)
        if mask is not None:
            h = h * mask
        h = F.relu(self.twice(h), inplace=True) * self.factor
        h = self.twice(h).tanh() if self.training else 0.5 * self.twice(h).tanh()
        return nn.Softmax(dim=1)(self.out(F.leaky_relu(torch.relu(h) - 0.1, 0.3)))

    def described(self) -> str:
        return f"{self.note} {self.training}"


class Outer(nn.Module):
    """Calls the same module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.out = Block(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(self.block(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x)) + torch.relu(x)


def net(kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def anatomy(model: nn.Module) -> Anatomy:
    twin = copy.deepcopy(model).train()
    return read(twin, lambda: twin(X), X)


def loss(model: nn.Module) -> Callable[[], Tensor]:
    """That of the sum of a softmax would be constant."""
    return lambda: (model(X) * torch.arange(1.0, 4.0)).mean()


def chosen(model: nn.Module, *functions: str) -> list[Site]:
    sites = [s for s in anatomy(model).sites if s.function in functions]
    return [s for s in sites if rewrite.calls(model, s)]


def put(model: nn.Module, make: Callable[[], nn.Module | None], *functions: str) -> list[Edit]:
    sites = chosen(model, *functions)
    return rewrite.put(model, anatomy(model), sites, lambda _: make(), loss(model))


SAME: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "leaky_relu": lambda: nn.LeakyReLU(0.3),
    "softmax": lambda: nn.Softmax(1),
    "dropout": lambda: nn.Dropout(0.3),
}


@pytest.mark.parametrize("function", SAME)
def test_the_same_function_as_a_module_computes_the_same(function: str) -> None:
    old, new = net(), net()
    (edit,) = put(new, SAME[function], function)
    assert edit.text.endswith(f"{function} -> {type(SAME[function]()).__name__}")
    for mode in (True, False):
        assert_same(output(new, BATCH, mode), output(old, BATCH, mode))
    assert len([m for m in new.modules() if type(m) is type(SAME[function]())]) == edit.text.count(function)


def test_all_else_of_the_model_stays() -> None:
    old, fired = net(), []
    new, before = old, dict(old.named_parameters())
    keys, optimizer = list(old.state_dict()), torch.optim.Adam(old.parameters())
    old.register_forward_hook(lambda *_: fired.append(1))
    put(new, nn.GELU, "sigmoid", "relu", "tanh")
    assert new is old
    assert isinstance(new, Net)
    assert type(new).__name__ == "Net"
    assert list(new.state_dict()) == keys
    assert all(p is before[name] for name, p in new.named_parameters())
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(
        map(id, before.values())
    )
    assert new.described() == "kept True"
    fired.clear()
    new(X)
    assert fired == [1]


def test_new_parameters_come_last_and_take_over_dtype_and_mode() -> None:
    model = net().double().eval()
    before, x = list(model.state_dict()), X.double()
    twin = copy.deepcopy(model).train()
    found = read(twin, lambda: twin(x), x)
    sites = [s for s in found.sites if s.function == "tanh"]
    rewrite.put(model, found, sites, lambda _: nn.PReLU(), lambda: model(x).square().mean())
    assert list(model.state_dict()) == [*before, "prelu.weight"]
    assert model.prelu.weight.dtype == torch.float64
    assert not model.prelu.training


@pytest.mark.parametrize("functions", [("sigmoid",), ("sigmoid", "relu", "tanh", "softmax", "dropout")])
def test_copies_pickles_and_compiled_models_do_the_same(functions: tuple[str, ...]) -> None:
    model = net()
    put(model, nn.ELU, *functions)
    pickled = pickle.loads(pickle.dumps(model))
    assert type(pickled) is type(model)
    for twin in (copy.deepcopy(model), pickled, pickle.loads(pickle.dumps(copy.deepcopy(pickled)))):
        assert list(twin.state_dict()) == list(model.state_dict())
        for mode in (True, False):
            assert_same(output(twin, BATCH, mode), output(model, BATCH, mode))
    with torch.no_grad():
        assert_same(output(torch.compile(model, backend="eager"), BATCH, False), output(model, BATCH, False))


def test_a_model_can_be_rewritten_again() -> None:
    model, once = net(), net()
    for function in ("sigmoid", "relu", "tanh"):
        put(model, nn.SiLU, function)
    put(once, nn.SiLU, "sigmoid", "relu", "tanh")
    assert type(model).__mro__[2] is Net
    for mode in (True, False):
        assert_same(output(model, BATCH, mode), output(once, BATCH, mode))


@pytest.mark.parametrize("functions", [("sigmoid", "tanh"), ("softmax",), ("relu", "dropout")])
def test_the_code_of_an_edit_does_the_same(functions: tuple[str, ...]) -> None:
    model, own = net(), net()
    edits = put(model, nn.PReLU, *functions)
    code = "\n".join(edit.code for edit in edits)
    assert "gradmend" not in code
    exec(f"{definitions(code)}\n{code}", {"model": own})
    assert_same(own.state_dict(), model.state_dict())
    for mode in (True, False):
        assert_same(output(own, BATCH, mode), output(model, BATCH, mode))


def test_none_leaves_a_call_out() -> None:
    model, old = net(), net()
    put(model, lambda: None, "softmax")
    scores = output(model, BATCH, False)
    torch.testing.assert_close(scores.softmax(1), output(old, BATCH, False))
    assert len(list(model.modules())) == len(list(old.modules()))


def test_of_several_calls_one_can_be_chosen() -> None:
    model, found = net(Functional), anatomy(net(Functional))
    second = [s for s in found.sites if s.function == "relu"][1]
    rewrite.put(model, found, [second], lambda _: nn.Identity(), loss(model))
    old = net(Functional)
    with torch.no_grad():
        h = torch.tanh(old.inner(X))
        h = h + F.relu(old.twice(h))
        h = F.leaky_relu(h @ old.weight + old.bias, 0.2)
        torch.testing.assert_close(model(X), old.out(old.twice(h)))


def test_a_module_that_is_called_twice_changes_in_both_calls() -> None:
    model, found = net(Outer), anatomy(net(Outer))
    sites = [s for s in found.sites if s.function == "relu"]
    assert len(sites) == 4
    for lone in ([sites[0]], sites[:2], [sites[1], sites[3], sites[0]]):
        assert "is called in several places" in (rewrite.obstacle(model, found, lone) or "")
    (edit,) = rewrite.put(model, found, [sites[0], sites[2]], lambda _: nn.Tanh(), loss(model))
    assert edit.where == "block"
    block = net(Outer).block
    torch.testing.assert_close(model.block(X), torch.tanh(block.layer(X)) + torch.relu(X))


class Remembering(nn.Module):
    """Makes its first state, and noise, as it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.out = nn.GRU(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        steps = x.view(x.size(0), -1, 2)
        first = torch.zeros(1, x.size(0), 5).to(x.device)
        output, _ = self.gru(steps, first + torch.rand(5) * torch.arange(5.0))
        return F.softmax(self.out(output[:, -1]), dim=1)


def test_tensors_that_a_forward_makes_are_made_anew() -> None:
    model, old = net(Remembering), net(Remembering)
    put(model, lambda: nn.Softmax(1), "softmax")
    for rows in (len(X), 7):
        assert_same(output(model, (X[:rows], Y)), output(old, (X[:rows], Y)))
    assert not torch.equal(model(X), model(X))
    assert torch.zeros(2).tolist() == [0.0, 0.0]


def test_layers_of_torch_are_no_calls_of_the_user() -> None:
    model = nn.Sequential(nn.Linear(8, 3), nn.Sigmoid())
    assert not any(rewrite.calls(model, site) for site in anatomy(model).sites)


# What cannot be traced


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.layer(x))
        if h.sum() > 0:
            return h
        return -h


class Counting(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(sum(self.layer(row) for row in x[:, None]))


class Constant(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x) + x.new_tensor([1.0, 2.0, 3.0]) * CONSTANT)


CONSTANT = torch.ones(3)


class Noisy(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x) * random.random())


class Cut(Branching):
    """Gradients are off in a part: fx does not see that."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.layer(x)
        return torch.relu(h) + self.layer(x)


class Keeping(Branching):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.layer(x)
        return torch.relu(self.last)


class InPlace(Branching):
    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        torch.relu_(h)
        return h


class Anything(Branching):
    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.relu(self.layer(inputs[0]))


REFUSED = {
    Branching: (2, "control flow"),
    Counting: (1, "torch.fx cannot trace this forward"),
    Constant: (0, "it uses tensors from outside, or keeps some"),
    Keeping: (0, "it uses tensors from outside, or keeps some"),
    InPlace: (2, "works in place on what is used elsewhere"),
    Anything: (0, "any number of arguments"),
}
OTHERWISE = (Noisy, Cut)


def first_line(kind: type[nn.Module]) -> int:
    return kind.forward.__code__.co_firstlineno


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_traced_is_named_with_its_line(kind: type[nn.Module]) -> None:
    model = net(kind)
    before, space, own = copy.deepcopy(model.state_dict()), set(vars(model)), type(model)
    sites = [s for s in anatomy(model).sites if s.function == "relu"]
    offset, words = REFUSED[kind]
    text = rewrite.obstacle(model, anatomy(model), sites) or ""
    assert text.startswith(f"{__file__}:{first_line(kind) + offset}: ")
    assert words in text
    with pytest.raises(SetupError) as raised:
        rewrite.put(model, anatomy(model), sites, lambda _: nn.Tanh(), loss(model))
    assert words in str(raised.value)
    assert_same(model.state_dict(), before)
    assert (set(vars(model)), type(model)) == (space, own)


@pytest.mark.parametrize("kind", OTHERWISE)
def test_a_trace_that_does_something_else_is_refused(kind: type[nn.Module]) -> None:
    model = net(kind)
    own, sites = type(model), [s for s in anatomy(model).sites if s.function == "relu"]
    with pytest.raises(SetupError, match="is not the forward of the model"):
        rewrite.put(model, anatomy(model), sites, lambda _: nn.Tanh(), loss(model))
    assert type(model) is own


def test_arguments_with_defaults_keep_them_and_others_are_not_taken() -> None:
    model = net()
    put(model, nn.Tanh, "sigmoid")
    with pytest.raises(TypeError):
        model(X, torch.ones(()))


def test_rewritten_models_train_as_others_do() -> None:
    def losses(model: Any) -> list[float]:
        optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
        for _ in range(3):
            optimizer.zero_grad()
            torch.manual_seed(0)
            value = F.nll_loss((model(X) + 1e-6).log(), Y)
            value.backward()
            optimizer.step()
            found.append(value.item())
        return found

    model = net()
    put(model, nn.Tanh, "tanh")
    assert losses(model) == losses(net())


def test_weights_used_without_their_layer_are_kept() -> None:
    model, old = net(Tied), net(Tied)
    sites = chosen(model, "sigmoid")
    rewrite.put(model, anatomy(model), sites, lambda _: nn.Sigmoid(), lambda: model(X).square().mean())
    assert_same(output(model, BATCH), output(old, BATCH))
