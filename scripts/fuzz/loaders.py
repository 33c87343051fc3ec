"""Damaged checkpoints through the loaders: what is neither a model nor a sentence is printed, to be seen again.

    python scripts/fuzz/loaders.py --seconds 300 --seed 7

Tiny checkpoints are written, one file of each is changed, and the model is loaded in this process and asked for a
token. What is right is an answer or an error of tinyserve's own; the exit code is 1 if there was anything else.
`--case 1234` makes one case alone, and shows its traceback.
"""

import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts" / "fuzz"), str(ROOT / "tests" / "support")]

import checkpoints  # noqa: E402
from common import change_bytes, changed, no_sentence, numbers, options  # noqa: E402

from tinyserve import LLM, SamplingParams, quantize  # noqa: E402
from tinyserve.errors import TinyserveError  # noqa: E402

SLOWEST = 10.0  # seconds of the processor for one case: others may be at work
NAMES = ("llama-grouped", "gpt2", "granite-hybrid", "falcon-7b", "mistral", "qwen3", "llama-3")
PACKED = "packed"  # what `tinyserve quantize` makes of the first of them
GENERATION = {"do_sample": True, "temperature": 0.6, "top_k": 40, "eos_token_id": [5, 6], "max_new_tokens": 9}
FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"),
    *("vocab.json", "model.safetensors", "model.safetensors.index.json"),
)
TEXTS = ["", "{", "[" * 50_000, '{"a":' * 50_000, "null", '"x"', "5", "\ufeff{}", "{}", "{" + '"a": 1,' * 9 + "}"]


# --- what is changed ------------------------------------------------------------------------------------------------


def change_json(path: Path, rng: random.Random) -> None:
    if rng.random() < 0.1:
        path.write_text(rng.choice(TEXTS), encoding="utf-8")
    elif rng.random() < 0.1:
        data = path.read_bytes()
        path.write_bytes(change_bytes(data, rng, len(data)))
    else:
        path.write_text(json.dumps(changed(json.loads(path.read_text(encoding="utf-8")), rng)))


