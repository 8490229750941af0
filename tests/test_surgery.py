"""Every edit: its code does the same, a second time changes nothing, checkpoints load, it trains."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edits import EDITS, INITS, Change, X, every_edit, net, outputs, prelude, randomized, run, same
from gradmend import surgery
from gradmend.errors import SetupError
from gradmend.surgery import Edit

# Every edit


@pytest.mark.parametrize("change", [*EDITS.values(), *INITS.values()], ids=[*EDITS, *INITS])
@pytest.mark.parametrize("training", [True, False])
def test_code_does_what_the_edit_did(change: Change, training: bool) -> None:
    by_edit, by_code = net().train(training), net().train(training)
    torch.manual_seed(2)
    edit = change(by_edit)
    torch.manual_seed(2)
    assert edit is not None
    assert "gradmend" not in prelude([edit]) + edit.code
    assert same(by_edit, run([edit], by_code))
    assert not same(by_edit, net().train(training))


def test_code_of_all_edits_together_defines_each_class_once() -> None:
    by_edit, by_code, inner = net(), net(), ["replace", "residual over siblings", "residual over all"]
    outer = ["before", "before, two arguments", "before shared", "after", "after shared"]
    changes = [*INITS.values(), *(EDITS[name] for name in inner + outer)]
    torch.manual_seed(2)
    edits = [edit for change in changes if (edit := change(by_edit)) is not None]
    assert len(edits) == len(changes)
    torch.manual_seed(2)
    assert same(by_edit, run(edits, by_code))
    assert all(prelude(edits).count(f"class {name}(") == 1 for name in ("Before", "After", "Residual"))


def test_prelude_has_only_what_is_needed() -> None:
    assert prelude([Edit("1", 'model.set_submodule("1", nn.ReLU())', "")]) == ("from torch import nn\n")
    after = prelude([Edit("1", "model = After(model, nn.ReLU())", "")])
    assert "class After" in after
    assert "partial" not in after
    assert "class Before" not in after
    assert "class Residual" not in after


@every_edit
def test_a_second_time_changes_nothing(change: Change) -> None:
    model = net()
    change(model)
    once, text = copy.deepcopy(model), repr(model)
    assert change(model) is None
    assert repr(model) == text
    assert same(model, once)


@every_edit
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_newcomers_take_over_dtype_and_mode(change: Change, dtype: torch.dtype, training: bool) -> None:
    model = net().to(dtype).train(training)
    edit = change(model)
    assert edit is not None
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {dtype}
    assert {module.training for module in model.modules()} == {training}
    assert outputs(model, X.to(dtype)).dtype == dtype
    by_code = run([edit], net().to(dtype).train(training))
    assert torch.equal(outputs(by_code, X.to(dtype)), outputs(model, X.to(dtype)))


@every_edit
def test_newcomers_take_over_the_device(change: Change) -> None:
    model = net().to("meta")
    assert change(model) is not None
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


@every_edit
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_edited_models_can_be_copied(change: Change, clone: Callable[[nn.Module], nn.Module]) -> None:
    model, old = net(), randomized(net())
    change(model)
    twin = clone(model)
    assert same(model, twin)
    randomized(twin)
    assert not same(model, twin)
    twin.load_state_dict(model.state_dict())
    assert same(model, twin)
    twin.load_state_dict(old.state_dict(), strict=False)
    model.load_state_dict(old.state_dict(), strict=False)
    assert same(model, twin)


@every_edit
def test_old_checkpoints_load(change: Change) -> None:
    model, old = net(), randomized(net())
    kept = {id(parameter) for parameter in model.parameters()}
    before = {id(p): name for name, p in model.named_parameters()}
    change(model)
    result = model.load_state_dict(old.state_dict(), strict=False)
    for parameter in model.parameters():
        if id(parameter) in kept:
            assert torch.equal(parameter, old.get_parameter(before[id(parameter)]))
    replaced = [key for key in result.unexpected_keys if not key.startswith("net.3.")]
    assert replaced == []


@every_edit
def test_new_checkpoints_make_the_round_trip(change: Change) -> None:
    model, other = net(), net()
    change(model)
    change(other)
    randomized(other)
    model.load_state_dict(other.state_dict())
    assert same(model, other)


@every_edit
def test_edited_models_train(change: Change) -> None:
    model = net()
    before = list(model.parameters())
    optimizer = torch.optim.SGD(before, lr=0.1, momentum=0.9)
    change(model)
    after = list(model.parameters())
    surgery.sync_optimizer(optimizer, before, after)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == set(after)
    values = [parameter.detach().clone() for parameter in after]
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in after)
    assert any(not torch.equal(a, b) for a, b in zip(values, after, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda model, path: surgery.replace(model, path, nn.ReLU()),
        lambda model, path: surgery.insert_before(model, path, nn.ReLU()),
        lambda model, path: surgery.insert_after(model, path, nn.ReLU()),
        lambda model, path: surgery.wrap_residual(model, [path]),
    ],
)
def test_refusals(change: Callable[[nn.Module, str], Edit | None]) -> None:
    with pytest.raises(SetupError, match=r"no module 'net\.9'.*Did you mean 'net"):
        change(net(), "net.9")
    with pytest.raises(SetupError, match="wrap_input"):
        change(net(), "")
    with pytest.raises(SetupError, match=r"Edit `model\.module` before wrapping it"):
        change(nn.DataParallel(net()), "module.act")
    with pytest.raises(SetupError, match="compile afterwards"):
        change(torch.compile(net(), backend="eager"), "_orig_mod.act")


# anything


@st.composite
def sequentials(draw: st.DrawFn, depth: int = 2) -> nn.Sequential:
    """Nested Sequentials of width 4, in which modules may occur more than once."""
    pool = [nn.Linear(4, 4), nn.Tanh(), nn.BatchNorm1d(4)]
    kinds = st.sampled_from([*pool, "linear", "tanh", *(["nested"] if depth else [])])
    children = []
    for kind in draw(st.lists(kinds, min_size=1, max_size=4)):
        if kind == "nested":
            children.append(draw(sequentials(depth - 1)))
        elif isinstance(kind, nn.Module):
            children.append(kind)
        else:
            children.append(nn.Linear(4, 4) if kind == "linear" else nn.Tanh())
    return nn.Sequential(*children)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_edits_of_any_sequential(data: st.DataObject) -> None:
    model = data.draw(sequentials())
    start, old = copy.deepcopy(model), randomized(copy.deepcopy(model))
    places = {id(p): name for name, p in model.named_parameters()}
    edits = []
    for _ in range(data.draw(st.integers(1, 4))):
        path = data.draw(st.sampled_from([p for p, _ in model.named_modules(remove_duplicate=False) if p]))
        change = data.draw(
            st.sampled_from(
                [
                    lambda path: surgery.insert_before(model, path, nn.LayerNorm(4)),
                    lambda path: surgery.insert_after(model, path, nn.Softsign()),
                    lambda path: surgery.wrap_residual(model, [path], 0.5, learned=True),
                ]
            )
        )
        edit = change(path)
        text = repr(model)
        assert change(path) is None
        assert repr(model) == text
        edits += [edit] if edit is not None else []
    assert same(model, run(edits, start))
    model.load_state_dict(old.state_dict(), strict=False)
    for parameter in model.parameters():
        if id(parameter) in places:
            assert torch.equal(parameter, old.get_parameter(places[id(parameter)]))
