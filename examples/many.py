"""Answer many questions at once: they share steps of the engine, and the instructions they have in common."""

from tinyserve import LLM, SamplingParams

COUNTRIES = ["France", "Japan", "Italy", "Egypt", "Spain", "Norway", "Kenya", "Peru"]

llm = LLM("smollm2-135m", max_num_seqs=8)
asked = [[{"role": "user", "content": f"What is the capital of {country}?"}] for country in COUNTRIES]
outputs = llm.chat(asked, SamplingParams(temperature=0, max_tokens=32))
for country, output in zip(COUNTRIES, outputs, strict=True):
    print(f"{country}: {output.outputs[0].text}")
