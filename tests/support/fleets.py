"""A fleet as others see it: a front in a process of its own, its log, and the processes of its replicas."""

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import checkpoints
import httpx2 as httpx
from processes import descendants
from servers import running


class Fleet:
    """A front in a process of its own, which has said its address; `host` is the process below which replicas are."""

    def __init__(self, process: "subprocess.Popen[bytes]", host: int | None = None):
        self.process, self._host = process, host or process.pid
        assert process.stderr is not None
        self.log: list[str] = []
        self.url = ""
        for line in iter(process.stderr.readline, b""):
            self.log.append(line.decode())
            if said := re.match(r"http://\S+", self.log[-1]):
                self.url = said[0]
                break
        assert self.url, self.log
        threading.Thread(target=self._read, args=(process.stderr,), daemon=True).start()

    def _read(self, stream: Any) -> None:
        with suppress(ValueError, OSError):
            for line in iter(stream.readline, b""):
                self.log.append(line.decode())

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=180, trust_env=False)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, headers=headers)

    def get(self, path: str) -> httpx.Response:
        with self.client() as client:
            return client.get(path)

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, "".join(self.log[-40:])
            time.sleep(0.1)

    def until_ready(self, replicas: int = 2) -> "Fleet":
        self.until(lambda: len(self.replicas()) == replicas and self.get("/ready").status_code == 200)
        return self

    def replicas(self) -> list[int]:
        """The processes of the replicas."""
        return [pid for pid in descendants(self._host) if title(pid).startswith("ray::ServeReplica")]

    def metric(self, name: str) -> dict[str, float]:
        """A metric by the replica's label, or "" without one."""
        found: dict[str, float] = {}
        for line in self.get("/metrics").text.splitlines():
            if line.split("{")[0].split(" ")[0] == name:
                label = re.search(r'replica="([^"]*)"', line)
                found[label[1] if label else ""] = float(line.split()[-1])
        return found


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = 1000  # tokens of each of few streams, and half of them where there are many
_TEXT = {"type": "string", "minLength": 2 * LONG}  # characters: it is cut off in the middle, as all streams here are
_NOTE = {"type": "object", "properties": {"text": _TEXT}, "required": ["text"]}
_TOOLS = {
    "tools": [{"type": "function", "function": {"name": "note", "parameters": _NOTE}}], "tool_choice": "required",
    "parallel_tool_calls": False, "ignore_eos": False,
}  # fmt: skip


def _length(count: int) -> int:
    return LONG if count <= 8 else LONG // 2


def bodies(count: int = 8) -> list[tuple[str, dict[str, Any]]]:
    """Streams: greedy and drawn, chats and texts, with log-probabilities and without, every fourth one a call."""
    common = {"model": "tiny", "max_tokens": _length(count), "ignore_eos": True, "stream": True}
    usage = {"stream_options": {"include_usage": True}}
    found = []
    for i in range(count // 2):
        decoding = {"temperature": 0} if i % 2 else {"temperature": 1, "seed": i}
        messages = [{"role": "user", "content": f"Question {i}"}]
        tools = _TOOLS if i % 4 > 1 else {}
        found.append((CHAT, {**common, **decoding, **usage, **tools, "messages": messages, "logprobs": i % 4 == 1}))
        found.append((COMPLETIONS, {**common, **decoding, "prompt": f"Text {i}"}))
    return found


def events(text: str) -> list[Any]:
    """The events of a stream, but for what chance and caches decide."""
    found: list[Any] = []
    for block in text.split("\n\n"):
        if block.startswith("data: {"):
            event = json.loads(block.removeprefix("data: "))
            event.pop("id", None), event.pop("created", None)
            for choice in event.get("choices", ()):
                for call in choice.get("delta", {}).get("tool_calls", ()):
                    call.pop("id", None)
            if event.get("usage"):
                event["usage"].pop("prompt_tokens_details")
            found.append(event)
        elif block.startswith("data: "):
            found.append(block)
    return found


class Streams:
    """The streams at once."""

    def __init__(self, fleet: Fleet, count: int = 8):
        self.texts = [""] * count
        self._fleet, self._length = fleet, _length(count)
        self._threads = [threading.Thread(target=self._read, args=(i, *one)) for i, one in enumerate(bodies(count))]
        for thread in self._threads:
            thread.start()

    def _read(self, i: int, path: str, body: dict[str, Any]) -> None:
        with self._fleet.client() as client, client.stream("POST", path, json=body) as got:
            for piece in got.iter_text():
                self.texts[i] += piece

    def until_both_replicas_speak(self) -> bool:
        """Wait until all have begun; whether both replicas have some that are not near their end."""
        self._fleet.until(lambda: all("data: " in text for text in self.texts))
        running = self._fleet.metric("tinyserve_requests_running")
        return (
            len(running) == 2
            and min(running.values()) > 0
            and all(t.count("data: ") < self._length / 2 for t in self.texts)
        )

    def ended(self) -> list[list[Any]]:
        for thread in self._threads:
            thread.join(180)
            assert not thread.is_alive(), "".join(self._fleet.log[-40:])
        for text in self.texts:  # one answer, whoever has said it
            assert len(set(re.findall(r'^data: {"id":"([^"]+)"', text, re.M))) == 1
            assert len(re.findall(r'"tool_calls":\[{"index":0,"id":"', text)) == ("tool_calls" in text)
            assert len(set(re.findall(r'"created":(\d+)', text))) == 1
        return [events(text) for text in self.texts]


def in_mid_answer(fleet: Fleet, count: int = 8) -> Streams:
    """The streams, once both replicas are at work."""
    for _ in range(20):
        streams = Streams(fleet, count)
        if streams.until_both_replicas_speak():
            return streams
        streams.ended()
    raise AssertionError("too fast for the test")


def answers_of_one_server(model: Path, count: int = 8) -> list[list[Any]]:
    """What a single server says to all of them."""
    options = {"max_num_seqs": 16, "num_threads": 1, "dtype": "float32"}
    with running({"tiny": model}, **options) as server, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: events(server.post(*one).text), bodies(count)))
    assert all(len(one) > _length(count) // 4 and one[-1] == "data: [DONE]" for one in found)
    return found


def write_model(folder: Path) -> Path:
    """A tiny model with room for long answers, which is told of tools."""
    checkpoints.write_folder(folder, checkpoints.CONFIGS["llama"] | {"max_position_embeddings": 2048})
    tools = "{% if tools %}<tool_call>{{ tools | tojson }}</tool_call>{% endif %}"
    config = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": tools + checkpoints.CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
