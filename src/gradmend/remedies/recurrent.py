"""Recurrent layers: gated cells, recurrent weights and gate biases that remember, truncation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradmend import surgery
from gradmend.anatomy import Anatomy
from gradmend.causes import Cause
from gradmend.errors import SetupError
from gradmend.layers import load_old_keys
from gradmend.remedies.base import Remedy
from gradmend.sequences import HiddenOnly, Truncated, gated, set_gates
from gradmend.setup import Batch, Setup
from gradmend.surgery import Edit

_PLAIN = (nn.RNN, nn.RNNCell)
_GATED = (nn.LSTM, nn.LSTMCell, nn.GRU, nn.GRUCell)
_LAYERS = (nn.RNN, nn.LSTM, nn.GRU)
_LOOP = 4
"""A square layer that is called so often is taken for the recurrence of a loop in the user's forward."""


@dataclass(frozen=True)
class Gated(Remedy):
    """A GRU or an LSTM in the place of each plain RNN: gates let the state, and its gradient, pass unchanged.

    The learned weights of the RNN become those of the candidate; gates are new, so the function changes.
    torch's GRU applies the reset gate after the matrix product, and its z is the share of the old state
    that stays.
    Costs three (GRU) or four times (LSTM) the weights and products. A cell (`nn.RNNCell`) can only become
    a GRU's, whose state is one tensor as well.

    Args:
        to: GRU or LSTM.

    Source: Hochreiter, Schmidhuber, Long short-term memory, 1997, https://doi.org/10.1162/neco.1997.9.8.1735;
    Cho et al., Learning phrase representations using RNN encoder-decoder, 2014,
    https://arxiv.org/abs/1406.1078
    """

    treats: ClassVar[frozenset[Cause]] = frozenset(
        {
            Cause.VANISHING_THROUGH_TIME,
            Cause.EXPLODING_THROUGH_TIME,
            Cause.VANISHING_GRADIENT,
            Cause.EXPLODING_GRADIENT,
        }
    )
    intrusion: ClassVar[int] = 6
    summary: ClassVar[str] = "{to} for plain recurrence"
    to: str = "GRU"

    def __post_init__(self) -> None:
        if self.to not in ("GRU", "LSTM"):
            raise SetupError(f"A plain RNN becomes a GRU or an LSTM, not {self.to!r}.")

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is a plain recurrent layer, or a cell that can become this one."""
        return bool(self._paths(setup))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Replace them."""
        edits = []
        for path in self._paths(setup):
            old = setup.model.get_submodule(path)
            new = gated(old, self.to)
            places = surgery.paths(setup.model, old)
            surgery.replace(setup.model, path, new)
            if isinstance(new, HiddenOnly):
                load_old_keys(setup.model, {f"{place}.": f"{place}.body." for place in places})
            text = f"{', '.join(places)}: {type(old).__name__} -> {self.to}"
            edits.append(Edit(path, _placed(places, f'gated({_MODULE.format(path)}, "{self.to}")'), text))
        return setup, self, edits

    def _paths(self, setup: Setup) -> list[str]:
        kinds = _PLAIN if self.to == "GRU" else (nn.RNN,)
        return [path for path in _paths(setup, kinds) if _bare(setup.model, path)]


@dataclass(frozen=True)
class ForgetBias(Remedy):
    """A bias of the gate that keeps the state, so that the state lasts from the first step of training on.

    The forget gate of an LSTM; the update gate z of torch's GRU, which does the same. With 1 a state fades in
    about 3 steps instead of 1.4. All other weights stay; learned biases of this gate are lost. Costs nothing.

    Source: Jozefowicz, Zaremba, Sutskever, An empirical exploration of recurrent network architectures, 2015,
    https://proceedings.mlr.press/v37/jozefowicz15.html
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.VANISHING_THROUGH_TIME})
    intrusion: ClassVar[int] = 3
    summary: ClassVar[str] = "forget-gate bias {value:g}"
    value: float = 1.0

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is a gated layer with a bias."""
        return bool(_with_bias(setup))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Set the biases."""
        edits = [_set(setup, path, [self.value], False) for path in _with_bias(setup)]
        return setup, self, [edit for edit in edits if edit]


@dataclass(frozen=True)
class Chrono(Remedy):
    """Gate biases for time constants spread from one step to the length of the sequences.

    Forget gate log U(1, T - 1), input gate minus that; of a GRU, the update gate alone. All other weights
    stay, learned biases of these gates are lost. Costs nothing.

    Args:
        steps: T, the longest dependence; None takes the length of the sequences in the batch.

    Source: Tallec, Ollivier, Can recurrent neural networks warp time?, 2018, https://arxiv.org/abs/1804.11188
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.VANISHING_THROUGH_TIME})
    intrusion: ClassVar[int] = 3
    summary: ClassVar[str] = "chrono initialization for {steps} steps"
    steps: int | None = None

    @property
    def title(self) -> str:
        """The summary with the values of the fields."""
        return "chrono initialization" if self.steps is None else self.summary.format(steps=self.steps)

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is a gated layer with a bias, and sequences have more than two steps."""
        return bool(_with_bias(setup)) and (self.steps or _length(anatomy)) > 2

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Draw the biases."""
        steps = self.steps or _length(anatomy)
        edits = []
        for path in _with_bias(setup):
            layer: Any = setup.model.get_submodule(path)
            keep = torch.empty(layer.hidden_size).uniform_(1, steps - 1).log().tolist()
            edits.append(_set(setup, path, keep, True))
        return setup, replace(self, steps=steps), [edit for edit in edits if edit]


