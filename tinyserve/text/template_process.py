"""Chat templates are run in a process of their own, of limited time and memory: they are programs of strangers.

Jinja's sandbox lets none of them out, but `{{ 2**100000000000 }}` hangs whoever compiles it, and one expression takes
all memory. Knows Jinja, nothing of conversations: a source goes in with its variables, and a text comes out.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from tinyserve.text.limited_process import EndedError, Excess, LimitedProcesses, Limits, limit_processor

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
_processes = LimitedProcesses(
    __name__, "renders chat templates", Limits(MAX_MEMORY), most_running=MAX_PROCESSES, most_idle=MAX_PROCESSES
)


class _Question(NamedTuple):
    """A template, what it is rendered with, and the seconds of the processor for compiling and for rendering it."""

    source: str
    variables: dict[str, Any] | None
    compile_seconds: float
    render_seconds: float


def check(source: str) -> None:
    """Raise InvalidTemplateError for what does not compile, and LimitError."""
    _ask(_Question(source, None, MAX_SECONDS, MAX_SECONDS))


def render(source: str, variables: Mapping[str, Any], max_seconds: float | None = None) -> str:
    """What a template writes; `variables` are JSON data. Raises the errors above.

    TinyserveError where no process can be started.
    """
    return _ask(_Question(source, dict(variables), MAX_SECONDS, max_seconds or MAX_SECONDS))


def close() -> None:
    """End the processes that wait."""
    _processes.close()


def _ask(question: _Question) -> str:
    try:
        answer = _processes.ask(pickle.dumps(tuple(question)), MAX_WAIT)
    except EndedError as error:
        raise LimitError(_how_it_ended(error.excess, question.render_seconds)) from None
    head, _, text = answer.partition(b"\n")
    if (failure := json.loads(head)) is not None:
        kind, *arguments = failure
        raise _ERRORS[kind](*arguments)
    return text.decode("utf-8", "surrogatepass")


def _how_it_ended(excess: Excess, max_seconds: float) -> str:
    match excess:
        case Excess.WAIT:
            return f"takes longer than {MAX_WAIT:g} s"
        case Excess.PROCESSOR:
            return f"takes longer than {max_seconds:g} s"
        case _:
            return "takes more memory, or a deeper stack, than there is for rendering one"


# --- in the process ---------------------------------------------------------------------------------------------------


def answerer(setup: bytes) -> Callable[[bytes], bytes]:
    """The function that renders: its answer is a line, null or an error's class and arguments, and then the text."""
    environment, compiled = _environment(), dict[str, "jinja2.Template"]()

    def render(question: _Question) -> bytes:
        limit_processor(question.compile_seconds)
        template = _compiled(environment, compiled, question.source)
        if question.variables is None:
            return b""
        limit_processor(question.render_seconds)
        return _text(template, question.variables).encode("utf-8", "surrogatepass")

    def answer(question: bytes) -> bytes:
        text, error = b"", None
        try:
            text = render(_Question(*pickle.loads(question)))
        except (InvalidTemplateError, LimitError) as caught:
            error = [type(caught).__name__, *caught.args]
        except MemoryError:
            error = [LimitError.__name__, f"takes more than {MAX_MEMORY >> 20} MB of memory"]
        limit_processor(0)
        return json.dumps(error).encode() + b"\n" + text

    return answer


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


def _text(template: jinja2.Template, variables: dict[str, Any]) -> str:
    import jinja2

    pieces, size = [], 0
    try:
        for piece in template.generate(variables):
            size += len(piece)
            if size > MAX_CHARACTERS:
                raise LimitError(f"writes more than {MAX_CHARACTERS} characters")
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
