"""One engine in a process of its own: stopped until a line comes, it works and answers in a line; the rest is logged.

Knows how to ask and how to answer; what is asked, and in which order, is bench_peers.py's business.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from peers import PEERS, Engine, NotMeasured, models

SCRIPTS = Path(__file__).parent.parent


class Worker:
    """One engine in its own process, whose chatter goes to a file in the work folder."""

    def __init__(self, name: str, setting: dict[str, Any]):
        self.refused: set[str] = set()
        folder = models.home(setting["model"], Path(setting["workdir"]))
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{name.replace(' ', '-')}.log"
        with self.log.open("wb") as log:
            if "path" not in setting:  # else an earlier worker has prepared it
                setting["path"] = self._begin({**setting, "action": "prepare"}, log)
                self.end()
            self.path = setting["path"]
            self._begin({**setting, "action": "serve"}, log)
        self._rest()

    def _begin(self, setting: dict[str, Any], log: Any) -> Any:
        """Start a process; its first answer."""
        command = [sys.executable, "-m", "peers.worker", json.dumps(setting)]
        path = os.pathsep.join(filter(None, [str(SCRIPTS), str(SCRIPTS.parent), os.environ.get("PYTHONPATH")]))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        self.process = subprocess.Popen(command, text=True, env={**os.environ, "PYTHONPATH": path}, **pipes)
        try:
            return self._read()
        except BaseException:
            self.end()
            raise

    def _read(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise NotMeasured(f"its process ended with exit code {self.process.wait()}; see {self.log.name}")
        answer = json.loads(line)
        if "reason" in answer:
            raise NotMeasured(answer["reason"])
        return answer["result"]

    def ask(self, request: list[Any]) -> Any:
        self.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # of a dead process, which reading will tell
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        try:
            return self._read()
        finally:
            self._rest()

    def _rest(self) -> None:
        """Stop all its threads: some engines' go on looking for work, which the next engine would pay for."""
        self.process.send_signal(signal.SIGSTOP)

    def is_dead(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def serve(setting: dict[str, Any]) -> None:
    """A worker's life: build the files and say where they are, or load them and answer a line for each line."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print

    def answer(function: Any, *arguments: Any) -> None:
        try:
            reply = {"result": function(*arguments)}
        except NotMeasured as problem:
            reply = {"reason": str(problem)}
        except Exception as error:
            traceback.print_exc()
            reply = {"reason": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        print(json.dumps(reply), file=out, flush=True)

    engines: list[Engine] = []

    def prepare() -> str:
        module = PEERS[setting["peer"]].load()
        return module.prepare(setting["model"], setting["format"], Path(setting["workdir"]))

    def load() -> None:
        module = PEERS[setting["peer"]].load()
        names = ("path", "format", "threads", "max_length", "sequences")
        engines.append(module.Engine(*(setting[name] for name in names), **setting["options"]))

    answer(prepare if setting["action"] == "prepare" else load)
    for line in sys.stdin if engines else ():
        work, *arguments = json.loads(line)
        answer(getattr(engines[0], work), *arguments)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
