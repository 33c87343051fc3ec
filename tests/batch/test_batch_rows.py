"""From rows to requests and back: OpenAI's batch lines, prompts and conversations."""

from typing import Any

import pytest

from tinyserve.batch.rows import CHAT, COLUMNS, COMPLETIONS, EMBEDDINGS, RowError, RowOptions, rows_of
from tinyserve.batch.shards import Row
from tinyserve.errors import UserError

pytestmark = pytest.mark.fast

ANSWER = {
    "id": "chatcmpl-1",
    "choices": [{"message": {"content": "Paris.", "reasoning": "Hm."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 3},
}
LINE = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"messages": [], "max_tokens": 3}}


def ask(fields: dict[str, Any], number: int = 0, **options: Any) -> tuple[str, dict[str, Any]]:
    row = Row(number, fields)
    path, body = rows_of(row, RowOptions(**options), "in.jsonl").request(row)
    assert isinstance(body.pop("seed", 0), int)
    return path, body


def test_what_plain_rows_ask() -> None:
    question = [{"role": "user", "content": "Hi"}]
    assert ask({"prompt": "Hi", "id": 3}) == (CHAT, {"messages": question})
    assert ask({"prompt": "Hi"}, raw=True) == (COMPLETIONS, {"prompt": "Hi"})
    assert ask({"prompt": "Hi"}, chats=False) == (COMPLETIONS, {"prompt": "Hi"})
    assert ask({"q": "Hi"}, prompt_column="q", body={"max_tokens": 3}) == (
        CHAT,
        {"max_tokens": 3, "messages": question},
    )
    assert ask({"messages": question}) == (CHAT, {"messages": question})
    assert ask({"messages": '[{"role": "user", "content": "Hi"}]'}) == (CHAT, {"messages": question})
    system = {"role": "system", "content": "Be short."}
    assert ask({"chat": question, "prompt": ""}, messages_column="chat", system="Be short.") == (
        CHAT,
        {"messages": [system, *question]},
    )


def test_what_openais_lines_ask() -> None:
    assert ask(LINE) == (CHAT, LINE["body"])
    assert ask({**LINE, "url": EMBEDDINGS, "body": {"input": "a"}}) == (EMBEDDINGS, {"input": "a"})
    row = Row(0, {**LINE, "body": {"messages": [], "seed": 5}})
    assert rows_of(row, RowOptions(), "in").request(row).body["seed"] == 5


def test_a_row_draws_by_the_jobs_seed_and_its_number() -> None:
    def seed(number: int, job: int) -> int:
        row = Row(number, {"prompt": "a"})
        return rows_of(row, RowOptions(seed=job), "in").request(row).body["seed"]

    seeds = {(number, job): seed(number, job) for number in range(50) for job in range(3)}
    assert len(set(seeds.values())) == len(seeds)
    assert all(0 <= one < 1 << 53 for one in seeds.values())
    assert seed(7, 2) == seeds[7, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**LINE, "custom_id": 3}, "custom_id is 3"),
        ({**LINE, "method": "GET"}, "method is 'GET'"),
        ({**LINE, "url": "/v1/responses"}, "url is '/v1/responses'"),
        ({**LINE, "body": "x"}, "body is 'x'"),
        ({**LINE, "body": {"stream": True}}, "stream is true"),
        ({**LINE, "bodi": 1}, "Did you mean 'body'"),
        ({"prompt": None}, "is empty"),
        ({"prompt": 3}, "must be a text"),
        ({"messages": 3}, "must be a list of messages"),
        ({"messages": "Hi"}, "must be a list of messages"),
        ({"messages": "{}"}, "must be a list of messages"),
        ({"messages": "[" * 3000}, "must be a list of messages"),
        ({"messages": "[" * 90 + "]" * 90}, "must be a list of messages"),
    ],
)
def test_rows_that_ask_for_nothing(fields: dict[str, Any], message: str) -> None:
    row = Row(4, fields)
    rows = rows_of(Row(0, LINE if "custom_id" in fields else fields), RowOptions(), "in.jsonl")
    with pytest.raises(RowError, match=message) as error:
        rows.request(row)
    outcome = rows.failed(row, str(error.value))
    assert outcome.is_failure and message.split()[0] in str(outcome.fields["error"])


