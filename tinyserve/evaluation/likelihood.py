"""How likely a model finds a text after another: what multiple choice and lm-evaluation-harness ask for.

Texts become tokens as in the harness (lm_eval/api/model.py, TemplateLM), so that its numbers and ours are the same.
"""

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tinyserve.errors import RequestError, TinyserveError, UserError
from tinyserve.evaluation.perplexity import cross_entropy
from tinyserve.progress import Progress, silent
from tinyserve.sampler import DAMAGED

if TYPE_CHECKING:
    from tinyserve.llm import LLM
    from tinyserve.text.tokenizer import Tokenizer

logger = logging.getLogger("tinyserve")


class Pair(NamedTuple):
    """The tokens of a context, one or more, and of what is to follow it, one or more."""

    context: list[int]
    continuation: list[int]


class Likelihood(NamedTuple):
    """The sum of the log-probabilities of a continuation's tokens in nats, and whether each was the likeliest."""

    logprob: float
    is_greedy: bool


def tokenizer_of(llm: "LLM") -> "Tokenizer":
    """The model's tokenizer; raises UserError where there is none."""
    if llm.tokenizer is None:
        raise UserError(f"{llm.name} has synthetic weights and no tokenizer: there is no text it could read.")
    return llm.tokenizer


def prefix_token(llm: "LLM") -> int:
    """What a text without a context follows: the token that begins texts, or that ends them; raises UserError."""
    tokenizer = tokenizer_of(llm)
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    if not tokenizer.eos_token_ids:
        raise UserError(f"{llm.name} has no token that begins or ends a text: give each text a context.")
    return min(tokenizer.eos_token_ids)


def encode(llm: "LLM", text: str) -> list[int]:
    """A text's tokens, with what the checkpoint puts before it, once: a chat template has written its BOS itself."""
    return tokenizer_of(llm).encode_prompt(text)


def encode_pair(llm: "LLM", context: str, continuation: str) -> Pair:
    """Tokens of both texts, cut where the context's end; spaces at its end begin the continuation.

    Raises RequestError where no token is left to be scored.
    """
    end = len(context.rstrip())
    context, continuation = context[:end], context[end:] + continuation
    if context:
        ids = encode(llm, context)
        pair = Pair(ids, encode(llm, context + continuation)[len(ids) :])
    else:
        prefix, ids = prefix_token(llm), tokenizer_of(llm).encode(continuation, add_special_tokens=False)
        pair = Pair([prefix], ids[1:] if ids[:1] == [prefix] else ids)
    if not pair.continuation:
        raise RequestError(
            f"{continuation!r:.60} adds no token to {context!r:.60}: there is nothing to score.", param="continuation"
        )
    return pair


def rolling_pairs(token_ids: Sequence[int], prefix: int, window: int) -> list[Pair]:
    """A long text as pairs of which `window` tokens are read at most: each token is predicted once.

    The last ones have all the context there is room for: lm_eval.utils.get_rolling_token_windows
    with a context of one token, made disjoint.
    """
    text = [prefix, *token_ids]
    pairs = []
    for start in range(1, len(text), window):
        end = min(start + window, len(text))
        pairs.append(Pair(text[max(0, end - 1 - window) : start], text[start:end]))
    return pairs


def loglikelihoods(llm: "LLM", pairs: Sequence[Pair], progress: Progress = silent) -> list[Likelihood]:
    """Each continuation's likelihood after its context, of which the end is read where all is too long.

    Pairs that differ in their last token only are read once: choices of one token cost one prefill together.
    `progress` hears ("evaluate", tokens read, tokens in all). Raises RequestError for a continuation that is too long,
    and TinyserveError for logits that are not numbers.
    """
    places: dict[tuple[int, ...], list[int]] = {}
    for place, (context, continuation) in enumerate(pairs):
        if len(continuation) > llm.max_model_len:
            raise RequestError(
                f"A continuation has {len(continuation)} tokens, and {llm.name} reads {llm.max_model_len}: raise "
                f"max_model_len, or shorten it.",
                param="continuation",
            )
        ids = [*context, *continuation[:-1]]
        if len(ids) > llm.max_model_len:
            logger.warning("%s: of %d tokens the last %d are read", llm.name, len(ids), llm.max_model_len)
        places.setdefault(tuple(ids[-llm.max_model_len :]), []).append(place)
    found: dict[int, Likelihood] = {}
    done, total = 0, sum(map(len, places))
    progress("evaluate", 0, total)
    for read, sharing in places.items():
        logits = llm.logits(list(read), max(len(pairs[place].continuation) for place in sharing))
        for place in sharing:
            targets = pairs[place].continuation
            rows = logits[-len(targets) :]
            logprob = -cross_entropy(rows, targets) * len(targets)
            if math.isnan(logprob):
                raise TinyserveError(DAMAGED)
            found[place] = Likelihood(logprob, bool((rows.argmax(axis=1) == targets).all()))
        done += len(read)
        progress("evaluate", done, total)
    return [found[place] for place in range(len(pairs))]