def change_safetensors(path: Path, rng: random.Random) -> None:
    """The header, as bytes or as the JSON that it is."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.5:
        path.write_bytes(change_bytes(data, rng, start))
    else:
        header = json.dumps(changed(json.loads(data[8:start]), rng)).encode("utf-8", "surrogatepass")
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[start:])


# --- the checkpoints ------------------------------------------------------------------------------------------------


def folder_case(original: Path, target: Path, rng: random.Random) -> tuple[Path, str]:
    """A folder with one file changed."""
    shutil.copytree(original, target)
    file = rng.choice(FILES)
    path = target / file
    if file == "model.safetensors":
        change_safetensors(path, rng)
    elif file == "model.safetensors.index.json":
        (target / "model.safetensors").rename(target / "a.safetensors")
        names = checkpoints.tensors_of(json.loads((target / "config.json").read_text()))
        path.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "a.safetensors")}))
        change_json(path, rng)
    elif file == "vocab.json":
        (target / "tokenizer.json").unlink()
        path.write_text(json.dumps({piece: i for i, piece in enumerate(checkpoints.PIECES)}))
        (target / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
        change_json(path, rng) if rng.random() < 0.5 else (target / "merges.txt").write_bytes(
            change_bytes((target / "merges.txt").read_bytes(), rng, 20)
        )
    else:
        if not path.exists():
            path.write_text('{"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>", "lstrip": false}}')
        change_json(path, rng)
    return target, file


MORE_KEYS = (
    *("general.alignment", "general.sampling.temp", "split.count", "llama.rope.scaling.factor", "llama.vocab_size"),
    *("tokenizer.ggml.scores", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.padding_token_id"),
    *("tokenizer.chat_template.x", "granitehybrid.attention.head_count_kv", "falcon.rope.scaling.type"),
)
GGUF_ODD: list[Any] = [
    *(True, 0, 1, 7, 2**31, 2**32 - 1, 0.5, 0.0, float("inf"), float("nan"), "", "x", "llama", "gpt2", "linear", "{{"),
    *([1], [1, 2], ["x"], ["a b"], [0.5], [0] * 99),
]


def gguf_case(name: str, original: Path, target: Path, rng: random.Random) -> tuple[Path, str]:
    """A GGUF file with its metadata changed, or bytes of its header."""
    raw = checkpoints.CONFIGS[name]
    path = target.with_suffix(".gguf")
    if rng.random() < 0.5:
        data = original.read_bytes()
        path.write_bytes(change_bytes(data, rng, min(len(data), rng.choice((200, 1500, 20_000)))))
        return path, "bytes"
    metadata = checkpoints.gguf_metadata(raw)
    key = rng.choice((*metadata, *MORE_KEYS))
    value = rng.choice(GGUF_ODD)
    if isinstance(metadata.get(key), list) and rng.random() < 0.5:
        value = list(metadata[key])
        at = rng.randrange(len(value))
        value[at : at + rng.choice((0, 1, 2))] = [value[rng.randrange(len(value))]] * rng.choice((0, 1, 2))
    if value == [] or (rng.random() < 0.1 and key in metadata):
        metadata.pop(key, None)
    else:
        metadata[key] = value
    checkpoints.write_gguf(path, checkpoints.gguf_architecture(raw), metadata, checkpoints.gguf_tensors(raw))
    return path, key


class Cases:
    """Every case is made from the seed and its own number, so that it can be made again alone."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        for name in NAMES:
            raw = checkpoints.CONFIGS[name]
            checkpoints.write_folder(folder / name, raw)
            (folder / name / "generation_config.json").write_text(json.dumps(GENERATION))
            if name != "mistral":
                checkpoints.write_model_gguf(folder / f"{name}.gguf", raw)

        quantize.write(str(folder / NAMES[0]), folder / PACKED, "int8")

    def make(self, number: int) -> tuple[Path, str]:
        """The path of a damaged checkpoint, and what was changed."""
        rng = random.Random(f"{self.seed} {number}")
        name, target = rng.choice((*NAMES, PACKED)), self.folder / f"case-{number}"
        if rng.random() < 0.35 and name not in ("mistral", PACKED):
            path, what = gguf_case(name, self.folder / f"{name}.gguf", target, rng)
        else:
            path, what = folder_case(self.folder / name, target, rng)
        return path, f"{name}, {what}"


# --- what comes of it -----------------------------------------------------------------------------------------------


def load(path: Path) -> None:
    llm = LLM(path, num_threads=1, max_num_seqs=1, kv_cache_memory=8 << 20, dtype="auto")
    try:
        llm.generate(["the"], SamplingParams(max_tokens=1, temperature=0))
    finally:
        llm.close()


def fault(path: Path, run: Callable[[Path], None] = load) -> tuple[str, str]:
    """What is wrong with how a path loads, and its traceback; empty where nothing is."""
    started = time.process_time()
    try:
        run(path)
    except TinyserveError as error:
        if wrong := no_sentence(str(error)):
            return wrong, traceback.format_exc()
        if "internal" in str(error):
            return f"a mistake: {error!r:.300}", traceback.format_exc()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        return f"{type(error).__name__}: {error!s:.200}", traceback.format_exc()
    took = time.process_time() - started
    return (f"took {took:.0f} s", "") if took > SLOWEST else ("", "")


def main() -> int:
    arguments = options(__doc__).parse_args()
    tried = faults = 0
    with tempfile.TemporaryDirectory(prefix="fuzz-loaders-") as folder:
        cases = Cases(Path(folder), arguments.seed)
        for name in (*NAMES, PACKED):  # kernels are compiled before anything is timed
            load(cases.folder / name)
        for number in numbers(arguments):
            path, what = cases.make(number)
            wrong, trace = fault(path)
            tried += 1
            if wrong:
                faults += 1
                print(f"{what}: {wrong}\n    again: --seed {arguments.seed} --case {number}", flush=True)
            if arguments.case is not None:
                print(trace or "nothing is wrong with it" * (not wrong))
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    print(f"{tried} cases, {faults} of them neither a model nor a sentence")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
