"""A model whose layers are in several processes: which has which, and what goes from one to the next."""
