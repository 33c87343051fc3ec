"""Templates render as transformers renders them, in a sandbox, and fail in one sentence."""

from datetime import datetime
from enum import StrEnum
from typing import Any

import pytest
from oracles import Oracle
from refusals import refused

from tinyserve.errors import UserError
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


def test_invalid_jinja_names_the_template_and_the_line() -> None:
    with pytest.raises(UserError, match=r"chat template of org/model is no valid Jinja at line 2: .*endfor"):
        ChatTemplate("{% for m in messages %}\n{% endif %}", SPECIAL, "org/model")


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
        ([{"role": "user", "content": "a", "x": {1, 2}}], "messages[0].x", "must be JSON data, but this is set."),
    ],
)
def test_a_malformed_message_says_which_and_how(messages: Any, param: str, sentence: str) -> None:
    with refused(param, sentence):
        render("{{ messages }}", messages)


def test_a_variable_that_is_no_data_is_named() -> None:
    with refused("user.tags", "the template variables.user.tags must be JSON data, but this is set."):
        render("", [{"role": "user", "content": "a"}], user={"tags": {1, 2}})
