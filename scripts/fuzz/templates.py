"""Mutated and generated chat templates and conversations: each is rendered, or refused with a sentence.

    python scripts/fuzz/templates.py --seconds 60 --seed 1

Anything but a text or a RequestError/UserError is printed with what reproduces it, and the exit code is 1.
`--case 1234` makes one case alone, and shows it.
"""

import random
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "fuzz")]

import common  # noqa: E402
import tokenizers  # noqa: E402
from tokenizers import AddedToken, decoders, models, pre_tokenizers  # noqa: E402

from tinyserve.errors import UserError  # noqa: E402
from tinyserve.sampling_params import SamplingParams  # noqa: E402
from tinyserve.text.chat import ChatFormat, ToolOptions  # noqa: E402
from tinyserve.text.chat_template import ChatTemplate, read_template  # noqa: E402
from tinyserve.text.tokenizer import Tokenizer  # noqa: E402

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{ '[INST] ' + m.content.strip() }}"
    "{% endfor %}",
    "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% elif part['type'] == 'image' %}<image>{% endif %}{% endfor %};{% endfor %}",
    "{%- if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{%- for m in messages %}"
    "{%- if m.tool_calls is defined and m.tool_calls is not none %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{%- if c.id is not defined or c.id | length != 9 %}{{ raise_exception('IDs have 9 letters') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{% endfor %}]{{ eos_token }}{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content | string }}{% else %}"
    "{{ m.content }}{% endif %}{% endfor %}",
    "{% macro turn(role, text) %}<|{{ role }}|>{{ text | trim }}<|end|>{% endmacro %}{% set ns = namespace(n=0) %}"
    "{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ turn(m.role, m.content) }}{% generation %}{{ ns.n }}"
    "{% endgeneration %}{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ strftime_now('%Y') }}",
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
    "{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% endif %}{% endfor %}",
]
SNIPPETS = [
    "{{ messages }}", "{{ m.content | length }}", "{% for c in m.content %}", "{% endfor %}", "{% if tools %}",
    "{% endif %}", "{% audio m %}", "{{ x | speak }}", "{{ 1 / 0 }}", "{{ messages[-1].content[0].text }}",
    "{{ raise_exception(messages) }}", "{{ ''.__class__.__mro__ }}", "{% set messages = 3 %}", "{{ self }}",
    "{% raw %}",
    "{{ messages.append(1) }}", "{% include 'x' %}", "{% extends m %}", "{{ m | tojson(indent=2) }}", "{#", "#}", "{{",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ loop.previtem.role }}", "{% call f() %}", "{{ m.x.y.z }}",
    "{{ namespace(a=1).a }}", "\u2028", "\x85", "\ud800", "\0", "{% continue %}", "{{ m.content + 1 }}", "(" * 300,
    "{{ m.content | map(attribute='text') | join('') }}", "{% set x %}{{ m }}{% endset %}{{ x[:3] }}", "{{ caller() }}",
    "{{ '%s' % m }}", "{{ '{0.role}'.format(m) }}", "{{ m.items() | list }}", "{{ messages | selectattr('role') }}",
]  # fmt: skip
WORDS = ["", "Hi", " a\n", "\u2028", "\ud800", "<|im_end|>", "{{ x }}", "\0", "日本", "null", "</think>b", "é" * 300]
ROLES = ["system", "user", "assistant", "tool", "developer", "function", "ipython", "", "\u2029", "Köln"]


