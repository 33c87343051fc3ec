"""A structure is exactly one of its kinds, as plain data; what is none names its field."""

import json
import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from tinyserve.errors import RequestError
from tinyserve.sampling_params import StructuredOutputs
from tinyserve.text.json_schema import FORMATS, ONE_LINE, with_options

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
