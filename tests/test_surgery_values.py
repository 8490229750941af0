"""Edits of values: initialization, the optimizer kept in step, and code of modules."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from edits import X, run
from gradmend import surgery
from gradmend.errors import SetupError
from gradmend.layers import Standardize, call

# initialization


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fill_keeps_parameters_and_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4)).to(dtype)
    weight, bias = model[0].weight, model[0].bias
    dtypes = []

    def init(tensor: Tensor) -> None:
        dtypes.append(tensor.dtype)
        nn.init.orthogonal_(tensor)

    surgery.fill(model, "0", init, "init")
    assert model[0].weight is weight
    assert model[0].bias is bias
    assert (weight.requires_grad, weight.dtype) == (True, dtype)
    assert not bias.any()
    assert torch.allclose(weight.float() @ weight.float().T, torch.eye(4), atol=0.02)
    assert dtypes == [torch.promote_types(dtype, torch.float32)]


@pytest.mark.parametrize("parametrization", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_fill_parametrized_weights(parametrization: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrization(nn.Linear(4, 4)))
    twin, parameters = copy.deepcopy(model), list(model.parameters())
    wanted = nn.init.orthogonal_(torch.empty(4, 4))
    edit = surgery.fill(model, "0", lambda tensor: tensor.copy_(wanted), "wanted.copy_")
    assert torch.allclose(model[0].weight, wanted, atol=1e-5)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert edit.code == 'set_weight(model.get_submodule("0"), wanted.copy_)'
    torch.manual_seed(3)
    edit = surgery.fill(model, "0", nn.init.orthogonal_, "nn.init.orthogonal_")
    torch.manual_seed(3)
    assert torch.equal(run([edit], twin)[0].weight, model[0].weight)


def test_fill_recurrent_weights() -> None:
    model = nn.GRU(4, 3)
    other = model.weight_ih_l0.detach().clone()
    edit = surgery.fill(model, "", nn.init.ones_, "nn.init.ones_", "weight_hh_l0")
    assert edit.code == 'set_weight(model, nn.init.ones_, "weight_hh_l0")'
    assert model.weight_hh_l0.eq(1).all()
    assert not model.bias_hh_l0.any()
    assert model.bias_ih_l0.any()
    assert torch.equal(model.weight_ih_l0, other)
    run([edit], nn.GRU(4, 3))


def test_fill_refuses_what_it_cannot_set() -> None:
    class OneWay(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.abs()

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(SetupError, match=r"ReLU at '1' has no parameter 'weight'"):
        surgery.fill(model, "1", nn.init.ones_, "nn.init.ones_")
    with pytest.raises(SetupError, match=r"no parameter 'wieght'. Did you mean 'weight'"):
        surgery.fill(model, "0", nn.init.ones_, "nn.init.ones_", "wieght")
    parametrize.register_parametrization(model[0], "weight", OneWay())
    with pytest.raises(SetupError, match="right_inverse"):
        surgery.fill(model, "0", nn.init.ones_, "nn.init.ones_")


# optimizers


def trained(
    build: Callable[..., torch.optim.Optimizer], model: nn.Module, groups: object = None
) -> torch.optim.Optimizer:
    """An optimizer after one step, so that it has state."""
    optimizer = build(groups if groups is not None else model.parameters())
    model(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


OPTIMIZERS = [
    partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    partial(torch.optim.Adam, lr=0.1),
    partial(torch.optim.AdamW, lr=0.1, foreach=True),
]


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_sync_keeps_the_state_of_what_stays(build: Callable[..., torch.optim.Optimizer]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer, before = trained(build, model), list(model.parameters())
    kept = {parameter: optimizer.state[parameter] for parameter in model[0].parameters()}
    values = copy.deepcopy(list(kept.values()))
    surgery.replace(model, "2", nn.Linear(4, 2))
    surgery.insert_after(model, "0", nn.LayerNorm(4))
    surgery.sync_optimizer(optimizer, before, list(model.parameters()))
    assert set(optimizer.state) == set(kept)
    for (parameter, state), value in zip(kept.items(), values, strict=True):
        assert optimizer.state[parameter] is state
        assert all(torch.equal(torch.as_tensor(state[k]), torch.as_tensor(value[k])) for k in value)
    held = optimizer.param_groups[0]["params"]
    assert set(held) == set(model.parameters())
    assert len(held) == len(set(held))
    assert held[:2] == before[:2]
    model(X).square().mean().backward()
    optimizer.step()
    assert set(optimizer.state) == set(model.parameters())
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_sync_puts_new_parameters_beside_their_neighbours() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    groups = [
        {"params": list(model[2].parameters()), "lr": 0.01},
        {"params": list(model[0].parameters()), "weight_decay": 0.1},
    ]
    optimizer, before = trained(OPTIMIZERS[0], model, groups), list(model.parameters())
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    surgery.insert_before(model, "0", nn.LayerNorm(4))
    surgery.insert_after(model, "0", nn.RMSNorm(4))
    surgery.insert_after(model, "1", nn.BatchNorm1d(4))
    surgery.insert_after(model, "2", nn.GroupNorm(1, 2))
    surgery.sync_optimizer(optimizer, before, list(model.parameters()))
    last, first = (group["params"] for group in optimizer.param_groups)
    inner = model[0].body
    assert [id(p) for p in last] == [
        id(p) for p in (*model[2].body.parameters(), *inner.before.parameters(), *model[2].after.parameters())
    ]
    assert [id(p) for p in first] == [
        id(p) for p in (*inner.body.parameters(), *model[0].after.parameters(), *model[1].after.parameters())
    ]
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == options


def test_sync_leaves_strangers_and_the_frozen_alone() -> None:
    model, stranger = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([model[0].weight, stranger], lr=0.1)
    before = list(model.parameters())
    surgery.insert_after(model, "0", nn.LayerNorm(4).requires_grad_(False))
    surgery.replace(model, "1", nn.Linear(4, 4, bias=False))
    surgery.sync_optimizer(optimizer, before, list(model.parameters()))
    surgery.sync_optimizer(optimizer, before, list(model.parameters()))
    held = [id(parameter) for parameter in optimizer.param_groups[0]["params"]]
    assert held == [id(model[0].body.weight), id(stranger), id(model[1].weight)]


def test_sync_drops_the_names_of_parameters_and_only_after_a_change() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer, before = torch.optim.SGD(model.named_parameters(), lr=0.1), list(model.parameters())
    surgery.sync_optimizer(optimizer, before, list(model.parameters()))
    assert len(optimizer.param_groups[0]["param_names"]) == 4
    surgery.replace(model, "1", nn.Identity())
    surgery.sync_optimizer(optimizer, before, list(model.parameters()))
    surgery.sync_optimizer(optimizer, before, list(model.parameters()))
    assert optimizer.param_groups[0]["params"] == before[:2]
    assert "param_names" not in optimizer.param_groups[0]
    assert len(optimizer.state_dict()["param_groups"][0]["params"]) == 2


# code


@pytest.mark.parametrize(
    "module",
    [
        nn.GELU(approximate="tanh"),
        nn.Linear(3, 2, bias=False),
        nn.BatchNorm2d(3, affine=False),
        nn.GroupNorm(2, 4),
        nn.RMSNorm(4),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.LSTM(3, 4, batch_first=True),
        nn.Dropout(0.2).eval(),
        nn.Sequential(nn.Flatten(), nn.Softmax(dim=1)),
        nn.LayerNorm(3).to(torch.bfloat16),
        Standardize(torch.tensor([[0.1], [1 / 3]]), torch.ones(2, 1)),
        Standardize(torch.tensor(0.1, dtype=torch.float64), torch.tensor(1 / 3, dtype=torch.float64)),
        Standardize(torch.tensor(0.1).bfloat16(), torch.tensor(1 / 3).bfloat16()),
    ],
    ids=repr,
)
def test_call_makes_the_module_again(module: nn.Module) -> None:
    made = eval(call(module), {"torch": torch, "nn": nn, "Standardize": Standardize})
    assert repr(made) == repr(module)
    assert made.training is module.training
    for name, tensor in module.named_buffers():
        assert made.get_buffer(name).dtype == tensor.dtype
        assert torch.equal(made.get_buffer(name), tensor)
    assert [p.dtype for p in made.parameters()] == [p.dtype for p in module.parameters()]


def test_call_is_short() -> None:
    assert call(nn.ReLU()) == "nn.ReLU()"
    assert call(nn.BatchNorm1d(4)) == "nn.BatchNorm1d(4)"
    assert call(nn.LayerNorm(4, eps=1e-3)) == "nn.LayerNorm((4,), eps=0.001)"


def test_modules_with_children_can_replace_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    edit = surgery.replace(model, "0", nn.TransformerEncoderLayer(4, 2, 8))
    assert edit is not None
    assert edit.text == "0: Linear -> TransformerEncoderLayer"
    assert model(X).shape == X.shape
