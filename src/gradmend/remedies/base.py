"""The one interface of all remedies: which causes it treats, whether it applies, and what it changes."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from rich.console import RenderableType
from rich.text import Text
from torch.optim import Optimizer

from gradmend import surgery
from gradmend.anatomy import Anatomy, Site
from gradmend.causes import Cause
from gradmend.console import Printable
from gradmend.data import as_batches
from gradmend.errors import BatchError, NoEffectWarning, SetupError
from gradmend.harmless import undisturbed
from gradmend.recorder import read
from gradmend.setup import Batch, Setup
from gradmend.surgery import Edit

SIGNAL = frozenset(
    {
        Cause.WEIGHTS_TOO_SMALL,
        Cause.WEIGHTS_TOO_LARGE,
        Cause.CHAOS,
        Cause.VANISHING_GRADIENT,
        Cause.EXPLODING_GRADIENT,
        Cause.INFORMATION_COLLAPSE,
        Cause.SATURATED_UNITS,
        Cause.DEAD_UNITS,
    }
)
"""The causes that show in signals and gradients, and that new weights or normalization may treat."""

SEED = 0
"""Remedies draw from a generator of their own, so that a treatment can be repeated to the last bit."""


@dataclass(frozen=True)
class Change(Printable):
    """What a remedy did: the changed setup (a copy), and the edits as text and as code.

    Args:
        remedy: with all its parameters, also those that it found from the data.
        setup: a copy of the setup, changed.
        edits: what was changed; none if the remedy had nothing to do.
        by_hand: what is left to the user, whose source it takes: a sentence each, with `file:line`.
    """

    remedy: Remedy
    setup: Setup
    edits: tuple[Edit, ...]
    by_hand: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The change in one line."""
        places = {edit.where for edit in self.edits if edit.where}
        return self.remedy.title + (f" ({len(places)} layers)" if len(places) > 1 else "")

    def __rich__(self) -> RenderableType:
        return Text(self.text)


class Remedy(ABC):
    """A change to a setup. Each remedy is a small frozen dataclass; its fields are its parameters.

    Every remedy works on a copy, keeps what it does not have to change, does nothing the second time, and
    says what it did.
    """

    treats: ClassVar[frozenset[Cause]]
    """The causes against which it is tried."""

    intrusion: ClassVar[int]
    """How much it changes of what the user built: 1 repairs data and loss ... 7 adds connections."""

    summary: ClassVar[str]
    """What it does, in a few words; `{field}` stands for the value of a field."""

    @property
    def title(self) -> str:
        """The summary with the values of the fields."""
        return self.summary.format(**vars(self))

    @abstractmethod
    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is something for it to do."""

    @abstractmethod
    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Change this private copy; returns it, the remedy with what it found, and the edits."""

    def by_hand(self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]) -> tuple[str, ...]:
        """What it would change if it could: edits for the user, a sentence each, with `file:line`."""
        return ()

    @final
    def apply(self, setup: Setup, batches: Batch | Iterable[Batch], *, seed: int = SEED) -> Change:
        """Apply to a copy of a setup.

        Args:
            setup: stays as it is.
            batches: one batch or several; by the first the model is read.
            seed: of what it draws; the code of the change draws with the usual one.

        Warns:
            NoEffectWarning: if nothing matched.

        Raises:
            SetupError: if the model cannot run with the change.
        """
        copy, given = setup.copy(), as_batches(batches)
        anatomy = anatomy_of(copy, given[0])
        before = list(copy.model.parameters())
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            applies, by_hand = self.applies_to(copy, anatomy), self.by_hand(copy, anatomy, given)
            changed, remedy, edits = self.edit(copy, anatomy, given) if applies else (copy, self, [])
        if not edits:
            text = " ".join([f"{self!r} found nothing to change.", *by_hand])
            warnings.warn(text, NoEffectWarning, stacklevel=2)
        else:
            self._check(changed, given[0])
        if isinstance(changed.optimizer, Optimizer):
            surgery.sync_optimizer(changed.optimizer, before, list(changed.model.parameters()))
        return Change(remedy, changed, tuple(edits), by_hand)

    def _check(self, changed: Setup, batch: Batch) -> None:
        try:
            with undisturbed(changed.model), torch.no_grad():
                changed.loss(batch)
                changed.model.eval()
                changed.loss(batch)
        except (AttributeError, BatchError) as error:
            raise SetupError(
                f"{self!r} does not fit this model: {error}\nIts forward uses a layer otherwise than by "
                "calling it. Call the layer, or make this change by hand."
            ) from error


def anatomy_of(setup: Setup, batch: Batch) -> Anatomy:
    """Read a setup's model by one forward pass that leaves no trace."""
    with undisturbed(setup.model):
        return read(setup.model, lambda: setup.loss(batch), batch)


def weighted_layers(setup: Setup, anatomy: Anatomy) -> list[tuple[Site, Site | None]]:
    """The weighted sites that are layers with a `weight`, once each, with the activation after them."""
    modules = dict(setup.model.named_modules())
    seen: dict[str, tuple[Site, Site | None]] = {}
    for site in anatomy.weighted():
        if hasattr(modules[site.module], "weight") and site.name.split("#")[0] == site.module:
            seen.setdefault(site.module, (site, anatomy.activation_after(site)))
    return list(seen.values())


def is_output(anatomy: Anatomy, site: Site) -> bool:
    """Whether no weights come after this site."""
    return all(other.index <= site.index for other in anatomy.weighted())
