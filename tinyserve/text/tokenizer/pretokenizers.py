"""The pre-tokenizers of byte-level BPE vocabularies, under the names GGUF files give them.

A GGUF file has only the name; the regular expressions and the normalizer are the tokenizer.json's.
"""

from __future__ import annotations

from dataclasses import dataclass

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
QWEN2 = CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (
    rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
PUNCTUATION = r"[\p{P}$+<=>^~|`]+"
DIGIT = r"\p{N}"


@dataclass(frozen=True)
class PreTokenizer:
    """Regular expressions applied one after the other, each cutting its matches out of the pieces so far."""

    patterns: tuple[str, ...]
    spelled_patterns: tuple[str, ...] = ()  # the same, once bytes are spelled as characters: ½ is then "Â½"
    nfc: bool = False  # text is normalized to NFC first
    ignore_merges: bool = False  # a piece that is in the vocabulary is one token, whatever the merges say
    add_bos: bool = False  # where tokenizer.ggml.add_bos_token does not say


_FALCON = PreTokenizer((PUNCTUATION, GPT2), spelled_patterns=(r"\p{N}+", r"[0-9][0-9][0-9]"))
_LLAMA3 = PreTokenizer((CL100K,), ignore_merges=True, add_bos=True)
_DIGITS = PreTokenizer((DIGIT, GPT2))
_GPT2 = PreTokenizer((GPT2,))
_CL100K = PreTokenizer((CL100K,))
_O200K = PreTokenizer((O200K,))
_NEOX = PreTokenizer((GPT2,), nfc=True)

PRE_TOKENIZERS = {
    "codeshell": _DIGITS,
    "command-r": PreTokenizer((DIGIT, GPT2), nfc=True),
    "dbrx": _CL100K,
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", DIGIT)),
    "default": _FALCON,
    "falcon": _FALCON,
    "falcon3": _LLAMA3,
    "gpt-2": _GPT2,
    "gpt-4o": _O200K,
    "granite-docling": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "llama4": _O200K,
    "mpt": _NEOX,
    "olmo": _NEOX,
    "phi-2": _GPT2,
    "qwen2": PreTokenizer((QWEN2,), nfc=True),
    "refact": _DIGITS,
    "smaug-bpe": _CL100K,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "tekken": PreTokenizer((TEKKEN,), ignore_merges=True, add_bos=True),
}
