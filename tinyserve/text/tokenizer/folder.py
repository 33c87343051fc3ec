"""A tokenizer read from the files of a Hugging Face checkpoint.

Knows which file says what, and which one wins; nothing about downloading them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyserve.checkpoints.fields import Fields
from tinyserve.checkpoints.json_file import read_json, read_text
from tinyserve.errors import CheckpointError
from tinyserve.text.tokenizer.library import library_errors
from tinyserve.text.tokenizer.processors import add_bos_and_eos

if TYPE_CHECKING:
    import tokenizers

_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def load_folder(folder: Path) -> dict[str, Any]:
    """Build the arguments of `Tokenizer` from a folder; CheckpointError names the file at fault."""
    config, named = (_read_optional(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    special = _special_tokens(named) | _special_tokens(config)
    declared: dict[int, str] = {}
    if (folder / "tokenizer.json").is_file():
        backend, declared = _from_tokenizer_json(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _from_vocab_and_merges(folder)
        if backend.token_to_id("<|endoftext|>") is not None:  # GPT-2's files do not say so: its code did
            special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>") | special
    else:
        raise CheckpointError(_missing(folder))
    decoder = config.inside("added_tokens_decoder", config.objects("added_tokens_decoder"))
    backend = _with_added_tokens(backend, decoder, declared)
    if not (folder / "tokenizer.json").is_file():  # which has them all
        others = [token for fields in (named, config) for token in _more_special_tokens(fields)]
        added = _read_optional(folder / "added_tokens.json")
        backend = _with_added_tokens(backend, _by_id(added, [*special.values(), *others]), declared)
    special = {name: token for name, token in special.items() if backend.token_to_id(token) is not None}
    _mark_special(backend, special.values())
    if not (folder / "tokenizer.json").is_file():  # which has its own way to add them, and wins
        bos, eos = (
            special.get(f"{name}_token") if config.boolean(f"add_{name}_token", default=False) else None
            for name in ("bos", "eos")
        )
        add_bos_and_eos(backend, bos, eos)
    bos_ids, eos_ids = (_ids_of(name, folder, backend, special) for name in ("bos_token", "eos_token"))
    return {
        "backend": backend,
        "source": str(folder),
        "special_tokens": special,
        "bos_token_id": next((i for i in bos_ids if backend.id_to_token(i) is not None), None),
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


def _read_optional(path: Path) -> Fields:
    return Fields(read_json(path, CheckpointError) if path.exists() else {}, str(path), CheckpointError)


def _from_tokenizer_json(path: Path) -> tuple[tokenizers.Tokenizer, dict[int, str]]:
    """The tokenizer, and its added tokens by the ids that they have in the file."""
    from tokenizers import Tokenizer

    text = read_text(path, CheckpointError)
    with library_errors(f"{path} is not a tokenizer that can be read"):
        backend = Tokenizer.from_str(text)
    # The rest, 100,000s of pieces, is not parsed twice.
    at = re.search(r'(?<!\\)"added_tokens"\s*:\s*(?=\[)', text)
    added = json.JSONDecoder().raw_decode(text, at.end())[0] if at else []
    return backend, {token["id"]: token["content"] for token in added}


def _from_vocab_and_merges(folder: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = _read_optional(folder / "vocab.json")
    ids = {piece: vocab.integer(piece, minimum=0) for piece in vocab.raw}
    merges = []
    for line in read_text(folder / "merges.txt", CheckpointError).split("\n"):
        if line.strip() and not line.startswith("#version"):
            first, _, second = line.rstrip("\r").partition(" ")
            if not ids.keys() >= {first, second, first + second}:
                raise CheckpointError(
                    f"{folder / 'merges.txt'}: {line!r:.80} is no merge of two tokens of vocab.json to a third: take "
                    "both files from the model's repository."
                )
            merges.append((first, second))
    with library_errors(f"{folder}: vocab.json with merges.txt is no tokenizer"):
        backend = Tokenizer(models.BPE(ids, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _special_tokens(fields: Fields) -> dict[str, str]:
    """The named special tokens of a file; each is written as a string or as an object with its flags."""
    tokens = {}
    for name in _NAMES:
        value = fields.raw.get(name)
        content = fields.inside(name, value).text("content", default=None) if isinstance(value, dict) else None
        if content is None and not isinstance(value, dict):
            content = fields.text(name, default=None)
        if content is not None:
            tokens[name] = content
    return tokens


def _more_special_tokens(fields: Fields) -> list[Any]:
    tokens = fields.raw.get("additional_special_tokens")
    texts = [token.get("content") if isinstance(token, dict) else token for token in tokens or []]
    return [text for text in texts if isinstance(text, str)]


def _by_id(added: Fields, special: Collection[str]) -> Fields:
    """What an added_tokens.json says, as an added_tokens_decoder has it; which are `special` it does not say itself."""
    ids = {content: added.integer(content, minimum=0) for content in added.raw}
    tokens = {
        str(token_id): {"content": content, "normalized": False, "special": content in special}
        for content, token_id in ids.items()
    }
    return Fields(tokens, added.source, CheckpointError)


def _with_added_tokens(
    backend: tokenizers.Tokenizer, entries: Fields, declared: dict[int, str]
) -> tokenizers.Tokenizer:
    """Add what a file has by id and the tokenizer, or what was `declared` before, does not; each under its id."""
    from tokenizers import AddedToken

    tokens = {}
    for written in entries.raw:
        if not (written.isascii() and written.isdecimal()) or len(written) > 9:
            entries.refuse(f"{written!r:.80} is no token id.")
        tokens[int(written)] = entries.inside(written, entries.objects(written))
    for token_id, token in sorted(tokens.items()):
        if token_id in declared:
            continue
        content = token.text("content")
        flags = {name: token.boolean(name, default=False) for name in _FLAGS if token.has(name)}
        is_new = backend.token_to_id(content) is None
        with library_errors(f"{token.source}: {content!r:.80} cannot be added"):
            backend.add_tokens([AddedToken(content, **flags)])
        actual = backend.token_to_id(content)
        if actual != token_id and not is_new:
            entries.refuse(f"{content!r:.80} is to have the id {token_id}, but in the tokenizer it is {actual}.")
        declared[token_id] = content
    moved = {content: i for i, content in declared.items() if backend.token_to_id(content) != i}
    return _with_ids(backend, entries.source, moved) if moved else backend


def _model_ids(backend: tokenizers.Tokenizer) -> Iterable[int]:
    return backend.get_vocab(with_added_tokens=False).values()


def _with_ids(backend: tokenizers.Tokenizer, source: str, ids: Mapping[str, int]) -> tokenizers.Tokenizer:
    """The tokenizer with added tokens under these ids; raises CheckpointError where other tokens have them.

    The library counts tokens where it should look for the largest id, and so puts added ones into the holes of a
    vocabulary, or onto its tokens. What is in the model's own vocabulary keeps its id.
    """
    state = json.loads(backend.to_str())
    vocab = state["model"]["vocab"]
    # All are put into the vocabulary: those that are not there would be counted again.
    ids = {token["content"]: token["id"] for token in state["added_tokens"]} | dict(ids)
    ids = {content: token_id for content, token_id in ids.items() if content not in vocab}
    taken = set(_model_ids(backend))
    for content, token_id in ids.items():
        if not isinstance(vocab, dict) or token_id in taken:
            raise CheckpointError(
                f"{source}: the added token {content!r:.80} has the id {token_id}, which another token has, or which "
                "lies behind a hole in a vocabulary that can have none: take the files from the model's repository."
            )
        taken.add(token_id)
    if not ids:
        return backend
    vocab |= ids
    for token in state["added_tokens"]:
        token["id"] = ids.get(token["content"], token["id"])
    state["added_tokens"].sort(key=lambda token: token["id"])
    with library_errors(f"{source}: its added tokens cannot have their ids"):
        return type(backend).from_str(json.dumps(state))


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
        ids += _read_optional(folder / file).token_ids(f"{name}_id")
    return ids


def _chat_templates(folder: Path, config: Fields) -> dict[str, Any]:
    """chat_template.jinja wins over chat_template.json, and that over tokenizer_config.json.

    What is no text is nobody's to refuse here: a model without a template continues text.
    """
    declared = config.raw.get("chat_template")
    templates: dict[str, Any] = {"default": declared} if declared else {}
    if isinstance(declared, list):
        named = [entry if isinstance(entry, dict) and isinstance(entry.get("name"), str) else {} for entry in declared]
        templates = {entry.get("name", str(i)): entry.get("template") for i, entry in enumerate(named)}
    if template := _read_optional(folder / "chat_template.json").raw.get("chat_template"):
        templates["default"] = template
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = read_text(path, CheckpointError, errors="replace")
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = read_text(folder / "chat_template.jinja", CheckpointError, errors="replace")
    return templates
