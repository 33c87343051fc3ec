"""A tokenizer rebuilt from GGUF metadata: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

Knows the keys under `tokenizer.`, and nothing of how the file is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from tinyserve.checkpoints.fields import Fields
from tinyserve.errors import CheckpointError
from tinyserve.text.tokenizer.library import library_errors
from tinyserve.text.tokenizer.pretokenizers import PRE_TOKENIZERS
from tinyserve.text.tokenizer.processors import add_bos_and_eos

if TYPE_CHECKING:
    import tokenizers

_KEY = "tokenizer.ggml."
_MAX_CUTS = 1 << 31  # of tokens in two, and the characters of each: seconds, and a hundred times a real vocabulary's


class TokenType(IntEnum):
    """gguf.TokenType, spelled here because importing gguf takes longer than building a tokenizer."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def load_gguf(metadata: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Build the arguments of `Tokenizer` from a file's metadata; `source` names the file in errors."""
    fields = Fields(metadata, source, CheckpointError)
    builders = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}
    _require(fields, "model")
    model = fields.choice(_KEY + "model", tuple(builders))
    pieces = _texts(fields, "tokens")
    types = fields.listed(_KEY + "token_type", int, "whole numbers") or [TokenType.NORMAL] * len(pieces)
    vocab = {piece: i for i, piece in enumerate(pieces) if piece}  # an empty piece is a hole
    if repeated := len(pieces) - pieces.count("") - len(vocab):
        fields.refuse(f"{_KEY}tokens has {repeated} tokens more than once.")
    if len(types) != len(pieces):
        fields.refuse(f"{_KEY}token_type has {len(types)} entries for {len(pieces)} {_KEY}tokens.")
    # SentencePiece vocabularies have ids that files may leave unsaid; byte-level ones have none.
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if model == "llama" else {}
    ids = {name: _token_id(fields, name, len(pieces), defaults.get(name)) for name in _NAMED}
    named = {name: pieces[i] for name, i in ids.items() if i is not None and pieces[i]}
    with library_errors(f"{source}: the tokenizer in {_KEY}* cannot be built"):
        backend, add_bos = builders[model](fields, pieces, vocab, types, ids)
        _add_tokens(backend, pieces, types)
        add_bos_and_eos(
            backend,
            named.get("bos") if _flag(fields, "add_bos_token", add_bos) else None,
            named.get("eos") if _flag(fields, "add_eos_token") else None,
        )
    return {
        "backend": backend,
        "source": source,
        "special_tokens": {_NAMED[name]: piece for name, piece in named.items() if _NAMED[name]},
        "bos_token_id": ids["bos"],
        "eos_token_ids": frozenset(i for name in ("eos", "eot", "eom") if (i := ids[name]) is not None),
        "chat_templates": _chat_templates(fields),
    }


# The key's name for a special token, and the name that chat templates use for it, if they do.
_NAMED = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
    "eot": "",
    "eom": "",
}


def _require(fields: Fields, name: str) -> None:
    if not fields.raw.get(_KEY + name):
        fields.refuse(
            f"the key {_KEY}{name} is missing, so the file carries no tokenizer; "
            "convert the model again with its tokenizer, or use a folder with a tokenizer.json."
        )


def _texts(fields: Fields, name: str) -> list[str]:
    _require(fields, name)
    return fields.listed(_KEY + name, str, "texts")


def _flag(fields: Fields, name: str, default: bool = False) -> bool:
    return fields.boolean(_KEY + name, default=default)


def _token_id(fields: Fields, name: str, vocab_size: int, default: int | None) -> int | None:
    key = f"{_KEY}{name}_token_id"
    token_id = fields.token_id(key, default=default)
    if token_id is not None and token_id >= vocab_size:
        fields.refuse(f"{key} is {token_id}, but the vocabulary has {vocab_size} tokens.")
    return token_id


def _byte_level_bpe(
    fields: Fields,
    pieces: Sequence[str],
    vocab: dict[str, int],
    types: Sequence[int],
    ids: Mapping[str, int | None],
) -> tuple[tokenizers.Tokenizer, bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = PRE_TOKENIZERS[fields.choice(_KEY + "pre", tuple(PRE_TOKENIZERS), default="default")]
    merges = [(first, second) for first, _, second in (merge.partition(" ") for merge in _texts(fields, "merges"))]
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    cut, cut_spelled = (
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        for patterns in (pre.patterns, pre.spelled_patterns)
    )
    # ByteLevel would put a space before every piece, so it is put before the text is cut.
    prefix = [pre_tokenizers.Metaspace(" ", "first", split=False)] if _flag(fields, "add_space_prefix") else []
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*prefix, *cut, spell, *cut_spelled])
    backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _sentencepiece_bpe(
    fields: Fields,
    pieces: Sequence[str],
    vocab: dict[str, int],
    types: Sequence[int],
    ids: Mapping[str, int | None],
) -> tuple[tokenizers.Tokenizer, bool]:
    from tokenizers import Tokenizer, decoders, models, normalizers

    _require(fields, "scores")
    scores = fields.listed(_KEY + "scores", float, "numbers")
    if sum(len(piece) ** 2 for piece in pieces) > _MAX_CUTS:
        fields.refuse(f"{_KEY}tokens has tokens of up to {max(map(len, pieces))} characters, which no vocabulary has.")
    kinds = zip(pieces, scores, types, strict=True)
    merges = _merges_from_scores({piece: score for piece, score, kind in kinds if piece and kind == TokenType.NORMAL})
    unk = pieces[ids["unknown"]] or None if ids["unknown"] is not None else None
    backend = Tokenizer(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    prefix = _flag(fields, "add_space_prefix", True)
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace] if prefix else [replace])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend, True


def _merges_from_scores(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores best: each way to cut a piece in two is a merge.

    Ordered as transformers' SpmConverter orders them (convert_slow_tokenizer.generate_merges).
    """
    merges = [
        (score, i, len(piece) - i, piece)
        for piece, score in scores.items()
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [(piece[:i], piece[i:]) for _, i, _, piece in merges]


def _add_tokens(backend: tokenizers.Tokenizer, pieces: Sequence[str], types: Iterable[int]) -> None:
    """Control tokens are special, user-defined ones are text that is never cut."""
    from tokenizers import AddedToken

    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    added = [
        AddedToken(piece, normalized=False, special=kind in special)
        for piece, kind in zip(pieces, types, strict=True)
        if piece and (kind in special or kind == TokenType.USER_DEFINED)
    ]
    backend.add_tokens(added)


def _chat_templates(fields: Fields) -> dict[str, str]:
    key = "tokenizer.chat_template"
    named = {k.removeprefix(key + "."): fields.text(k) for k in fields.raw if k.startswith(key + ".")}
    default = fields.text(key, default=None)
    return ({"default": default} if default else {}) | named
