"""Random schemas, regular expressions and grammars: an answer keeps to each, or it is refused with a sentence.

    python scripts/fuzz/grammars.py --seconds 60 --seed 1

A tiny random model answers in this process. An answer that ends by itself is checked by jsonschema, `re` and Python,
as far as these and the grammar compiler mean the same; what is not as it was asked for, no sentence, longer than 10
seconds of this process or more than 1 GB is printed, and the exit code is 1. `--case 1234` makes one case alone.
"""

import json
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "fuzz"), str(ROOT / "tests" / "support")]

import common  # noqa: E402
from common import changed, no_sentence  # noqa: E402

PATIENCE = 2.0  # seconds for Python to match a text
SLOWEST = 10.0  # seconds of this process's processor time
LONGEST_WAIT = 25.0  # seconds: a grammar may take 20 to be refused on a busy machine, beside others
TOKENS = 150
WORDS = ["a", "b c", "é", "日本", "👍", '"', "\\", "\n", "\0", "", "$ref", "x" * 300, "/", "~", "null", "1", "c", "d"]
NUMBERS: list[Any] = [
    *(0, 1, -1, 2, 3, 10, 100, 255, 0.5, -2.5, 0.1, 1e-9, 1e10, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**30, 1e308),
    *(-0.0, 0.001, 99999999999999999999),
]
SIZES = [0, 1, 2, 3, 5, 10, 50, 1000, 100_000, 2**31, 2**63, 2**64, 10**30, -1, 1.5]
PATTERNS = [
    *("^[a-z]+$", "^\\d{2,4}$", "a", "^(a|b)*c$", "[^x]", "^$", "^.{3}$", "\\w+@\\w+", "(?i)abc", "^\\p{L}+$", "["),
    *("(?=a)b", "a{1000}", "(a*)*", "^[\\u0041-\\u005a]$", "\\bword\\b", "^\\S+\\s\\S+$", "a{100000000}", ""),
    *("(?P<n>a)(?P=n)", "[\\d-z]"),
]
FORMATS = ["date", "date-time", "time", "email", "uuid", "ipv4", "ipv6", "uri", "hostname", "duration", "regex", "x", 5]
ASSERTIONS = [
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength", "pattern"),
    *("minItems", "maxItems", "minProperties", "maxProperties", "format", "uniqueItems", "enum", "const", "not", "if"),
    *(
        "contains",
        "dependentRequired",
        "propertyNames",
        "unevaluatedProperties",
        "$anchor",
        "$id",
        "x-guidance",
        "type",
    ),
]
LARK = [
    *('start: "a"', 'start: "(" start ")" | "x"', "start: /[a-c]{2}/ WORD\nWORD: /[x-z]+/", "start: /(/", "start: b"),
    *('start: item+\nitem: "a" | "b"', 'start: a "," a\na: "x" | "y"\n%ignore " "', 'start: start "a" | "b"'),
    *('start: %json {"type": "null"}', 'start: "a"~2..4', 'start: "a"? "b"* ("c" | "d")', 'start: "é" | "👍"'),
    *(
        "start: <|eos|>",
        'start: "a"i',
        "%import common.INT\nstart: INT",
        "start: start",
        'start: ""',
        'start: "\\ud800"',
    ),
    *("start[max_tokens=3]: /.*/", 'start: gen\ngen[stop="x"]: /.*/', "start: a\na: b\nb: a", 'start: "a"~1000000'),
    *("start: /a{1,100000}/", "start: (" * 50 + '"a"' + ")" * 50),
]


