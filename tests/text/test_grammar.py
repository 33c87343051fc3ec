"""Whatever the masks allow becomes text that matches: walks at random through every kind of vocabulary."""

import copy
import json
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from checkpoints import write_tokenizer
from refusals import refused
from schemas import CASES as SCHEMAS
from test_tokenizer import CASES as VOCABULARIES
from test_tokenizer import KEY, metadata_of

from tinyserve.checkpoints.gguf import open_gguf
from tinyserve.errors import RequestError, TinyserveError
from tinyserve.sampling_params import StructuredOutputs
from tinyserve.text.grammar import Grammar, GrammarCompiler, Matcher
from tinyserve.text.grammar_probe import GrammarProbe
from tinyserve.text.json_schema import FORMATS
from tinyserve.text.masks import MaskFiller, fill_masks, words_of
from tinyserve.text.tokenizer import Tokenizer
from tinyserve.text.tokenizer.gguf import TokenType

KINDS = ("smollm2", "bytes", "sentencepiece", "gpt-2")
LARK_SUM = 'start: term ("+" term){0,4}\nterm: NUMBER | "(" start ")"\nNUMBER: /[1-9][0-9]{0,2}/'
LARK_LIST = 'start: "- " ITEM ("\\n- " ITEM){0,3}\nITEM: /[a-zäé ]{1,12}/'
REGEXES = {
    "date": r"[12][0-9]{3}-(0[1-9]|1[0-2])-[0-3][0-9]",
    "word": r" ?[A-Z][a-z]{2,9}(, [a-z]{1,4}){0,3}\.",
    "anchored": r"^(yes|no|maybe)$",
    "unicode": r"[α-ω]{2,6}: (日本|🦊){1,3}",
    "classes": r"[0-9.]{1,8}@[a-z]{1,8}\.(com|org)",
}
CHOICES = ["Paris", "Paris, France", "a \"b\"\\ 'c'\n\t", "日本 👩‍👩‍👧", "{}", " leading", "\u0001"]


