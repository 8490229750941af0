"""Recorder: reads the anatomy of a model while one batch passes through it.

A `TorchFunctionMode` sees the functions that modules call and those that the user's own `forward` calls
alike, so there is one mechanism for both, and no hook is left on the model.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

import jaxtyping
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from gradmend.anatomy import INPUT, Activation, Anatomy, LossCall, Site

_KINDS: dict[str, tuple[str, ...]] = {
    "linear": ("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "addmm", "bmm", "baddbmm", "einsum"),
    "convolution": (
        *("conv1d", "conv2d", "conv3d"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    ),
    "embedding": ("embedding", "embedding_bag"),
    "activation": (
        *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish"),
        *("sigmoid", "tanh", "softplus", "softsign", "hardtanh", "hardswish", "hardsigmoid", "logsigmoid"),
        *("tanhshrink", "hardshrink", "softshrink", "threshold", "erf", "sin", "expit"),
    ),
    "softmax": ("softmax", "log_softmax", "softmin"),
    "normalization": ("batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm"),
    "recurrent": (
        "gru",
        "lstm",
        "rnn_tanh",
        "rnn_relu",
        "gru_cell",
        "lstm_cell",
        "rnn_tanh_cell",
        "rnn_relu_cell",
    ),
    "attention": ("scaled_dot_product_attention", "multi_head_attention_forward"),
    "sum": ("add", "__add__", "__radd__", "__iadd__"),
    "loss": (
        *("cross_entropy", "nll_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits"),
        *(
            "mse_loss",
            "l1_loss",
            "smooth_l1_loss",
            "huber_loss",
            "kl_div",
            "poisson_nll_loss",
            "gaussian_nll_loss",
        ),
        *("hinge_embedding_loss", "soft_margin_loss", "multi_margin_loss", "multilabel_soft_margin_loss"),
    ),
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}
_RESHAPES = frozenset(
    (
        *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "t"),
        *(
            "movedim",
            "view_as",
            "T",
            "mT",
            "reshape_as",
            "expand",
            "contiguous",
            "clone",
            "to",
            "float",
            "double",
            "half",
        ),
    )
)


class Recorder(TorchFunctionMode):
    """Sees every torch function while active, and makes a `Site` of each that carries a signal.

    Args:
        model: whose modules give the sites their names.
        before: called with (input, activation or None) just before a site's function runs, while its input
            is still untouched; what it returns is handed to `after`.
        after: called with (site, output, weight or None, what `before` returned).
    """

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[Tensor, Activation | None], Any] | None = None,
        after: Callable[[Site, Tensor, Tensor | None, Any], None] | None = None,
    ) -> None:
        super().__init__()
        self.sites: list[Site] = []
        self.losses: list[LossCall] = []
        self._before = before or (lambda _input, _phi: None)
        self._after = after or (lambda _site, _output, _weight, _note: None)
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._modules = dict(model.named_modules())
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._stack: list[str] = []
        self._seen: Counter[str] = Counter()
        self._origins: dict[int, tuple[weakref.ref[Tensor], frozenset[int], frozenset[int]]] = {}

    @contextmanager
    def watching(self, batch: Any) -> Iterator[Recorder]:
        """Record what runs inside; nothing is left behind on the modules, whatever happens."""
        self._boundary = sys._getframe(2)
        for tensor in tensors_in(batch):
            self._mark(tensor, frozenset([INPUT]), frozenset([INPUT]))
        enter = register_module_forward_pre_hook(self._enter)
        leave = register_module_forward_hook(self._leave, always_call=True)
        try:
            with _eagerly(), self:
                yield self
        finally:
            enter.remove()
            leave.remove()
            self._origins.clear()

    def anatomy(self) -> Anatomy:
        """What was read."""
        return Anatomy(tuple(self.sites), tuple(self.losses))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function; make a site of it if it is of a known kind."""
        kwargs = dict(sorted((kwargs or {}).items(), key=lambda item: item[0] != "input"))
        name = _name_of(func)
        arguments = (*args, *kwargs.values())
        kind = self._kind(name, arguments)
        if kind is None:
            return self._pass(func, name, args, kwargs)
        if kind == "loss":
            self._note_loss(name, arguments)
            return func(*args, **kwargs)
        given = list(tensors_in(arguments))
        phi = _elementwise(name, args, kwargs) if kind == "activation" else None
        weight = self._weight(name, given) if kind in ("linear", "convolution") else None
        if name == "einsum" and weight:
            weight = weight[0], _einsum_fan_in(arguments, weight[0])
        note = self._before(given[0], phi)
        origin = self._trace(given)
        output = func(*args, **kwargs)
        signal = next(tensors_in(output))
        site = self._site(name, kind, given, weight, signal, origin, phi)
        self.sites.append(site)
        here = frozenset([site.index])
        for tensor in tensors_in(output):
            self._mark(tensor, here, here)
        self._after(site, signal, weight[0] if weight else None, note)
        return output

    def _kind(self, name: str, arguments: Sequence[Any]) -> str | None:
        """Products without weights, sums that join nothing and functions of parameters alone are no sites."""
        kind = _KIND_OF.get(name)
        given = [a for a in arguments if isinstance(a, Tensor)]
        if kind == "linear":
            return kind if self._weight(name, given) is not None else None
        if kind == "sum":
            carried = [a.shape for a in given if self._origin(a)]
            return kind if len(carried) == 2 and carried[0] == carried[1] else None
        if kind in ("activation", "softmax", "normalization") and not self._trace(given)[0]:
            return None
        return kind if given else None

    def _weight(self, name: str, given: Sequence[Tensor]) -> tuple[Tensor, int] | None:
        """The weight of a product and its fan-in: the factor that does not come from the batch."""
        if name.startswith("conv"):
            return given[1], (given[1][:, 0] if "transpose" in name else given[1][0]).numel()
        factors = given[1:3] if "add" in name else given[:2]
        fixed = [i for i, factor in enumerate(factors) if self._origin(factor) is None and factor.dim() >= 2]
        if len(fixed) > 1:  # the batch came by a way that cannot be traced: look for the parameter
            fixed = [i for i in fixed if isinstance(factors[i], nn.Parameter)]
        if len(factors) < 2 or len(fixed) != 1:
            return None
        weight = factors[fixed[0]]
        return weight, weight.shape[-1 if name == "linear" or fixed[0] == 0 else -2]

    def _pass(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        inputs, direct = self._trace((*args, *kwargs.values()))
        output = func(*args, **kwargs)
        if name == "__setitem__":
            self._mark(args[0], inputs, frozenset())
        if inputs:
            biased = _KIND_OF.get(name) == "sum" and len(inputs) == 1
            if biased:
                self._add_bias(direct, args)
            kept = direct if biased or name in _RESHAPES else frozenset()
            for tensor in tensors_in(output):
                if self._origin(tensor) is None or not kept:
                    self._mark(tensor, inputs, kept)
        return output

    def _add_bias(self, direct: Iterable[int], summands: Sequence[Any]) -> None:
        """A bare bias, as in `x @ weight + bias`, belongs to the site that it is added to."""
        names = tuple(self._names[id(t)] for t in summands if id(t) in self._names)
        for site in (self.sites[index] for index in direct if index != INPUT and names):
            self.sites[site.index] = replace(site, parameters=(*site.parameters, *names))

    def _origin(self, tensor: Tensor) -> tuple[frozenset[int], frozenset[int]] | None:
        found = self._origins.get(id(tensor))
        return found[1:] if found and found[0]() is tensor else None

    def _mark(self, tensor: Tensor, inputs: frozenset[int], direct: frozenset[int]) -> None:
        self._origins[id(tensor)] = (weakref.ref(tensor), inputs, direct)

    def _trace(self, arguments: Any) -> tuple[frozenset[int], frozenset[int]]:
        origins = [o for t in tensors_in(arguments) if (o := self._origin(t))]
        inputs = frozenset[int]().union(*(o[0] for o in origins))
        return inputs, frozenset[int]().union(*(o[1] for o in origins))

    def _site(
        self,
        function: str,
        kind: str,
        given: Sequence[Tensor],
        weight: tuple[Tensor, int] | None,
        output: Tensor,
        origin: tuple[frozenset[int], frozenset[int]],
        phi: Activation | None,
    ) -> Site:
        path = self._stack[-1] if self._stack else ""
        return Site(
            index=len(self.sites),
            name=self._name(path, function),
            kind=kind,
            function=function,
            module=path,
            line=self._line(path),
            inputs=tuple(sorted(origin[0])),
            direct=tuple(sorted(origin[1])),
            shape=tuple(output.shape),
            unit_dim=self._unit_dim(kind, function, output, origin[0]),
            fan_in=weight[1] if weight else None,
            activation=phi,
            parameters=tuple(self._names[id(t)] for t in given if id(t) in self._names),
        )

    def _line(self, path: str) -> str | None:
        """Where the user made the layer, else where the user's forward calls it."""
        module = self._modules[path]
        return (_is_layer(module) and _created.get(module)) or _user_line(self._boundary)

    def _name(self, path: str, function: str) -> str:
        own = path and _is_layer(self._modules[path])
        name = path if own else f"{path}.{function}".removeprefix(".")
        self._seen[name] += 1
        return name if self._seen[name] == 1 else f"{name}#{self._seen[name]}"

    def _unit_dim(self, kind: str, function: str, output: Tensor, inputs: frozenset[int]) -> int:
        last = output.dim() - 1
        if kind == "convolution" or function in ("batch_norm", "group_norm", "instance_norm"):
            return min(1, last)
        before = [self.sites[i] for i in sorted(inputs) if i != INPUT]
        same = [
            s.unit_dim
            for s in before
            if len(s.shape) == output.dim() and s.units == output.shape[s.unit_dim]  # also past pooling
        ]
        return same[0] if same and kind not in ("linear", "embedding") else last

    def _note_loss(self, name: str, arguments: Sequence[Any]) -> None:
        output, target = (*arguments, None, None)[:2]
        if isinstance(output, Tensor) and isinstance(target, Tensor):
            dtype = str(target.dtype).removeprefix("torch.")
            direct = tuple(sorted(self._trace([output])[1]))
            line = _user_line(self._boundary)
            self.losses.append(LossCall(name, line, direct, tuple(output.shape), tuple(target.shape), dtype))

    def _enter(self, module: nn.Module, _: Any) -> None:
        path = self._paths.get(id(module))
        self._stack.append(path if path is not None else self._stack[-1] if self._stack else "")

    def _leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._stack.pop()


@contextmanager
def _eagerly() -> Iterator[None]:
    """Inside, compiled models run as they were written, so that their functions are seen."""
    if "torch._dynamo.eval_frame" not in sys.modules:  # nothing can have been compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)
        yield


_created: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


@contextmanager
def remember_lines() -> Iterator[None]:
    """Remember, for every module made inside, the user's `file:line` that made it."""
    original = nn.Module.__init__

    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if line := _user_line(None):
            _created[self] = line

    nn.Module.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__init__ = original  # type: ignore[method-assign]


def read(model: nn.Module, forward: Callable[[], object], batch: Any) -> Anatomy:
    """The anatomy of a model: runs `forward()` once, without gradients, on `batch`."""
    recorder = Recorder(model)
    with torch.no_grad(), recorder.watching(batch):
        forward()
    return recorder.anatomy()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        for item in value:
            yield from tensors_in(item)


def _name_of(func: Any) -> str:
    """The function's name; `relu_` is `relu`, `special_expit` is `expit`, `__add__` stays."""
    name = getattr(func, "__name__", "")
    if name == "__get__":  # an attribute such as `x.T`
        name = getattr(func.__self__, "__name__", name)
    return name if name.startswith("__") else name.removesuffix("_").removeprefix("special_")


def _einsum_fan_in(arguments: Sequence[Any], weight: Tensor) -> int:
    """The product of the weight's dimensions that are summed over."""
    equation = next((a for a in arguments if isinstance(a, str)), "")
    terms, _, result = equation.replace(" ", "").partition("->")
    place = next(i for i, factor in enumerate(tensors_in(arguments)) if factor is weight)
    letters = terms.split(",")[place].replace("...", "") if equation else ""
    sizes = zip(reversed(letters), reversed(weight.shape), strict=False)  # what `...` stands for is in front
    return math.prod(size for letter, size in sizes if letter not in result) or 1


def _elementwise(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Activation | None:
    """The activation as a function of one tensor, without in-place effects."""
    if name == "prelu":
        slope = args[1] if len(args) > 1 else kwargs["weight"]
        return _activation("leaky_relu", (("negative_slope", float(slope.detach().mean())),))
    given, positional = kwargs, tuple(args[1:])
    with suppress(TypeError, ValueError):  # a builtin has no signature, and none of them works in place
        given, positional = _signature(_function(name)).bind(*args, **kwargs).arguments, ()
    options = {key: value for key, value in given.items() if key not in ("input", "inplace", "training")}
    return None if name == "rrelu" else _activation(name, tuple(options.items()), positional)


_signature = lru_cache(maxsize=256)(inspect.signature)


@lru_cache(maxsize=256)
def _activation(
    name: str, options: tuple[tuple[str, Any], ...], positional: tuple[Any, ...] = ()
) -> Activation:
    """One object per activation and options, so that what is computed of it can be remembered."""
    function = _function(name)
    if positional:
        return lambda x: function(x, *positional, **dict(options))
    return partial(function, **dict(options)) if options else function


def _function(name: str) -> Any:
    return next(getattr(home, name) for home in (F, torch, torch.special) if hasattr(home, name))


_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_HERE = f"{Path(__file__).parent}{os.sep}"
_NOT_THE_USERS = (_TORCH, _HERE, f"{Path(jaxtyping.__file__).parent}{os.sep}", "<")
_CALLER = f"{_HERE}setup.py"
"""Calls the user's code, so what lies outside it is no part of a model."""


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is one of torch's own layers, rather than the user's code or a container."""
    children = [name for name, _ in module.named_children() if name != "parametrizations"]
    return type(module).__module__.startswith("torch.nn") and not children


def _user_line(boundary: FrameType | None) -> str | None:
    """`file:line` of the innermost frame that is neither torch's nor ours, up to `boundary`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not boundary:
        file = frame.f_code.co_filename
        if file == _CALLER:
            return None
        if not file.startswith(_NOT_THE_USERS):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return None
