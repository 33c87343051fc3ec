"""Has SmolLM2 write what the zoo learns from: parts of some thousand short stories and dialogues, each by its number.

    python scripts/zoo/write_texts.py --parts 0:8

A part that is there is left alone, and one that was interrupted goes on, as batches do. The same processor writes the
same texts.
"""

import argparse
import json
import lzma
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import prompts

STORIES, DIALOGUES = 1200, 200  # in a part
TEXTS = Path(__file__).parent / "texts"
_FORBIDDEN = re.compile(
    r"[^ -~\n]|[*#_`\[\]{}<>|\\/@=+~^&%$]|\d{3}|https?|\b(AI|language model|user|prompt|story|stories|title|moral)\b",
    re.IGNORECASE,
)


def story(text: str, is_whole: bool) -> str | None:
    """The story as it is learned, up to its last whole sentence; None where a child would ask what that was."""
    text = text.strip().replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"')
    text = re.sub(r"\n\s*\n+", "\n", re.sub(r"[ \t]+", " ", text))
    if not is_whole:
        text = text[: max(text.rfind(end) + len(end) for end in (". ", "! ", "? ", '." ', '!" '))].strip()
    sentences = re.split(r"(?<=[.!?])\s+", text)
    words = re.findall(r"\w+", text.lower())
    fours = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    if _FORBIDDEN.search(text) or text.count('"') % 2 or not text.endswith((".", "!", "?", '"')):
        return None
    if not 50 <= len(words) <= 300 or len(set(sentences)) < len(sentences) or len(set(fours)) < 0.85 * len(fours):
        return None
    return text if max(len(sentence.split()) for sentence in sentences) <= 45 else None


def dialogue(question: str, answer: str) -> str | None:
    """A question of a child and its answer, as they are learned; None for an answer that repeats itself."""
    answer = " ".join(answer.split())
    words = re.findall(r"\w+", answer.lower())
    threes = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    if _FORBIDDEN.search(answer) or not answer.endswith((".", "!")) or not 3 <= len(words) <= 40:
        return None
    return f"Question: {question}\nAnswer: {answer}" if len(set(threes)) == len(threes) else None


def texts_of(asked: Path, answered: Path) -> list[dict[str, Any]]:
    """What is kept of a batch: each text, and whether it has its end."""
    found: dict[str, bool] = {}
    for line, answer in zip(asked.open(encoding="utf-8"), answered.open(encoding="utf-8"), strict=True):
        request, response = json.loads(line), json.loads(answer)["response"]
        if not response or response["status_code"] != 200:
            continue
        (choice,) = response["body"]["choices"]
        is_whole = choice["finish_reason"] == "stop"
        if "messages" in request["body"]:
            opening = request["body"]["messages"][-1]["content"]
            text = story(opening + (choice["message"]["content"] or ""), is_whole)
        else:
            text = dialogue(request["custom_id"].partition(" ")[2], choice["text"]) if is_whole else None
        if text:
            found[text] = is_whole
    return [{"text": text, "whole": is_whole} for text, is_whole in found.items()]


def write_part(part: int, stories: int, dialogues: int, model: str, dtype: str) -> int:
    """Write one part unless it is there; how many texts it has."""
    from tinyserve.batch import run_batch

    target = TEXTS / f"part-{part:03}.jsonl.xz"
    if not target.exists():
        work = TEXTS / f"part-{part:03}.work"
        work.mkdir(parents=True, exist_ok=True)
        asked, answered = work / "asked.jsonl", work / "answered.jsonl"
        lines = [prompts.story(part * stories + i) for i in range(stories)]
        lines += [prompts.dialogue(part * dialogues + i) for i in range(dialogues)]
        asked.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        if not answered.exists():
            run_batch(str(asked), str(answered), model=model, dtype=dtype, max_num_seqs=64)
        told = "".join(json.dumps(text) + "\n" for text in texts_of(asked, answered))
        unfinished = target.with_suffix(".unfinished")
        unfinished.write_bytes(lzma.compress(told.encode(), preset=9 | lzma.PRESET_EXTREME))
        unfinished.rename(target)
        shutil.rmtree(work)
    return lzma.open(target).read().count(b"\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="0:8", help="FROM:TO")
    parser.add_argument("--stories", type=int, default=STORIES)
    parser.add_argument("--dialogues", type=int, default=DIALOGUES)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="w8a8")
    given = parser.parse_args()
    begin, end = map(int, given.parts.split(":"))
    for part in range(begin, end):
        count = write_part(part, given.stories, given.dialogues, given.model, given.dtype)
        print(f"part {part}: {count} texts of {given.stories + given.dialogues}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
