"""Atlas: a small site, from measured data, that shows why deep networks do or do not learn."""

from __future__ import annotations

from gradmend.atlas.site import build
from gradmend.atlas.sizes import FULL, QUICK, Sizes

__all__ = ["FULL", "QUICK", "Sizes", "build"]
