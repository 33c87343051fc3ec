"""A tokenizer's files as strangers write them: other types, holes, byte order marks, what makes the library panic."""

import json
from pathlib import Path
from typing import Any

import checkpoints
import pytest

from tinyserve.errors import CheckpointError
from tinyserve.text.tokenizer import Tokenizer
from tinyserve.text.tokenizer.library import library_errors

CONFIG = "tokenizer_config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoints.write_tokenizer(tmp_path)
    return tmp_path


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | keys))


def refusal(folder: Path, file: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_folder(folder)
    message = str(caught.value)
    assert message.startswith(str(folder / file)) and message.isprintable() and len(message) < 500
    return message


# --- values of other types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [CONFIG, "special_tokens_map.json"])
@pytest.mark.parametrize("name", ["bos_token", "eos_token", "unk_token", "pad_token"])
@pytest.mark.parametrize("value", [["<|bos|>"], 5, True, {"content": 5}, {"content": ["x"]}])
def test_a_special_token_is_text(file: str, name: str, value: Any, folder: Path) -> None:
    change(folder / file, **{name: value})
    assert repr(name) in refusal(folder, file)


@pytest.mark.parametrize("value", [None, {}, {"content": None}, "", {"content": "<|eos|>", "lstrip": 5}])
def test_a_special_token_may_be_none_or_an_object(value: Any, folder: Path) -> None:
    change(folder / CONFIG, pad_token=value)
    expected = {"bos_token", "eos_token"} | ({"pad_token"} if value and value.get("content") else set())
    assert set(Tokenizer.from_folder(folder).special_tokens) == expected


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ([1], "'added_tokens_decoder'"), ("x", "'added_tokens_decoder'"), ({"x": {"content": "y"}}, "'x'"),
        ({"-1": {"content": "y"}}, "'-1'"), ({"²": {"content": "y"}}, "'²'"), ({"9" * 99: {"content": "y"}}, "'999"),
        ({"261": 5}, "'261'"), ({"261": {}}, "'content'"), ({"261": {"content": 5}}, "'content'"),
        ({"261": {"content": "y", "special": 3}}, "'special'"), ({"261": {"content": "y", "lstrip": "no"}}, "'lstrip'"),
    ],
)  # fmt: skip
def test_added_tokens_are_objects_with_flags(value: Any, key: str, folder: Path) -> None:
    change(folder / CONFIG, added_tokens_decoder=value)
    assert key in refusal(folder, CONFIG)


@pytest.mark.parametrize(
    "value",
    [5, True, {"a": 1}, [5], [[]], [{"template": "x"}], [{"name": "a"}], [{"name": 5, "template": "x"}],
     [{"name": "default", "template": 5}]],
)  # fmt: skip
def test_a_chat_template_that_is_none_keeps_no_model_from_loading(value: Any, folder: Path) -> None:
    change(folder / CONFIG, chat_template=value)
    assert Tokenizer.from_folder(folder).chat_templates == {}


@pytest.mark.parametrize("value", [5, ["x"], {"a": 1}])
def test_a_template_in_its_own_file_that_is_none_is_left_out(value: Any, folder: Path) -> None:
    change(folder / "chat_template.json", chat_template=value)
    assert Tokenizer.from_folder(folder).chat_templates == {}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ids_of_end_tokens_are_numbers_or_none(file: str, folder: Path) -> None:
    change(folder / file, eos_token_id=[-1, 7, None], bos_token_id=-1)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_token_ids == {7, checkpoints.EOS} and tokenizer.bos_token_id == checkpoints.BOS
    change(folder / file, eos_token_id={"a": 1})
    assert "'eos_token_id'" in refusal(folder, file)


def test_a_beginning_that_is_no_token_is_none(folder: Path) -> None:
    """Configs are copied from other models, with ids past this one's vocabulary."""
    (folder / CONFIG).write_text("{}")
    change(folder / "config.json", bos_token_id=50256)
    assert Tokenizer.from_folder(folder).bos_token_id is None


# --- byte order marks -----------------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_no_part_of_any_file(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ bos_token }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("tool")
    plain = Tokenizer.from_folder(folder)
    for path in [path for path in folder.rglob("*.*") if path.is_file()]:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.chat_templates == plain.chat_templates == {"default": "{{ bos_token }}", "tool": "tool"}
    assert tokenizer.encode("the<|eos|>") == plain.encode("the<|eos|>") == [257, checkpoints.EOS]


