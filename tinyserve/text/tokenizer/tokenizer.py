"""The tokenizer of one checkpoint: ids, text, special tokens, and the ids that end a turn.

Knows nothing about how its files were read; `folder` and `gguf` do.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyserve.errors import ContextLengthError, RequestError
from tinyserve.text.tokenizer.detokenizer import ByteDetokenizer, Detokenizer, StreamDetokenizer, alphabet_of
from tinyserve.text.tokenizer.library import library_errors

if TYPE_CHECKING:
    import tokenizers

logger = logging.getLogger("tinyserve")

# The names of tokens that end a turn or a text, without their brackets. Names are compared whole:
# <|end_of_role|>, <|end_header_id|>, </think> and <|im_start|> belong inside a turn, and are not here.
# fmt: off
END_OF_TURN_NAMES = frozenset({
    "/s", "end", "endoftext", "end_of_message", "end_of_sentence", "end_of_text", "end_of_turn",
    "end_of_turn_token", "end_of_utterance", "eom_id", "eos", "eot", "eot_id", "im_end",
})
# fmt: on


_LONG = 1 << 14  # characters, for which a tokenizer takes some milliseconds
_SHORTENED = 4  # characters that normalizers make one of, at most: letters with their accents


class Tokenizer:
    """Encodes text to token ids and decodes token ids to text, whole or as a stream."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        source: str,
        special_tokens: Mapping[str, str],
        bos_token_id: int | None,
        eos_token_ids: frozenset[int],
        chat_templates: Mapping[str, Any],
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.source = source
        self.special_tokens = dict(special_tokens)
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        # One that is no text is left out: nobody may ask for it.
        self.chat_templates = {name: text for name, text in chat_templates.items() if isinstance(text, str)}
        for name in chat_templates.keys() - self.chat_templates.keys():
            logger.warning(
                "%s: chat template %r is %.60r, which is no text: left out", source, name, chat_templates[name]
            )
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self._added = {i: str(token.content) for i, token in backend.get_added_tokens_decoder().items()}
        self.specials = {str(t.content): i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        self.special_ids = frozenset(self.specials.values())
        decoder = backend.decoder
        self._alphabet = alphabet_of(json.loads(decoder.__getstate__()) if decoder is not None else None)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json, or vocab.json with merges.txt; CheckpointError names what is missing."""
        from tinyserve.text.tokenizer.folder import load_folder

        return cls(**load_folder(Path(folder)))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str) -> Tokenizer:
        """Rebuild the tokenizer from a GGUF file's metadata; CheckpointError names the key at fault."""
        from tinyserve.text.tokenizer.gguf import load_gguf

        return cls(**load_gguf(metadata, source))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, from which `from_folder` makes the same tokenizer again."""
        self._backend.save(str(folder / "tokenizer.json"))
        templates = [{"name": name, "template": template} for name, template in self.chat_templates.items()]
        config = {**self.special_tokens, "chat_template": self.chat_template if len(templates) < 2 else templates}
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's default chat template, if it has one; `chat_templates` has them all by name."""
        if len(self.chat_templates) == 1:
            return next(iter(self.chat_templates.values()))
        return self.chat_templates.get("default")

    @property
    def spells_bytes(self) -> bool:
        """Whether a text's bytes are its tokens' bytes, one after the other: `token_bytes` means something then."""
        return self._alphabet is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Encode text; special tokens in it are recognised, BOS and EOS added as the checkpoint says."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = f"U+{ord(text[error.start]):04X}"
            raise RequestError(
                f"The prompt is no valid Unicode: character {error.start} is the lone surrogate {code}.",
                param="prompt",
            ) from None
        with library_errors(f"The tokenizer of {self.source} fails on a text"):
            if len(text) > _LONG:  # as a batch of one: meanwhile other threads have the interpreter
                (encoding,) = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
            else:
                encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def encode_prompt(self, text: str, add_special_tokens: bool = True, most_tokens: int | None = None) -> list[int]:
        """Encode what a model is to continue: the same, but a text that begins with BOS gets no second one.

        Raises ContextLengthError, without reading it, for a text that is longer than `most_tokens` can be.
        """
        if most_tokens is not None and len(text) > max(_LONG, most_tokens * self._longest_token):
            raise ContextLengthError(
                f"The prompt has {len(text)} characters, and the context (max_model_len) holds {most_tokens} tokens, "
                "which are less: shorten the prompt.",
                param="prompt",
            )
        if not add_special_tokens:
            return self.encode(text, add_special_tokens=False)
        ids = self.encode(text)
        return ids[1:] if self._added_first is not None and ids[:2] == 2 * [self._added_first] else ids

    @cached_property
    def _longest_token(self) -> int:
        """Characters that a token stands for at most: a normalizer may have made one of several."""
        longest = max((len(piece) for piece in self._backend.get_vocab(with_added_tokens=True)), default=1)
        return _SHORTENED * longest

    @cached_property
    def _added_first(self) -> int | None:
        """The token, BOS, that the tokenizer puts before a text."""
        plain, whole = (self._backend.encode("a", add_special_tokens=added).ids[:1] for added in (False, True))
        return whole[0] if plain != whole else None

    def encode_chat(self, rendered: str) -> list[int]:
        """Encode a rendered chat template: it writes its own BOS, none is added, so there are never two."""
        return self.encode(rendered, add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True, *, continuation: bool = False) -> str:
        """Decode ids; a `continuation` of other text keeps the space an SPM decoder drops at the start."""
        alphabet = self._alphabet
        if alphabet is None:
            return self._decode(ids, skip_special_tokens)
        data = b"".join([self.token_bytes(i, skip_special_tokens) for i in ids])
        if alphabet.strips_leading_space and not continuation:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def text_of(self, token_id: int) -> str:
        """The text of one token by itself, special ones by their names; part of a character is U+FFFD."""
        return self.decode([token_id], skip_special_tokens=False, continuation=True)

    def detokenizer(
        self, skip_special_tokens: bool = True, *, continuation: bool = False, shown: frozenset[int] = frozenset()
    ) -> Detokenizer:
        """A fresh stream whose pieces join to `decode` of the same ids with the same options.

        `shown` are special tokens that are not skipped.
        """
        alphabet = self._alphabet
        skipped = self.special_ids - shown if skip_special_tokens else frozenset()
        if alphabet is None:
            return StreamDetokenizer(self._backend, skipped)
        return ByteDetokenizer(
            lambda token_id: b"" if token_id in skipped else self.token_bytes(token_id, skip_special_tokens=False),
            alphabet.strips_leading_space and not continuation,
        )

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        """The bytes a token adds to the text: none for an unknown id or a skipped special token."""
        if skip_special_tokens and token_id in self.special_ids:
            return b""
        data = self._bytes.get(token_id)
        if data is None:
            data = self._bytes[token_id] = self._spell(token_id)
        return data

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        with library_errors(f"The decoder of {self.source} fails"):
            return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def _spell(self, token_id: int) -> bytes:
        if not 0 <= token_id < 1 << 32:  # where it has holes, a vocabulary has larger ids than tokens
            return b""
        piece: str | None = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self._alphabet is None:
            return self._decode([token_id], skip_special_tokens=False).encode()
        # The letters of an added token are letters, also where the alphabet has bytes of that name.
        return self._alphabet.added_bytes(piece) if token_id in self._added else self._alphabet.piece_bytes(piece)

    def end_tokens(self) -> frozenset[int]:
        """The ids that end a turn: every EOS of the checkpoint, and the end tokens of its chat template.

        A template's end token is an added token that (1) the template writes literally and (2) has one of
        END_OF_TURN_NAMES once its brackets are off. Both, because a vocabulary may hold end tokens of formats
        that its template does not speak, and a template writes tokens that begin turns or mark roles.
        """
        template = self.chat_template or ""
        return self.eos_token_ids | {
            i for i, content in self._added.items() if content in template and _bare_name(content) in END_OF_TURN_NAMES
        }


def _bare_name(content: str) -> str:
    """<|im_end|> -> im_end, <｜end▁of▁sentence｜> -> end_of_sentence, </s> -> /s."""
    return re.sub(r"[<>\[\]|｜]", "", content).replace("▁", "_").strip("_").lower()
