"""Chat templates are run in a process of their own, of limited time and memory: they are programs of strangers.

Jinja's sandbox lets none of them out, but `{{ 2**100000000000 }}` hangs whoever compiles it, and one expression takes
all memory. Knows Jinja and pipes, nothing of conversations: a source goes in with its variables, and a text comes out.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn

from tinyserve.errors import TinyserveError

if TYPE_CHECKING:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 2.0  # of processor time: 5,000 messages take a twentieth of it
MAX_WAIT = 20.0  # seconds, however little of the processor there is
MAX_MEMORY = 768 << 20  # bytes of addresses, Python's own 100 MB among them
MAX_CHARACTERS = 16_000_000  # ten contexts of 128k tokens
MAX_PROCESSES = 2  # that run at a time; who comes then waits
_MOST_COMPILED = 8  # templates that a process keeps
_LONGEST_REASON = 1000  # characters: a template's author may write any

# Modules come from where they come from here, and not from whatever folder this is.
_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from tinyserve.text import template_process
template_process.main({max_seconds}, {max_memory}, {max_characters})
"""


class InvalidTemplateError(Exception):
    """What was given is no template: a reason, and the line if there is one."""

    def __init__(self, reason: str, line: int | None) -> None:
        super().__init__(reason, line)
        self.reason, self.line = reason, line


class RenderError(InvalidTemplateError):
    """A template has failed."""


class RefusedError(RenderError):
    """A template has called raise_exception: the reason is its author's."""


class LimitError(Exception):
    """A template takes more than there is for one: a phrase that goes on after its name."""


_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (InvalidTemplateError, RenderError, RefusedError, LimitError)
}
_free = threading.BoundedSemaphore(MAX_PROCESSES)
_idle: queue.LifoQueue[subprocess.Popen[bytes]] = queue.LifoQueue()


class _Question(NamedTuple):
    """A template, what it is rendered with, and for how long; compiling it has a time of its own."""

    source: str
    variables: dict[str, Any] | None = None
    max_seconds: float | None = None


class _Answer(NamedTuple):
    text: str
    error: list[Any] | None  # its class and arguments


def check(source: str) -> None:
    """Raise InvalidTemplateError for what does not compile, and LimitError."""
    _ask(_Question(source))


def render(source: str, variables: Mapping[str, Any], max_seconds: float | None = None) -> str:
    """What a template writes; `variables` are JSON data. Raises the errors above.

    TinyserveError where no process can be started.
    """
    return _ask(_Question(source, dict(variables), max_seconds))


def close() -> None:
    """End the processes that wait."""
    with suppress(queue.Empty):
        while True:
            _end(_idle.get_nowait())


def _forget() -> None:
    """In the child of a fork: the processes are its parent's."""
    global _free, _idle
    _free, _idle = threading.BoundedSemaphore(MAX_PROCESSES), queue.LifoQueue()