@dataclass(frozen=True)
class OrthogonalRecurrence(Remedy):
    """Orthogonal recurrent weights, each gate by itself: what the state holds is turned and not shrunk.

    Also those of a square linear layer that the user's forward calls again and again. Their biases become
    zero; learned recurrent weights are lost, so it is for setups that have not trained yet. Costs nothing.

    Source: Saxe, McClelland, Ganguli, 2014, https://arxiv.org/abs/1312.6120; Arjovsky, Shah, Bengio, Unitary
    evolution recurrent neural networks, 2016, https://arxiv.org/abs/1511.06464
    """

    treats: ClassVar[frozenset[Cause]] = frozenset(
        {Cause.VANISHING_THROUGH_TIME, Cause.EXPLODING_THROUGH_TIME}
    )
    intrusion: ClassVar[int] = 3
    summary: ClassVar[str] = "orthogonal recurrence"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is a recurrent layer, or a loop over a square one."""
        return bool(_paths(setup, (*_PLAIN, *_GATED)) or _loops(setup, anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Draw the weights."""
        edits = []
        for path in _paths(setup, (*_PLAIN, *_GATED)):
            gates = _gates(setup.model.get_submodule(path))
            init = partial(_orthogonal_blocks, gates=gates)
            code = f"lambda w: [nn.init.orthogonal_(part) for part in w.chunk({gates})]"
            edits += _fill_recurrent(setup, path, init, code)
        for path in _loops(setup, anatomy):
            edits.append(surgery.fill(setup.model, path, nn.init.orthogonal_, "nn.init.orthogonal_"))
        return setup, self, edits


@dataclass(frozen=True)
class IdentityRecurrence(Remedy):
    """The identity, or a part of it, as the recurrent weights of plain RNNs: by default a state stays.

    Made for ReLU (IRNN); with tanh the state fades slowly. Biases become zero; learned recurrent weights are
    lost, so it is for setups that have not trained yet. Costs nothing.

    Args:
        scale: of the identity; below 1 for short memories.

    Source: Le, Jaitly, Hinton, A simple way to initialize recurrent networks of rectified linear units, 2015,
    https://arxiv.org/abs/1504.00941
    """

    treats: ClassVar[frozenset[Cause]] = frozenset(
        {Cause.VANISHING_THROUGH_TIME, Cause.EXPLODING_THROUGH_TIME}
    )
    intrusion: ClassVar[int] = 3
    summary: ClassVar[str] = "identity recurrence"
    scale: float = 1.0

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is a plain recurrent layer."""
        return bool(_paths(setup, _PLAIN))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Set the weights."""
        init = partial(_identity, scale=self.scale)
        code = f"lambda w: nn.init.eye_(w).mul_({self.scale!r})"
        edits = [_fill_recurrent(setup, path, init, code) for path in _paths(setup, _PLAIN)]
        return setup, self, [edit for more in edits for edit in more]


