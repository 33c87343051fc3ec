"""Ten JSON schemas, each with a question that it answers, and instances that do not match: structure is tested on them.

Everything is bounded, so that any answer ends: a text without `maxLength` may go on until the tokens are used up.
"""

from typing import Any, NamedTuple


class Case(NamedTuple):
    """A schema, a prompt for a real model, and instances that the schema refuses."""

    schema: dict[str, Any]
    prompt: str
    refused: list[Any]


def _object(**properties: Any) -> dict[str, Any]:
    """An object with exactly these properties, all required."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_TEXT = {"type": "string", "minLength": 1, "maxLength": 24}

CASES = {
    "nested objects": Case(
        _object(
            name=_TEXT,
            address=_object(street=_TEXT, city=_TEXT, position=_object(north={"type": "boolean"}, zone=_TEXT)),
        ),
        "Describe a person called Anna Berg, who lives in Oslo, with her address.",
        [{"name": "a", "address": {}}, {"name": "a"}],
    ),
    "enums": Case(
        _object(colour={"enum": ["red", "green", "blue"]}, size={"enum": [1, 2.5, None, "huge"]}),
        "Which colour has grass, and how large is it?",
        [{"colour": "pink", "size": 1}, {"colour": "red", "size": 2}],
    ),
    "arrays with bounds": Case(
        _object(
            fruits={"type": "array", "items": _TEXT, "minItems": 2, "maxItems": 4},
            grid={
                "type": "array",
                "items": {"type": "array", "items": {"enum": [0, 1]}, "minItems": 2, "maxItems": 2},
                "maxItems": 3,
            },
            pair={"type": "array", "prefixItems": [{"type": "boolean"}, _TEXT], "items": False, "minItems": 2},
        ),
        "List three fruits.",
        [
            {"fruits": ["a"], "grid": [], "pair": [True, "a"]},
            {"fruits": ["a", "b"], "grid": [[0]], "pair": [True, "a"]},
        ],
    ),
    "unicode strings": Case(
        _object(
            greeting={"enum": ["你好", "Grüße", "👋🏽", "नमस्ते", 'a "quoted" \\ text\n']},
            words={"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 3},
        ),
        "Greet me in Chinese, and write three Japanese words.",
        [{"greeting": "Hello", "words": ["é"]}, {"greeting": "你好", "words": ["é" * 13]}],
    ),
    "numbers with ranges": Case(
        _object(
            age={"type": "integer", "minimum": 0, "maximum": 150},
            below={"type": "integer", "exclusiveMinimum": -20, "exclusiveMaximum": 3},
            even={"type": "integer", "minimum": 10, "maximum": 400, "multipleOf": 2},
        ),
        "How old is a person who is eighteen?",
        [{"age": 151, "below": 0, "even": 10}, {"age": 1, "below": 3, "even": 10}, {"age": 1, "below": 0, "even": 11}],
    ),
    "anyOf and oneOf": Case(
        _object(
            id={"oneOf": [{"type": "integer", "minimum": 1, "maximum": 999}, {"type": "string", "maxLength": 8}]},
            shape={
                "anyOf": [
                    _object(kind={"const": "circle"}, radius={"type": "integer", "minimum": 1, "maximum": 99}),
                    _object(kind={"const": "square"}, side={"type": "integer", "minimum": 1, "maximum": 99}),
                ]
            },
        ),
        "Describe a circle with the radius 5 and the id 12.",
        [{"id": None, "shape": {"kind": "circle", "radius": 1}}, {"id": 1, "shape": {"kind": "circle", "side": 1}}],
    ),
    "references": Case(
        {
            "$defs": {
                "leaf": _object(value={"type": "boolean"}),
                "branch": _object(left={"$ref": "#/$defs/leaf"}, right={"$ref": "#/$defs/leaf"}),
            },
            **_object(tree={"$ref": "#/$defs/branch"}, other={"$ref": "#/$defs/leaf"}),
        },
        "Draw a small tree of true and false.",
        [{"tree": {"value": True}, "other": {"value": True}}],
    ),
    "patterns": Case(
        _object(
            phone={"type": "string", "pattern": "^\\+[1-9][0-9]{1,3} [0-9]{4,8}$"},
            code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
            day={"type": "string", "format": "date"},
        ),
        "Give me a phone number, a code like AB-123, and a date.",
        [{"phone": "1", "code": "AB-123", "day": "2024-01-01"}, {"phone": "+49 12345", "code": "ab-1", "day": "x"}],
    ),
    "constants": Case(
        _object(version={"const": 2}, type={"const": "résumé"}, nothing={"type": "null"}, flags={"const": [True, {}]}),
        "Write the header of a document.",
        [{"version": 1, "type": "résumé", "nothing": None, "flags": [True, {}]}],
    ),
    "optional fields": Case(
        {
            "type": "object",
            "properties": {
                "title": _TEXT,
                "subtitle": _TEXT,
                "year": {"type": ["integer", "null"], "minimum": 1900, "maximum": 2100},
                "tags": {"type": "array", "items": {"enum": ["new", "old"]}, "maxItems": 2},
            },
            "required": ["title"],
            "additionalProperties": False,
        },
        "Name a book, and when it appeared.",
        [{"subtitle": "a"}, {"title": "a", "pages": 1}],
    ),
}
