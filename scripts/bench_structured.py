"""What a structure costs: a batch decoded with a JSON schema and without, in turn, the same prompts and lengths.

python scripts/bench_structured.py --batch 8 --rounds 3
"""

import argparse
import statistics

from tinyserve import LLM, SamplingParams, StructuredOutputs

# Long enough that no answer ends before its tokens are used up.
SCHEMA = {
    "type": "array",
    "minItems": 40,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 5, "maxLength": 40},
            "kind": {"enum": ["city", "river", "mountain"]},
            "size": {"type": "integer", "minimum": 0, "maximum": 9999},
        },
        "required": ["name", "kind", "size"],
        "additionalProperties": False,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3, help="that count; one more comes first (default: 3)")
    arguments = parser.parse_args()
    llm = LLM(arguments.model, dtype=arguments.dtype, max_model_len=1024, max_num_seqs=arguments.batch)
    places = ["France", "Italy", "Norway", "Japan", "Peru", "Kenya", "Canada", "India"]
    conversations = [
        [{"role": "user", "content": f"List places in {places[i % len(places)]}, part {i}."}]
        for i in range(arguments.batch)
    ]
    free = SamplingParams(temperature=0, max_tokens=arguments.tokens, ignore_eos=True)
    structured = SamplingParams(
        temperature=0, max_tokens=arguments.tokens, structured_outputs=StructuredOutputs(json=SCHEMA)
    )
    rates: dict[SamplingParams, list[float]] = {free: [], structured: []}
    for round_ in range(arguments.rounds + 1):
        for params, kept in rates.items():
            outputs = llm.chat(conversations, params)
            times = [output.metrics.token_times for output in outputs]
            if any(len(one) != arguments.tokens for one in times):
                raise SystemExit("An answer ended early: its batch was not full.")
            # From when all decode to the first that has ended.
            start, end = max(one[0] for one in times), min(one[-1] for one in times)
            tokens = sum(start < time <= end for one in times for time in one)
            if round_:
                kept.append(tokens / (end - start))
    ratios = sorted(b / a for a, b in zip(*rates.values(), strict=True))
    print(
        f"{arguments.batch} sequences, tokens/s: {statistics.median(rates[free]):.1f} free, "
        f"{statistics.median(rates[structured]):.1f} with a schema, {statistics.median(ratios):.3f} × "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
    )


if __name__ == "__main__":
    main()
