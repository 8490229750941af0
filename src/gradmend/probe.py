"""Measure one training step: a forward and a backward pass, with every site's statistics.

Nothing of the user's changes: weights, buffers, `.grad`, random state, train flags and the optimizer are
afterwards what they were, also when forward or backward raises.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmend import stats
from gradmend.anatomy import Site
from gradmend.assembly import Step, assemble
from gradmend.data import as_batches, check_batch
from gradmend.errors import BatchError
from gradmend.gauge import Angles, Gauge, Pile, Rows, Single, moments, norms, sure
from gradmend.harmless import uncollected, undisturbed, untouched, untrained
from gradmend.inside import Inside
from gradmend.ledger import Key, Ledger
from gradmend.profile import Profile
from gradmend.recorder import Call, Recorder
from gradmend.samples import readable, real, samples_first
from gradmend.setup import Batch, Setup, parameters_of, trainable
from gradmend.updates import updates


def measure(setup: Setup, batches: Batch | Iterable[Batch]) -> Profile:
    """Measure one forward and backward pass; several batches are averaged.

    Args:
        setup: what trains. It is left exactly as it was.
        batches: one batch `(x, y)`, or several (a list, a `DataLoader`).

    Returns:
        The statistics of every site and parameter, and what theory predicts where it can.

    Raises:
        BatchError: if model, batch and loss do not fit, or no gradient reaches any parameter.
        DataError: if a batch is empty or holds NaN.

    Examples:
        >>> setup = Setup(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), nn.CrossEntropyLoss())
        >>> profile = measure(setup, (torch.randn(32, 4), torch.randint(2, (32,))))
        >>> [reading.site.kind for reading in profile.sites]
        ['linear', 'activation', 'linear']
    """
    given = as_batches(batches)
    for batch in given:
        check_batch(batch, paired=setup.step is None)
    trainable(setup.model)
    _keep_heap()
    with uncollected():
        return _measured(setup, given)


def _measured(setup: Setup, batches: Sequence[Batch]) -> Profile:
    with undisturbed(setup.model):
        optimizer = setup.build_optimizer() if setup.optimizer is not None else None
        steps = [_step(setup, batch, optimizer if i == 0 else None) for i, batch in enumerate(batches)]
    return assemble(optimizer, batches, steps)


@cache
def _keep_heap() -> None:
    """Have the C library keep what a step frees for the next one, as it does once 32 MB were freed.

    Else glibc gives it back and asks for it again, and the page faults cost more than all statistics.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


_PREPARING = frozenset(("scale", "dropout", "pool"))
"""Kinds that only prepare the batch for the first layer."""


def _step(setup: Setup, batch: Batch, optimizer: Optimizer | None) -> Step:
    ledger = Ledger()
    probe = Probe(ledger, setup.model)
    loss = probe.forward(setup, batch)
    parameters = {name: p for name, p in parameters_of(probe.modules.items()) if p.is_floating_point()}
    sparse = probe.backward(parameters, loss)
    gradients = {name: g.to_dense() if g.is_sparse else g for name, g in sparse.items()}
    ledger.add("loss", [""], loss.detach()[None, None])
    add_parameters(ledger, parameters, gradients)
    if optimizer is not None and (found := updates(setup, optimizer, sparse)):
        ledger.add("update", list(found), torch.stack(list(found.values()))[:, None])
    numbers = ledger.fetch()
    for name in [name for name in gradients if any(numbers["alike"].get(name, ()))]:
        same = stats.rows_equal(parameters[name].detach()) & stats.rows_equal(gradients[name])
        ledger.add("alike", [name], [[float(same)]])
    return Step(probe.anatomy, parameters, numbers, probe.inside, compiled(probe.modules.values()))


