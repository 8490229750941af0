"""The one door for edits: every change to a model or to an optimizer's groups goes through here.

Edits work in place and return what they changed as an `Edit`, or None if there was nothing to change: applied
twice, they change nothing the second time. A shared module stays shared: it is edited wherever it sits. What
comes in takes over device, dtype and train mode of what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmend.errors import SetupError, suggest
from gradmend.layers import After, Before, Dense, Residual, call, load_old_keys
from gradmend.weights import inherit, set_weight

_CLOSED = {
    "DataParallel": "Edit `model.module` before wrapping it.",
    "DistributedDataParallel": "Edit `model.module` before wrapping it.",
    "OptimizedModule": "Edit the original, compile afterwards.",
    "ScriptModule": "Edit the original, script afterwards.",
}
_WRAPS = (After, Before, Residual, Dense)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


@dataclass(frozen=True)
class Edit:
    """One change to a model.

    Args:
        where: the path of the module, "" for the root.
        code: torch code that makes the same change to a variable called `model`, after `layers.definitions`.
        text: the change for people.

    >>> replace(nn.Sequential(nn.Sigmoid()), "0", nn.ReLU())
    Edit(where='0', code='model.set_submodule("0", nn.ReLU())', text='0: Sigmoid -> ReLU')
    """

    where: str
    code: str
    text: str


def paths(model: nn.Module, module: nn.Module) -> list[str]:
    """All paths that lead to this very module: several if it is shared, none if it is not in the model.

    >>> act = nn.ReLU()
    >>> paths(nn.Sequential(nn.Linear(2, 2), act, nn.Linear(2, 2), act), act)
    ['1', '3']
    """
    return [path for path, found in model.named_modules(remove_duplicate=False) if found is module]


def replace(model: nn.Module, path: str, new: nn.Module, keep: bool = False) -> Edit | None:
    """Put `new` in the place of the module at `path`; the user's hooks move to it and keep firing.

    For the code of the edit, `repr(new)` must be the call that makes `new`, as it is for torch's own layers.
    With `keep`, parameters of equal names and shapes move to `new` as well.

    Raises:
        SetupError: if `path` is unknown or the root, or the model cannot be edited.

    >>> replace(nn.Sequential(nn.Linear(2, 2), nn.Sigmoid()), "1", nn.ReLU()).text
    '1: Sigmoid -> ReLU'
    """
    old = _place(model, path)
    _adapt(model, old, new)
    if _equal(old, new):
        return None
    _move_hooks(old, new)
    build = f"inherit({call(new)}, {_code(path)})" if keep else call(new)
    return _put(model, path, inherit(new, old) if keep else new, build, f"{_name(old)} -> {_name(new)}")


def insert_before(model: nn.Module, path: str, new: nn.Module) -> Edit | None:
    """Run `new` on the first input of the module at `path`, unless one of its type does so already.

    >>> insert_before(nn.Sequential(nn.Linear(2, 2), nn.Sigmoid()), "1", nn.LayerNorm(2)).code
    'model.set_submodule("1", Before(model.get_submodule("1"), nn.LayerNorm((2,))))'
    """
    return _insert(model, path, new, Before)


def insert_after(model: nn.Module, path: str, new: nn.Module) -> Edit | None:
    """Run `new` on the output of the module at `path`, unless one of its type does so already.

    >>> insert_after(nn.Sequential(nn.Linear(2, 2), nn.Sigmoid()), "0", nn.LayerNorm(2)).text
    '0: LayerNorm after Linear'
    """
    return _insert(model, path, new, After)


def wrap_input(model: nn.Module, new: nn.Module) -> tuple[nn.Module, Edit | None]:
    """Put `new` before the whole model, in the place of one of its type if there is one.

    >>> wrap_input(nn.Linear(4, 1), nn.Flatten())[1].code
    'model = Before(model, nn.Flatten())'
    """
    inner, path = _find(model, ""), "before"
    while isinstance(inner, Before):
        if type(inner.before) is type(new):
            return model, replace(model, path, new)
        inner, path = inner.body, f"body.{path}"
    _adapt(model, model, new)
    wrapped = Before(model, new)
    wrapped.training = model.training
    load_old_keys(wrapped, {"": "body."})
    return wrapped, Edit("", f"model = Before(model, {call(new)})", f"input: {_name(new)}")


def wrap_output(model: nn.Module, new: nn.Module) -> tuple[nn.Module, Edit | None]:
    """Put `new` after the whole model, in the place of one of its type if there is one.

    >>> wrap_output(nn.Linear(4, 1), nn.Flatten(0))[1].code
    'model = After(model, nn.Flatten(start_dim=0))'
    """
    inner, path = _find(model, ""), "after"
    while isinstance(inner, _WRAPS[:2]):
        if isinstance(inner, After) and type(inner.after) is type(new):
            return model, replace(model, path, new)
        inner, path = inner.body, f"body.{path}"
    _adapt(model, model, new)
    wrapped = After(model, new)
    wrapped.training = model.training
    load_old_keys(wrapped, {"": "body."})
    return wrapped, Edit("", f"model = After(model, {call(new)})", f"output: {_name(new)}")


def wrap_residual(
    model: nn.Module,
    where: Sequence[str],
    scale: float = 1.0,
    learned: bool = False,
    skip: nn.Module | None = None,
) -> Edit | None:
    """Add the input of a module, or of consecutive children of one `nn.Sequential`, to its output.

    The `Residual` takes the place of the first child and `nn.Identity()` those of the others, so that later
    children keep their keys. Where the shapes differ, the input goes through `skip`.

    Raises:
        SetupError: if the paths are not consecutive children of one `nn.Sequential`.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    >>> wrap_residual(model, ["0", "1"], scale=0.0, learned=True).text
    '0: residual connection over 0, 1, scale 0.0, learned'
    >>> list(model.state_dict())
    ['0.scale', '0.body.0.weight', '0.body.0.bias', '2.weight', '2.bias']
    """
    first, parent_path = where[0], where[0].rpartition(".")[0]
    _place(model, first)
    nest = _nest(model, first)
    if 1 < len(where) == len(model.get_submodule(parent_path)._modules):
        nest += _nest(model, parent_path)
    if any(isinstance(module, Residual) for module in nest):
        return None
    if skip is not None:
        _adapt(model, nest[0], skip)
    grouping, moved = _group(model, where) if len(where) > 1 else ([], None)
    options = f"{scale}" + (", learned=True" if learned else "") + (f", skip={call(skip)}" if skip else "")
    text = f"residual connection over {', '.join(where)}, scale {scale}{', learned' if learned else ''}"
    text += ", projected" if skip is not None else ""
    new = Residual(model.get_submodule(first), scale, learned, skip)
    edit = _wrap(model, first, new, f"Residual({_code(first)}, {options})", text, moved)
    return Edit(first, "\n".join([*grouping, edit.code]), edit.text)


def wrap_dense(model: nn.Module, where: Sequence[str], starts: Sequence[int], dim: int) -> Edit | None:
    """Let blocks of consecutive children of one `nn.Sequential` read the outputs of all blocks before them.

    The layers must take that many inputs already. `Dense` takes the place of the first child, as in
    `wrap_residual`.

    Raises:
        SetupError: if the paths are not consecutive children of one `nn.Sequential`.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(5, 1))
    >>> wrap_dense(model, ["0", "1"], starts=(0, 1), dim=1).text
    '0: dense connections over 0, 1'
    """
    first = where[0]
    _place(model, first)
    if any(isinstance(module, Dense) for module in _nest(model, first)):
        return None
    grouping, moved = _group(model, where)
    body = model.get_submodule(first)
    if not isinstance(body, nn.Sequential):
        return None
    build = f"Dense({_code(first)}, {tuple(starts)}, {dim})"
    text = f"dense connections over {', '.join(where)}"
    edit = _wrap(model, first, Dense(body, starts, dim), build, text, moved)
    return Edit(first, "\n".join([*grouping, edit.code]), edit.text)


def change(model: nn.Module, path: str, function: Callable[..., object], text: str, **options: Any) -> Edit:
    """Run one of the functions of `weights`, or a parametrization of torch's, on the module at `path`.

    >>> from torch.nn.utils.parametrizations import weight_norm
    >>> change(nn.Sequential(nn.Linear(2, 2)), "0", weight_norm, "weight normalization").code
    'weight_norm(model.get_submodule("0"))'
    """
    function(_find(model, path), **options)
    written = "".join(f", {key}={value!r}" for key, value in options.items())
    return Edit(path, f"{function.__name__}({_code(path)}{written})", f"{path}: {text}")


def fill(
    model: nn.Module,
    path: str,
    init: Callable[[Tensor], object],
    code: str,
    name: str = "weight",
    bias: Callable[[Tensor], object] = nn.init.zeros_,
    bias_code: str = "",
) -> Edit:
    """Run `init` on the weight called `name` of the module at `path`, and `bias` on its bias.

    A parametrized weight (`weight_norm`, `orthogonal`) is assigned through its parametrization. `init` gets
    a tensor of at least float32 and changes it in place; `code` is the expression that gives `init`.

    Raises:
        SetupError: if the module has no such parameter, or it cannot be assigned.

    >>> fill(nn.Sequential(nn.Linear(2, 2)), "0", nn.init.orthogonal_, "nn.init.orthogonal_").code
    'set_weight(model.get_submodule("0"), nn.init.orthogonal_)'
    """
    layer = _find(model, path)
    names = [*dict(layer.named_parameters(recurse=False)), *getattr(layer, "parametrizations", {})]
    if name not in names:
        raise SetupError(f"{_name(layer)} at {path!r} has no parameter {name!r}. {suggest(name, names)}")
    try:
        set_weight(layer, init, name, bias)
    except (RuntimeError, NotImplementedError) as error:
        raise SetupError(f"The parameter {name!r} at {path!r} cannot be set: {error}") from error
    which = "" if name == "weight" else f', "{name}"'
    which += f", bias={bias_code}" if bias_code else ""
    return Edit(path, f"set_weight({_code(path)}, {code}{which})", f"{path}: {name} by {code}")


def sync_optimizer(optimizer: Optimizer, before: list[nn.Parameter], after: list[nn.Parameter]) -> None:
    """Bring the groups of an optimizer up to date with its edited model, in place.

    What left the model leaves the optimizer, with its state. What is new and wants a gradient joins the group
    of the nearest parameter before it, else the first. All else stays, but for names (`param_names`).

    Args:
        optimizer: of the model.
        before: `list(model.parameters())` before the edits.
        after: the same after them.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> optimizer, before = torch.optim.SGD(model.parameters(), lr=0.1), list(model.parameters())
    >>> edit = replace(model, "1", nn.Linear(2, 1, bias=False))
    >>> sync_optimizer(optimizer, before, list(model.parameters()))
    >>> len(optimizer.param_groups[0]["params"])
    3
    """
    gone, new = set(before) - set(after), set(after) - set(before)
    groups: dict[Tensor, dict[str, Any]] = {}
    for group in optimizer.param_groups if gone or new else ():
        group.pop("param_names", None)  # a list parallel to the parameters; torch works without
        group["params"][:] = [parameter for parameter in group["params"] if parameter not in gone]
        groups |= dict.fromkeys(group["params"], group)
    for parameter in gone:
        optimizer.state.pop(parameter, None)
    group = optimizer.param_groups[0]
    for parameter in after:
        if parameter in new and parameter.requires_grad and parameter not in groups:
            groups[parameter] = group
            group["params"].append(parameter)
        group = groups.get(parameter, group)


def _find(model: nn.Module, path: str) -> nn.Module:
    for kind in type(model).__mro__:
        if kind.__name__ in _CLOSED:
            raise SetupError(f"A {kind.__name__} cannot be edited. {_CLOSED[kind.__name__]}")
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if path not in modules:
        raise SetupError(f"The model has no module {path!r}. {suggest(path, filter(None, modules))}")
    return modules[path]


def _place(model: nn.Module, path: str) -> nn.Module:
    if not path:
        raise SetupError("The root of a model has no place in it. Use `wrap_input`, or wrap it yourself.")
    return _find(model, path)


def _put(model: nn.Module, path: str, new: nn.Module, build: str, text: str) -> Edit:
    old = model.get_submodule(path)
    places = [path, *(place for place in paths(model, old) if place != path)]
    for place in places:
        model.set_submodule(place, new)
    new.training = old.training
    builds = [build] + [_code(path)] * (len(places) - 1)
    code = [f'model.set_submodule("{place}", {build})' for place, build in zip(places, builds, strict=True)]
    return Edit(path, "\n".join(code), f"{', '.join(places)}: {text}")


def _wrap(
    model: nn.Module, path: str, wrap: nn.Module, build: str, text: str, moved: dict[str, str] | None = None
) -> Edit:
    edit = _put(model, path, wrap, build, text)
    if wrap.get_submodule("body").state_dict():
        load_old_keys(model, moved or {f"{place}.": f"{place}.body." for place in paths(model, wrap)})
    return edit


def _insert(model: nn.Module, path: str, new: nn.Module, kind: type[Before] | type[After]) -> Edit | None:
    old, side = _place(model, path), kind.__name__.lower()
    present = [getattr(wrap, side) for wrap in _nest(model, path) if isinstance(wrap, kind)]
    if any(type(module) is type(new) for module in present):
        return None
    _adapt(model, old, new)
    build = f"{kind.__name__}({_code(path)}, {call(new)})"
    return _wrap(model, path, kind(old, new), build, f"{_name(new)} {side} {_name(old)}")


def _group(model: nn.Module, where: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Gather consecutive children at the place of the first, to become the body of a `Residual`."""
    parent_path, dot, _ = where[0].rpartition(".")
    parent = model.get_submodule(parent_path)
    children = [parent_path + dot + name for name in parent._modules]
    start, stop = children.index(where[0]), children.index(where[0]) + len(where)
    if not isinstance(parent, nn.Sequential) or children[start:stop] != list(where):
        raise SetupError(f"Not consecutive children of one nn.Sequential: {', '.join(where)}.")
    news = [nn.Sequential(*list(parent)[start:stop]), *(nn.Identity() for _ in where[1:])]
    for path, new in zip(where, news, strict=True):
        model.set_submodule(path, new)
        new.training = parent.training
    code = [f'model.set_submodule("{path}", nn.Identity())' for path in where[1:]]
    code.insert(
        0, f'model.set_submodule("{where[0]}", nn.Sequential(*list({_code(parent_path)})[{start}:{stop}]))'
    )
    roots = [path + dot for path in paths(model, parent)]
    names = [path.removeprefix(parent_path + dot) for path in where]
    return code, {f"{root}{n}.": f"{root}{names[0]}.body.{i}." for root in roots for i, n in enumerate(names)}


