"""What edits put into a model, in plain torch: the code of an edit carries these definitions along.

`Before`, `After`, `Residual` and `Dense` wrap a module, which becomes their `body`. What others read from the
module itself, such as `layer.weight`, is then at `layer.body`. Nothing is passed on in silence: who uses a
weight without calling its layer would leave the wrap out.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmend.sequences import HiddenOnly, Truncated, gated, set_gates
from gradmend.weights import (
    absorb,
    delta_orthogonal_,
    inherit,
    looks_linear_,
    scale_queries_and_keys,
    set_weight,
    widen,
)

_IMPORTS = {
    "Sequence": "from collections.abc import Sequence",
    "math": "import math",
    "F": "import torch.nn.functional as F",
    "Callable": "from collections.abc import Callable",
    "partial": "from functools import partial",
    "Any": "from typing import Any",
    "torch": "import torch",
    "Tensor": "from torch import Tensor",
    "nn": "from torch import nn",
    "weight_norm": "from torch.nn.utils.parametrizations import weight_norm",
    "parametrize": "from torch.nn.utils import parametrize",
}


class Before(nn.Module):
    """`body(before(x), ...)`: changes the first argument only.

    >>> Before(nn.Linear(4, 2), nn.Flatten())(torch.zeros(3, 2, 2)).shape
    torch.Size([3, 2])
    """

    def __init__(self, body: nn.Module, before: nn.Module) -> None:
        super().__init__()
        self.before = before
        self.body = body

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `before` on the first argument, then the body on all."""
        return self.body(self.before(x), *args, **kwargs)


