"""A server under load beside its engine alone: the same requests in one process, and over HTTP by many clients at once.

    python scripts/bench_server.py --clients 64 --requests 500 --rounds 2

Every client sends a request, reads its stream to the end, and sends the next. Answers are greedy, and must be those of
the engine alone, which does all requests as one batch. Then again with a third of the clients hanging up at random:
afterwards no block may be held. Times are from a clock that both processes share.
"""

import argparse
import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyserve import SamplingParams
from tinyserve.async_engine import AsyncEngine

TEXT = (
    "In the morning the ships lay still in the harbour, and the men who had come down from the hills stood on the quay "
    "and counted them. Nobody spoke. A boy asked how far it was to the islands, and an old woman told him that it was "
    "as far as he could see, and once more as far again."
)


@dataclass
class Answer:
    """What a client saw: the text, and when its bytes came."""

    text: str = ""
    id: str = ""
    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    error: str | None = None
    hung_up: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="a file for all figures")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)  # this process is the server
    arguments = parser.parse_args()
    if arguments.serve:
        run_server(arguments)
        return
    prompts = [f"Part {i}. {TEXT} {TEXT[: 40 + i % 90]}" for i in range(arguments.requests)]
    figures: list[dict[str, Any]] = []
    expected: list[str] = []
    for round_ in range(arguments.rounds):
        rate, expected = alone(arguments, prompts)
        figures.append({"round": round_, "alone": rate, **served(arguments, prompts, expected)})
        print(summary(figures[-1]), flush=True)
    ratio = statistics.median(one["served"] / one["alone"] for one in figures)
    print(
        f"{arguments.requests} requests, {arguments.clients} clients, {arguments.dtype}: {ratio:.3f} x the engine alone"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"dtype": arguments.dtype, "max_num_seqs": arguments.max_num_seqs, "max_model_len": 512}


def alone(arguments: argparse.Namespace, prompts: list[str]) -> tuple[float, list[str]]:
    """Tokens a second of the engine with all requests at once, and the answers. In a process of its own."""
    code = (
        "import json, sys, time\n"
        "from tinyserve import LLM, SamplingParams\n"
        "options, prompts, tokens = json.load(sys.stdin)\n"
        "llm = LLM(sys.argv[1], **options)\n"
        "llm.generate(prompts[:4], SamplingParams(temperature=0, max_tokens=4))\n"
        "start = time.perf_counter()\n"
        "outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))\n"
        "seconds = time.perf_counter() - start\n"
        "print(json.dumps([seconds, [o.outputs[0].text for o in outputs]]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, arguments.model],
        input=json.dumps([options(arguments), prompts, arguments.tokens]), capture_output=True, text=True, check=True,
    )  # fmt: skip
    seconds, texts = json.loads(done.stdout)
    return len(prompts) * arguments.tokens / seconds, texts


def served(arguments: argparse.Namespace, prompts: list[str], expected: list[str]) -> dict[str, Any]:
    """The same over HTTP; then with clients that hang up."""
    with tempfile.NamedTemporaryFile() as file:
        process = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--serve", file.name], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        try:
            port = int(process.stdout.readline())
            asyncio.run(load(port, prompts[:4], arguments, hang_up=0.0))
            start = time.perf_counter()
            answers = asyncio.run(load(port, prompts, arguments, hang_up=0.0))
            seconds = time.perf_counter() - start
            errors = [answer.error for answer in answers if answer.error]
            wrong = sum(answer.text != text for answer, text in zip(answers, expected, strict=True))
            leaving = asyncio.run(load(port, prompts, arguments, hang_up=1 / 3))
            time.sleep(1)
            held = metric(port, "tinyserve_cache_blocks_used")
            wrong_beside = sum(
                not answer.hung_up and answer.text != text for answer, text in zip(leaving, expected, strict=True)
            )
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
        first_token = json.loads(Path(file.name).read_text())
    gaps = [b - a for answer in answers for a, b in zip(answer.times, answer.times[1:], strict=False)]
    waits = [answer.times[0] - answer.sent for answer in answers]
    lags = [answer.times[0] - first_token[answer.id] for answer in answers]
    return {
        "served": len(prompts) * arguments.tokens / seconds,
        "errors": errors, "wrong": wrong, "wrong_beside_those_who_left": wrong_beside,
        "left": sum(answer.hung_up for answer in leaving), "blocks_held": held,
        "first_token": quantiles(waits), "gap": quantiles(gaps), "first_byte_after_token": quantiles(lags),
    }  # fmt: skip


