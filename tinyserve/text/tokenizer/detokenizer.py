"""Incremental detokenization: token ids to text, one token at a time, without ever splitting a character.

Knows the two alphabets in which vocabularies are written, and nothing of where a vocabulary comes from.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from tinyserve.text.tokenizer.library import library_errors

if TYPE_CHECKING:
    import tokenizers

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer(Protocol):
    """Turns a stream of token ids into a stream of whole characters; one per sequence."""

    def push(self, token_id: int) -> str:
        """Take the next token and return the characters it completes, possibly none."""

    def finish(self) -> str:
        """Return what was still held back; bytes that never became a character are U+FFFD."""


class Alphabet:
    """How a vocabulary spells bytes, its pieces and its added tokens, and whether the first word loses its space."""

    def __init__(
        self, piece_bytes: Callable[[str], bytes], added_bytes: Callable[[str], bytes], strips_leading_space: bool
    ) -> None:
        self.piece_bytes = piece_bytes
        self.added_bytes = added_bytes
        self.strips_leading_space = strips_leading_space


def alphabet_of(decoder: Mapping[str, Any] | None) -> Alphabet | None:
    """Recognise the decoder of a tokenizer.json, or return None if it is neither byte-level nor SPM."""
    match decoder:
        case {"type": "ByteLevel"} | {"type": "Sequence", "decoders": [{"type": "ByteLevel"}]}:
            return Alphabet(byte_level_piece, str.encode, strips_leading_space=False)
        case {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        } if strip in ([], [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]):
            return Alphabet(spm_piece, spm_added, strips_leading_space=bool(strip))
    return None


@cache
def byte_of_character() -> Mapping[str, int]:
    """Invert GPT-2's table: printable bytes stand for themselves, the others for U+0100 and up, in order."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def byte_level_piece(piece: str) -> bytes:
    """Spell a byte-level piece; one with a character outside the alphabet is literal."""
    table = byte_of_character()
    try:
        return bytes([table[character] for character in piece])
    except KeyError:
        return piece.encode()


def spm_piece(piece: str) -> bytes:
    """Spell a SentencePiece piece: ▁ is a space, <0xAB> is one byte."""
    byte = BYTE_TOKEN.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


def spm_added(content: str) -> bytes:
    """Spell an added token: as it is written, unless it is a byte or a run of spaces, which Gemma's are."""
    is_piece = BYTE_TOKEN.fullmatch(content) or not content.strip("▁")
    return spm_piece(content) if is_piece else content.encode()


class ByteDetokenizer:
    """Holds bytes back until they are valid UTF-8."""

    def __init__(self, token_bytes: Callable[[int], bytes], strips_leading_space: bool) -> None:
        self._token_bytes = token_bytes
        self._strips_leading_space = strips_leading_space
        # "replace" loses nothing and never raises: a byte that can begin no character becomes U+FFFD.
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Take the next token and return the characters it completes, possibly none."""
        data = self._token_bytes(token_id)
        if data and self._strips_leading_space:
            self._strips_leading_space = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def finish(self) -> str:
        """Return what was still held back; bytes that never became a character are U+FFFD."""
        return self._utf8.decode(b"", final=True)


class StreamDetokenizer:
    """Any other decoder: the `tokenizers` library decides when text is safe to show."""

    def __init__(self, backend: tokenizers.Tokenizer, skipped: frozenset[int]) -> None:
        """`skipped` tokens add nothing to the text."""
        from tokenizers.decoders import DecodeStream

        self._backend = backend
        self._skipped = skipped
        self._stream = DecodeStream(skip_special_tokens=False)
        self._ids: list[int] = []
        self._shown = ""

    def push(self, token_id: int) -> str:
        """Take the next token and return the characters it completes, possibly none."""
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        with library_errors("The tokenizer's decoder fails"):
            text: str = self._stream.step(self._backend, token_id) or ""
        self._shown += text
        return text

    def finish(self) -> str:
        """Return what was still held back."""
        with library_errors("The tokenizer's decoder fails"):
            text = self._backend.decode(self._ids, skip_special_tokens=False)
        return text.removeprefix(self._shown) if text.startswith(self._shown) else ""
