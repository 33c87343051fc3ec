"""Streams of token ids become streams of whole characters, and lose nothing."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyserve.text.tokenizer import Tokenizer
from tinyserve.text.tokenizer.detokenizer import StreamDetokenizer, alphabet_of, byte_of_character, spm_added

pytestmark = pytest.mark.fast

CASES = json.loads((Path(__file__).parents[1] / "golden" / "tokenizer.json").read_text(encoding="utf-8"))["cases"]
ADDED = {"<note: no space>": 4, "🦊": 4, "<|eot|>": 3}


def build(name: str, added: Mapping[str, int] = ADDED) -> Tokenizer:
    """A golden vocabulary with a few more tokens: text that is never cut (4), and special ones (3)."""
    metadata: dict[str, Any] = copy.deepcopy(CASES[name]["metadata"])
    metadata["tokenizer.ggml.tokens"] += added
    metadata["tokenizer.ggml.token_type"] += added.values()
    metadata.setdefault("tokenizer.ggml.scores", []).extend([0.0] * len(added))
    return Tokenizer.from_gguf(metadata, name)


TOKENIZERS = {name: build(name) for name in ("gpt-2", "sentencepiece")}
ZWJ_FAMILY = "👨‍👩‍👧‍👦"
AWKWARD = [
    ZWJ_FAMILY, "👍🏽", "🇫🇷", "🦊", "日本語", "한국어", "中", "e\u0301", "ạ̈", "नमस्ते", "مرحبا", "שלום",
    "\u202eabc\u202c", "\u200d", "\u00a0", "\ufeff", "\ufffd", "\x00", "\x1b", "\x7f", "\r\n", " ", "  ", "a",
    "<note: no space>", "<0x41>", "\U0010ffff", "𝔘", "Hello", "1234",
]  # fmt: skip
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.sampled_from(AWKWARD)).map("".join),
)
either = pytest.mark.parametrize("name", TOKENIZERS)


def stream(tokenizer: Tokenizer, ids: Sequence[int], **options: bool) -> list[str]:
    detokenizer = tokenizer.detokenizer(**options)
    return [*map(detokenizer.push, ids), detokenizer.finish()]


@either
@settings(deadline=None)
@given(text=texts)
def test_text_survives_the_round_trip_and_the_stream(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    if name == "sentencepiece":
        text = text.replace("▁", "_")  # spells a space
        for added in ADDED:
            text = text.replace(added, "")  # SPM puts a space before whatever follows an added token
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert pieces[-1] == "", "whole text leaves nothing to finish with"
    assert text == tokenizer._backend.decode(ids, skip_special_tokens=True)


@either
@settings(deadline=None)
@given(data=st.data())
def test_any_ids_stream_to_what_they_decode_to(name: str, data: st.DataObject) -> None:
    """Ids that no text encodes to, unknown ids and lone bytes included."""
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=40))
    options = {"skip_special_tokens": data.draw(st.booleans()), "continuation": data.draw(st.booleans())}
    pieces = stream(tokenizer, ids, **options)
    whole = tokenizer.decode(ids, **options)
    assert "".join(pieces) == whole
    whole.encode()  # a lone surrogate would raise


@settings(deadline=None)
@given(text=texts, cut=st.data())
def test_bytes_cut_anywhere_give_replacement_characters_only_where_decoding_does(text: str, cut: st.DataObject) -> None:
    """Every byte is a token of its own; some are lost, as a model may lose them."""
    tokenizer = TOKENIZERS["sentencepiece"]
    first = tokenizer.encode("\x00", add_special_tokens=False)[-1]
    assert tokenizer.token_bytes(first) == b"\x00"
    data = bytearray(text.encode())
    for _ in range(cut.draw(st.integers(0, 3))):
        if data:
            del data[cut.draw(st.integers(0, len(data) - 1))]
    pieces = stream(tokenizer, [first + byte for byte in data], continuation=True)
    assert "".join(pieces) == data.decode("utf-8", errors="replace")


def test_a_character_appears_with_its_last_byte() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    zero = tokenizer.encode("\x00", add_special_tokens=False)[-1]
    pieces = stream(tokenizer, [zero + byte for byte in "👍é".encode()])
    assert pieces == ["", "", "", "👍", "", "é", ""]


def test_an_unfinished_character_is_shown_as_lost_at_the_end() -> None:
    tokenizer = TOKENIZERS["gpt-2"]
    spelling = {byte: character for character, byte in byte_of_character().items()}
    ids = [tokenizer._backend.token_to_id(spelling[byte]) for byte in "👍".encode()[:3]]
    assert stream(tokenizer, ids) == ["", "", "", "\ufffd"]
    hi = tokenizer.encode("Hi", add_special_tokens=False)
    assert stream(tokenizer, [*ids, *hi])[3].startswith("\ufffdH")


def test_an_emoji_family_is_joined_from_whole_characters() -> None:
    tokenizer = TOKENIZERS["gpt-2"]
    ids = tokenizer.encode(ZWJ_FAMILY, add_special_tokens=False)
    pieces = [piece for piece in stream(tokenizer, ids) if piece]
    assert pieces == list(ZWJ_FAMILY) and len(ids) > len(pieces)


def test_spm_drops_one_leading_space_and_only_at_the_beginning() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = tokenizer.encode("the  License", add_special_tokens=False)
    assert tokenizer.token_bytes(ids[0]).startswith(b" ")
    assert "".join(stream(tokenizer, ids)) == "the  License"
    assert "".join(stream(tokenizer, ids, continuation=True)) == " the  License"
    assert "".join(stream(tokenizer, [*ids, *ids])) == "the  License the  License"
    two_spaces = tokenizer.encode("  a", add_special_tokens=False)
    assert "".join(stream(tokenizer, two_spaces)) == "  a"


def test_a_skipped_bos_does_not_count_as_the_beginning() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = tokenizer.encode("the License")
    assert ids[0] == tokenizer.bos_token_id
    assert "".join(stream(tokenizer, ids)) == "the License"
    assert "".join(stream(tokenizer, ids, skip_special_tokens=False)) == "<s> the License"


@either
def test_special_tokens_are_skipped_and_other_added_tokens_are_literal(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    note, fox, eot = (tokenizer._backend.token_to_id(content) for content in ADDED)
    ids = [note, eot, fox]
    assert stream(tokenizer, ids) == ["<note: no space>", "", "🦊", ""]
    assert "".join(stream(tokenizer, ids, skip_special_tokens=False)) == "<note: no space><|eot|>🦊"
    assert tokenizer.token_bytes(eot) == b"" and tokenizer.token_bytes(eot, False) == b"<|eot|>"


def test_every_byte_has_one_spelling() -> None:
    table = byte_of_character()
    assert sorted(table.values()) == list(range(256))
    assert table["Ġ"] == ord(" ") and table["Ċ"] == ord("\n") and table["a"] == ord("a")


STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
SPM = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]


@pytest.mark.parametrize(
    ("decoder", "strips"),
    [
        ({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}, False),
        ({"type": "Sequence", "decoders": [*SPM, STRIP]}, True),
        ({"type": "Sequence", "decoders": SPM}, False),
    ],
)
def test_the_decoder_of_tokenizer_json_chooses_the_alphabet(decoder: dict[str, Any], strips: bool) -> None:
    alphabet = alphabet_of(decoder)
    assert alphabet is not None and alphabet.strips_leading_space is strips


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Sequence", "decoders": [*SPM, STRIP | {"start": 2}]},
    ],
)
def test_other_decoders_have_no_alphabet(decoder: dict[str, Any] | None) -> None:
    assert alphabet_of(decoder) is None


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 4)))
def test_another_decoder_streams_through_the_tokenizers_library(ids: list[int]) -> None:
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.WordLevel({"▁Hello": 0, "▁world": 1, "!": 2, "▁": 3, "<e>": 4}, unk_token="!"))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken("<e>", special=True)])
    tokenizer = Tokenizer(
        backend,
        source="words",
        special_tokens={},
        bos_token_id=None,
        eos_token_ids=frozenset(),
        chat_templates={},
    )
    assert isinstance(tokenizer.detokenizer(), StreamDetokenizer)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)
    assert tokenizer.token_bytes(4) == b"" and b"world" in tokenizer.token_bytes(1)


@either
@pytest.mark.parametrize("kind", [4, 3])
def test_an_added_token_is_its_own_letters_in_every_alphabet(name: str, kind: int) -> None:
    words = ["đem", "Größe", "Ġ!", "a▁b", "▁x"]
    tokenizer = build(name, dict.fromkeys(words, kind))
    for word in words:
        [token] = tokenizer.encode(word, add_special_tokens=False)
        assert tokenizer.decode([token, token], skip_special_tokens=False) == 2 * word
        assert "".join(stream(tokenizer, [token, token], skip_special_tokens=False)) == 2 * word


def test_runs_of_spaces_that_sentencepiece_adds_are_spaces() -> None:
    assert spm_added("▁▁▁") == b"   " and spm_added("<0x0A>") == b"\n" and spm_added("▁a") == "▁a".encode()
