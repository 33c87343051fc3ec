"""A structure is exactly one of its kinds, as plain data; what is none names its field."""

import json
import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from tinyserve.errors import RequestError
from tinyserve.sampling_params import StructuredOutputs
from tinyserve.text.json_schema import FORMATS, LARGEST, ONE_LINE, with_options

pytestmark = pytest.mark.fast

SCHEMA = {"type": "object", "properties": {"ü": {"const": 1}, "a": {}}}


class Model:
    """What a pydantic model's class looks like from here."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return SCHEMA


@pytest.mark.parametrize("given", [SCHEMA, json.dumps(SCHEMA)])
def test_a_schema_is_kept_as_text_in_its_order(given: Any) -> None:
    spec = StructuredOutputs(json=given)
    assert spec.json == '{"type": "object", "properties": {"ü": {"const": 1}, "a": {}}}'
    assert spec.kind == "json" and spec == StructuredOutputs(json=SCHEMA) and hash(spec) == hash(spec)


def test_a_class_has_its_own_fields_and_no_others() -> None:
    assert StructuredOutputs(json=Model) == StructuredOutputs(json={**SCHEMA, "additionalProperties": False})
    assert "additionalProperties" not in SCHEMA

    class Inner(BaseModel):
        a: int

    class Open(BaseModel):
        model_config = ConfigDict(extra="allow")
        inner: list[Inner]

    class Outer(BaseModel):
        inner: Inner
        open: Open
        map: dict[str, int]

    schema = json.loads(StructuredOutputs(json=Outer).json)
    assert schema["additionalProperties"] is False and schema["$defs"]["Inner"]["additionalProperties"] is False
    assert schema["$defs"]["Open"]["additionalProperties"] is True
    assert schema["properties"]["map"]["additionalProperties"] == {"type": "integer"}


def test_kinds() -> None:
    assert StructuredOutputs(choice=["a", "b"]).choice == ("a", "b")
    specs = (
        StructuredOutputs(regex="a"), StructuredOutputs(grammar="start: a"), StructuredOutputs(json_object=True),
        StructuredOutputs(choice=["a"]), StructuredOutputs(json={}),
    )  # fmt: skip
    assert [spec.kind for spec in specs] == ["regex", "grammar", "json_object", "choice", "json"]
    assert len(set(specs)) == 5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "Structured outputs take one of json, regex, choice, grammar, json_object; none is given."),
        ({"json_object": False}, "none is given."),
        ({"json": {}, "regex": "a"}, "json and regex are given."),
        ({"regex": "a", "choice": ["a"], "json_object": True}, "regex and choice and json_object are given."),
        ({"jsn": {}}, "StructuredOutputs has no option 'jsn'. Did you mean 'json'?"),
        ({"json": "{"}, "json is no JSON: Expecting property name"),
        ({"json": "true"}, "json is True; it must be a JSON schema: an object."),
        ({"json": 3}, "json is 3; it must be a JSON schema: an object."),
        ({"json": {"const": float("nan")}}, "json is no JSON: Out of range float values"),
        ({"json": {"const": {1}}}, "json is no JSON: Object of type set is not JSON serializable."),
        ({"regex": ""}, "regex is ''; it must be text of at least one character."),
        ({"regex": 3}, "regex is 3; it must be text"),
        ({"grammar": " "}, "grammar is ' '; it must be text"),
        ({"choice": []}, "choice is []; it must be a list of texts of at least one character."),
        ({"choice": "yes"}, "choice is 'yes'; it must be a list"),
        ({"choice": ["a", ""]}, "choice is ['a', '']; it must be a list"),
        ({"choice": ["a", 1]}, "choice is ['a', 1]; it must be a list"),
        ({"choice": {"a"}}, "choice is {'a'}; it must be a list"),
        ({"json_object": 1}, "json_object is 1; it must be True or False."),
    ],
)
def test_what_is_no_structure_names_its_field(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError) as error:
        StructuredOutputs(**options)
    assert sentence in str(error.value) and error.value.param


def test_a_schema_without_end_is_refused() -> None:
    endless: dict[str, Any] = {}
    endless["not"] = endless
    with pytest.raises(RequestError, match="json is no JSON: Circular reference"):
        StructuredOutputs(json=endless)


def test_a_schema_chooses_its_white_space_but_not_to_be_ignored() -> None:
    assert with_options({})["x-guidance"] == {**ONE_LINE, "lenient": False}
    own = with_options({"x-guidance": {"whitespace_flexible": False, "lenient": True}})
    assert own["x-guidance"] == {"whitespace_flexible": False, "lenient": False}
    with pytest.raises(RequestError, match=r"json\['x-guidance'\] is 'no'; it must be an object"):
        with_options({"x-guidance": "no"})


@pytest.mark.parametrize(
    "schema",
    [
        {"const": 2**53 + 1},
        {"enum": ["a", 123456789012345678]},
        {"const": {"a": [0, -(10**30)]}},
        {"properties": {"a": {"items": {"anyOf": [{"enum": [1e22]}]}}}},
        {"$defs": {"d": {"const": 10**400}}},
    ],
)
def test_a_constant_that_would_be_answered_as_another_number_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="whole numbers beyond 9007199254740992 are not held exactly") as error:
        with_options(schema, "tools")
    assert error.value.param == "tools" and len(str(error.value)) < 300


def test_constants_that_are_exact_and_names_that_look_like_bounds_stay() -> None:
    for schema in (
        {"const": [2**53, -(2**53), 0.1, 1e-320, True, None, "9007199254740993"]},
        {"properties": {"const": {"type": "integer"}, "minimum": {"maximum": 5}}},
        {"default": 2**60, "examples": [2**60], "minimum": "x", "exclusiveMinimum": True, "maximum": 0.5},
    ):
        assert with_options(schema) == {**schema, "x-guidance": {**ONE_LINE, "lenient": False}}


@pytest.mark.parametrize(
    ("bound", "given", "read"),
    [
        ("minimum", 2**53 + 1, 2**53 + 2),
        ("exclusiveMinimum", 2**53 + 1, 2**53 + 2),
        ("maximum", 2**53 + 1, 2**53),
        ("maximum", 2**53 + 3, 2**53 + 2),
        ("exclusiveMaximum", -(2**53) - 1, -(2**53) - 2),
        ("minimum", -(2**53) - 1, -(2**53)),
        ("minimum", -(2**63), -LARGEST),
        ("maximum", 2**63 - 1, LARGEST),
        ("maximum", 2**64, LARGEST),
        ("maximum", 1e300, LARGEST),
        ("maximum", 2**53, 2**53),
        ("minimum", 0.1, 0.1),
        ("exclusiveMinimum", -0.0, 0),
    ],
)
def test_a_bound_is_read_as_a_number_that_is_held_and_never_wider(bound: str, given: float, read: float) -> None:
    found = with_options({"properties": {"a": {bound: given}}})["properties"]["a"][bound]
    assert repr(found) == repr(read) and float(found) == found
    assert found >= given if "inimum" in bound else found <= given


@pytest.mark.parametrize(("bound", "value"), [("minimum", 2**63), ("exclusiveMinimum", 1e30), ("maximum", -(2**64))])
def test_a_bound_beyond_all_answers_is_refused(bound: str, value: float) -> None:
    with pytest.raises(RequestError, match=f"as {bound}, and no whole number beyond {LARGEST} is ever answered"):
        with_options({bound: value})


@pytest.mark.parametrize(
    ("outer", "inner"),
    [(None, ""), (None, "#"), (None, "./"), ("http://x/a", "a"), ("http://x/a", "http://x/a#"), ("a", "a"), ("a", "")],
)
def test_an_inner_schema_that_is_named_as_the_whole_is_refused(outer: str | None, inner: str) -> None:
    """It would take its place: anything of it would be an answer."""
    named = {"$id": outer} if outer is not None else {}
    for place in ({"$defs": {"d": {"$id": inner}}}, {"anyOf": [{"items": {"$id": inner}}, {"type": "null"}]}):
        with pytest.raises(RequestError, match=r"an inner schema with the \$id of the whole"):
            with_options({**named, **place})


def test_one_of_two_ways_to_say_the_same_is_not_passed_over() -> None:
    with pytest.raises(RequestError, match="a list of items beside prefixItems"):
        with_options({"anyOf": [{"items": [], "prefixItems": [{"type": "object"}]}]})
    for schema in ({"items": [{"type": "null"}]}, {"items": False, "prefixItems": [{}]}, {"properties": {"items": {}}}):
        assert with_options(schema).items() >= schema.items()


def test_other_names_of_schemas_stay() -> None:
    inner = {"$defs": {"d": {"$id": "node", "properties": {"$id": {"type": "string"}}}}}
    for schema in (inner, {"$id": "http://x/a", **inner}, {"$id": ""}):
        assert with_options(schema).items() >= schema.items()


@pytest.mark.parametrize("kind", ["json", "regex", "grammar", "choice"])
def test_half_a_character_is_refused(kind: str) -> None:
    text: Any = {"json": {"properties": {"a\ud83d": {}}}, "choice": ["b", "a\udfff"]}.get(kind, 'start: "\ud800"')
    with pytest.raises(RequestError, match=rf"^{kind} has the lone surrogate U\+D[8F]\w\w, which is no ch") as error:
        StructuredOutputs(**{kind: text})
    assert error.value.param == kind


@pytest.mark.parametrize("name", ["password", "path", "binary", "byte", "int64", "uri-reference", "foo"])
def test_a_format_that_is_not_known_is_an_annotation_wherever_it_stands(name: str) -> None:
    text = {"type": "string", "maxLength": 3}
    plain = {
        "type": "object",
        "properties": {
            "format": text,
            "a": {"anyOf": [text, {"type": "null"}]},
            "b": {"items": text, "prefixItems": [text]},
        },
        "patternProperties": {"^x": text},
        "additionalProperties": text,
        "$defs": {"format": text, "c": {"not": text}},
        "const": {"format": name},
        "enum": [{"format": name}],
        "default": {"format": name},
    }
    given = json.loads(json.dumps(plain).replace('"maxLength": 3', f'"maxLength": 3, "format": "{name}"'))
    before = json.dumps(given)
    assert with_options(given) == with_options(plain)
    assert json.dumps(given) == before


def test_known_formats_stay_and_slips_are_said(caplog: pytest.LogCaptureFixture) -> None:
    for name in FORMATS:
        assert with_options({"type": "string", "format": name})["format"] == name
    assert with_options({"type": "string", "format": {"a": 1}})["format"] == {"a": 1}  # llguidance's to refuse
    assert not caplog.records
    with_options({"properties": {"when": {"format": "date_time"}}})
    (said,) = [record.getMessage() for record in caplog.records]
    assert "'date_time'" in said and "Did you mean 'date-time'?" in said


def test_importing_it_imports_no_library() -> None:
    code = (
        "import sys, tinyserve.text.grammar, tinyserve.text.tool_parser; "
        "assert not {'llguidance', 'numpy', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
