"""The fuzzer of structured outputs finds nothing in some hundred, and would say so if it did."""

import random
import re
import subprocess
import sys
from typing import Any

import pytest

from scripts import SCRIPTS, load_script

SCRIPT = SCRIPTS / "fuzz" / "grammars.py"
OTHER = (
    "import tinyserve.text.grammar as g; from tinyserve import StructuredOutputs as S; of = g._source; "
    "g._source = lambda spec: of(S(regex='zz'))"
)


def fuzz(count: int, *options: str, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.argv = ['grammars.py', '--count', '{count}', *{list(options)}]; {before}\n"
    code += f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def fuzzer() -> Any:
    return load_script("fuzz/grammars.py")


def test_every_answer_keeps_to_its_structure_or_is_refused_with_a_sentence() -> None:
    done = fuzz(250, "--seed", "1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert re.search(r"^250 cases, 0 of them neither", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (OTHER, "the answer is 'zz'"),
        ("import tinyserve.text.grammar as g; g._sentence = lambda error: error + '<backtrace>\\n'", "no sentence"),
    ],
)
def test_a_fault_is_told_with_what_makes_it_again(broken: str, said: str) -> None:
    done = fuzz(250, "--seed", "1", before=broken)
    assert done.returncode == 1
    assert said in done.stdout and re.search(r"again: --seed 1 --case \d+", done.stdout), done.stdout[-3000:]


def test_an_answer_that_breaks_a_rule_is_told(fuzzer: Any) -> None:
    person = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for spec, right, wrong in (
        ({"choice": ["a", "b"]}, "a", "c"),
        ({"regex": "a{2}"}, "aa", "aaa"),
        ({"json_object": True}, '{"x": 1}', "[1]"),
        ({"json": person}, '{"a": 1}', '{"a": "1"}'),
        ({"json": fuzzer.json.dumps(person)}, '{"a": 1}', '{"a": 1'),
        ({"json": {"$ref": "#/$defs/d", "$defs": {"d": {"const": 2**53}}}}, str(2**53), str(2**53 + 1)),
        ({"json": {"anyOf": [{"type": "null"}, {"maxLength": 2, "type": "string"}]}}, '"ab"', '"abc"'),
    ):
        assert fuzzer.broken_rule(spec, right) == ""
        assert fuzzer.broken_rule(spec, wrong)


def test_a_case_is_made_again_by_its_number_and_every_kind_is_tried(fuzzer: Any) -> None:
    made = [[fuzzer.Specs(random.Random(f"3 {number}")).make() for number in range(200)] for _ in range(2)]
    assert repr(made[0]) == repr(made[1])
    assert {next(iter(spec)) for spec in made[0]} == {"json", "regex", "choice", "grammar", "json_object"}
    assert {"$ref", "oneOf", "pattern", "format", "multipleOf"} <= set(re.findall(r"[$\w]+", repr(made[0])))
