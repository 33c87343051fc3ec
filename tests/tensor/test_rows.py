"""What becomes of embedded tokens before the first block, against NumPy, to the bit."""

import numpy as np
import pytest
from arrays import random

from tinyserve.tensor import rows

pytestmark = pytest.mark.usefixtures("threads")

SHAPES = [(1, 1), (1, 16), (1, 768), (3, 17), (40, 100)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_factor(shape):
    x, factor = random(1, *shape), np.float32(12.3)
    expected = x * factor
    rows.scale_rows(x, factor)
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_positions(shape):
    x, table = random(1, *shape), random(2, 50, shape[1])
    positions = np.random.default_rng(3).integers(0, 50, shape[0])
    expected = x + table[positions]
    rows.add_rows(x, table, positions)
    np.testing.assert_array_equal(x, expected)
