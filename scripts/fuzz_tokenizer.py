"""Random text through our tokenizer and llama.cpp's, both built from one GGUF file: every difference is printed.

    python scripts/fuzz_tokenizer.py FILE.gguf --texts 20000

Needs llama-cpp-python. A few code points that the two Unicode tables class differently are expected to differ.
"""

import argparse
import random
import sys
from pathlib import Path

import llama_cpp

from tinyserve.checkpoints.gguf import open_gguf
from tinyserve.text.tokenizer import Tokenizer

WORDS = [
    "Hello",
    " world",
    "don't",
    "WE'RE",
    "3.14",
    "1234567",
    "_",
    "...",
    "\t",
    "\n\n",
    "   ",
    "ß",
    "naïve",
    "cafe\u0301",
]
SCRIPTS = ["日本語", "한국어", "مرحبا", "नमस्ते", "Привет", "\u3000", "👨‍👩‍👧‍👦", "👍🏽", "🇫🇷", "<|im_end|>", "\x7f", "ﬁ"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    ours = Tokenizer.from_gguf(open_gguf(arguments.file).metadata, str(arguments.file))
    theirs = llama_cpp.Llama(str(arguments.file), vocab_only=True, verbose=False)
    generator, differing = random.Random(arguments.seed), 0
    for _ in range(arguments.texts):
        pool = [*WORDS, *SCRIPTS, chr(generator.randrange(0x20, 0xD800)), chr(generator.randrange(0x20, 0x250))]
        text = "".join(generator.choices(pool, k=generator.randrange(1, 12)))
        expected = theirs.tokenize(text.encode(), add_bos=False, special=True)
        if ours.encode(text, add_special_tokens=False) != expected:
            differing += 1
            print(repr(text), file=sys.stderr)
    print(f"{differing} of {arguments.texts} texts differ")


if __name__ == "__main__":
    main()
