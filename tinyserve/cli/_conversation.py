"""A conversation: what was said so far, asked again with each question, and its oldest turns dropped in time.

Knows that a context is limited; who answers, and what a terminal shows, is behind interfaces.
"""

import sys
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from tinyserve.cli._answer import check_text
from tinyserve.cli._answer_printer import AnswerPrinter
from tinyserve.cli._backends import Backend
from tinyserve.errors import ContextLengthError, TinyserveError, UserError

Turn = tuple[str, str]  # a question and its answer


class Conversation:
    """Turns, behind a system message that always stays. A question that was not answered is no part of it."""

    def __init__(
        self, backend: Backend, sampling: Mapping[str, Any], max_tokens: int, system: str | None, verbose: bool = False
    ):
        """`max_tokens` is of an answer, where `sampling` does not say; `verbose` tells how each is decoded."""
        self._backend, self._sampling, self._max_tokens = backend, sampling, max_tokens
        self._system, self._verbose = system, verbose
        self._turns: list[Turn] = []
        self._tokens: int | None = None  # of all turns, if whoever answered has told

    def reset(self) -> None:
        """Forget all but the system message."""
        self._turns, self._tokens = [], None

    def answer(self, question: str) -> None:
        """Print an answer on stdout, or on stderr why there is none; Ctrl-C ends it."""
        printer = AnswerPrinter(self._backend.line)
        kept, tokens = self._turns, self._tokens
        try:
            check_text(question)
            while True:
                try:
                    tokens = self._ask(question, kept, tokens, printer)
                    break
                except ContextLengthError:
                    if not kept or printer.text:
                        raise
                    # A quarter at a time: behind whatever is dropped the whole prompt is read anew.
                    kept, tokens = kept[max(1, len(kept) // 4) :], None
        except KeyboardInterrupt:
            tokens = None
            printer.clear()
            print(" [stopped]", end="", file=sys.stderr, flush=True)
        except TinyserveError as error:
            printer.clear()
            if printer.text:
                print(flush=True)
            # A question that is too long by itself stays so.
            way_out = isinstance(error, UserError) and not isinstance(error, ContextLengthError)
            print(f"tinyserve: {error}{' (/reset begins anew)' * way_out}", file=sys.stderr)
            return
        print(flush=True)
        self._turns, self._tokens = [*kept, (question, printer.text)], tokens

    def _ask(self, question: str, kept: list[Turn], tokens: int | None, printer: AnswerPrinter) -> int | None:
        """Print what follows these turns; returns the tokens of it all. Raises ContextLengthError if they are too many.

        `tokens` are those of the turns alone, for when only the other side can count the question's.
        """
        completion = self._backend.complete(self._messages(question, kept), self._sampling, self._max_tokens)
        if kept and self._is_full(completion.prompt_tokens or tokens):
            raise ContextLengthError("There is no room for an answer.", param="prompt")
        if self._verbose:
            printer.clear()
            print(completion.explain("the conversation so far"), file=sys.stderr)
        dropped = len(self._turns) - len(kept)
        with closing(completion.stream()) as pieces:
            for piece in pieces:
                if dropped:
                    printer.clear()
                    turns = "oldest turn is" if dropped == 1 else f"{dropped} oldest turns are"
                    print(f"(The context is full: the {turns} dropped.)", file=sys.stderr)
                    dropped = 0
                printer.write(piece)
        printer.clear()
        spent = completion.statistics()
        read, written = spent["prompt_tokens"], spent["output_tokens"]
        return None if read is None or written is None else read + written

    def _messages(self, question: str, kept: list[Turn]) -> list[dict[str, str]]:
        said = [("system", self._system)] if self._system else []
        for asked, answered in kept:
            said += [("user", asked), ("assistant", answered)]
        return [{"role": role, "content": content} for role, content in [*said, ("user", question)]]

    def _is_full(self, tokens: int | None) -> bool:
        """Whether these leave too little of the context: less than an answer may have, and than a quarter of it."""
        context = self._backend.max_model_len
        if context is None or tokens is None:
            return False
        return context - tokens < min(self._sampling.get("max_tokens") or self._max_tokens, context // 4)
