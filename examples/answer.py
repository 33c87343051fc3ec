"""Ask a model a question, and see what the answer cost."""

from tinyserve import LLM, SamplingParams

llm = LLM("smollm2-135m")
(output,) = llm.chat(
    [{"role": "user", "content": "What is the capital of France?"}],
    SamplingParams(temperature=0, max_tokens=32),
)
(answer,) = output.outputs
print(answer.text)
print(f"{len(output.prompt_token_ids)} tokens read, {len(answer.token_ids)} written, {answer.finish_reason}")
