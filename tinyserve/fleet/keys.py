"""What a front reads in a request, and writes into it: whose it is, whether its stream can be spliced, its seed.

Knows OpenAI's bodies by the few fields that matter here; the replicas check them.
"""

import hashlib
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SESSION_HEADER = "x-session-id"
_STREAMED = ("/v1/chat/completions", "/v1/completions")
_SEEDS = 1 << 31  # below: every client and server takes them


@dataclass(frozen=True)
class Asked:
    """A request as a front sees it; `key` is None where it may go anywhere."""

    key: str | None
    is_spliceable: bool  # a stream whose events come in one order
    body: bytes
    answer: tuple[str, int] | None  # the number and the time of its answer


def read_request(path: str, headers: Mapping[str, str], body: bytes) -> Asked:
    """Read a request to a replica. A body that is no JSON object goes as it is: the replica says what is wrong."""
    try:
        fields = json.loads(body) if body else None
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        return Asked(headers.get(SESSION_HEADER), False, body, None)
    key = headers.get(SESSION_HEADER) or _key(fields)
    if path not in _STREAMED:
        return Asked(key, False, body, None)
    is_spliceable = fields.get("stream") is True and _is_single(fields)
    # Chance decides three things of an answer, and whoever begins anew must decide alike.
    answer = (secrets.token_hex(16), int(time.time()))
    return Asked(key, is_spliceable, _with_seed(body, fields) if is_spliceable else body, answer)


def _key(fields: Mapping[str, Any]) -> str | None:
    """Of whoever comes again: turns of one chat meet what was computed before."""
    for name in ("prompt_cache_key", "user"):
        if isinstance(given := fields.get(name), str) and given:
            return f"{name}:{given}"
    messages = fields.get("messages")
    if not isinstance(messages, list):
        return None
    first = next((i for i, one in enumerate(messages) if isinstance(one, dict) and one.get("role") == "user"), None)
    if first is None:
        return None
    # Up to the first message of the user: those who share only a system prompt spread.
    begun = json.dumps([fields.get("model"), fields.get("tools"), messages[: first + 1]], sort_keys=True)
    return f"chat:{hashlib.sha256(begun.encode()).hexdigest()}"


def _is_single(fields: Mapping[str, Any]) -> bool:
    """Whether there is one answer: events of several come in the order of their tokens, which time decides."""
    prompt = fields.get("prompt")
    several = isinstance(prompt, list) and len(prompt) > 1 and not all(isinstance(one, int) for one in prompt)
    return fields.get("n") in (None, 1) and fields.get("best_of") in (None, 1) and not several


def _with_seed(body: bytes, fields: Mapping[str, Any]) -> bytes:
    """The body with a seed, if it has none; otherwise as it came, byte for byte."""
    if fields.get("seed") is not None:
        return body
    seed = secrets.randbelow(_SEEDS)
    if "seed" in fields:
        return json.dumps({**fields, "seed": seed}).encode()
    return body.replace(b"{", b'{"seed":%d,' % seed, 1)
