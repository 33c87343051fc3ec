"""Templates render as transformers renders them, in a sandbox, and fail in one sentence."""

from datetime import datetime
from enum import StrEnum
from random import Random
from typing import Any

import pytest
from oracles import Oracle
from refusals import refused

from tinyserve.text.chat_template import ChatTemplate

pytestmark = pytest.mark.fast

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

TEMPLATES = {
    # SmolLM2-135M-Instruct, as its GGUF file has it (Apache-2.0).
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "chatml": """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "llama-3": """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if strftime_now is defined %}
    {{- "Today Date: " + strftime_now("%d %b %Y") + "\\n\\n" }}
{%- endif %}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "llama-2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must "
        "alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "zephyr": """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "granite": """\
{%- set ns = namespace(system='You are Granite.', tool_text='') %}
{%- if messages[0].role == 'system' %}
    {%- set ns.system = messages[0].content %}
{%- endif %}
{%- if tools %}
    {%- for tool in tools %}
        {%- set ns.tool_text = ns.tool_text + '\\n' + (tool | tojson) %}
    {%- endfor %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + ns.system + ns.tool_text + '<|end_of_text|>\\n' }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {{- '<|start_of_role|>assistant<|end_of_role|>' }}
        {%- for call in message.tool_calls %}
            {{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
        {%- endfor %}
        {{- '<|end_of_text|>\\n' }}
        {%- continue %}
    {%- endif %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_of_role|>assistant<|end_of_role|>' }}
    {%- if controls is defined %}{{ controls | tojson }}{% endif %}
{%- endif %}
""",
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}[{{ m.content }}]{% endif %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% endfor %}"
    ),
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hi"}],
    "html and spaces": [{"role": "user", "content": "  <b>é & 'ü'</b> 👍 "}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "turns": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Sure?"},
    ],
    "tool call": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": {"city": "Köln"}}}],
        },
        {"role": "user", "content": "Thanks"},
    ],
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "a < b & 'ç'", "parameters": {}}}]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(
    name: str, conversation: str, tools: Any, add_generation_prompt: bool, oracle: Oracle
) -> None:
    utils = oracle("transformers.utils.chat_template_utils")
    messages = CONVERSATIONS[conversation]
    [expected], _ = utils.render_jinja_template(
        [messages],
        tools=tools,
        chat_template=TEMPLATES[name],
        add_generation_prompt=add_generation_prompt,
        **SPECIAL,
    )
    template = ChatTemplate(TEMPLATES[name], SPECIAL, name)
    assert template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt) == expected


def render(source: str, messages: Any = CONVERSATIONS["one"], **variables: Any) -> str:
    return ChatTemplate(source, SPECIAL, "org/model").render(messages, **variables)


def test_golden_texts() -> None:
    """What the formats look like, written out."""
    turns = CONVERSATIONS["turns"]
    assert render(TEMPLATES["smollm2"], turns) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(TEMPLATES["llama-2"], turns) == "<s>[INST] 1 + 1? [/INST] 2 </s><s>[INST] Sure? [/INST]"
    zephyr = "<|user|>\n1 + 1?</s>\n<|assistant|>\n2</s>\n<|user|>\nSure?</s>\n<|assistant|>\n"
    assert render(TEMPLATES["zephyr"], turns) == zephyr
    assert render(TEMPLATES["generation"], turns) == "[1 + 1?]2</s>[Sure?]"


def test_variables_reach_the_template() -> None:
    assert render("{{ enable_thinking }}{{ controls | tojson }}", enable_thinking=False, controls={"a": [1]}) == (
        'False{"a": [1]}'
    )
    assert render("{{ bos_token }}{{ eos_token }}", eos_token="<end>") == "<s><end>"


def test_undefined_is_empty_and_missing_tools_and_documents_are_none() -> None:
    assert render("{{ nothing }}{{ tools is none }}{{ documents is none }}") == "TrueTrue"


def test_tojson_is_json_and_not_html() -> None:
    assert render("{{ messages | tojson }}", [{"role": "user", "content": "<é&'>"}]) == (
        '[{"role": "user", "content": "<é&\'>"}]'
    )
    assert render("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}") == '{"a":2,"b":1}'


def test_strftime_now_is_today() -> None:
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"text": "two"}, "three"]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "one\ntwo\nthree"


