"""What speculative decoding gains where an answer repeats what was said, and costs elsewhere; with and without in turn.

python scripts/bench_speculation.py --dtype int8 --rounds 3
python scripts/bench_speculation.py --dtype float32 --draft-model smollm2-135m --draft-dtype w4a8

Without --draft-model the proposer is prompt lookup. SmolLM2-135M does not do as asked in "edit code": it writes two
functions of its own. In "copy code" it copies the file, and goes on.
"""

import argparse
import statistics

from tinyserve import LLM, SamplingParams

STORY = """\
The lighthouse on Gull Island was built in 1874 by a widow named Ingrid Holm, who had lost two sons to the rocks.
She paid for the lamp herself, by selling her farm and her late husband's fishing boat. For thirty-one years she
climbed the hundred and twelve steps each evening to light it. When the coast guard came to replace the lamp with a
newer one, she asked to keep the old glass, and she set it in the window of her kitchen. On clear nights, people
say, you can still see it from the harbour, a small yellow star under the great white one."""

CODE = '''def mean(values):
    """The mean of a list of numbers."""
    total = 0
    for value in values:
        total = total + value
    return total / len(values)


def variance(values):
    """The variance of a list of numbers."""
    center = mean(values)
    total = 0
    for value in values:
        total = total + (value - center) ** 2
    return total / len(values)
'''

PROMPTS = {
    "summarise and quote": f"Here is a text:\n\n{STORY}\n\nRepeat the text word for word, then say what it is about.",
    "edit code": f"Here is a Python file:\n\n{CODE}\nWrite the file again, with the name variance changed to var.",
    "copy code": f"Here is a Python file:\n\n{CODE}\nRepeat the file, and rename the variable total to result.",
    "free text": "Write a short story about a child who finds a door in an old tree, and what is behind it.",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--draft-model", help="a smaller model that drafts")
    parser.add_argument("--draft-dtype", help="what its weights are kept in (default: as --dtype)")
    parser.add_argument("--draft-tokens", type=int, help="at a time, at most")
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3, help="that count; one more comes first (default: 3)")
    arguments = parser.parse_args()
    options = {"dtype": arguments.dtype, "max_model_len": 2048, "max_num_seqs": 1}
    config = {"model": arguments.draft_model, "dtype": arguments.draft_dtype} if arguments.draft_model else {}
    if arguments.draft_tokens:
        config["num_speculative_tokens"] = arguments.draft_tokens
    plain = LLM(arguments.model, **options)
    drafting = LLM(arguments.model, **options, speculative_config=config)
    params = SamplingParams(temperature=0, max_tokens=arguments.tokens)
    print("| answer | tokens | plain, tokens/s | with drafts | ratio (lowest to highest) | draft tokens accepted |")
    print("|---|---:|---:|---:|---|---:|")
    for name, text in PROMPTS.items():
        messages = [{"role": "user", "content": text}]
        rates: dict[LLM, list[float]] = {plain: [], drafting: []}
        before = drafting.stats()
        for round_ in range(arguments.rounds + 1):
            answers = []
            for llm in (plain, drafting) if round_ % 2 else (drafting, plain):
                [output] = llm.chat(messages, params)
                answers.append(output.outputs[0].token_ids)
                if round_:
                    rates[llm].append(output.metrics.decode_tokens_per_second or 0.0)
            if answers[0] != answers[1]:
                raise SystemExit(f"{name}: draft tokens changed the answer, which must never happen.")
        after = drafting.stats()
        drafted, accepted = after.draft_tokens - before.draft_tokens, after.accepted_tokens - before.accepted_tokens
        ratios = sorted(b / a for a, b in zip(rates[plain], rates[drafting], strict=True))
        print(
            f"| {name} | {len(answers[0])} | {statistics.median(rates[plain]):.1f} "
            f"| {statistics.median(rates[drafting]):.1f} | **{statistics.median(ratios):.2f} ×** ({ratios[0]:.2f} to "
            f"{ratios[-1]:.2f}) | {accepted} of {drafted} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
