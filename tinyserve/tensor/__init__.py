"""Numba kernels: arrays in, arrays out. Nothing here knows what a model, a sequence or a file is."""
