"""What is handed to `LLM` with a request, checked and in one form: prompts, and what goes with each of them."""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from operator import index
from typing import Any

from tinyserve.errors import RequestError
from tinyserve.sampling_params import SamplingParams
from tinyserve.text.chat import ChatPrompt

Prompt = str | SequenceOf[int] | Mapping[str, Any] | ChatPrompt


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
