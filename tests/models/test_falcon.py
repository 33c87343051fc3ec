"""What is Falcon's own: ALiBi's rounding, its first config dialect, a head that the config does not mention."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from oracles import Oracle

from tinyserve import LLM
from tinyserve.errors import CheckpointError
from tinyserve.models.falcon import alibi_table

FALCON, GROUPED, RW = (checkpoints.CONFIGS[name] for name in ("falcon-7b", "falcon-40b", "falcon-rw"))


def test_alibi_is_rounded_to_bfloat16() -> None:
    """Eight bits of mantissa for slopes, positions and products; the third of 3 heads has the first slope of 4."""
    table = alibi_table(3, 600)
    assert table.shape == (3, 640)
    assert table.dtype == np.float32 and not table.flags.writeable
    np.testing.assert_array_equal(table[:, 1], np.float32([1 / 16, 1 / 256, 1 / 4]))
    np.testing.assert_array_equal(table[0, :257] * 16, np.arange(257))
    np.testing.assert_array_equal(table[0, 257:263] * 16, [256, 258, 260, 260, 260, 262])  # ties to even
    assert alibi_table(16, 1)[0, 1] == np.float32(0.70703125)  # sqrt(1/2)


def test_alibi_of_every_number_of_heads(oracle: Oracle) -> None:
    torch = oracle("torch")
    falcon = oracle("transformers.models.falcon.modeling_falcon")
    mask = torch.ones((1, 2048), dtype=torch.long)
    for heads in range(1, 130):
        expected = falcon.build_alibi_tensor(mask, heads, torch.float32).reshape(heads, 2048).numpy()
        np.testing.assert_array_equal(alibi_table(heads, 2048), expected)


def test_alibi_over_a_long_text(tmp_path: Path, oracle: Oracle) -> None:
    """Past 256 positions rounding is most of what ALiBi says, and spans of 512 keys are counted from the start."""
    oracle("transformers")
    folder = checkpoints.save_with_transformers(tmp_path, RW | {"max_position_embeddings": 700})
    ids = checkpoints.token_ids(700, seed=7)
    logits = LLM(folder, dtype="float32").logits(ids)
    assert checkpoints.error(logits, checkpoints.transformers_logits(folder, ids)) <= 1e-4


LEGACY_NAMES = {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}


@pytest.mark.parametrize(
    ("raw", "legacy"),
    [(FALCON, "RefinedWebModel"), (GROUPED, "RefinedWeb"), (RW, "RefinedWebModel")],
    ids=["7b", "40b", "rw"],
)
def test_refined_web_is_the_same_model(raw: dict[str, Any], legacy: str, tmp_path: Path) -> None:
    """The config of the first release, without the keys that it did not have, and the same weights."""
    old = {LEGACY_NAMES.get(key, key): value for key, value in raw.items()}
    del old["new_decoder_architecture"]
    kv_heads = old.pop("num_kv_heads")
    if raw is GROUPED:
        old["n_head_kv"] = kv_heads
    old |= {"model_type": legacy, "architectures": ["RWForCausalLM"]}
    ids = checkpoints.token_ids(50)
    tensors = checkpoints.tensors_of(raw)
    expected = LLM(checkpoints.write_folder(tmp_path / "new", raw, tensors), dtype="float32").logits(ids)
    got = LLM(checkpoints.write_folder(tmp_path / "old", old, tensors), dtype="float32").logits(ids)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("same", [True, False])
def test_a_head_in_the_file_is_the_head(same: bool, tmp_path: Path, oracle: Oracle) -> None:
    """`tie_word_embeddings` is true where a config does not say, and then the file decides, as in transformers.

    A head that is a copy of the embedding, as in Qwen3-0.6B, is not kept twice.
    """
    tensors = checkpoints.tensors_of(FALCON)
    embedding = tensors["transformer.word_embeddings.weight"]
    head = embedding.copy() if same else np.ascontiguousarray(embedding[::-1])
    ids = checkpoints.token_ids(30)
    folder = checkpoints.write_folder(tmp_path / "with", FALCON, tensors | {"lm_head.weight": head})
    llm = LLM(folder, dtype="float32")
    tied = LLM(checkpoints.write_folder(tmp_path / "without", FALCON, tensors), dtype="float32")
    expected = tied.logits(ids)
    np.testing.assert_array_equal(llm.logits(ids), expected if same else expected[:, ::-1])
    more = llm.model.nbytes - tied.model.nbytes
    assert more == 0 if same else more >= embedding.nbytes
    transformers = oracle("transformers")
    transformers.logging.set_verbosity_error()
    assert checkpoints.error(llm.logits(ids), checkpoints.transformers_logits(folder, ids)) <= 1e-4


def test_multi_query_ignores_the_number_of_key_heads(folder_of: Callable[[str], Path]) -> None:
    """falcon-7b writes as many key heads as query heads, and has one."""
    assert json.loads((folder_of("falcon-7b") / "config.json").read_text())["num_kv_heads"] == 5
    llm = LLM(folder_of("falcon-7b"), dtype="float32")
    assert llm.engine.runner.cache.layers[0].keys.shape[1] == 1


def test_rows_of_another_layout_are_refused(tmp_path: Path) -> None:
    """Weights of plain multi-head attention under a config of multi-query."""
    tensors = checkpoints.tensors_of(FALCON | {"multi_query": False})
    with pytest.raises(CheckpointError, match=r"query_key_value.*\[360, 120\], but the config implies \[168, 120\]"):
        LLM(checkpoints.write_folder(tmp_path, FALCON, tensors))