class Specs:
    """One case: what an answer must look like, made of a random number generator."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._definitions = [f"d{i}" for i in range(rng.choice((0, 0, 1, 2, 3)))]

    def make(self) -> dict[str, Any]:
        """The arguments of StructuredOutputs."""
        pick = self._rng
        match pick.choice(("json", "json", "json", "json", "regex", "choice", "grammar", "json_object")):
            case "json":
                return {"json": self._root()}
            case "regex":
                return {"regex": self._regex()}
            case "choice":
                words = [*WORDS, "yes", "no", "perhaps", *(f"w{i}" for i in range(9))]
                words += ["\ud800"] * (pick.random() < 0.1)
                return {"choice": pick.choices(words, k=pick.choice((1, 2, 5, 40, 3000)))}
            case "grammar":
                return {"grammar": self._lark()}
            case _:
                return {"json_object": pick.choice((True, True, True, 1, "x", None))}

    def _root(self) -> Any:
        pick = self._rng
        schema = self._schema(pick.choice((1, 2, 3, 4)))
        if self._definitions and isinstance(schema, dict):
            where = pick.choice(("$defs", "$defs", "definitions"))
            schema = {**schema, where: {name: self._schema(2) for name in self._definitions}}
        if pick.random() < 0.15:
            schema = changed(schema, pick)
        return json.dumps(schema) if pick.random() < 0.1 else schema

    def _schema(self, depth: int) -> Any:
        pick = self._rng
        if pick.random() < 0.03:
            return pick.choice((True, False, {}, None, [], "x"))
        if self._definitions and pick.random() < 0.15:
            return {
                "$ref": pick.choice(("#/$defs/", "#/$defs/", "#/definitions/", "other.json#/"))
                + pick.choice(self._definitions)
            }
        if pick.random() < 0.02:
            return {"$ref": "#"}
        kinds = ["string", "integer", "number", "boolean", "null", "enum", "const"]
        kind = pick.choice([*kinds, *["object", "array", "object", "anyOf", "oneOf", "allOf", "types"] * (depth > 0)])
        match kind:
            case "enum":
                schema: dict[str, Any] = {"enum": [self._value() for _ in range(pick.randint(1, 4))]}
            case "const":
                schema = {"const": self._value()}
            case "object":
                names = pick.choices([*WORDS[:8], "name", "id", "tags"], k=pick.randint(0, 4))
                schema = {"type": "object", "properties": {name: self._schema(depth - 1) for name in names}}
                schema["required"] = [name for name in names if pick.random() < 0.7]
                if pick.random() < 0.6:
                    schema["additionalProperties"] = pick.choice((False, False, True, self._schema(depth - 1)))
                if pick.random() < 0.1:
                    schema["patternProperties"] = {pick.choice(PATTERNS): self._schema(depth - 1)}
            case "array":
                schema = {"type": "array", "items": self._schema(depth - 1)}
                if pick.random() < 0.5:
                    schema["maxItems"] = pick.choice((1, 2, 3, *SIZES))
                if pick.random() < 0.3:
                    schema["prefixItems"] = [self._schema(depth - 1) for _ in range(pick.randint(0, 3))]
            case "anyOf" | "oneOf" | "allOf":
                schema = {kind: [self._schema(depth - 1) for _ in range(pick.choice((1, 2, 3)))]}
            case "types":
                schema = {"type": pick.choices(["string", "integer", "null", "array", "object"], k=2)}
            case _:
                schema = {"type": kind}
        if kind == "string" and pick.random() < 0.7:
            schema |= pick.choice(
                (
                    {"maxLength": pick.choice((0, 3, *SIZES))},
                    {"pattern": pick.choice(PATTERNS)},
                    {"format": pick.choice(FORMATS)},
                )
            )
        if kind in ("integer", "number") and pick.random() < 0.7:
            schema |= {name: pick.choice(NUMBERS) for name in pick.sample(ASSERTIONS[:5], k=pick.choice((1, 1, 2)))}
        if pick.random() < 0.05:
            name = pick.choice(ASSERTIONS)
            schema[name] = pick.choice(
                (pick.choice(NUMBERS), pick.choice(PATTERNS), [self._value()], {}, {"type": "null"}, "date")
            )
        if pick.random() < 0.1:
            schema |= pick.choice(
                ({"title": "T"}, {"description": "é"}, {"default": None}, {"examples": [1]}, {"x": 1})
            )
        return schema

    def _value(self) -> Any:
        pick = self._rng
        return pick.choice([*WORDS, *NUMBERS, None, True, False, [], {}, [1, "a"], {"a": [None]}, {"é": {"b": 1}}])

    def _regex(self, depth: int = 3) -> str:
        pick = self._rng
        if pick.random() < 0.1:
            return pick.choice(
                [*PATTERNS, "a{50}{50}", "((a{9}){9}){9}", "(?s).*", "(a|b|ab)*" * 20, "\\x{110000}", "[z-a]", "**"]
            )
        if not depth or pick.random() < 0.3:
            return pick.choice(["a", "b", "[a-f]", "[0-9]", "é", "\\d", "\\.", "[^a]", "x y", "日", "\\n", "."])
        inner = self._regex(depth - 1)
        match pick.randrange(5):
            case 0:
                return inner + self._regex(depth - 1)
            case 1:
                return f"({inner}|{self._regex(depth - 1)})"
            case 2:
                low = pick.choice((0, 1, 2, 7))
                return f"({inner}){{{low},{low + pick.choice((0, 1, 3))}}}"
            case 3:
                return f"({inner})" + pick.choice("*+?")
            case _:
                return f"(?:{inner})"

    def _lark(self) -> str:
        pick = self._rng
        text = pick.choice(LARK)
        if pick.random() < 0.3:
            rules = [f"r{i}" for i in range(pick.choice((1, 3, 8, 2000)))]
            parts = [*rules[:9], *('"x"', '"y" "z"', "/[ab]+/", '("q" | "p")?')]
            lines = [f"{rule}: " + " | ".join(" ".join(pick.choices(parts, k=2)) for _ in range(2)) for rule in rules]
            text = "\n".join(["start: r0", *lines])
        for _ in range(pick.choice((0, 0, 1, 2))):
            at = pick.randrange(len(text) + 1)
            text = (
                text[:at]
                + pick.choice(('"', "(", "|", "~", "\n", "%", "/", "start", "\0", "é", ":"))
                + text[at + pick.choice((0, 1)) :]
            )
        return text


# --- whether an answer is what was asked for --------------------------------------------------------------------------


def broken_rule(spec: dict[str, Any], text: str) -> str:
    """What a finished answer does not keep to; empty where all is well, or nobody else can tell."""
    match spec:
        case {"choice": choice}:
            return "" if text in choice else "it is none of the choices"
        case {"regex": regex}:
            return _unlike(regex, text)
        case {"json_object": _}:
            return "" if isinstance(_loaded(text), dict) else "it is no JSON object"
        case {"json": schema}:
            return _invalid(json.loads(schema) if isinstance(schema, str) else schema, text)
    return ""


def _unlike(regex: str, text: str) -> str:
    # Rust takes the whole text, newer classes of Unicode, and a final $ in its own way.
    plain = regex.replace("[^a]", "")
    if (re.search(r"\\[dw]", plain) and not text.isascii()) or re.search(r"[$^]|\\[bBpPzZAxu]|\(\?[^:]", plain):
        return ""
    signal.signal(signal.SIGALRM, _give_up)  # Python tries all ways to read a text, of which there may be too many
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "" if re.fullmatch(regex, text) else "it does not match"
    except (re.error, OverflowError, RecursionError, TimeoutError):
        return ""
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _give_up(*_: object) -> NoReturn:
    raise TimeoutError


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return ...


def _invalid(schema: Any, text: str) -> str:
    import jsonschema

    if "patternProperties" in json.dumps(schema):  # whose patterns are Rust's, and decide what is additional
        return ""
    instance = _loaded(text)
    if instance is ...:
        return "it is no JSON"
    try:
        errors = list(jsonschema.Draft202012Validator(_alike(schema)).iter_errors(instance))
    except Exception:  # a schema that means nothing to it, or an endless reference: nobody can tell
        return ""
    return f"{errors[0].message:.300} ({errors[0].json_path})" if errors else ""


def _alike(schema: Any) -> Any:
    """A schema as far as jsonschema and llguidance mean the same."""
    if isinstance(schema, list):
        return [_alike(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        if key in ("enum", "const", "default", "examples"):
            kept[key] = value
        elif key in ("properties", "$defs", "definitions") and isinstance(value, dict):
            kept[key] = {name: _alike(one) for name, one in value.items()}
        elif key == "pattern" and (not isinstance(value, str) or re.search(r"\\[bBpPuwWsSdD]|\(\?|\$", value)):
            continue  # Rust's $ is the end alone, and its classes are Unicode's
        elif (key == "multipleOf" and not isinstance(value, int)) or (isinstance(value, bool) and "clusive" in key):
            continue
        else:
            kept[key] = _alike(value)
    return kept


# --- the cases --------------------------------------------------------------------------------------------------------


class Fuzzer:
    noun = "neither an answer as it was asked for nor a sentence"

    def __init__(self, seed: int) -> None:
        import checkpoints

        from tinyserve import LLM

        self._seed, self.finished, self._cases = seed, 0, 0
        with tempfile.TemporaryDirectory(prefix="fuzz-grammars-") as folder:
            raw = checkpoints.CONFIGS["llama"] | {"max_position_embeddings": 256}
            checkpoints.write_folder(Path(folder) / "tiny", raw)
            self._llm = LLM(
                Path(folder) / "tiny", num_threads=1, max_num_seqs=2, kv_cache_memory=8 << 20, dtype="float32"
            )
        # What ends texts, lists and answers is likelier than a random model would have it.
        self._bias = {checkpoints.EOS: 4.0, **dict.fromkeys(b'"]}', 3.0)}
        self._answer({"choice": ["a"]}, 0)

    def describe(self, number: int) -> str:
        return repr(self._spec(number))

    def fault(self, number: int) -> str:
        spec = self._spec(number)
        started, processor = time.monotonic(), time.process_time()
        wrong = self._wrong(spec, number)
        took, used = time.monotonic() - started, time.process_time() - processor
        if not wrong and (took > LONGEST_WAIT or used > SLOWEST):
            wrong = f"took {took:.0f} s, {used:.0f} of them here"
        return wrong

    def _spec(self, number: int) -> dict[str, Any]:
        return Specs(random.Random(f"{self._seed} {number}")).make()

    def _wrong(self, spec: dict[str, Any], number: int) -> str:
        from tinyserve.errors import UserError

        try:
            text, reason = self._answer(spec, number)
        except UserError as error:
            return no_sentence(str(error), json.dumps(spec, ensure_ascii=False))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of Rust is no Exception
            return f"{type(error).__name__}: {error!s:.300}\n{traceback.format_exc(limit=-5)}"
        if reason == "stop" and (rule := broken_rule(spec, text)):
            return f"the answer is {text!r:.500}: {rule}"
        return ""

    def _answer(self, spec: dict[str, Any], number: int) -> tuple[str, str | None]:
        from tinyserve import SamplingParams, StructuredOutputs

        params = SamplingParams(
            temperature=1.0, max_tokens=TOKENS, seed=number, logit_bias=self._bias,
            structured_outputs=StructuredOutputs(**spec),
        )  # fmt: skip
        (answer,) = self._llm.generate(["the"], params)[0].outputs
        return answer.text, answer.finish_reason


if __name__ == "__main__":
    sys.exit(common.main(__doc__, Fuzzer))