def quantiles(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(seconds)
    return {f"p{p}": 1e3 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 99)}


def summary(one: dict[str, Any]) -> str:
    """A round, in a line."""
    times = ", ".join(
        f"{name.replace('_', ' ')} {one[name]['p50']:.1f} / {one[name]['p99']:.1f}"
        for name in ("first_token", "gap", "first_byte_after_token")
    )
    return (
        f"alone {one['alone']:.1f} tokens/s, served {one['served']:.1f}; ms p50 / p99: {times}; {len(one['errors'])} "
        f"errors, {one['wrong']} wrong; {one['left']} hung up: {one['wrong_beside_those_who_left']} wrong beside them, "
        f"{one['blocks_held']:.0f} blocks held"
    )


def metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


# --- the clients ----------------------------------------------------------------------------------------------------


async def load(port: int, prompts: list[str], arguments: argparse.Namespace, hang_up: float) -> list[Answer]:
    """Every client takes the next request as soon as its last one is answered."""
    answers = [Answer() for _ in prompts]
    waiting = iter(range(len(prompts)))
    chance = random.Random(0)

    async def client() -> None:
        for i in waiting:
            leave_after = chance.randrange(arguments.tokens) if chance.random() < hang_up else None
            try:
                await ask(port, prompts[i], arguments, answers[i], leave_after)
            except (OSError, ValueError, KeyError, asyncio.IncompleteReadError) as error:
                answers[i].error = repr(error)

    await asyncio.gather(*(client() for _ in range(arguments.clients)))
    return answers


async def ask(port: int, prompt: str, arguments: argparse.Namespace, answer: Answer, leave_after: int | None) -> None:
    """One request. Sockets and no library: on two cores a client's own work would be measured, too."""
    body = json.dumps(
        {"prompt": prompt, "max_tokens": arguments.tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        answer.sent = time.perf_counter()
        head = (
            "POST /v1/completions HTTP/1.1",
            "Host: 127.0.0.1",
            "Connection: close",
            "Content-Type: application/json",
        )
        writer.write("\r\n".join((*head, f"Content-Length: {len(body)}", "", "")).encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise ValueError(status + await reader.read())
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            answer.times.append(time.perf_counter())
            event = json.loads(line[6:])
            answer.id = event["id"]
            answer.text += event["choices"][0]["text"]
            if leave_after is not None and len(answer.times) > leave_after:
                answer.hung_up = True
                return
    finally:
        writer.close()


# --- the server -----------------------------------------------------------------------------------------------------


def run_server(arguments: argparse.Namespace) -> None:
    """Serve, and write down when the engine had each request's first token."""
    from tinyserve.engine_options import EngineOptions
    from tinyserve.server.options import ServeOptions
    from tinyserve.server.run import serve

    first: dict[str, float] = {}
    generate = AsyncEngine.generate

    async def noted(self: AsyncEngine, prompt: Any, params: SamplingParams, request_id: str, *rest: Any) -> Any:
        async for chunk in generate(self, prompt, params, request_id, *rest):
            if request_id not in first:
                first[request_id] = chunk.metrics.token_times[0]
            yield chunk

    AsyncEngine.generate = noted  # type: ignore[method-assign, assignment]
    try:
        serve(ServeOptions(models={"it": arguments.model}, engine=EngineOptions.of(options(arguments)), port=0,
                           max_queue=1000,
                           on_listen=lambda url: print(url.rpartition(":")[2], flush=True)))  # fmt: skip
    finally:
        arguments.serve.write_text(json.dumps(first))


if __name__ == "__main__":
    main()
