"""Random numbers that are computed, not remembered: whoever asks again for the same place gets the same number.

Knows nothing of who draws, nor of what.
"""

from functools import lru_cache

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 by the golden ratio: multiples of it are spread evenly


def uniform(seed: int, place: int) -> float:
    """The `place`-th number of the stream of a seed, in [0, 1): SplitMix64 (Steele et al. 2014), started by a hash.

    Neighbouring seeds have unrelated streams; every bit of a seed of any length counts.
    """
    return (_mix(_start(seed) + (place + 1) * _GOLDEN) >> 11) * 2.0**-53


@lru_cache(4096)
def _start(seed: int) -> int:
    state = _mix(seed + _GOLDEN)
    while seed := seed >> 64:
        state = _mix(seed + state + _GOLDEN)
    return state


def _mix(z: int) -> int:
    """A permutation of the 64-bit numbers in which each bit of the result depends on each bit of `z`."""
    z &= _MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31
