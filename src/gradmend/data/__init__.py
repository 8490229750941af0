"""Data: what setups are trained and measured on, by name, from files, or from the user's own loader."""

from gradmend.data.batches import as_batches as as_batches
from gradmend.data.batches import check_batch as check_batch
from gradmend.data.record import Data as Data
from gradmend.data.sources import load as load
