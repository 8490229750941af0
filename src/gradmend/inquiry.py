"""Inquiry: what a few more passes over one batch, on a copy, tell of the way a setup trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from gradmend.anatomy import Anatomy, Site
from gradmend.harmless import seed_noise, undisturbed, untouched
from gradmend.profile import Profile
from gradmend.regime import Capacity, GroupReading, OptimizerReading, Regime
from gradmend.setup import Batch, Setup, named_parameters, split
from gradmend.steps import flushes
from gradmend.updates import obstacle

_STEPS, _CALM_STEPS, _NOISY = 6, 3, 200.0
"""How many steps are taken with dropout and without, where its noise asks for so many rows."""

_PULLED = 0.4
"""If the next step is so much in line with shrinking the weights, they are shrunk on trial."""

_ROWS, _COLUMNS = 512, 2048


def inquire(setup: Setup, batch: Batch, profile: Profile) -> Regime | None:
    """Look at the optimizer, its next step and its noise; where dropout fills it with noise, try without.

    Args:
        setup: stays as it is.
        profile: of the same setup and batch; its `response` is what tells whether weights shrink.

    Returns:
        The regime; None without an optimizer whose steps can be tried on a copy, by a loss of the copy.

    Examples:
        >>> from functools import partial
        >>> from gradmend.probe import measure
        >>> setup = Setup(nn.Linear(4, 1), nn.MSELoss(), partial(torch.optim.SGD, lr=0.1, weight_decay=1e-2))
        >>> batch = (torch.randn(64, 4), torch.randn(64, 1))
        >>> inquire(setup, batch, measure(setup, batch)).optimizer.groups[0].decay
        0.01
    """
    with undisturbed(setup.model):
        trial = setup.copy()
        with undisturbed(trial.model):
            optimizer = trial.build_optimizer()
            if obstacle(optimizer, setup.model):
                return None
            found = _inquire(trial, optimizer, batch, profile)
            if found is None:
                return None
            halved = _attempt(partial(_halved, trial, batch)) if found.shrinking > _PULLED else None
        tried = _without_dropout(setup, batch, found)
        return replace(found, tried=tried | ({"half the weights": halved} if halved else {}))


def _inquire(trial: Setup, optimizer: Optimizer, batch: Batch, profile: Profile) -> Regime | None:
    rows = _rows(batch)
    halves = _attempt(partial(_halves, trial, batch, rows)) if rows >= 4 else None
    if not (halves[0] if halves else _gradients(trial, batch)):
        return None  # the loss is computed from the user's own model, not from the copy
    response = profile.response
    drops = any(site.kind == "dropout" and site.settings.get("p") for site in profile.anatomy.sites)
    return Regime(
        optimizer=read_optimizer(optimizer, trial.model),
        shrinking=response.shrinking if response else 0.0,
        weights=response.weights if response else 0,
        novelty=_attempt(partial(_novelty, trial, batch)),
        noise_scale=_scale(halves, rows // 2) if halves else None,
        dropout_scale=_attempt(partial(_dropout_scale, trial, batch, rows)) if drops and rows else None,
        flushes=next(trial.model.parameters()).device.type != "cpu" or flushes(),
        affine=_plain(profile.anatomy) and bool(_attempt(partial(_affine, trial, batch, profile.anatomy))),
        capacity=capacity(batch) if _plain(profile.anatomy) or bottleneck(profile.anatomy) else None,
    )


Found = TypeVar("Found")


def _attempt(compute: Callable[[], Found]) -> Found | None:
    """None where the user's code does not take what is tried: its own checks may raise anything."""
    try:
        return compute()
    except Exception:
        return None


def read_optimizer(optimizer: Optimizer, model: nn.Module) -> OptimizerReading:
    """The settings of a live optimizer, without stepping it.

    >>> model = nn.Linear(2, 1)
    >>> read_optimizer(torch.optim.Adam(model.parameters(), lr=1e-3), model).groups[0].betas
    (0.9, 0.999)
    """
    names = {id(p): name for name, p in named_parameters(model)}
    groups = tuple(_group(group, names) for group in optimizer.param_groups)
    return OptimizerReading(type(optimizer).__name__, groups)