@pytest.fixture(scope="module")
def compiler_of(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Callable[[str], GrammarCompiler]:
    """A compiler for each kind of tokenizer; the model's vocabulary is 45 ids larger than the tokenizer's."""
    made: dict[str, GrammarCompiler] = {}

    def make(kind: str) -> GrammarCompiler:
        if kind not in made:
            if kind == "smollm2":
                tokenizer = Tokenizer.from_gguf(open_gguf(smollm2).metadata, str(smollm2))
                ends = {2, 0}
            elif kind == "bytes":
                folder = tmp_path_factory.mktemp("tokenizer")
                write_tokenizer(folder)
                tokenizer = Tokenizer.from_folder(folder)
                ends = set(tokenizer.eos_token_ids)
            else:
                metadata = copy.deepcopy(VOCABULARIES[kind]["metadata"])
                tokenizer = Tokenizer.from_gguf(metadata, kind)
                ends = set(tokenizer.eos_token_ids) or {tokenizer.encode("<|endoftext|>")[0]}
            made[kind] = GrammarCompiler(tokenizer, tokenizer.vocab_size + 45, ends)
        return made[kind]

    return make


def mask_of(matcher: Matcher) -> Any:
    row = np.full(words_of(matcher.vocab_size), 0x55555555, np.uint32)
    matcher.fill(row)
    return row


def bits_of(row: Any) -> Any:
    return np.unpackbits(row.view(np.uint8), bitorder="little").nonzero()[0]


def tokens_of(row: Any) -> list[int]:
    return [int(token) for token in bits_of(row)]


def allowed(matcher: Matcher) -> list[int]:
    return tokens_of(mask_of(matcher))


def walk(grammar: Grammar, seed: int, most: int = 600) -> list[int]:
    """Tokens chosen at random among the allowed ones up to an end, which is not among them.

    Long tokens are likelier in large vocabularies, so one step in three takes an end where there is one.
    """
    rng = np.random.default_rng(seed)
    matcher, ids = grammar.matcher(), []
    for _ in range(most):
        here = bits_of(mask_of(matcher))
        assert len(here), "a mask that allows nothing"
        ends = here[np.isin(here, list(matcher.end_tokens))]
        assert (len(ends) > 0) == matcher.is_complete
        token = int(rng.choice(ends if len(ends) and rng.random() < 1 / 3 else here))
        assert matcher.advance(token)
        if token in matcher.end_tokens:
            assert matcher.is_finished and not matcher.advance(token)
            return ids
        ids.append(token)
    raise AssertionError(f"no end within {most} tokens")


def text_of(compiler: GrammarCompiler, ids: list[int]) -> str:
    """The bytes of ids as text, strictly: an answer whose bytes are no UTF-8 does not pass."""
    assert not set(ids) & compiler._tokenizer.special_ids
    return b"".join(compiler._tokenizer.token_bytes(i) for i in ids).decode("utf-8")


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("kind", KINDS)
def test_json_by_ten_schemas(kind: str, name: str, compiler_of: Callable[[str], GrammarCompiler]) -> None:
    compiler, schema = compiler_of(kind), SCHEMAS[name].schema
    check = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    grammar = compiler.compile(StructuredOutputs(json=schema))
    texts = {text_of(compiler, walk(grammar, seed)) for seed in range(12)}
    for text in texts:
        check.validate(json.loads(text))
    assert len(texts) > 1 or name == "constants"


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schemas_are_no_formality(name: str) -> None:
    """Each refuses the instances beside it, or the test above would show nothing."""
    check = jsonschema.Draft202012Validator(SCHEMAS[name].schema, format_checker=jsonschema.FormatChecker())
    assert SCHEMAS[name].refused and not any(check.is_valid(instance) for instance in SCHEMAS[name].refused)


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_a_schema_refuses_no_tokens_can_write(name: str, compiler_of: Callable[[str], GrammarCompiler]) -> None:
    compiler = compiler_of("smollm2")
    grammar = compiler.compile(StructuredOutputs(json=SCHEMAS[name].schema))
    end = min(compiler.end_tokens)
    for instance in SCHEMAS[name].refused:
        ids = [*compiler._tokenizer.encode(json.dumps(instance, ensure_ascii=False), False), end]
        assert grammar.matcher().count_valid(ids) < len(ids)


@pytest.mark.parametrize("name", REGEXES)
@pytest.mark.parametrize("kind", KINDS)
def test_regular_expressions(kind: str, name: str, compiler_of: Callable[[str], GrammarCompiler]) -> None:
    compiler = compiler_of(kind)
    grammar = compiler.compile(StructuredOutputs(regex=REGEXES[name]))
    for seed in range(12):
        assert re.fullmatch(REGEXES[name], text_of(compiler, walk(grammar, seed)))


@pytest.mark.parametrize("kind", KINDS)
def test_choices_lark_and_any_object(kind: str, compiler_of: Callable[[str], GrammarCompiler]) -> None:
    compiler = compiler_of(kind)
    choice = compiler.compile(StructuredOutputs(choice=CHOICES))
    assert {text_of(compiler, walk(choice, seed)) for seed in range(60)} <= set(CHOICES)
    sums = compiler.compile(StructuredOutputs(grammar=LARK_SUM))
    for seed in range(8):
        text = text_of(compiler, walk(sums, seed, 3000))
        assert re.fullmatch(r"[1-9()0-9+]+", text) and eval(text) > 0
    lists = compiler.compile(StructuredOutputs(grammar=LARK_LIST))
    for seed in range(8):
        lines = text_of(compiler, walk(lists, seed)).split("\n")
        assert 1 <= len(lines) <= 4 and all(re.fullmatch("- [a-zäé ]{1,12}", line) for line in lines)
    objects = compiler.compile(StructuredOutputs(json_object=True))
    matcher = objects.matcher()
    for text, complete in (("{", False), ('"a": [1, {"b": null}]', False), ("}", True)):
        for token in compiler._tokenizer.encode("\n" + text, False):
            if matcher.count_valid([token]):
                assert matcher.advance(token)
        assert matcher.is_complete == complete


@pytest.mark.parametrize("kind", KINDS)
def test_every_choice_can_be_chosen(kind: str, compiler_of: Callable[[str], GrammarCompiler]) -> None:
    """Spelled byte by byte or in the tokenizer's own pieces: every one ends in the end tokens, all of them."""
    compiler = compiler_of(kind)
    grammar = compiler.compile(StructuredOutputs(choice=CHOICES))
    for text in CHOICES:
        forced = compiler.compile(StructuredOutputs(choice=[text])).matcher().forced_tokens()
        matcher = grammar.matcher()
        assert text_of(compiler, forced) == text
        assert all(map(matcher.advance, forced))
        assert matcher.is_complete and set(allowed(matcher)) >= compiler.end_tokens
        assert matcher.is_finished == (text != "Paris")
        assert not matcher.is_finished or set(allowed(matcher)) == compiler.end_tokens


def test_rows_beyond_the_tokenizer_are_never_allowed(compiler_of: Callable[[str], GrammarCompiler]) -> None:
    compiler = compiler_of("bytes")
    assert compiler.vocab_size == 261 + 45 and words_of(compiler.vocab_size) == 10
    here = allowed(compiler.compile(StructuredOutputs(regex="(?s:.*)")).matcher())
    assert set(range(128)) < set(here) and max(here) < 261
    assert {token for token in here if token >= 258} == compiler.end_tokens, "no special token but the end"


def test_two_pieces_with_the_same_bytes_are_both_allowed(compiler_of: Callable[[str], GrammarCompiler]) -> None:
    """SentencePiece has the letter a, and the byte 0x61."""
    compiler = compiler_of("sentencepiece")
    pieces = VOCABULARIES["sentencepiece"]["metadata"][KEY + "tokens"]
    both = {pieces.index("a"), pieces.index("<0x61>")}
    assert both <= set(allowed(compiler.compile(StructuredOutputs(regex="[ab]+")).matcher()))


@pytest.mark.parametrize("kind", KINDS)
def test_taking_tokens_back(kind: str, compiler_of: Callable[[str], GrammarCompiler]) -> None:
    """After any number of steps back the masks are those of the way there, the end token's step included."""
    compiler = compiler_of(kind)
    grammar = compiler.compile(StructuredOutputs(json=SCHEMAS["anyOf and oneOf"].schema))
    ids = [*walk(grammar, 3), min(compiler.end_tokens)]
    matcher, masks = grammar.matcher(), []
    for token in ids:
        masks.append(allowed(matcher))
        assert matcher.advance(token)
    assert allowed(matcher) == sorted(compiler.end_tokens) and matcher.is_finished
    rng = np.random.default_rng(0)
    at = len(ids)
    for _ in range(40):
        back = int(rng.integers(0, at + 1))
        matcher.rollback(back)
        at -= back
        assert allowed(matcher) == [*masks, sorted(compiler.end_tokens)][at]
        on = int(rng.integers(0, len(ids) - at + 1))
        assert all(map(matcher.advance, ids[at : at + on]))
        at += on
    with pytest.raises(ValueError, match="cannot be taken back"):
        matcher.rollback(at + 1)


def test_a_refused_token_changes_nothing(compiler_of: Callable[[str], GrammarCompiler]) -> None:
    compiler = compiler_of("bytes")
    matcher = compiler.compile(StructuredOutputs(choice=["ab", "ac"])).matcher()
    assert matcher.advance(ord("a"))
    before, end = allowed(matcher), min(compiler.end_tokens)
    assert before == [ord("b"), ord("c")]
    for token in (ord("z"), end, 300, 258):
        assert not matcher.advance(token)
        assert allowed(matcher) == before and not matcher.is_complete and matcher.error is None


def test_drafts_are_checked_and_their_masks_filled(compiler_of: Callable[[str], GrammarCompiler]) -> None:
    compiler = compiler_of("bytes")
    matcher = compiler.compile(StructuredOutputs(regex="ab+c?")).matcher()
    end = min(compiler.end_tokens)
    a, b, c, x = map(ord, "abcx")
    for draft, valid in (
        ([], 0), ([a], 1), ([x, a], 0), ([a, b, b, c], 4), ([a, b, c, c], 3), ([a, b, end], 3), ([a, end], 1),
        ([end], 0), ([a, b, end, b], 3), ([a, b, c, end, end], 4),
    ):  # fmt: skip
        masks = np.zeros((len(draft) + 1, words_of(compiler.vocab_size)), np.uint32)
        assert matcher.count_valid(draft) == valid
        assert matcher.fill_draft(draft, masks) == valid
        expected, twin = [], matcher.copy()
        for token in [*draft[:valid], None]:
            expected.append(allowed(twin))
            assert token is None or twin.advance(token)
        assert [tokens_of(row) for row in masks[: valid + 1]] == expected
        assert allowed(matcher) == [a], "a draft leaves no trace"


def test_copies_go_their_own_ways(compiler_of: Callable[[str], GrammarCompiler]) -> None:
    grammar = compiler_of("bytes").compile(StructuredOutputs(regex="[ab]c|[ab]{2}d"))
    one = grammar.matcher()
    assert one.advance(ord("a"))
    two = one.copy()
    assert two.advance(ord("b")) and allowed(two) == [ord("d")]
    assert allowed(one) == [ord("a"), ord("b"), ord("c")]
    assert allowed(grammar.matcher()) == [ord("a"), ord("b")]


def test_a_batch_beside_another_thread(compiler_of: Callable[[str], GrammarCompiler]) -> None:
    """Rows of a batch are those of each matcher alone; None allows everything, an ended one its end tokens."""
    compiler = compiler_of("smollm2")
    specs = [StructuredOutputs(json=case.schema) for case in SCHEMAS.values()] + [StructuredOutputs(regex="a")]
    matchers: list[Matcher | None] = [compiler.compile(spec).matcher() for spec in specs]
    ended = matchers[-1]
    assert ended is not None and ended.advance(compiler._tokenizer.encode("a", False)[0])
    assert ended.advance(min(compiler.end_tokens))
    batch = [None, *matchers, None]
    expected = [list(range(32 * words_of(compiler.vocab_size))) if m is None else allowed(m) for m in batch]
    filler = MaskFiller(compiler.vocab_size)
    try:
        for _ in range(5):
            filler.start(batch)
            assert [tokens_of(row) for row in filler.wait()] == expected
        with pytest.raises(ValueError, match="call start first"):
            filler.wait()
    finally:
        filler.close()
    assert expected[-2] == sorted(compiler.end_tokens)
    with pytest.raises(ValueError, match="contiguous uint32"):
        fill_masks(batch, np.zeros((len(batch), 2 * words_of(compiler.vocab_size)), np.uint32)[:, ::2])
    with pytest.raises(ValueError, match="contiguous uint32"):
        fill_masks(batch, np.zeros((2, words_of(compiler.vocab_size)), np.uint32))


def test_grammars_are_compiled_once_from_any_thread(compiler_of: Callable[[str], GrammarCompiler]) -> None:
    compiler, found = compiler_of("bytes"), []
    spec = {"json": {"type": "object", "properties": {"a": {"const": 1}}}}
    threads = [
        threading.Thread(target=lambda: found.append(compiler.compile(StructuredOutputs(**spec)))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(map(id, found))) == 1
    for i in range(70):
        compiler.compile(StructuredOutputs(choice=[str(i)]))
    assert compiler.compile(StructuredOutputs(**spec)) is not found[0], "the oldest are forgotten"
    assert len(compiler._grammars) == 64


def test_the_formats_that_are_enforced_are_those_the_compiler_knows(
    compiler_of: Callable[[str], GrammarCompiler],
) -> None:
    from llguidance import LLMatcher

    compiler = compiler_of("smollm2")
    compiler.compile(StructuredOutputs(json={"type": "string", "maxLength": 1}))
    others = {"idn-email", "iri", "json-pointer", "regex", "uri-reference", "uri-template", "password", "int32"}
    for name in FORMATS | others:
        schema = {"type": "string", "format": name, "x-guidance": {"lenient": False}}
        source = LLMatcher.grammar_from_json_schema(json.dumps(schema))
        assert LLMatcher(compiler._vocabulary, source, log_level=0).is_error() == (name in others), name
        compiler.compile(StructuredOutputs(json={"type": "string", "format": name}))


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"regex": "(a"}, "regex is refused: regex parse error: (a error: unclosed group."),
        ({"regex": "a(?=b)"}, "look-around, including look-ahead and look-behind, is not supported."),
        ({"regex": r"(a)\1"}, "backreferences are not supported."),
        ({"regex": r"[^\s\S]"}, "regex is refused: no t"),
        ({"grammar": "start: foo"}, 'grammar is refused: at 1(8): unknown name: "foo".'),
        ({"grammar": 'start: "a'}, "grammar is refused: 1(10): lexer error."),
        ({"grammar": "start: <|no_such_token|>"}, 'unknown special token: "<|no_such_token|>"'),
        ({"grammar": 'start: a\na: %json {"not": {}}'}, 'Unimplemented keys: ["not"].'),
        ({"json": {"type": "foo"}}, "json is refused: Invalid type: foo."),
        ({"json": {"not": {"type": "string"}}}, 'json is refused: Unimplemented keys: ["not"].'),
        ({"json": {"if": {}, "then": {}}}, 'Unimplemented keys: ["if", "then"].'),
        ({"json": {"type": "array", "uniqueItems": True}}, 'Unimplemented keys: ["uniqueItems"].'),
        ({"json": {"x-guidance": {"lenient": True}, "uniqueItems": True}}, 'Unimplemented keys: ["uniqueItems"].'),
        ({"json": {"$ref": "#/$defs/a"}}, "Pointer '/$defs/a' does not exist."),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 1}}, "minimum (5) is greater than maximum (1)."),
        ({"json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "oneOf constraints are not supported."),
    ],
)  # fmt: skip
def test_a_grammar_that_cannot_be_is_refused(
    spec: dict[str, Any], sentence: str, compiler_of: Callable[[str], GrammarCompiler]
) -> None:
    with refused("structured_outputs", sentence):
        compiler_of("bytes").compile(StructuredOutputs(**spec))


