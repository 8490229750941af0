"""Recorder: reads the anatomy of a model while one batch passes through it.

A `TorchFunctionMode` sees the functions that modules call and those that the user's own `forward` calls
alike, so there is one mechanism for both, and no hook is left on the model.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradmend.anatomy import INPUT, Activation, Anatomy, LossCall, Site
from gradmend.kinds import RESHAPES, activation, fan_in, identify, settings, steps_first, tensors_in
from gradmend.lines import line_of_caller, line_of_creation, module_and_line
from gradmend.setup import parameters_of

_Sites: TypeAlias = frozenset[int]
_BATCH: _Sites = frozenset([INPUT])
_NONE: _Sites = frozenset()
_ONE_SIGNAL = frozenset(("activation", "softmax", "normalization", "dropout", "pool", "concat"))
"""Kinds that are sites if anything that they read comes from the batch."""
_INSIDE = frozenset(("product", "dropout", "pool", "concat"))
"""Kinds that are sites only inside a module: a loss computes with these, too."""


@dataclass(slots=True)
class Call:
    """A call of a torch function that makes a site.

    Args:
        name, kind: of the function.
        args, kwargs: of the call; what is put there before it runs is what the function gets.
        signal: what it reads.
        inputs: the sites that its arguments come from.
        activation: as a function of one tensor.
        weight: the factor of a product that does not come from the batch.
    """

    name: str
    kind: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    signal: Tensor
    activation: Activation | None = None
    weight: Tensor | None = None
    fan_in: int | None = None
    settings: Mapping[str, Any] | None = None
    inputs: _Sites = _NONE


class Recorder(TorchFunctionMode):
    """Sees every torch function while active, and makes a `Site` of each that carries a signal.

    Args:
        model: whose modules give the sites their names.
        before: called just before a site's function runs, while its input is still untouched.
        after: called with the call, its site and its (first) output. A tensor that it returns takes the place
            of that output.
    """

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[Call], None] | None = None,
        after: Callable[[Call, Site, Tensor], Tensor | None] | None = None,
    ) -> None:
        super().__init__()
        self.sites: list[Site] = []
        self.losses: list[LossCall] = []
        self._before = before
        self._after = after
        self.modules = dict(model.named_modules())
        self._paths = {id(module): path for path, module in self.modules.items()}
        self._names = {id(p): name for name, p in parameters_of(self.modules.items())}
        self._layers: dict[str, tuple[bool, str | None]] = {}
        self._seen: dict[str, int] = {}
        self._turned = False
        self._origins: dict[int, tuple[weakref.ref[Tensor], _Sites, _Sites]] = {}

    @contextmanager
    def watching(self, batch: Any) -> Iterator[Recorder]:
        """Record what runs inside; nothing is left behind on the modules, whatever happens."""
        self._boundary = sys._getframe(2)
        for tensor in tensors_in(batch):
            self._mark(tensor, _BATCH, _BATCH)
        try:
            with _eagerly(), self:
                yield self
        finally:
            self._origins.clear()
            del self._boundary  # a frame keeps all its variables alive

    def anatomy(self) -> Anatomy:
        """What was read, with the sizes of constants fetched in one transfer."""
        unsettled = [s for s in self.sites if isinstance(s.settings.get("factor"), Tensor)]
        factors = torch.stack([s.settings["factor"] for s in unsettled]).tolist() if unsettled else []
        for site, factor in zip(unsettled, factors, strict=True):
            self.sites[site.index] = replace(site, settings={"factor": factor})
        return Anatomy(tuple(self.sites), tuple(self.losses))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function; make a site of it if it carries a signal."""
        kwargs = kwargs or {}
        name, kind = identify(func)
        if kind is None:
            return self._pass(func, name, kind, args, kwargs)
        if kind == "loss":
            self._note_loss(name, args, kwargs)
            return func(*args, **kwargs)
        given = _given(args, kwargs)
        carried, inputs, direct = self._trace(given)
        call = self._call(name, kind, given, carried, args, kwargs)
        if call is None:
            return self._pass(func, name, kind, args, kwargs)
        call.inputs = inputs
        if self._before:
            self._before(call)
        output = func(*call.args, **kwargs)
        signal = output if isinstance(output, Tensor) else next(tensors_in(output))
        site = self._site(call, given, signal, inputs, direct)
        self.sites.append(site)
        other = self._after(call, site, signal) if self._after else None
        if other is not None:
            output = other if output is signal else _with_first(output, signal, other)
        here = frozenset((site.index,))
        for tensor in (output,) if isinstance(output, Tensor) else tensors_in(output):
            self._mark(tensor, here, here)
        return output

    def _call(
        self,
        name: str,
        kind: str,
        given: list[Tensor],
        carried: list[Tensor],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Call | None:
        """The call of a site; None if it carries no signal, or joins nothing."""
        if (
            not given
            or any(t.is_nested for t in given)
            or ((kind in _INSIDE or "sub" in name) and not self._inside)
        ):
            return None
        signal = carried[0] if carried else given[0]
        if kind == "linear":
            return self._linear(name, given, carried, args, kwargs)
        if kind == "convolution":
            numbers = settings(name, kind, args, kwargs)
            fan = fan_in(name, 1, given[1], args)
            return Call(name, kind, args, kwargs, signal, weight=given[1], fan_in=fan, settings=numbers)
        if kind in ("sum", "product"):
            return _joint(name, kind, carried, args, kwargs)
        if kind in _ONE_SIGNAL and not carried:
            return None
        if kind == "activation":
            return Call(name, kind, args, kwargs, signal, activation(name, args, kwargs))
        numbers = settings(name, kind, args, kwargs)
        if kind == "dropout" and not numbers["p"]:
            return None
        return Call(name, kind, args, kwargs, signal, settings=numbers)

    def _linear(
        self,
        name: str,
        given: list[Tensor],
        carried: list[Tensor],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Call | None:
        """A product with the factor that does not come from the batch, or of two signals."""
        factors = given[1:3] if "add" in name else given[:2]
        if len(factors) < 2:
            return None
        fixed = [i for i, factor in enumerate(factors) if factor.dim() >= 2 and self._origin(factor) is None]
        if len(fixed) > 1:  # the batch came by a way that cannot be traced: look for the parameter
            fixed = [i for i in fixed if isinstance(factors[i], nn.Parameter)]
        if len(fixed) != 1:
            both = self._inside and not fixed and len(carried) >= 2
            return Call(name, "product", args, kwargs, carried[0]) if both else None
        place = fixed[0]
        fan = fan_in(name, place, factors[place], (*args, *kwargs.values()))
        return Call(name, "linear", args, kwargs, factors[1 - place], weight=factors[place], fan_in=fan)

    def _pass(self, func: Any, name: str, kind: str | None, args: Any, kwargs: Any) -> Any:
        """Run a function that makes no site, and follow where its output comes from."""
        given = _given(args, kwargs)
        _, inputs, direct = self._trace(given)
        output = func(*args, **kwargs)
        if name == "__setitem__":
            self._mark(args[0], inputs, _NONE)
        if inputs and isinstance(output, (Tensor, tuple, list, dict)):
            biased = kind == "sum" and sum(self._origin(t) is not None for t in given) == 1
            if biased:
                self._add_bias(direct, args)
            kept = direct if biased or name in RESHAPES or _keeps(name, kind, args, kwargs) else _NONE
            for tensor in tensors_in(output):
                if not kept or self._origin(tensor) is None:
                    self._mark(tensor, inputs, kept)
        return output

    def _add_bias(self, direct: Iterable[int], summands: Sequence[Any]) -> None:
        """A bare bias, as in `x @ weight + bias`, belongs to the site that it is added to."""
        names = tuple(self._names[id(t)] for t in summands if id(t) in self._names)
        for site in (self.sites[index] for index in direct if index != INPUT and names):
            self.sites[site.index] = replace(site, parameters=(*site.parameters, *names))

    @property
    def _inside(self) -> bool:
        """Whether one of the model's modules is running."""
        return module_and_line(self._paths, self._boundary)[0] is not None

    def _origin(self, tensor: Tensor) -> tuple[weakref.ref[Tensor], _Sites, _Sites] | None:
        found = self._origins.get(id(tensor))
        return found if found is not None and found[0]() is tensor else None

    def _mark(self, tensor: Tensor, inputs: _Sites, direct: _Sites) -> None:
        self._origins[id(tensor)] = (weakref.ref(tensor), inputs, direct)

    def _trace(self, tensors: Iterable[Tensor]) -> tuple[list[Tensor], _Sites, _Sites]:
        """Those tensors that come from the batch, the sites they come from, and whose output they are."""
        carried, inputs, direct = [], _NONE, _NONE
        for tensor in tensors:
            if origin := self._origin(tensor):
                carried.append(tensor)
                inputs, direct = inputs | origin[1], direct | origin[2]
        return carried, inputs, direct

    def _site(
        self, call: Call, given: Sequence[Tensor], output: Tensor, inputs: _Sites, direct: _Sites
    ) -> Site:
        running, called = module_and_line(self._paths, self._boundary)
        path = running or ""
        layer, made = self._layers.get(path) or self._layer(path)
        shape = tuple(output.shape)
        return Site(
            index=len(self.sites),
            name=self._name(path if layer else f"{path}.{call.name}".removeprefix(".")),
            kind=call.kind,
            function=call.name,
            module=path,
            line=made or called,
            inputs=tuple(sorted(inputs)),
            direct=tuple(sorted(direct)),
            shape=shape,
            unit_dim=self._unit_dim(call, shape, inputs),
            fan_in=call.fan_in,
            activation=call.activation,
            parameters=tuple([self._names[id(t)] for t in given if id(t) in self._names]),
            settings=call.settings or {},
            batch_dim=self._batch_dim(call, shape, inputs) if len(shape) > 1 else 0,
        )

    def _layer(self, path: str) -> tuple[bool, str | None]:
        """Whether a module is one of torch's own layers, and if so where the user made it."""
        module = self.modules[path]
        own = _is_layer(module)
        self._layers[path] = own and path != "", line_of_creation(module) if own else None
        return self._layers[path]

    def _name(self, name: str) -> str:
        self._seen[name] = count = self._seen.get(name, 0) + 1
        return name if count == 1 else f"{name}#{count}"

    def _unit_dim(self, call: Call, shape: tuple[int, ...], inputs: _Sites) -> int:
        last = len(shape) - 1
        if call.kind == "convolution" or call.name in ("batch_norm", "group_norm", "instance_norm"):
            return min(1, last)
        if last <= 1 or call.kind in ("linear", "embedding"):
            return last
        for site in (self.sites[i] for i in sorted(inputs) if i != INPUT):
            if len(site.shape) == len(shape) and site.units == shape[site.unit_dim]:  # also past pooling
                return site.unit_dim
        return last

    def _batch_dim(self, call: Call, shape: tuple[int, ...], inputs: _Sites) -> int:
        if len(shape) == 3 and steps_first(call.name, call.args):
            self._turned = True
            return 1
        if not self._turned:
            return 0
        before = (self.sites[i] for i in inputs if i != INPUT)
        return int(any(s.batch_dim == 1 and s.shape[:2] == shape[:2] for s in before))

    def _note_loss(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        output, target = (*_arguments(args, kwargs), None, None)[:2]
        if isinstance(output, Tensor) and isinstance(target, Tensor):
            dtype = str(target.dtype).removeprefix("torch.")
            direct = tuple(sorted(self._trace([output])[2]))
            line = line_of_caller(self._boundary)
            self.losses.append(LossCall(name, line, direct, tuple(output.shape), tuple(target.shape), dtype))


@contextmanager
def _eagerly() -> Iterator[None]:
    """Inside, compiled models run as they were written, so that their functions are seen."""
    if "torch._dynamo.eval_frame" not in sys.modules:  # nothing can have been compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)
        yield


def read(model: nn.Module, forward: Callable[[], object], batch: Any) -> Anatomy:
    """The anatomy of a model: runs `forward()` once, without gradients, on `batch`."""
    recorder = Recorder(model)
    with torch.no_grad(), recorder.watching(batch):
        forward()
    return recorder.anatomy()


def _joint(
    name: str, kind: str, carried: list[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Call | None:
    """The sum or product of two signals of one shape, or the product of one with a constant."""
    if len(carried) == 2 and carried[0].shape == carried[1].shape:
        return Call(name, kind, args, kwargs, carried[0])
    if kind == "sum" or len(carried) != 1:
        return None
    signal, *others = _arguments(args, kwargs)
    if signal is not carried[0]:
        others = [signal]
    factor = _rms(others[0]) if others else None
    if factor is None or ("div" in name and signal is not carried[0]):
        return None
    factor = 1 / factor if "div" in name else factor
    return Call(name, "scale", args, kwargs, carried[0], settings={"factor": factor})


def _rms(constant: Any) -> Any:
    """The size of a constant; a tensor stays on its device until all numbers are fetched."""
    if isinstance(constant, (int, float)):
        return abs(float(constant)) or None
    if isinstance(constant, Tensor) and constant.is_floating_point():
        return constant.detach().double().square().mean().sqrt()
    return None


def _with_first(output: Any, signal: Tensor, other: Tensor) -> Any:
    """The outputs of a call, such as those of a recurrent layer, with another tensor for the first."""
    return type(output)(other if item is signal else item for item in output)


def _keeps(name: str, kind: str | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the output has the very values of the input: no dropout, or padding by the signal itself."""
    return kind == "dropout" or (name == "pad" and (*args, *kwargs.values())[2:3] not in ((), ("constant",)))


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
    """All arguments, `input` first."""
    if not kwargs:
        return args
    named = sorted(kwargs.items(), key=lambda item: item[0] != "input")
    return (*args, *(value for _, value in named))


def _given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of a call, also those in lists."""
    given: list[Tensor] = []
    for value in _arguments(args, kwargs):
        if isinstance(value, Tensor):
            given.append(value)
        elif isinstance(value, (tuple, list, dict)):
            given += tensors_in(value)
    return given


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is one of torch's own layers, rather than the user's code or a container."""
    children = (
        name for name, child in module._modules.items() if child is not None and name != "parametrizations"
    )
    return _made_in(type(module)).startswith("torch.nn") and next(children, None) is None


def _made_in(kind: type) -> str:
    """Where a class of modules was written: `fully_shard` and parametrizations derive others from it."""
    return next(c.__module__ for c in kind.__mro__ if not c.__module__.startswith(_DERIVING))


_DERIVING = ("torch.distributed.", "torch.nn.utils.")
