"""Text becomes the ids that other implementations give, from GGUF metadata and from a folder's files."""

import copy
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Oracle
from refusals import refused
from tokenizers import Regex, pre_tokenizers

from tinyserve.checkpoints.gguf import open_gguf
from tinyserve.errors import CheckpointError, ContextLengthError
from tinyserve.text.tokenizer import Tokenizer
from tinyserve.text.tokenizer.gguf import TokenType, _merges_from_scores

CASES = json.loads((Path(__file__).parents[1] / "golden" / "tokenizer.json").read_text(encoding="utf-8"))["cases"]
KEY = "tokenizer.ggml."
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def metadata_of(case: str, **changes: Any) -> dict[str, Any]:
    """The golden vocabulary with keys changed; None removes a key."""
    metadata: dict[str, Any] = copy.deepcopy(CASES[case]["metadata"])
    metadata |= {KEY + key: value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def chatty(**changes: Any) -> dict[str, Any]:
    """The SmolLM2 vocabulary with its special tokens named."""
    tokens = CASES["smollm"]["metadata"][KEY + "tokens"]
    ids = {"bos_token_id": tokens.index("<|im_end|>"), "eos_token_id": tokens.index("<|endoftext|>")}
    return metadata_of("smollm", **ids | changes)


@pytest.mark.parametrize("case", CASES)
def test_gguf_vocabularies_encode_as_their_other_readers_do(case: str) -> None:
    tokenizer = Tokenizer.from_gguf(CASES[case]["metadata"], case)
    assert len(CASES[case]["texts"]) >= 18
    for text, ids in zip(CASES[case]["texts"], CASES[case]["ids"], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text


# The pre_tokenizer of the models' tokenizer.json; ours is built from the name of it that a GGUF file has.
def byte_level(use_regex: bool = True) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])


