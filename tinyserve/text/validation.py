"""What is handed to `LLM`, checked and in one form: options, prompts, and what goes with each prompt."""

import difflib
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from operator import index
from typing import Any

from tinyserve.errors import RequestError, UserError
from tinyserve.sampling_params import SamplingParams
from tinyserve.text.chat import ChatPrompt

Prompt = str | SequenceOf[int] | Mapping[str, Any] | ChatPrompt

_OPTIONS = (
    "dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory", "kv_cache_dtype",
    "block_size", "enable_prefix_caching", "speculative_config", "num_threads", "seed", "load_format", "progress",
)  # fmt: skip
_AT_LEAST = {"seed": 0, "block_size": 16, "max_model_len": 2}
_MOST_SEQS = 1 << 16  # each has a place in the queue, whether it is ever taken or not


def check_options(unknown: Mapping[str, Any], **numbers: int | None) -> None:
    """Raise UserError for an option that does not exist, and for a number that is none or too small."""
    for name in unknown:
        nearest = difflib.get_close_matches(name, _OPTIONS, n=1, cutoff=0.4)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(f"LLM has no option {name!r}.{hint} The options are {', '.join(_OPTIONS)}.")
    for name, value in numbers.items():
        if value is None and name not in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            continue
        least = _AT_LEAST.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{name} is {value!r}; it must be a whole number of at least {least}.")
        if name == "max_num_seqs" and value > _MOST_SEQS:
            raise UserError(f"max_num_seqs is {value}; it must be at most {_MOST_SEQS}.")
        if name == "block_size" and value % 16:
            raise UserError(f"block_size is {value}; it must be a multiple of 16.")


def as_prompts(prompts: Any) -> list[Prompt]:
    """One prompt or many, of text or of token ids, as a list of prompts."""
    if isinstance(prompts, str | bytes | Mapping) or not hasattr(prompts, "__getitem__"):
        return [prompts]
    try:
        items = list(prompts)
    except TypeError:  # an array of no dimension: the prompt is refused as a prompt
        return [prompts]
    is_one_prompt = bool(items) and not any(hasattr(item, "__len__") or isinstance(item, ChatPrompt) for item in items)
    return [items] if is_one_prompt else items


def as_params(params: SamplingParams | SequenceOf[SamplingParams], count: int) -> list[SamplingParams]:
    several = [params] * count if isinstance(params, SamplingParams) else params
    is_list = hasattr(several, "__len__") and not isinstance(several, str | Mapping)
    if not is_list or not all(isinstance(one, SamplingParams) for one in several):
        raise RequestError(
            f"sampling_params is a SamplingParams or a list of them, not {params!r:.60}.", param="sampling_params"
        )
    if len(several) != count:
        raise RequestError(
            f"There are {count} prompts and {len(several)} sampling_params: give one for all, or one each.",
            param="sampling_params",
        )
    return list(several)


def as_priorities(priority: Any, count: int) -> list[int]:
    try:
        priorities = [index(one) for one in priority] if hasattr(priority, "__len__") else [index(priority)] * count
    except TypeError:
        raise RequestError(
            f"priority is {priority!r:.60}; it must be a whole number, or a list of them.", param="priority"
        ) from None
    if len(priorities) != count:
        raise RequestError(
            f"There are {count} prompts and {len(priorities)} priorities: give one for all, or one each.",
            param="priority",
        )
    return priorities
