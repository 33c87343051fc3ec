"""The calls of Pydantic AI's agents over chat completions; its default, the Responses API, is not built."""

from typing import Any

from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIChatModelSettings, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from clients.shared import ASK, CITY_JSON, SYSTEM, Calls, City, awaited, get_weather, plain, refused


def calls(url: str, model: str) -> Calls:
    """Every call by name; none is made yet."""

    def agent(output: Any = str, settings: Any = None, **options: Any) -> Any:
        llm = OpenAIChatModel(model, provider=OpenAIProvider(base_url=url, api_key="none"))
        return Agent(llm, instructions=SYSTEM, output_type=output, model_settings=settings, retries=0, **options)

    everything = OpenAIChatModelSettings(
        max_tokens=8, temperature=0.7, top_p=0.9, seed=7, stop_sequences=["END"], presence_penalty=0.1,
        frequency_penalty=0.1, logit_bias={"5": -1}, parallel_tool_calls=True, openai_reasoning_effort="low",
        openai_logprobs=True, openai_top_logprobs=2, openai_user="me", openai_service_tier="auto", openai_store=False,
        extra_body={"top_k": 5},
    )  # fmt: skip

    async def stream(**options: Any) -> None:
        async with agent(**options).run_stream(ASK) as result:
            async for _ in result.stream_output() if "output" in options else result.stream_text():
                pass

    def again() -> None:
        first = agent(tools=[get_weather]).run_sync(ASK)
        agent(tools=[get_weather]).run_sync("And Rome?", message_history=first.all_messages())

    def responses() -> None:
        Agent(OpenAIResponsesModel(model, provider=OpenAIProvider(base_url=url, api_key="none"))).run_sync(ASK)

    return {
        "run": plain(lambda: agent().run_sync(ASK)),
        "run with everything": plain(lambda: agent(settings=everything).run_sync(ASK)),
        "stream": awaited(stream),
        "tools": plain(lambda: agent(tools=[get_weather]).run_sync(ASK)),
        "streamed tools": awaited(lambda: stream(tools=[get_weather])),
        "a conversation goes on": plain(again),
        "output by a tool": plain(lambda: agent(City).run_sync(ASK)),
        "streamed output by a tool": awaited(lambda: stream(output=City)),
        "output by a tool, or text": plain(lambda: agent([ToolOutput(City), str]).run_sync(ASK)),
        "output by a tool, with tools": plain(lambda: agent(City, tools=[get_weather]).run_sync(ASK)),
        "output by a schema": plain(lambda: agent(NativeOutput(City)).run_sync(ASK)),
        "output as prompted": (CITY_JSON, lambda: agent(PromptedOutput(City)).run_sync(ASK)),
        "the Responses API": refused(responses),
    }
