"""Write tests/golden/tokenizer.json: what llama.cpp and SentencePiece make of a few awkward texts.

    python scripts/make_tokenizer_golden.py --vocab gpt-2=FILE.gguf --vocab falcon=FILE.gguf ...

A vocabulary is cut down to the tokens that are substrings of the texts: no other token or merge could take
part in encoding them, so the excerpt must give the ids of the whole. Needs llama-cpp-python, sentencepiece.
"""

import argparse
import importlib.metadata
import io
import json
import sys
import unicodedata
from pathlib import Path

import gguf
import llama_cpp
import sentencepiece

from tinyserve.text.tokenizer.detokenizer import byte_of_character

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "tokenizer.json"
TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    "\t\n \n\n",
    "Hello world",
    " Hello, y'all! How are you 😁 ?",
    "I'll say WE'RE don't DON'T 'tis",
    "3.14159 and 1234567 apples for $1,000.00",
    "def f(x):\n    return x**2  # comment\r\n",
    "naïve café, cafe\u0301, ﬁne, Straße",
    "👨‍👩‍👧‍👦 family, 👍🏽 thumbs, 🇫🇷 flag",
    "日本語と中文, 한국어",
    "مرحبا بالعالم ١٢٣",
    "नमस्ते दुनिया",
    "x² + ½ = Ⅷ",
    "zero\u200bwidth\u00a0space\u3000wide",
    "\x00\x01\x7f\ufeff",
    "...!!!???---___===",
    "https://example.com/a_b?c=d&e=f#g",
    "CamelCaseWord snake_case_word SHOUTING",
    "<|endoftext|>after<|im_start|>user\nHi<|im_end|>\n",
]


def spelled(text: str) -> str:
    """The text as byte-level vocabularies spell it."""
    characters = {byte: character for character, byte in byte_of_character().items()}
    return "".join(characters[byte] for byte in text.encode())


def byte_level_excerpt(path: Path) -> dict[str, object]:
    """The part of a byte-level vocabulary that the texts can touch, and their ids according to llama.cpp."""
    fields = gguf.GGUFReader(path).fields
    metadata = {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    # A digit among the characters that spell bytes: Falcon cuts there and llama.cpp does not.
    exact = [text for text in TEXTS if not any(c.isnumeric() and not c.isascii() for c in spelled(text))]
    texts = exact if metadata["tokenizer.ggml.pre"] == "falcon" else TEXTS
    # Qwen2's tokenizer.json normalizes, llama.cpp does not.
    form = "NFC" if metadata["tokenizer.ggml.pre"] == "qwen2" else None
    normalized = [unicodedata.normalize(form, text) if form else text for text in texts]
    haystack = "\n".join([*map(spelled, texts), *map(spelled, normalized), *texts])
    alphabet = set(byte_of_character())
    kept = [i for i, token in enumerate(tokens) if token in haystack or token in alphabet]
    new_id = {old: new for new, old in enumerate(kept)}
    names = {tokens[i] for i in kept}
    merges = [m for m in metadata["tokenizer.ggml.merges"] if {*m.split(" "), m.replace(" ", "")} <= names]
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    encoded = [llama.tokenize(text.encode(), add_bos=False, special=True) for text in normalized]
    return {
        "metadata": {
            "tokenizer.ggml.model": metadata["tokenizer.ggml.model"],
            "tokenizer.ggml.pre": metadata["tokenizer.ggml.pre"],
            "tokenizer.ggml.tokens": [tokens[i] for i in kept],
            "tokenizer.ggml.token_type": [types[i] for i in kept],
            "tokenizer.ggml.merges": merges,
        },
        "texts": texts,
        "ids": [[new_id[i] for i in ids] for ids in encoded],
    }


def sentencepiece_model() -> dict[str, object]:
    """A small SentencePiece BPE with byte fallback, trained here, and its own ids for the texts."""
    license_text = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")
    sentences = [line.strip() for line in license_text.splitlines() if line.strip()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*sentences, *TEXTS[5:12]]),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<|user|>"],
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    size = processor.get_piece_size()
    kinds = [
        (processor.is_unknown, gguf.TokenType.UNKNOWN),
        (processor.is_control, gguf.TokenType.CONTROL),
        (processor.is_byte, gguf.TokenType.BYTE),
        (processor.is_unused, gguf.TokenType.UNUSED),
        (lambda i: processor.id_to_piece(i) == "<|user|>", gguf.TokenType.USER_DEFINED),
        (lambda _: True, gguf.TokenType.NORMAL),
    ]
    return {
        "metadata": {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in range(size)],
            "tokenizer.ggml.scores": [processor.get_score(i) for i in range(size)],
            "tokenizer.ggml.token_type": [int(next(k for is_, k in kinds if is_(i))) for i in range(size)],
            "tokenizer.ggml.bos_token_id": processor.bos_id(),
            "tokenizer.ggml.eos_token_id": processor.eos_id(),
            "tokenizer.ggml.unknown_token_id": processor.unk_id(),
        },
        "texts": TEXTS,
        "ids": [processor.encode(text) for text in TEXTS],
    }


def main() -> None:
    """Write the golden file, with the command and the versions that made it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", action="append", default=[], metavar="NAME=FILE", help="a GGUF file")
    vocabs = dict(vocab.split("=", 1) for vocab in parser.parse_args().vocab)
    command = " ".join(
        [
            "python",
            "scripts/make_tokenizer_golden.py",
            *(f"--vocab {n}={Path(p).name}" for n, p in vocabs.items()),
        ]
    )
    packages = ("llama-cpp-python", "sentencepiece", "gguf")
    golden = {
        "command": command,
        "versions": {"python": sys.version.split()[0]} | {p: importlib.metadata.version(p) for p in packages},
        "cases": {name: byte_level_excerpt(Path(path)) for name, path in vocabs.items()}
        | {"sentencepiece": sentencepiece_model()},
    }
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden, ensure_ascii=True, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{GOLDEN.name}: {len(golden['cases'])} vocabularies, {GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