def falcon() -> Any:
    three = pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("contiguous"), byte_level(), pre_tokenizers.Digits(False), three]
    )


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(False)])


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
REFERENCES: dict[str, Callable[[], Any]] = {
    "gpt-2": byte_level,
    "smollm": digits,
    "starcoder": digits,
    "refact": digits,
    "command-r": digits,
    "falcon": falcon,
    "default": falcon,
    "llama-bpe": lambda: split(LLAMA3),
    "dbrx": lambda: split(LLAMA3),
    "qwen2": lambda: split(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")),
    "tekken": lambda: split(TEKKEN),
}
PAIRS = {
    name: (Tokenizer.from_gguf(metadata_of("gpt-2", pre=name), name)._backend.pre_tokenizer, reference())
    for name, reference in REFERENCES.items()
}
FRAGMENTS = [
    "Hello",
    " world",
    "'s",
    "'LL",
    "123",
    "4567",
    " ",
    "\n",
    "\r\n",
    "½",
    "²",
    "١٢",
    "e\u0301",
    "中",
    ".",
    "$<",
]


@pytest.mark.parametrize("name", REFERENCES)
@settings(deadline=None)
@given(text=st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS)).map("".join)))
def test_pre_tokenizers_cut_where_those_of_tokenizer_json_cut(name: str, text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    ours, reference = PAIRS[name]
    cut = [[piece for piece, _ in pre.pre_tokenize_str(text)] for pre in (ours, reference)]
    assert cut[0] == cut[1]


def test_bos_and_eos_are_added_as_the_file_says() -> None:
    bos, eos = (chatty()[f"{KEY}{name}_token_id"] for name in ("bos", "eos"))
    for add_bos in (None, False, True):
        for add_eos in (None, False, True):
            tokenizer = Tokenizer.from_gguf(chatty(add_bos_token=add_bos, add_eos_token=add_eos), "f")
            bare = tokenizer.encode("Hello", add_special_tokens=False)
            assert tokenizer.encode("Hello") == [bos] * bool(add_bos) + bare + [eos] * bool(add_eos)
            assert tokenizer.encode_chat("Hello") == bare


def test_bos_defaults_to_what_the_family_does() -> None:
    llama3 = Tokenizer.from_gguf(chatty(pre="llama-bpe"), "f")
    assert llama3.encode("") == [llama3.bos_token_id]
    spm = Tokenizer.from_gguf(CASES["sentencepiece"]["metadata"], "f")
    assert spm.encode("the")[0] == spm.bos_token_id == 1 and spm.eos_token_ids == {2}
    assert Tokenizer.from_gguf(chatty(), "f").encode("") == []


def test_a_rendered_chat_has_the_one_bos_it_was_written_with() -> None:
    tokenizer = Tokenizer.from_gguf(CASES["sentencepiece"]["metadata"], "f")
    assert tokenizer.encode("<s>the").count(1) == 2
    assert tokenizer.encode_chat("<s>the").count(1) == 1


@pytest.mark.parametrize("form", ["sentencepiece", "gguf", "folder"])
def test_a_prompt_that_begins_with_bos_gets_no_second_one(form: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(CASES["sentencepiece"]["metadata"], "f")
    if form == "gguf":
        tokenizer = Tokenizer.from_gguf(chatty(add_bos_token=True, add_eos_token=True), "f")
    if form == "folder":
        folder = write(tmp_path, tokenizer__json=tokenizer_json(add_bos_token=True))
        tokenizer = Tokenizer.from_folder(write(folder, tokenizer_config__json={"bos_token": "<|im_end|>"}))
    bos, plain = tokenizer.special_tokens["bos_token"], tokenizer.encode("the", add_special_tokens=False)
    first = tokenizer.bos_token_id
    assert tokenizer.encode_prompt("the") == tokenizer.encode("the")
    assert tokenizer.encode_prompt(f"{bos}the") == tokenizer.encode(f"{bos}the")[1:]
    for text, count in (("the", 1), (f"{bos}the", 1), (bos, 1), (2 * bos, 2)):
        assert tokenizer.encode_prompt(text).count(first) == count
    assert tokenizer.encode_prompt("the", add_special_tokens=False) == plain
    assert tokenizer.encode_prompt(f"{bos}the", add_special_tokens=False).count(first) == 1


def test_a_bos_that_nobody_adds_is_left_where_it_is_written_twice() -> None:
    tokenizer = Tokenizer.from_gguf(chatty(add_bos_token=False), "f")
    assert tokenizer.encode_prompt("<|im_end|><|im_end|>a").count(tokenizer.bos_token_id) == 2


def test_add_space_prefix_is_honoured() -> None:
    for case, text in (("sentencepiece", "the"), ("gpt-2", "world")):
        with_prefix, without = (
            Tokenizer.from_gguf(metadata_of(case, add_space_prefix=flag), "f") for flag in (True, False)
        )
        spaced = without.encode(" " + text, add_special_tokens=False)
        assert with_prefix.encode(text, add_special_tokens=False) == spaced
        assert without.encode(text, add_special_tokens=False) != spaced
        assert without.decode(without.encode(text)) == text


def test_token_types_decide_what_is_special() -> None:
    types = list(CASES["smollm"]["metadata"][KEY + "token_type"])
    tokens = CASES["smollm"]["metadata"][KEY + "tokens"]
    start, end = tokens.index("<|im_start|>"), tokens.index("<|im_end|>")
    assert types[start] == types[end] == TokenType.CONTROL
    types[start] = TokenType.USER_DEFINED
    tokenizer = Tokenizer.from_gguf(chatty(token_type=types), "f")
    assert tokenizer.encode("<|im_start|><|im_end|>") == [start, end]
    assert tokenizer.decode([start, end]) == "<|im_start|>"
    types[end] = TokenType.UNUSED
    assert end not in Tokenizer.from_gguf(chatty(token_type=types), "f").encode("<|im_end|>")


def test_merges_from_scores_follow_sentencepiece() -> None:
    """The best union first; every way to cut it that gives two pieces, the longer left part first."""
    scores = {"a": -3.0, "b": -4.0, "ab": -1.0, "aba": -0.5, "ba": -2.0, "xy": 0.0}
    assert _merges_from_scores(scores) == [("ab", "a"), ("a", "ba"), ("a", "b"), ("b", "a")]


def test_special_tokens_are_named_for_templates() -> None:
    metadata = chatty(padding_token_id=0, unknown_token_id=1)
    tokens = metadata[KEY + "tokens"]
    tokenizer = Tokenizer.from_gguf(metadata, "f")
    assert tokenizer.special_tokens == {
        "bos_token": "<|im_end|>",
        "eos_token": "<|endoftext|>",
        "unk_token": tokens[1],
        "pad_token": tokens[0],
    }
    assert tokenizer.bos_token_id == tokens.index("<|im_end|>")
    assert tokenizer.vocab_size == len(tokens)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pre": "klingon"}, ["f.gguf", "tokenizer.ggml.pre", "'klingon'", "smollm", "llama-bpe"]),
        ({"model": "bert"}, ["f.gguf", "tokenizer.ggml.model", "'bert'", "gpt2, llama"]),
        ({"model": None}, ["f.gguf", "tokenizer.ggml.model", "missing"]),
        ({"tokens": None}, ["f.gguf", "tokenizer.ggml.tokens", "missing"]),
        ({"merges": None}, ["f.gguf", "tokenizer.ggml.merges", "missing"]),
        ({"merges": ["no such"]}, ["f.gguf", "no"]),
        ({"eos_token_id": 10**6}, ["f.gguf", "tokenizer.ggml.eos_token_id", "1000000"]),
        ({"token_type": [1]}, ["f.gguf", "tokenizer.ggml.token_type", "1 entries"]),
        ({"tokens": ["a", "a"]}, ["f.gguf", "tokenizer.ggml.tokens", "more than once"]),
    ],
)
def test_a_file_without_a_usable_tokenizer_names_the_key(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(CheckpointError) as error:
        Tokenizer.from_gguf(metadata_of("smollm", **changes), "f.gguf")
    assert all(word in str(error.value) for word in words), error.value


def test_spm_without_scores_names_the_key() -> None:
    with pytest.raises(CheckpointError, match=r"f\.gguf: the key tokenizer\.ggml\.scores is missing"):
        Tokenizer.from_gguf(metadata_of("sentencepiece", scores=None), "f.gguf")


def test_a_lone_surrogate_is_a_request_error() -> None:
    with refused("prompt", "character 2 is the lone surrogate U+D800"):
        Tokenizer.from_gguf(metadata_of("gpt-2"), "f").encode("ab\ud800")


def write(folder: Path, **files: Any) -> Path:
    """Write files named with __ for the dot; strings as they are, the rest as JSON."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def tokenizer_json(case: str = "smollm", **changes: Any) -> str:
    metadata = chatty(**changes) if case == "smollm" else metadata_of(case, **changes)
    return str(Tokenizer.from_gguf(metadata, case)._backend.to_str())


@pytest.mark.parametrize("case", ["smollm", "sentencepiece"])
def test_a_folder_reads_tokenizer_json(tmp_path: Path, case: str) -> None:
    tokenizer = Tokenizer.from_folder(write(tmp_path, tokenizer__json=tokenizer_json(case)))
    for text, ids in zip(CASES[case]["texts"], CASES[case]["ids"], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.chat_template is None and tokenizer.vocab_size == len(CASES[case]["metadata"][KEY + "tokens"])


def test_a_folder_reads_vocab_and_merges(tmp_path: Path) -> None:
    """GPT-2's own files: nothing says that <|endoftext|> is special, except that GPT-2 is."""
    metadata = metadata_of("gpt-2")
    vocab = {token: i for i, token in enumerate(metadata[KEY + "tokens"])}
    merges = "#version: 0.2\n" + "\n".join(metadata[KEY + "merges"])
    tokenizer = Tokenizer.from_folder(write(tmp_path, vocab__json=vocab, merges__txt=merges))
    for text, ids in zip(CASES["gpt-2"]["texts"], CASES["gpt-2"]["ids"], strict=True):
        assert tokenizer.encode(text) == ids
    end = vocab["<|endoftext|>"]
    assert tokenizer.bos_token_id == end and tokenizer.eos_token_ids == {end}
    assert tokenizer.special_tokens["eos_token"] == "<|endoftext|>"
    assert tokenizer.decode([end]) == ""
    write(tmp_path, tokenizer_config__json={"add_bos_token": True})
    assert Tokenizer.from_folder(tmp_path).encode("a") == [end, vocab["a"]]


def test_truncation_and_padding_of_tokenizer_json_are_off(tmp_path: Path) -> None:
    saved = json.loads(tokenizer_json())
    saved["truncation"] = {
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    saved["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    tokenizer = Tokenizer.from_folder(write(tmp_path, tokenizer__json=saved))
    assert len(tokenizer.encode("1234")) == 4


def test_eos_is_the_union_of_every_file(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        tokenizer__json=tokenizer_json(),
        tokenizer_config__json={"eos_token": {"content": "<|im_end|>"}},
        special_tokens_map__json={"pad_token": "<|endoftext|>", "eos_token": "<|im_start|>"},
        config__json={"eos_token_id": 7, "bos_token_id": 5},
        generation_config__json={"eos_token_id": [8, 9]},
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_token_ids == {7, 8, 9, tokenizer._backend.token_to_id("<|im_end|>")}
    assert tokenizer.bos_token_id == 5
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def test_tokens_that_only_tokenizer_config_knows_are_added(tmp_path: Path) -> None:
    saved = tokenizer_json()
    size = len(CASES["smollm"]["metadata"][KEY + "tokens"])
    added = {
        str(size): {"content": "<new>", "special": False},
        str(size + 1): {"content": "<e>", "special": True},
    }
    folder = write(
        tmp_path,
        tokenizer__json=saved,
        tokenizer_config__json={"added_tokens_decoder": added, "eos_token": "<e>"},
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("<new><e>") == [size, size + 1] and tokenizer.eos_token_ids == {size + 1}
    assert tokenizer.decode([size, size + 1]) == "<new>"


@pytest.mark.parametrize(
    ("decoder", "sentence"),
    [
        ({"5": {"content": "<new>"}}, "'<new>' has the id 5, which another token has"),
        ({"5000": {"content": "<|im_end|>"}}, "'<|im_end|>' is to have the id 5000, but in the tokenizer it is"),
        ({"x": {"content": "<new>"}}, "'x' is no token id"),
        ({"5000": {}}, "'content' is missing"),
        ([1], "'added_tokens_decoder' must be an object, but it is [1]"),
    ],
)
def test_an_added_token_that_contradicts_the_tokenizer_names_the_file(
    tmp_path: Path, decoder: Any, sentence: str
) -> None:
    folder = write(tmp_path, tokenizer__json=tokenizer_json(), tokenizer_config__json={"added_tokens_decoder": decoder})
    with pytest.raises(CheckpointError, match=re.escape(sentence)) as error:
        Tokenizer.from_folder(folder)
    assert "tokenizer_config.json" in str(error.value)


def test_added_tokens_keep_their_ids_behind_a_hole(tmp_path: Path) -> None:
    saved = json.loads(tokenizer_json())
    size = len(CASES["smollm"]["metadata"][KEY + "tokens"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    saved["added_tokens"].append({"id": size + 3, "content": "<far>", **flags})
    added = {str(size + 7): {"content": "<farther>", "special": True}}
    folder = write(tmp_path, tokenizer__json=saved, tokenizer_config__json={"added_tokens_decoder": added})
    tokenizer = Tokenizer.from_folder(folder)
    ids = [size + 3, size + 7, size + 3]
    assert tokenizer.encode("<far><farther><far>", False) == ids
    assert (
        tokenizer.decode(ids, skip_special_tokens=False) == "<far><farther><far>"
        and tokenizer.decode(ids) == 2 * "<far>"
    )
    assert tokenizer.decode([size + 1, size + 4, 1 << 40, -1]) == ""
    stream = tokenizer.detokenizer()
    assert [stream.push(token) for token in (size + 1, size + 3)] == ["", "<far>"]
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.from_folder(tmp_path / "saved").encode("<far><farther>a") == tokenizer.encode("<far><farther>a")


def test_a_hole_inside_of_the_vocabulary_hides_no_token(tmp_path: Path) -> None:
    letters = {chr(ord("a") + i): 3 * i for i in range(20)}
    tokenizer = Tokenizer.from_folder(
        write(tmp_path, vocab__json=letters | {"ab": 99}, merges__txt="#version: 0.2\na b\n")
    )
    assert tokenizer.encode("abt") == [99, 57] and tokenizer.decode([99, 57, 58]) == "abt"


def test_added_tokens_json_is_read_beside_a_vocabulary_with_merges(tmp_path: Path) -> None:
    pieces = {chr(ord("a") + i): i for i in range(26)}
    folder = write(
        tmp_path,
        vocab__json=pieces | {"ab": 26},
        merges__txt="#version: 0.2\na b\n",
        added_tokens__json={"<|user|>": 27, "<|end|>": 30, "<call>": 28},
        tokenizer_config__json={"eos_token": "<|end|>", "additional_special_tokens": ["<|user|>"]},
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("<|user|>ab<call>c<|end|>") == [27, 26, 28, 2, 30]
    assert tokenizer.decode([27, 26, 28, 2, 30]) == "ab<call>c" and tokenizer.eos_token_ids == {30}
    write(folder, added_tokens__json={"<|user|>": 3})
    with pytest.raises(CheckpointError, match=r"added_tokens\.json: .*has the id 3, which another token has"):
        Tokenizer.from_folder(folder)
    write(folder, added_tokens__json={"<|user|>": "27"})
    with pytest.raises(CheckpointError, match=r"added_tokens\.json: '<\|user\|>' must be an integer, but it is '27'"):
        Tokenizer.from_folder(folder)


def test_a_token_that_tokenizer_json_calls_text_is_text(tmp_path: Path) -> None:
    """As with transformers, also where a list of special tokens names it: a tag of tool calls, say."""
    saved = json.loads(tokenizer_json())
    size = len(CASES["smollm"]["metadata"][KEY + "tokens"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    saved["added_tokens"].append({"id": size, "content": "<tool_call>", **flags})
    config = {"additional_special_tokens": ["<tool_call>"]}
    tokenizer = Tokenizer.from_folder(write(tmp_path, tokenizer__json=saved, tokenizer_config__json=config))
    assert tokenizer.decode([size]) == "<tool_call>"


def test_a_chat_template_that_is_no_text_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path, tokenizer__json=tokenizer_json())
    for declared in (5, {"a": 1}, [1], [{"name": "default"}]):
        write(folder, tokenizer_config__json={"chat_template": declared})
        assert Tokenizer.from_folder(folder).chat_templates == {}
        assert "which is no text" in caplog.text
        caplog.clear()
    (folder / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf{{ messages }}\xff")
    assert Tokenizer.from_folder(folder).chat_template == "{{ messages }}\ufffd"


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}])
@pytest.mark.parametrize("saved_with_bos", [False, True])
def test_a_folder_encodes_as_transformers_does(
    tmp_path: Path, flags: dict[str, bool], saved_with_bos: bool, oracle: Oracle
) -> None:
    transformers = oracle("transformers")
    folder = write(
        tmp_path,
        tokenizer__json=tokenizer_json(add_bos_token=saved_with_bos),
        tokenizer_config__json={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": None} | flags,
    )
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = Tokenizer.from_folder(folder)
    for text in CASES["smollm"]["texts"]:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        for skip in (False, True):
            decoded = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == decoded


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ["no tokenizer.json", "vocab.json with merges.txt", "repository"]),
        ({"vocab__json": {"a": 0}}, ["no tokenizer.json"]),
        ({"tokenizer__model": "x"}, ["tokenizer.model", "tokenizer.json", "save_pretrained"]),
        ({"tokenizer__json": "{"}, ["tokenizer.json", "not a tokenizer"]),
        ({"tokenizer__json": "{}", "tokenizer_config__json": "[]"}, ["tokenizer_config.json", "list"]),
        ({"tokenizer__json": "{}", "special_tokens_map__json": "{"}, ["special_tokens_map.json", "is not JSON"]),
        ({"vocab__json": {"a": 0}, "merges__txt": "x y"}, ["merges.txt"]),
    ],
)
def test_a_folder_without_a_tokenizer_names_the_file(tmp_path: Path, files: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(CheckpointError) as error:
        Tokenizer.from_folder(write(tmp_path, **files))
    assert all(word in str(error.value) for word in [str(tmp_path), *words]), error.value


def test_chat_templates_come_from_every_place_and_the_jinja_file_wins(tmp_path: Path) -> None:
    folder = write(tmp_path, tokenizer__json=tokenizer_json())
    write(folder, tokenizer_config__json={"chat_template": "config"})
    assert Tokenizer.from_folder(folder).chat_template == "config"
    named = [{"name": "default", "template": "list"}, {"name": "tool_use", "template": "tools"}]
    write(folder, tokenizer_config__json={"chat_template": named})
    assert Tokenizer.from_folder(folder).chat_templates == {"default": "list", "tool_use": "tools"}
    write(folder, chat_template__json={"chat_template": "json"})
    assert Tokenizer.from_folder(folder).chat_template == "json"
    (folder / "additional_chat_templates").mkdir()
    write(folder / "additional_chat_templates", rag__jinja="rag")
    write(folder, chat_template__jinja="jinja")
    templates = {"default": "jinja", "tool_use": "tools", "rag": "rag"}
    assert Tokenizer.from_folder(folder).chat_templates == templates


@pytest.mark.parametrize("name", ["smollm", "sentencepiece"])
@pytest.mark.parametrize("kind", [TokenType.NORMAL, TokenType.CONTROL, TokenType.UNUSED])
def test_empty_pieces_of_a_gguf_are_holes(name: str, kind: TokenType) -> None:
    metadata = metadata_of(name)
    size = len(metadata[KEY + "tokens"])
    metadata[KEY + "tokens"] += ["", "", "<far>"]
    metadata[KEY + "token_type"] += [kind, kind, TokenType.USER_DEFINED]
    metadata.setdefault(KEY + "scores", []).extend([0.0] * 3)
    tokenizer, whole = Tokenizer.from_gguf(metadata, "f"), Tokenizer.from_gguf(metadata_of(name), "f")
    assert tokenizer.encode("<far>", False) == [size + 2] and tokenizer.decode([size, size + 2, size + 1]) == "<far>"
    for text in CASES[name]["texts"]:
        assert tokenizer.encode(text) == whole.encode(text)


def test_chat_templates_of_a_gguf() -> None:
    metadata = chatty() | {"tokenizer.chat_template": "a", "tokenizer.chat_template.rag": "b"}
    tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.chat_templates": ["rag"]}, "f")
    assert tokenizer.chat_template == "a" and tokenizer.chat_templates == {"default": "a", "rag": "b"}


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        ("{{ '<|im_start|>' + m.role }}{{ m.content + '<|im_end|>' }}", {"<|im_end|>"}),
        ("<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}<|eot_id|>", {"<|eot_id|>"}),
        ("<|start_of_role|>user<|end_of_role|>{{ m.content }}<|end_of_text|>", {"<|end_of_text|>"}),
        ("<start_of_turn>{{ m.role }}{{ m.content }}<end_of_turn>", {"<end_of_turn>"}),
        ("[INST] {{ m.content }} [/INST] {{ m.content }}{{ eos_token }}", set()),
        ("<|user|>{{ m.content }}</s>", {"</s>"}),
        ("<｜User｜>{{ m.content }}<｜end▁of▁sentence｜>", {"<｜end▁of▁sentence｜>"}),
        ("<|user|>{{ m.content }}<|end|><|assistant|><think></think>", {"<|end|>"}),
        ("{{ m.content.split('</think>') }}<tool_call></tool_call>", set()),
        (None, set()),
    ],
)
def test_end_tokens_are_eos_and_what_the_template_ends_turns_with(template: str | None, ends: set[str]) -> None:
    added = [
        "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
        "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<start_of_turn>", "<end_of_turn>",
        "[INST]", "[/INST]", "</s>", "<|user|>", "<|assistant|>", "<|end|>", "<think>", "</think>",
        "<tool_call>", "</tool_call>", "<｜User｜>", "<｜end▁of▁sentence｜>",
    ]  # fmt: skip
    base = CASES["gpt-2"]["metadata"]
    eos = base[KEY + "tokens"].index("<|endoftext|>")
    metadata = metadata_of(
        "gpt-2",
        tokens=base[KEY + "tokens"] + added,
        token_type=base[KEY + "token_type"] + [TokenType.CONTROL] * len(added),
        eos_token_id=eos,
    )
    tokenizer = Tokenizer.from_gguf(metadata | ({"tokenizer.chat_template": template} if template else {}), "f")
    expected = {eos, *(len(base[KEY + "tokens"]) + added.index(end) for end in ends)}
    assert tokenizer.end_tokens() == expected
    assert tokenizer.eos_token_ids == {eos}


def test_eot_and_eom_of_a_gguf_are_ends_too() -> None:
    tokenizer = Tokenizer.from_gguf(chatty(eot_token_id=3, eom_token_id=4), "f")
    assert tokenizer.eos_token_ids == {3, 4, chatty()[KEY + "eos_token_id"]}


def test_importing_the_tokenizer_imports_no_library() -> None:
    code = (
        "import sys, tinyserve.text.tokenizer, tinyserve.text.chat_template; "
        "assert not {'tokenizers', 'jinja2', 'numpy', 'gguf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_default_model_round_trips_what_people_type(smollm2: Path) -> None:
    """The whole vocabulary from the real file's metadata, on random text; scripts/fuzz_tokenizer.py asks llama.cpp."""
    file = open_gguf(smollm2)
    tokenizer = Tokenizer.from_gguf(file.metadata, str(smollm2))
    assert tokenizer.vocab_size == 49152
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices([*FRAGMENTS, "don't", "<|im_end|>", "\t", "...", "ß", "_"], k=rng.randrange(1, 12)))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_text_that_no_context_holds_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_folder(write(tmp_path, tokenizer__json=tokenizer_json()))
    longest = max(map(len, CASES["smollm"]["metadata"][KEY + "tokens"]))
    text = "the cat 12345 " * 100_000
    assert len(tokenizer.encode_prompt(text, most_tokens=len(text))) == len(tokenizer.encode(text))
    monkeypatch.setattr(tokenizer, "encode", lambda *_: pytest.fail("it was read"))
    most = len(text) // (4 * longest) - 1
    with pytest.raises(ContextLengthError, match=f"{len(text)} characters.* {most} tokens"):
        tokenizer.encode_prompt(text, most_tokens=most)


def test_long_texts_are_cut_as_short_ones_are(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write(tmp_path, tokenizer__json=tokenizer_json(add_bos_token=True)))
    for text in ("the cat\n" * 3000, "é🙂 " * 9000, "x" * 20_000):
        for add in (False, True):
            whole = tokenizer._backend.encode(text, add_special_tokens=add).ids
            assert tokenizer.encode(text, add_special_tokens=add) == whole
