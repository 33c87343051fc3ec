"""A JSON schema as the grammar compiler (llguidance) is to read it.

Knows JSON Schema's keywords; nothing of tokens, and not what an answer is for.
"""

import logging
from collections.abc import Mapping
from typing import Any

from tinyserve.errors import RequestError, did_you_mean

logger = logging.getLogger("tinyserve")

# One line, as json.dumps writes it. JSON allows any white space, which small models take as an invitation to write
# blanks until their tokens are used up.
ONE_LINE: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Those that are enforced. JSON Schema takes any other one for an annotation (2020-12, Validation, 7.2.3), and pydantic
# and OpenAPI write their own.
FORMATS = frozenset({
    "date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "unknown", "uri", "uuid",
})  # fmt: skip
# Where in a schema there are schemas: under any name, or as themselves or in a list.
_BY_NAME = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})
_MOST_REFS = 16  # one behind the other
_AS_THEY_ARE = frozenset({
    "additionalItems", "additionalProperties", "allOf", "anyOf", "contains", "else", "if", "items", "not", "oneOf",
    "prefixItems", "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties",
})  # fmt: skip


def with_options(schema: Mapping[str, Any], param: str = "structured_outputs") -> dict[str, Any]:
    """The schema as llguidance is to read it: JSON on one line, and nothing passed over that asserts anything.

    A schema can ask for other white space with its own "x-guidance" (llguidance's docs/json_schema.md).
    Raises RequestError with this `param` where that is no object.
    """
    own = schema.get("x-guidance") or {}
    if not isinstance(own, Mapping):
        raise RequestError(f"json['x-guidance'] is {own!r:.60}; it must be an object.", param=param)
    spaced = {} if own.keys() & {"whitespace_flexible", "whitespace_pattern"} else ONE_LINE
    schema = _without_other_formats(schema)
    return {**schema, "x-guidance": {**spaced, **own, "lenient": False}}


def _without_other_formats(schema: Any) -> Any:
    """The schema without formats that are no more than annotations; a name that looks like a slip is said."""
    if isinstance(schema, list):
        return [_without_other_formats(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept = {}
    for key, value in schema.items():
        if key == "format" and isinstance(value, str) and value not in FORMATS:
            if hint := did_you_mean(value, FORMATS, 0.75):
                logger.warning("A JSON schema has the format %.40r, which is not enforced.%s", value, hint)
        elif key in _BY_NAME and isinstance(value, Mapping):
            kept[key] = {name: _without_other_formats(one) for name, one in value.items()}
        else:
            kept[key] = _without_other_formats(value) if key in _AS_THEY_ARE else value
    return kept


def resolved(schema: Any, root: Any) -> Any:
    """The schema that a local `$ref` ("#/$defs/name") stands for in `root`; others are as they are."""
    for _ in range(_MOST_REFS):
        ref = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(ref, str) or not ref.startswith("#/"):
            break
        found = root
        for key in ref[2:].split("/"):
            found = found.get(key) if isinstance(found, Mapping) else None
        if found is None:
            break
        schema = found
    return schema


def types_of(schema: Any) -> set[str]:
    """The types that a schema takes, as far as it says: none where it does not."""
    if not isinstance(schema, Mapping):
        return set()
    if isinstance(kind := schema.get("type"), str | list):
        return {kind} if isinstance(kind, str) else set(map(str, kind))
    for one in ("anyOf", "oneOf"):
        if isinstance(members := schema.get(one), list):
            return {kind for member in members for kind in types_of(member) or {"other"}}
    if isinstance(values := schema.get("enum"), list):
        return {"string" if isinstance(value, str) else "other" for value in values}
    return {"other"} if schema.keys() & {"$ref", "allOf", "properties", "items"} else set()


def takes_text(schema: Any) -> bool:
    """Whether a schema takes text and nothing else, or does not say."""
    return types_of(schema) <= {"string"}
