"""Edits: what they change, what they leave alone, and that their code does the same."""

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from gradmend import surgery
from gradmend.errors import SetupError
from gradmend.layers import Residual, Standardize, call, definitions
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
    "before": lambda model: surgery.insert_before(model, "head.out", nn.LayerNorm(4)),
    "before, two arguments": lambda model: surgery.insert_before(model, "mix", nn.Softsign()),
    "before shared": lambda model: surgery.insert_before(model, "act", nn.BatchNorm1d(4)),
    "after": lambda model: surgery.insert_after(model, "net.0", nn.LayerNorm(4)),
    "after shared": lambda model: surgery.insert_after(model, "block", nn.BatchNorm1d(4)),
    "residual": lambda model: surgery.wrap_residual(model, ["net.2"], 0.5),
    "learned residual": lambda model: surgery.wrap_residual(model, ["net.0"], 0.25, learned=True),
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
