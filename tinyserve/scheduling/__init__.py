"""Which tokens are computed next, and where they are kept: ints only, no arrays."""
