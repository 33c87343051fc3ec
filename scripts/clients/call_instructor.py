"""The calls of instructor: answers as classes, in each of its ways to ask for them."""

from collections.abc import Iterable
from typing import Any

import instructor
import openai

from clients.shared import CITY_JSON, QUESTION, Calls, City, Trip, plain


def calls(url: str, model: str) -> Calls:
    """Every call by name; none is made yet."""

    def create(mode: instructor.Mode, kind: Any = City, how: str = "create", **options: Any) -> Any:
        client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="none", max_retries=0), mode=mode)
        return getattr(client, how)(model=model, messages=QUESTION, response_model=kind, max_retries=0, **options)

    modes = instructor.Mode
    return {
        "tools": plain(lambda: create(modes.TOOLS)),
        "tools, nested": plain(lambda: create(modes.TOOLS, Trip, temperature=0.7, seed=7)),
        "strict tools": plain(lambda: create(modes.TOOLS_STRICT)),
        "several tools": plain(lambda: list(create(modes.PARALLEL_TOOLS, Iterable[City]))),
        "JSON": (CITY_JSON, lambda: create(modes.JSON)),
        "a schema": plain(lambda: create(modes.JSON_SCHEMA)),
        "JSON in Markdown": (f"```json\n{CITY_JSON}\n```", lambda: create(modes.MD_JSON)),
        "partial": plain(lambda: list(create(modes.TOOLS, City, "create_partial"))),
        "a list": plain(lambda: list(create(modes.TOOLS, City, "create_iterable"))),
        "text": plain(lambda: create(modes.TOOLS, None)),
    }
