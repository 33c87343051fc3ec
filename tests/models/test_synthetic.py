"""Synthetic weights: packed as real ones are, and calm through all layers."""

from collections.abc import Callable
from pathlib import Path

import checkpoints
import numpy as np
import pytest

from tinyserve import LLM
from tinyserve.models.config.costs import weight_bytes
from tinyserve.models.dtypes import WEIGHT_DTYPES
from tinyserve.models.matrix import IntegerMatrix
from tinyserve.models.synthetic import packed_matrix
from tinyserve.tensor import quant


@pytest.mark.parametrize("dtype", ["w8a16", "w8a8", "w4a16"])
def test_a_packed_matrix_is_like_one_packed_from_floats(dtype: str) -> None:
    shape = (150, 200)
    packed = packed_matrix("some.weight", shape, dtype)
    pack = quant.pack_bytes if dtype.startswith("w8") else quant.pack_nibbles
    real = pack(np.zeros(shape, np.float32), WEIGHT_DTYPES[dtype].group_size)
    assert (packed.stream.shape, packed.stream.dtype) == (real.stream.shape, real.stream.dtype)
    assert packed[1:] == real[1:]
    assert packed.holds(shape) and packed.is_finite()
    weights = IntegerMatrix(shape, packed, 16).rows(np.arange(150))
    assert weights.std() == pytest.approx(0.02, rel=0.02)
    assert abs(weights.mean()) < 3e-4
    assert len(np.unique(weights, axis=0)) == 150
    assert not np.array_equal(packed.integers, packed_matrix("other.weight", shape, dtype).integers)


@pytest.mark.parametrize("dtype", ["float32", "w8a16", "w4a8"])
@pytest.mark.parametrize(
    "name",
    [
        *("gpt2", "llama-biases", "llama-grouped", "falcon-40b", "falcon-rw", "granite-hybrid", "granite-hybrid-moe"),
        *("qwen2", "qwen3"),
    ],
)
def test_a_synthetic_model_is_the_real_ones_size_and_its_logits_are_normal(
    folder_of: Callable[[str], Path], name: str, dtype: str
) -> None:
    folder = folder_of(name)
    synthetic, real = (LLM(folder, dtype=dtype, num_threads=1, load_format=kind) for kind in ("dummy", "auto"))
    assert synthetic.model.nbytes == real.model.nbytes
    ids = checkpoints.token_ids(40)
    logits = synthetic.logits(ids)
    logits[np.arange(40), ids] = 0  # a head that is the embedding, too, knows the token it comes from
    z = (logits - logits.mean()) / logits.std()
    assert logits.std() > 0.01
    assert 2 < (z**4).mean() < 5  # 3 for a normal distribution


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "w8a16", "w8a8", "w4a16", "w4a8"])
def test_the_bytes_that_shapes_counts_are_those_of_the_model(dtype: str) -> None:
    """smollm2-135m has no dimension that packing fills up, so the sizes are equal and not just alike."""
    llm = LLM("smollm2-135m", dtype=dtype, load_format="dummy", max_model_len=64)
    assert llm.model.nbytes == weight_bytes(llm.config, dtype)
