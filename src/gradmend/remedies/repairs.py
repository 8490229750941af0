"""Repairs of what goes in, and of how the parts are put together: parameters, modes, dropout, layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmend import rewrite, surgery
from gradmend.anatomy import INPUT, Anatomy, Site
from gradmend.causes import Cause
from gradmend.contract import read_contract
from gradmend.layers import Rescale, Standardize
from gradmend.remedies.base import Remedy, weighted_layers
from gradmend.setup import Batch, Setup
from gradmend.surgery import Edit

_ROUNDING = 1e-6
_DROPPING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_MODAL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


@dataclass(frozen=True)
class StandardizeInput(Remedy):
    """Standardize the input, as the first layer of the model: it takes the same data as before.

    Mean and deviation are those of the batches, per feature (the last dimension), or per channel of images.
    Weights that were learned on the raw input do not fit any more. Costs one pass over the input per step.

    Source: LeCun, Bottou, Orr, Müller, Efficient BackProp, 1998, https://doi.org/10.1007/3-540-49430-8_2
    """

    treats: ClassVar[frozenset[Cause]] = frozenset(
        {Cause.UNSCALED_INPUT, Cause.SLOW_CONVERGENCE, Cause.NON_FINITE}
    )
    intrusion: ClassVar[int] = 1
    summary: ClassVar[str] = "input standardized"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether the model takes the input as its first argument, and not as numbers of an embedding."""
        return _takes_numbers(setup, anatomy)

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Wrap the model."""
        rows = _rows(anatomy, batches)
        if rows is None:
            return setup, self, []
        std, mean = torch.std_mean(rows.values, dim=0, unbiased=False)
        std[std <= _ROUNDING * mean.abs()] = 0.0  # a constant column: only centred
        return _put_first(setup, self, Standardize(rows.shaped(mean), rows.shaped(std)))


@dataclass(frozen=True)
class NormalizeInput(Remedy):
    """Bring the input to between 0 and 1, as the first layer of the model: it takes the same data as before.

    Least and greatest value are those of the batches, per feature or per channel. For amounts with hard
    bounds, such as pixels; a single stray value squeezes all others, where `StandardizeInput` is milder.
    Costs one pass over the input per step.

    Source: Han, Kamber, Pei, Data Mining: Concepts and Techniques, section 3.5.2, 2011.
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.UNSCALED_INPUT})
    intrusion: ClassVar[int] = 1
    summary: ClassVar[str] = "input between 0 and 1"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether the model takes the input as its first argument, and not as numbers of an embedding."""
        return _takes_numbers(setup, anatomy)

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Wrap the model."""
        rows = _rows(anatomy, batches)
        if rows is None:
            return setup, self, []
        low = rows.values.amin(0)
        return _put_first(setup, self, Standardize(rows.shaped(low), rows.shaped(rows.values.amax(0) - low)))


