"""What an answer must look like, under vLLM's names. Plain data: nothing here knows tokens, or how a grammar is run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyserve.errors import RequestError
from tinyserve.options import Options

KINDS = ("json", "regex", "choice", "grammar", "json_object")

# One space, or a new line and its indentation. JSON allows any amount, which small models take as an invitation to
# write blanks until their tokens are used up.
WHITESPACE = r" |\n {0,24}"


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs(Options):
    """Exactly one kind of structure. Raises RequestError, with the field, for what is none.

    json: a JSON schema: an object, its text, or a pydantic model's class.
    regex: the whole answer matches this (Rust's syntax: no look-around, no back-references).
    choice: the answer is one of these texts.
    grammar: a context-free grammar in llguidance's dialect of Lark; its first rule is `start`.
    json_object: True for any JSON object.
    """

    json: Any = None  # afterwards the schema's text
    regex: str | None = None
    choice: Sequence[str] | None = None  # afterwards a tuple
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        if self.json_object is not bool(self.json_object):
            raise RequestError(
                f"json_object is {self.json_object!r:.60}; it must be True or False.", param="json_object"
            )
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            have = f"{' and '.join(given)} are given" if given else "none is given"
            raise RequestError(f"Structured outputs take one of {', '.join(KINDS)}; {have}.", param=None)
        if self.json is not None:
            object.__setattr__(self, "json", json.dumps(schema_of(self.json), ensure_ascii=False))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        for name in ("regex", "grammar"):
            text = getattr(self, name)
            if text is not None and not (isinstance(text, str) and text.strip()):
                raise RequestError(f"{name} is {text!r:.60}; it must be text of at least one character.", param=name)

    @property
    def kind(self) -> str:
        """The name of the one field that is given."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False))


def schema_of(schema: Any, where: str = "json") -> dict[str, Any]:
    """A JSON schema as a dict of its own, from an object, its text, or a pydantic model's class."""
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        elif isinstance(schema, Mapping):
            schema = json.loads(json.dumps(dict(schema), allow_nan=False))
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"{where} is no JSON: {error}.", param=where) from None
    if not isinstance(schema, dict):
        raise RequestError(f"{where} is {schema!r:.60}; it must be a JSON schema: an object.", param=where)
    return schema


def with_options(schema: Mapping[str, Any], param: str = "structured_outputs") -> dict[str, Any]:
    """The schema as llguidance is to read it: little white space, and nothing it does not support passed over.

    A schema can ask for other white space with its own "x-guidance" (llguidance's docs/json_schema.md).
    Raises RequestError with this `param` where that is no object.
    """
    own = schema.get("x-guidance") or {}
    if not isinstance(own, Mapping):
        raise RequestError(f"json['x-guidance'] is {own!r:.60}; it must be an object.", param=param)
    spaced = {} if "whitespace_flexible" in own else {"whitespace_pattern": WHITESPACE}
    return {**schema, "x-guidance": {**spaced, **own, "lenient": False}}


def _choices(choice: Any) -> tuple[str, ...]:
    texts = () if isinstance(choice, str) or not isinstance(choice, Sequence) else tuple(choice)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise RequestError(
            f"choice is {choice!r:.60}; it must be a list of texts of at least one character.", param="choice"
        )
    return texts