@pytest.mark.parametrize(
    "bounds",
    [
        {"exclusiveMinimum": 0, "maximum": 0.5},
        {"exclusiveMinimum": 0.0, "exclusiveMaximum": 0.001},
        {"exclusiveMinimum": 0, "maximum": 1},
        {"exclusiveMinimum": 1, "maximum": 1.5},
        {"exclusiveMinimum": -1, "exclusiveMaximum": -0.5},
        {"minimum": -0.5, "exclusiveMaximum": 0},
        {"exclusiveMinimum": -0.5, "exclusiveMaximum": 0},
        {"exclusiveMinimum": 0, "minimum": 0.25, "maximum": 0.5},
        {"exclusiveMinimum": 0},
    ],
)
def test_a_number_that_is_excluded_is_not_answered(
    bounds: dict[str, float], compiler_of: Callable[[str], GrammarCompiler]
) -> None:
    grammar = compiler_of("bytes").compile(StructuredOutputs(json={"type": "number", **bounds}))
    validator = jsonschema.Draft202012Validator(bounds)
    texts = ["0", "-0", "0.0", "0.00", "1", "-1", "1.0", "-1.0", "0.5", "-0.5", "0.25", "-0.25"]
    texts += ["0.001", "0.0005", "1.5", "-0.75"]
    accepted = set()
    for text in texts:
        matcher = grammar.matcher()
        if all(map(matcher.advance, text.encode())) and matcher.is_complete:
            accepted.add(text)
    assert accepted and accepted <= {text for text in texts if validator.is_valid(json.loads(text))}