class After(nn.Module):
    """`after(body(...))`.

    >>> After(nn.Linear(4, 2), nn.LayerNorm(2))(torch.zeros(3, 4)).shape
    torch.Size([3, 2])
    """

    def __init__(self, body: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.after = after

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body, then `after` on its output."""
        return self.after(self.body(*args, **kwargs))


class Residual(nn.Module):
    """`x + scale * body(x, ...)`, or `skip(x) + ...` where the body changes the shape.

    Args:
        body: gives the shape that it takes, or that of the skip.
        scale: of the branch.
        learned: makes the scale a parameter; from 0.0 it is ReZero (Bachlechner et al., 2020,
            https://arxiv.org/abs/2003.04887) or SkipInit (De, Smith, 2020, https://arxiv.org/abs/2002.10444).
        skip: a projection of the input.

    >>> Residual(nn.Linear(2, 2), scale=0.0)(torch.ones(1, 2))
    tensor([[1., 1.]], grad_fn=<AddBackward0>)
    """

    def __init__(
        self, body: nn.Module, scale: float = 1.0, learned: bool = False, skip: nn.Module | None = None
    ) -> None:
        super().__init__()
        like = next((p for p in body.parameters() if p.is_floating_point()), torch.empty(()))
        self.scale = nn.Parameter(like.new_full((), scale)) if learned else scale
        self.body = body
        self.skip = skip

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Add the scaled branch to its input."""
        stream = x if self.skip is None else self.skip(x)
        y: Tensor = stream + self.scale * self.body(x, *args, **kwargs)
        return y


class Dense(nn.Module):
    """Blocks in a row, each of which reads the outputs of all before it, the last first, and the input.

    Args:
        body: the layers of all blocks.
        starts: which of the layers begins each block, the first 0.
        dim: of the units.

    Source: Huang et al., Densely connected convolutional networks, 2017, https://arxiv.org/abs/1608.06993

    >>> blocks = nn.Sequential(nn.Linear(2, 3), nn.Linear(5, 4))
    >>> Dense(blocks, (0, 1), dim=1)(torch.ones(1, 2)).shape
    torch.Size([1, 4])
    """

    def __init__(self, body: nn.Sequential, starts: Sequence[int], dim: int) -> None:
        super().__init__()
        self.body = body
        self.starts = tuple(starts)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks; the output is that of the last."""
        known = [x]
        for start, stop in zip(self.starts, (*self.starts[1:], len(self.body)), strict=True):
            known.insert(0, self.body[start:stop](torch.cat(known, self.dim)))
        return known[0]


class Scale(nn.Module):
    """`factor * x`.

    Args:
        factor: of every unit at first.
        learned: makes it a parameter, as SkipInit (De, Smith, 2020, https://arxiv.org/abs/2002.10444) and
            LayerScale do (Touvron et al., 2021, https://arxiv.org/abs/2103.17239).
        shape: of the factor: `()`, `(features,)`, `(channels, 1, 1)`.

    >>> Scale(0.5)(torch.ones(2))
    tensor([0.5000, 0.5000])
    """

    def __init__(self, factor: float, learned: bool = False, shape: Sequence[int] = ()) -> None:
        super().__init__()
        self.options = f"{factor}" + (f", learned=True, shape={tuple(shape)}" if learned else "")
        self.factor = nn.Parameter(torch.full(tuple(shape), factor)) if learned else factor

    def forward(self, x: Tensor) -> Tensor:
        """Scale each unit."""
        y: Tensor = self.factor * x
        return y

    def extra_repr(self) -> str:
        """What it was made with."""
        return self.options


class Tailored(nn.Module):
    """`output_scale * (f(input_scale * x + input_shift) + output_shift)`.

    Args:
        function: an activation by its name in `torch.nn.functional`, such as `tanh`.

    Source: Martens et al., Deep kernel shaping, 2021, https://arxiv.org/abs/2110.01765

    >>> Tailored("tanh", 0.5, 0.0, 2.0, 0.0)(torch.zeros(2))
    tensor([0., 0.])
    """

    def __init__(
        self,
        function: str,
        input_scale: float,
        input_shift: float,
        output_scale: float,
        output_shift: float,
    ) -> None:
        super().__init__()
        self.function = function
        self.input_scale = input_scale
        self.input_shift = input_shift
        self.output_scale = output_scale
        self.output_shift = output_shift

    def forward(self, x: Tensor) -> Tensor:
        """Shift and scale before and after the activation."""
        y: Tensor = getattr(F, self.function)(self.input_scale * x + self.input_shift)
        return self.output_scale * (y + self.output_shift)

    def extra_repr(self) -> str:
        """What it was made with."""
        options = (self.function, self.input_scale, self.input_shift, self.output_scale, self.output_shift)
        return ", ".join(map(repr, options))


class Standardize(nn.Module):
    """`(x - mean) / std`, where a `std` of zero counts as one; integers become floating point.

    Args:
        mean: a number, or what broadcasts against a batch: `[features]`, `[channels, 1, 1]`.
        std: the same.

    >>> Standardize(torch.tensor(128.0), torch.tensor(64.0))(torch.tensor([[0], [192]], dtype=torch.uint8))
    tensor([[-2.],
            [ 1.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("std", std.detach().masked_fill(std == 0, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Centre and scale."""
        return (x.to(self.mean.dtype) - self.mean) / self.std


class Rescale(nn.Module):
    """`scale * x + shift`; integers become floating point.

    Args:
        scale: a number, or what broadcasts against a batch.
        shift: the same.

    >>> Rescale(torch.tensor(10.0), torch.tensor(5.0))(torch.tensor([[0], [2]]))
    tensor([[ 5.],
            [25.]])
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("shift", shift.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift."""
        return x.to(self.scale.dtype) * self.scale + self.shift


def load_old_keys(model: nn.Module, moved: dict[str, str]) -> None:
    """Let a model load checkpoints from before an edit that has just moved keys from prefixes to others.

    Like migrations of a database, edits stay in order, in `model.old_keys`: a checkpoint of any stage goes
    through those that it has not seen. Keys that are new altogether it lacks (`strict=False`).

    >>> model = nn.Sequential(Residual(nn.Linear(2, 2)))
    >>> load_old_keys(model, {"0.": "0.body."})
    >>> model.load_state_dict(nn.Sequential(nn.Linear(2, 2)).state_dict())
    <All keys matched successfully>
    """
    if "old_keys" not in vars(model):
        model.register_load_state_dict_pre_hook(rename_old_keys)  # type: ignore[no-untyped-call]
    earlier = vars(model.get_submodule("body") if "" in moved else model).get("old_keys", [])
    keys, pairs = list(model.state_dict()), moved.items()
    names = {old + key.removeprefix(new): key for old, new in pairs for key in keys if key.startswith(new)}
    vars(model)["old_keys"] = [*earlier, names]


def rename_old_keys(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook of `load_old_keys`: a checkpoint that has no key which an edit made is from before it.

    >>> model, state = Residual(nn.Linear(2, 2, bias=False)), {"weight": torch.zeros(2, 2)}
    >>> load_old_keys(model, {"": "body."})
    >>> rename_old_keys(model, state, "")
    >>> list(state)
    ['body.weight']
    """
    for names in vars(model)["old_keys"]:
        if not any(prefix + key in state for key in set(names.values()) - set(names)):
            found = [key for key in names if prefix + key in state]
            values = [state.pop(prefix + key) for key in found]
            state.update(zip([prefix + names[key] for key in found], values, strict=True))


def call(module: nn.Module) -> str:
    """The expression that makes a module in its dtype, device and mode, as short as it can be.

    >>> call(nn.Sequential(nn.LayerNorm(2), nn.LeakyReLU(0.2)).double())
    'nn.Sequential(nn.LayerNorm((2,)), nn.LeakyReLU(negative_slope=0.2)).to(torch.float64)'
    """
    tensors = (*module.parameters(), *module.buffers())
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(()))
    dtype = "" if like.dtype == torch.get_default_dtype() else f".to({like.dtype})"
    device = "" if like.device.type == "cpu" else f'.to("{like.device}")'
    return f"{_constructor(module)}{dtype}{device}{'' if module.training else '.eval()'}"


def definitions(code: str) -> str:
    """The imports and the definitions of this file, each once, that `code` needs.

    >>> exec(definitions("model = Before(model, nn.Flatten())"))
    """
    found, text = list[str](), code
    for definition in _DEFINITIONS:
        if re.search(rf"\b{definition.__name__}[(),]", text):
            found.insert(0, inspect.getsource(definition))
            text += found[0]
    imports = [line for name, line in _IMPORTS.items() if re.search(rf"\b{name}\b", text)]
    return "\n\n".join(["\n".join(imports) + "\n", *found])


_DEFINITIONS = (
    gated,
    HiddenOnly,
    Truncated,
    set_gates,
    set_weight,
    looks_linear_,
    delta_orthogonal_,
    widen,
    absorb,
    inherit,
    scale_queries_and_keys,
    Standardize,
    Rescale,
    Tailored,
    Scale,
    Residual,
    Dense,
    After,
    Before,
)
"""Those that use others come before them."""


def _constructor(module: nn.Module) -> str:
    if type(module) is nn.Sequential:
        return f"nn.Sequential({', '.join(map(_constructor, module))})"
    if isinstance(module, Standardize):
        return f"Standardize({_literal(module.mean)}, {_literal(module.std)})"
    if isinstance(module, Rescale):
        return f"Rescale({_literal(module.scale)}, {_literal(module.shift)})"
    text = repr(module)
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError:  # that of a module with children is no call
        return text
    if isinstance(node, ast.Call):
        parameters = inspect.signature(type(module)).parameters
        defaults = {key: repr(parameter.default) for key, parameter in parameters.items()}
        node.keywords = [k for k in node.keywords if ast.unparse(k.value) != defaults.get(k.arg or "")]
        text = ast.unparse(node)
    return f"nn.{text}" if type(module) is getattr(nn, type(module).__name__, None) else text


def _literal(tensor: Tensor) -> str:
    dtype = ", dtype=torch.float64" if tensor.dtype == torch.float64 else ""
    return f"torch.tensor({tensor.tolist()}{dtype})"
