"""The glass box for notebooks: an answer whose tokens are coloured by the probability that the model gave them.

Knows outputs and HTML; the server's page does the same in JavaScript (server/page/glass_box.js), by the same bounds.
"""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinyserve.scheduling.sequence import Logprobs
    from tinyserve.text.request import CompletionOutput, RequestOutput

HEATS = ((0.9, "none"), (0.5, "#f2c94c55"), (0.2, "#f2994a77"), (0.05, "#eb575799"), (0.0, "#c0392bcc"))
_BOX = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7;max-width:46rem"
_SMALL = "opacity:.65;font-size:.85em"
_MOST_PROMPT = 300  # characters


def request_html(output: RequestOutput) -> str:
    """A prompt's end and its answers."""
    prompt = output.prompt or ""
    shown = prompt if len(prompt) <= _MOST_PROMPT else f"… {prompt[-_MOST_PROMPT:]}"
    head = f'<div style="{_BOX};{_SMALL}">{escape(shown)}</div>' if shown else ""
    return head + "".join(answer_html(answer) for answer in output.outputs)


def answer_html(answer: CompletionOutput) -> str:
    """The answer, token by token where its log-probabilities were asked for, and how it ended."""
    thought = f"<details><summary>Thought</summary>{escape(answer.reasoning)}</details>" if answer.reasoning else ""
    if answer.logprobs is None:
        body = escape(answer.text)
    else:
        body = "".join(token_html(token, row) for token, row in zip(answer.token_ids, answer.logprobs, strict=True))
    calls = "".join(
        f"<div><code>{escape(call.name)}({escape(call.arguments)})</code></div>" for call in answer.tool_calls
    )
    speed = answer.metrics.decode_tokens_per_second
    said = [f"{len(answer.token_ids)} tokens", *([f"{speed:.0f}/s"] if speed else []), f"{answer.finish_reason}"]
    if answer.logprobs is None and answer.token_ids:
        said.append("with logprobs=5 each token shows its probability")
    return f'<div style="{_BOX}">{thought}{body}{calls}</div><div style="{_SMALL}">{escape(", ".join(said))}</div>'


def token_html(token: int, row: Logprobs) -> str:
    """A token, coloured; what might have stood in its place is told when it is pointed at."""
    chosen = row[token]
    probability = math.exp(chosen)
    color = next(color for least, color in HEATS if probability >= least)
    others = sorted((one for i, one in row.items() if i != token), reverse=True)
    told = [f"{visible(chosen.decoded_token)} {probability:.1%}, rank {chosen.rank}"]
    told += [f"{visible(one.decoded_token)} {math.exp(one):.1%}" for one in others]
    text = escape(chosen.decoded_token or "")
    return f'<span title="{escape(chr(10).join(told))}" style="background:{color};border-radius:3px">{text}</span>'


def visible(piece: str | None) -> str:
    """A token with its spaces and ends of lines to be seen, and nothing in it that moves a terminal's cursor."""
    text = (piece or "").replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text) or "∅"