def test_a_tool_call_needs_no_content() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    assert render("{{ messages[0].content is none }}", [call]) == "True"


class Role(StrEnum):
    USER = "user"


def test_data_is_copied_as_json_and_left_alone() -> None:
    messages = [{"role": Role.USER, "content": "Hi", "extra": ("a", {"b": 1.5, "c": None, "d": True})}]
    assert render("{{ messages | tojson }}", messages) == (
        '[{"role": "user", "content": "Hi", "extra": ["a", {"b": 1.5, "c": null, "d": true}]}]'
    )
    with refused(None, "unsafe"):
        render("{{ messages[0].update({'content': 'Bye'}) }}", messages)
    assert messages[0]["content"] == "Hi"


@pytest.mark.parametrize(
    ("source", "param", "sentence"),
    [
        (
            "a\n{{ raise_exception('Roles must alternate.') }}",
            "messages",
            "The chat template of org/model refuses these messages at line 2: Roles must alternate.",
        ),
        (
            "\n\n{{ messages[5].content.strip() }}",
            None,
            "The chat template of org/model fails at line 3: list object has no element 5.",
        ),
        ("{{ 1 + 'a' }}", None, "The chat template of org/model fails at line 1: unsupported operand"),
        ("{{ ''.__class__.__mro__ }}", None, "at line 1: access to attribute '__class__' of 'str' object is unsafe."),
        ("{{ raise_exception.__globals__.items() }}", None, "is unsafe"),
        ("{{ messages.append(1) }}", None, "access to attribute 'append' of 'list' object is unsafe."),
        ("{{ range(10000000) | list }}", None, "Range too big"),
        ("{% include 'x' %}", None, "no loader for this environment"),
    ],
)
def test_a_template_that_fails_says_where_and_why(source: str, param: str | None, sentence: str) -> None:
    with refused(param, sentence):
        render(source)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{% for m in messages %}\n{% endif %}", " at line 2: "),
        ("\n{% audio m %}", " at line 2: Encountered unknown tag 'audio'"),
        ("{{ messages | speak }}", " at line 1: No filter named 'speak'"),
        ("{% if " + "(" * 10000, ": "),
    ],
)
def test_what_is_no_template_is_told_when_somebody_chats(source: str, sentence: str) -> None:
    template = ChatTemplate(source, SPECIAL, "org/model")
    for use in (template.compile, lambda: template.render(CONVERSATIONS["one"])):
        with refused("messages", f"The chat template of org/model is no valid Jinja{sentence}"):
            use()


# --- what clients send back, and what templates want -----------------------------------------------------------------

PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}|"
    "{% endif %}{% endfor %};{% endfor %}"
)
FIRST_PART = "{% for m in messages %}{{ m.role }}:{{ m.content[0].text }};{% endfor %}"
EITHER = (
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}|{% endfor %}{% endif %};{% endfor %}"
)
SYSTEM_AS_TEXT = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'system' %}{{ m.content + '!' }}{% else %}"
    "{% for part in m.content %}{{ part.text }}|{% endfor %}{% endif %};{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
TWO_PARTS = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (PARTS, "system:a|;user:b|c|;"),
        (FIRST_PART, "system:a;user:b\nc;"),
        (EITHER, "system:a;user:b|c|;"),
        (SYSTEM_AS_TEXT, "system:a!;user:b|c|;"),
        (PLAIN, "system:a;user:b\nc;"),
        ("{% for m in messages %}{{ m.role }}:{{ m.content | tojson }};{% endfor %}", 'system:"a";user:"b\\nc";'),
        ("{{ messages[0].role }}", "system"),
    ],
)
def test_contents_are_text_or_parts_as_the_template_reads_them(source: str, expected: str) -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": TWO_PARTS}]
    assert render(source, messages) == expected


def test_a_role_that_the_template_refuses_to_try_is_read_as_the_users() -> None:
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + PARTS
    messages = [{"role": "user", "content": "a"}, {"role": "critic", "content": "b"}]
    assert render(source, messages) == "user:a|;critic:b|;"


