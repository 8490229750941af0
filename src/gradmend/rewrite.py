"""Rewriting: modules in the place of functions that the user's own `forward` calls, by `torch.fx`.

A module stays the object that it is, with its parameters, keys, hooks, mode and methods: its class becomes a
subclass of its own, whose `forward` is the traced one. Both modes are traced, for a forward may look at
`self.training`. What is traced is kept as source text, so that the module can be pickled and copied.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from gradmend.anatomy import Anatomy, Site
from gradmend.errors import SetupError
from gradmend.kinds import identify
from gradmend.layers import call
from gradmend.surgery import Edit
from gradmend.tracing import class_with, line_of_forward, own_class, source, trace, without_lines


def calls(model: nn.Module, site: Site) -> bool:
    """Whether the user's own forward makes this call, rather than a layer of torch's.

    Examples:
        >>> from gradmend.recorder import read
        >>> class Net(nn.Sequential):
        ...     def forward(self, x):
        ...         return torch.sigmoid(super().forward(x))
        >>> model, x = Net(nn.Linear(2, 2)), torch.ones(1, 2)
        >>> [(s.function, calls(model, s)) for s in read(model, lambda: model(x), x).sites]
        [('linear', False), ('sigmoid', True)]
    """
    return not type(model.get_submodule(site.module)).__module__.startswith("torch.")


def obstacle(model: nn.Module, anatomy: Anatomy, sites: Sequence[Site]) -> str | None:
    """Why no module can take the place of these calls, with `file:line`; None if it can."""
    try:
        for path in dict.fromkeys(site.module for site in sites):
            own = [site for site in sites if site.module == path]
            _rewritten(model, anatomy, own, [None] * len(own))
    except SetupError as error:
        return str(error)
    return None


def untraced(module: nn.Module) -> str | None:
    """Why the forward of a module cannot be traced, with `file:line`; None if it can."""
    try:
        for mode in (True, False):
            trace(module, mode)
    except SetupError as error:
        return str(error)
    return None


def put(
    model: nn.Module,
    anatomy: Anatomy,
    sites: Sequence[Site],
    make: Callable[[Site], nn.Module | None],
    run: Callable[[], Tensor],
) -> list[Edit]:
    """Put modules in the place of function calls; each becomes a child of the module whose forward calls it.

    Args:
        model: changed in place.
        anatomy: of the model.
        sites: activations and other functions of one signal that the user's own forward calls.
        make: gives the module for a site; None leaves the call out.
        run: the loss of one batch. Traced, but with the old functions, the model must give the same loss and
            gradients in both modes, or nothing is changed.

    Raises:
        SetupError: if a forward cannot be traced, with `file:line`.

    Examples:
        >>> from gradmend.recorder import read
        >>> class Net(nn.Sequential):
        ...     def forward(self, x):
        ...         return torch.sigmoid(super().forward(x))
        >>> model, x = Net(nn.Linear(2, 2)), torch.ones(1, 2)
        >>> anatomy = read(model, lambda: model(x), x)
        >>> edits = put(model, anatomy, anatomy.sites[1:], lambda _: nn.ReLU(), lambda: model(x).sum())
        >>> isinstance(model, Net), list(model.named_children())[-1]
        (True, ('relu', ReLU()))
    """
    groups = {path: [s for s in sites if s.module == path] for path in dict.fromkeys(s.module for s in sites)}
    for path in groups:
        _check(model, path, run)
    plans = [_rewritten(model, anatomy, own, [make(site) for site in own]) for own in groups.values()]
    return [_install(model, path, own, plan) for (path, own), plan in zip(groups.items(), plans, strict=True)]


def leave_out(
    model: nn.Module, path: str, functions: Collection[str], run: Callable[[], Tensor]
) -> Edit | None:
    """Leave out all calls of functions that change no values, such as `detach`, in one module's own forward.

    Args:
        model: changed in place.
        path: of the module.
        functions: their names; `data` stands for the attribute.
        run: the loss of one batch, as for `put`.

    Returns:
        The edit; None if the forward makes no such call.

    Raises:
        SetupError: if it cannot be traced, with `file:line`.
    """
    module, forwards, found = model.get_submodule(path), list[str](), set[str]()
    for mode in (True, False):
        graph = trace(module, mode)
        for node in [n for n in graph.nodes if _signal_function(n) in functions]:
            found.add(str(_signal_function(node)))
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        forwards.append(source(graph))
    if not found:
        return None
    _check(model, path, run)
    module.__class__ = class_with(own_class(module), (forwards[0], forwards[1]))
    text = f"{line_of_forward(module)}: {', '.join(sorted(found))} -> nothing"
    return Edit(path, _code(path, (forwards[0], forwards[1]), {}), text)


def _signal_function(node: fx.Node) -> str | None:
    """The function that a node calls, or the attribute that it reads."""
    return str(node.args[1]) if node.target is getattr else _function(node)


Plan = tuple[tuple[str, str], dict[str, nn.Module]]
"""The forwards of a module in training and evaluation, and its new children."""


def _rewritten(
    model: nn.Module, anatomy: Anatomy, sites: Sequence[Site], news: Sequence[nn.Module | None]
) -> Plan:
    """The forwards of the module that calls these sites, with new children in their place."""
    module, path = model.get_submodule(sites[0].module), sites[0].module
    names = _names(module, news)
    plans = dict[int, tuple[Site, str | None]]()
    for site, name in zip(sites, names, strict=True):
        plans[site.index] = (site, name)
    forwards = [_change(trace(module, mode), anatomy, path, plans, mode) for mode in (True, False)]
    children = {name: new for name, new in zip(names, news, strict=True) if name and new is not None}
    used = "\n".join(forwards)
    return (forwards[0], forwards[1]), {k: new for k, new in children.items() if f"self.{k}(" in used}


def _change(
    graph: fx.Graph,
    anatomy: Anatomy,
    path: str,
    plans: dict[int, tuple[Site, str | None]],
    training: bool,
) -> str:
    """Change the calls of a graph; of a module that is called several times, in all of its calls."""
    for function in dict.fromkeys(site.function for site, _ in plans.values()):
        every = [s for s in anatomy.sites if s.module == path and s.function == function]
        nodes = [node for node in graph.nodes if _function(node) == function]
        if not nodes and not training:
            continue
        wanted = [plans.get(site.index) for site in every]
        if not nodes or len(every) % len(nodes):
            raise _untraceable(every[0], f"not every call of `{function}` can be told apart")
        for place, node in enumerate(nodes):
            given = wanted[place :: len(nodes)]
            if any(given) and not all(given):
                raise _untraceable(every[place], f"`{function}` is called in several places by this line")
            if given[0] is not None:
                _swap(graph, node, *given[0])
    return source(graph)


def _swap(graph: fx.Graph, node: fx.Node, site: Site, name: str | None) -> None:
    given = node.args[0] if node.args else node.kwargs["input"]
    if not isinstance(given, fx.Node) or (_in_place(node) and len(given.users) > 1):
        raise _untraceable(site, f"`{site.function}` works in place on what is used elsewhere")
    new = given
    if name is not None:
        with graph.inserting_before(node):
            new = graph.call_module(name, (given,))
            new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _function(node: fx.Node) -> str | None:
    """The name of the torch function that a node calls."""
    if node.op == "call_method":
        return identify(getattr(Tensor, str(node.target), None))[0]
    return identify(node.target)[0] if node.op == "call_function" else None


def _in_place(node: fx.Node) -> bool:
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name.endswith("_") or any(value is True for value in (*node.args[1:], node.kwargs.get("inplace")))


def _names(module: nn.Module, news: Sequence[nn.Module | None]) -> list[str | None]:
    """Names for new children: relu, relu_1, ..."""
    names: list[str | None] = []
    for new in news:
        stem = type(new).__name__.lower()
        tries = (stem if i == 0 else f"{stem}_{i}" for i in range(len(news) + len(dir(module))))
        free = (name for name in tries if name not in names and not hasattr(module, name))
        names.append(None if new is None else next(free))
    return names


def _install(model: nn.Module, path: str, sites: Sequence[Site], plan: Plan) -> Edit:
    module, (forwards, children) = model.get_submodule(path), plan
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(()))
    for name, new in children.items():
        module.add_module(name, new.to(like.device, like.dtype).train(module.training))
    module.__class__ = class_with(own_class(module), forwards)
    places = dict.fromkeys(f"{site.line or path}: {site.function}" for site in sites)
    news = ", ".join(dict.fromkeys(type(new).__name__ for new in children.values())) or "nothing"
    return Edit(path, _code(path, forwards, children), f"{', '.join(places)} -> {news}")


def _code(path: str, forwards: tuple[str, str], children: dict[str, nn.Module]) -> str:
    """The same in plain torch, for a variable `model`."""
    lines = [f'module = model.get_submodule("{path}")' if path else "module = model"]
    lines += [f"module.{name} = {call(new)}" for name, new in children.items()]
    names = ["forward"]
    texts = [without_lines(text) for text in forwards]
    if texts[0] == texts[1]:
        lines += [texts[0]]
    else:
        names += ["train_forward", "eval_forward"]
        lines += [text.replace("def forward(", f"def {n}(") for text, n in zip(texts, names[1:], strict=True)]
        lines += [
            "",
            "def forward(self, *args, **kwargs):",
            "    return (self.train_forward if self.training else self.eval_forward)(*args, **kwargs)",
        ]
    held = ", ".join(f'"{name}": {name}' for name in names)
    lines += ["", f"module.__class__ = type(type(module).__name__, (type(module),), {{{held}}})"]
    return "\n".join(lines)


def _check(model: nn.Module, path: str, run: Callable[[], Tensor]) -> None:
    """Traced and otherwise unchanged, the module must do what it did, in both modes."""
    module = model.get_submodule(path)
    own, was = own_class(module), type(module)
    traced = class_with(own, (source(trace(module, True)), source(trace(module, False))))
    before = _outcome(model, run)
    try:
        module.__class__ = traced
        after = _outcome(model, run)
    except Exception as error:  # the traced forward may be called otherwise than was thought
        raise _unlike(module, path, f"it fails: {error}") from error
    finally:
        module.__class__ = was
    if not all(_equal(a, b) for a, b in zip(before, after, strict=True)):
        raise _unlike(module, path, "it computes something else")


def _outcome(model: nn.Module, run: Callable[[], Tensor]) -> list[Tensor | None]:
    """Loss and gradients in training, and in evaluation."""
    found: list[Tensor | None] = []
    parameters = [p for p in model.parameters() if p.requires_grad]
    for mode in (True, False):
        with _mode(model, mode):
            loss = run()
            slopes = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else ()
        found += [loss.detach(), *slopes, *(None for _ in parameters[len(slopes) :])]
    return found


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Inside, the whole model is in one mode and draws the same random numbers; all returns afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.enable_grad():
            torch.manual_seed(0)
            model.train(training)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for buffer, value in buffers:
            buffer.detach().copy_(value)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.allclose(a, b, rtol=1e-5, atol=1e-7, equal_nan=True)


def _unlike(module: nn.Module, path: str, why: str) -> SetupError:
    name = path or "the model"
    return SetupError(f"{line_of_forward(module)}: what torch.fx traced is not the forward of {name}: {why}.")


def _untraceable(site: Site, why: str) -> SetupError:
    return SetupError(f"{site.line or site.name}: torch.fx cannot change this call: {why}.")
