"""All sound setups: models as people write them, which train well: nothing may be found wrong with them."""

import healthy_functions
import healthy_generative
import healthy_recurrent
import healthy_tables
import healthy_targets
import healthy_transformers
import healthy_tricks
import healthy_vision

CASES = (
    *healthy_vision.CASES,
    *healthy_transformers.CASES,
    *healthy_recurrent.CASES,
    *healthy_generative.CASES,
    *healthy_functions.CASES,
    *healthy_tables.CASES,
    *healthy_targets.CASES,
    *healthy_tricks.CASES,
)
