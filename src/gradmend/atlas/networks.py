"""Networks of the atlas, and what one measured step says of them."""

from __future__ import annotations

from functools import cache
from typing import Any

from gradmend.atlas.sizes import Sizes
from gradmend.data import Data, load
from gradmend.probe import measure
from gradmend.profile import Profile
from gradmend.setup import Batch
from gradmend.zoo import Recipe, recipe


@cache
def digits() -> Data:
    """The data of all networks that are not recurrent."""
    return load("digits")


def network(sizes: Sizes, **settings: Any) -> Recipe:
    """The recipe `deep` with these settings."""
    return recipe("deep", data=digits(), **{"seed": sizes.seed, "width": sizes.width, **settings})


def rows(sizes: Sizes) -> Batch:
    """The first rows of the data."""
    return digits().x[: sizes.rows], digits().y[: sizes.rows]


def profile(sizes: Sizes, **settings: Any) -> Profile:
    """One measured step of such a network on these rows.

    Examples:
        >>> from gradmend.atlas.sizes import QUICK
        >>> len(profile(QUICK, depth=3).weighted())
        4
    """
    return measure(network(sizes, **settings).setup, rows(sizes))


def setup_code(sizes: Sizes, **settings: Any) -> str:
    """The lines of Python that make such a network and its batch."""
    given = {"seed": sizes.seed, "width": sizes.width, **settings}
    written = ", ".join(f"{key}={value!r}" for key, value in given.items())
    return (
        "import gradmend as gm\n"
        "from gradmend.zoo import recipe\n\n"
        f'found = recipe("deep", {written})\n'
        f"batch = found.data.x[:{sizes.rows}], found.data.y[:{sizes.rows}]\n"
    )


def code(sizes: Sizes, lines: str, **settings: Any) -> str:
    """Those that measure it, followed by others.

    Args:
        lines: what is done with `profile`.
    """
    return f"{setup_code(sizes, **settings)}profile = gm.measure(found.setup, batch)\n{lines}"
