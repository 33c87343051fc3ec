"""Write the questions of tinyserve/evaluation/tasks/ that a rule makes, and each task's form for lm-evaluation-harness.

    python scripts/make_tasks.py            # writes arithmetic.jsonl, facts.jsonl and harness/*.yaml
    python scripts/make_tasks.py --check    # exits with 1 when one of them is stale

cloze.jsonl is written by hand. The same seed draws the same questions on any machine.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyserve.evaluation.tasks import TASKS, ExactMatch, Task

FOLDER = Path(__file__).parent.parent / "tinyserve" / "evaluation" / "tasks"
SEED = 1
OF_EACH_KIND = 20

ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

CAPITALS = {
    "Europe": "Austria Vienna, Belgium Brussels, Bulgaria Sofia, Czechia Prague, Denmark Copenhagen, Finland Helsinki, "
    "France Paris, Germany Berlin, Greece Athens, Hungary Budapest, Iceland Reykjavik, Ireland Dublin, Italy Rome, "
    "Norway Oslo, Poland Warsaw, Portugal Lisbon, Romania Bucharest, Serbia Belgrade, Spain Madrid, Sweden Stockholm, "
    "Switzerland Bern, Ukraine Kyiv",
    "Asia": "Afghanistan Kabul, Bangladesh Dhaka, China Beijing, India New Delhi, Indonesia Jakarta, Iran Tehran, "
    "Iraq Baghdad, Japan Tokyo, Jordan Amman, Lebanon Beirut, Nepal Kathmandu, Pakistan Islamabad, "
    "Thailand Bangkok, Turkey Ankara, Vietnam Hanoi",
    "Africa": "Algeria Algiers, Egypt Cairo, Ethiopia Addis Ababa, Ghana Accra, Kenya Nairobi, Libya Tripoli, "
    "Morocco Rabat, Nigeria Abuja, Rwanda Kigali, Senegal Dakar, Sudan Khartoum, Tunisia Tunis, Uganda Kampala, "
    "Zambia Lusaka, Zimbabwe Harare",
    "the Americas": "Argentina Buenos Aires, Brazil Brasília, Canada Ottawa, Chile Santiago, Colombia Bogotá, "
    "Cuba Havana, Ecuador Quito, Jamaica Kingston, Paraguay Asunción, Peru Lima, Uruguay Montevideo, Venezuela Caracas",
}


def arithmetic(random: random.Random) -> Iterator[dict[str, Any]]:
    """Sums and differences of numbers from 2 to 19, none negative, each asked once."""
    for plus in (True, False):
        for number, sign, equals in ((str, "+" if plus else "-", "="), (in_words, "plus" if plus else "minus", "is")):
            pairs = [(a, b) for a in range(2, 20) for b in range(2, 20) if plus or a >= b]
            for a, b in random.sample(pairs, OF_EACH_KIND):
                prompt = f"{number(a)} {sign} {number(b)} {equals}"
                yield {"prompt": prompt, "answer": number(a + b if plus else a - b)}


def in_words(number: int) -> str:
    """0 to 99 as English spells them."""
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens] + (f"-{ONES[ones]}" if ones else "")


def facts(random: random.Random) -> Iterator[dict[str, Any]]:
    """Each country's capital among three others of its continent."""
    for countries in CAPITALS.values():
        capitals = dict(entry.split(" ", 1) for entry in countries.split(", "))
        for country, capital in capitals.items():
            choices = [capital, *random.sample([other for other in capitals.values() if other != capital], 3)]
            random.shuffle(choices)
            prompt = f"The capital of {country} is"
            yield {"prompt": prompt, "choices": choices, "answer": choices.index(capital)}


def harness(task: Task) -> str:
    """A task's configuration for lm-evaluation-harness, in YAML."""
    lines = [
        "# Written by scripts/make_tasks.py; do not edit.",
        f"task: tinyserve_{task.name}",
        "custom_dataset: !function items.load",
        "dataset_kwargs:",
        f"  task: {task.name}",
        "test_split: test",
    ]
    if isinstance(task, ExactMatch):
        lines += [
            "output_type: generate_until",
            f"doc_to_text: {json.dumps(task.examples + '{{prompt}}')}",
            'doc_to_target: "{{answer}}"',
            "generation_kwargs:",
            f"  until: {json.dumps(task.stop)}",
            f"  max_gen_toks: {task.max_tokens}",
            "  do_sample: false",
            "filter_list:",
            "  - name: stripped",
            "    filter:",
            "      - function: regex",
            r"        regex_pattern: '^\s*(.*?)\s*$'",
            "      - function: take_first",
        ]
        metrics = ["exact_match"]
    else:
        lines += ["output_type: multiple_choice", "doc_to_text: prompt", "doc_to_choice: choices"]
        lines += ["doc_to_target: answer"]
        metrics = ["acc", "acc_norm"]
    lines.append("metric_list:")
    for metric in metrics:
        lines += [f"  - metric: {metric}", "    aggregation: mean", "    higher_is_better: true"]
    return "\n".join(lines) + "\n"


def wanted() -> dict[Path, str]:
    """Every file that is made, with what it should hold."""
    pages = {FOLDER / "harness" / f"{task.name}.yaml": harness(task) for task in TASKS.values()}
    for make in (arithmetic, facts):
        items = make(random.Random(SEED))
        pages[FOLDER / f"{make.__name__}.jsonl"] = "".join(f"{json.dumps(i, ensure_ascii=False)}\n" for i in items)
    return pages


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a file is stale")
    check = parser.parse_args().check
    stale = [path for path, text in wanted().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if check:
            print(f"{path} is stale: run python scripts/make_tasks.py", file=sys.stderr)
        else:
            path.write_text(wanted()[path], encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
