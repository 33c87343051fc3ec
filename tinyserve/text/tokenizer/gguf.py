"""A tokenizer rebuilt from GGUF metadata: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

Knows the keys under `tokenizer.`, and nothing of how the file is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from tinyserve.errors import CheckpointError
from tinyserve.text.tokenizer.pretokenizers import PRE_TOKENIZERS
from tinyserve.text.tokenizer.processors import add_bos_and_eos

if TYPE_CHECKING:
    import tokenizers

_KEY = "tokenizer.ggml."


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
    model = _required(metadata, "model", source)
    builders = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}
    if model not in builders:
        raise CheckpointError(
            f"{source}: {_KEY}model is {model!r}, which is not supported; supported: {', '.join(builders)}."
        )
    pieces: list[str] = list(_required(metadata, "tokens", source))
    types = metadata.get(_KEY + "token_type") or [TokenType.NORMAL] * len(pieces)
    vocab = {piece: i for i, piece in enumerate(pieces) if piece}  # an empty piece is a hole
    if repeated := len(pieces) - pieces.count("") - len(vocab):
        raise CheckpointError(f"{source}: {_KEY}tokens has {repeated} tokens more than once.")
    if len(types) != len(pieces):
        raise CheckpointError(f"{source}: {_KEY}token_type has {len(types)} entries for {len(pieces)} {_KEY}tokens.")
    # SentencePiece vocabularies have ids that files may leave unsaid; byte-level ones have none.
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if model == "llama" else {}
    ids = {name: _token_id(metadata, name, len(pieces), source, defaults.get(name)) for name in _NAMED}
    try:
        backend, add_bos = builders[model](metadata, source, pieces, vocab, types, ids)
    except CheckpointError:
        raise
    except Exception as error:
        # The library raises bare exceptions, for example for a merge whose parts are not tokens.
        raise CheckpointError(f"{source}: the tokenizer in {_KEY}* cannot be built: {error}.") from None
    _add_tokens(backend, pieces, types)
    named = {name: pieces[i] for name, i in ids.items() if i is not None and pieces[i]}
    add_bos_and_eos(
        backend,
        named.get("bos") if _flag(metadata, "add_bos_token", add_bos) else None,
        named.get("eos") if _flag(metadata, "add_eos_token") else None,
    )
    return {
        "backend": backend,
        "source": source,
        "special_tokens": {_NAMED[name]: piece for name, piece in named.items() if _NAMED[name]},
        "bos_token_id": ids["bos"],
        "eos_token_ids": frozenset(i for name in ("eos", "eot", "eom") if (i := ids[name]) is not None),
        "chat_templates": _chat_templates(metadata),
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


def _required(metadata: Mapping[str, Any], name: str, source: str) -> Any:
    value = metadata.get(_KEY + name)
    if not value:
        raise CheckpointError(
            f"{source}: the key {_KEY}{name} is missing, so the file carries no tokenizer; "
            "convert the model again with its tokenizer, or use a folder with a tokenizer.json."
        )
    return value


def _flag(metadata: Mapping[str, Any], name: str, default: bool = False) -> bool:
    return bool(metadata.get(_KEY + name, default))


def _token_id(metadata: Mapping[str, Any], name: str, vocab_size: int, source: str, default: int | None) -> int | None:
    key = f"{_KEY}{name}_token_id"
    token_id = metadata.get(key, default)
    if token_id is not None and not 0 <= token_id < vocab_size:
        raise CheckpointError(f"{source}: {key} is {token_id}, but the vocabulary has {vocab_size} tokens.")
    return None if token_id is None else int(token_id)


def _byte_level_bpe(
    metadata: Mapping[str, Any],
    source: str,
    pieces: Sequence[str],
    vocab: dict[str, int],
    types: Sequence[int],
    ids: Mapping[str, int | None],
) -> tuple[tokenizers.Tokenizer, bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = metadata.get(_KEY + "pre", "default")
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        raise CheckpointError(
            f"{source}: {_KEY}pre is {name!r}, which is not supported; supported: {', '.join(PRE_TOKENIZERS)}."
        )
    merges = [tuple(merge.split(" ", 1)) for merge in _required(metadata, "merges", source)]
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    cut, cut_spelled = (
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        for patterns in (pre.patterns, pre.spelled_patterns)
    )
    # ByteLevel would put a space before every piece, so it is put before the text is cut.
    prefix = [pre_tokenizers.Metaspace(" ", "first", split=False)] if _flag(metadata, "add_space_prefix") else []
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*prefix, *cut, spell, *cut_spelled])
    backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _sentencepiece_bpe(
    metadata: Mapping[str, Any],
    source: str,
    pieces: Sequence[str],
    vocab: dict[str, int],
    types: Sequence[int],
    ids: Mapping[str, int | None],
) -> tuple[tokenizers.Tokenizer, bool]:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _required(metadata, "scores", source)
    kinds = zip(pieces, scores, types, strict=True)
    merges = _merges_from_scores({piece: score for piece, score, kind in kinds if piece and kind == TokenType.NORMAL})
    unk = pieces[ids["unknown"]] or None if ids["unknown"] is not None else None
    backend = Tokenizer(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    prefix = _flag(metadata, "add_space_prefix", True)
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


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, Any]:
    key = "tokenizer.chat_template"
    named = {k.removeprefix(key + "."): v for k, v in metadata.items() if k.startswith(key + ".")}
    return ({"default": metadata[key]} if metadata.get(key) else {}) | named