NO_CALLS = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ 'CALLS' if 'tool_calls' in m }};{% endfor %}"


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": []}, {"content": ""}])
@pytest.mark.parametrize("calls", [{}, {"tool_calls": None}, {"tool_calls": []}])
def test_nulls_and_empty_lists_of_an_earlier_answer_are_as_left_out(
    content: dict[str, Any], calls: dict[str, Any]
) -> None:
    answer = {"role": "assistant", **content, **calls, "refusal": None, "name": None}
    assert render(NO_CALLS, [*CONVERSATIONS["one"], answer]).endswith("assistant:;")
    assert render("{{ 'name' in messages[0] }}", [answer]) == "False"


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": []}])
@pytest.mark.parametrize("source", [PARTS, PLAIN, EITHER])
def test_a_tool_may_have_said_nothing(source: str, content: dict[str, Any]) -> None:
    tool = {"role": "tool", "tool_call_id": "a", **content}
    assert render(source, [*CONVERSATIONS["one"], tool]).rstrip("|;").endswith("tool:")


@pytest.mark.parametrize("given", [{"arguments": text} for text in ("", " \n", "null", "{}", None, {})] + [{}])
def test_a_call_without_parameters_has_an_empty_object(given: dict[str, Any]) -> None:
    call = {"id": None, "type": "function", "function": {"name": "now", **given}}
    source = "{% for c in messages[0].tool_calls %}{{ c.function.arguments | tojson }}{{ 'id' in c }}{% endfor %}"
    assert render(source, [{"role": "assistant", "content": None, "tool_calls": [call]}]) == "{}False"


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ '<' + m.content + '>' }}{% endfor %}",
        "{% for m in messages %}<{{ m.content }}>{% endfor %}",
        "{% for m in messages %}<{{ m.content | trim }}>{% endfor %}",
        "{% for m in messages %}<{% if m.content is not none %}{{ m.content }}{% endif %}>{% endfor %}",
        "{% for m in messages %}<{{ m.content or '' }}>{% endfor %}",
    ],
)
def test_a_message_of_calls_alone_says_nothing(source: str) -> None:
    said: list[dict[str, Any]] = [{"content": None}, {"content": ""}, {}]
    for content in said:
        message = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}], **content}
        assert ChatTemplate(source, {}, "m").render([{"role": "user", "content": "a"}, message]) == "<a><>"


def test_a_developer_is_the_system_where_the_template_knows_none() -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert render(PLAIN, messages) == "system:Be brief.;user:Hi;"
    knows = "{% if messages[0].role == 'developer' %}!{% endif %}" + PLAIN
    assert render(knows, messages) == "!developer:Be brief.;user:Hi;"


MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.tool_calls is defined %}"
    "{% for c in m.tool_calls %}{% if c.id is not defined or c.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}{{ c.id }} "
    "{% endfor %}{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('id') }}{% endif %}"
    "{{ m.tool_call_id }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def called(call_id: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [{"id": call_id, "function": {"name": "f"}}]},
        {"role": "tool", "tool_call_id": call_id, "content": "b"},
    ]


def test_ids_of_calls_are_such_as_the_template_takes() -> None:
    template = ChatTemplate(MISTRAL, SPECIAL, "m")
    ids = [template.new_call_id() for _ in range(3)]
    assert template.new_call_id(Random("a")) == template.new_call_id(Random("a")) != template.new_call_id(Random("b"))
    assert all(len(call_id) == 9 and call_id.isalnum() for call_id in ids) and len(set(ids)) == 3
    for call_id in ids:
        assert template.render(called(call_id)) == f"[INST]a[/INST]{call_id} {call_id}"
    for source in (PLAIN, PARTS, TEMPLATES["llama-2"]):
        assert ChatTemplate(source, SPECIAL, "m").new_call_id().startswith("call_")


def test_ids_that_another_model_gave_are_made_such() -> None:
    asked, answered = render(MISTRAL, called("call_0123456789")).removeprefix("[INST]a[/INST]").split(" ")
    assert asked == answered and len(asked) == 9 and asked.isalnum()
    assert asked != render(MISTRAL, called("call_0123456788")).split(" ")[1]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def continued(source: str, content: Any, **options: Any) -> str:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    options = {"add_generation_prompt": False, "continue_final_message": True} | options
    return render(source, messages, **options)


