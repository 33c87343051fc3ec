"""Chat templates with tools, written for these tests in the manner of several families; none is a checkpoint's own."""

LLAMA_3 = """\
{{- bos_token }}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{ "Environment: ipython\\n" }}{% endif %}
{%- if messages[0].role == "system" %}
    {{- messages[0].content | trim }}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if loop.first and tools is not none and message.role == "user" %}
        {{- "<|start_header_id|>user<|end_header_id|>\\n\\n" }}
        {{- 'Answer with JSON for a call, {"name": its name, "parameters": an object}.\\n\\n' }}
        {%- for tool in tools %}{{ tool | tojson(indent=4) + "\\n\\n" }}{% endfor %}
        {{- message.content | trim + "<|eot_id|>" }}
    {%- elif "tool_calls" in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + "}<|eot_id|>" }}
    {%- elif message.role in ("tool", "ipython") %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + message.content | tojson + "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" + message.content | trim + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{% endif %}
"""

_XML = """\
{%- set ns = namespace(system=messages[0].content if messages[0].role == "system" else "") %}
{%- if tools %}
    {%- set ns.system = ns.system + "\\nYour tools:\\n<tools>" %}
    {%- for tool in tools %}{% set ns.system = ns.system + "\\n" + tool | tojson %}{% endfor %}
    {%- set ns.system = ns.system + '\\n</tools>\\nCall one as <tool_call>\\n{"name": ..., "arguments": ...}' %}
    {%- set ns.system = ns.system + "\\n</tool_call>." %}
{%- endif %}
{%- if ns.system %}{{ BEGIN + "system" + MIDDLE + ns.system + END + "\\n" }}{% endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {%- if loop.previtem is undefined or loop.previtem.role != "tool" %}{{ BEGIN + "user" + MIDDLE }}{% endif %}
        {{- "\\n<tool_response>\\n" + message.content + "\\n</tool_response>" }}
        {%- if loop.last or loop.nextitem.role != "tool" %}{{ END + "\\n" }}{% endif %}
    {%- elif message.role != "system" %}
        {{- BEGIN + message.role + MIDDLE }}
        {%- if message.content %}{{ message.content }}{% endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + "}\\n</tool_call>" }}
        {%- endfor %}
        {{- END + "\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ BEGIN + "assistant" + MIDDLE }}{% endif %}
"""


def _marked(begin: str, middle: str, end: str) -> str:
    marks = (("BEGIN", begin), ("MIDDLE", middle), ("END", end))
    return "".join(f'{{%- set {name} = "{mark}" %}}\n' for name, mark in marks) + _XML


GRANITE_4 = _marked("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")
HERMES = _marked("<|im_start|>", "\\n", "<|im_end|>")

# Calls in tags, as Qwen3-Coder and Granite from 4.2 on write them: a value that is no text stands as JSON.
_TAGS = _XML.replace(
    """            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + "}\\n</tool_call>" }}
""",
    """            {{- "\\n<tool_call>\\n<function=" + call.function.name + ">\\n" }}
            {%- for key, value in call.function.arguments.items() %}
                {{- "<parameter=" + key + ">\\n" }}
                {{- value if value is string else value | tojson }}
                {{- "\\n</parameter>\\n" }}
            {%- endfor %}
            {{- "</function>\\n</tool_call>" }}
""",
).replace(
    """'\\n</tools>\\nCall one as <tool_call>\\n{"name": ..., "arguments": ...}'""",
    """'\\n</tools>\\nCall one as <tool_call>\\n<function=NAME>\\n<parameter=KEY>\\nVALUE\\n</parameter>'""",
)
QWEN3_CODER = HERMES.replace(_XML, _TAGS)
GRANITE_4_2 = GRANITE_4.replace(_XML, _TAGS)
# SmolLM3 asks for tools by another name, and may think.
SMOLLM3 = HERMES.replace("if tools %}", "if xml_tools or python_tools %}").replace("in tools %}", "in xml_tools %}") + (
    "{%- if add_generation_prompt and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n' }}{% endif %}"
)
MISTRAL_V11 = """\
{{- bos_token }}
{%- if tools %}{{ "[AVAILABLE_TOOLS]" + tools | tojson + "[/AVAILABLE_TOOLS]" }}{% endif %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- "[INST]" + message.content + "[/INST]" }}
    {%- elif message.role == "system" %}
        {{- "[SYSTEM_PROMPT]" + message.content + "[/SYSTEM_PROMPT]" }}
    {%- elif message.role == "tool" %}
        {{- "[TOOL_RESULTS]" + message.content + "[/TOOL_RESULTS]" }}
    {%- else %}
        {{- message.content or "" }}
        {%- for call in message.tool_calls or [] %}
            {{- "[TOOL_CALLS]" + call.function.name + "[ARGS]" + call.function.arguments | tojson }}
        {%- endfor %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
"""

TEMPLATES = {
    "llama-3": LLAMA_3,
    "granite-4": GRANITE_4,
    "hermes": HERMES,
    "qwen3-coder": QWEN3_CODER,
    "granite-4.2": GRANITE_4_2,
    "mistral-v11": MISTRAL_V11,
}
