"""Rerun: the same forward and backward pass once more, with a change to what is computed on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map_only

from gradmend import stats
from gradmend.anatomy import Anatomy, Site
from gradmend.harmless import seed_noise, undisturbed, untouched
from gradmend.recorder import Call, Recorder
from gradmend.samples import places, readable, real, samples_first
from gradmend.setup import Batch, Setup


class Change:
    """What is different in a rerun: nothing, if not overridden."""

    def batch(self, batch: Batch) -> Batch:
        """The batch that takes the place of this one; its tensors may be written to."""
        return batch

    def before(self, call: Call, index: int) -> None:
        """Change the arguments of the call that is about to make the site of this index."""

    def after(self, call: Call, site: Site, output: Tensor) -> Tensor | None:
        """What takes the place of an output; None to keep it."""
        return None


@dataclass
class Trace:
    """What a rerun saw of one site, of a few samples: one row each.

    Args:
        site: where.
        rows: outputs; None at activations, whose inputs tell as much.
        slopes: gradients at the output; None if none arrives.
        tokens: 1 - mean cosine between the places of one sample; None but for [samples, places, units].
        silent: which units are zero for all samples, of an activation.
        flat: share of an activation's inputs where it is flat.
    """

    site: Site
    rows: Tensor | None = None
    slopes: Tensor | None = None
    tokens: Tensor | None = None
    silent: Tensor | None = None
    flat: Tensor | None = None

    @property
    def rms(self) -> float | None:
        """Root mean square of the output."""
        return None if self.rows is None else _rms(self.rows)

    @property
    def gradient(self) -> float | None:
        """Root mean square of the gradient at the output."""
        return None if self.slopes is None else _rms(self.slopes)


Traces = dict[int, Trace]
"""What a rerun saw, by the index of the site."""


@dataclass
class _Eyes:
    change: Change
    traces: list[Trace] = field(default_factory=list)
    flat: dict[int, Tensor] = field(default_factory=dict)
    reached: set[int] = field(default_factory=set)
    ends: list[GradientEdge] = field(default_factory=list)
    count: int = 0
    listening: bool = False

    def before(self, call: Call) -> None:
        self.change.before(call, self.count)
        if call.activation is not None and readable(call.signal):
            rows = stats.some_samples(real(call.signal.detach()).flatten(1))
            self.flat[self.count] = stats.flat_fraction(rows, stats.steep_interval(call.activation))
        self.count += 1

    def after(self, call: Call, site: Site, output: Tensor) -> Tensor | None:
        changed = self.change.after(call, site, output)
        output = output if changed is None else changed
        if readable(output):
            trace = _trace(call, site, output.detach())
            trace.flat = self.flat.get(site.index)
            self.traces.append(trace)
            if output.requires_grad:
                output.register_hook(lambda slope: self.backward(trace, slope))  # type: ignore[no-untyped-call]
                self._note_end(site, output)
        return changed

    def _note_end(self, site: Site, output: Tensor) -> None:
        """The way back ends at the first sites: gradients of the weights are nobody's concern here."""
        if self.reached.isdisjoint(site.inputs):
            self.ends.append(get_gradient_edge(output))
        self.reached.add(site.index)

    def backward(self, trace: Trace, slope: Tensor) -> None:
        if not self.listening:  # a loss that takes gradients itself
            return
        slope = slope.detach()
        slope = samples_first(slope, trace.site.batch_dim)
        trace.slopes = stats.some_samples(real(slope).flatten(1)).clone()


def rerun(setup: Setup, batch: Batch, change: Change) -> Traces | None:
    """One forward and backward pass with a change on the way; the setup stays as it was.

    Noise such as dropout is the same in every rerun.

    Returns:
        What was seen, by the index of the site; None if the change cannot be made.

    Examples:
        >>> from torch import nn
        >>> setup = Setup(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), nn.MSELoss())
        >>> traces = rerun(setup, (torch.randn(64, 2), torch.randn(64, 1)), Change())
        >>> [trace.site.kind for trace in traces.values()]
        ['linear', 'activation', 'linear']
    """
    eyes = _Eyes(change)
    with undisturbed(setup.model):
        seed_noise(0)
        given = change.batch(untouched(batch))
        recorder = Recorder(setup.model, eyes.before, eyes.after)
        try:
            with recorder.watching(given):
                loss = setup.loss(given)
            eyes.listening = True
            if eyes.ends:
                torch.autograd.grad(loss, eyes.ends, allow_unused=True)
        except Exception:  # whatever a forward or a loss raises when its signal is another one
            return None
    return {trace.site.index: trace for trace in eyes.traces}


def samples_of(batch: Batch, anatomy: Anatomy, most: int) -> list[Batch]:
    """The batch with fewer samples, where they do not mix; then the whole batch.

    The second is for models that take no other size. Batch normalization mixes samples.

    >>> [len(x) for x, _ in samples_of((torch.zeros(64, 2), torch.zeros(64)), Anatomy((), ()), 16)]
    [16, 64]
    """
    mixed = any(site.function == "batch_norm" for site in anatomy.sites)
    fewer = batch if mixed else drawn(batch, most)
    return [batch] if fewer is batch else [fewer, batch]


def drawn(batch: Batch, most: int) -> Batch:
    """The batch with at most so many of its samples, those that statistics look at.

    The batch itself, if it has no more, or if its tensors do not agree how many it has.

    >>> x, y = drawn((torch.arange(4), torch.arange(4)), 2)
    >>> len(x), torch.equal(x, y)
    (2, True)
    """
    sizes = {tensor.size(0) for tensor in tree_leaves(batch) if isinstance(tensor, Tensor) and tensor.dim()}
    if len(sizes) != 1 or (rows := sizes.pop()) <= most:
        return batch
    chosen = partial(places, rows, most)
    return tree_map_only(Tensor, lambda t: t[chosen(t.device)] if t.dim() else t, batch)


def _trace(call: Call, site: Site, output: Tensor) -> Trace:
    values = real(samples_first(output, site.batch_dim))
    trace = Trace(site)
    if call.activation is None:
        trace.rows = stats.some_samples(values.flatten(1)).clone()
    elif not site.batch_dim:
        trace.silent = stats.silent_units(values[None], site.unit_dim)[0]
    if values.dim() == 3 and site.unit_dim == 2:
        trace.tokens = likeness(values)
    return trace


def _rms(rows: Tensor) -> float:
    return rows.double().square().mean().sqrt().item()


def likeness(x: Tensor) -> Tensor:
    """1 - mean cosine between the places of one sample, of a few samples: [samples, places, units].

    >>> likeness(torch.ones(2, 3, 4)).item()
    0.0
    """
    units = torch.nn.functional.normalize(x[:8], dim=2)
    apart = units - units[:, :1]  # differences keep their digits where all are but parallel
    places = x.shape[1]
    spread = apart.square().sum((1, 2)) - apart.sum(1).square().sum(1) / places
    return (spread / max(1, places - 1)).mean()


def cosine_gap(rows: Tensor) -> float:
    """1 - the mean cosine between samples."""
    return 1 - float(stats.directions(stats.gram(rows))[0])


def followed(traces: Traces, sites: Sequence[Site]) -> bool:
    """Whether a rerun went through the same sites as the measured step."""
    return all(s.index not in traces or traces[s.index].site.name == s.name for s in sites)