def bottleneck(anatomy: Anatomy) -> Site | None:
    """The last linear site but one, if it has fewer units than the last, and the last sums nothing else."""
    weighted = anatomy.weighted()
    if len(weighted) < 2:
        return None
    before, last = weighted[-2:]
    narrow = before.units < last.units and last.kind == "linear" and last.fan_in == before.units
    between = [site for site in anatomy.sites if before.index < site.index <= last.index]
    return before if narrow and all(i >= before.index for site in between for i in site.inputs) else None


_PLAIN = frozenset(("linear", "convolution", "scale", "dropout", "sum", "concat"))


def _plain(anatomy: Anatomy) -> bool:
    """Whether no site up to the last weights is known to bend."""
    weighted = anatomy.weighted()
    inner = [site for site in anatomy.sites if weighted and site.index < weighted[-1].index]
    return bool(weighted) and all(site.kind in _PLAIN for site in inner)


def _affine(setup: Setup, batch: Batch, anatomy: Anatomy) -> bool:
    """Whether the last weights take the midpoint of two rows to the midpoint of their outputs."""
    inputs, _ = split(batch)
    (x,) = inputs
    setup.model.eval()
    last = setup.model.get_submodule(anatomy.weighted()[-1].module)
    seen: list[Tensor] = []
    handle = last.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    try:
        setup.model(x)
        setup.model((x + x.roll(1, 0)) / 2)
    finally:
        handle.remove()
    ends, middle = (output.double() for output in seen)
    error = (middle - (ends + ends.roll(1, 0)) / 2).abs().max()
    return bool(error <= _ROUNDING * (ends - ends.mean(0)).abs().max())


_ROUNDING = 1e-4


def capacity(batch: Batch) -> Capacity | None:
    """What the targets of a batch `(x, y)` ask for; None for few rows, many columns, or another form.

    Examples:
        >>> x = torch.rand(200, 2) < 0.5
        >>> found = capacity((x.float(), x[:, 0] ^ x[:, 1]))  # exclusive or
        >>> found.linear < 0.1, found.neighbour
        (True, 1.0)
    """
    pair = _rows_and_targets(batch)
    if pair is None:
        return None
    x, y = pair
    spread = y - y.mean(0)
    total = spread.square().sum()
    if len(x) < 2 * x.shape[1] + 8 or not total > 0:
        return None
    values = torch.linalg.svdvals(spread).square()
    kept = (values.cumsum(0) / values.sum()).tolist()
    ones = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    fit = ones @ torch.linalg.lstsq(ones, spread.double(), driver="gelsd").solution
    left = ((spread - fit).square().sum() / total).item()
    distances = torch.cdist(x, x)
    distances.fill_diagonal_(math.inf)
    near = (spread - spread[distances.argmin(1)]).square().sum() / total
    return Capacity(
        rows=len(x),
        columns=x.shape[1],
        rank=int((values > 1e-6 * values.sum()).sum()),
        lost=tuple(max(0.0, 1 - share) for share in kept),
        linear=1 - left * (len(x) - 1) / (len(x) - x.shape[1] - 1),
        neighbour=1 - near.item(),
    )