atexit.register(close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _ask(question: _Question) -> str:
    with _free:
        process = _take()
        is_late = threading.Event()

        def end_late() -> None:
            is_late.set()
            process.kill()

        timer = threading.Timer(MAX_WAIT, end_late)
        timer.daemon = True
        timer.start()
        try:
            answer = _exchange(process, question)
        except BaseException:  # an interruption, say: what it would answer now nobody waits for
            _end(process)
            raise
        finally:
            timer.cancel()
        if answer is None:
            _end(process)
            raise LimitError(_how_it_ended(process.returncode, is_late.is_set(), question.max_seconds or MAX_SECONDS))
        _idle.put(process)
    if answer.error is not None:
        kind, *arguments = answer.error
        raise _ERRORS[kind](*arguments)
    return answer.text


def _take() -> subprocess.Popen[bytes]:
    with suppress(queue.Empty):
        while True:
            process = _idle.get_nowait()
            if process.poll() is None:
                return process
            _end(process)
    program = _PROGRAM.format(max_seconds=MAX_SECONDS, max_memory=MAX_MEMORY, max_characters=MAX_CHARACTERS)
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", program, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError as error:
        raise TinyserveError(f"The process that renders chat templates cannot be started ({error.strerror}).") from None


def _exchange(process: subprocess.Popen[bytes], question: _Question) -> _Answer | None:
    """Ask and hear the answer; None where the process has ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        _write(process.stdin, pickle.dumps(tuple(question)))
        head = _read(process.stdout)
        body = _read(process.stdout)
    except (OSError, EOFError):
        return None
    return _Answer(body.decode("utf-8", "surrogatepass"), json.loads(head))


def _how_it_ended(code: int, is_late: bool, max_seconds: float) -> str:
    if is_late:
        return f"takes longer than {MAX_WAIT:g} s"
    if code == -getattr(signal, "SIGPROF", code + 1):
        return f"takes longer than {max_seconds:g} s"
    return "takes more memory, or a deeper stack, than there is for rendering one"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # does nothing where it has ended
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


def _write(pipe: BinaryIO | Any, data: bytes) -> None:
    pipe.write(len(data).to_bytes(8, "little"))
    pipe.write(data)
    pipe.flush()


def _read(pipe: BinaryIO | Any) -> bytes:
    size = pipe.read(8)
    data: bytes = pipe.read(int.from_bytes(size, "little"))
    if len(size) < 8 or len(data) < int.from_bytes(size, "little"):
        raise EOFError
    return data


# --- in the process ---------------------------------------------------------------------------------------------------


def main(max_seconds: float, max_memory: int, max_characters: int) -> None:
    """Answer until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; it is the parent's to answer
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_memory, max_memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
    environment, compiled = _environment(), dict[str, "jinja2.Template"]()
    questions, answers = sys.stdin.buffer, sys.stdout.buffer

    def answer(source: str, variables: dict[str, Any] | None, seconds: float | None) -> bytes:
        template = _compiled(environment, compiled, source)
        if variables is None:
            return b""
        _time(seconds or max_seconds)
        return _text(template, variables, max_characters).encode("utf-8", "surrogatepass")

    with suppress(EOFError):
        while True:
            text, error = b"", None
            try:
                question = _read(questions)
                _time(max_seconds)
                text = answer(*pickle.loads(question))
            except (InvalidTemplateError, LimitError) as caught:
                error = [type(caught).__name__, *caught.args]
            except MemoryError:
                error = [LimitError.__name__, f"takes more than {max_memory >> 20} MB of memory"]
            _time(0)
            _write(answers, json.dumps(error).encode())
            _write(answers, text)


def _time(seconds: float) -> None:
    """End this process after so many seconds of its own, wherever it is then; 0 lets it live."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _compiled(
    environment: ImmutableSandboxedEnvironment, compiled: dict[str, jinja2.Template], source: str
) -> jinja2.Template:
    if source not in compiled:
        if len(compiled) == _MOST_COMPILED:
            del compiled[next(iter(compiled))]
        try:
            compiled[source] = environment.from_string(source)
        except MemoryError:
            raise
        except Exception as error:  # mostly TemplateSyntaxError, but Python's compiler and recursion have their limits
            raise InvalidTemplateError(_reason(error), getattr(error, "lineno", None)) from None
    return compiled[source]


def _text(template: jinja2.Template, variables: dict[str, Any], max_characters: int) -> str:
    import jinja2

    pieces, size = [], 0
    try:
        for piece in template.generate(variables):
            size += len(piece)
            if size > max_characters:
                raise LimitError(f"writes more than {max_characters} characters")
            pieces.append(piece)
    except (MemoryError, LimitError):
        raise
    except Exception as error:
        # A template is the checkpoint's code, and may raise anything: TemplateError itself comes from
        # raise_exception, a message of the template's author; subclasses of it are Jinja's own.
        kind = RefusedError if type(error) is jinja2.TemplateError else RenderError
        raise kind(_reason(error), _line(error.__traceback__)) from None
    return "".join(pieces)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment Hugging Face's templates are written for (transformers.utils.chat_template_utils)."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the assistant wrote, for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models read it: Jinja's own filter would escape <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _line(traceback: TracebackType | None) -> int | None:
    """The template's line in which an exception arose; Jinja maps tracebacks back to its source."""
    line = None
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == "<template>":
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def _reason(error: Exception) -> str:
    return (str(error)[:_LONGEST_REASON] or type(error).__name__).strip().rstrip(".!")