@dataclass(frozen=True)
class DropColumns(Remedy):
    """Silence columns of a table that number its rows, or count seconds: they drown all others.

    The first layer of the model multiplies them by zero, so it takes the same data as before, and weights
    keep their shapes. Costs one product per step.

    Args:
        columns: counted from 0; None finds them.

    Source: Kaufman, Rosset, Perlich, Leakage in data mining, 2011, https://doi.org/10.1145/2020408.2020496
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.STRAY_COLUMN})
    intrusion: ClassVar[int] = 1
    summary: ClassVar[str] = "columns {columns} left out"
    columns: tuple[int, ...] | None = None

    @property
    def title(self) -> str:
        """The summary with the values of the fields."""
        return "stray columns left out" if self.columns is None else self.summary.format(columns=self.columns)

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether the model takes a table as its first argument."""
        return _takes_numbers(setup, anatomy)

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Wrap the model."""
        rows = _rows(anatomy, batches)
        columns = _stray(setup, batches) if self.columns is None else self.columns
        if rows is None or not columns:
            return setup, self, []
        mask = torch.ones_like(rows.values[0])
        mask[list(columns)] = 0.0
        new = Rescale(rows.shaped(mask), torch.zeros((), dtype=rows.dtype))
        return _put_first(setup, replace(self, columns=columns), new)


def _stray(setup: Setup, batches: Sequence[Batch]) -> tuple[int, ...]:
    found = read_contract(setup, batches)
    return found.columns.stray if found is not None and found.columns is not None else ()


def _takes_numbers(setup: Setup, anatomy: Anatomy) -> bool:
    return setup.step is None and all(site.kind != "embedding" for site in anatomy.readers(INPUT))


@dataclass(frozen=True)
class _Rows:
    """The inputs as rows of one feature dimension; `tail` dimensions come after it."""

    values: Tensor
    tail: int
    dtype: torch.dtype

    def shaped(self, value: Tensor) -> Tensor:
        """One number per feature, to broadcast against a batch."""
        return value.view(-1, *[1] * self.tail).to(self.dtype)


def _rows(anatomy: Anatomy, batches: Sequence[Batch]) -> _Rows | None:
    """Per feature [..., features], or per channel [batch, channels, ...]; None if it is not tensors."""
    inputs = [batch[0] for batch in batches if isinstance(batch, (tuple, list))]
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        return None
    last = inputs[0].dim() - 1
    channels = any(site.kind == "convolution" for site in anatomy.readers(INPUT))
    dim = 1 if last >= 3 or (channels and last >= 1) else last
    rows = [x.detach().movedim(dim, -1).reshape(-1, x.shape[dim] if last else 1) for x in inputs]
    dtype = torch.promote_types(inputs[0].dtype, torch.float32)
    return _Rows(torch.cat(rows).double(), last - dim, dtype)


def _put_first(setup: Setup, remedy: Remedy, layer: nn.Module) -> tuple[Setup, Remedy, list[Edit]]:
    model, edit = surgery.wrap_input(setup.model, layer)
    return replace(setup, model=model), remedy, [edit] if edit else []


@dataclass(frozen=True)
class AddMissingParameters(Remedy):
    """Give the optimizer the parameters that it lacks, in its first group.

    All else of the optimizer, and its state, stays. Costs the steps of these parameters.

    Source: PyTorch, torch.optim, https://docs.pytorch.org/docs/stable/optim.html
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.NOT_IN_OPTIMIZER})
    intrusion: ClassVar[int] = 1
    summary: ClassVar[str] = "all parameters in the optimizer"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether a live optimizer lacks parameters that want a gradient."""
        return isinstance(setup.optimizer, Optimizer) and bool(_missing(setup, setup.optimizer))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Append them."""
        return setup, self, _add_missing(setup)


def _add_missing(setup: Setup) -> list[Edit]:
    if not isinstance(setup.optimizer, Optimizer):
        return []
    missing = _missing(setup, setup.optimizer)
    if not missing:
        return []
    setup.optimizer.param_groups[0]["params"] += missing.values()
    code = (
        f"names = {list(missing)!r}\n"
        "optimizer.param_groups[0]['params'] += [model.get_parameter(name) for name in names]"
    )
    return [Edit("", code, f"{len(missing)} parameters added to the optimizer")]


def _missing(setup: Setup, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {n: p for n, p in setup.model.named_parameters() if p.requires_grad and id(p) not in held}


@dataclass(frozen=True)
class Unfreeze(Remedy):
    """Let frozen parameters learn, and give them to the optimizer.

    Freezing is usually meant, so this is for what was frozen by mistake. Costs their gradients.

    Source: PyTorch, Autograd mechanics, https://docs.pytorch.org/docs/stable/notes/autograd.html
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.FROZEN_PARAMETERS})
    intrusion: ClassVar[int] = 2
    summary: ClassVar[str] = "frozen parameters set free"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether a parameter is frozen."""
        return any(not p.requires_grad and p.is_floating_point() for p in setup.model.parameters())

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Set `requires_grad`."""
        named = setup.model.named_parameters()
        frozen = {name: p for name, p in named if not p.requires_grad and p.is_floating_point()}
        for parameter in frozen.values():
            parameter.requires_grad_(True)
        code = f"for name in {list(frozen)!r}:\n    model.get_parameter(name).requires_grad_(True)"
        return setup, self, [Edit("", code, f"{len(frozen)} parameters set free"), *_add_missing(setup)]


@dataclass(frozen=True)
class TrainMode(Remedy):
    """Put dropout and normalization that sleep in eval mode into train mode, in a model that trains.

    Normalization whose own parameters are frozen stays as it is: that is how it is meant. Costs nothing; the
    running statistics follow the batches again.

    Source: PyTorch, nn.Module.train, https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.EVAL_MODE})
    intrusion: ClassVar[int] = 1
    summary: ClassVar[str] = "all parts in train mode"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether a part sleeps in a model that trains."""
        return setup.model.training and bool(_asleep(setup.model))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Wake them."""
        paths = _asleep(setup.model)
        for path in paths:
            setup.model.get_submodule(path).train()
        return (
            setup,
            self,
            [Edit(p, f'model.get_submodule("{p}").train()', f"{p}: train mode") for p in paths],
        )


def _asleep(model: nn.Module) -> list[str]:
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, _MODAL) and not m.training]
    return [name for name, m in found if not _frozen(m)]


