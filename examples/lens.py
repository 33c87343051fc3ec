"""What a model would answer behind each of its layers (the logit lens)."""

from tinyserve import LLM

llm = LLM("smollm2-135m")
told = llm.explain("The capital of France is")
names = ["embedding", *(f"layer {i}" for i in range(len(told.layers)))]
for name, norm, row in zip(names, told.norms(), told.lens(), strict=True):
    words = ", ".join(f"{guess.text!r} {guess.probability:.0%}" for guess in told.guesses(row, 3))
    print(f"{name:>10} {norm:8.1f}  {words}")
