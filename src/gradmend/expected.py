"""What mean-field theory expects of a model as read, from its measured weights and input."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradmend import theory
from gradmend.anatomy import Anatomy
from gradmend.readings import Expected, InputReading, Reading


def expect(
    anatomy: Anatomy, sites: Sequence[Reading], inputs: InputReading | None
) -> tuple[dict[int, Expected], str | None]:
    """What theory expects at each linear site, with the gradient anchored at the last one; or why not."""
    stack = anatomy.stack()
    if isinstance(stack, str):
        return {}, stack
    if inputs is None or math.isnan(inputs.cosine):
        return {}, "the input is not a batch of real vectors"
    by_site = {reading.site.index: reading for reading in sites}
    readings = [by_site[linear.index] for linear, _ in stack]
    if not all(reading.finite for reading in readings):
        return {}, "values are not finite"
    phis = [after.activation if after else None for _, after in stack]
    layers = [
        theory.Layer(phi, r.weight_variance or 0.0, r.bias_variance or 0.0)
        for phi, r in zip(phis, readings, strict=True)
    ]
    predicted = theory.predict(layers, inputs.rms**2, inputs.cosine)
    last = readings[-1].gradient_norm or 0.0
    triples = zip(predicted.q, predicted.cosine, predicted.log_gradient, strict=True)
    return {
        reading.site.index: Expected(math.sqrt(q), cosine, last * math.exp(log / 2))
        for reading, (q, cosine, log) in zip(readings, triples, strict=True)
    }, None
