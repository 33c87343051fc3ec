"""Print a story as it is written; leaving the loop early would cancel the rest."""

from tinyserve import LLM, SamplingParams

llm = LLM("smollm2-135m")
story = llm.stream("Once upon a time, a small ship", SamplingParams(temperature=0.8, seed=7, max_tokens=60))
for chunk in story:
    print(chunk, end="", flush=True)
print()