@pytest.mark.parametrize("content", ["Hello", "", "Hello ", " Hi\n", "Hi", "a<|im_end|>b"])
def test_the_last_message_is_continued_where_its_text_ends(content: str) -> None:
    assert continued(CHATML, content) == f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{content}"


def test_a_continued_message_may_be_in_parts_or_trimmed_or_null() -> None:
    assert continued(PARTS, TWO_PARTS) == "user:Hi|;assistant:b|c"
    assert continued(CHATML.replace("m.content", "m.content | trim"), " a ").endswith("assistant\na ")
    assert continued(CHATML, None).endswith("assistant\n") and continued(CHATML, []).endswith("assistant\n")


def test_continuing_as_transformers_does(oracle: Oracle) -> None:
    utils = oracle("transformers.utils.chat_template_utils")
    for name in ("smollm2", "zephyr", "granite", "llama-2"):
        messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "It is"}]
        [expected], _ = utils.render_jinja_template(
            [messages], chat_template=TEMPLATES[name], continue_final_message=True, **SPECIAL
        )
        ours = render(TEMPLATES[name], messages, add_generation_prompt=False, continue_final_message=True)
        assert ours == expected


def test_what_cannot_be_continued_says_why() -> None:
    with refused("continue_final_message", "Set add_generation_prompt to false"):
        continued(CHATML, "a", add_generation_prompt=True)
    with refused("continue_final_message", "continue_final_message is 1; it must be True or False"):
        continued(CHATML, "a", continue_final_message=1)
    assert continued("{{ messages[1].content }}|{{ messages[1].content }}.", "a") == "a|a"
    with refused("continue_final_message", "does not show the last message as it is"):
        continued("{{ messages[0].content }}", "a")
    call = [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]
    with refused("messages[0].content", "has no text that could be continued"):
        render(CHATML, call, add_generation_prompt=False, continue_final_message=True)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c"])
def test_only_line_feeds_end_lines(separator: str) -> None:
    text = f" a{separator} b"
    assert render(f"x{separator}{{{{ messages[0].content }}}}", [{"role": "user", "content": text}]) == (
        f"x{separator}{text}"
    )
    with refused(None, "at line 2: "):
        render(f"a{separator}b\n{{{{ 1 + 'a' }}}}")


DEEP: list[Any] = []
DEEP.append(DEEP)


def test_roles_that_do_not_alternate_are_the_users_mistake() -> None:
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with refused("messages", "refuses these messages at line 1: Conversation roles must alternate"):
        render(TEMPLATES["llama-2"], twice)


@pytest.mark.parametrize(
    ("messages", "param", "sentence"),
    [
        ([], "messages", "There are no messages"),
        ("Hi", "messages", "Messages must be a list of objects with role and content, but this is str."),
        (
            {"role": "user", "content": "Hi"},
            "messages",
            "Messages must be a list of objects with role and content, but this is dict.",
        ),
        (["Hi"], "messages[0]", "messages[0] must be an object with role and content, but this is str."),
        ([{"content": "Hi"}], "messages[0].role", "messages[0] must have a role"),
        ([{"role": "", "content": "Hi"}], "messages[0].role", "messages[0] must have a role"),
        ([{"role": "user"}], "messages[0].content", "must be text or a list of text parts, but this is null."),
        (
            [{"role": "user", "content": 3}],
            "messages[0].content",
            "messages[0].content must be text or a list of text parts, but this is int.",
        ),
        (
            [{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "image_url"}]}],
            "messages[1].content[0]",
            "messages[1].content[0] is of type 'image_url'",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "must be text"),
        ([{"role": "user", "content": [7]}], "messages[0].content[0]", "is of type 'int'"),
        (
            [{"role": "user", "content": "a", "x": DEEP}],
            ("messages[0].x" + 20 * "[0]")[:60],
            "nested more than 100 levels",
        ),
        ([{"role": "user", "content": "a", "x": {1, 2}}], "messages[0].x", "must be JSON data, but this is set."),
    ],
)
def test_a_malformed_message_says_which_and_how(messages: Any, param: str, sentence: str) -> None:
    with refused(param, sentence):
        render("{{ messages }}", messages)


def test_a_variable_that_is_no_data_is_named() -> None:
    with refused("user.tags", "the template variables.user.tags must be JSON data, but this is set."):
        render("", [{"role": "user", "content": "a"}], user={"tags": {1, 2}})
