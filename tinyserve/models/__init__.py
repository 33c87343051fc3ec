"""One file per architecture: how its config and checkpoint names become a forward pass."""