def test_a_later_row_whose_own_fields_an_answer_would_overwrite_is_an_error() -> None:
    rows = rows_of(Row(0, {"prompt": "a"}), RowOptions(), "in.jsonl")
    with pytest.raises(RowError, match="'answer' of its own"):
        rows.request(Row(1, {"prompt": "a", "answer": "b"}))


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"text": "a"}, {}, "neither OpenAI's batch lines .* it has text"),
        ({"prompt": "a", "messages": []}, {}, "columns messages and prompt"),
        ({"prompt": "a"}, {"prompt_column": "prompts"}, "no column 'prompts'. Did you mean 'prompt'"),
        ({"prompt": "a"}, {"prompt_column": "prompt", "messages_column": "m"}, "one question"),
        ({"prompt": "a", "error": None}, {}, "a column 'error', which the answer would overwrite"),
        (LINE, {"system": "a"}, "leave out --system"),
        (LINE, {"raw": True}, "leave out --raw"),
        (LINE, {"body": {"max_tokens": 3}}, "leave out --max-tokens"),
        (LINE, {"body": {"temperature": 0.0}}, "leave out --temperature"),
        (LINE, {"prompt_column": "a"}, "leave out --prompt-column"),
    ],
)
def test_jobs_that_cannot_be(fields: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rows_of(Row(0, fields), RowOptions(**options), "in.jsonl")


def test_what_is_written_of_plain_rows() -> None:
    row = Row(0, {"prompt": "a"})
    rows = rows_of(row, RowOptions(), "in")
    outcome = rows.answered(row, CHAT, 200, ANSWER)
    assert outcome == (
        {
            "answer": "Paris.",
            "reasoning": "Hm.",
            "finish_reason": "stop",
            "prompt_tokens": 7,
            "output_tokens": 3,
            "error": None,
        },
        False,
        7,
        3,
    )
    completion = {"choices": [{"text": "Paris", "finish_reason": "length"}], "usage": ANSWER["usage"]}
    assert rows.answered(row, COMPLETIONS, 200, completion).fields["answer"] == "Paris"
    refused = rows.answered(row, CHAT, 400, {"error": {"message": "Too long."}})
    assert refused.is_failure and refused.fields == {**dict.fromkeys(COLUMNS), "error": "Too long."}


def test_what_is_written_of_openais_lines() -> None:
    row = Row(0, LINE)
    rows = rows_of(row, RowOptions(), "in")
    fields, is_failure, *tokens = rows.answered(row, CHAT, 200, ANSWER)
    assert (is_failure, tokens) == (False, [7, 3])
    assert fields.pop("id").startswith("batch_req_")
    assert fields == {
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "chatcmpl-1", "body": ANSWER},
        "error": None,
    }
    refused = rows.answered(row, CHAT, 400, {"error": {"message": "Too long."}})
    assert refused.is_failure and refused.fields["response"]["status_code"] == 400 and refused.fields["error"] is None
    failed = rows.failed(row, "No.")
    assert failed.fields["response"] is None and failed.fields["error"] == {"code": "invalid_row", "message": "No."}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"error": {"message": "no"}},
        {"choices": []},
        {"choices": None},
        {"choices": [{}]},
        {"choices": [{"message": "text"}]},
        {"choices": [{"message": {"role": "assistant"}}]},
        {"choices": {"a": 1}},
    ],
)
def test_odd_answers_are_failures_of_their_rows(body: dict[str, Any]) -> None:
    row = Row(0, {"prompt": "a"})
    outcome = rows_of(row, RowOptions(), "in").answered(row, CHAT, 200, body)
    assert outcome.is_failure and outcome.fields["error"].startswith("The answer is none: ")
    line = Row(0, LINE)
    assert rows_of(line, RowOptions(), "in").answered(line, CHAT, 200, body).is_failure is ("choices" not in body)


def test_odd_values_fit_into_the_columns() -> None:
    row = Row(0, {"prompt": "a"})
    message = {"content": [{"type": "text", "text": "\ud800"}], "reasoning": {"a": 1}}
    choice = {"message": message, "finish_reason": 3}
    for usage in ([], None, {"prompt_tokens": "5", "completion_tokens": 10**30}, {"prompt_tokens": -1}):
        outcome = rows_of(row, RowOptions(), "in").answered(row, CHAT, 200, {"choices": [choice], "usage": usage})
        assert not outcome.is_failure and outcome.prompt_tokens == outcome.output_tokens == 0
        assert outcome.fields["finish_reason"] == "3" and outcome.fields["reasoning"] == '{"a": 1}'
        assert outcome.fields["answer"].encode()
    text = {"choices": [{"text": "\ud800x", "finish_reason": "stop"}]}
    assert rows_of(row, RowOptions(), "in").answered(row, COMPLETIONS, 200, text).fields["answer"] == "?x"