def tokenizer() -> Tokenizer:
    """A tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL.values()])
    ids: dict[str, Any] = {"bos_token_id": 256, "eos_token_ids": frozenset([257])}
    return Tokenizer(backend, source="fuzz", special_tokens=SPECIAL, chat_templates={}, **ids)


class Case:
    """One template with one conversation, both made of a seed."""

    def __init__(self, seed: str):
        self.seed = seed
        self._random = random.Random(seed)
        self._wild = self._random.random() < 0.3  # what is no conversation at all, among others
        self.template = self._template()
        self.messages = self._messages()
        self.variables = self._variables()

    def __str__(self) -> str:
        given = {"template": self.template, "messages": self.messages, "variables": self.variables}
        return f"--- Case({self.seed!r})\n" + "\n".join(f"{name} = {value!r:.4000}" for name, value in given.items())

    def run(self, tokenizer: Tokenizer) -> bool:
        """Whether it was rendered, and not refused; whatever else is raised is a fault."""
        chats = ChatFormat("fuzz", tokenizer, ChatTemplate(self.template, SPECIAL, "fuzz"))
        tools = self._random.choice([None, [{"type": "function", "function": {"name": "f"}}], [], "x", [1], {}])
        choice = self._random.choice([None, "auto", "none", "required", "f", 3])
        rendered = False
        for use in (
            lambda: read_template(self.template),
            lambda: chats.text(self.messages, self.variables),
            lambda: chats.prompt(self.messages, self.variables, add_special_tokens=True),
            lambda: chats.request(self.messages, SamplingParams(), ToolOptions(tools, choice), self.variables),
            chats.new_call_id,
        ):
            try:
                result = use()
            except UserError as error:
                assert str(error).strip(), "an error without a sentence"
                continue
            rendered |= isinstance(result, str) and use != chats.new_call_id
            assert "\ufdd0" not in str(result), "the mark of an end is in the text"
        return rendered

    def _template(self) -> str:
        pick = self._random
        if pick.random() < 0.3:
            return "".join(pick.choices([*SNIPPETS, *WORDS], k=pick.randint(1, 8)))
        text = pick.choice(TEMPLATES)
        for _ in range(pick.choice([0, 0, 1, 1, 2, 5])):
            start, end = sorted(pick.choices(range(len(text) + 1), k=2))
            end = min(end, start + pick.choice([1, 3, 20]))
            match pick.randrange(4):
                case 0:
                    text = text[:start] + text[end:]
                case 1:
                    text = text[:end] + text[start:]
                case 2:
                    text = text[:start] + pick.choice(SNIPPETS) + text[start:]
                case 3:
                    other = pick.choice(TEMPLATES)
                    text = text[:start] + other[pick.randrange(len(other)) :]
        return text

    def _messages(self) -> Any:
        pick = self._random
        if self._wild and pick.random() < 0.1:
            return self._anything()
        messages: list[Any] = []
        for i in range(pick.randint(1, 5)):
            role = ["user", "assistant"][i % 2] if pick.random() < 0.6 else pick.choice(ROLES)
            message: dict[Any, Any] = {"role": role, "content": self._content()}
            if pick.random() < 0.2:
                message["tool_calls"] = self._calls()
            if role == "tool" or pick.random() < 0.1:
                message["tool_call_id"] = pick.choice(["abcdefghi", "call_1", "", "\ud800", None, 3])
            for name in ("content", "role", "name", "refusal"):
                if self._wild and pick.random() < 0.05:
                    message[name] = self._anything()
                elif pick.random() < 0.02:
                    message.pop(name, None)
            messages.append(self._anything() if self._wild and pick.random() < 0.05 else message)
        return messages

    def _content(self) -> Any:
        pick = self._random
        if pick.random() < 0.7:
            return pick.choice(WORDS)
        parts = [{"type": "text", "text": pick.choice(WORDS)} for _ in range(pick.randint(0, 3))]
        return [*parts, self._anything()] if self._wild and pick.random() < 0.2 else parts

    def _calls(self) -> Any:
        pick = self._random
        arguments = ["", "null", "{}", '{"a": 1}', "[", "[" * 5000, {}, {"a": [1]}, None, 3]
        call = {"id": pick.choice(["abcdefghi", "call_1", None]), "type": "function"}
        function = {"name": "f", "arguments": pick.choice(arguments)}
        return pick.choice(
            [None, [], [{**call, "function": function}], [{"function": {"name": "f"}}], self._anything()]
        )

    def _variables(self) -> Mapping[str, Any]:
        pick = self._random
        variables: dict[str, Any] = {}
        for name in ("add_generation_prompt", "continue_final_message"):
            if pick.random() < 0.5:
                variables[name] = pick.choice([True, False, False, False, *self._wildly()])
        for name in ("enable_thinking", "messages", "self", "bos_token", "documents", "loop", "m"):
            if self._wild and pick.random() < 0.1:
                variables[name] = self._anything()
        return variables

    def _wildly(self) -> list[Any]:
        return [self._anything()] if self._wild else []

    def _anything(self) -> Any:
        pick = self._random
        deep: Any = []
        for _ in range(pick.choice([1, 400])):
            deep = [deep] if pick.random() < 0.5 else {"a": deep}
        loop: list[Any] = []
        loop.append(loop)
        return pick.choice(
            [None, 0, -1, 1e400, float("nan"), True, "", "x", b"x", [], {}, [None], {"a": 1}, {1: 2}, {1, 2}, deep,
             loop, object(), 10**400, ("a", ["b"]), {"text": None, "type": "text"}, {"type": "image_url"},
             {"\ud800": "\ud800"}]
        )  # fmt: skip


class Fuzzer:
    """Cases by their numbers."""

    noun = "neither rendered nor refused with a sentence"

    def __init__(self, seed: int):
        self._seed = seed
        self._tokenizer = tokenizer()

    def case(self, number: int) -> Case:
        """A case, made again."""
        return Case(f"{self._seed}-{number}")

    def describe(self, number: int) -> str:
        """Its template, messages and variables."""
        return str(self.case(number))

    def rendered(self, number: int) -> bool:
        """Whether a case was rendered, and not refused."""
        return self.case(number).run(self._tokenizer)

    def fault(self, number: int) -> str:
        """The traceback of what is raised and no refusal."""
        try:
            self.rendered(number)
        except Exception:
            return traceback.format_exc(limit=-4)
        return ""


if __name__ == "__main__":
    sys.exit(common.main(__doc__, Fuzzer))