def _nest(model: nn.Module, path: str) -> list[nn.Module]:
    """The module at `path`, with what wraps it and what it wraps."""
    nest = [model.get_submodule(path)]
    while isinstance(wrap := nest[-1], _WRAPS):
        nest.append(wrap.body)
    parent, _, name = path.rpartition(".")
    while name == "body" and isinstance(wrap := model.get_submodule(parent), _WRAPS):
        nest.append(wrap)
        parent, _, name = parent.rpartition(".")
    return nest


def _adapt(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Give `new` the device and dtype of `old`, or of the nearest parameter, and the mode of `old`."""
    modules = list(model.modules())
    at = modules.index(old)
    near = [*reversed(modules[:at]), *modules[at + 1 :]]
    tensors = [*old.parameters(), *old.buffers(), *(p for m in near for p in m.parameters(recurse=False))]
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    if like is not None:
        new.to(like.device, like.dtype)
    new.train(old.training)


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Share the tables of hooks, so that their handles still remove them, less the hooks of torch itself."""
    for name in (*_HOOKS, *_HOOK_FLAGS):
        table = getattr(old, name)
        for key, hook in list(table.items()):
            if str(getattr(hook, "__module__", "")).startswith("torch."):
                del table[key]
        table.update(getattr(new, name))
        setattr(new, name, table)
    if new._is_full_backward_hook is None:
        new._is_full_backward_hook = old._is_full_backward_hook


def _equal(old: nn.Module, new: nn.Module) -> bool:
    a, b = old.state_dict(), new.state_dict()
    alike = type(old) is type(new) and repr(old) == repr(new) and a.keys() == b.keys()
    return alike and all(torch.equal(a[key], b[key]) for key in a)


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _code(path: str) -> str:
    return f'model.get_submodule("{path}")' if path else "model"