def _frozen(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return bool(own) and not any(p.requires_grad for p in own)


@dataclass(frozen=True)
class LessDropout(Remedy):
    """Drop no more than a share of the units, in modules and in functions of the user's forward.

    Keeps all weights. Costs nothing.

    Args:
        p: the greatest share that stays.

    Source: Srivastava et al., Dropout, 2014, https://jmlr.org/papers/v15/srivastava14a.html
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.TOO_MUCH_DROPOUT})
    intrusion: ClassVar[int] = 2
    summary: ClassVar[str] = "dropout of {p:g} at most"
    p: float = 0.1

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether more is dropped somewhere."""
        return bool(self._modules(setup)) or bool(self._calls(setup, anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Put milder modules in their place."""
        edits = []
        for path in self._modules(setup):
            old = setup.model.get_submodule(path)
            edits.append(surgery.replace(setup.model, path, type(old)(self.p)))
        sites = self._calls(setup, anatomy)
        more = rewrite.put(
            setup.model, anatomy, sites, lambda _: nn.Dropout(self.p), lambda: setup.loss(batches[0])
        )
        return setup, self, [edit for edit in (*edits, *more) if edit]

    def by_hand(self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]) -> tuple[str, ...]:
        """The calls that cannot be reached."""
        return tuple(
            f"{site.line}: drop {self.p:g} by hand ({obstacle})."
            for site in self._functions(setup, anatomy)
            if (obstacle := rewrite.obstacle(setup.model, anatomy, [site]))
        )

    def _modules(self, setup: Setup) -> list[str]:
        return [n for n, m in setup.model.named_modules() if type(m) in _DROPPING and m.p > self.p]

    def _functions(self, setup: Setup, anatomy: Anatomy) -> list[Site]:
        sites = [s for s in anatomy.sites if s.function == "dropout" and s.settings["p"] > self.p]
        return [site for site in sites if rewrite.calls(setup.model, site)]

    def _calls(self, setup: Setup, anatomy: Anatomy) -> list[Site]:
        found = self._functions(setup, anatomy)
        return [site for site in found if rewrite.obstacle(setup.model, anatomy, [site]) is None]


@dataclass(frozen=True)
class AddDropout(Remedy):
    """Dropout after every hidden activation module: noise that keeps units from relying on each other.

    Against overfitting only. Keeps all weights. Costs steps: it trains slower.

    Args:
        p: the share of units that is dropped.

    Source: Srivastava et al., Dropout, 2014, https://jmlr.org/papers/v15/srivastava14a.html
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.OVERFITTING})
    intrusion: ClassVar[int] = 4
    summary: ClassVar[str] = "dropout of {p:g}"
    p: float = 0.2

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether nothing is dropped yet, and there is a hidden activation module."""
        dropped = any(isinstance(m, nn.modules.dropout._DropoutNd) for m in setup.model.modules())
        return not dropped and bool(_hidden_activations(setup, anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Insert the dropouts."""
        paths = _hidden_activations(setup, anatomy)
        edits = [surgery.insert_after(setup.model, path, nn.Dropout(self.p)) for path in paths]
        return setup, self, [edit for edit in edits if edit]


def _hidden_activations(setup: Setup, anatomy: Anatomy) -> list[str]:
    modules = dict(setup.model.named_modules())
    after = {s.module for _, s in weighted_layers(setup, anatomy) if s is not None and s.module}
    own = [p for p in after if type(modules[p]).__module__ == "torch.nn.modules.activation"]
    return sorted(own)


@dataclass(frozen=True)
class BendLayers(Remedy):
    """Put a ReLU between linear layers that follow each other: together they are but one.

    What the network computed before is lost; the weights stay. Costs the activations.

    Source: Goodfellow, Bengio, Courville, Deep Learning, section 6.3, 2016, https://www.deeplearningbook.org
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.TOO_LITTLE_CAPACITY})
    intrusion: ClassVar[int] = 5
    summary: ClassVar[str] = "ReLU between linear layers"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether a layer reads another one directly."""
        return bool(_straight(setup, anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Insert the activations."""
        edits = [surgery.insert_after(setup.model, p, nn.ReLU()) for p in _straight(setup, anatomy)]
        return setup, self, [edit for edit in edits if edit]


def _straight(setup: Setup, anatomy: Anatomy) -> list[str]:
    """The layers whose output nothing but another layer reads, and no activation."""
    layers = [site for site, _ in weighted_layers(setup, anatomy)]
    read = {site.index: anatomy.readers(site.index) for site in layers}
    return [s.module for s in layers if read[s.index] and all(_reads_only(r, s) for r in read[s.index])]


def _reads_only(reader: Site, site: Site) -> bool:
    return reader.weighted and reader.direct == (site.index,)