@dataclass(frozen=True)
class Truncate(Remedy):
    """Truncated backpropagation through time: the gradient of a recurrent layer goes back so many steps only.

    What the layer computes stays the same to the last step, weights too; what happened earlier than that
    cannot be learnt from. Gradients cannot explode over more steps, and memory for a backward pass is freed
    sooner. Not for layers of two directions. Costs one call of the layer per stretch of steps.

    Args:
        steps: how far back.

    Source: Williams, Peng, An efficient gradient-based algorithm for on-line training of recurrent network
    trajectories, 1990, https://doi.org/10.1162/neco.1990.2.4.490
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.EXPLODING_THROUGH_TIME})
    intrusion: ClassVar[int] = 5
    summary: ClassVar[str] = "gradients through {steps} steps of time only"
    steps: int = 20

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether a recurrent layer of one direction runs over more steps."""
        return _length(anatomy) > self.steps and bool(self._paths(setup))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Wrap the layers."""
        edits = []
        for path in self._paths(setup):
            old = setup.model.get_submodule(path)
            places = surgery.paths(setup.model, old)
            surgery.replace(setup.model, path, Truncated(old, self.steps))
            load_old_keys(setup.model, {f"{place}.": f"{place}.body." for place in places})
            code = _placed(places, f"Truncated({_MODULE.format(path)}, {self.steps})")
            edits.append(Edit(path, code, f"{', '.join(places)}: gradient through {self.steps} steps"))
        return setup, self, edits

    def _paths(self, setup: Setup) -> list[str]:
        found = [path for path in _paths(setup, _LAYERS) if _bare(setup.model, path)]
        return [path for path in found if not getattr(setup.model.get_submodule(path), "bidirectional", True)]


_MODULE = 'model.get_submodule("{}")'


def _placed(places: Sequence[str], new: str) -> str:
    """Code that puts a module in all places of a shared one."""
    first, *others = places
    lines = [f'model.set_submodule("{first}", {new})']
    return "\n".join([*lines, *(f'model.set_submodule("{p}", {_MODULE.format(first)})' for p in others)])


def _paths(setup: Setup, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    return [path for path, module in setup.model.named_modules() if path and type(module) in kinds]


def _bare(model: nn.Module, path: str) -> bool:
    """Whether no edit has wrapped the layer yet."""
    parent = model.get_submodule(path.rpartition(".")[0])
    return not isinstance(parent, (Truncated, HiddenOnly))


def _with_bias(setup: Setup) -> list[str]:
    return [p for p in _paths(setup, _GATED) if getattr(setup.model.get_submodule(p), "bias", False)]


def _gates(layer: nn.Module) -> int:
    return 4 if isinstance(layer, (nn.LSTM, nn.LSTMCell)) else 3 if isinstance(layer, _GATED) else 1


def _length(anatomy: Anatomy) -> int:
    """The steps of the longest sequence that a recurrent layer, or a cell in a loop, runs over."""
    layers = [s for s in anatomy.sites if s.kind == "recurrent" and len(s.shape) == 3]
    cells: dict[str, int] = {}
    for site in anatomy.sites:
        if site.function.endswith("_cell"):
            cells[site.module] = cells.get(site.module, 0) + 1
    return max([0, *(s.shape[1 - s.batch_dim] for s in layers), *cells.values()])


def _loops(setup: Setup, anatomy: Anatomy) -> list[str]:
    """Square linear layers that run again and again on what they put out before."""
    calls: dict[str, int] = {}
    for site in anatomy.weighted():
        if site.module and site.kind == "linear" and site.fan_in == site.units:
            calls[site.module] = calls.get(site.module, 0) + 1
    modules = dict(setup.model.named_modules())
    return [path for path, n in calls.items() if n >= _LOOP and type(modules[path]) is nn.Linear]


def _fill_recurrent(setup: Setup, path: str, init: Any, code: str) -> list[Edit]:
    layer = setup.model.get_submodule(path)
    names = [name for name, _ in layer.named_parameters(recurse=False) if name.startswith("weight_hh")]
    return [surgery.fill(setup.model, path, init, code, name) for name in names]


def _orthogonal_blocks(weight: Tensor, gates: int) -> None:
    for part in weight.chunk(gates):
        nn.init.orthogonal_(part)


def _identity(weight: Tensor, scale: float) -> None:
    nn.init.eye_(weight).mul_(scale)


def _set(setup: Setup, path: str, keep: list[float], let_in: bool) -> Edit | None:
    """Set the gates of a layer; None if they are so already."""
    layer = setup.model.get_submodule(path)
    before = [bias.detach().clone() for bias in layer.parameters()]
    set_gates(layer, keep, let_in)
    if all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True)):
        return None
    options = ", let_in=True" if let_in else ""
    given = f"[{keep[0]!r}]" if len(set(keep)) == 1 else repr(keep)
    code = f"set_gates({_MODULE.format(path)}, {given}{options})"
    most = f", up to {math.exp(max(keep)):.3g} steps" if let_in else ""
    return Edit(path, code, f"{path}: gates that keep the state{most}")
