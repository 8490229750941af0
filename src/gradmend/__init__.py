"""gradmend finds out why a deep network does not learn, mends it, and proves that it did."""

