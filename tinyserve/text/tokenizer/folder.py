"""A tokenizer read from the files of a Hugging Face checkpoint.

Knows which file says what, and which one wins; nothing about downloading them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyserve.checkpoints.json_file import read_json
from tinyserve.errors import CheckpointError
from tinyserve.text.tokenizer.processors import add_bos_and_eos

if TYPE_CHECKING:
    import tokenizers

_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


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
    _add_tokens(backend, config.get("added_tokens_decoder") or {}, folder)
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
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise CheckpointError(f"{path} is not a tokenizer that can be read: {error}.") from None


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


def _add_tokens(backend: tokenizers.Tokenizer, decoder: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Add what tokenizer_config.json knows and tokenizer.json does not, under the same ids."""
    from tokenizers import AddedToken

    known = backend.get_added_tokens_decoder()
    for token_id, token in sorted((int(i), token) for i, token in decoder.items()):
        if token_id in known:
            continue
        flags = {k: token[k] for k in ("single_word", "lstrip", "rstrip", "normalized", "special") if k in token}
        backend.add_tokens([AddedToken(token["content"], **flags)])
        if (actual := backend.token_to_id(token["content"])) != token_id:
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'}: added_tokens_decoder gives {token['content']!r} the id "
                f"{token_id}, but in the tokenizer it is {actual}."
            )


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


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """chat_template.jinja wins over chat_template.json, and that over tokenizer_config.json."""
    declared = config.get("chat_template")
    if isinstance(declared, list):
        templates = {entry["name"]: entry["template"] for entry in declared}
    else:
        templates = {"default": declared} if declared else {}
    if template := _read_optional(folder / "chat_template.json").get("chat_template"):
        templates["default"] = template
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return templates
