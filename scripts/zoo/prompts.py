"""What SmolLM2 is asked to write for the zoo: the rest of stories whose beginnings are given, and answers for children.

Everything follows from the number of a text, so that any part can be written again.
"""

import random
import tomllib
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m"


def parted(text: str) -> list[str]:
    """Phrases that semicolons part, or else words."""
    return [part.strip() for part in text.split(";")] if ";" in text else text.split()


_FILE = tomllib.loads((Path(__file__).parent / "words.toml").read_text(encoding="utf-8"))
WORDS = {name: parted(text) for name, text in _FILE.items() if isinstance(text, str)}


def article(word: str) -> str:
    """A word with "a" or "an" before it."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


QUESTIONS = [
    question.format(it=word, a_it=article(word))
    for group in _FILE["questions"]
    for word in parted(group["of"])
    for question in (parted(group["ask"]) if ";" in group["ask"] else [group["ask"]])
]


SHOWN = "".join(
    f"Question: {question}?\nAnswer: {answer}\n\n"
    for question, answer in (shown.split("? ", 1) for shown in WORDS["answers"])
)


def story(number: int) -> dict[str, Any]:
    """A line of a batch that asks for the rest of a story."""
    draw = random.Random(f"story {number}")
    who = draw.choice(WORDS["animals" if draw.random() < 0.65 else "people"])
    name, friend = draw.sample(WORDS["names"], 2)
    kind, thing, verb, place = (draw.choice(WORDS[words]) for words in ("kinds", "things", "verbs", "places"))
    drawn = {"who": who, "name": name, "friend": friend, "kind": kind, "thing": thing, "verb": verb, "place": place}
    drawn |= {"a_kind": article(kind), "a_thing": article(thing), "place_first": place[0].upper() + place[1:]}
    opening = draw.choice(WORDS["openings"]).format(**drawn)
    end = "It should have a happy end." if draw.random() < 0.5 else f"It teaches that {draw.choice(WORDS['morals'])}."
    wanted = draw.choice(WORDS["requests"]).format(**drawn, end=end)
    body = {
        "messages": [{"role": "user", "content": wanted}, {"role": "assistant", "content": opening}],
        "continue_final_message": True, "add_generation_prompt": False,
        "max_tokens": 330, "temperature": 0.6, "top_p": 0.92, "repetition_penalty": 1.1,
    }  # fmt: skip
    return _line(f"story-{number}", "/v1/chat/completions", body, draw)


def dialogue(number: int) -> dict[str, Any]:
    """A line of a batch that asks a child's question, which its id tells again."""
    draw = random.Random(f"dialogue {number}")
    question = draw.choice(QUESTIONS)
    prompt = f"Short and true answers to questions of children.\n\n{SHOWN}Question: {question}\nAnswer:"
    body = {"prompt": prompt, "max_tokens": 50, "temperature": 0.4, "top_p": 0.9, "stop": ["\n"]}
    return _line(f"dialogue-{number} {question}", "/v1/completions", body, draw)


def _line(name: str, url: str, body: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    body = {"model": MODEL, **body, "seed": draw.randrange(1 << 31)}
    return {"custom_id": name, "method": "POST", "url": url, "body": body}