def _rows_and_targets(batch: Batch) -> tuple[Tensor, Tensor] | None:
    """Inputs and targets as matrices of float32, at most some rows; classes as one column each."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        return None
    x, y = batch
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.dim() > 1 and y.dim() and len(x) == len(y)):
        return None
    x, y = x[:_ROWS].detach().cpu(), y[:_ROWS].detach().cpu()
    if not x.is_floating_point() or x[0].numel() > _COLUMNS:
        return None
    if not y.is_floating_point():
        if y[0].numel() != 1:
            return None
        y = nn.functional.one_hot(torch.unique(y.flatten(), return_inverse=True)[1])
    return x.flatten(1).float(), y.reshape(len(y), -1).float()


def _group(group: Mapping[str, Any], names: Mapping[int, str]) -> GroupReading:
    epsilon, betas = group.get("eps"), group.get("betas")
    epsilon = float(epsilon) if isinstance(epsilon, (int, float)) else None
    dtypes = {p.dtype for p in group["params"]}
    return GroupReading(
        names=tuple(names[id(p)] for p in group["params"] if id(p) in names),
        rate=float(group.get("lr") or 0.0),
        momentum=None if group.get("momentum") is None else float(group["momentum"]),
        betas=(float(betas[0]), float(betas[1])) if betas and len(betas) >= 2 else None,
        epsilon=epsilon,
        vanishes=epsilon is not None and any(not torch.tensor(epsilon, dtype=d) for d in dtypes),
        decay=float(group.get("weight_decay") or 0.0),
    )


Gradients = dict[int, Tensor]


def _gradients(setup: Setup, batch: Batch, seed: int = 0) -> Gradients:
    seed_noise(seed)
    loss = setup.loss(untouched(batch))
    wanted = [p for _, p in named_parameters(setup.model) if p.requires_grad]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return {id(p): g for p, g in zip(wanted, found, strict=True) if g is not None}


def _halves(setup: Setup, batch: Batch, rows: int) -> tuple[Gradients, Gradients]:
    """The gradients of the two halves of a batch."""
    middle = rows // 2
    return (
        _gradients(setup, _cut(batch, rows, 0, middle)),
        _gradients(setup, _cut(batch, rows, middle, 2 * middle)),
    )


def _cut(batch: Batch, rows: int, start: int, end: int) -> Batch:
    return tree_map_only(Tensor, lambda t: t[start:end] if t.dim() and len(t) == rows else t, batch)


def _rows(batch: Batch) -> int:
    sizes = [t.size(0) for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()]
    return sizes[0] if sizes and sizes.count(sizes[0]) == len(sizes) else 0


def _scale(pair: tuple[Gradients, Gradients], rows: int) -> float:
    """Rows that average the noise between two gradients, each of so many rows, down to what they share.

    tr(Sigma) / |G|^2 of McCandlish et al. 2018, appendix A.1, where the product of the two stands for |G|^2.
    """
    first, second = pair
    pairs = [(_flat(first[key]), _flat(second[key])) for key in first.keys() & second.keys()]
    sums = torch.stack([torch.stack([a @ b, (a @ a + b @ b) / 2]) for a, b in pairs])
    signal, size = sums.sum(0, dtype=torch.float64).tolist()
    return rows * (size - signal) / signal if signal > 0 else math.inf


def _flat(x: Tensor) -> Tensor:
    """As one vector, in a dtype that holds its squares."""
    x = x.to_dense().flatten()
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _dropout_scale(setup: Setup, batch: Batch, rows: int) -> float:
    return _scale((_gradients(setup, batch, 0), _gradients(setup, batch, 1)), rows)


def _novelty(setup: Setup, batch: Batch) -> float | None:
    """The loss over the loss with exchanged targets; only where a loss function compares the two."""
    if setup.loss_fn is None or not _rows(batch):
        return None
    inputs, target = split(untouched(batch))
    if not isinstance(target, Tensor):
        return None
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    output = setup.model(*inputs)
    own, other = (setup.loss_fn(output, y).item() for y in (target, target[order]))
    return own / other if other > 0 and math.isfinite(own) else None


def _without_dropout(setup: Setup, batch: Batch, found: Regime) -> dict[str, tuple[float, ...]]:
    """Where the noise of dropout fills the gradient: the losses of a few steps with it and without."""
    if found.learnt or (found.dropout_scale or 0.0) < _NOISY or not _undrop((calm := setup.copy()).model):
        return {}
    losses = _attempt(lambda: (_losses(setup.copy(), batch, _STEPS), _losses(calm, batch, _CALM_STEPS)))
    return dict(zip(("dropout", "no dropout"), losses, strict=True)) if losses else {}


def _halved(trial: Setup, batch: Batch) -> tuple[float, float]:
    """The loss as it is, and with all weights of the copy at half their size."""
    before = _loss(trial, batch)
    with torch.no_grad():
        for _, p in named_parameters(trial.model):
            p.mul_(0.5 if p.dim() > 1 else 1.0)
    return before, _loss(trial, batch)


def _loss(setup: Setup, batch: Batch) -> float:
    seed_noise(0)
    return setup.loss(untouched(batch)).item()  # with gradients, for losses that take some themselves


def _undrop(model: nn.Module) -> bool:
    """Switch off the dropout modules; False if there are none."""
    found = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    for module in found:
        module.p = 0.0
    return bool(found)


def _losses(trial: Setup, batch: Batch, steps: int) -> tuple[float, ...]:
    """The loss before and after each step of a copy, with fresh noise in each."""
    with undisturbed(trial.model):
        optimizer, losses = trial.build_optimizer(), []
        for step in range(steps + 1):
            seed_noise(step)
            optimizer.zero_grad()
            loss = trial.loss(untouched(batch))
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())
            if trial.gradient_transform is not None:
                trial.gradient_transform([p for group in optimizer.param_groups for p in group["params"]])
            optimizer.step()
        return tuple(losses)