def add_parameters(ledger: Ledger, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
    """Mean squares of values and gradients, and whether the first two rows begin alike."""
    values = {name: p.detach() for name, p in parameters.items()}
    ledger.add("value", list(values), _norms(values))
    ledger.add("slope", list(gradients), _norms(gradients))
    rows = {name: p for name, p in values.items() if p.dim() > 1 and p.shape[0] > 1 and p.numel()}
    if rows:
        first = torch.stack([p.as_strided((2,), (p.stride(0),)) for p in rows.values()])
        ledger.add("alike", list(rows), first[:, :1] == first[:, 1:])


Guard: TypeAlias = Callable[[Callable[..., None]], Callable[..., None]]


def _as_it_is(function: Callable[..., None]) -> Callable[..., None]:
    return function


class Probe:
    """Measures the signals of one forward pass, and their gradients in its backward pass.

    Whoever leads the passes calls `end_forward`, `begin_backward` and `end_backward`; `forward` and
    `backward` lead them.

    Args:
        ledger: gets what is measured.
        model: that runs.
        guard: wraps what autograd is to call.
        recorder: makes what sees the functions of the forward pass, of the model and what to call before and
            after each site.
        frugal: with hardly any memory of its own.
    """

    def __init__(
        self,
        ledger: Ledger,
        model: nn.Module,
        guard: Guard = _as_it_is,
        recorder: Callable[..., Recorder] = Recorder,
        frugal: bool = False,
    ) -> None:
        self._frugal = frugal
        self._ledger = ledger
        self._guard = guard
        self._angles = {group: Angles(partial(self._note, group), frugal) for group in ("signal", "slopes")}
        self._signals = Gauge(self._size, self._look_at_signals, frugal)
        self._inputs: dict[tuple[float, float], Gauge] = {}
        self._outputs: dict[int, Gauge] = {}
        self._slopes = Gauge(self._size_slopes, self._look_at_slopes, frugal)
        self._active: set[Key] = set()
        self._last: Tensor | None = None
        self._read: dict[Key, tuple[Key, tuple[float, float]]] = {}
        self._opened = self._backward = False
        self.recorder = recorder(model, self._before, self._after)
        self.modules = self.recorder.modules
        self.inside = Inside(ledger, self.recorder.sites)

    def forward(self, setup: Setup, batch: Batch) -> Tensor:
        """The loss, with its graph."""
        batch = untouched(batch)
        with self.recorder.watching(batch), untrained(setup.model):
            loss = setup.loss(batch)
        self.end_forward()
        return loss

    def end_forward(self) -> None:
        """All sites have run."""
        self._last = None
        for gauge in (self._signals, *self._inputs.values(), *self._outputs.values()):
            gauge.finish()
        self._angles["signal"].finish()
        self.anatomy = self.recorder.anatomy()

    def backward(self, parameters: Mapping[str, nn.Parameter], loss: Tensor) -> dict[str, Tensor]:
        """The gradients of the parameters that the loss reaches."""
        self.begin_backward()
        gradients, others = _gradients(parameters, self.inside.watched, loss)
        self.end_backward(others)
        return gradients

    def begin_backward(self) -> None:
        """The gradients that come from now on are those of the step."""
        self._backward = True

    def end_backward(self, others: Sequence[Tensor | None]) -> None:
        """All have come.

        Args:
            others: the gradients at the tensors of `inside.watched`.
        """
        self._backward = False
        self.inside.after_backward(others)
        self._slopes.finish()
        self._angles["slopes"].finish()

    def _before(self, call: Call) -> None:
        signal = call.signal
        if not readable(signal):
            return
        self.inside.before(call)
        if not self._opened and call.kind not in _PREPARING:
            self._opened = True
            if call.weight is not None:
                x = real(signal.detach())
                self._ledger.add("entry", ["spread"], _entry_statistics(x)[None])
                rows = stats.some_samples(x.flatten(1))
                self._ledger.add("entry", ["directions"], stats.directions(stats.gram(rows))[None])
        if call.activation is not None:
            self._before_activation(signal, stats.steep_interval(call.activation))

    def _before_activation(self, signal: Tensor, steep: tuple[float, float]) -> None:
        """Its input has just been piled up, if it is the output of the site before."""
        here = len(self.recorder.sites)
        if signal is self._last:
            self._read[here - 1] = here, steep
            return
        if steep not in self._inputs:
            self._inputs[steep] = Gauge(None, partial(self._look_at_inputs, steep), self._frugal)
        self._inputs[steep].place(signal).add(here, signal.detach())

    def _after(self, call: Call, site: Site, output: Tensor) -> None:
        self._opened = self._opened or call.kind not in _PREPARING
        self._last = None
        if not readable(output):
            return
        x = samples_first(output.detach(), site.batch_dim)
        if call.activation is None:
            self._signals.place(x).add(site.index, x)
            self._last = output
        else:
            self._output_gauge(site.unit_dim).place(x).add(site.index, x)
            self._active.add(site.index)
        self.inside.after(call, site, output)
        weight = call.weight
        if weight is not None and not isinstance(weight, nn.Parameter):  # those are measured anyway
            square = stats.norm(weight.detach()).square() / weight.numel()
            self._ledger.add("weight", [site.index], square[None, None])
        if output.requires_grad:
            self._watch(output, site, self._slopes.place(x))

    def _watch(self, output: Tensor, site: Site, place: Pile | Single) -> None:
        def take(gradient: Tensor) -> None:
            if self._backward:  # and not that of a loss that takes gradients itself
                place.add(site.index, samples_first(gradient, site.batch_dim))

        output.register_hook(self._guard(take))  # type: ignore[no-untyped-call]

    def _output_gauge(self, unit_dim: int) -> Gauge:
        if unit_dim not in self._outputs:
            self._outputs[unit_dim] = Gauge(
                partial(self._size_outputs, unit_dim), self._look_at_outputs, self._frugal
            )
        return self._outputs[unit_dim]

    def _note(self, group: str, values: Rows, keys: Sequence[Key]) -> None:
        self._ledger.add(group, keys, values)

    def _size(self, x: Tensor, keys: Sequence[Key]) -> None:
        self._note("moments", moments(x), keys)

    def _size_outputs(self, unit_dim: int, x: Tensor, keys: Sequence[Key]) -> None:
        self._size(x, keys)
        self._note("silent", stats.silent_units(x, unit_dim), keys)

    def _size_slopes(self, x: Tensor, keys: Sequence[Key]) -> None:
        self._note("gradient", norms(x), keys)

    def _look_at_signals(self, rows: Tensor, keys: Sequence[Key]) -> None:
        self._angles["signal"].put(rows, keys)
        readers = defaultdict(list)
        for key in keys:
            if key in self._read:
                readers[self._read[key][1]].append(key)
        for steep, found in readers.items():
            some = _of(found, rows, keys)
            self._look_at_inputs(steep, some, [self._read[key][0] for key in found])

    def _look_at_inputs(self, steep: tuple[float, float], rows: Tensor, keys: Sequence[Key]) -> None:
        """How flat activations are where their input lies."""
        self._note("flat", stats.flat_fraction(rows, steep)[:, None], keys)

    def _look_at_outputs(self, rows: Tensor, keys: Sequence[Key]) -> None:
        """Outputs of activations: cosine and rank are known of their inputs."""
        self._note("active", stats.nonzero_share(rows)[:, None], keys)

    def _look_at_slopes(self, rows: Tensor, keys: Sequence[Key]) -> None:
        """Gradients at the outputs of activations: of these only the size."""
        if passive := [key for key in keys if key not in self._active]:
            rows = _of(passive, rows, keys)
            self._angles["slopes"].put(rows, passive)
            self._note("nonzero", stats.nonzero_share(rows)[:, None], passive)


def _of(some: Sequence[Key], rows: Tensor, keys: Sequence[Key]) -> Tensor:
    """The samples of some of the places."""
    return rows if len(some) == len(keys) else rows[[keys.index(key) for key in some]]


def compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether one of the modules is compiled, so that hooks on those inside would not be called."""
    return any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in modules)


def _norms(tensors: Mapping[str, Tensor]) -> Tensor:
    exact = [x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in tensors.values()]
    found = torch.stack(torch._foreach_norm(exact, 2)).double()
    again = [i for i, norm in enumerate(found.tolist()) if not sure(norm)]
    if again and torch.cat([exact[i].flatten() for i in again]).any():  # and not just biases of zero
        found[again] = torch.stack(torch._foreach_norm([exact[i] for i in again], 2, dtype=torch.float64))
    return found[:, None]


def _entry_statistics(x: Tensor) -> Tensor:
    """Of what the first site reads: mean, rms, spread of its columns, how many are constant."""
    apart = (x - x[:1]).flatten(1)  # so that large means do not drown small deviations
    variances = apart.square().mean(0) - apart.mean(0).square()
    deviations = variances.clamp_min_(0).sqrt().double()
    varying = deviations.masked_fill(deviations == 0, torch.nan)
    rms, mean = stats.norm(x) / math.sqrt(x.numel()), x.mean(dtype=torch.float64)
    constant = (deviations == 0).sum()
    return torch.stack([mean, rms, varying.nanmedian(), deviations.amax(), constant])


def _gradients(
    parameters: Mapping[str, nn.Parameter], others: Sequence[Tensor], loss: Tensor
) -> tuple[dict[str, Tensor], Sequence[Tensor | None]]:
    """The gradients of the parameters that the loss reaches, and of others, without touching any `.grad`."""
    if not loss.requires_grad:
        raise BatchError(
            "The loss does not depend on any parameter. Something cuts the path between them: `detach()`, "
            "`.item()`, `torch.no_grad()`, or a conversion to numpy or to integers."
        )
    wanted = {name: p for name, p in parameters.items() if p.requires_grad}
    if not wanted:
        raise BatchError("All parameters that train are complex numbers; gradmend measures real ones.")
    try:
        gradients = torch.autograd.grad(loss, [*wanted.values(), *others], allow_unused=True)
    except RuntimeError as error:
        again = "second time" in str(error)
        hint = "\n`step` returns the loss before any `backward()`: take yours out of it." if again else ""
        raise BatchError(f"The backward pass failed: {error}{hint}") from error
    found = {name: g for name, g in zip(wanted, gradients, strict=False) if g is not None}
    if not found:
        raise BatchError("The loss reaches none of the model's parameters: is it computed from this model?")
    return found, gradients[len(wanted) :]
