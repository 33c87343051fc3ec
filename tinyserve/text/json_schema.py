"""A JSON schema as the grammar compiler (llguidance) is to read it.

Knows JSON Schema's keywords; nothing of tokens, and not what an answer is for.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard
from urllib.parse import urljoin

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
# llguidance reads every number as a float: another one could be answered than was asked for. A bound that is no float
# is moved inwards to the next, as every answer within that is within what was asked, too.
EXACT = 1 << 53
_BASE = "http://json-schema/"  # of a schema that has no $id
_NEAR = 1e-9  # a number that is left out with its neighbours as near as this
LARGEST = (1 << 63) - 1024  # the largest float that its integers hold
_LOWER, _UPPER = frozenset({"minimum", "exclusiveMinimum"}), frozenset({"maximum", "exclusiveMaximum"})
_MOST_REFS = 16  # one behind the other
# Where in a schema there are schemas: under any name, or as themselves or in a list.
_BY_NAME = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})
_AS_THEY_ARE = frozenset({
    "additionalItems", "additionalProperties", "allOf", "anyOf", "contains", "else", "if", "items", "not", "oneOf",
    "prefixItems", "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties",
})  # fmt: skip


def with_options(schema: Mapping[str, Any], param: str = "structured_outputs") -> dict[str, Any]:
    """The schema as llguidance is to read it: JSON on one line, and nothing passed over that asserts anything.

    A schema can ask for other white space with its own "x-guidance" (llguidance's docs/json_schema.md).
    Raises RequestError with this `param` where that is no object, and for numbers that cannot be held exactly.
    """
    own = schema.get("x-guidance") or {}
    if not isinstance(own, Mapping):
        raise RequestError(f"json['x-guidance'] is {own!r:.60}; it must be an object.", param=param)
    root = urljoin(_BASE, _id_of(schema))
    if any(urljoin(root, name).partition("#")[0] == root.partition("#")[0] for name in _ids_within(schema)):
        # llguidance would take the inner schema for the whole one.
        raise RequestError("json has an inner schema with the $id of the whole: give it another, or none.", param=param)
    spaced = {} if own.keys() & {"whitespace_flexible", "whitespace_pattern"} else ONE_LINE
    return {**_readable(schema, param), "x-guidance": {**spaced, **own, "lenient": False}}


def _id_of(schema: Mapping[str, Any]) -> str:
    return schema["$id"] if isinstance(schema.get("$id"), str) else ""


def _ids_within(value: Any, is_root: bool = True) -> Iterator[str]:
    """The $id of each schema inside another."""
    if isinstance(value, Mapping):
        if not is_root and isinstance(value.get("$id"), str):
            yield _id_of(value)
        for one in value.values():
            yield from _ids_within(one, False)
    elif isinstance(value, list):
        for one in value:
            yield from _ids_within(one, False)


def _readable(schema: Any, param: str) -> Any:
    """The schema without formats that are no more than annotations, and with numbers that are read as they are meant.

    A format's name that looks like a slip is said.
    """
    if isinstance(schema, list):
        return [_readable(one, param) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    if isinstance(schema.get("items"), list) and "prefixItems" in schema:  # of which one would be passed over
        raise RequestError("json has a list of items beside prefixItems, which mean the same: give one.", param=param)
    kept = {}
    for key, value in schema.items():
        if key == "format" and isinstance(value, str) and value not in FORMATS:
            if hint := did_you_mean(value, FORMATS, 0.75):
                logger.warning("A JSON schema has the format %.40r, which is not enforced.%s", value, hint)
        elif key in _BY_NAME and isinstance(value, Mapping):
            kept[key] = {name: _readable(one, param) for name, one in value.items()}
        elif key in ("enum", "const"):
            _check_exact(value, key, param)
            kept[key] = value
        elif key in _LOWER | _UPPER:
            kept[key] = _bound(value, key, param)
        else:
            kept[key] = _readable(value, param) if key in _AS_THEY_ARE else value
    return _without_near_exclusions(kept)


def _is_large(value: Any) -> bool:
    """Whether it is a whole number of which a float does not hold every neighbour."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole and not -EXACT <= value <= EXACT


def _check_exact(value: Any, key: str, param: str) -> None:
    """Raise RequestError for a number in a constant that would come back as another one."""
    if isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            _check_exact(one, key, param)
    elif _is_large(value):
        raise RequestError(
            f"json has the number {_shown(value)} in {key}, and whole numbers beyond {EXACT} are not held exactly: "
            "write it as a text, or let the type be integer.",
            param=param,
        )


def _bound(value: Any, key: str, param: str) -> Any:
    """A bound as a number that a float holds, and no wider."""
    if not _is_large(value):
        return 0 if value == 0 and not isinstance(value, bool) else value  # -0.0 is below 0 to llguidance
    up = key in _LOWER
    if value > LARGEST if up else value < -LARGEST:
        raise RequestError(
            f"json has the number {_shown(value)} as {key}, and no whole number beyond {LARGEST} is ever answered.",
            param=param,
        )
    within = max(-LARGEST, min(LARGEST, value))
    nearest = int(float(within))
    if nearest < within if up else nearest > within:
        nearest = int(math.nextafter(nearest, math.inf if up else -math.inf))
    return nearest


def _without_near_exclusions(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with another bound in place of a whole number that is excluded within 1 of the bound opposite.

    llguidance takes that number for one of those between them: 0 for above 0 and at most 0.5.
    """
    for excluded, bound, opposite, sign in (
        ("exclusiveMinimum", "minimum", _UPPER, 1),
        ("exclusiveMaximum", "maximum", _LOWER, -1),
    ):
        at = schema.get(excluded)
        if not _is_number(at) or at % 1:
            continue
        gaps = [(schema[key] - at) * sign for key in opposite & schema.keys() if _is_number(schema[key])]
        if gaps and 0 < min(gaps) < 1:
            inward = at + sign * min(_NEAR, min(gaps) / 1000)
            given = schema.get(bound, inward)
            within = max(inward * sign, given * sign) * sign if _is_number(given) else given
            schema = {key: value for key, value in schema.items() if key != excluded} | {bound: within}
    return schema


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: float) -> str:
    """A number of few digits."""
    return f"{value:g}" if isinstance(value, float) else str(value) if abs(value) < 10**40 else "of more than 40 digits"


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
