"""Puts the trained zoo into the package: weights of 16 bits, configs, tokenizer, a card each, and their presets.

    python scripts/zoo/publish.py

The goldens are written after it, by scripts/zoo/make_goldens.py.
"""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import train
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

PRESETS = Path(__file__).parents[2] / "tinyserve" / "checkpoints" / "presets"
LICENSE = "Apache-2.0"
# family, variant, and what it is the smallest example of
KINDS = {
    "tiny-gpt2": ("gpt2", "tiny", "GPT-2: learned positions, multi-head attention, LayerNorm, GELU."),
    "tiny-falcon": ("falcon", "tiny", "Falcon: RoPE, multi-query attention, attention and MLP side by side."),
    "tiny-llama": ("llama", "tiny", "Llama: RoPE, grouped-query attention, RMSNorm, SwiGLU."),
    "tiny-granite": ("granite", "tiny", "Granite 4 H: Mamba2 layers, every other one attention without positions."),
    "tinier-llama": ("llama", "tinier", "Llama once more, a fifth of the size: its drafts are tiny-llama's to verify."),
}
CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# {name}

{kind}

{parameters:,} parameters, trained from nothing for tinyserve, to learn from
and to test with. It continues children's stories in simple English and gives short answers to simple questions
(`Question: What is a cat?`, then `Answer:` on the next line). It knows nothing else, says what is wrong with
confidence, and is no use for anything that matters.

| | |
|-|-|
| Data | {texts:,} texts ({tokens:,} tokens), written by SmolLM2-135M-Instruct through `tinyserve batch`: `scripts/zoo/write_texts.py`, prompts and seeds in `scripts/zoo/`, the texts in `scripts/zoo/texts/`. One in {held_out} was held out. |
| Tokenizer | Byte-level BPE of {vocabulary:,} pieces, trained on the same texts; `<|endoftext|>` (0) ends each. |
| Recipe | `python scripts/zoo/train.py {name} --steps {steps}`: {steps:,} steps of {batch} x {context} tokens; Muon for the matrices of the blocks, AdamW for all else, learning rate {rate} with {warmup} steps of warm-up and a cosine; bfloat16 arithmetic, seed {seed}. |
| Loss | {loss:.3f} on the last batch, **{validation:.3f}** on held-out texts: perplexity {perplexity:.1f}. |
| Context | 512 positions; trained on {context} at a time. |
| Licence | Apache-2.0, as SmolLM2's, whose texts it learned. |
"""  # noqa: E501


def last_losses(name: str) -> dict[str, Any]:
    lines = (train.WORK / name / "losses.jsonl").read_text().splitlines()
    return json.loads(lines[-1])


def publish(name: str, tokenizer: PreTrainedTokenizerFast, counts: dict[str, int]) -> None:
    family, variant, kind = KINDS[name]
    folder = PRESETS / "zoo" / name
    shutil.rmtree(folder, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(train.WORK / name / "model", dtype="float16")
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=0, pad_token_id=0, do_sample=True, temperature=0.6, top_p=0.9
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    parameters = sum(p.numel() for p in model.parameters())
    losses = last_losses(name)
    card = CARD.format(
        name=name, kind=kind, parameters=parameters, held_out=train.HELD_OUT, vocabulary=train.VOCABULARY,
        steps=losses["step"], batch=train.BATCH, context=train.CONTEXT, rate=train.LEARNING_RATE, warmup=train.WARMUP,
        seed=train.SEED, loss=losses["loss"], validation=losses["validation_loss"],
        perplexity=math.exp(losses["validation_loss"]), **counts,
    )  # fmt: skip
    (folder / "model.safetensors").chmod(0o644)
    (folder / "README.md").write_text(card, encoding="utf-8")
    preset = {
        "zoo": True, "family": family, "variant": variant, "gated": False, "chat": False, "license": LICENSE,
        "unverified": [], "parameters": parameters,
    }  # fmt: skip
    (PRESETS / f"{name}.json").write_text(json.dumps(preset, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(train.WORK / "tokenizer.json"), bos_token=train.END, eos_token=train.END,
        pad_token=train.END, model_max_length=512, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    learned, held_out = train.token_ids()
    counts = {"texts": len(train.texts()), "tokens": learned.shape[1] + held_out.shape[1]}
    for name in train.NAMES:
        if (train.WORK / name / "model").exists():
            publish(name, tokenizer, counts)
        else:
            print(f"{name} is not trained yet: `python scripts/zoo/train.py {name}`.", file=sys.stderr)


if __name__ == "__main__":
    main()
