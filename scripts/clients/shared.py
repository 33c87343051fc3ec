"""What all libraries are asked: a question, a class for the answer, a tool, and a conversation that has used it."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Literal

from pydantic import BaseModel

# Of a call: what the server is to say, None for anything, and the call.
Calls = dict[str, tuple[str | None, Callable[[], Any]]]

SYSTEM = "You are a guide to cities."
ASK = "Which city is it, and is it sunny there?"
QUESTION: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ASK}]
# Of few values each, so that an answer of a model that knows nothing comes to its end.
CITY_JSON = '{"name": "Paris", "sunny": true}'


class City(BaseModel):
    """A city and its weather."""

    name: Literal["Paris", "Rome"]
    sunny: bool


class Trip(BaseModel):
    """Two cities, the second of which may be missing."""

    start: City
    end: City | None = None


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "Rome"]},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
            },
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Paris", "unit": "celsius"}'},
}
CONVERSATION: list[Any] = [
    *QUESTION,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny, 21 degrees"},
]


def get_weather(city: Literal["Paris", "Rome"], unit: Literal["celsius", "fahrenheit"] = "celsius") -> str:
    """The weather of a city."""
    return f"sunny in {city}, 21 {unit}"


def plain(run: Callable[[], Any]) -> tuple[None, Callable[[], Any]]:
    """A call that takes any answer."""
    return None, run


def drained(run: Callable[[], Any]) -> tuple[None, Callable[[], Any]]:
    """A call whose answer is a stream, read to its end."""
    return None, lambda: list(run())


def refused(run: Callable[[], Any]) -> tuple[None, Callable[[], Any]]:
    """A call that asks for what a server of texts does not have: its sentence is printed, and no failure."""

    def listen() -> None:
        try:
            run()
        except Exception as error:
            if getattr(error, "status_code", None) not in (400, 404):
                raise
            print(f"  refused: {error}")

    return None, listen


def awaited(run: Callable[[], Coroutine[Any, Any, Any]]) -> tuple[None, Callable[[], Any]]:
    """A call of a library's asynchronous half."""
    return None, lambda: asyncio.run(run())
