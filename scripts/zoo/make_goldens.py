"""Write tests/golden/zoo.json: what transformers makes of the zoo; and tests/data/stories.txt, texts held out of it.

    python scripts/zoo/make_goldens.py

For each model: the parameters, the five largest logits behind each prompt (float32), the tokens that it goes on with
greedily, and its loss on the held-out texts. `about` has the versions behind the numbers.
"""

import json
import platform
from pathlib import Path
from typing import Any

import tokenizers
import torch
import train
import transformers

ROOT = Path(__file__).parents[2]
ZOO = ROOT / "tinyserve" / "checkpoints" / "presets" / "zoo"
GOLDEN, STORIES = ROOT / "tests" / "golden" / "zoo.json", ROOT / "tests" / "data" / "stories.txt"
PROMPTS = (
    "Once upon a time",
    "One day, a little dog named Sam went for a walk. In the park, there was",
    "Question: What does a baker do?\nAnswer:",
)
NEW_TOKENS, TEXTS = 40, 40


def held_out() -> str:
    """Some of the texts that no model of the zoo has learned, parted as documents are."""
    texts = [text["text"] for text in train.texts()[:: train.HELD_OUT]]
    return f"\n{train.END}\n".join(texts[:TEXTS])


def golden(name: str, stories: str) -> dict[str, Any]:
    """What transformers computes of one model in float32."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(ZOO / name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        ZOO / name, dtype="float32", attn_implementation="eager"
    ).eval()
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        logits = model(ids).logits[0, -1]
        largest, tokens = logits.topk(5)
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, temperature=None,
            top_p=None,
        )  # fmt: skip
        rows.append({
            "prompt": prompt, "token_ids": ids[0].tolist(), "tokens": tokens.tolist(), "logits": largest.tolist(),
            "largest": float(logits.abs().max()), "written": written[0, ids.shape[1] :].tolist(),
        })  # fmt: skip
    ids = tokenizer(stories, return_tensors="pt").input_ids[0]
    losses = []
    for start in range(0, len(ids) - 1, train.CONTEXT):
        window = ids[start : start + train.CONTEXT]
        if len(window) > 1:
            told = torch.log_softmax(model(window[None]).logits[0, :-1], -1)
            losses.append(-told.gather(1, window[1:, None])[:, 0])
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": float(torch.cat(losses).mean()),
        "prompts": rows,
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    stories = held_out()
    STORIES.write_text(stories + "\n", encoding="utf-8")
    found = {
        "about": {
            "command": "python scripts/zoo/make_goldens.py",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "python": platform.python_version(),
        },
        "models": {folder.name: golden(folder.name, stories) for folder in sorted(ZOO.iterdir())},
    }
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{GOLDEN.relative_to(ROOT)}: {', '.join(found['models'])}")


if __name__ == "__main__":
    main()
