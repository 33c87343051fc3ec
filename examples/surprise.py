"""How surprised a model is by each token of a text, in bits: a small test of what it knows."""

from math import log

from tinyserve import LLM, SamplingParams

llm = LLM("smollm2-135m")
for text in ("The capital of France is Paris.", "The capital of France is Oslo."):
    (output,) = llm.generate([text], SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert output.prompt_logprobs is not None
    print(text)
    for token, row in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        bits = -row[token].logprob / log(2)
        print(f"  {llm.tokenizer.text_of(token)!r:>12} {bits:5.1f} {'#' * round(bits)}")