@pytest.mark.parametrize("schema", [{"type": "x" * 5000}, {"$ref": "#/" + "y" * 5000}])
def test_a_reason_is_not_longer_than_it_is_read(
    schema: dict[str, Any], compiler_of: Callable[[str], GrammarCompiler]
) -> None:
    with pytest.raises(RequestError) as error:
        compiler_of("bytes").compile(StructuredOutputs(json=schema))
    assert len(str(error.value)) < 600 and str(error.value).endswith(".")


def test_a_panic_of_the_compiler_is_a_sentence(
    compiler_of: Callable[[str], GrammarCompiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "panic: assertion failed: grammar.symbols.len() < 65525\n<backtrace>\n 0: <unknown>\n 1: <unknown>"
    monkeypatch.setattr(GrammarProbe, "check", lambda *_: said)
    with pytest.raises(RequestError) as error:
        compiler_of("bytes").compile(StructuredOutputs(choice=["a choice that nobody else has"]))
    words = "choice is refused: the compiler fails on it: assertion failed: grammar.symbols.len() < 65525."
    assert str(error.value) == words


def test_a_dead_end_allows_an_end_and_says_so(compiler_of: Callable[[str], GrammarCompiler]) -> None:
    compiler = compiler_of("bytes")
    matcher = compiler.compile(StructuredOutputs(grammar='start: "a" b | "c"\nb: /[^\\s\\S]/')).matcher()
    assert matcher.advance(ord("a"))
    row = np.zeros((1, words_of(compiler.vocab_size)), np.uint32)
    fill_masks([matcher], row)
    assert tokens_of(row[0]) == sorted(compiler.end_tokens)
    assert matcher.error == "The structured output cannot go on: no text matches it."
    with pytest.raises(TinyserveError, match="cannot go on"):
        matcher.fill(row[0])
    assert not matcher.is_complete
    draft = [ord("a"), ord("a")]
    ahead = compiler.compile(StructuredOutputs(grammar='start: "a" b | "c"\nb: /[^\\s\\S]/')).matcher()
    assert ahead.fill_draft(draft, np.zeros((3, row.shape[1]), np.uint32)) == 0, "not into a dead end"
    assert allowed(ahead) == [ord("a"), ord("c")]


def test_a_text_that_no_tokens_spell_is_refused(compiler_of: Callable[[str], GrammarCompiler]) -> None:
    """A vocabulary without bytes: its alphabet is that of its pieces."""
    metadata = copy.deepcopy(VOCABULARIES["sentencepiece"]["metadata"])
    metadata[KEY + "tokens"] = [f"[{p}]" if re.fullmatch("<0x..>", p) else p for p in metadata[KEY + "tokens"]]
    tokenizer = Tokenizer.from_gguf(metadata, "no bytes")
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    with refused("structured_outputs", "choice is refused: no t"):
        compiler.compile(StructuredOutputs(choice=["\u0001"]))
    matcher = compiler.compile(StructuredOutputs(choice=["a\u0001", "b"])).matcher()
    here = allowed(matcher)
    assert here and not set(here) & compiler.end_tokens


def test_special_tokens_are_reached_by_name_only(compiler_of: Callable[[str], GrammarCompiler]) -> None:
    compiler = compiler_of("bytes")
    grammar = compiler.compile(StructuredOutputs(grammar='start: <|user|> "x" "<|user|>"'))
    matcher = grammar.matcher()
    assert allowed(matcher) == [260] and matcher.advance(260) and matcher.advance(ord("x"))
    assert 260 not in allowed(matcher) and ord("<") in allowed(matcher)


def test_what_is_needed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_gguf(metadata_of("gpt-2"), "gpt-2")
    with refused("structured_outputs", "gpt-2: structured outputs need a model with an end token"):
        GrammarCompiler(tokenizer, tokenizer.vocab_size, ())
    monkeypatch.setattr(tokenizer, "_alphabet", None)
    with refused("structured_outputs", "gpt-2: structured outputs need a tokenizer whose tokens are bytes"):
        GrammarCompiler(tokenizer, tokenizer.vocab_size, {0})
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with refused("structured_outputs", "pip install 'tinyserve[structured]'"):
        GrammarCompiler(tokenizer, tokenizer.vocab_size, {0})


def test_a_model_may_have_fewer_rows_than_the_tokenizer(compiler_of: Callable[[str], GrammarCompiler]) -> None:
    metadata = metadata_of("gpt-2")
    metadata[KEY + "tokens"] += ["<tool_call>", "<|far|>"]
    metadata[KEY + "token_type"] += [int(TokenType.USER_DEFINED), int(TokenType.CONTROL)]
    tokenizer = Tokenizer.from_gguf(metadata, "gpt-2")
    full = GrammarCompiler(tokenizer, tokenizer.vocab_size, {0, 10**6}).compile(StructuredOutputs(regex="<.*"))
    tag = tokenizer.vocab_size - 2
    assert tag in allowed(full.matcher()), "an added token that is text is text"
    fewer = GrammarCompiler(tokenizer, tag, {0}).compile(StructuredOutputs(regex="<.*"))
    assert max(allowed(fewer.matcher())) < tag
