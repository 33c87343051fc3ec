"""A tokenizer read from the files of a Hugging Face checkpoint.

Knows which file says what, and which one wins; nothing about downloading them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyserve.checkpoints.json_file import read_json
from tinyserve.errors import CheckpointError
from tinyserve.text.tokenizer.processors import add_bos_and_eos

if TYPE_CHECKING:
    import tokenizers

_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def load_folder(folder: Path) -> dict[str, Any]:
    """Build the arguments of `Tokenizer` from a folder; CheckpointError names the file at fault."""
    config = _read_optional(folder / "tokenizer_config.json")
    named = _read_optional(folder / "special_tokens_map.json") | {k: v for k, v in config.items() if v is not None}
    special = {name: token for name in _NAMES if (token := _content(named.get(name))) is not None}
    if (folder / "tokenizer.json").is_file():
        backend = _from_tokenizer_json(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _from_vocab_and_merges(folder)
        if backend.token_to_id("<|endoftext|>") is not None:  # GPT-2's files do not say so: its code did
            special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>") | special
    else:
        raise CheckpointError(_missing(folder))
    backend = _add_tokens(backend, config.get("added_tokens_decoder") or {}, folder / "tokenizer_config.json")
    if not (folder / "tokenizer.json").is_file():  # which has them all
        path = folder / "added_tokens.json"
        more = named.get("additional_special_tokens")
        others = [_content(token) for token in more] if isinstance(more, list) else []
        are_special = [*special.values(), *others]
        backend = _add_tokens(backend, _by_id(_read_optional(path), path, are_special), path)
    special = {name: token for name, token in special.items() if backend.token_to_id(token) is not None}
    _mark_special(backend, special.values())
    if not (folder / "tokenizer.json").is_file():  # which has its own way to add them, and wins
        bos, eos = (
            special.get(f"{name}_token") if config.get(f"add_{name}_token") else None for name in ("bos", "eos")
        )
        add_bos_and_eos(backend, bos, eos)
    bos_ids, eos_ids = (_ids_of(name, folder, backend, special) for name in ("bos_token", "eos_token"))
    return {
        "backend": backend,
        "source": str(folder),
        "special_tokens": special,
        "bos_token_id": bos_ids[0] if bos_ids else None,
        "eos_token_ids": frozenset(eos_ids),
        "chat_templates": _chat_templates(folder, config),
    }


def _missing(folder: Path) -> str:
    if (folder / "tokenizer.model").is_file():
        return (
            f"{folder} has a tokenizer.model but no tokenizer.json; take tokenizer.json from the model's "
            "repository, or make it with transformers and sentencepiece installed: "
            f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')."
        )
    return (
        f"{folder} has no tokenizer.json, and no vocab.json with merges.txt either; "
        "take tokenizer.json from the model's repository."
    )


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path, CheckpointError) if path.exists() else {}


def _from_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    try:
        text = path.read_text(encoding="utf-8")
        backend = Tokenizer.from_str(text)
        declared = {token["content"]: token["id"] for token in _added_tokens(text)}
        if any(backend.token_to_id(content) != token_id for content, token_id in declared.items()):
            backend = _renumbered(backend, declared)
        return backend
    except Exception as error:  # the library raises bare exceptions
        raise CheckpointError(f"{path} is not a tokenizer that can be read: {error}.") from None


def _added_tokens(text: str) -> list[dict[str, Any]]:
    """The added tokens of a tokenizer.json, without reading the rest of it, which is long."""
    found = re.search(r'"added_tokens"\s*:\s*(?=\[)', text)
    tokens: list[dict[str, Any]] = json.JSONDecoder().raw_decode(text, found.end())[0] if found else []
    return tokens


def _renumbered(backend: tokenizers.Tokenizer, ids: Mapping[str, int]) -> tokenizers.Tokenizer:
    """The same tokenizer with these ids for added tokens.

    The library numbers them one after the other behind the vocabulary, whatever a file says, but for those that the
    vocabulary has itself: so they are put there.
    """
    from tokenizers import Tokenizer

    data = json.loads(backend.to_str())
    data["model"]["vocab"] |= ids
    for token in data["added_tokens"]:
        token["id"] = ids.get(token["content"], token["id"])
    return Tokenizer.from_str(json.dumps(data))


def _from_vocab_and_merges(folder: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises bare exceptions
        raise CheckpointError(f"{folder}: vocab.json with merges.txt is no tokenizer: {error}.") from None
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _content(token: Any) -> str | None:
    """A special token is written as a string or as an object with its flags."""
    return token.get("content") if isinstance(token, dict) else token


def _by_id(tokens: Mapping[str, Any], path: Path, special: Collection[Any]) -> dict[str, dict[str, Any]]:
    """What an added_tokens.json says, as an added_tokens_decoder has it; raises CheckpointError for what is no id.

    Which of them are `special` it does not say itself.
    """
    for content, token_id in tokens.items():
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise CheckpointError(f"{path} gives {content!r} the id {token_id!r:.60}; it must be a whole number.")
    return {
        str(token_id): {"content": content, "normalized": False, "special": content in special}
        for content, token_id in tokens.items()
    }


def _add_tokens(backend: tokenizers.Tokenizer, decoder: Any, path: Path) -> tokenizers.Tokenizer:
    """Add what a file knows and the tokenizer does not, under the same ids, holes or not.

    Raises CheckpointError where an id or a token has another one already.
    """
    from tokenizers import AddedToken

    known = backend.get_added_tokens_decoder()
    try:
        tokens = {int(i): (str(token["content"]), token) for i, token in decoder.items() if int(i) not in known}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: added_tokens_decoder must have an object with content for each id.") from None
    for token_id, (content, _) in tokens.items():
        there, other = backend.token_to_id(content), backend.id_to_token(token_id)
        if there not in (None, token_id) or other not in (None, content):
            has = f"it is {there}" if there is not None else f"that is {other!r}"
            raise CheckpointError(f"{path} gives {content!r} the id {token_id}, but in the tokenizer {has}.")
    for _, (content, token) in sorted(tokens.items()):
        backend.add_tokens([AddedToken(content, **{flag: token[flag] for flag in _FLAGS if flag in token})])
    ids = {content: token_id for token_id, (content, _) in tokens.items()}
    if any(backend.token_to_id(content) != token_id for content, token_id in ids.items()):
        return _renumbered(backend, ids)
    return backend


def _mark_special(backend: tokenizers.Tokenizer, contents: Iterable[str]) -> None:
    from tokenizers import AddedToken

    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    missing = sorted(set(contents) - special)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in missing])


def _ids_of(name: str, folder: Path, backend: tokenizers.Tokenizer, special: Mapping[str, str]) -> list[int]:
    """Every id a checkpoint's files declare for `name`, the tokenizer's own first."""
    own = backend.token_to_id(special[name]) if name in special else None
    ids = [] if own is None else [own]
    for file in ("config.json", "generation_config.json"):
        value = _read_optional(folder / file).get(f"{name}_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    return ids


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """chat_template.jinja wins over chat_template.json, and that over tokenizer_config.json."""
    declared = config.get("chat_template")
    templates: dict[str, Any] = {"default": declared} if declared else {}
    if isinstance(declared, list):
        entries = [entry if isinstance(entry, dict) else {} for entry in declared]
        templates = {str(entry.get("name")): entry.get("template") for entry in entries}
    if template := _read_optional(folder / "chat_template.json").get("chat_template"):
        templates["default"] = template
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = _template_text(path)
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = _template_text(folder / "chat_template.jinja")
    return templates


def _template_text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig", errors="replace")
