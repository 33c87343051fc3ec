"""The calls of DSPy: signatures in its adapters' forms, tools, and plain prompts."""

from typing import Any

import dspy

from clients.shared import ASK, CITY_JSON, Calls, City, get_weather, plain


class Guess(dspy.Signature):
    """Say which city it is."""

    question: str = dspy.InputField()
    city: City = dspy.OutputField()


def _said(**fields: str) -> str:
    """An answer as DSPy's chat adapter reads it."""
    return "".join(f"[[ ## {name} ## ]]\n{value}\n\n" for name, value in (fields | {"completed": ""}).items())


def calls(url: str, model: str) -> Calls:
    """Every call by name; none is made yet."""

    def lm(**options: Any) -> dspy.LM:
        return dspy.LM(f"openai/{model}", api_base=url, api_key="none", cache=False, num_retries=0, **options)

    def ask(module: Any, adapter: Any = None, **options: Any) -> Any:
        with dspy.context(lm=lm(**options), adapter=adapter or dspy.ChatAdapter()):
            return module(question=ASK)

    everything: dict[str, Any] = {
        "temperature": 0.7,
        "max_tokens": 300,
        "stop": ["END"],
        "seed": 7,
        "top_p": 0.9,
        "n": 2,
    }
    answer = _said(answer="Paris")
    return {
        "a prompt": plain(lambda: lm()(ASK)),
        "messages": plain(lambda: lm(max_tokens=8)(messages=[{"role": "user", "content": ASK}])),
        "predict": (answer, lambda: ask(dspy.Predict("question -> answer"))),
        "predict with everything": (answer, lambda: ask(dspy.Predict("question -> answer"), **everything)),
        "reason": (_said(reasoning="So.", answer="Paris"), lambda: ask(dspy.ChainOfThought("question -> answer"))),
        "a class": (_said(city=CITY_JSON), lambda: ask(dspy.Predict(Guess))),
        "a class in JSON": (f'{{"city": {CITY_JSON}}}', lambda: ask(dspy.Predict(Guess), dspy.JSONAdapter())),
        "tools as text": (
            _said(next_thought="Done.", next_tool_name="finish", next_tool_args="{}", reasoning="So.", answer="Paris"),
            lambda: ask(dspy.ReAct("question -> answer", tools=[get_weather], max_iters=1)),
        ),
        "completion": (answer, lambda: ask(dspy.Predict("question -> answer"), model_type="text")),
        "embeddings": plain(
            lambda: dspy.Embedder(f"openai/{model}", api_base=url, api_key="none", caching=False)(["Paris", "Rome"])
        ),
    }
