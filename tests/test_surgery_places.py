"""Where edits go: shared modules, hooks, checkpoints, residuals, the input."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from edits import Change, X, net, outputs, randomized, run, same
from gradmend import surgery
from gradmend.errors import SetupError
from gradmend.layers import Residual, Standardize
from gradmend.surgery import Edit

# replace


def test_paths_of_shared_modules() -> None:
    model = net()
    assert surgery.paths(model, model) == [""]
    assert surgery.paths(model, model.act) == ["act", "net.1", "net.4"]
    assert surgery.paths(model, model.block[1]) == ["block.1", "again.1"]
    assert surgery.paths(model, nn.Tanh()) == []


def test_replace_keeps_shared_modules_shared() -> None:
    model, new = net(), nn.ReLU()
    edit = surgery.replace(model, "net.1", new)
    assert model.act is model.net[1] is model.net[4] is new
    assert edit == Edit(
        "net.1",
        'model.set_submodule("net.1", nn.ReLU())\n'
        'model.set_submodule("act", model.get_submodule("net.1"))\n'
        'model.set_submodule("net.4", model.get_submodule("net.1"))',
        "net.1, act, net.4: Tanh -> ReLU",
    )


def test_replace_by_the_same_kind_with_other_values_is_a_change() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert surgery.replace(model, "0", nn.Linear(2, 2)) is not None
    assert surgery.replace(model, "0", copy.deepcopy(model[0])) is None


def test_nearest_parameters_decide_for_modules_without_any() -> None:
    model = nn.Sequential(nn.Linear(2, 2).double(), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
    surgery.replace(model, "1", nn.PReLU())
    surgery.replace(model, "3", nn.PReLU())
    assert model[1].weight.dtype == torch.float64
    assert model[3].weight.dtype == torch.float32
    first = nn.Sequential(nn.ReLU(), nn.Embedding(3, 3).half())
    surgery.replace(first, "0", nn.PReLU())
    assert first[0].weight.dtype == torch.float16


def test_hooks_keep_firing_and_their_handles_keep_working() -> None:
    model, calls = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    layer = model[1]
    handles = [
        layer.register_forward_hook(note("forward")),
        layer.register_forward_hook(note("with_kwargs"), with_kwargs=True, always_call=True),
        layer.register_forward_pre_hook(note("pre")),
        layer.register_forward_pre_hook(note("pre_with_kwargs"), with_kwargs=True),
        layer.register_full_backward_hook(note("backward")),
        layer.register_full_backward_pre_hook(note("backward_pre")),
    ]
    own = nn.Tanh()
    own.register_forward_hook(note("own"))
    surgery.replace(model, "1", own)
    model(X).sum().backward()
    assert calls == ["pre", "pre_with_kwargs", "forward", "with_kwargs", "own", "backward_pre", "backward"]
    for handle in handles:
        handle.remove()
    calls.clear()
    model(X).sum().backward()
    assert calls == ["own"]


def test_hooks_of_torch_itself_stay_behind() -> None:
    model, calls = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), []
    nn.utils.spectral_norm(model[0])
    model[0].register_forward_hook(lambda *_: calls.append("user"))
    surgery.replace(model, "0", nn.Identity())
    assert model(X).shape == X.shape
    assert calls == ["user"]


# wraps


@pytest.mark.parametrize("wrap", [surgery.insert_before, surgery.insert_after])
def test_hooks_on_a_wrapped_module_stay_on_it(wrap: Callable[..., Edit | None]) -> None:
    model, seen = nn.Sequential(nn.Linear(4, 4)), []
    layer = model[0]
    layer.register_forward_hook(lambda module, *_: seen.append(module))
    wrap(model, "0", nn.LayerNorm(4))
    model(X)
    assert seen == [layer]


def test_where_the_new_module_runs() -> None:
    linear, norm = nn.Linear(4, 4), nn.LayerNorm(4)
    before, after = nn.Sequential(linear), nn.Sequential(linear)
    surgery.insert_before(before, "0", norm)
    surgery.insert_after(after, "0", norm)
    assert torch.equal(before(X), linear(norm(X)))
    assert torch.equal(after(X), norm(linear(X)))
    assert not torch.equal(before(X), after(X))


def test_insertions_are_recognised_from_inside_and_through_each_other() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    assert surgery.insert_after(model, "0", nn.LayerNorm(4)) is not None
    assert surgery.insert_before(model, "0", nn.LayerNorm(4)) is not None
    assert surgery.wrap_residual(model, ["0"]) is not None
    text = repr(model)
    for path in ("0", "0.body", "0.body.body", "0.body.body.body"):
        assert surgery.insert_after(model, path, nn.LayerNorm(4)) is None
        assert surgery.insert_before(model, path, nn.LayerNorm(4)) is None
        assert surgery.wrap_residual(model, [path]) is None
    assert repr(model) == text
    assert surgery.insert_after(model, "0.body.body.body", nn.Softsign()) is not None


def test_a_body_of_the_users_own_is_no_wrap() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)

    model = nn.Sequential(Block())
    assert surgery.insert_before(model, "0", nn.Tanh()) is not None
    assert surgery.insert_before(model, "0.body.body", nn.Tanh()) is not None


def test_parameterless_insertions_load_old_checkpoints_strictly() -> None:
    model, old = net(), randomized(net())
    surgery.insert_after(model, "net.0", nn.Softsign())
    surgery.insert_before(model, "net.0", nn.Softsign())
    surgery.wrap_residual(model, ["net.0", "net.1", "net.2"])
    surgery.wrap_residual(model, ["block"])
    wrapped, _ = surgery.wrap_input(model, nn.Flatten())
    wrapped.load_state_dict(old.state_dict())
    assert torch.equal(wrapped.body.net[0].body[0].body.body.weight, old.net[0].weight)
    assert torch.equal(wrapped.body.net[0].body[2].weight, old.net[2].weight)
    assert torch.equal(wrapped.body.net[3].running_mean, old.net[3].running_mean)
    assert torch.equal(wrapped.body.block.body[0].weight, old.block[0].weight)


def test_checkpoints_of_every_stage_load_into_the_last() -> None:
    changes: list[Change] = [
        lambda model: surgery.insert_after(model, "0", nn.LayerNorm(4)),
        lambda model: surgery.insert_before(model, "0", nn.LayerNorm(4)),
        lambda model: surgery.wrap_residual(model, ["0", "1"], learned=True),
        lambda model: surgery.wrap_residual(model, ["2"], learned=True),
    ]
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    stages = [randomized(copy.deepcopy(model)).state_dict()]
    for change in changes:
        assert change(model) is not None
        stages.append(randomized(copy.deepcopy(model)).state_dict())
    for stage in stages:
        randomized(model)
        assert model.load_state_dict(stage, strict=False).unexpected_keys == []
        now = model.state_dict().values()
        assert all(any(torch.equal(value, new) for new in now) for value in stage.values())


def test_parts_of_new_checkpoints_load_where_they_belong() -> None:
    model, other = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    for each in (model, other):
        surgery.insert_after(each, "0", nn.LayerNorm(4))
    randomized(other)
    part = {key: value for key, value in other.state_dict().items() if ".after." in key}
    model.load_state_dict(part, strict=False)
    assert torch.equal(model[0].after.weight, other[0].after.weight)


def test_old_checkpoints_of_a_module_whose_keys_look_wrapped() -> None:
    class Own(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.body = nn.Linear(4, 4)

    model, old = nn.Sequential(Own()), randomized(nn.Sequential(Own()))
    surgery.insert_after(model, "0", nn.Tanh())
    model.load_state_dict(old.state_dict())
    assert torch.equal(model[0].body.weight, old[0].weight)
    assert torch.equal(model[0].body.body.weight, old[0].body.weight)


def test_a_missing_key_is_still_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    surgery.insert_after(model, "0", nn.LayerNorm(4))
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.after\.weight"):
        model.load_state_dict(nn.Sequential(nn.Linear(4, 4)).state_dict())


# residuals


@pytest.mark.parametrize("learned", [False, True])
def test_residual_adds_the_scaled_branch(learned: bool) -> None:
    body = nn.Linear(4, 4)
    residual = Residual(body, 0.5, learned)
    assert torch.allclose(residual(X), X + 0.5 * body(X))
    assert ("scale" in dict(residual.named_parameters())) is learned


def test_residual_over_siblings_keeps_the_keys_of_later_ones() -> None:
    model = net()
    keys = [key for key in model.state_dict() if not key.startswith(("net.1", "net.2"))]
    first, act, second, norm, _ = model.net
    surgery.wrap_residual(model, ["net.1", "net.2"], 0.5)
    assert set(keys) < set(model.state_dict())
    h = first(X)
    assert torch.allclose(model.net(X), act(norm(h + 0.5 * second(act(h)))))
    assert model.act is model.net[4] is act


def test_residual_over_siblings_is_recognised_from_inside() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    surgery.wrap_residual(model, ["0", "1"])
    assert surgery.wrap_residual(model, ["0.body.0", "0.body.1"]) is None
    assert surgery.wrap_residual(model, ["0", "1"]) is None
    assert surgery.wrap_residual(model, ["0.body.0"]) is not None


@pytest.mark.parametrize(
    "where",
    [["net.0", "net.2"], ["net.1", "net.0"], ["net.0", "block.1"], ["net.4", "net.5"], ["act", "net"]],
)
def test_residual_refuses_what_is_not_consecutive(where: list[str]) -> None:
    model = net()
    with pytest.raises(SetupError, match="consecutive children"):
        surgery.wrap_residual(model, where)
    assert same(model, net())


def test_residual_names_the_children_of_a_named_sequential() -> None:
    model = nn.Sequential()
    for name, module in (("fc", nn.Linear(4, 4)), ("act", nn.Tanh()), ("out", nn.Linear(4, 2))):
        model.add_module(name, module)
    old = copy.deepcopy(randomized(copy.deepcopy(model)))
    twin = copy.deepcopy(model)
    edit = surgery.wrap_residual(model, ["fc", "act"])
    assert edit is not None
    assert same(model, run([edit], twin))
    model.load_state_dict(old.state_dict())
    assert torch.equal(model.fc.body[0].weight, old.fc.weight)


# the input


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrap_input(dtype: torch.dtype) -> None:
    model, old = net().to(dtype), randomized(net().to(dtype))
    twin = copy.deepcopy(model)
    mean, std = torch.tensor([0.1, 2.0, -3.0, 4.0]), torch.tensor([1.0, 0.3, 5.0, 0.0])
    wrapped, edit = surgery.wrap_input(model.eval(), Standardize(mean, std))
    assert wrapped.before.mean.dtype == dtype
    assert not any(module.training for module in wrapped.modules())
    scaled = (X.to(dtype) - mean.to(dtype)) / torch.tensor([1.0, 0.3, 5.0, 1.0]).to(dtype)
    assert torch.equal(outputs(wrapped), outputs(model, scaled))
    assert edit is not None
    assert same(wrapped, run([edit], twin.eval()))
    wrapped.load_state_dict(old.state_dict(), strict=False)
    assert torch.equal(wrapped.body.net[0].weight, old.net[0].weight)
    assert torch.equal(wrapped.before.mean, mean.to(dtype))
    wrapped.load_state_dict(copy.deepcopy(wrapped).state_dict())


def test_wrapping_the_input_again_replaces_the_wrap() -> None:
    model = net()
    first = Standardize(torch.tensor(1.0), torch.tensor(2.0))
    wrapped, _ = surgery.wrap_input(model, first)
    wrapped, flat = surgery.wrap_input(wrapped, nn.Flatten())
    assert flat is not None
    again, edit = surgery.wrap_input(wrapped, copy.deepcopy(first))
    assert again is wrapped
    assert edit is None
    twin = copy.deepcopy(wrapped)
    other, edit = surgery.wrap_input(wrapped, Standardize(torch.tensor(3.0), torch.tensor(4.0)))
    assert edit is not None
    assert other.body.before.mean == 3.0
    assert other.body.body is model
    assert same(other, run([edit], twin))


def test_wrap_input_passes_the_other_arguments_on() -> None:
    model, _ = surgery.wrap_input(nn.Bilinear(4, 4, 2), Standardize(torch.tensor(1.0), torch.tensor(2.0)))
    assert torch.equal(model(X, input2=X), model.body((X - 1) / 2, X))


def test_wrap_input_refuses_wrapped_models() -> None:
    with pytest.raises(SetupError, match=r"model\.module"):
        surgery.wrap_input(nn.DataParallel(net()), nn.Flatten())


def test_standardize_takes_images_of_bytes() -> None:
    images = torch.randint(0, 256, (8, 3, 5, 5), dtype=torch.uint8)
    floats = images.float()
    mean, std = floats.mean((0, 2, 3), keepdim=True)[0], floats.std((0, 2, 3), keepdim=True)[0]
    out = Standardize(mean, std)(images)
    assert out.dtype == torch.float32
    assert torch.allclose(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(out.std((0, 2, 3)), torch.ones(3), atol=1e-5)