def test_a_byte_order_mark_before_vocab_and_merges_is_no_part_of_them(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    vocab = json.dumps({piece: i for i, piece in enumerate(checkpoints.PIECES)})
    merges = "#version: 0.2\r\n" + "".join(f"{a} {b}\r\n" for a, b in checkpoints.MERGES)
    (folder / "vocab.json").write_text(vocab, encoding="utf-8-sig")
    (folder / "merges.txt").write_text(merges, encoding="utf-8-sig", newline="")
    assert Tokenizer.from_folder(folder).encode("the") == [257]


# --- holes ----------------------------------------------------------------------------------------------------------


def write_vocabulary(folder: Path, vocab: dict[str, int], added: dict[str, int]) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    change(
        folder / "tokenizer.json",
        model={"type": "BPE", "vocab": vocab, "merges": []},
        added_tokens=[{"id": i, "content": content, **flags} for content, i in added.items()],
    )
    (folder / CONFIG).write_text("{}")


@pytest.mark.parametrize(
    ("vocab", "added"),
    [
        ({"a": 0, "b": 1, "c": 3}, {"<x>": 4, "<y>": 9}),
        ({"a": 0, "b": 1, "c": 3}, {"<y>": 2, "<x>": 4}),
        ({"a": 5, "b": 9, "c": 300}, {"<x>": 301, "<y>": 400}),
        ({"a": 0, "b": 1, "c": 2, "<x>": 8}, {"<x>": 8, "<y>": 5}),
    ],
)
def test_each_token_has_its_own_id_in_a_vocabulary_with_holes(
    vocab: dict[str, int], added: dict[str, int], folder: Path
) -> None:
    """The library counts tokens, and by itself puts added ones into the holes or onto other tokens."""
    write_vocabulary(folder, vocab, added)
    check_ids(folder, vocab | added)


def test_tokens_of_tokenizer_config_have_their_own_ids_too(folder: Path) -> None:
    write_vocabulary(folder, {"a": 0, "b": 1, "c": 3}, {})
    change(folder / CONFIG, added_tokens_decoder={"4": {"content": "<x>"}, "2": {"content": "<y>"}})
    check_ids(folder, {"a": 0, "b": 1, "c": 3, "<x>": 4, "<y>": 2})


def check_ids(folder: Path, ids: dict[str, int]) -> None:
    tokenizer, text = Tokenizer.from_folder(folder), "".join(ids)
    assert tokenizer.encode(text) == list(ids.values())
    assert tokenizer.decode(list(ids.values())) == text
    assert [tokenizer.token_bytes(i) for i in ids.values()] == [content.encode() for content in ids]
    assert {tokenizer.token_bytes(i) for i in (max(ids.values()) + 1, -1, 2**40)} == {b""}


def test_an_added_token_with_the_id_of_another_is_refused(folder: Path) -> None:
    write_vocabulary(folder, {"a": 0, "b": 1, "c": 2}, {"<x>": 1})
    assert "'<x>' has the id 1" in refusal(folder, "tokenizer")


# --- what makes the library panic -----------------------------------------------------------------------------------


def test_a_tokenizer_that_makes_the_library_panic_is_refused(folder: Path) -> None:
    change(folder / "tokenizer.json", model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]]})
    refusal(folder, "tokenizer.json")


@pytest.mark.parametrize(
    "keys",
    [
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"model": {"type": "WordLevel", "vocab": {"a": 1}, "unk_token": "b"}},
    ],
)
def test_a_text_that_makes_the_library_panic_is_refused(keys: dict[str, Any], folder: Path) -> None:
    change(folder / "tokenizer.json", **keys)
    tokenizer = Tokenizer.from_folder(folder)
    with pytest.raises(CheckpointError, match=r"^The tokenizer of .* fails on a text \("):
        tokenizer.encode("the")


@pytest.mark.parametrize("merges", ['#version: 0.2\n! "\n# $\n', "!\n", "! x y\n", ' "\n'])
def test_merges_are_of_tokens_to_tokens(merges: str, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps({chr(33 + i): i for i in range(60)}))
    (folder / "merges.txt").write_text(merges)
    assert "is no merge of two tokens" in refusal(folder, "merges.txt")


@pytest.mark.parametrize("token_id", [-1, 1.5, "x", None, 2**40])
def test_ids_of_a_vocabulary_are_numbers(token_id: Any, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps({"!": 0, '"': token_id}))
    (folder / "merges.txt").write_text("")
    refusal(folder, "vocab.json")


def test_what_is_no_error_of_the_library_passes() -> None:
    """Ctrl-C is not taken for a damaged file."""
    with pytest.raises(KeyboardInterrupt), library_errors("x"):
        raise KeyboardInterrupt
